"""The comparison's statistics, and where its runs are made."""

import cProfile
from pathlib import Path
from statistics import stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tests.latents import encode_noise

from jlt.cli.compare import variants
from jlt.evaluation.records import Figure, Record, Value
from jlt.experiments import placement
from jlt.experiments.asking import Sampling
from jlt.experiments.compare import (
    Comparison,
    interval,
    loss_figures,
    mean_figures,
    mean_over_seeds,
    over_seeds,
    paired_differences,
    settled,
    smoothed,
    tokens_of,
)
from jlt.experiments.presets import PRESETS
from jlt.processes import check_device
from jlt.training import TrainConfig

SCORES = {"x": [48.0, 51.0, 50.0], "v": [80.0, 86.0, 81.0]}


def run(target: str, seed: int, score: float) -> Record:
    curve = Figure("Loss.", "step", "loss", {f"{target}{seed}": ([1, 2], [score, score + 2])})
    values = {"FD (pixels)": Value(score, spread=9.0), "evaluations": Value(99)}
    return Record(
        "evaluate", f"{target}, seed {seed}", values, {"seed": seed, "target": target}, figures={"loss": curve}
    )


RUNS = [run(target, seed, score) for target, scores in SCORES.items() for seed, score in enumerate(scores)]


def test_runs_that_differ_in_their_seed_alone_are_one_column_with_mean_and_deviation() -> None:
    x, v = map(mean_over_seeds, over_seeds(RUNS))
    assert (x.name, x.settings) == ("x", {"target": "x"})
    assert (v.name, v.settings) == ("v", {"target": "v"})
    distance = x.values["FD (pixels)"]
    assert (distance.value, distance.count) == (pytest.approx(149 / 3), 3)
    assert distance.spread == pytest.approx(stats.tstd(SCORES["x"]))
    assert x.values["evaluations"] == Value(99, None, 3)  # the same in all: no spread to state


def test_paired_differences_are_those_of_the_paired_t_test() -> None:
    (part,) = paired_differences(over_seeds(RUNS)).parts
    expected = stats.ttest_rel(SCORES["v"], SCORES["x"]).confidence_interval(0.95)
    values = part.values
    assert part.name == "v minus x"
    assert values["difference in FD (pixels)"].value == pytest.approx(98 / 3)
    assert values["difference in FD (pixels), 95 % from"].value == pytest.approx(expected.low)
    assert values["difference in FD (pixels), 95 % to"].value == pytest.approx(expected.high)
    assert not any("evaluations" in name for name in values)  # equal in every pair


def test_a_difference_that_is_the_same_in_every_pair_is_stated_without_width() -> None:
    runs = [run(target, seed, score + seed) for target, score in (("x", 10.0), ("v", 15.0)) for seed in (0, 1)]
    (part,) = paired_differences(over_seeds(runs)).parts
    ends = ("", ", 95 % from", ", 95 % to")
    assert [part.values[f"difference in FD (pixels){end}"].value for end in ends] == [5, 5, 5]


def test_pairs_are_of_one_seed_whatever_the_order_of_the_runs() -> None:
    assert paired_differences(over_seeds(RUNS)) == paired_differences(over_seeds([*RUNS[:3][::-1], *RUNS[3:]]))


def test_one_common_seed_gives_no_difference() -> None:
    assert paired_differences(over_seeds([RUNS[0], RUNS[1], RUNS[3]])).parts == ()


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9).filter(lambda v: max(v) - min(v) > 1e-3))
def test_the_interval_is_scipys(values: list[float]) -> None:
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


def test_a_column_draws_the_mean_of_its_seeds_curves() -> None:
    figure = mean_figures(over_seeds(RUNS))["loss"]
    assert figure.lines["x"] == ([1, 2], pytest.approx([149 / 3, 155 / 3]))
    assert list(figure.lines) == ["x", "v"]
    assert figure.spreads["x"] == pytest.approx([stdev(SCORES["x"])] * 2)
    assert figure.caption == "Loss. Mean over seeds, in a band of their standard deviation."


def test_a_column_draws_seeds_of_which_one_skipped_a_step() -> None:
    def trained(seed: int, losses: list[float]) -> Record:
        figures = loss_figures({f"x, seed {seed}": smoothed(losses)}, {})
        return Record("evaluate", f"x, seed {seed}", {}, {"seed": seed, "target": "x"}, figures=figures)

    runs = [trained(0, [1.0] * 1400), trained(1, [3.0] * 1399)]
    steps, means = mean_figures(over_seeds(runs))["training loss"].lines["x"]
    assert (len(steps), set(means)) == (100, {2.0})


@given(st.integers(1, 1000))
def test_a_curve_has_at_most_as_many_points_as_asked_for(count: int) -> None:
    steps, means = smoothed([1.0] * count, 100)
    assert len(steps) == len(means) <= 100
    assert steps[-1] <= count


def test_settings_joined_by_plus_vary_together_and_with_the_others_in_all_combinations() -> None:
    assert variants(["target+loss_space=x+v,x+x,v+v", "seed=0,1"]) == [
        {"target": target, "loss_space": space, "seed": seed}
        for target, space in (("x", "v"), ("x", "x"), ("v", "v"))
        for seed in (0, 1)
    ]
    assert variants(["latents=a+b"]) == [{"latents": "a+b"}]  # one name takes its value as it is


@pytest.mark.parametrize("text", ["target+loss_space=x", "target+loss_space=x+v,v", "target+seed=x+0+1"])
def test_settings_that_vary_together_take_a_value_each(text: str) -> None:
    with pytest.raises(ValueError, match="2 settings take 2 values joined by"):
        variants([text])


def test_the_tokens_of_a_comparison_are_its_pairs_of_latents_and_patch_size() -> None:
    def tokens(*vary: str) -> dict[tuple[Path, int], str]:
        base, runs = PRESETS["digits"].config, tuple(variants(vary))
        return tokens_of(Comparison(Path("a"), Path("out"), base, runs, Sampling(), "pixels"))

    assert tokens("target=x,v") == {(Path("a"), 1): "the latents"}
    assert tokens("patch_size=1,2", "seed=0,1") == {
        (Path("a"), 1): "the latents in patches of 1",
        (Path("a"), 2): "the latents in patches of 2",
    }
    assert tokens("latents+patch_size=white+1,pixels+8", "target=x,v") == {
        (Path("white"), 1): "white in patches of 1",
        (Path("pixels"), 8): "pixels in patches of 8",
    }


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_hold_every_item_once(items: list[int], count: int) -> None:
    shares = [placement.share(items, f"{k}/{count}") for k in range(1, count + 1)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a share is K/N"):
        placement.share([1, 2, 3], text)


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_every_item_is_made_on_its_device(devices: list[str], tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(4)]
    placement.spread(Path.write_text, paths, devices, tmp_path / "logs")
    assert [path.read_text() for path in paths] == ["cpu"] * 4
    assert len(list(tmp_path.glob("logs/log-*"))) == (2 if len(devices) == 2 else 0)


def test_the_first_failure_on_any_device_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        placement.spread(Path.write_text, [tmp_path / "a", tmp_path / "absent" / "b"], ["cpu", "cpu"], tmp_path)


def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    # a function of the standard library that runs its first argument, as a new process can import no test
    with pytest.raises(ValueError, match=f"a process ended before its run, killed perhaps; {tmp_path} holds"):
        placement.spread(cProfile.run, ["__import__('os')._exit(9)"], ["cpu", "cpu"], tmp_path)


def test_a_device_that_is_not_here_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used here"):
        placement.spread(Path.write_text, [tmp_path / "a"], ["cpu", "nonsense"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_auto_is_settled_before_the_runs_begin_and_a_run_that_is_there_already_is_made_once(tmp_path: Path) -> None:
    encode_noise(tmp_path / "latents")
    variants = tuple({"target": name, "seed": seed} for name in ("auto", "x", "v") for seed in (0, 1))

    def compared(variants: tuple[dict[str, object], ...], target: str = "x") -> Comparison:
        base = TrainConfig(target=target, size="1x16x2")
        return settled(Comparison(tmp_path / "latents", tmp_path, base, variants, Sampling(), "pixels"))

    both = compared(variants)
    assert list(both.variants) == [{"target": name, "seed": seed} for name in ("x", "v") for seed in (0, 1)]
    (reason,) = both.reasons
    chosen = reason.partition(":")[0]
    # where nothing else is that run, auto's is made, under the name of what it chose
    assert list(compared(variants[:2]).variants) == [{"target": chosen, "seed": seed} for seed in (0, 1)]
    assert list(compared(({"seed": 3},), "auto").variants) == [{"target": chosen, "seed": 3}]
    assert compared(variants[2:]).reasons == ()


def test_the_gpus_of_others_are_counted_and_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # to open one of them would fail here
    check_device("cuda:1")
    check_device("cuda")
    with pytest.raises(ValueError, match=r"device 'cuda:2' cannot be used here: there are 2 of its kind"):
        check_device("cuda:2")
