"""The metrics against torch-fidelity's, on the same features."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch

from jlt.evaluation.distances import frechet_distance, kernel_distance
from jlt.evaluation.moments import Moments
from jlt.evaluation.scores import InceptionScore, coverage_scores


@pytest.fixture(scope="module")
def fidelity():
    """Its modules of metrics, without the package's own imports, which want torchvision for reading images."""
    unused = types.ModuleType("torch_fidelity.utils")
    unused.__getattr__ = lambda name: None
    with pytest.MonkeyPatch.context() as patch:
        package = importlib.util.module_from_spec(importlib.util.find_spec("torch_fidelity"))  # not executed
        patch.setitem(sys.modules, "torch_fidelity", package)
        patch.setitem(sys.modules, "torch_fidelity.utils", unused)
        names = ("fid", "kid", "isc", "prc")
        yield types.SimpleNamespace(**{n: importlib.import_module(f"torch_fidelity.metric_{n}") for n in names})
        for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8
    ours, theirs = (torch.randn(n, 64, generator=generator) @ mixing for n in (600, 500))
    return ours * 1.2 + 0.1, theirs


def of(rows):
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def test_the_frechet_distance_is_torch_fidelitys(fidelity, features):
    ours, theirs = ({"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in map(of, features))
    expected = fidelity.fid.fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*map(of, features)) == pytest.approx(expected, rel=1e-6)


def test_the_kernel_distance_is_torch_fidelitys(fidelity, features):
    """Of one subset that is the whole set; in float64, as it computes in the type that it is given."""
    ours, theirs = (side[:500].double() for side in features)
    expected = fidelity.kid.kid_features_to_metric(
        ours, theirs, kid_subsets=1, kid_subset_size=500, verbose=False
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert kernel_distance(ours, theirs) == pytest.approx(expected, rel=1e-6)


def test_the_inception_score_is_torch_fidelitys(fidelity):
    logits = torch.randn(500, 20, generator=torch.Generator().manual_seed(1)) * 3
    expected = fidelity.isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    score = InceptionScore(20)
    score.update(logits, torch.arange(500) // 50)
    assert score.value().value == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    # its deviation divides by the number of shares, ours by one less
    assert score.value().spread == pytest.approx(expected["inception_score_std"] * (10 / 9) ** 0.5, rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys(fidelity, features):
    ours, theirs = features
    expected = fidelity.prc.prc_features_to_metric(ours, theirs, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    found = coverage_scores(ours, theirs)
    assert 0.1 < found["precision"] < 0.95
    assert found["precision"] == pytest.approx(float(expected["precision"]), abs=1e-6)
    assert found["recall"] == pytest.approx(float(expected["recall"]), abs=1e-6)


def test_density_and_coverage_are_those_of_scikit_learns_neighbours(features):
    from sklearn.neighbors import NearestNeighbors

    ours, theirs = (side.double().numpy() for side in features)
    reach = NearestNeighbors(n_neighbors=4).fit(theirs).kneighbors(theirs)[0][:, 3]
    inside = np.linalg.norm(theirs[:, None] - ours[None], axis=2) <= reach[:, None]
    found = coverage_scores(*features)
    assert found["density"] == pytest.approx(inside.sum() / 3 / len(ours), rel=1e-6)
    assert found["coverage"] == pytest.approx(inside.any(1).mean(), rel=1e-6)
