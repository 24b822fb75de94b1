import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.data import load_representation
from jlt.data.representations import Pixels, cut_patches, fit_patch_pca, join_patches, to_float, to_uint8

FIRST = '{"format_version": 1, '


def smooth_images(number=24, channels=3, size=16, seed=0):
    """Random images whose neighbouring pixels are alike, as photographs' are."""
    noise = torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return (128 + 12 * noise.cumsum(2).cumsum(3)).clamp(0, 255).to(torch.uint8)


def batches(images, batch_size):
    return iter(images.split(batch_size))


def test_the_basis_is_orthonormal():
    basis = fit_patch_pca([smooth_images()], 4).basis.double()
    # float32 rounding of entries below 1
    torch.testing.assert_close(basis.T @ basis, torch.eye(48, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "stride"), [(1, 1), (1, 8), (3, 2), (3, 4)])
def test_all_channels_lose_nothing(channels, stride):
    images = smooth_images(channels=channels)
    representation = fit_patch_pca([images], stride)
    unseen = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    assert torch.equal(representation.decode(representation.encode(images)), images)
    assert torch.equal(representation.decode(representation.encode(unseen)), unseen)


def test_eigenvalues_and_mean_agree_with_numpy():
    images = smooth_images()
    representation = fit_patch_pca([images], 4)
    patches = cut_patches(to_float(images).double(), 4).flatten(0, 2).numpy()
    expected = np.linalg.eigvalsh(np.cov(patches.T, bias=True))[::-1]
    np.testing.assert_allclose(representation.eigenvalues, expected, rtol=1e-5, atol=1e-9)  # stored as float32
    np.testing.assert_allclose(representation.mean, patches.mean(0), atol=1e-6)


def test_latents_of_the_fitted_images_are_uncorrelated_with_the_eigenvalues_as_variances():
    images = smooth_images()
    representation = fit_patch_pca([images], 4)
    latents = representation.encode(images).double().permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(latents, correction=0)
    largest = representation.eigenvalues[0].item()
    torch.testing.assert_close(covariance, torch.diag(representation.eigenvalues.double()), atol=1e-6 * largest, rtol=0)
    assert latents.mean(1).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_no_bit_of_the_fit_depends_on_the_batch_size(batch_size):
    images = smooth_images()
    images[:, 1] = images[:, 2] = images[:, 0]  # grey: two thirds of the eigenvalues are 0, their basis is arbitrary
    expected, found = (fit_patch_pca(batches(images, size), 4) for size in (7, batch_size))
    assert found.fingerprint == expected.fingerprint
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_no_latent_depends_on_the_batch_size():
    images = smooth_images(64, size=8)
    representation = fit_patch_pca([images], 8)  # one patch an image: float32 products are off in the last bit here
    together = representation.encode(images).half()
    for size in (1, 3):
        apart = torch.cat([representation.encode(batch).half() for batch in images.split(size)])
        assert torch.equal(apart, together)


def test_a_components_largest_entry_is_positive():
    basis = fit_patch_pca([smooth_images()], 4).basis
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_every_channel_left_out_costs_its_eigenvalue():
    images = smooth_images()
    full = fit_patch_pca([images], 4)
    pixels, errors = to_float(images), []
    for channels in (1, 6, 16, 32, 48):
        kept = fit_patch_pca([images], 4, channels)
        patches = kept.encode(images).permute(0, 2, 3, 1) @ kept.basis.T + kept.mean  # decoding, without rounding
        errors.append(48 * (join_patches(patches, 4) - pixels).square().mean().item())
        assert errors[-1] == pytest.approx(full.eigenvalues[channels:].sum().item(), abs=1e-4)
    assert errors == sorted(errors, reverse=True)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_joining_undoes_cutting(channels, stride, rows, columns):
    pixels = torch.randn(2, channels, rows * stride, columns * stride)
    patches = cut_patches(pixels, stride)
    assert patches.shape == (2, rows, columns, channels * stride**2)
    assert torch.equal(join_patches(patches, stride), pixels)
    corner = pixels[1, :, :stride, -stride:].flatten()  # channel, row, column
    assert torch.equal(patches[1, 0, -1], corner)


def test_pixels_come_back_at_every_level():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    representation = Pixels(1)
    latents = representation.encode(levels)
    assert latents.min() == -1
    assert latents.max() == 1
    assert torch.equal(representation.decode(latents.half().float()), levels)


def test_decoding_rounds_and_clamps():
    levels = torch.tensor([-5.0, 0.4, 0.6, 254.4, 254.6, 300.0])
    assert to_uint8((levels / 127.5 - 1).reshape(1, 1, 1, -1)).flatten().tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("make", [lambda: Pixels(3), lambda: fit_patch_pca([smooth_images()], 4, 20)])
def test_a_saved_representation_is_the_same_when_loaded(tmp_path, make):
    made, images = make(), smooth_images(seed=1)
    made.save(tmp_path)
    loaded = load_representation(tmp_path)
    assert loaded.fingerprint == made.fingerprint
    assert (loaded.name, loaded.channels, loaded.stride) == (made.name, made.channels, made.stride)
    assert loaded.normalisation == made.normalisation == "global"
    assert torch.equal(loaded.encode(images), made.encode(images))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("representation.json", "[]", "format version None, this jlt reads 1"),
        ("representation.json", '{"format_version": 9}', "format version 9, this jlt reads 1"),
        ("representation.json", FIRST + '"name": "patch-pac"}', "did you mean 'patch-pca'"),
        ("representation.json", FIRST + '"name": "patch-pca"}', "lacks 'image_channels'"),
        ("representation.json", FIRST + '"name": "patch-pca", "image_channels": 3, "stride": 2}', r"want \[12\]"),
        ("representation.json", FIRST + '"name": "pixels", "image_channels": []}', "no representation: int"),
        ("tensors.safetensors", "cos\nsystem\n(S'true'\ntR.", "not a safetensors file"),
    ],
)  # fmt: skip
def test_a_damaged_representation_is_named(tmp_path, name, content, complaint):
    fit_patch_pca([smooth_images()], 4, 20).save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_representation(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("stride", "channels"), [(0, None), (5, None), (4, 0), (4, 49)])
def test_impossible_patches_are_refused_at_the_first_batch(stride, channels):
    batches = iter([smooth_images(), smooth_images()])
    with pytest.raises(ValueError, match=r"stride|channels"):
        fit_patch_pca(batches, stride, channels)
    next(batches)
