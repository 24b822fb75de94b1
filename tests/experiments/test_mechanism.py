from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jlt.data import Affine
from jlt.experiments.mechanism import (
    TIMES,
    by_seed,
    direction_errors,
    measure_mechanism,
    ratio,
    run_names,
    sample_variances,
)
from jlt.flow import geometry, target
from jlt.sampling import SOLVERS, Field
from jlt.sampling.grids import time_grid

SPECTRUM = torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64)
AFFINE = Affine((0.0,) * 3, (1.0,) * 3)


class Gaussian(nn.Module):
    """The best denoiser of N(0, diag(SPECTRUM)) in a target's own terms, with what it errs by added."""

    def __init__(self, name: str, gain: float = 1.0) -> None:
        super().__init__()
        self.name, self.gain, self.anchor = name, gain, nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(shape=(3, 4, 4))

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        best = geometry.optimal_coefficient(SPECTRUM, *target(self.name).coefficients(0.0), t.double()[:, None])
        return (self.gain * best[:, :, None, None] * z).float()


def run(name: str, gain: float = 1.0, **changes: Any) -> Any:
    found = {
        "model": Gaussian(name, gain), "target": target(name), "representation": SimpleNamespace(fingerprint="r"),
        "affine": AFFINE, "header": {"step": 1}, "fingerprint": "w",
    }  # fmt: skip
    made = SimpleNamespace(**{**found, **changes})
    made.sample = lambda labels, **how: SimpleNamespace(latents=solved(made, len(labels), **how))
    return made


def solved(made: Any, count: int, solver: str, grid: str, steps: int, scale: float) -> Tensor:
    """Return samples by the exact flow of a fake network."""
    field = Field(lambda z, t, _: made.model(z, torch.full((count,), t), None), made.target, None, 0.0)
    return SOLVERS[solver](field, torch.randn(count, 3, 4, 4), time_grid(grid, steps))


def stored(count: int = 400) -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, 4, 4, generator=generator) * SPECTRUM.sqrt().float()[:, None, None]
    manifest = SimpleNamespace(representation_fingerprint="r", affine=AFFINE, split="held-out")

    class Stored:
        shape, labels = (3, 4, 4), torch.zeros(count, dtype=torch.int64)

        def __len__(self) -> int:
            return count

        def gather(self, indices: Tensor) -> Tensor:
            return x[indices]

    Stored.manifest = manifest  # type: ignore[attr-defined]
    return Stored()


@pytest.mark.parametrize("name", ["x", "v", "eps"])
def test_the_best_gaussian_denoiser_errs_by_the_closed_form_in_every_direction(name):
    errors = direction_errors(run(name), stored(), torch.eye(3, dtype=torch.float64))
    closed = geometry.conditional_variance(SPECTRUM, 1, 0, torch.tensor(TIMES, dtype=torch.float64)[:, None])
    # a mean of 6,400 squares has a standard error of sqrt(2/6400) = 1.8 %
    torch.testing.assert_close(errors, closed, rtol=0.09, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "gain", "expected"),
    [
        ("x", 1.0, [1.0, 1.0, 1.0]),
        ("v", 1.0, [1.0, 1.0, 1.0]),
        ("x", 0.0, [0.0, 0.0, 0.0]),  # a direction that x says nothing in has no variance,
        ("v", 0.0, [1 / 5.0, 1.0, 1 / 0.1]),  # one that v says nothing in keeps the noise's, capacity's equation (4)
    ],
)
def test_samples_have_the_data_s_variance_and_where_a_network_says_0_what_its_target_leaves(name, gain, expected):
    found = sample_variances(run(name, gain), stored(), torch.eye(3, dtype=torch.float64))
    # a ratio of two means of 6,400 squares has a standard error of 2.5 %, Heun's 25 steps err by less
    assert found.tolist() == pytest.approx(expected, rel=0.1, abs=1e-9)


def test_the_record_compares_runs_with_the_first_and_the_basis_does_not_matter_to_a_perfect_one():
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    record = measure_mechanism({"x": [run("x")], "v": [run("v")], "worse": [run("v", 0.5)]}, stored(), SPECTRUM.diag())
    assert [part.name for part in record.parts] == ["x", "v", "worse"]
    for value in record.parts[0].values.values():
        assert value.value == pytest.approx(1, rel=0.09)
    same = record.figures["v over x"].lines["largest variances"][1]
    assert same == pytest.approx([1.0] * len(TIMES), rel=1e-3)  # float32's rounding, over 1 - t = 0.05
    assert min(record.figures["worse over x"].lines["smallest variances"][1]) > 1
    assert {figure.level for figure in record.figures.values()} == {1}  # all are ratios
    total = direction_errors(run("x"), stored(), basis).sum(1)
    torch.testing.assert_close(total, direction_errors(run("x"), stored(), torch.eye(3).double()).sum(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"representation": SimpleNamespace(fingerprint="other")}, "x was trained with representation other, it is r"),
        ({"header": {"step": 1, "noise_scale": 2.0}}, "x was trained with noise scale 2.0, it is 1.0 here"),
    ],
)
def test_a_run_of_other_latents_or_noise_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        measure_mechanism({"x": [run("x", **changes)]}, stored(), SPECTRUM.diag())


def test_runs_are_named_by_their_folders_unless_those_are_equal():
    assert run_names((Path("a/x"), Path("a/v"))) == ["x", "v"]
    assert run_names((Path("a/x"), Path("b/x"))) == ["a/x", "b/x"]


def trained(name: str, seed: int, gain: float = 1.0, **others: Any) -> Any:
    return run(name, gain, header={"step": 1, "training": {"target": name, "seed": seed, **others}})


def test_runs_that_differ_in_the_seed_alone_are_one_in_the_order_of_their_seeds():
    a, b, c, longer = trained("x", 1), trained("v", 0), trained("x", 0), trained("x", 0, steps=20)
    found = by_seed({"1-x": a, "0-v": b, "0-x": c, "longer": longer, "imported": run("x"), "other": run("x")})
    assert found == {
        "x": [c, a],
        "0-v": [b],
        "longer": [longer],
        "imported": [found["imported"][0]],
        "other": [found["other"][0]],
    }


def test_runs_that_differ_in_more_than_their_target_are_named_by_all_of_it():
    spaces = ("v", "x", "v", "x")
    runs = {f"{i}": trained("x", i // 2, loss_space=space) for i, space in enumerate(spaces)}
    assert {name: [run.header["training"]["seed"] for run in seeds] for name, seeds in by_seed(runs).items()} == {
        "x, loss_space v": [0, 1],
        "x, loss_space x": [0, 1],
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_three_directions_leave_thirds_out(count):
    errors = torch.ones(2, len(TIMES), count)
    found = ratio(2 * errors, errors)
    assert list(found) == ["largest", "middle", "smallest"][:count]
    assert all((each == 2).all() for each in found.values())


def test_seeds_are_compared_in_pairs():
    """Errors grow with the seed in both columns alike: each pair's ratio is 1, and the pairs have no spread."""
    runs = [trained("x", seed, gain=1 - 0.1 * seed) for seed in range(3)]
    record = measure_mechanism({"x": runs, "again": runs}, stored(), SPECTRUM.diag())
    value = record.values["again over x, middle variances, t = 0.5"]
    assert (value.value, value.spread, value.count) == (pytest.approx(1), pytest.approx(0), 3)
    spread = record.parts[0].values["error / closed form, largest variances, t = 0.5"]
    assert spread.count == 3
    assert spread.spread > 0.01


@pytest.mark.parametrize(("seeds", "expected", "count"), [((1, 2), 1.0, 1), ((2, 3), None, 1), ((0, 1), 1.0, 2)])
def test_only_runs_of_one_seed_are_a_pair(seeds, expected, count):
    """Errors grow with the seed: seeds 0 and 1 against 1 and 2 have one pair, and against 2 and 3 means alone."""
    ours, others = ([trained("x", seed, gain=1 - 0.1 * seed) for seed in each] for each in ((0, 1), seeds))
    value = measure_mechanism({"x": ours, "again": others}, stored(), SPECTRUM.diag()).values[
        "again over x, largest variances, t = 0.5"
    ]
    assert value.count == count
    assert value.value == pytest.approx(expected) if expected else value.value > 1.01
