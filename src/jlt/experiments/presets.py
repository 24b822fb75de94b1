"""Named recipes: each a `TrainConfig` that says what it differs in from its base, with the score that it gave."""

from dataclasses import replace

from jlt.training import TrainConfig

PAPER = TrainConfig()
"""The paper's recipe: ImageNet 256, batch 1024, 250,000 steps, x with the velocity loss."""

SMALL = replace(
    PAPER,
    size="Ti",
    steps=20_000,
    batch_size=64,
    learning_rate=5e-4,
    warmup_steps=500,
    ema_decays=(0.999, 0.9995),
    held_out_every=1000,
    save_every=1000,
)
"""A few thousand images of one's own, one GPU or a patient CPU. Not measured yet."""

DIGITS = replace(
    PAPER,
    loss_space="x",
    size="4x128x4",
    steps=1400,
    batch_size=32,
    learning_rate=4e-3,
    warmup_steps=100,
    decay_steps=900,
    ema_decays=(0.98,),
    held_out_every=200,
    save_every=400,
)
"""4,500 MNIST digits as 16 tokens, a minute and a half on two cores: the quickstart (README, "Results")."""

PRESETS = {
    "jlt-b-1": PAPER,
    "jlt-b-1-xmse": replace(PAPER, loss_space="x"),
    "dit-b-1": replace(PAPER, target="v"),
    "small": SMALL,
    "digits": DIGITS,
}
