"""The quickstart's training step against another commit's: same weights, batches, dtype, and loss curve to rounding.

    git worktree add ../first a8b48bf05517
    python benchmarks/since.py ../first/src

Each source trains the quickstart's network for some steps in a process of its own, by turns. The figure is the ratio of
median steps; the largest relative difference between the two loss curves stands beside it. Also printed: the share of
this commit's step that is spent in matrix products, by PyTorch's profiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from jlt.data import encode
from jlt.experiments.presets import DIGITS
from jlt.training import read_metrics, train
out, steps = Path(sys.argv[1]), int(sys.argv[2])
encode("mnist", out / "latents", representation="patch-pca", stride=8, num_held_out=500)
moments = []
config = replace(DIGITS, steps=steps, save_every=steps, held_out_every=0)
train(config, out / "latents", out / "run", progress=lambda step, loss: moments.append(time.perf_counter()))
print(json.dumps([[b - a for a, b in zip(moments, moments[1:])], [line["loss"] for line in read_metrics(out / "run")]]))
"""

PROFILE = """
import torch
from jlt.experiments.presets import PRESETS
from jlt.nn import EMA, Transformer
from jlt.training import Batch, make_optimizer, training_step
from torch.profiler import ProfilerActivity, profile
preset = PRESETS["digits"]
config = preset.config
model = Transformer(config.model(preset.expected.shape, preset.expected.num_classes), 0)
ema, optimizer = EMA(model, config.ema_decays), make_optimizer(model, config)
x, eps = torch.randn(2, 32, *preset.expected.shape)
batch = Batch(x=x, eps=eps, t=torch.rand(32), label=torch.arange(32) % 10, position=torch.arange(32))
for step in range(5):
    training_step(model, ema, optimizer, batch, config, step)
with profile(activities=[ProfilerActivity.CPU]) as seen:
    for step in range(20):
        training_step(model, ema, optimizer, batch, config, step)
rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
total = sum(row.self_cpu_time_total for row in rows)
products = sum(row.self_cpu_time_total for row in rows if row.key in ("aten::mm", "aten::addmm", "aten::bmm"))
print(f"in matrix products: {products / total:.2f} of the step; the largest of the rest:")
for row in [row for row in rows if row.key not in ("aten::mm", "aten::addmm", "aten::bmm")][:6]:
    print(f"  {row.key:<50.50} {row.self_cpu_time_total / total:.3f}")
"""


def run(source: Path, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each step but the first and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
        command = [sys.executable, "-c", TRAIN, folder, str(steps)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, losses = json.loads(done.stdout.splitlines()[-1])
    return seconds, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="the src folder of the other checkout")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    here = Path(__file__).parents[1] / "src"
    seconds: dict[Path, list[float]] = {here: [], options.other: []}
    losses = {}
    for _ in range(options.rounds):
        for source, all_seconds in seconds.items():
            found, losses[source] = run(source, options.steps)
            all_seconds += found
    for source, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{source}: {1e3 * middle:.1f} ms a step ({1e3 * low:.1f} to {1e3 * high:.1f})")
    ours, theirs = (statistics.median(values) for values in seconds.values())
    apart = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    print(f"the other's step takes {theirs / ours:.2f} times as long; losses differ by {apart:.2g} at most")
    subprocess.run([sys.executable, "-c", PROFILE], env={**os.environ, "PYTHONPATH": str(here)}, check=True)


if __name__ == "__main__":
    main()
