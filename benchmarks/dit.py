"""Our network against diffusers' DiTTransformer2DModel of the same depth, width and tokens: forward and backward.

    python benchmarks/dit.py --size S --patch-size 2 --dtype float32 [--compile]

One process, by turns, the same latents, times and labels, eager against eager or compiled against compiled. Ours has
a SwiGLU of 2/3 the width in three matrices where theirs has a GELU in two, so that a block takes about the same
operations; both counts are printed. The figure is the ratio of images a second, ours over theirs.
"""

import argparse
import statistics
import time

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jlt.nn import SIZES, Transformer, TransformerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--latent-size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    depth, width, heads = SIZES[options.size]
    side, channels, dtype = options.latent_size, options.channels, getattr(torch, options.dtype)
    ours = Transformer(TransformerConfig(side, channels, options.patch_size, width, depth, heads, 1000)).to(dtype)
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, out_channels=channels,
        num_layers=depth, sample_size=side, patch_size=options.patch_size,
    ).to(dtype)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(options.batch_size, channels, side, side, generator=generator).to(dtype)
    t = torch.rand(options.batch_size, generator=generator).to(dtype)
    label = torch.arange(options.batch_size)

    def run_ours() -> Tensor:
        return ours(z, t, label)

    def run_theirs() -> Tensor:
        return theirs(z, timestep=(1000 * t).long(), class_labels=label).sample

    runs = {"ours": (ours, run_ours), "diffusers": (theirs, run_theirs)}
    if options.compile:
        for model, _ in runs.values():
            model.compile()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(options.rounds + 1):
        for name, (model, run) in runs.items():
            began = time.perf_counter()
            run().square().mean().backward()
            if k:  # the first one compiles and allocates
                seconds[name].append(time.perf_counter() - began)
            model.zero_grad()
    for name, (model, run) in runs.items():
        if not options.compile:
            with FlopCounterMode(display=False) as counter:
                run()
            print(f"{name}: {counter.get_total_flops() / options.batch_size / 1e9:.4g} GFLOP an image, ", end="")
        rate = options.batch_size / statistics.median(seconds[name])
        print(f"{name}: {parameters(model):,} parameters, {rate:.4g} images/s forward and backward")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    name = f"{options.size}/{options.patch_size}, {options.dtype}, {'compiled' if options.compile else 'eager'}"
    print(f"{name}: {statistics.median(ratios):.3f} times as fast ({min(ratios):.3f} to {max(ratios):.3f})")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
