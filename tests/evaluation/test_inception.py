"""FID's network, end to end with a file of random weights in the real one's format."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from jlt import files
from jlt.evaluation import inception
from jlt.evaluation.features import metric_name, open_extractor, views


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights under which every layer's outputs have unit variance, so that features differ from image to image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception.bare_network()
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = 1.0
        network(pictures(4))
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS
    torch.save(network.state_dict(), path)
    return path


def pictures(count, size=40):
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 7, 1, 3) * 2 - 0.5
    return ((noise + smooth).clamp(0, 1) * 255).byte()


@pytest.fixture(scope="module")
def extractor(weights):
    return open_extractor(f"inception-unverified:{weights}")


def test_a_pass_gives_the_three_views_that_the_metrics_need(extractor):
    seen = views(extractor, pictures(2))
    assert {name: tuple(rows.shape) for name, rows in seen.items()} == {
        "features": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    assert all(rows.dtype == torch.float32 and bool(rows.isfinite().all()) for rows in seen.values())
    assert (seen["features"][0] - seen["features"][1]).abs().max() > 0.01
    torch.testing.assert_close(seen["features"], extractor(pictures(2)), rtol=0, atol=0)
    # logits are the last layer's product with the features, without the bias
    expected = seen["features"] @ extractor.network.fc.weight.T
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-4, atol=1e-5)  # float32, 2,048 terms


def test_spatial_features_are_the_first_channels_of_the_first_branch_by_row_and_column(extractor):
    network, seen = extractor.network, []
    handle = network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    spatial = views(extractor, pictures(2))["spatial"]
    handle.remove()
    grid = spatial.reshape(2, 17, 17, 7)
    assert torch.equal(grid[1, 3, 5], seen[0][1, :7, 3, 5])  # the block's output begins with its 1 x 1 branch


def test_images_are_resized_as_tensorflow_1_does(extractor):
    """Output pixel i lies at input i * size/299, without the half-pixel shift and without antialiasing."""
    image = pictures(1, 8)
    seen = []
    handle = extractor.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(image)
    handle.remove()
    at = torch.arange(299) * 8 / 299
    low, high, part = at.long(), (at.long() + 1).clamp(max=7), at % 1
    rows = image[0].float()[:, low] * (1 - part)[:, None] + image[0].float()[:, high] * part[:, None]
    expected = rows[:, :, low] * (1 - part) + rows[:, :, high] * part
    torch.testing.assert_close(seen[0][0], (expected - 128) / 128, rtol=0, atol=1e-4)  # float32 weights of 255


def test_grey_images_and_any_batch_give_the_same_features(extractor):
    grey = pictures(3)[:, :1]
    together = extractor(grey)
    alone = torch.cat([extractor(image[None].repeat(1, 3, 1, 1)) for image in grey])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)  # float32, other blocking of the products


def test_weights_of_another_hash_are_refused_and_never_called_fid(weights, extractor, monkeypatch):
    found = files.sha256(weights)
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, FID's Inception has {inception.SHA256}"):
        open_extractor(f"inception:{weights}")
    assert metric_name("FD", extractor) == f"FD (Inception {found[:8]})"
    monkeypatch.setattr(inception, "SHA256", found)
    monkeypatch.setattr(inception, "FINGERPRINT", inception.identify(found))
    official = open_extractor(f"inception:{weights}")
    assert [metric_name(name, official) for name in ("FD", "sFD", "KD", "IS", "precision")] == [
        "FID", "sFID", "KID", "IS", "precision",
    ]  # fmt: skip


def test_the_hash_is_the_one_that_the_files_name_begins():
    assert inception.WEIGHTS.endswith(f"-{inception.SHA256[:8]}.pth")


def test_absent_weights_are_one_line_with_file_source_and_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="is not there") as error:
        open_extractor("inception")
    for part in (inception.WEIGHTS, inception.URL, str(tmp_path / "hub" / "checkpoints")):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Bomb(), tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth does not hold weights of torch-fidelity's Inception"):
        open_extractor(f"inception-unverified:{tmp_path / 'bomb.pth'}")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold weights of torch-fidelity's Inception"):
        open_extractor(f"inception-unverified:{tmp_path / 'other.pth'}")


def test_the_network_is_had_without_torchvision_and_leaves_no_half_imported_package():
    code = (
        "import sys; sys.modules['torchvision'] = None; from jlt.evaluation import inception;"
        "inception.bare_network(); sys.exit(any(name.startswith('torch_fidelity') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_extractors_with_a_file_take_a_path():
    with pytest.raises(ValueError, match="pixels takes none"):
        open_extractor("pixels:weights.pth")
