"""Images a second of `Generator.sample` against a plain loop, at batch 1, 8 and 32.

    python benchmarks/sampling.py [--size 4x128x4 --latent-size 4 --channels 64 --patch-size 1] [--compile] [--profile]

One process, by turns, the same network, dtype, compilation, noise, labels and decoder. The plain loop is what one would
write: Heun's method, a time and a label for each image, the network called with the class and without at every
evaluation. Ours makes the same images (the largest difference is printed). Guidance acts at all t in both; what
skipping the second pass outside 0.1 < t < 1 saves is counted apart, in passes. `--profile` prints where our time goes.

The figure is the median ratio of the rounds' times. The floor is the products of the network itself: `passes alone`
is the time of so many calls of the network on inputs at hand, by the same grouping as ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from jlt.data import Affine
from jlt.data.representations import Pixels
from jlt.experiments.presets import PRESETS
from jlt.flow import TARGETS
from jlt.nn import Transformer
from jlt.sampling import Generator
from jlt.training import TrainConfig

SCALE, FLOOR = 2.9, 0.05
PAPERS = {**PRESETS["jlt-b-1"].sampling, "scale": SCALE}


def plain(generator: Generator, noise: Tensor, label: Tensor, steps: int) -> Tensor:
    """Make images by a loop without cleverness."""
    model, none = generator.model, torch.full_like(label, generator.model.config.num_classes)

    def velocity(z: Tensor, t: float) -> Tensor:
        times = torch.full((len(z),), t, dtype=z.dtype, device=z.device)
        x, other = model(z, times, label), model(z, times, none)
        return (other + SCALE * (x - other) - z) / max(1 - t, FLOOR)

    z = noise
    for i in range(steps):
        v = velocity(z, i / steps)
        proposal = z + v / steps
        z = z + (v + velocity(proposal, (i + 1) / steps)) / (2 * steps) if i < steps - 1 else proposal
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="4x128x4", help="the quickstart's by default")
    parser.add_argument("--patch-size", type=int, default=1)
    parser.add_argument("--latent-size", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    config = TrainConfig(size=options.size, patch_size=options.patch_size)
    shape = (options.channels, options.latent_size, options.latent_size)
    model = Transformer(config.model(shape, options.classes))
    with torch.no_grad():
        for parameter in model.parameters():  # none is 0, as none is after training
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model = model.to(options.device, getattr(torch, options.dtype)).eval().requires_grad_(False)
    if options.compile:
        for block in model.blocks:
            block.compile()
    affine = Affine((0.0,) * options.channels, (1.0,) * options.channels)
    header = {"name": "JLT", "step": 0, "floor": FLOOR}
    generator = Generator(model, TARGETS["x"], Pixels(options.channels), affine, None, header, "model", "0")
    for batch_size in options.batch_sizes:
        compare(generator, batch_size, options)


def compare(generator: Generator, batch_size: int, options: argparse.Namespace) -> None:
    """Time both ways of making one batch, by turns."""
    model, steps = generator.model, options.steps
    label = torch.arange(batch_size, device=options.device) % options.classes
    noise = generator.noise(0, torch.arange(batch_size)).to(options.device, getattr(torch, options.dtype))
    passes = generator.passes()

    def ours(interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        how = PAPERS | {"interval": interval, "steps": steps, "batch_size": batch_size}
        return generator.sample(label.cpu(), noise=noise, progress=False, **how).latents

    def loop() -> Tensor:
        z = plain(generator, noise, label, steps)
        generator.representation.decode(generator.affine.restore(z)).cpu()
        return z

    def alone() -> None:
        for _ in range(2 * steps - 1):
            passes.pair(noise, 0.5, label, model.config.num_classes)

    ways: dict[str, Callable[[], object]] = {"ours": ours, "plain loop": loop, "passes alone": alone}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        difference = (ours() - loop().cpu()).abs().max().item()
        alone()
        for k in range(options.rounds):
            for name, way in ways.items() if k % 2 else reversed(ways.items()):
                seconds[name].append(timed(way, options.device))
    rates = ", ".join(f"{name} {batch_size / statistics.median(values):.3g}" for name, values in seconds.items())
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain loop"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    print(
        f"batch {batch_size}: {statistics.median(ratios):.3f} times as fast (quartiles {quarters[0]:.3f} to "
        f"{quarters[2]:.3f}); images/s {rates}; largest difference {difference:.1g}",
        flush=True,
    )
    if batch_size == options.batch_sizes[0]:
        counts = [
            generator.sample([0], **PAPERS, interval=low, progress=False).network_passes
            for low in ((0.0, 1.0), (0.1, 1.0))
        ]
        print(f"skipping, apart: {counts[1]} passes for {counts[0]} where 0.1 < t < 1, Heun in 50 steps")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ours()
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44))


def timed(way: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
