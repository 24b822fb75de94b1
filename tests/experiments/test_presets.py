"""Presets: what each says of itself is so."""

import dataclasses
import re

import pytest

from jlt.experiments.plan import plan
from jlt.experiments.presets import PAPER, PRESETS, SMALLER, Preset
from jlt.nn import model_name
from jlt.training import TrainConfig

NAMED = {name: preset for name, preset in PRESETS.items() if re.match("(jlt|dit|eps)-", name)}
each = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


@each
def test_a_preset_differs_from_its_base_in_what_it_names_and_in_nothing_else(preset: Preset) -> None:
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    differing = {name for name in fields if getattr(preset.config, name) != getattr(preset.base, name)}
    assert differing == preset.changes.keys()


@pytest.mark.parametrize("name", NAMED)
def test_a_presets_name_is_its_models(name: str) -> None:
    preset = PRESETS[name]
    family, size, patch, *options = name.split("-")
    expected = preset.expected
    model = preset.config.model(expected.shape, expected.num_classes)
    assert model_name(preset.config.target, model).lower() == f"{family}-{size}/{patch}"
    assert (preset.config.loss_space == "x") == ("xmse" in options)
    assert (model.in_context_tokens > 0) == ("jit" in options)
    shapes = {"512": (128, 32, 32), "qwen": (16, 32, 32)}
    assert expected.shape == next((shapes[option] for option in options if option in shapes), (128, 16, 16))


@pytest.mark.parametrize("name", NAMED)
def test_the_papers_rule_ties_learning_rate_warm_up_and_length_to_the_batch(name: str) -> None:
    config = PRESETS[name].config
    assert config.learning_rate == pytest.approx(5e-5 * config.batch_size / 256)
    assert config.steps * config.batch_size == 250_000 * 1024
    assert config.warmup_steps * 40 == config.steps  # 5 epochs of 200
    assert (config.flip, config.dtype, config.decay_steps, config.weight_decay) == (True, "bfloat16", 0, 0)


@pytest.mark.parametrize("name", [name for name in NAMED if name.startswith("dit") and "released" not in name])
def test_jlt_and_dit_of_one_name_differ_in_the_target_alone(name: str) -> None:
    jlt = PRESETS[name.replace("dit", "jlt")].config
    assert dataclasses.replace(jlt, target="v") == PRESETS[name].config


def test_every_row_of_the_papers_table_has_a_preset() -> None:
    rows = {f"{family}-{size}-{patch}" for family in ("jlt", "dit", "eps") for size in "blh" for patch in (1, 2)}
    assert rows | {f"jlt-{size}-{patch}-xmse" for size in "blh" for patch in (1, 2)} <= PRESETS.keys()
    assert PRESETS["jlt-b-1"].config == PAPER
    assert {PRESETS[name].guidance for name in rows} == {2.9, 2.2}
    assert all(PRESETS[name].sampling == {"solver": "heun", "grid": "uniform", "steps": 50} for name in rows)
    assert not PRESETS["digits"].sampling  # ours are sampled in jlt's own way


@each
def test_every_preset_can_be_planned_for_the_latents_it_expects(preset: Preset) -> None:
    planned = plan(preset.config, preset.expected)
    epochs = planned.epochs
    assert preset.base not in (PAPER, SMALLER) or epochs == pytest.approx(200, rel=0.002)  # of 1,281,167 images
