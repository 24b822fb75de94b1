"""The backbone: agreement with the authors', counts, invariances, and what it runs on."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from jlt.flow import random
from jlt.nn import SIZES, Dropout, Transformer, TransformerConfig, authors, model_name
from jlt.nn.transformer import patchify, unpatchify

SMALL = TransformerConfig(
    latent_size=4, latent_channels=3, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5
)

JIT = replace(SMALL, depth=5, bottleneck=7, in_context_tokens=3, in_context_start=2, dropout=0.5)


def awake(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    """Return a network whose zero-initialised weights are random, so that everything matters."""
    model = Transformer(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def drawn(seed: int, step: int, position: torch.Tensor) -> Dropout:
    return Dropout(seed, torch.tensor(step), position)


def inputs(config: TransformerConfig = SMALL, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return (
        torch.randn(batch, *config.shape, generator=generator),
        torch.linspace(0, 1, batch),
        torch.arange(batch) % max(config.num_classes, 1),
    )


@pytest.mark.parametrize("folder", ["jlt_p1", "jlt_p2"])
def test_the_authors_network_is_reproduced(golden: Path, folder: str) -> None:
    vectors = load_file(golden / folder / "vectors.safetensors")
    found = authors.read(golden / folder / "checkpoint-last.pth")
    model = Transformer(found.config(latent_size=8))
    model.load_state_dict(found.model)
    with torch.no_grad():
        y = model(vectors["noisy"], vectors["time"], vectors["label"])
    assert (y - vectors["net_output"]).norm() < 1e-5 * vectors["net_output"].norm()  # the vectors' own tolerance


@pytest.mark.parametrize(("size", "parameters"), [("B", 130_508_672), ("L", 458_090_592), ("H", 951_293_120)])
def test_the_papers_sizes_have_the_papers_parameters(size: str, parameters: int) -> None:
    depth, hidden_size, num_heads = SIZES[size]
    config = TransformerConfig(16, 128, 1, hidden_size, depth, num_heads, num_classes=1000)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, num_classes=0), JIT])
def test_every_parameter_gets_a_gradient(config: TransformerConfig) -> None:
    model = awake(config)
    z, t, label = inputs(config, batch=6)
    model(z, t, label if config.num_classes else None, drawn(0, 0, torch.arange(6))).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("config", [SMALL, JIT])
def test_a_new_network_predicts_zero_whatever_its_input(config: TransformerConfig) -> None:
    assert not Transformer(config)(*inputs()).any()


def test_a_bottleneck_is_one_linear_map_of_low_rank() -> None:
    model, (z, t, label) = awake(replace(SMALL, bottleneck=7)), inputs()
    state = model.state_dict()
    product = state["embed.weight"] @ state.pop("bottleneck.weight")
    assert torch.linalg.matrix_rank(product) == 7
    plain = Transformer(SMALL)
    plain.load_state_dict(state | {"embed.weight": product})
    with torch.no_grad():
        torch.testing.assert_close(model(z, t, label), plain(z, t, label), rtol=1e-4, atol=1e-5)  # another order


def test_class_tokens_enter_at_their_block_and_leave_before_the_output() -> None:
    lengths = []
    model = awake(JIT)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    assert model(*inputs()).shape == inputs()[0].shape
    assert lengths == [4, 4, 7, 7, 7]


def test_class_tokens_meet_no_rotation_and_the_image_the_one_of_its_place() -> None:
    # an independent attention: complex numbers, whose angle is 0 for class tokens; in float64
    model = awake(JIT).double()
    block, k = model.blocks[3], JIT.in_context_tokens
    x = torch.randn(2, k + 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = [(0, 0)] * k + [(row, column) for row in range(2) for column in range(2)]
    frequency = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)  # 16 dimensions a head: 4 pairs an axis
    angle = torch.stack([torch.cat([row * frequency, column * frequency]) for row, column in places])
    with torch.no_grad():
        q, key, v = block.qkv(x).reshape(2, k + 4, 3, 2, 16).unbind(2)  # (B, N, H, 16)
        q, key = block.norm_q(q), block.norm_k(key)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, key = (torch.view_as_complex(side.unflatten(-1, (8, 2))) * turn for side in (q, key))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, key.conj()).real.div(16**0.5).softmax(-1)
        expected = block.project(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
        found = block.attention(x, model.rotation)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the table of angles is float32's


def test_dropout_acts_in_the_middle_half_of_the_blocks_and_only_when_it_is_asked_for() -> None:
    config = replace(SMALL, depth=8, dropout=0.5)
    model, arguments = awake(config), inputs()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    with torch.no_grad():
        dropped = model(*arguments, drawn(0, 0, torch.arange(3)))
        trace, seen[:] = list(seen), []
        kept = model(*arguments)
        assert torch.equal(kept, awake(replace(config, dropout=0.0))(*arguments, drawn(0, 0, torch.arange(3))))
        assert not torch.allclose(dropped, kept)
        condition = F.silu(model.time(arguments[1]) + model.label(arguments[2]))
        changed = [
            not torch.equal(block(given, condition, model.rotation), made)
            for block, (given, made) in zip(model.blocks, trace, strict=True)
        ]
    assert changed == [False, False, True, True, True, True, False, False]


def test_dropout_of_an_image_depends_on_seed_step_and_its_position_alone() -> None:
    model, (z, t, label), position = awake(replace(JIT, depth=8)), inputs(batch=6), torch.arange(6)
    with torch.no_grad():
        whole = model(z, t, label, drawn(1, 2, position))
        parts = [model(z[p], t[p], label[p], drawn(1, 2, p)) for p in (position[:1], position[1:4], position[4:])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)  # reduction order
        for other in (drawn(3, 2, position), drawn(1, 3, position), drawn(1, 2, position + 6)):
            assert not torch.allclose(model(z, t, label, other), whole, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_preserves_the_mean(dtype: torch.dtype) -> None:
    rate, x = 0.2, torch.ones(50, 400, 10, dtype=dtype)
    dropped = drawn(0, 0, torch.arange(50))(x, rate, site=3)
    assert dropped.dtype == dtype
    assert dropped.unique().tolist() == [0.0, 1.25]
    # 5 standard errors: a kept number is 1 / (1 - rate), so one has variance rate / (1 - rate)
    assert dropped.double().mean().item() == pytest.approx(1, abs=5 * (rate / (1 - rate) / x.numel()) ** 0.5)


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(0)
    first, state = Transformer(SMALL, seed=3).state_dict(), torch.random.get_rng_state()
    torch.manual_seed(1)
    again, other = Transformer(SMALL, seed=3).state_dict(), Transformer(SMALL, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # building one drew nothing from the global generator


def test_images_of_a_batch_do_not_meet() -> None:
    model, (z, t, label) = awake(), inputs()
    with torch.no_grad():
        together = model(z, t, label)
        alone = torch.cat([model(z[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(len(z))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # reduction order


def test_attention_sees_positions_only_relative_to_each_other() -> None:
    # queries and keys turned by their place: a common displacement of all places changes no attention weight
    model = awake()
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    block = model.blocks[0]
    wide = Transformer(TransformerConfig(**{**SMALL.__dict__, "latent_size": 12})).rotation.reshape(2, 6, 6, -1)
    with torch.no_grad():
        near, far = (block.attention(x, wide[:, i : i + 2, j : j + 2].flatten(1, 2)) for i, j in [(0, 0), (3, 2)])
        other = block.attention(x, wide[:, 0:3:2, 0:2].flatten(1, 2))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(near, other, rtol=1e-2)


def test_patches_are_in_row_column_channel_order_and_come_together_again() -> None:
    z = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    tokens = patchify(z, 2)
    assert torch.equal(tokens[1, 1], z[1, :, 0:2, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(tokens, SMALL), z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_runs_in_any_dtype(dtype: torch.dtype) -> None:
    model, (z, t, label) = awake(), inputs()
    with torch.no_grad():
        exact, found = model(z, t, label), model.to(dtype)(z.to(dtype), t.to(dtype), label)
    assert found.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5  # 8 bits of mantissa through two blocks
    assert (found.float() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("config", [SMALL, pytest.param(JIT, marks=pytest.mark.slow)])
def test_a_whole_network_compiles_without_a_break(config: TransformerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kept", "words", "philox"):  # the compiler cannot look through the tests' check of shapes
        monkeypatch.setattr(random, name, inspect.unwrap(getattr(random, name)))
    model, (z, t, label) = awake(config), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, t, label), model(z, t, label))
        with torch.compiler.set_stance("default"):
            for step in (0, 1, 2**31):
                dropout = drawn(0, step, torch.arange(3))
                torch.testing.assert_close(compiled(z, t, label, dropout), model(z, t, label, dropout))
                torch.compiler.set_stance("fail_on_recompile")  # another step is no other network


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_gives_the_same_network() -> None:
    model, (z, t, label) = awake(), inputs()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(z, t, label)
        torch.testing.assert_close(compiled, model(z, t, label), rtol=1e-4, atol=1e-5)


def test_an_unconditional_network_takes_no_label() -> None:
    config = TransformerConfig(**{**SMALL.__dict__, "num_classes": 0})
    model, (z, t, label) = awake(config), inputs(config)
    assert "label.weight" not in model.state_dict()
    assert torch.equal(model(z, t), model(z, t, label))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "latent_size 4 is not a multiple of patch_size 3"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of 4 x num_heads 3"),
        ({"depth": 0}, r"depth must be a whole number in \[1, 1024\], got 0"),
        ({"num_classes": -1}, r"num_classes must be a whole number in \[0, 16777216\], got -1"),
        (
            {"in_context_tokens": 3, "num_classes": 0},
            "in_context_tokens is 3, an unconditional model has no class tokens",
        ),
        ({"in_context_tokens": 3, "in_context_start": 2}, "in_context_start 2 is not below depth 2"),
        ({"dropout": 0.2}, "dropout 0.2 has no block to act in: depth 2 is not at least 4"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"bottleneck": -1}, r"bottleneck must be a whole number in \[0, 65536\], got -1"),
        ({"version": 2}, "version 2, this jlt knows version 1"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL.__dict__, **change})


@pytest.mark.parametrize(
    ("target", "config", "name"),
    [
        ("x", TransformerConfig(16, 128, 1, 768, 12, 12, 1000), "JLT-B/1"),
        ("v", TransformerConfig(16, 128, 2, 1024, 24, 16, 1000), "DiT-L/2"),
        ("eps", TransformerConfig(16, 128, 1, 768, 12, 12, 1000), "eps-B/1"),
        ("x", SMALL, "JLT-2x32/2"),
    ],
)
def test_a_model_has_one_name(target: str, config: TransformerConfig, name: str) -> None:
    assert model_name(target, config) == name


@pytest.mark.parametrize("config", [SMALL, JIT])
def test_images_may_share_their_conditions(config: TransformerConfig) -> None:
    model = awake(config).double()
    z, t, label = torch.randn(4, *config.shape).double(), torch.full((4,), 0.3).double(), torch.tensor([5, 2, 2, 5])
    own = model(z, t, label)
    shared = model(z, t[:1], torch.tensor([2, 5]), rows=torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(shared, own, rtol=1e-12, atol=1e-12)  # rounding
    torch.testing.assert_close(model(z[1:3], t[:1], label[1:2]), own[1:3], rtol=1e-12, atol=1e-12)
