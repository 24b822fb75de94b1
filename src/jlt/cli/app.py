"""`jlt app RUN [RUN2]`."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from jlt.data import open_latents
from jlt.experiments.geometry import measure_geometry
from jlt.experiments.page import build, serve
from jlt.experiments.play import Limits


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]"), tyro.conf.Positional],
    *,
    latents: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "cpu",
    max_images: int = 16,
    max_steps: int = 100,
) -> None:
    """Serve a page to play with one run, or with two side by side from the same noise, until Ctrl-C.

    Args:
        runs: one or two run folders (their last checkpoints), checkpoint folders, or ORG/NAME of the Hub.
        latents: also draw the geometry of these latents.
        host: where to listen; another than 127.0.0.1 lets others in, without a password.
        port: by default the first free one from 7860.
        device: where the network runs: cpu, cuda, mps.
        max_images: the most images that a visitor may ask for at once.
        max_steps: the most steps.
    """
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"1 or 2 runs are wanted, got {len(runs)}")
    if min(max_images, max_steps) < 1:
        raise ValueError(f"max_images and max_steps must be at least 1, got {max_images} and {max_steps}")
    short, full = ({name(path): path for path in runs} for name in (lambda path: path.resolve().name, str))
    named = short if len(short) == len(runs) else full
    if len(named) < len(runs):
        raise ValueError(f"{runs[0]} is named twice, two runs are wanted")
    figures = {} if latents is None else measure_geometry(open_latents(latents)).figures
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # pictures shown, gone with the page
        serve(build(named, Limits(images=max_images, steps=max_steps), figures, device), host, port)
