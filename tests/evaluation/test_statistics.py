import numpy as np
import pytest
import torch

from jlt.evaluation import inception
from jlt.evaluation.distances import frechet_distance, kernel_distance
from jlt.evaluation.inception import Inception
from jlt.evaluation.protocol import Reference, compare
from jlt.evaluation.scores import coverage_scores
from jlt.evaluation.statistics import SUBSETS, Statistics

FID = Inception(None, "Inception", inception.FINGERPRINT, dimension=6)


def draw(count, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    widths = {"features": 6, "spatial": 4, "logits": 8}
    return {name: torch.randn(count, width, generator=generator) + shift for name, width in widths.items()}


def observe(views, batch_size, keep=10_000):
    result = Statistics(len(views["features"]), keep)
    for first in range(0, result.count, batch_size):
        result.update({name: rows[first : first + batch_size] for name, rows in views.items()})
    return result


def real(views, spatial=True):
    seen = observe(views, 50)
    return Reference(
        "real", "Inception", inception.FINGERPRINT, seen.moments(), views["features"], seen.moments("spatial")
    )


def test_moments_of_subsets_add_up_to_those_of_all_images():
    views = draw(203)
    seen = observe(views, 17)
    for name in ("features", "spatial"):
        rows = views[name].double().numpy()
        whole = seen.moments(name)
        assert whole.count == 203
        np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(whole.covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-12)
        sizes = [part.count for part in seen.subsets(name)]
        assert sum(sizes) == 203
        assert max(sizes) - min(sizes) <= 1


def test_results_do_not_depend_on_batches_beyond_rounding():
    views, reference = draw(203), real(draw(150, 1, 0.2))
    whole, parts = (compare(observe(views, size), reference, FID) for size in (203, 7))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert parts[name].value == pytest.approx(whole[name].value, rel=1e-9)  # float64 sums in another order


def test_every_metric_of_fids_network_has_its_published_name():
    assert list(compare(observe(draw(200), 50), real(draw(150, 1)), FID)) == [
        "FID", "FID, over fifths of 40", "sFID", "IS", "KID", "precision", "recall", "density", "coverage",
    ]  # fmt: skip


def test_values_are_those_of_the_metrics_themselves():
    views, others = draw(200), draw(150, 1, 0.3)
    values = compare(observe(views, 30), real(others), FID)
    seen = observe(views, 200)
    assert values["FID"].value == pytest.approx(frechet_distance(seen.moments(), observe(others, 150).moments()))
    fifths = [frechet_distance(part, observe(others, 150).moments()) for part in seen.subsets()]
    assert values[f"FID, over fifths of {200 // SUBSETS}"].value == pytest.approx(np.mean(fifths))
    assert values[f"FID, over fifths of {200 // SUBSETS}"].spread == pytest.approx(np.std(fifths, ddof=1))
    assert values["KID"].value == pytest.approx(kernel_distance(views["features"], others["features"]))
    for name, value in coverage_scores(views["features"], others["features"]).items():
        assert values[name].value == value


def test_equal_sets_are_at_distance_0_and_cover_each_other():
    views = draw(200)
    values = compare(observe(views, 30), real(views), FID)
    for name in ("FID", "sFID"):
        assert values[name].value == pytest.approx(0, abs=1e-9)
    assert (values["precision"].value, values["recall"].value, values["coverage"].value) == (1, 1, 1)


def test_images_kept_are_drawn_from_the_whole_set_and_named_by_number():
    views = draw(500)
    seen = observe(views, 30, keep=100)
    numbers = seen.kept_numbers
    assert torch.equal(seen.kept, views["features"][numbers])
    assert len(set(numbers)) == 100
    assert sum(number < 250 for number in numbers) == pytest.approx(50, abs=25)  # five standard deviations


def test_what_a_reference_lacks_is_left_out():
    views = draw(100)
    bare = Reference("mu and sigma", "Inception", inception.FINGERPRINT, observe(views, 50).moments(), None)
    assert list(compare(observe(views, 50), bare, FID)) == ["FID", "FID, over fifths of 20", "IS"]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Statistics(1)
    with pytest.raises(ValueError, match="kept must be at least 0, got -1"):
        Statistics(5, -1)
    views = draw(10)
    views["features"][3] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 10 images are NaN"):
        observe(views, 10)
