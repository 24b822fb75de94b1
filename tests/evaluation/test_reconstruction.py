"""PSNR and SSIM against closed forms and an independent computation."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from jlt.evaluation.reconstruction import Fidelity, ssim


def draw(count, channels=3, height=20, width=25, seed=0):
    return torch.randint(0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def by_scipy(a, b):
    """Of one channel: filters over the whole image, then only where the window lies within it."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(image):
        return scipy.ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_is_that_of_scipys_gaussian_filter():
    a, b = draw(3), draw(3, seed=1)
    b[1] = (a[1].float() * 0.5 + 60).byte()
    expected = [
        np.mean([by_scipy(x.numpy(), y.numpy()) for x, y in zip(p, q, strict=True)]) for p, q in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_flat_images_has_its_closed_form():
    a, b = torch.full((1, 1, 15, 15), 100, dtype=torch.uint8), torch.full((1, 1, 15, 15), 140, dtype=torch.uint8)
    c1 = 2.55**2  # without variance only the luminance term is left
    expected = (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-6)  # a variance of rounding errors over c2


def test_equal_images_have_an_ssim_of_1_and_no_psnr():
    found = Fidelity()
    found.update(draw(4), draw(4))
    assert found.values()["SSIM"].value == pytest.approx(1, abs=1e-12)
    assert "PSNR" not in found.values()


def test_psnr_is_that_of_the_error_over_all_images():
    a = draw(5).clamp(10, 245)
    b = a + torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)[:, None, None, None]
    found = Fidelity()
    for x, y in zip(a.split(2), b.split(2), strict=True):
        found.update(x, y)
    assert found.values()["PSNR"].value == pytest.approx(10 * math.log10(255**2 / 11), rel=1e-12)  # (1+4+9+16+25)/5


def test_both_fall_with_noise():
    a, seen = draw(2, 1, 40, 40), []
    a = torch.nn.functional.avg_pool2d(a.float(), 5, 1, 2).byte()
    for sigma in (2, 8, 32):
        noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) * sigma
        found = Fidelity()
        found.update(a, (a + noise).round().clamp(0, 255).byte())
        seen.append([value.value for value in found.values().values()])
    assert (np.diff(seen, axis=0) < 0).all()


def test_images_below_the_window_have_no_ssim():
    found = Fidelity()
    found.update(draw(2, 1, 8, 8), draw(2, 1, 8, 8, seed=1))
    assert set(found.values()) == {"PSNR"}
    with pytest.raises(ValueError, match=r"at least 11 pixels a side, got \(2, 1, 8, 8\)"):
        ssim(draw(2, 1, 8, 8), draw(2, 1, 8, 8))
