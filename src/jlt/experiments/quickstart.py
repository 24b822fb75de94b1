"""The quickstart: real digits to a report in minutes, as a comparison of two runs that differ in the target alone."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from jlt.data import encode
from jlt.experiments import plots
from jlt.experiments.asking import Sampling
from jlt.experiments.compare import compare
from jlt.experiments.presets import DIGITS
from jlt.experiments.report import write_report

SAMPLING = Sampling(num_images=500, solver="heun", grid="uniform", steps=12, scale=2.5)


def quickstart(out: Path, seed: int = 0) -> Path:
    """Encode MNIST digits, train a JLT (x) and a DiT (v), sample, measure, and return the report's path.

    Everything is kept in `out`; a quickstart that was stopped goes on when it is started again.
    """
    print(f"1/3  encoding 5,000 MNIST digits into {out / 'latents'}")
    encode("mnist", out / "latents", representation="patch-pca", stride=8, num_held_out=500)
    print(
        f"2/3  training, sampling ({SAMPLING.solver}, {SAMPLING.steps} steps = {2 * SAMPLING.steps - 1} evaluations, "
        f"guidance {SAMPLING.scale}) and measuring two models:\n"
        "     JLT predicts the clean latent x, DiT the velocity v; all else is equal"
    )
    record = compare(
        out / "latents",
        out,
        replace(DIGITS, seed=seed),
        [{"target": "x"}, {"target": "v"}],
        replace(SAMPLING, seed=seed),
        kind="quickstart",
        title="Clean latent or velocity: two models on MNIST digits",
    )
    print("3/3  writing the report")
    grids = [Image.open(out / name) for name in ("samples-x.png", "samples-v.png", "real.png")]
    plots.save(out / "quickstart.png", plots.beside(grids))
    return write_report(record, out / "report.html")
