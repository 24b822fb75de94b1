"""What a representation loses: images against what their latents decode to. No model of these latents can do better.

PSNR is that of the mean squared error over all images, 10 log10(255^2 / MSE); where nothing is lost there is none. SSIM
is the mean structural similarity of Wang et al. 2004 (doi 10.1109/TIP.2003.819861): a Gaussian window of 11 x 11 and
sigma 1.5, K1 = 0.01, K2 = 0.03, the range 255, windows within the image alone, averaged over colours.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from jlt.evaluation.records import Value

WINDOW, SIGMA = 11, 1.5


class Fidelity:
    """Sums over pairs of images; `update` with batches of originals and what became of them.

    `sums` are the number of pairs, the sum of their mean squared errors and that of their similarities, so that those
    of several processes add up; a similarity that an image is too small for is NaN.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, originals: UInt8[Tensor, "b c h w"], decoded: UInt8[Tensor, "b c h w"]) -> None:
        """Add pairs."""
        errors = (originals.double() - decoded.double()).square().mean((1, 2, 3))
        similar = ssim(originals, decoded).sum().item() if min(originals.shape[2:]) >= WINDOW else math.nan
        self.sums += torch.tensor([len(errors), errors.sum().item(), similar], dtype=torch.float64)

    def values(self) -> dict[str, Value]:
        """Return PSNR, unless nothing was lost, and SSIM, unless an image is smaller than its window."""
        count, squares, similar = self.sums.tolist()
        found = {}
        if squares > 0:
            found["PSNR"] = Value(10 * math.log10(255**2 * count / squares), unit="dB")
        if math.isfinite(similar):
            found["SSIM"] = Value(similar / count)
        return found


def ssim(a: UInt8[Tensor, "b c h w"], b: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Return each pair's mean structural similarity, at most 1; images below 11 pixels a side are a ValueError."""
    if a.shape != b.shape or min(a.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM compares images of equal shape and at least {WINDOW} pixels a side, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    x, y = (side.flatten(0, 1)[:, None].double() for side in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    local = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    local = local / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return local.mean((1, 2, 3)).reshape(a.shape[:2]).mean(1)


def blur(images: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 _ _"]:
    """Average over the Gaussian window, wherever it lies within the image."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(images, weights[None, None, None]), weights[None, None, :, None])
