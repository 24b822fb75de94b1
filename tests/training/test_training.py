"""Training: the step, its randomness, the loop, and resuming to the bit."""

import copy
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tests.latents import encode_noise

from jlt import files
from jlt.data import encode, open_latents
from jlt.data.idx import Arrays
from jlt.flow import TARGETS, TimeDensity, interpolate, random
from jlt.flow.random import Stream
from jlt.nn import EMA, Dropout, Transformer, checkpoint
from jlt.processes import Processes
from jlt.sampling import load
from jlt.training import Stopped, TrainConfig, draw_batch, held_out_losses, make_optimizer, read_metrics, train
from jlt.training.config import MAY_CHANGE
from jlt.training.held_out import BINS
from jlt.training.metrics import Metrics
from jlt.training.step import data_order, training_step

CONFIG = TrainConfig(
    size="1x16x2", steps=12, batch_size=6, learning_rate=1e-2, warmup_steps=3, ema_decays=(0.9, 0.5), save_every=4,
    held_out_every=5, loss_space="x",
)  # fmt: skip


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_noise(tmp_path_factory.mktemp("latents") / "latents", mirrored=True)


def contents(run: Path) -> dict[str, str]:
    """Hash everything that a run leaves, but for the wall time in checkpoint.json."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in ("lock", "checkpoint.json"):
            found[str(path.relative_to(run))] = files.sha256(path)
        elif path.name == "checkpoint.json":
            header = json.loads(path.read_text())
            assert header.pop("seconds") > 0
            found[str(path.relative_to(run))] = json.dumps(header)
    return found


def test_a_batch_is_a_function_of_seed_step_and_position(latents: Path) -> None:
    data, config = open_latents(latents), dataclasses.replace(CONFIG, flip=True, batch_size=8)
    whole = draw_batch(data, config, 5, torch.arange(8))
    parts = [draw_batch(data, config, 5, part) for part in (torch.arange(3), torch.arange(3, 8))]
    for field in ("x", "eps", "t", "label", "position"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    other = draw_batch(data, dataclasses.replace(config, seed=1), 5, torch.arange(8))
    assert not torch.equal(whole.eps, other.eps)


def test_every_epoch_sees_every_image_once_in_its_own_order() -> None:
    serial = torch.arange(70)  # 10 images: 7 epochs
    orders = [data_order(3, 10, serial[k : k + 10]) for k in range(0, 70, 10)]
    assert all(torch.equal(order.sort().values, torch.arange(10)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 7
    assert torch.equal(data_order(3, 10, serial[5:25]), torch.cat(orders)[5:25])  # across an epoch's end


def test_labels_are_dropped_at_the_stated_rate(latents: Path) -> None:
    data = open_latents(latents)
    config = dataclasses.replace(CONFIG, label_drop=0.25, batch_size=4000)
    label = draw_batch(data, config, 0, torch.arange(4000)).label
    share = (label == data.num_classes).double().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)


def test_the_learning_rate_warms_up_from_zero_stays_and_falls() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10:80] == [1.0] * 70
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["x", "eps", "v", "k=0.5", "k=0..1", "residual=channels:2,1,0.5,0.3"])
@pytest.mark.parametrize("space", ["x", "v"])
def test_training_lowers_the_loss_of_any_target_in_any_space(latents: Path, name: str, space: str) -> None:
    data = open_latents(latents)
    config = dataclasses.replace(CONFIG, target=name, loss_space=space, warmup_steps=0)
    model = Transformer(config.model(data.shape, data.num_classes))
    ema, optimizer = EMA(model, [0.9]), make_optimizer(model, config)
    batch = draw_batch(data, config, 0, torch.arange(6))  # the same one again and again: it must be learnt
    losses = [training_step(model, ema, optimizer, batch, config, 0)[0].item() for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_is_adamw_on_the_clipped_gradient_of_the_weighted_loss_of_the_recipe(latents: Path) -> None:
    config = dataclasses.replace(
        CONFIG, loss_space="v", loss_weight="edm", times=TimeDensity(mean=0.7, std=0.5), floor=0.3, betas=(0.8, 0.9),
        weight_decay=0.1, clip=0.05, warmup_steps=0,
    )  # fmt: skip
    data, position = open_latents(latents), torch.arange(6)
    model = Transformer(config.model(data.shape, data.num_classes))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # whose last layers begin at 0
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    twin, optimizer = copy.deepcopy(model), make_optimizer(model, config)
    first, second = ([torch.zeros_like(p) for p in twin.parameters()] for _ in range(2))
    for step in range(2):
        batch = draw_batch(data, config, step, position)
        u = random.uniform(config.seed, Stream.TIME, step, position)
        torch.testing.assert_close(batch.t, torch.sigmoid(0.7 + 0.5 * torch.special.ndtri(u)))
        _, norm = training_step(model, EMA(model, []), optimizer, batch, config, step)
        t = batch.t[:, None, None, None]
        error = (twin(t * batch.x + (1 - t) * batch.eps, batch.t, batch.label) - batch.x) / (1 - t).clamp(min=0.3)
        weight = (batch.t / (1 - batch.t)) ** 2 + 1  # EDM's
        gradients = torch.autograd.grad((weight * error.square().mean((1, 2, 3))).mean(), list(twin.parameters()))
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        torch.testing.assert_close(norm, length)
        assert length > 0.05
        for p, g, m, v in zip(twin.parameters(), gradients, first, second, strict=True):
            g = g * 0.05 / length
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.9).add_(0.1 * g**2)
            change = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
            p.data = p.data * (1 - 1e-2 * 0.1) - 1e-2 * change
    for p, by_hand in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, by_hand, rtol=0, atol=2e-4)  # of 2e-2: float32 where a gradient is near 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_runs_in_the_dtype_of_the_recipe_and_its_weights_stay_float32(latents: Path, dtype: str) -> None:
    config, data = dataclasses.replace(CONFIG, dtype=dtype), open_latents(latents)
    model, seen = Transformer(config.model(data.shape, data.num_classes)), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    batch = draw_batch(data, config, 0, torch.arange(6))
    training_step(model, EMA(model, []), make_optimizer(model, config), batch, config, 0)
    assert seen == [dtype == "bfloat16"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_run_whose_learning_rate_has_begun_to_fall_has_its_last_step_settled(latents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=8, decay_steps=4, save_every=2, held_out_every=0)
    runs = [tmp_path / name for name in ("whole", "stopped", "falling")]
    train(dataclasses.replace(config, steps=12), latents, runs[0])
    for run, last in zip(runs[1:], (4, 6), strict=True):

        def stop(step: int, loss: float, last: int = last) -> None:
            if step == last:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Stopped):
            train(config, latents, run, progress=stop)
    train(dataclasses.replace(config, steps=12), latents, runs[1])  # not begun to fall: as if it had been 12 at first
    rates = [[line["learning_rate"] for line in read_metrics(run) if "loss" in line] for run in runs[:2]]
    assert rates[0] == rates[1]
    with pytest.raises(ValueError, match=r"finished step \d of 8, and with 12 steps its learning rate"):
        train(dataclasses.replace(config, steps=12), latents, runs[2])


def test_only_what_changes_no_step_may_change_when_a_run_goes_on() -> None:
    assert set(MAY_CHANGE) == {"steps", "save_every", "keep_last", "keep_every", "snapshot_every"}


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(latents: Path) -> None:
    data = open_latents(latents)
    model = Transformer(CONFIG.model(data.shape, data.num_classes))
    ema, optimizer = EMA(model, [0.9]), make_optimizer(model, CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for average in ema.averages[0.9].values():
        average += 1  # so that an average that moves towards the weights shows
    batch = draw_batch(data, CONFIG, 0, torch.arange(6))
    batch.x[0, 0, 0, 0] = float("inf")
    _, norm = training_step(model, ema, optimizer, batch, CONFIG, step=9)
    assert not torch.isfinite(norm)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(ema.averages[0.9][name], before[name] + 1)


def test_training_stops_when_gradients_stay_not_finite(latents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, learning_rate=1e38, warmup_steps=0, steps=40)
    with pytest.raises(FloatingPointError, match=r"not finite in 10 steps in a row, \d+ to \d+ of seed 0"):
        train(config, latents, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) >= 10  # the steps before it gave up are on record


def test_the_held_out_loss_of_a_network_that_says_zero_is_the_targets_second_moment(latents: Path) -> None:
    data = open_latents(latents, split="held-out")
    model = Transformer(CONFIG.model(data.shape, data.num_classes))
    found = held_out_losses(model, data, CONFIG, draws=10)
    assert found.keys() == TARGETS.keys()
    z = data.gather(range(len(data)))
    # y = 0 for target x: the x-space error is x itself, in every bin; each image visits each bin once in ten draws
    for mean in found["x"]:
        assert mean == pytest.approx(z.square().mean().item(), rel=1e-5)
    assert len(found["v"]) == BINS
    assert found["v"][-1] > found["v"][0]  # divided by (1 - t)^2


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("draws", [2, 3])
def test_no_bin_of_the_held_out_loss_is_empty_however_few_the_images(latents: Path, count: int, draws: int) -> None:
    data = open_latents(latents, split="held-out")
    model = Transformer(CONFIG.model(data.shape, data.num_classes))
    found = held_out_losses(model, data, CONFIG, draws=draws, max_images=count)
    assert torch.tensor(list(found.values())).isfinite().all()


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_run_that_was_stopped_ends_to_the_bit_like_one_that_was_not(
    latents: Path, tmp_path: Path, stop: int, how: str
) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == stop:
            os.kill(os.getpid(), getattr(signal, how))

    train(CONFIG, latents, tmp_path / "whole")
    with pytest.raises(Stopped, match=f"after step {stop + 1} and saved"):
        train(CONFIG, latents, tmp_path / "stopped", progress=interrupt)
    train(CONFIG, latents, tmp_path / "stopped")
    whole, stopped = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    # keep_last counts the extra checkpoint, so an older regular one may be gone
    shared = whole.keys() & stopped.keys()
    assert {name for name in shared if whole[name] != stopped[name]} == set()
    assert {"metrics.jsonl", "checkpoints/step-00000012/optimizer.safetensors"} <= shared


OPTIONS = dataclasses.replace(
    CONFIG, size="4x16x2", dropout=0.3, bottleneck=3, in_context_tokens=2, in_context_start=1, noise_scale=2.0,
    times=TimeDensity(shift=2.0),
)  # fmt: skip


def test_a_run_with_every_option_that_was_stopped_ends_to_the_bit_like_one_that_was_not(
    latents: Path, tmp_path: Path
) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    train(OPTIONS, latents, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(OPTIONS, latents, tmp_path / "stopped", progress=interrupt)
    train(OPTIONS, latents, tmp_path / "stopped")
    whole, stopped = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert whole["metrics.jsonl"] == stopped["metrics.jsonl"]
    last = [name for name in whole if name.startswith("checkpoints/step-00000012")]
    assert {name: whole[name] for name in last} == {name: stopped[name] for name in last}
    plain = train(dataclasses.replace(OPTIONS, dropout=0.0), latents, tmp_path / "plain")
    assert files.sha256(plain / "model.safetensors") != whole["checkpoints/step-00000012/model.safetensors"]


def test_a_step_in_parts_gives_the_gradient_of_the_whole_batch_with_dropout_too(latents: Path) -> None:
    data, gradients = open_latents(latents), []
    for parts in ([torch.arange(6)], [torch.arange(2), torch.arange(2, 6)]):
        model = Transformer(OPTIONS.model(data.shape, data.num_classes))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        total = torch.zeros(())
        for part in parts:
            batch = draw_batch(data, OPTIONS, 3, part)
            y = model(
                interpolate(batch.x, batch.eps, batch.t),
                batch.t,
                batch.label,
                Dropout(0, torch.tensor(3), batch.position),
            )
            total = total + (y - batch.x).square().mean() * len(part) / 6
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()  # reduction order


def test_the_noise_has_its_scale_in_training_and_in_the_held_out_loss(latents: Path) -> None:
    data, config = open_latents(latents), dataclasses.replace(CONFIG, target="eps")
    scaled = dataclasses.replace(config, noise_scale=3.0)
    one, three = (draw_batch(data, c, 2, torch.arange(6)) for c in (config, scaled))
    assert torch.equal(three.eps, 3 * one.eps)
    model = Transformer(config.model(data.shape, data.num_classes))
    small, large = (held_out_losses(model, data, c)["eps"] for c in (config, scaled))
    assert large == pytest.approx([9 * loss for loss in small])  # y = 0: the error is the noise's second moment


def test_what_was_saved_before_an_option_was_known_is_resumed_and_sampled_without_it(
    latents: Path, tmp_path: Path
) -> None:
    new = {"noise_scale", "bottleneck", "in_context_tokens", "in_context_start", "dropout"}
    folder = train(dataclasses.replace(CONFIG, steps=8), latents, tmp_path / "run")
    header = json.loads((folder / "checkpoint.json").read_text())
    for part in (header, header["training"], header["model"]):
        for name in new & part.keys():
            del part[name]
    assert not new & json.loads(json.dumps(header["training"])).keys()
    (folder / "checkpoint.json").write_text(json.dumps(header))
    assert load(folder).sample([0], steps=2, progress=False).latents.isfinite().all()
    with pytest.raises(ValueError, match="bottleneck is 0 there and 3 here"):
        train(dataclasses.replace(CONFIG, bottleneck=3), latents, tmp_path / "run")
    last = train(CONFIG, latents, tmp_path / "run")
    whole = train(CONFIG, latents, tmp_path / "whole")
    assert files.sha256(last / "optimizer.safetensors") == files.sha256(whole / "optimizer.safetensors")


def test_what_was_logged_after_the_last_checkpoint_is_logged_once(latents: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, steps=8), latents, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    train(CONFIG, latents, tmp_path / "run")
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 13))


def test_a_line_of_metrics_that_is_damaged_is_named(latents: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, steps=1), latents, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("\0\0\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has a line that is no JSON object with a step"):
        train(CONFIG, latents, tmp_path / "run")


def test_numbers_that_are_not_finite_are_null_wherever_they_stand_and_no_score(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0, 0, Processes(), None)
    lines = [
        {"step": 1, "score": float("nan")},
        {"step": 2, "held_out": {"x": [torch.inf, 1.0]}},
        {"step": 3, "score": 2.0},
    ]
    for line in lines:
        metrics.compare(line)
        metrics.add(line)
    metrics.flush()
    assert [list(line.values())[1] for line in read_metrics(tmp_path)] == [None, {"x": [None, 1.0]}, 2.0]
    assert Metrics(tmp_path / "metrics.jsonl", 3, 0, Processes(), None).best == metrics.best == (2.0, 3)


def test_metrics_are_on_the_disk_before_the_checkpoint_that_they_lead_up_to(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, sync = list[str](), files.sync
    monkeypatch.setattr(files, "sync", lambda path: (order.append(path.name), sync(path))[1])
    train(dataclasses.replace(CONFIG, steps=1), latents, tmp_path / "run")
    assert order.index("metrics.jsonl") < order.index("model.safetensors")


def test_a_finished_run_is_not_trained_again(latents: Path, tmp_path: Path) -> None:
    train(CONFIG, latents, tmp_path / "run")
    before = contents(tmp_path / "run")
    train(CONFIG, latents, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_old_checkpoints_go_but_for_those_that_are_kept(latents: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, save_every=2, keep_last=2, keep_every=4, steps=11)
    train(config, latents, tmp_path / "run")
    assert sorted(checkpoint.list_steps(tmp_path / "run")) == [4, 8, 10, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "v"}, "target is x there and v here"),
        ({"times": TimeDensity(mean=0.0)}, r"times\.mean is -0\.8 there and 0\.0 here"),
        ({"learning_rate": 1.0, "seed": 5}, "learning_rate is 0.01 there and 1.0 here; seed is 0 there and 5 here"),
        ({"steps": 3}, "has finished step 4, but steps is 3"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_their_list(
    latents: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    train(dataclasses.replace(CONFIG, steps=4), latents, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(CONFIG, **change), latents, tmp_path / "run")  # type: ignore[arg-type]


def test_a_run_in_use_is_refused(latents: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with files.locked(tmp_path / "run" / "lock"), pytest.raises(ValueError, match="in use by another process"):
        train(CONFIG, latents, tmp_path / "run")


def test_flips_need_mirrored_latents(latents: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, flip=True, steps=1), latents, tmp_path / "run")
    other = tmp_path / "plain"
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8).numpy()
    encode(Arrays("mnist", images, torch.zeros(6).long().numpy(), ("a",), "test"), other)
    with pytest.raises(ValueError, match=r"holds no mirrored latents; encode with --mirrored"):
        train(dataclasses.replace(CONFIG, flip=True), other, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "y"}, "unknown target 'y'"),
        ({"size": "XL"}, "unknown size 'XL'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"label_drop": 1.5}, r"label_drop must be in \[0, 1\], got 1.5"),
        ({"noise_scale": 0.0}, "noise_scale must be above 0 and finite, got 0.0"),
        ({"clip": float("inf")}, "clip must be above 0 and finite, got inf"),
        ({"floor": float("inf")}, "floor must be at least 0 and finite, got inf"),
        ({"seed": 2**64}, r"seed must be below 2\^64, got 18446744073709551616"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got 1.0"),
        ({"ema_decays": (0.9, 1.5)}, r"ema_decays must be in \[0, 1\), got 1.5"),
        ({"ema_decays": (0.9999999, 0.9999998)}, "ema_decays must differ in six digits, got 0.9999999, 0.9999998"),
        ({"ema_lengths": (0.1, 0.1)}, "ema_lengths must differ in six digits, got 0.1, 0.1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"bottleneck": -1}, "bottleneck must be at least 0, got -1"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"loss_weight": "snr"}, "unknown loss weight 'snr'"),
    ],
)
def test_an_impossible_recipe_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
