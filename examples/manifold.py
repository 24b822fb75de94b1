"""JiT's toy: a spiral in a plane, hidden in D dimensions, and a network of width 256 that predicts x, eps or v.

    python examples/manifold.py spiral.png

One MLP for each target and D (arXiv 2511.13720, "Toy experiment"), with the same data, noise, times and velocity loss.
The answer is known: x lies in two dimensions whatever D, and a narrow network can say it; eps and v fill all D. So the
distance of samples from the spiral does not grow with D for x, and must for the others where D passes the width;
`jlt.flow.capacity` forecasts by how much for a Gaussian. Picture: 1,000 samples each, projected back on the plane.
"""

import math
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from jlt.flow import TARGETS, Target, TimeDensity, capacity, interpolate, loss
from jlt.sampling import Field, heun, time_grid

DIMENSIONS, NAMES, TIMES, STEPS = (2, 8, 16, 512), ("x", "eps", "v"), TimeDensity(mean=0.0, std=1.0), 25
FLOOR = 1 / STEPS  # 1 - t of the last step: a higher one would leave noise in the samples of x


def spiral(u: Tensor) -> Tensor:
    """Return the points at u in [0, 1] along the curve, (n, 2), of about variance 1 in either direction."""
    angle = 3 * math.pi * (0.05 + 0.95 * u).sqrt()  # the root spreads points evenly
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 4.7


def network(dimension: int, width: int = 256) -> nn.Sequential:
    """Return JiT's MLP of five layers; its last input is t."""
    layers = [layer for size in (dimension + 1, *[width] * 3) for layer in (nn.Linear(size, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, dimension))


def train(target: Target, plane: Tensor, steps: int, seed: int, batch_size: int = 128) -> nn.Sequential:
    """Train on the spiral in `plane` (D, 2), an orthonormal basis; draws are the same for every target."""
    torch.manual_seed(seed)
    model, generator = network(len(plane)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        u, uniform = torch.rand(2, batch_size, generator=generator)
        x, eps = spiral(u) @ plane.T, torch.randn(batch_size, len(plane), generator=generator)
        t = TIMES.quantile(uniform)
        y = model(torch.cat([interpolate(x, eps, t), t[:, None]], dim=1))
        optimizer.zero_grad()
        loss(y, x, eps, t, target, TARGETS["v"], floor=FLOOR).mean().backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def sample(model: nn.Sequential, target: Target, dimension: int, seed: int, count: int) -> Tensor:
    """Solve the flow from noise to samples, (count, D)."""
    field = Field(lambda z, t, label: model(torch.cat([z, torch.full_like(z[:, :1], t)], dim=1)), target, floor=FLOOR)
    noise = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return heun(field, noise, time_grid("uniform", STEPS))


def distance(samples: Tensor, plane: Tensor) -> float:
    """Return the mean distance of samples from the nearest of 2,000 points of the spiral, in all D dimensions."""
    return torch.cdist(samples, spiral(torch.linspace(0, 1, 2000)) @ plane.T).amin(1).mean().item()


def forecast(target: Target, dimension: int, width: int = 256) -> float:
    """Return the Frechet distance, not squared, that is forecast for a Gaussian of this spectrum."""
    spectrum, times = torch.cat([torch.ones(2), torch.zeros(dimension - 2)]), capacity.quadrature(TIMES)
    directions = capacity.fates(spectrum, target, TARGETS["v"], times, FLOOR)
    return math.sqrt(capacity.forecast(directions, min(width, dimension)).frechet)


def main(out: Path, steps: int = 800, seed: int = 0, count: int = 1000) -> dict[str, list[float]]:
    """Train, print the table, draw the picture; return each target's distances, one a D."""
    figure = Figure((2.2 * len(DIMENSIONS), 2.2 * len(NAMES)), layout="constrained")
    axes, found = figure.subplots(len(NAMES), len(DIMENSIONS)), dict[str, list[float]]()
    print("mean distance from the spiral", *(f"D = {dimension:<4}" for dimension in DIMENSIONS), sep="\t")
    for row, name in zip(axes, NAMES, strict=True):
        found[name] = []
        for axis, dimension in zip(row, DIMENSIONS, strict=True):
            plane = torch.linalg.qr(torch.randn(dimension, 2, generator=torch.Generator().manual_seed(seed))).Q
            samples = sample(train(TARGETS[name], plane, steps, seed), TARGETS[name], dimension, seed, count)
            found[name].append(distance(samples, plane))
            axis.scatter(*(samples @ plane).T, s=1)
            axis.set(title=f"{name}, D = {dimension}: {found[name][-1]:.2g}", aspect="equal", xticks=[], yticks=[])
            axis.axis((-2.5, 2.5, -2.5, 2.5))
        print(f"{name:<29}", *(f"{value:.3g}" for value in found[name]), sep="\t")
        print(f"{'  forecast':<29}", *(f"{forecast(TARGETS[name], d):.3g}" for d in DIMENSIONS), sep="\t")
    figure.savefig(out, dpi=100)
    return found


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
