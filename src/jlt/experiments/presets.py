"""Named recipes, as data: each says what it differs in from its base, and which figure the paper gives for it.

Names follow `model_name`: family (jlt predicts x, dit v, eps the noise), size, patch. `-xmse` is the plain loss of x,
where the name alone means the velocity loss as first published; `-jit` has JiT's bottleneck and class tokens (arXiv
2511.13720), `-512` is for 512 px: those are ours, not the paper's. Figures are FID-50K / IS on ImageNet 256, guided,
from the paper (arXiv 2605.27102, both versions); none was measured here. `guidance` is the scale to evaluate with,
where 0.1 < t < 1: the paper's 2.9, and 2.2 for JLT-H/1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jlt.training import TrainConfig


@dataclass(frozen=True)
class Expected:
    """The latents that a recipe is for.

    Attributes:
        shape: channels, height and width of a latent.
        num_classes: classes; 0 is none.
        num_images: training images, mirrored ones not counted.
    """

    shape: tuple[int, int, int] = (128, 16, 16)
    num_classes: int = 1000
    num_images: int = 1_281_167


@dataclass(frozen=True)
class Preset:
    """A recipe: what it changes in its base, the figure published for it or its use, its guidance and its latents."""

    base: TrainConfig
    changes: Mapping[str, Any]
    note: str
    guidance: float = 2.9
    expected: Expected = field(default_factory=Expected)

    @property
    def config(self) -> TrainConfig:
        return replace(self.base, **self.changes)

    @property
    def sampling(self) -> dict[str, Any]:
        """What differs from jlt's own way to make images: the paper's is kept where the recipe is the paper's."""
        return {"solver": "heun", "grid": "uniform", "steps": 50} if self.base is PAPER else {}


PAPER = TrainConfig(flip=True, dtype="bfloat16")
"""The paper's recipe: FLUX.2 latents of ImageNet 256, batch 1024, 250,000 steps, x with the velocity loss."""

SMALLER = replace(PAPER, batch_size=256, learning_rate=5e-5, warmup_steps=25_000, steps=1_000_000)
"""The paper's recipe at a batch for one GPU: the same epochs and warm-up, the learning rate by the paper's rule."""

OWN = replace(
    TrainConfig(), batch_size=64, learning_rate=5e-4, steps=20_000, warmup_steps=500, ema_decays=(0.999, 0.9995),
    held_out_every=1000, save_every=1000,
)  # fmt: skip
"""A few thousand images of one's own, in float32 without mirrored ones."""

NONE = "no published figure"
JIT_B = {"bottleneck": 128, "in_context_tokens": 32, "in_context_start": 4}
JIT_L = {"bottleneck": 128, "in_context_tokens": 32, "in_context_start": 8}
JIT_H = {"bottleneck": 256, "in_context_tokens": 32, "in_context_start": 10, "dropout": 0.2}
IMAGENET_512 = Expected(shape=(128, 32, 32))
QWEN = Expected(shape=(16, 32, 32))  # of autoencoder:Qwen/Qwen-Image/vae; patches of 2 make 256 tokens, as in B/1

PRESETS = {
    "jlt-b-1": Preset(
        PAPER, {}, "2.56 / 220.7 (first version; 2.50 / 232.5 selected), 2.84 / 204.8 (second); 14.00 unguided"
    ),
    "jlt-b-1-xmse": Preset(PAPER, {"loss_space": "x"}, "2.38 / 256.9"),
    "dit-b-1": Preset(PAPER, {"target": "v"}, "6.56 / 132.1"),
    "eps-b-1": Preset(PAPER, {"target": "eps"}, NONE),
    "jlt-b-2": Preset(PAPER, {"patch_size": 2}, "14.81 / 107.3"),
    "jlt-b-2-xmse": Preset(PAPER, {"patch_size": 2, "loss_space": "x"}, "12.78"),
    "dit-b-2": Preset(PAPER, {"target": "v", "patch_size": 2}, "28.71 / 58.5"),
    "dit-b-2-released": Preset(
        PAPER,
        {
            "target": "v", "patch_size": 2, "times": replace(PAPER.times, mean=0.0, std=1.0),
            "batch_size": 2048, "learning_rate": 4e-4, "steps": 125_000, "warmup_steps": 3125,
        },
        "the released launcher: batch 2048, logit(t) ~ N(0, 1), so no match for jlt-b-2; 200 epochs as in the paper",
    ),
    "eps-b-2": Preset(PAPER, {"target": "eps", "patch_size": 2}, NONE),
    "jlt-l-1": Preset(PAPER, {"size": "L"}, "1.83 / 301.1 (abstract: 1.47)"),
    "jlt-l-1-xmse": Preset(PAPER, {"size": "L", "loss_space": "x"}, NONE),
    "dit-l-1": Preset(PAPER, {"size": "L", "target": "v"}, "2.12 / 236.2"),
    "eps-l-1": Preset(PAPER, {"size": "L", "target": "eps"}, NONE),
    "jlt-l-2": Preset(PAPER, {"size": "L", "patch_size": 2}, "3.15 (loss not stated)"),
    "jlt-l-2-xmse": Preset(PAPER, {"size": "L", "patch_size": 2, "loss_space": "x"}, "3.15 (loss not stated)"),
    "dit-l-2": Preset(PAPER, {"size": "L", "patch_size": 2, "target": "v"}, NONE),
    "eps-l-2": Preset(PAPER, {"size": "L", "patch_size": 2, "target": "eps"}, NONE),
    "jlt-h-1": Preset(PAPER, {"size": "H"}, "1.19 / 272.0", guidance=2.2),
    "jlt-h-1-xmse": Preset(PAPER, {"size": "H", "loss_space": "x"}, NONE, guidance=2.2),
    "dit-h-1": Preset(PAPER, {"size": "H", "target": "v"}, "1.60 / 327.4 (guidance not stated)"),
    "eps-h-1": Preset(PAPER, {"size": "H", "target": "eps"}, NONE),
    "jlt-h-2": Preset(PAPER, {"size": "H", "patch_size": 2}, "2.04 (loss not stated)"),
    "jlt-h-2-xmse": Preset(PAPER, {"size": "H", "patch_size": 2, "loss_space": "x"}, "2.04 (loss not stated)"),
    "dit-h-2": Preset(PAPER, {"size": "H", "patch_size": 2, "target": "v"}, NONE),
    "eps-h-2": Preset(PAPER, {"size": "H", "patch_size": 2, "target": "eps"}, NONE),
    "jlt-b-2-qwen": Preset(PAPER, {"patch_size": 2}, "6.54 (Qwen's autoencoder; patches are our reading)", 2.9, QWEN),
    "dit-b-2-qwen": Preset(
        PAPER, {"patch_size": 2, "target": "v"}, "6.85 (Qwen's autoencoder; patches are our reading)", 2.9, QWEN
    ),
    "jlt-b-1-jit": Preset(PAPER, JIT_B, "ours: with JiT's bottleneck and class tokens"),
    "jlt-l-1-jit": Preset(PAPER, {"size": "L", **JIT_L}, "ours: with JiT's bottleneck and class tokens"),
    "jlt-h-1-jit": Preset(PAPER, {"size": "H", **JIT_H}, "ours: with JiT's bottleneck, class tokens and dropout", 2.2),
    "jlt-b-1-512": Preset(PAPER, {"noise_scale": 2.0}, "ours: 512 px, JiT's noise scale", expected=IMAGENET_512),
    "jlt-b-2-512": Preset(
        PAPER, {"patch_size": 2, "noise_scale": 2.0}, "ours: 512 px, JiT's noise scale", expected=IMAGENET_512
    ),
    "jlt-b-2-512-shift": Preset(
        PAPER, {"patch_size": 2, "times": replace(PAPER.times, shift=2.0)},
        "ours: 512 px, times shifted by the ratio of the sides", expected=IMAGENET_512,
    ),
    "jlt-s-1": Preset(SMALLER, {"size": "S"}, "ours: ImageNet on one GPU"),
    "dit-s-1": Preset(SMALLER, {"size": "S", "target": "v"}, "ours: ImageNet on one GPU"),
    "jlt-s-2": Preset(SMALLER, {"size": "S", "patch_size": 2}, "ours: ImageNet on one GPU"),
    "dit-s-2": Preset(SMALLER, {"size": "S", "patch_size": 2, "target": "v"}, "ours: ImageNet on one GPU"),
    "jlt-ti-1": Preset(SMALLER, {"size": "Ti"}, "ours: ImageNet on one GPU"),
    "dit-ti-1": Preset(SMALLER, {"size": "Ti", "target": "v"}, "ours: ImageNet on one GPU"),
    "jlt-ti-2": Preset(SMALLER, {"size": "Ti", "patch_size": 2}, "ours: ImageNet on one GPU"),
    "small": Preset(
        OWN, {"size": "Ti"}, "ours: a few thousand images of 64 px, one GPU or a patient CPU; not measured yet",
        expected=Expected((48, 16, 16), num_classes=10, num_images=5000),
    ),
    "photos": Preset(
        OWN,
        {
            "learning_rate": 2e-4, "steps": 40_000, "warmup_steps": 1000, "dropout": 0.1, "flip": True,
            "dtype": "bfloat16", "keep_every": 5000,
        },
        "ours: 5,000 photographs of 256 px as FLUX.2 latents, a GPU of 24 GB; a starting point, not measured yet",
        expected=Expected(num_classes=0, num_images=5000),
    ),
    "photos-8gb": Preset(
        OWN,
        {
            "size": "S", "learning_rate": 3e-4, "steps": 40_000, "warmup_steps": 1000, "dropout": 0.1, "flip": True,
            "dtype": "bfloat16", "keep_every": 5000,
        },
        "ours: the same for a GPU of 8 GB; a starting point, not measured yet",
        expected=Expected(num_classes=0, num_images=5000),
    ),
    "emoji": Preset(
        OWN,
        {
            "loss_space": "x", "size": "4x128x4", "steps": 2500, "batch_size": 32, "learning_rate": 4e-3,
            "warmup_steps": 150, "decay_steps": 1600, "ema_decays": (0.98,), "flip": True, "held_out_every": 250,
            "save_every": 250, "keep_every": 500,
        },
        "ours: colour emoji of 64 px on a CPU, docs/own-pictures.md",
        guidance=2.0, expected=Expected((192, 8, 8), num_classes=9, num_images=1690),
    ),
    "fashion": Preset(
        OWN,
        {
            "loss_space": "x", "size": "4x128x4", "steps": 4000, "batch_size": 32, "learning_rate": 4e-3,
            "warmup_steps": 100, "decay_steps": 2500, "ema_decays": (0.99,), "held_out_every": 500,
        },
        "ours: Fashion-MNIST as patch-PCA latents, five minutes on one CPU thread; docs/ablation.md",
        guidance=1.0, expected=Expected((32, 4, 4), num_classes=10, num_images=55_000),
    ),
    "digits": Preset(
        OWN,
        {
            "loss_space": "x", "size": "4x128x4", "steps": 1400, "batch_size": 32, "learning_rate": 4e-3,
            "warmup_steps": 100, "decay_steps": 900, "ema_decays": (0.98,), "held_out_every": 200, "save_every": 400,
        },
        "ours: 4,500 MNIST digits, a minute and a half on two cores; the quickstart's, with guidance 2.5",
        guidance=2.5, expected=Expected((64, 4, 4), num_classes=10, num_images=4500),
    ),
}  # fmt: skip

DIGITS = PRESETS["digits"].config
