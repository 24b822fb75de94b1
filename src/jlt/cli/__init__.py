"""The command line: one file a command, whose function `run` parses (its signature and docstring are the help), calls
the library, and prints.

`jlt --help` reads only the table below; a command's module is imported when it is asked for. Bad input, which the
library raises as ValueError or OSError, becomes one line on standard error and exit code 2.
"""

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jlt import __version__, files

COMMANDS = {
    "quickstart": "train, sample and compare two models on real digits, with a report, in minutes on a CPU",
    "encode": "turn images into latents on disk",
    "latents": "look at latents on disk, or check them against what they promise",
    "train": "train a Transformer on latents; the same command again resumes",
    "sample": "make images with a trained run",
    "invert": "follow held-out latents back to their noise, and forth again",
    "interpolate": "draw the images between those of two noises",
    "evaluate": "measure a run's images, or others, against real ones",
    "reference": "make the statistics of real images that evaluate compares with",
    "sweep": "find a run's best guidance, average and solver, with a heat map",
    "geometry": "measure the latents' spectrum, and what each prediction target makes of it",
    "compare": "train and measure runs that differ in declared settings and in nothing else",
    "report": "write a page from a record",
    "app": "serve a page to play with a run, or with two side by side",
    "export": "write a run for diffusers, ONNX or torch.export",
    "push": "upload a run to the Hugging Face Hub, with a model card",
    "import": "turn the authors' checkpoint, or their latents, into ours",
    "doctor": "say what this machine has, and rehearse a training on it",
}

MODULES = {"import": "import_"}  # where a command's name is a word of Python

HELP = f"""jlt {__version__}: clean-latent prediction in latent diffusion Transformers

usage: jlt COMMAND [OPTIONS]     jlt COMMAND --help describes each option

{chr(10).join(f"  {name:<12}{what}" for name, what in COMMANDS.items())}

  jlt --version prints the version, jlt --completion bash (zsh, tcsh) a script that completes what is typed.
  JLT_DEBUG=1 in the environment shows a traceback with an error."""


def main(arguments: list[str] | None = None) -> int:
    """Run `jlt COMMAND ...`; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        if arguments[0] == "--completion":
            print(completion(arguments[1] if len(arguments) > 1 else "bash"))
            return 0
        files.choose("command", arguments[0], COMMANDS)
        command = open_command(arguments[0])
        program, rest, defaults = f"jlt {arguments[0]}", arguments[1:], {}
        if hasattr(command, "PRESETS"):
            if not rest or rest[0].startswith("-"):
                print(preset_help(program, command.PRESETS))
                return 0 if rest[:1] in (["-h"], ["--help"]) else 2
            defaults = command.defaults(files.choose("preset", rest[0], command.PRESETS))
            program, rest = f"{program} {rest[0]}", rest[1:]
        return call(command.run, program, rest, defaults)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("JLT_DEBUG"):
            raise
        print(f"jlt: {one_line(describe(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # training has saved its state, and says so
        print(f"jlt: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130


def open_command(name: str) -> Any:
    """Return the module of a command."""
    return importlib.import_module(f"jlt.cli.{MODULES.get(name, name)}")


def completion(shell: str) -> str:
    """Return the script with which a shell, bash, zsh or tcsh, completes commands, options and their values."""
    import tyro

    files.choose("shell", shell, dict.fromkeys(("bash", "zsh", "tcsh")))
    runs = {name: open_command(name).run for name in COMMANDS}
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(runs, prog="jlt", args=["--tyro-print-completion", shell])
    return script.getvalue()


def describe(error: Exception) -> str:
    """Return an error's message; the system's own ones name the file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def preset_help(program: str, presets: Mapping[str, Any]) -> str:
    """Return how a command that starts from a preset is called, with a line for each preset."""
    width = max(map(len, presets)) + 2
    lines = [f"  {name:<{width}}{preset.note}" for name, preset in presets.items()]
    return (
        f"usage: {program} PRESET ...     {program} PRESET --help describes the rest, with that preset's defaults\n\n"
        f"presets, with the FID-50K / IS that the paper gives (ImageNet 256, guided):\n{chr(10).join(lines)}"
    )


def call(run: Callable[..., int | None], program: str, arguments: list[str], defaults: Mapping[str, Any]) -> int:
    """Parse the arguments by the signature of `run` and call it; what it returns, if anything, is the exit code.

    `defaults` take the place of the signature's own.
    """
    import tyro  # not before a command is known: `jlt --help` needs no parser

    @functools.wraps(run)
    def bind(*positional: object, **named: object) -> Callable[[], int | None]:
        return lambda: run(*positional, **named)

    signature = inspect.signature(run)
    parameters = [p.replace(default=defaults.get(name, p.default)) for name, p in signature.parameters.items()]
    bind.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):  # around the parsing only, or progress bars would go the same way
            bound = tyro.cli(bind, prog=program, args=arguments)
    except SystemExit as end:
        if end.code in (0, None):
            return 0
        raise ValueError(plain(complaint.getvalue())) from None
    return bound() or 0


def plain(box: str) -> str:
    """Turn the parser's framed complaint into one line, without the help text below it."""
    lines = [line.strip("│ ") for line in box.splitlines() if not re.match("[╭╰]", line)]
    text = " ".join("; " if set(line) == {"─"} else line for line in lines)
    return re.split(r";\s+(?:For full helptext|Argument helptext)", text)[0]


def one_line(text: str) -> str:
    return " ".join(text.split()).replace(" ; ", "; ")
