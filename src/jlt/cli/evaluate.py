"""`jlt evaluate RUN LATENTS`, and `jlt evaluate RUN_OR_IMAGES --reference REF.npz`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.places import OptionalLatentsPath
from jlt.evaluation import records
from jlt.experiments.asking import Sampling
from jlt.experiments.benchmark import benchmark, own_folder
from jlt.experiments.evaluate import evaluate
from jlt.experiments.report import text_table


def run(
    source: Annotated[str, tyro.conf.arg(name="run", metavar="RUN"), tyro.conf.Positional],
    latents: OptionalLatentsPath = None,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008
    *,
    seeds: tuple[int, ...] = (),
    reference: Path | None = None,
    extractor: str = "efficientnet-lite0",
    image_size: int | None = None,
    device: str = "cpu",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a run's images, or others, against real ones.

    With LATENTS, against the held-out images of the data a run was trained on, beside real training images measured in
    the same way. With --reference, against statistics that jlt reference made or that others published: FID, sFID, IS,
    KID, precision, recall, density and coverage on extractor inception; docs/evaluation.md is the protocol. With both,
    the held-out images of LATENTS, encoded and decoded, are measured against the reference, too. On several GPUs:
    torchrun --nproc-per-node 8 -m jlt evaluate ... --device cuda

    Writes a record and a grid of the images; `jlt report` makes a page of them.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub; or images, with
            --reference: a folder, tar:PATH, FILE.npz, or another source of jlt encode.
        latents: the folder of latents it was trained on, with a held-out split; its source gives the real images.
        sampling: how images are made.
        seeds: several seeds, in place of --seed: each value is then mean and standard deviation over them.
        reference: statistics of real images, a .npz file.
        extractor: features that images are compared on: efficientnet-lite0, pixels, inception, inception:PATH of its
            weights, or dinov2:FOLDER.
        image_size: side of the centre crop of photographs, for images that are no run's; by default 256.
        device: where the run works, such as cuda; with --reference the extractor's network, too.
        out: folder for the record and the picture; by default `evaluation` in the run folder.
        json: print the record as JSON.
    """
    if latents is None and reference is None:
        raise ValueError("evaluate compares with the held-out images of LATENTS or with --reference; neither was given")
    if reference is None and image_size is not None:
        raise ValueError(
            f"image_size is {image_size}, but the images of a run have the size of those it was trained on"
        )
    out = own_folder(Path(source), "evaluation") if out is None else out
    path: Path | None
    if reference is not None:
        path = benchmark(source, reference, out, sampling, extractor, image_size, device, seeds, latents)
    else:
        assert latents is not None
        path = evaluate(Path(source), latents, out, sampling, extractor, seeds, device)
    if path is not None:
        print(path.read_text() if json else f"{text_table(records.read(path))}\n\n{path}")
