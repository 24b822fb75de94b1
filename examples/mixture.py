"""A Gaussian mixture, whose best prediction is known: how far is a network that predicts x, eps or v from it?

    python examples/mixture.py mixture.png

The same MLP for each target, with the same data, noise, times and velocity loss. Its clean latent is compared with
E[x | z] at every t, and its samples with the mixture: the sliced Wasserstein distance to fresh draws, beside what the
exact field gives with the same solver and noise, and what other draws of the mixture give, which nothing can beat.
"""

import math
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from jlt.flow import TARGETS, Target, TimeDensity, interpolate, loss
from jlt.flow.mixture import Mixture
from jlt.sampling import Field, heun, time_grid
from jlt.sampling.field import Prediction

ANGLES = 2 * math.pi * torch.arange(8) / 8
RING = Mixture(1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), torch.full((8,), 0.1), torch.full((8,), 1 / 8))
TIMES, GRID = TimeDensity(mean=0.0, std=1.0), time_grid("uniform", 25)


def predict(model: nn.Module, z: Tensor, t: Tensor) -> Tensor:
    """Run the network, which takes t as one more input."""
    return model(torch.cat([z, t[:, None]], dim=1))


def train(target: Target, steps: int, seed: int, width: int = 128, batch_size: int = 256) -> nn.Module:
    """Train an MLP of four layers; draws are the same for every target."""
    torch.manual_seed(seed)
    layers = [layer for size in (3, width, width) for layer in (nn.Linear(size, width), nn.SiLU())]
    model, generator = nn.Sequential(*layers, nn.Linear(width, 2)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(steps):
        x, eps = RING.draw(batch_size, generator), torch.randn(batch_size, 2, generator=generator)
        t = TIMES.quantile(torch.rand(batch_size, generator=generator))
        y = predict(model, interpolate(x, eps, t), t)
        optimizer.zero_grad()
        loss(y, x, eps, t, target, TARGETS["v"]).mean().backward()
        optimizer.step()
        schedule.step()
    return model


def sliced(a: Tensor, b: Tensor, directions: int = 100) -> float:
    """Return the sliced 2-Wasserstein distance of equally many points in the plane."""
    angle = math.pi * torch.arange(directions) / directions
    along = torch.stack([angle.cos(), angle.sin()])
    return ((a @ along).sort(0).values - (b @ along).sort(0).values).square().mean().sqrt().item()


def learnt(model: nn.Module, target: Target) -> Field:
    """Return the field that a network gives."""
    return Field(lambda z, t, label: predict(model, z, torch.full((len(z),), t)), target)


def exact(z: Tensor, t: float) -> Prediction:
    """Return the field that a perfect network would give."""
    x, eps = RING.expected(z, t)
    return Prediction(x - eps, x)


@torch.no_grad()
def main(out: Path, steps: int = 2000, seed: int = 0, count: int = 20_000) -> dict[str, list[float]]:
    """Train, print the table, draw the picture; return each line's errors of x over time, then its distance."""
    generator, shown = torch.Generator().manual_seed(100 + seed), [k / 10 for k in range(1, 10)]
    noise, fresh, other = torch.randn(count, 2, generator=generator), *(RING.draw(count, generator) for _ in "ab")
    points, found = {"fresh draws": other, "exact field": heun(exact, noise, GRID)}, dict[str, list[float]]()
    for name in ("x", "v", "eps"):
        with torch.enable_grad():
            model = train(TARGETS[name], steps, seed)
        field = learnt(model, TARGETS[name])
        points[name] = heun(field, noise, GRID)
        mixed = [(t, interpolate(fresh, noise, t)) for t in shown]
        found[name] = [(field(z, t).x - exact(z, t).x).square().mean().item() for t, z in mixed]
    figure = Figure((13, 2.8), layout="constrained")
    error, *axes = figure.subplots(1, len(points) + 1)
    print("squared distance from E[x | z] at t =", *shown, "sliced distance", sep="\t")
    for axis, (name, samples) in zip(axes, points.items(), strict=True):
        errors, distance = found.get(name, [0.0] * len(shown)), sliced(samples, fresh)
        print(f"{name:<36}", *(f"{e:.4f}" for e in errors), f"{distance:.4f}", sep="\t")
        axis.scatter(*samples.T, s=1)
        axis.set(title=f"{name}: {distance:.3f}", aspect="equal", xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[])
        if name in found:
            error.plot(shown, errors, label=name)
        found[name] = [*errors, distance]
    error.set(title="squared distance from E[x | z]", xlabel="t", yscale="log")
    error.legend()
    figure.savefig(out, dpi=100)
    return found


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
