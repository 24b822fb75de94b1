"""Targets that the latents decide, once, when a training begins: `auto`, and `residual=channels`.

A checkpoint states what was found, and why, as `target` and `target_reason`: sampling and resuming measure nothing. At
most IMAGES images are measured, spread evenly over the set, in units of the noise's variance.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from jlt.data import Latents
from jlt.data.covariance import Sample, spectrum, token_moments
from jlt.flow import capacity, target
from jlt.flow.targets import CHANNELS, channel_residual, check_channels
from jlt.nn import checkpoint
from jlt.training.config import TrainConfig

IMAGES = 10_000


def by_forecast(config: TrainConfig, latents: Latents) -> tuple[str, str]:
    """Return the target that jlt.flow.capacity.recommend takes for the covariance of tokens, and why."""
    _, covariance, _ = token_moments(Sample(latents, IMAGES), config.patch_size)
    width = config.model(latents.shape, latents.num_classes).hidden_size
    eigenvalues = spectrum(covariance) / config.noise_scale**2
    rank = capacity.rank_of(width, len(eigenvalues))
    return capacity.recommend(
        eigenvalues, rank, ("x", "v"), config.loss_space, config.times, config.floor, config.loss_weight
    )


def by_channel(config: TrainConfig, latents: Latents) -> tuple[str, str]:
    """Return the residual of the channels' mean squares: of all maps z -> gain z, its skip errs least on them."""
    mean, covariance, num_tokens = token_moments(Sample(latents, IMAGES), 1)
    squares = (covariance.diagonal() + mean.square()) / config.noise_scale**2
    if not squares.min() > 0:
        raise ValueError(
            f"channel {int(squares.argmin())} of the latents is 0 everywhere, its residual has no variance"
        )
    low, high = (f"{side.item():.3g}" for side in torch.aminmax(squares))
    return channel_residual(squares.tolist()).name, (
        f"{CHANNELS}: variances of {len(squares)} channels from {low} to {high}, measured on {num_tokens} positions"
    )


MEASURES: dict[str, Callable[[TrainConfig, Latents], tuple[str, str]]] = {"auto": by_forecast, CHANNELS: by_channel}


def settle(config: TrainConfig, latents: Latents, run: Path | None = None) -> tuple[str, str]:
    """Return the target that the network is to predict, and why, which is empty where the recipe names it.

    A run that was begun with the same choice has made it.
    """
    if config.loss_space != CHANNELS:
        check_channels(target(config.loss_space), latents.shape[0])
    if config.target not in MEASURES:
        check_channels(target(config.target), latents.shape[0])
        return config.target, ""
    if run is not None and checkpoint.list_steps(run):
        saved = checkpoint.read(run).header
        if saved["training"]["target"] == config.target:
            return str(saved["target"]), str(saved["target_reason"])
    return MEASURES[config.target](config, latents)
