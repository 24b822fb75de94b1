"""A run as a repository of the Hugging Face Hub: the folder that is uploaded is a checkpoint that `jlt.load` opens.

README.md         the model card: what the model is, how to use it, its results and settings
checkpoint.json   the header of the run's last checkpoint, naming the weights that are here
ema-0.9999.safetensors, ...    the weights chosen, never the optimizer's state
representation/   what decodes the latents
record.json       the run's evaluation, if it has one, with the pictures that it names
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlt import files
from jlt.data.hub import find_checkpoint, one_line, parse
from jlt.evaluation import records
from jlt.evaluation.records import Record
from jlt.experiments.report import format_value
from jlt.extras import needed
from jlt.flow.targets import short_name
from jlt.nn import checkpoint


def publish(
    run: Path,
    repository: str,
    weights: Sequence[str] = ("ema",),
    license: str | None = None,
    record: Path | None = None,
    private: bool = False,
    to: Path | None = None,
) -> str:
    """Upload a run and return its address; or write what would be uploaded into the new folder `to` and return that.

    Args:
        run: a run folder (its last checkpoint), a checkpoint folder, or another repository.
        repository: ORG/NAME; made if it is not there.
        weights: as in `jlt.load`, which opens the first average among them unless it is told otherwise.
        license: the Hub's name of a license, for the card.
        record: what an evaluation measured; by default RUN/evaluation/record.json, if it is there.
        private: whether a new repository is private.
        to: write the folder and upload nothing.
    """
    named = parse(repository)
    if named is None or named[1] is not None:
        raise ValueError(f"the repository must be ORG/NAME, got {repository}")
    run = find_checkpoint(run)
    opened = checkpoint.read(run)
    names = list(dict.fromkeys(opened.resolve(each) for each in weights))
    if not names:
        raise ValueError("there are 0 weights to upload, at least 1 is wanted")
    if record is None and (run / "evaluation" / "record.json").is_file():
        record = run / "evaluation" / "record.json"
    if to is not None:
        if to.is_file() or files.names(to):
            raise ValueError(f"{to} is not an empty folder; an upload has a folder of its own")
        with files.replaced(to) as temporary:
            write(opened, names, temporary, repository, license, record)
        return str(to)
    with needed("an upload", "hub"):
        from huggingface_hub import HfApi
    with tempfile.TemporaryDirectory() as folder:
        write(opened, names, Path(folder, "upload"), repository, license, record)
        try:
            address = HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repository, folder_path=Path(folder, "upload"), commit_message=f"Add step {opened.step}"
            )
        except Exception as error:  # no network, no permission: the client has a kind for each
            raise ValueError(f"{repository} was not uploaded: {one_line(error)}") from None
    return str(address)


def write(
    opened: checkpoint.Checkpoint,
    names: Sequence[str],
    out: Path,
    repository: str,
    license: str | None,
    record: Path | None,
) -> None:
    """Fill the folder; weights are verified on the way."""
    out.mkdir()
    num_parameters = 0
    for name in names:
        num_parameters = sum(tensor.numel() for tensor in opened.tensors(name).values())
        shutil.copyfile(opened.folder / f"{name}.safetensors", out / f"{name}.safetensors")
    shutil.copytree(opened.folder / "representation", out / "representation")
    kept = {f"{name}.safetensors": opened.header["files"][f"{name}.safetensors"] for name in names}
    files.write_json(out / checkpoint.HEADER, {**opened.header, "files": kept})
    measured = None
    if record is not None:
        measured = records.read(record)
        shutil.copyfile(record, out / "record.json")
        for path in pictures(measured).values():
            shutil.copyfile(record.parent / path, out / path)
    text = card(opened, names, repository, license, measured, num_parameters)
    files.write_bytes(out / "README.md", text.encode())


def card(
    opened: checkpoint.Checkpoint,
    names: Sequence[str],
    repository: str,
    license: str | None,
    record: Record | None,
    num_parameters: int,
) -> str:
    """Return the model card: Markdown below the Hub's YAML."""
    header, config = opened.header, opened.config
    training, classes = header.get("training", {}), header["latents"]["class_names"]
    chosen = names[0].replace("power-", "power=")
    first = "" if any(name.startswith("ema") for name in names) else f', weights="{chosen}"'
    asked = f"[0, {config.num_classes - 1}], seed=0, scale=2.0" if config.num_classes else "[0, 0], seed=0"
    front = {"library_name": "jlt", "pipeline_tag": "unconditional-image-generation", "license": license}
    kind = f"of {config.num_classes} classes" if config.num_classes else "without classes"
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items() if value),
        "tags: [diffusion, flow-matching, latent-diffusion]",
        "---",
        "",
        f"# {header['name']}",
        "",
        f"A latent diffusion Transformer that predicts `{short_name(header['target'])}`, {kind}: "
        f"{num_parameters:,} parameters, latents of {' x '.join(map(str, config.shape))}, step {opened.step:,} of its "
        "training with [jlt](https://arxiv.org/abs/2605.27102).",
        "",
        "```python",
        "import jlt",
        "",
        f'generator = jlt.load("{repository}"{first})',
        f"images = generator.sample({asked}).images  # uint8 (n, channels, height, width)",
        "```",
        "",
        f"Or `jlt sample {repository} samples{f' --weights {chosen}' if first else ''}`. Nothing here is executed: "
        "weights are safetensors, the rest is JSON. It holds " + ", ".join(f"`{name}`" for name in names) + ".",
        "",
        "## Results",
        "",
        *(results(record) if record else ["Not measured."]),
        "",
        "## Training",
        "",
        *table(["setting", "value"], [[key, plain(value)] for key, value in training.items()]),
    ]
    if classes:
        lines += ["", f"Classes, from 0: {', '.join(map(str, classes[:1000]))}."]
    return "\n".join(lines) + "\n"


def results(record: Record) -> list[str]:
    """Return a table of all values, a column a part, then what made them, then the pictures."""
    columns = [part for part in (record, *record.parts) if part.values]
    names = list(dict.fromkeys(name for column in columns for name in column.values))
    rows = [
        [name, *(format_value(column.values[name]) if name in column.values else "" for column in columns)]
        for name in names
    ]
    lines = table(["", *(column.name for column in columns)], rows)
    lines += ["", f"`{record.command}`, commit {record.commit}, {record.hardware}, {record.created}."]
    lines += ["", "Made with " + ", ".join(f"{key} {plain(value)}" for key, value in record.settings.items()) + "."]
    for caption, path in pictures(record).items():
        lines += ["", f"![{caption}]({path})"]
    return lines


def pictures(record: Record) -> dict[str, str]:
    """Return the pictures of a record and its parts by caption; a path out of its folder is a ValueError."""
    found = {caption: path for part in (*record.parts, record) for caption, path in part.pictures.items()}
    for path in found.values():
        if Path(path).name != path:
            raise ValueError(f"the record names the picture {path}, which is not beside it")
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def plain(value: Any) -> str:
    """Return a setting as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return " ".join(str(value).split())
