"""The command line: the README's chain on a folder of pictures, quick help, and one line for every mistake."""

import contextlib
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jlt import files
from jlt.cli import COMMANDS, MODULES, main
from jlt.cli.sample import Opened
from jlt.experiments.asking import Sampling
from jlt.experiments.plan import as_json, plan
from jlt.experiments.presets import PRESETS
from jlt.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = [
    "--size", "1x32x2", "--steps", "6", "--batch-size", "4", "--warmup-steps", "2", "--save-every", "3",
    "--held-out-every", "3", "--ema-decays", "0.5",
]  # fmt: skip


COMPARE = ["compare", "small", "CHAIN/latents", "OUT", "--extractor", "pixels"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for i in range(12):
            pixels = generator.integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


def readme_commands(heading: str) -> list[list[str]]:
    """Return the arguments of each jlt command below a heading of the README."""
    readme = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", "")
    section = readme.split(f"{heading}\n")[1].split("\n## ")[0]
    lines = [part for line in section.splitlines() for part in line.split("&&")]
    found = [re.fullmatch(r"\s*jlt ([a-z]+ .*)", line) for line in lines]
    return [match[1].split() for match in found if match]


@pytest.fixture(scope="module")
def chain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the README's five commands as they stand there, with options that make them tiny."""
    root = tmp_path_factory.mktemp("chain")
    commands = readme_commands("## Your own images")
    assert [command[0] for command in commands] == ["encode", "train", "sample", "evaluate", "report"]
    sampling = ["--steps", "2", "--batch-size", "3"]
    smaller = {
        "encode": ["--stride", "8"],
        "train": TINY,
        "sample": ["--num", "4", *sampling],
        "evaluate": ["--extractor", "pixels", "--num-images", "10", *sampling],
    }
    places = {name: str(root / name) for name in ("latents", "run", "samples", "run/evaluation")}
    places |= {"photos": str(photos), "64": "32", "200": "8"}
    for command in commands:
        assert main([places.get(word, word) for word in command] + smaller.get(command[0], [])) == 0, command
    return root


def test_the_chain_leaves_what_it_promises(chain: Path) -> None:
    assert len(list((chain / "samples").glob("0*.png"))) == 4
    summary = json.loads((chain / "samples" / "samples.json").read_text())
    assert (summary["evaluations"], summary["labels"]) == (2, [0, 1, 0, 1])
    record = json.loads((chain / "run" / "evaluation" / "record.json").read_text())
    values = record["parts"][0]["values"]
    assert {"class agreement", "evaluations", "network passes"} <= values.keys()
    assert {name.split(" (")[0] for name in values} >= {"FD", "KD"}
    assert not any(name.startswith(("FID", "KID")) for name in values)  # a distance on other features is not called so
    page = (chain / "run" / "evaluation" / "report.html").read_text()
    assert "JLT-1x32/1" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_geometry_and_latents_read_the_same_folder(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["geometry", str(chain / "latents"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "geometry"
    assert main(["latents", "check", str(chain / "latents")]) == 0
    assert main(["latents", "show", str(chain / "latents"), "--out", str(chain / "latents.png")]) == 0
    with Image.open(chain / "latents.png") as picture:
        assert picture.width > 32


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without moments and measured times."""
    values = {name: value for name, value in record["values"].items() if "time" not in name}
    parts = [without_times(part) for part in record["parts"]]
    return {**record, "created": "", "command": "", "values": values, "parts": parts}


@pytest.fixture(scope="module")
def compared(chain: Path) -> tuple[list[str], Path]:
    """A comparison's arguments, but for where it goes, and the folder of its outcome."""
    base = [f"--base.{option[2:]}" if option.startswith("--") else option for option in TINY]
    arguments = [
        *base, "--vary", "target=x,v", "seed=0,1",
        "--extractor", "pixels", "--sampling.num-images", "10", "--sampling.steps", "2",
        "--tune", "1", "2", "--tune-images", "6",
    ]  # fmt: skip
    assert main(["compare", "small", str(chain / "latents"), str(chain / "compared"), *arguments]) == 0
    return arguments, chain / "compared"


def test_a_comparison_trains_all_combinations_once(chain: Path, compared: tuple[list[str], Path]) -> None:
    arguments, out = compared
    record = json.loads((out / "record.json").read_text())
    columns = [part for part in record["parts"] if part["kind"] == "evaluate"]
    assert [(part["name"], part["settings"]) for part in columns] == [
        ("JLT-1x32/1", {"target": "x"}), ("DiT-1x32/1", {"target": "v"}),
    ]  # fmt: skip
    assert {part["values"]["parameters"]["count"] for part in columns} == {2}
    assert "target" not in record["settings"]
    (runs,) = [part for part in record["parts"] if part["kind"] == "runs"]
    assert [run["settings"] for run in runs["parts"]] == [{"seed": s, "target": t} for t in "xv" for s in (0, 1)]
    (differences,) = [part for part in record["parts"] if part["kind"] == "differences"]
    assert [part["name"] for part in differences["parts"]] == ["DiT-1x32/1 minus JLT-1x32/1"]
    (tuned,) = [part for part in record["parts"] if part["kind"] == "tuned"]
    assert [(part["name"], part["settings"]) for part in tuned["parts"]] == [
        ("JLT-1x32/1", {"target": "x"}), ("DiT-1x32/1", {"target": "v"}),
    ]  # fmt: skip
    assert all(1 <= part["values"]["guidance scale"]["value"] <= 2 for part in tuned["parts"])
    weights = sorted((out / "runs").rglob("model.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert main(["compare", "small", str(chain / "latents"), str(out), *arguments]) == 0
    assert [path.stat().st_mtime_ns for path in weights] == before
    again = json.loads((out / "record.json").read_text())
    assert timeless(again) == timeless(record)  # the times of training and sampling included: nothing was made twice


def test_shares_of_a_comparison_end_in_the_record_of_the_whole(
    chain: Path, compared: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, whole = compared
    command = ["compare", "small", str(chain / "latents"), str(tmp_path), *arguments]
    assert main([*command, "--share", "2/3"]) == 0
    assert "1 of 4 runs are done" in capsys.readouterr().out
    assert not (tmp_path / "record.json").exists()
    assert main([*command, "--share", "1/3"]) == 0
    assert main([*command, "--share", "3/3"]) == 0
    made, expected = (json.loads((out / "record.json").read_text()) for out in (tmp_path, whole))
    assert without_times(made) == without_times(expected)


def test_a_comparison_of_another_base_is_refused_with_what_differs(
    chain: Path, compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = compared
    changed = [*arguments, "--base.learning-rate", "0.5"]
    assert main(["compare", "small", str(chain / "latents"), str(out), *changed]) == 2
    assert (
        "comparison made with other settings: base.learning_rate is 0.0005 there and 0.5 here"
        in capsys.readouterr().err
    )
    more = ["seed=0,1,2" if argument == "seed=0,1" else argument for argument in arguments]
    assert main(["compare", "small", str(chain / "latents"), str(out), *more]) == 2
    assert "runs has {'seed': 2, 'target': 'x'} here alone; runs has" in capsys.readouterr().err


def test_a_comparison_of_other_latents_is_refused_even_where_its_runs_are_done(
    chain: Path, photos: Path, tmp_path: Path, compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = compared
    other = str(tmp_path / "fewer")
    assert main(["encode", str(photos), other, "--image-size", "32", "--stride", "8", "--num-held-out", "4"]) == 0
    before = (out / "record.json").read_bytes()
    assert main(["compare", "small", other, str(out), *arguments]) == 2
    assert "runs/0-x was started with other settings: affine.shift is" in capsys.readouterr().err
    assert (out / "record.json").read_bytes() == before


def test_representations_are_compared_on_the_same_images_only(
    chain: Path, photos: Path, tmp_path: Path, compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [a for a in compared[0] if a not in ("target=x,v", "seed=0,1")]
    encode = ["encode", str(photos), "--image-size", "32", "--stride", "8"]
    assert main([*encode, str(tmp_path / "white"), "--num-held-out", "8", "--normalise", "channel"]) == 0
    assert main([*encode, str(tmp_path / "fewer"), "--num-held-out", "4"]) == 0
    vary = arguments.index("--vary") + 1
    for names, code in (([chain / "latents", "white"], 0), ([chain / "latents", "fewer"], 2), (["fewer"], 2)):
        whole = [*arguments[:vary], f"latents={','.join(str(tmp_path / name) for name in names)}", *arguments[vary:]]
        assert main(["compare", "small", str(chain / "latents"), str(tmp_path / f"to-{names[-1]}"), *whole]) == code
        assert (code == 2) == ("hold latents of different images" in capsys.readouterr().err)
    record = json.loads((tmp_path / "to-white" / "record.json").read_text())
    assert [part["settings"] for part in record["parts"][:2]] == [{"latents": "latents"}, {"latents": "white"}]
    ceilings = [part for part in record["parts"] if "decoded" in part["name"]]
    assert [part["name"].partition(" ")[2] for part in ceilings] == [
        "held-out images, encoded and decoded, latents",
        "held-out images, encoded and decoded, white",
    ]
    assert all(part["values"]["SSIM"]["value"] == pytest.approx(1, abs=1e-3) for part in ceilings)  # no channel dropped
    assert [part["name"] for part in record["parts"][-2:]] == ["Geometry of latents", "Geometry of white"]


@pytest.mark.slow
def test_runs_on_two_devices_end_in_the_record_of_one_after_another(
    chain: Path, compared: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, whole = compared
    command = ["compare", "small", str(chain / "latents"), str(tmp_path), *arguments]
    assert main([*command, "--devices", "cpu", "cpu"]) == 0
    made, expected = (json.loads((out / "record.json").read_text()) for out in (tmp_path, whole))
    assert without_times(made) == without_times(expected)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def test_an_evaluation_killed_at_every_write_ends_in_the_same_record(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, dies_at, replaced = 0, 0, files.replaced

    @contextlib.contextmanager
    def dying(path: Path) -> Iterator[Path]:
        nonlocal writes
        writes += 1
        if writes == dies_at:
            raise Killed
        with replaced(path) as temporary:
            yield temporary

    monkeypatch.setattr(files, "replaced", dying)

    def evaluate(out: Path) -> dict[str, Any]:
        nonlocal writes
        writes = 0
        arguments = ["--extractor", "pixels", "--num-images", "9", "--steps", "2", "--batch-size", "3"]
        assert main(["evaluate", str(chain / "run"), str(chain / "latents"), "--out", str(out), *arguments]) == 0
        record = timeless(json.loads((out / "record.json").read_text()))
        for part in record["parts"]:
            part["values"].pop("sampling time", None)  # another generation takes another time
        return record

    whole = evaluate(tmp_path / "whole")
    total = writes
    assert total >= 8  # what is generated, three batches of images, what it took, two pictures, the record
    for number in range(1, total + 1):
        out, dies_at = tmp_path / str(number), number
        with pytest.raises(Killed):
            evaluate(out)
        dies_at = 0
        made = {path: path.stat().st_mtime_ns for path in (out / "samples").glob("images-*")}
        assert evaluate(out) == whole
        assert {path: path.stat().st_mtime_ns for path in made} == made  # nothing is generated twice


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the moments at which it and its parts were written."""
    return {**record, "created": "", "parts": [timeless(part) for part in record["parts"]]}


def test_a_run_is_measured_only_against_latents_like_its_own(
    chain: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options, message in [
        ("pixels", ["--representation", "pixels"], "the latents' representation is"),
        ("wide", ["--stride", "8", "--image-size", "40", "--upscale"], "the latents' representation is"),
    ]:
        other = str(tmp_path / name)
        assert main(["encode", str(photos), other, "--image-size", "32", "--num-held-out", "8", *options]) == 0
        capsys.readouterr()
        assert main(["evaluate", str(chain / "run"), other, "--extractor", "pixels", "--num-images", "4"]) == 2
        assert message in capsys.readouterr().err
        assert main(["train", "small", other, str(chain / "run"), *TINY]) == 2
        assert "was started with other settings" in capsys.readouterr().err


def test_an_unconditional_model_goes_through_the_chain_and_refuses_guidance(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents, run = str(tmp_path / "latents"), str(tmp_path / "run")
    assert main(["encode", str(photos / "ant"), latents, "--image-size", "32", "--stride", "8"]) == 0
    assert main(["train", "small", latents, run, *TINY]) == 0
    assert main(["sample", run, str(tmp_path / "out"), "--num", "2", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["sample", run, str(tmp_path / "guided"), "--num", "2", "--scale", "2"]) == 2
    assert "guidance scale 2.0 needs a class-conditional model" in capsys.readouterr().err
    assert not (tmp_path / "guided").exists()
    between = ["interpolate", run, str(tmp_path / "between"), "--num", "2", "--steps", "2"]
    assert main([*between, "--label", "0"]) == 2
    assert "label 0 is not below the model's num_classes 0" in capsys.readouterr().err
    assert main(between) == 0


def test_help_needs_no_pytorch() -> None:
    program = "import sys; from jlt.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert all(command in out for command in COMMANDS)


def test_a_shell_completes_commands_options_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "jlt").write_text(capsys.readouterr().out)
    for typed, offered in [("jlt sam", "sample"), ("jlt sample run out --solv", "--solver")]:
        program = (
            f"source jlt; COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tyro_jlt; echo $COMPREPLY"
        )
        done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [offered]
    assert main(["--completion", "fsh"]) == 2
    assert "unknown shell 'fsh', did you mean 'zsh'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset = ["small"] if command in ("train", "compare") else []
    assert main([command, *preset, "--help"]) == 0
    assert f"usage: jlt {command}" in capsys.readouterr().out
    run = importlib.import_module(f"jlt.cli.{MODULES.get(command, command)}").run
    for name in inspect.signature(run).parameters:
        assert re.search(rf"^ +{name}: \S", run.__doc__, re.MULTILINE), f"{command} does not describe {name}"


@pytest.mark.parametrize("settings", [TrainConfig, Sampling, Opened])
def test_every_setting_is_described(settings: type) -> None:
    described = "".join(each.__doc__ or "" for each in settings.__mro__)
    for field in dataclasses.fields(settings):
        assert re.search(rf"^ +{field.name}: \S", described, re.MULTILINE), field.name


def test_a_command_that_starts_from_a_preset_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)


@pytest.mark.parametrize("name", ["jlt-b-1", "dit-b-2-released", "jlt-h-1-jit", "jlt-b-1-512", "small", "digits"])
def test_a_preset_named_on_the_command_line_is_the_one_that_is_used(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", name, "--dry-run", "--json"]) == 0
    expected = plan(PRESETS[name].config, PRESETS[name].expected)
    assert capsys.readouterr().out == as_json(expected) + "\n"


def test_compare_starts_from_the_preset_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "digits", "--help"]) == 0
    assert "(default: 4x128x4)" in capsys.readouterr().out


def test_a_dry_run_takes_options_and_the_latents_given(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "jlt-b-1", "--dry-run", "--dropout", "0.2", "--in-context-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 130_508_672 + 4 * 768
    assert main(["train", "small", str(chain / "latents"), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["latent_shape"], planned["num_classes"], planned["num_images"]) == ([192, 4, 4], 2, 16)
    assert main(["train", "small", "--dry-run"]) == 0
    assert "estimates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'"),
        (["train", "jlt-b-2x", "a", "b"], "unknown preset 'jlt-b-2x', did you mean 'jlt-b-2'"),
        (["train", "small", "absent", "RUN"], "absent is not there; a folder of latents is wanted"),
        (["train", "small", "LATENTS", "RUN", "--target", "xx"], "unknown target 'xx'"),
        (["train", "small", "LATENTS", "RUN", "--target", "k=2"], "k must be in [0, 1], got 2.0"),
        (["train", "small", "LATENTS", "RUN", "--target", "k=0..2"], "k must be in [0, 1], got 2.0"),
        (
            ["train", "small", "LATENTS", "RUN", "--target", "residual=channels:1,2"],
            "states 2 variances, the latents have",
        ),
        (
            ["train", "small", "LATENTS", "RUN", "--loss-space", "residual=channels"],
            "is measured when a training begins",
        ),
        (["train", "small", "LATENTS", "RUN", "--stepz", "3"], "Unrecognized options: --stepz"),
        (["train", "small", "LATENTS", "RUN", "--steps", "many"], "invalid literal for int"),
        (["train", "small", "LATENTS", "RUN", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "small", "--dry-run", "--micro-batch-size", "0"], "micro_batch_size must be at least 1, got 0"),
        (["train", "small", "LATENTS"], "RUN is missing; only --dry-run needs neither"),
        (["train", "small"], "LATENTS and RUN are missing; only --dry-run needs neither"),
        (["train", "small", "LATENTS", "RUN", "--json"], "--json is for --dry-run"),
        (["train", "small", "--dry-run", "--utilisation", "2"], "utilisation must be in (0, 1], got 2.0"),
        (["train", "small", "LATENTS", "RUN", "--patch-size", "3"], "latent_size 4 is not a multiple of patch_size 3"),
        (["train", "small", "LATENTS", "RUN", "--device", "gpu9"], "gpu9"),
        (["sample", "CHAIN/run", "OUT", "--solver", "huen"], "unknown solver 'huen', did you mean 'heun'"),
        (["sample", "CHAIN/run", "OUT", "--interval", "0.9", "0.1"], "0 <= low < high <= 1, got (0.9, 0.1)"),
        (["sample", "CHAIN/run", "OUT", "--label", "cat"], "unknown class 'cat'"),
        (["sample", "CHAIN/run", "OUT", "--steps", "0"], "steps must be at least 1, got 0"),
        (["sample", "CHAIN/run", "OUT", "--num", "0"], "num must be at least 1, got 0"),
        (["sample", "CHAIN/run", "CHAIN/latents"], "is not empty and holds no samples.json"),
        (["sample", "CHAIN/latents", "OUT"], "it is no run and no checkpoint"),
        (["evaluate", "CHAIN/run", "CHAIN/latents", "--extractor", "vgg"], "unknown extractor 'vgg'"),
        (["evaluate", "CHAIN/run", "CHAIN/latents", "--num-images", "0"], "num_images must be at least 2, got 0"),
        (["compare", "small", "CHAIN/latents", "OUT", "--vary", "tarrget=x,v"], "did you mean 'target'"),
        (["compare", "small", "CHAIN/latents", "OUT", "--vary", "target"], "takes name=value,value, got 'target'"),
        (["evaluate", "CHAIN/run", "CHAIN/latents", "--out", "OUT", "--solver", "huen"], "unknown solver 'huen'"),
        (["evaluate", "CHAIN/run", "CHAIN/latents", "--out", "OUT", "--device", "gpu9"], "gpu9"),
        ([*COMPARE, "--extractor", "vgg"], "unknown extractor 'vgg'"),
        ([*COMPARE, "--sampling.solver", "huen"], "unknown solver 'huen', did you mean 'heun'"),
        ([*COMPARE, "--sampling.weights", "0.7"], "unknown weights '0.7'"),
        ([*COMPARE, "--tune", "2", "2"], "scale needs one value or several that differ, got [2.0, 2.0]"),
        ([*COMPARE, "--tune", "2", "--tune-images", "1"], "num_images must be at least 2, got 1"),
        ([*COMPARE, "--vary", "patch_size=1,3"], "latent_size 4 is not a multiple of patch_size 3"),
        ([*COMPARE, "--share", "9/8"], "a share is K/N with K from 1 to N, such as 3/8, got '9/8'"),
        ([*COMPARE, "--devices", "cpu", "gpu9"], "gpu9"),
        (["train", "small", "LATENTS", "FILE/run", *TINY], "FILE"),
        (["train", "small", "LATENTS", "CHAIN/samples", *TINY], "is not empty and holds no config.json of a run"),
        (["sample", "CHAIN/run", "FILE/out", "--steps", "1"], "FILE"),
        (["sample", "CHAIN/run", "FILE"], "is a file; a folder for images is wanted"),
        (["sample", "FILE", "OUT"], "is a file; a run folder or a checkpoint folder is wanted"),
        (["encode", "CHAIN/samples", "FILE/latents", "--image-size", "32"], "FILE"),
        (["encode", "mnist", "FILE"], "is a file; a folder for latents is wanted"),
        (["train", "small", "FILE", "RUN"], "is a file; a folder of latents is wanted"),
        (["report", "absent"], "absent"),
        (["encode", "absent", "OUT"], "absent"),
        (["geometry", "absent"], "absent"),
        (["geometry", "CHAIN/latents", "--loss-space", "x"], "--loss-space x is of the forecast that --rank asks for"),
        (["geometry", "CHAIN/latents", "--target", "k=0..1"], "covariance of k=0..1 changes with t: c_x, c_eps are"),
        (["geometry", "CHAIN/latents", "--time-std", "1"], "--time-std 1.0 is of the forecast that --rank asks for"),
        (
            ["geometry", "CHAIN/latents", "--rank", "2", "--floor", "-1"],
            "floor must be at least 0 and finite, got -1.0",
        ),
        (["doctor", "--dtype", "bfloat16"], "--dtype bfloat16 is of the rehearsal that --train asks for"),
        (["latents", "check", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"LATENTS": str(chain / "latents"), "RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    (tmp_path / "file").write_text("not a folder")
    arguments = [
        places.get(a, a.replace("CHAIN", str(chain)).replace("FILE", str(tmp_path / "file"))) for a in arguments
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message.replace("FILE", str(tmp_path / "file")) in error
    assert error.startswith("jlt: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
