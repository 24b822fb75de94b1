"""`jlt invert RUN LATENTS OUT`."""

import torch

from jlt import files
from jlt.cli.places import LatentsPath, OutPath, RunPath
from jlt.data import open_latents
from jlt.experiments import plots
from jlt.experiments.evaluate import check_fit
from jlt.sampling import Making, invert, load


def run(
    source: RunPath,
    latents: LatentsPath,
    out: OutPath,
    *,
    num: int = 8,
    split: str = "held-out",
    solver: str = Making.solver,
    grid: str = Making.grid,
    steps: int = Making.steps,
    weights: str = "ema",
    device: str = "cpu",
) -> None:
    """Follow latents to their noise and back: invert.json with the errors, invert.png with data, noise and return.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        latents: the latents it was trained on, or others of the same kind.
        out: folder for both files.
        num: number of latents, from the split's beginning.
        split: train or held-out.
        solver: used both ways, without guidance; any that draws no noise.
        grid: where the steps lie: uniform, shifted=3, logit=3, karras=7.
        steps: steps each way.
        weights: ema (the first average), model, the decay of an average, or power=LENGTH of a power average.
        device: where the network runs: cpu, cuda, mps.
    """
    generator, data = load(source, weights, device), open_latents(latents, split)
    check_fit(generator.header, data)
    if not 1 <= num <= len(data):
        raise ValueError(f"num must be in [1, {len(data)}], the images of split {split}, got {num}")
    x, labels = data.gather(torch.arange(num)), data.labels[:num]
    noise = invert(generator, x, labels, solver=solver, grid=grid, steps=steps)
    back = generator.sample(labels, noise=noise, solver=solver, grid=grid, steps=steps, batch_size=num)
    data_images, noise_images = (generator.representation.decode(generator.affine.restore(z)).cpu() for z in (x, noise))
    result = {
        "solver": solver,
        "grid": grid,
        "steps": steps,
        "num_images": num,
        "evaluations_forth": back.evaluations,
        "round_trip_rms": (back.latents - x).square().mean().sqrt().item(),
        "latent_rms": x.square().mean().sqrt().item(),
        "noise_std": noise.std().item(),
    }
    plots.save(out / "invert.png", plots.grid(torch.cat([data_images, noise_images, back.images]), columns=num))
    files.write_json(out / "invert.json", result)
    for name, value in result.items():
        print(f"{name:18}{value if not isinstance(value, float) else format(value, '.4g')}")
