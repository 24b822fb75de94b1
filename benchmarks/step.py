"""How much of the machine's own matrix-product rate a training step reaches, and how much memory it takes.

    python benchmarks/step.py --preset jlt-b-1 --batch-size 8 --dtype float32

One process, by turns: whole training steps (forward, backward, clipping, AdamW, two averages) on noise in the shape of
the preset's latents, and square matrix products of the same type. The figure is the ratio of their rates, the step's by
analytic operations (jlt.experiments.plan). The floor is a ratio of 1: every operation that counts is in a matrix
product. `--memory` prints the largest resident memory of one step at several batch sizes instead, each in a process of
its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from jlt.experiments.presets import PRESETS
from jlt.flow import random
from jlt.flow.random import Stream
from jlt.nn import EMA, Transformer
from jlt.nn.flops import training_flop
from jlt.training import Batch, make_optimizer, training_step
from jlt.training.parallel import recompute_blocks


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP/s of one square matrix product."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    began = time.perf_counter()
    a @ a
    return 2 * size**3 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="jlt-b-1", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="*", help="batch sizes to print the largest memory for")
    parser.add_argument("--recompute", action="store_true", help="work out the blocks again for the backward pass")
    options = parser.parse_args()
    if options.memory:
        for size in options.memory:
            command = [sys.executable, __file__, "--preset", options.preset, "--dtype", options.dtype, "--steps", "0"]
            command += ["--recompute"] * options.recompute
            subprocess.run([*command, "--batch-size", str(size)], check=True, stdout=subprocess.DEVNULL)
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # sizes rise, so the last one's
            print(f"batch size {size}: {largest / 1e9:.2f} GB", flush=True)
        return
    preset = PRESETS[options.preset]
    config = replace(preset.config, batch_size=options.batch_size, dtype=options.dtype)
    shape, classes = preset.expected.shape, preset.expected.num_classes
    model = Transformer(config.model(shape, classes), config.seed)
    if options.recompute:
        recompute_blocks(model)
    ema, optimizer = EMA(model, config.ema_decays), make_optimizer(model, config)
    position = torch.arange(options.batch_size)
    x, eps = (random.normal(0, Stream.NOISE, k, position, shape) for k in range(2))
    batch = Batch(x=x, eps=eps, t=torch.rand(len(position)), label=position % classes, position=position)
    flop = training_flop(model.config) * options.batch_size
    dtype = getattr(torch, options.dtype)
    step_rates, product_rates = [], []
    for step in range(options.steps + 1):
        began = time.perf_counter()
        training_step(model, ema, optimizer, batch, config, step)
        if step:  # the first one allocates
            step_rates.append(flop / (time.perf_counter() - began))
            product_rates.append(product_rate(dtype))
    ratios = [a / b for a, b in zip(step_rates, product_rates, strict=True)]
    if ratios:
        for name, values in (("step", step_rates), ("matrix product", product_rates)):
            low, middle, high = (f(values) / 1e9 for f in (min, statistics.median, max))
            print(f"{name}: {middle:.4g} GFLOP/s ({low:.4g} to {high:.4g})")
        print(f"{options.preset}, batch {options.batch_size}, {options.dtype}: {statistics.median(ratios):.3f} of it")


if __name__ == "__main__":
    main()
