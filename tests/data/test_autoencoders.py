"""Small networks with random weights stand for the released ones: the same classes, configs and files."""

import contextlib
import hashlib
import json
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jlt.data import Representation, load_representation
from jlt.data.autoencoders import CLASSES, HEADER, KNOWN, WEIGHTS, build, from_raw, open_autoencoder, to_raw
from jlt.data.representations import to_uint8

TWO = {"block_out_channels": (8, 8), "layers_per_block": 1}
KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    **TWO,
}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
OWN = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.0, 0.5, 3.0]}
# class, config, channels, stride, and what its documentation makes of a raw latent z, or None without a statement
SMALL = {
    "flux2": ("AutoencoderKLFlux2", {**KL, "latent_channels": 4, "batch_norm_eps": 0.5}, 16, 4, "batch norm"),
    "scaled": ("AutoencoderKL", KL, 4, 2, lambda z: z * 0.18215),
    "shifted": (
        "AutoencoderKL",
        {**KL, "latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.25, "use_quant_conv": False},
        16,
        2,
        lambda z: (z - 0.25) * 1.5,
    ),
    "standardised": ("AutoencoderKL", {**KL, **OWN, "scaling_factor": 0.5}, 4, 2, "own"),
    "silent": ("AutoencoderKL", {**KL, "scaling_factor": None}, 4, 2, None),
    "qwen": ("AutoencoderKLQwenImage", {**VIDEO, **OWN}, 4, 2, "own"),
    "wan": ("AutoencoderKLWan", {**VIDEO, **OWN}, 4, 2, "own"),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        4,
        2,
        lambda z: z * 0.41407,
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
            "scaling_factor": 0.75,
        },
        8,
        2,
        lambda z: z * 0.75,
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 8),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (8, 8),
            "norm_num_groups": 4,
        },
        4,
        2,
        lambda z: z * 0.18215,
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        4,
        2,
        None,
    ),
    "vq": ("VQModel", {**KL, "latent_channels": 4, "num_vq_embeddings": 16}, 4, 2, lambda z: z * 0.18215),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", SMALL)


def make(folder, name, seed=0, **changes):
    """Write a small autoencoder with diffusers' own method; return it, in eval mode."""
    import diffusers

    class_name, config, *_ = SMALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = getattr(diffusers, class_name)(**{**config, **changes}).eval()
        if name == "flux2":
            network.bn.running_mean.normal_()
            network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(folder)
    return network


def images(number=2, size=16, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def asked(tmp_path, monkeypatch):
    """Cut the network and empty the Hub's cache; yields the addresses that were tried."""
    import huggingface_hub

    addresses = []

    class Session:
        def head(self, url, timeout):
            addresses.append(url)
            raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return addresses


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("JLT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "autoencoders"


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_every_class_has_a_small_one_here():
    assert {class_name for class_name, *_ in SMALL.values()} == set(CLASSES)


@ALL
@torch.no_grad()
def test_latents_are_those_of_the_class_normalised_as_it_states(tmp_path, name):
    network, (class_name, _, channels, stride, stated) = make(tmp_path / "a", name), SMALL[name]
    opened, pictures = open_autoencoder(f"autoencoder:{tmp_path / 'a'}"), images()
    assert isinstance(opened, Representation)
    assert (opened.channels, opened.stride, opened.image_channels) == (channels, stride, 3)
    assert opened.normalisation == ("channel" if stated is None else "none")
    latents = opened.encode(pictures)
    assert latents.shape == (2, channels, 16 // stride, 16 // stride)
    assert latents.dtype == torch.float32

    pixels, frames = pictures.float() / 127.5 - 1, class_name in ("AutoencoderKLQwenImage", "AutoencoderKLWan")
    output = network.encode(pixels[:, :, None] if frames else pixels)
    z = (
        output.latent_dist.mode()
        if "latent_dist" in output
        else output.latents
        if "latents" in output
        else output.latent
    )
    decoded = network.decode(z).sample
    if frames:
        z, decoded = z[:, :, 0], decoded[:, :, 0]
    if stated == "batch norm":  # einops' "b c (y p) (x q) -> b (c p q) y x", written with strides
        z = torch.stack([z[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)], 2).flatten(1, 2)
        expected = network.bn(z)
    elif stated == "own":
        mean, std = (torch.tensor(OWN[key])[None, :, None, None] for key in ("latents_mean", "latents_std"))
        expected = (z - mean) / std
    else:
        expected = z if stated is None else stated(z)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)  # float32, in another order
    # undoing the normalisation rounds once more; the codebook has no steps here that rounding crosses
    torch.testing.assert_close(opened.decode_to_float(latents), decoded, atol=1e-4, rtol=1e-4)
    assert torch.equal(opened.decode(latents), to_uint8(opened.decode_to_float(latents)))
    assert (opened.decode(latents).int() - to_uint8(decoded).int()).abs().max() <= 1


@ALL
def test_a_loaded_one_is_the_same_and_opens_its_weights_only_when_used(tmp_path, name):
    make(tmp_path / "a", name)
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    opened.save(tmp_path / "saved")
    assert sum(path.stat().st_size for path in (tmp_path / "saved").iterdir()) < 10_000  # a reference, no copy
    loaded = load_representation(tmp_path / "saved")
    assert not loaded.models
    for key in ("fingerprint", "channels", "stride", "normalisation", "image_channels", "name"):
        assert getattr(loaded, key) == getattr(opened, key)
    assert torch.equal(loaded.encode(images()), opened.encode(images()))
    assert loaded.models


def test_flux2_agrees_with_the_reference_both_ways(golden):
    vectors = load_file(golden / "flux2_vae" / "vectors.safetensors")
    opened = open_autoencoder(f"autoencoder:{golden / 'flux2_vae' / 'vae'}")
    latents = opened.encode(vectors["image_uint8"])
    assert relative(latents, vectors["latent"]) < 1e-5
    assert relative(opened.decode_to_float(vectors["latent"]), vectors["decoded"]) < 1e-5
    assert relative(opened.decode_to_float(latents), vectors["decoded"]) < 1e-5


def test_flux2_at_full_size_has_84_million_parameters_and_its_small_decoder_28():
    full = build("AutoencoderKLFlux2", {})
    small = build("AutoencoderKLFlux2", {"decoder_block_out_channels": [96, 192, 384, 384]})
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(84.0e6, rel=1e-3)
    assert sum(p.numel() for p in small.decoder.parameters()) == pytest.approx(28e6, rel=0.02)
    assert sum(p.numel() for p in small.encoder.parameters()) == sum(p.numel() for p in full.encoder.parameters())
    images = torch.zeros(2, 3, 256, 256, device="meta")
    for network in (full, small):
        assert to_raw(network, images).shape == (2, 128, 16, 16)
        assert from_raw(network, to_raw(network, images)).shape == images.shape


def test_bfloat16_rounds_the_weights_and_not_the_normalisation(golden):
    vectors = load_file(golden / "flux2_vae" / "vectors.safetensors")
    spec = f"autoencoder:{golden / 'flux2_vae' / 'vae'}"
    whole, half = open_autoencoder(spec), open_autoencoder(spec, "bfloat16")
    assert torch.equal(half.shift, whole.shift)
    assert torch.equal(half.std, whole.std)
    latents = half.encode(vectors["image_uint8"])
    assert {p.dtype for p in half.model(latents.device).parameters()} == {torch.bfloat16}
    assert latents.dtype == half.decode_to_float(vectors["latent"]).dtype == torch.float32
    # 8 bits of mantissa through a dozen convolutions
    assert relative(latents, vectors["latent"]) < 0.02
    assert relative(half.decode_to_float(vectors["latent"]), vectors["decoded"]) < 0.02
    raw = latents * whole.std[:, None, None] + whole.shift[:, None, None]
    # the network's own output has 8 bits: undoing the normalisation finds it but for float32's rounding
    torch.testing.assert_close(raw, raw.bfloat16().float(), atol=1e-5, rtol=1e-5)
    assert half.fingerprint != whole.fingerprint


def test_a_fingerprint_tells_weights_and_configs_apart_and_not_where_they_lie(tmp_path):
    for folder, seed, changes in (("a", 0, {}), ("b", 1, {}), ("c", 0, {"scaling_factor": 0.5})):
        make(tmp_path / folder, "scaled", seed, **changes)
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(
        json.dumps({**config, "_diffusers_version": "0.1", "_name_or_path": "x"})
    )
    a, b, c, d = (open_autoencoder(f"autoencoder:{tmp_path / folder}").fingerprint for folder in "abcd")
    assert a == d
    assert len({a, b, c}) == 3


def test_weights_in_parts_are_put_together(tmp_path):
    network = make(tmp_path / "whole", "scaled")
    network.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    parts = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    whole, split = (open_autoencoder(f"autoencoder:{tmp_path / name}") for name in ("whole", "parts"))
    assert torch.equal(whole.encode(images()), split.encode(images()))
    digests = [hashlib.sha256((tmp_path / "parts" / name).read_bytes()).hexdigest() for name in parts]
    assert split.sha256 == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    (tmp_path / "parts" / parts[1]).unlink()
    with pytest.raises(ValueError, match=f"{parts[1]} is missing"):
        open_autoencoder(f"autoencoder:{tmp_path / 'parts'}")


def to_original(tensors, blocks):
    """Name tensors as the original FLUX.2 release does."""
    named = {}
    for name, tensor in tensors.items():
        for new, old in (
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("samplers.0.", "sample."),
            *((f"up_blocks.{i}.", f"up.{blocks - 1 - i}.") for i in range(blocks)),
            ("down_blocks.", "down."),
            ("resnets.", "block."),
        ):
            name = name.replace(new, old)
        for part, owner in (("post_quant_conv", "decoder"), ("quant_conv", "encoder")):
            if name.startswith(part):
                name = f"{owner}.{name}"
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        named[name] = tensor.contiguous()
    return named


def test_tensors_named_as_in_the_original_release_or_in_older_diffusers_are_read(tmp_path):
    make(tmp_path / "new", "flux2", decoder_block_out_channels=(4, 8))
    tensors = load_file(tmp_path / "new" / WEIGHTS)
    older = {}
    for name, tensor in tensors.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        older[name] = tensor
    expected = open_autoencoder(f"autoencoder:{tmp_path / 'new'}")
    for folder, named in (("original", to_original(tensors, 2)), ("older", older)):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "new" / "config.json", tmp_path / folder)
        assert named.keys() != tensors.keys()
        named.pop("bn.num_batches_tracked")
        save_file(named, tmp_path / folder / "full_encoder_small_decoder.safetensors")
        opened = open_autoencoder(f"autoencoder:{tmp_path / folder}")
        latents = opened.encode(images())
        assert torch.equal(latents, expected.encode(images()))
        assert torch.equal(opened.decode(latents), expected.decode(latents))


def test_a_known_name_is_found_in_the_home_folder(home):
    make(home / "black-forest-labs" / "FLUX.2-klein-4B" / "vae", "flux2")
    opened = open_autoencoder("flux2")
    assert opened.source == "flux2"
    assert opened.fingerprint == open_autoencoder("autoencoder:black-forest-labs/FLUX.2-klein-4B/vae").fingerprint


def test_latents_of_flux2_are_decoded_by_the_small_decoder_without_the_weights_of_flux2(tmp_path, home):
    full, small = (home / place.repository / place.subfolder for place in KNOWN.values())
    network = make(full, "flux2")
    make(small, "flux2", seed=1, decoder_block_out_channels=(4, 8))
    own = load_file(small / WEIGHTS)
    shared = {k: v for k, v in network.state_dict().items() if not k.startswith(("decoder.", "post_quant"))}
    (small / WEIGHTS).unlink()
    save_file({**own, **shared}, small / KNOWN["flux2-small-decoder"].weights)

    encoder = open_autoencoder("flux2")
    latents = encoder.encode(images())
    encoder.save(tmp_path / "saved")
    shutil.rmtree(full)
    swapped = load_representation(tmp_path / "saved").with_decoder("flux2-small-decoder")
    alone = open_autoencoder("flux2-small-decoder")
    assert torch.equal(swapped.decode(latents), alone.decode(latents))
    assert not torch.equal(swapped.decode(latents), encoder.decode(latents))
    assert swapped.fingerprint == encoder.fingerprint
    swapped.save(tmp_path / "swapped")
    assert torch.equal(load_representation(tmp_path / "swapped").decode(latents), alone.decode(latents))


def test_a_decoder_for_other_latents_is_refused(tmp_path):
    for folder, name, seed in (("a", "flux2", 0), ("b", "flux2", 1), ("c", "scaled", 0)):
        make(tmp_path / folder, name, seed)
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    with pytest.raises(ValueError, match="normalises otherwise"):
        opened.with_decoder(f"autoencoder:{tmp_path / 'b'}")
    with pytest.raises(ValueError, match=r"channels is 4 in .* and 16"):
        opened.with_decoder(f"autoencoder:{tmp_path / 'c'}")


@pytest.mark.parametrize(
    ("spec", "folder", "file", "url"),
    [
        ("flux2", "black-forest-labs/FLUX.2-klein-4B/vae", WEIGHTS, "FLUX.2-klein-4B/tree/main/vae"),
        ("flux2-small-decoder", "black-forest-labs/FLUX.2-small-decoder", "full_encoder", "small-decoder/tree/main "),
        ("autoencoder:org/name/deep/vae", "org/name/deep/vae", WEIGHTS, "org/name/tree/main/deep/vae"),
    ],
)
def test_absent_weights_are_one_line_with_the_file_its_source_and_its_folder(home, spec, folder, file, url):
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        open_autoencoder(spec)
    message = str(caught.value)
    assert "\n" not in message
    for part in (spec, str(home / folder), file, url):
        assert part in message


def test_weights_that_have_moved_are_found_by_their_hash(tmp_path, home):
    make(tmp_path / "a", "scaled")
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    opened.save(tmp_path / "saved")
    expected = opened.encode(images())
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no folder") as caught:
        load_representation(tmp_path / "saved").encode(images())
    place = home / opened.sha256
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    place.mkdir(parents=True)
    shutil.copy(tmp_path / "elsewhere" / WEIGHTS, place)
    assert torch.equal(load_representation(tmp_path / "saved").encode(images()), expected)


def test_other_weights_than_those_of_the_latents_are_refused(tmp_path):
    make(tmp_path / "a", "scaled")
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    opened.save(tmp_path / "saved")
    make(tmp_path / "a", "scaled", seed=1)
    found = hashlib.sha256((tmp_path / "a" / WEIGHTS).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{found}, the latents were made with {opened.sha256}"):
        load_representation(tmp_path / "saved").decode(torch.zeros(1, 4, 2, 2))


def rewrite(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def reconfigure(**entries):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return damage


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (rewrite(lambda t: t.pop("decoder.conv_in.bias")), "lack decoder.conv_in.bias"),
        (rewrite(lambda t: t.update({"decoder.conv_in.bias": torch.zeros(3)})), r"bias is \[3\] .* wants \[8\]"),
        (rewrite(lambda t: t.update(more=torch.zeros(3))), "hold more, which a AutoencoderKLFlux2 has not"),
        (rewrite(lambda t: t.pop("bn.running_mean")), "bn.running_mean"),
        (rewrite(lambda t: t.update({"bn.running_var": -torch.ones(16)})), "positive ones are wanted"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), "not a whole safetensors file"),
        (pickled, "diffusion_pytorch_model.bin, a pickle, which is not opened"),
        (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not a JSON file"),
        (lambda f: (f / "config.json").write_text("[]"), r"holds \[\]"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (reconfigure(_class_name="AutoencoderKLFlux"), "did you mean 'AutoencoderKLFlux2'"),
        (reconfigure(_class_name="torch.load"), "unknown autoencoder class"),
        (reconfigure(new_option=1), "knows no new_option"),
        (reconfigure(block_out_channels=[7, 7]), "no AutoencoderKLFlux2 can be made of its config"),
        (reconfigure(block_out_channels="x"), "no AutoencoderKLFlux2 can be made of its config"),
    ],
)  # fmt: skip
def test_a_broken_autoencoder_is_one_line_that_names_what_is_broken(tmp_path, damage, complaint):
    make(tmp_path / "a", "flux2")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=complaint) as caught:
        open_autoencoder(f"autoencoder:{tmp_path / 'a'}").encode(images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("flux", "unknown autoencoder 'flux', did you mean 'flux2'"),
        ("autoencoder:nowhere", "no folder nowhere"),
        ("autoencoder:../../nowhere", "no folder"),
        ("autoencoder:", "no folder"),
        ("autoencoder:a/b/../../c", "no folder"),
    ],
)
def test_a_spec_that_names_nothing_is_refused(spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        open_autoencoder(spec)


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("class_name", "os", "unknown autoencoder class"),
        ("dtype", "float8", "unknown dtype"),
        ("sha256", "../../..", "64 hexadecimal digits"),
        ("channels", 5, "for 5 channels"),
        ("stride", 0, "stride is 0"),
        ("config", [], "config is"),
        ("normalisation", "none?", "unknown normalisation"),
    ],
)
def test_a_damaged_reference_is_named(tmp_path, entry, value, complaint):
    make(tmp_path / "a", "scaled")
    open_autoencoder(f"autoencoder:{tmp_path / 'a'}").save(tmp_path / "saved")
    path = tmp_path / "saved" / "representation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(ValueError, match=complaint) as caught:
        load_representation(tmp_path / "saved")
    assert str(tmp_path / "saved") in str(caught.value)


def test_images_and_latents_that_do_not_fit_are_refused(tmp_path):
    make(tmp_path / "a", "flux2")
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    with pytest.raises(ValueError, match=r"images have 1 channels, .* takes 3"):
        opened.encode(images(channels=1))
    with pytest.raises(ValueError, match="18 x 18 are not a multiple of the stride 4"):
        opened.encode(images(size=18))
    with pytest.raises(ValueError, match=r"latents have 4 channels, .* has 16"):
        opened.decode(torch.zeros(1, 4, 4, 4))


def test_opening_and_using_one_leaves_the_random_numbers_alone(tmp_path):
    make(tmp_path / "a", "flux2")
    before = torch.random.get_rng_state()
    opened = open_autoencoder(f"autoencoder:{tmp_path / 'a'}")
    assert torch.equal(opened.encode(images()), opened.encode(images()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_the_hub_has_cached_needs_no_network(tmp_path, asked, home):
    cached = tmp_path / "hub" / "models--org--name"
    network = make(cached / "snapshots" / ("0" * 40) / "vae", "scaled")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    latents = open_autoencoder("autoencoder:org/name/vae").encode(images())
    expected = network.encode(images().float() / 127.5 - 1).latent_dist.mode() * 0.18215
    torch.testing.assert_close(latents, expected)
    assert not asked


def test_the_hub_is_asked_once_where_there_is_no_network(asked, home):
    with pytest.raises(ValueError, match="no route to host"):
        open_autoencoder("autoencoder:org/name/vae")
    assert asked == ["https://huggingface.co/org/name/resolve/main/vae/config.json"]


entries = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=8)
entries = entries | st.lists(entries, max_size=3) | st.dictionaries(st.text(max_size=3), entries, max_size=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make(folder / "a", "flux2")
    opened = open_autoencoder(f"autoencoder:{folder / 'a'}")
    opened.with_decoder(f"autoencoder:{folder / 'a'}").save(folder / "b")
    return folder


@settings(max_examples=40)
@given(st.sampled_from([*HEADER, "decoder"]), entries)
def test_a_reference_of_any_content_is_read_or_refused(saved, entry, value):
    header = json.loads((saved / "b" / "representation.json").read_text())
    folder = saved / "changed"
    shutil.copytree(saved / "b", folder, dirs_exist_ok=True)
    (folder / "representation.json").write_text(json.dumps({**header, entry: value}))
    with contextlib.suppress(ValueError):
        assert load_representation(folder).fingerprint


@settings(max_examples=15)
@given(st.sampled_from(sorted(SMALL["flux2"][1])), entries)
def test_a_config_of_any_content_is_opened_or_refused(saved, entry, value):
    config = json.loads((saved / "a" / "config.json").read_text())
    folder = saved / "configured"
    shutil.copytree(saved / "a", folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, entry: value}))
    with contextlib.suppress(ValueError):
        assert open_autoencoder(f"autoencoder:{folder}").encode(images()).isfinite().all()


@pytest.mark.parametrize("package", ["diffusers", "huggingface_hub"])
def test_a_missing_package_is_one_line_with_the_extra_to_install(tmp_path, monkeypatch, home, package):
    make(tmp_path / "a", "scaled")
    monkeypatch.setitem(sys.modules, package, None)
    spec = "flux2" if package == "huggingface_hub" else f"autoencoder:{tmp_path / 'a'}"
    with pytest.raises(
        ValueError, match=rf"import of {package} halted; None in sys.modules; pip install 'jlt\[autoencoders\]'"
    ):
        open_autoencoder(spec)
