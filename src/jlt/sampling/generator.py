"""Images from seeds: `load` opens a run or a checkpoint, `Generator.sample` makes images of the labels asked for.

The noise of image i is a function of (seed, i) alone, so image i is the same picture whatever else is in its batch.
"""

import functools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jlt import files
from jlt.data import Affine, Autoencoder, Representation, load_representation, open_autoencoder
from jlt.data.authors_checkpoint import import_checkpoint
from jlt.data.hub import find_checkpoint
from jlt.flow import Target, random
from jlt.flow import target as known_target
from jlt.flow.random import Stream
from jlt.flow.targets import check_channels, check_floor
from jlt.nn import Transformer, checkpoint
from jlt.processes import open_device
from jlt.sampling.field import Field, Guide, Passes, Predictor, guided
from jlt.sampling.grids import time_grid
from jlt.sampling.solvers import Callback
from jlt.sampling.solvers import solver as find_solver

PAIRED = 256  # tokens of a batch, above which a CPU is as fast with two calls as with one of twice the size, or faster


@dataclass(frozen=True)
class Samples:
    """Generated images and how they were made.

    `images` (n, channels, height, width) uint8, `latents` (n, c, h, w) normalised, `labels` (n,), `seeds` the pair
    (seed, index) of each image. `evaluations` of the field and `network_passes` are counts an image (of an adaptive
    solver, the largest of any batch); `seconds` is the wall time of all.
    """

    images: UInt8[Tensor, "n k H W"]
    latents: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    seeds: Sequence[tuple[int, int]]
    settings: dict[str, Any]
    evaluations: int
    network_passes: int
    seconds: float


@dataclass(frozen=True)
class Making:
    """How images are made; the arguments of the same names in `Generator.sample` say what each means.

    Solver, grid and steps take 25 evaluations and score as Heun's 99 on the models measured, docs/sampling.md.
    """

    seed: int = 0
    solver: str = "ab2"
    grid: str = "logit=3"
    steps: int = 25
    scale: float = 1.0
    interval: tuple[float, float] = (0.1, 1.0)
    guidance: str = "cfg"
    guide: "Generator | None" = None
    batch_size: int = 100
    floor: float | None = None


@dataclass(frozen=True)
class Generator:
    """A model ready to sample: `load` makes one."""

    model: Transformer
    target: Target
    representation: Representation
    affine: Affine
    class_names: tuple[str, ...] | None
    header: dict[str, Any]
    weights: str
    fingerprint: str

    def label(self, name: str) -> int:
        """Return the label of a class given by name or by index."""
        names = self.class_names or ()
        if name.isdecimal() and name not in names:
            if int(name) >= self.model.config.num_classes:
                raise ValueError(f"label {name} is not below the model's num_classes {self.model.config.num_classes}")
            return int(name)
        return files.choose("class", name, {known: label for label, known in enumerate(names)})

    def check(self, labels: Int[Tensor, " n"], how: Making) -> None:
        """Raise a ValueError for arguments with which `sample` can make no image; nothing is computed."""
        classes = self.model.config.num_classes
        find_solver(how.solver)
        time_grid(how.grid, how.steps)
        if how.guide is not None:
            self.check_guide(how.guide)
        self.predictor(how)
        check_floor(self.floor(how))
        if how.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {how.batch_size}")
        if len(labels) < 1:
            raise ValueError("there are 0 labels, each image needs one")
        if classes and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ValueError(f"labels must be in [0, {classes}], got {int(labels.min())} to {int(labels.max())}")

    def check_latents(self, what: str, latents: Tensor, labels: Int[Tensor, " n"]) -> None:
        """Raise a ValueError for latents or noise of another shape than one of the model's for each label."""
        expected = (len(labels), *self.model.config.shape)
        if latents.shape != expected:
            raise ValueError(f"the shape of {what} is {tuple(latents.shape)}, expected {expected}")

    def check_guide(self, guide: "Generator") -> None:
        """Raise a ValueError for a guide of other latents, classes or noise."""

        def fit(of: Generator) -> dict[str, Any]:
            return {
                "latents": of.model.config.shape,
                "classes": of.model.config.num_classes,
                "noise of scale": float(of.header.get("noise_scale", 1.0)),
                "representation": of.representation.fingerprint,
                "affine": of.affine,
            }

        own = fit(self)
        for name, value in fit(guide).items():
            if value != own[name]:
                raise ValueError(f"the guide has {name} {value}, the model {own[name]}")

    def passes(self) -> Passes:
        """Return the network, ready to be run and counted."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return Passes(self.model, shares=True, together=PAIRED / self.model.config.tokens if on_cpu else math.inf)

    def predictor(self, how: Making) -> tuple[Predictor, list[Passes]]:
        """Return the model under guidance, and what counts the passes of its network and of the guide's."""
        networks = [generator.passes() for generator in (self, how.guide) if generator is not None]
        guide = None if how.guide is None else Guide(networks[1], how.guide.target)
        classes = self.model.config.num_classes
        predict = guided(networks[0], self.target, classes, how.scale, how.interval, how.guidance, guide)
        return predict, networks

    def floor(self, how: Making) -> float:
        """Return the bound on |det| in the velocity: the one asked for, or that of training."""
        return float(self.header["floor"]) if how.floor is None else float(how.floor)

    def field(self, predict: Predictor, label: Int[Tensor, " b"], how: Making) -> Field:
        """Return the field that a predictor gives for these labels, which an unconditional model does not see."""
        device = next(self.model.parameters()).device
        return Field(predict, self.target, label.to(device) if self.model.config.num_classes else None, self.floor(how))

    def noise(
        self, seed: int, index: Int[Tensor, " b"], stream: Stream = Stream.SAMPLE_NOISE, step: int = 0
    ) -> Float[Tensor, "b c h w"]:
        """Return the noise that the images of these indices start from, or another stream's, in the trained scale."""
        scale = float(self.header.get("noise_scale", 1.0))  # older checkpoints had no other
        return scale * random.normal(seed, stream, step, index, self.model.config.shape)

    def settings(self, how: Making) -> dict[str, Any]:
        """Return what images made in this way are made with, but for their labels."""
        decoder, guide = getattr(self.representation, "decoder", None), how.guide
        return {
            "model": self.header["name"],
            "step": self.header["step"],
            "weights": self.weights,
            "weights_fingerprint": self.fingerprint,
            "decoder": None if decoder is None else decoder.source,
            "solver": how.solver,
            "grid": how.grid,
            "steps": how.steps,
            "guidance": how.guidance,
            "guide": None if guide is None else [guide.header["name"], guide.weights, guide.fingerprint],
            "guidance_scale": float(how.scale),
            "guidance_interval": [float(end) for end in how.interval],
            "velocity_floor": self.floor(how),
            "seed": how.seed,
        }

    def sample(
        self,
        labels: Sequence[int] | Int[Tensor, " n"],
        *,
        seed: int = 0,
        solver: str = Making.solver,
        grid: str = Making.grid,
        steps: int = Making.steps,
        scale: float = Making.scale,
        interval: tuple[float, float] = Making.interval,
        guidance: str = Making.guidance,
        guide: "Generator | None" = None,
        batch_size: int = Making.batch_size,
        first_index: int = 0,
        floor: float | None = None,
        noise: Float[Tensor, "n c h w"] | None = None,
        callback: Callback | None = None,
        progress: bool = True,
    ) -> Samples:
        """Make one image for each label.

        Args:
            labels: classes in [0, num_classes]; num_classes means no class. Ignored by an unconditional model.
            seed: with the image's index it determines the image's noise.
            solver: a key of SOLVERS, or `adaptive=TOLERANCE`; the paper uses heun, 50 uniform steps.
            grid: the time grid: a key of GRIDS, or `shifted=3`.
            steps: steps of the time grid; ab2 evaluates once a step, heun twice but in the last.
            scale: guidance scale; 1 is none.
            interval: guidance applies where low < t < high.
            guidance: a key of GUIDANCE, with options as in `apg:eta=0.5` or `cfg:schedule=linear`.
            guide: for guidance "auto", a smaller or less trained model of the same latents; of any target.
            batch_size: images at once; no result depends on it beyond rounding.
            first_index: index of the first image.
            floor: bound on |det| in the velocity; by default the one the model was trained with.
            noise: z at t = 0, instead of what seed and index determine.
            callback: called by the solver in each batch with (i, t, z, x).
            progress: show a progress bar on a terminal.
        """
        how = Making(seed, solver, grid, steps, scale, interval, guidance, guide, batch_size, floor)
        label = torch.as_tensor(labels, dtype=torch.int64)
        self.check(label, how)
        if noise is not None:
            self.check_latents("noise", noise, label)
        solve, times, device = find_solver(solver), time_grid(grid, steps), next(self.model.parameters()).device
        start, evaluations, passes = time.perf_counter(), 0, 0
        latents, images = [], []
        bar = tqdm(total=len(label), desc="sampling", unit="image", disable=None if progress else True)
        for first in range(0, len(label), batch_size):
            chunk = label[first : first + batch_size]
            index = torch.arange(first, first + len(chunk), device=device) + first_index
            predict, networks = self.predictor(how)
            field = self.field(predict, chunk, how)
            draw = functools.partial(self.noise, seed, index, Stream.SOLVER_NOISE)
            with torch.no_grad():
                z = self.noise(seed, index) if noise is None else noise[first : first + len(chunk)].to(device)
                z = solve(field, z, times, callback, draw)
                images.append(self.representation.decode(self.affine.restore(z)).cpu())
            latents.append(z.cpu())
            # an adaptive solver may evaluate more often in one batch than in another
            evaluations = max(evaluations, field.evaluations)
            passes = max(passes, sum(network.count for network in networks))
            bar.update(len(chunk))
        bar.close()
        return Samples(
            images=torch.cat(images),
            latents=torch.cat(latents),
            labels=label,
            seeds=[(seed, first_index + i) for i in range(len(label))],
            settings=self.settings(how),
            evaluations=evaluations,
            network_passes=passes,
            seconds=time.perf_counter() - start,
        )


def load(
    path: str | Path,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    decoder: str | None = None,
    compile: bool = False,
    target: str | None = None,
) -> Generator:
    """Open a run folder (its last checkpoint), a checkpoint folder, a repository of the Hub, or an authors' file.

    Args:
        path: the folder; ORG/NAME or ORG/NAME@REVISION of the Hugging Face Hub; or checkpoint-last.pth.
        weights: "ema" (the first average), "model", a decay such as "0.999", or "power=0.07", the power average of that
            relative length, where the run kept some.
        device: where the network runs.
        decoder: another autoencoder for the same latents, such as flux2-small-decoder for those of flux2; for an
            authors' file, the autoencoder of its latents, by default flux2.
        target: what the network of an authors' file predicts, which it does not say; a checkpoint of ours does.
        compile: compile the network's blocks, which takes a minute at the first image and shows at the later ones.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pth":
        if target is None:
            raise ValueError(
                f"{path} is the authors' file, which does not say what its network predicts: give a target "
                f"(x, eps, v), or turn it into a checkpoint with jlt import {path} FOLDER --target x"
            )
        with tempfile.TemporaryDirectory() as folder:
            made = import_checkpoint(path, Path(folder, "made"), open_autoencoder(decoder or "flux2"), target=target)
            return load(made, weights, device, compile=compile)
    if target is not None:
        raise ValueError(f"target is {target}, but {path} is no authors' file: a checkpoint states its own")
    opened = checkpoint.read(find_checkpoint(path))
    header, stated = dict(opened.header), opened.folder / checkpoint.HEADER
    missing = {"name", "target", "floor", "latents"} - header.keys()
    if missing:
        raise ValueError(f"{stated} lacks {', '.join(sorted(missing))}")
    try:
        known, affine = known_target(header["target"]), Affine.stated(header["latents"]["affine"])
        names = None if (given := header["latents"]["class_names"]) is None else tuple(map(str, given))
        float(header["floor"]), float(header.get("noise_scale", 1.0))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{stated} has a malformed entry: {error}") from None
    if names is not None and len(names) != opened.config.num_classes:
        raise ValueError(f"{stated} names {len(names)} classes, its model has {opened.config.num_classes}")
    check_channels(known, opened.config.shape[0])
    name = opened.resolve(weights)
    model = opened.load_model(weights).to(open_device(device)).eval().requires_grad_(False)
    if compile:
        model.compile_blocks()
    representation = load_representation(opened.folder / "representation")
    if decoder is not None:
        if not isinstance(representation, Autoencoder):
            raise ValueError(f"decoder is {decoder}, but the latents are {representation.name}, which has no other")
        representation = representation.with_decoder(decoder)
    return Generator(
        model=model,
        target=known,
        representation=representation,
        affine=affine,
        class_names=names,
        header=header,
        weights=name,
        fingerprint=opened.fingerprint(name)[:16],
    )
