"""The backbone: agreement with the authors', counts, invariances, and what it runs on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jlt.nn import SIZES, Transformer, TransformerConfig, authors, model_name
from jlt.nn.transformer import patchify, unpatchify

SMALL = TransformerConfig(
    latent_size=4, latent_channels=3, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=5
)


def awake(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    """Return a network whose zero-initialised weights are random, so that everything matters."""
    model = Transformer(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


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


@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_parameter_gets_a_gradient(num_classes: int) -> None:
    config = TransformerConfig(**{**SMALL.__dict__, "num_classes": num_classes})
    model = awake(config)
    z, t, label = inputs(config, batch=6)
    model(z, t, label if num_classes else None).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_new_network_predicts_zero_whatever_its_input() -> None:
    assert not Transformer(SMALL)(*inputs()).any()


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


def test_a_whole_network_compiles_without_a_break() -> None:
    model, (z, t, label) = awake(), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, t, label), model(z, t, label))


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
