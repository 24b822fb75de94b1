"""Frozen image autoencoders of diffusers as representations (jlt.data.representations).

A spec is a name in KNOWN (`flux2`, `flux2-small-decoder`), `autoencoder:FOLDER`, or `autoencoder:ORG/NAME[/SUBFOLDER]`
of the Hugging Face Hub; a folder that exists wins. A Hub id is looked for in the folder ORG/NAME/SUBFOLDER of
`$JLT_HOME/autoencoders` (JLT_HOME is ~/.cache/jlt by default), then in the Hub's own cache, then on the Hub. A folder
holds config.json, whose `_class_name` is a row of CLASSES, and weights in safetensors, whole or in parts with an index;
nothing else is read.

A latent is the posterior's mode, or what a deterministic encoder gives, of images in [-1, 1], normalised as the
autoencoder itself states, in float32 whatever the dtype of the weights. The statement is, the first of:

    FLUX.2                                     2 x 2 patches in (channel, row, column) order, then the running mean and
                                               variance (with its epsilon) of the batch norm among the weights
    `latents_mean` and `latents_std`           (z - mean) / std
    `scaling_factor`, other than null and 1    (z - shift_factor) * scaling_factor, a shift_factor of null being 0

from config.json, or the default of the class where config.json leaves it out, as diffusers' pipelines have it. One
without a statement gives its latents as they are (`normalisation` is "channel": to be measured while encoding).

On disk it is a reference, for the weights may be hundreds of megabytes: representation.json holds source, class,
config, dtype, and the SHA-256 of the weights (of the file; of several, the SHA-256 of their digests in the order of
names); tensors.safetensors holds the normalisation. So loading needs neither diffusers nor weights. The first encode or
decode opens the weights, from the folder SHA-256 of `$JLT_HOME/autoencoders` if it is there, otherwise from the source.

Latents of one autoencoder may be decoded by another of the same latents, FLUX.2's by the small decoder: `with_decoder`.
A network's last bits depend on the batch size, for its products are then summed in another order.

To add a class, give it a row in CLASSES and a small config in tests/data/test_autoencoders.py.
"""

import hashlib
import inspect
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jlt import files
from jlt.data.hub import one_line, snapshot
from jlt.data.representations import cut_patches, join_patches, save_parts, to_float, to_uint8
from jlt.extras import needed

WEIGHTS = "diffusion_pytorch_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INDEX = WEIGHTS + ".index.json"
PREFIX = "autoencoder:"
PROBE = 256  # side of the image on the meta device that tells channels and stride: a multiple of any stride


@dataclass(frozen=True)
class Kind:
    """What a class of diffusers asks for: images as videos of one frame, latents cut into its config's patches."""

    frames: bool = False
    patches: bool = False


CLASSES = {
    "AutoencoderKLFlux2": Kind(patches=True),
    "AutoencoderKL": Kind(),  # Stable Diffusion, SDXL, SD3, FLUX.1
    "AutoencoderKLQwenImage": Kind(frames=True),
    "AutoencoderDC": Kind(),  # DC-AE
    "AutoencoderKLWan": Kind(frames=True),
    "AutoencoderKLHunyuanImage": Kind(),
    "AsymmetricAutoencoderKL": Kind(),
    "AutoencoderTiny": Kind(),
    "VQModel": Kind(),  # latents before the codebook, which decoding goes through
}


@dataclass(frozen=True)
class Place:
    """A folder of a repository on the Hub, and its file of weights."""

    repository: str
    subfolder: str = ""
    weights: str = WEIGHTS

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/tree/main/{self.subfolder}".rstrip("/")


KNOWN = {
    "flux2": Place("black-forest-labs/FLUX.2-klein-4B", "vae"),
    "flux2-small-decoder": Place(
        "black-forest-labs/FLUX.2-small-decoder", "", "full_encoder_small_decoder.safetensors"
    ),
}


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A frozen autoencoder; its weights are opened at the first use on each device.

    `shift` and `std` (channels,) normalise: latent = (z - shift) / std. `decoder`, if any, decodes in its stead.
    """

    source: str
    class_name: str
    config: dict[str, Any]
    sha256: str
    dtype: str
    image_channels: int
    channels: int
    stride: int
    normalisation: str
    shift: Float[Tensor, " k"]
    std: Float[Tensor, " k"]
    decoder: "Autoencoder | None" = None
    name: str = "autoencoder"
    models: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        normalisation = [self.normalisation, self.shift.tolist(), self.std.tolist()]
        return files.fingerprint([self.class_name, self.config, self.sha256, self.dtype, normalisation])

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Return the normalised latents, float32, on the images' device."""
        _, channels, height, width = images.shape
        if channels != self.image_channels:
            raise ValueError(f"images have {channels} channels, {self.source} takes {self.image_channels}")
        if height % self.stride or width % self.stride:
            raise ValueError(f"images of {height} x {width} are not a multiple of the stride {self.stride}")
        model = self.model(images.device)
        raw = to_raw(model, to_float(images).to(DTYPES[self.dtype])).float()
        return ((raw - column(self.shift, raw)) / column(self.std, raw)).contiguous()

    def decode(self, latents: Float[Tensor, "b k y x"]) -> UInt8[Tensor, "b c h w"]:
        return to_uint8(self.decode_to_float(latents)).contiguous()  # convolutions may leave channels last

    def decode_to_float(self, latents: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
        """Return the decoder's own output, float32: around [-1, 1], neither clamped nor rounded."""
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, {self.source} has {self.channels}")
        other = self.decoder or self
        raw = latents * column(self.std, latents) + column(self.shift, latents)
        return from_raw(other.model(latents.device), raw.to(DTYPES[other.dtype])).float()

    def model(self, device: torch.device) -> Any:
        """Return the network on a device, frozen; weights other than those the latents were made with are refused."""
        key = str(device)
        if key not in self.models:
            folder = home() / self.sha256
            if not folder.is_dir():
                try:
                    folder = locate(self.source)
                except ValueError as error:
                    raise ValueError(f"{error}; weights of SHA-256 {self.sha256} may also lie in {folder}") from None
            paths = find_weights(folder, weights_name(self.source))
            if (found := digest(paths)) != self.sha256:
                raise ValueError(
                    f"{folder} holds weights of SHA-256 {found}, the latents were made with {self.sha256}; "
                    f"those may lie in {home() / self.sha256}"
                )
            model = build(self.class_name, self.config)
            self.models[key] = fill(model, read_tensors(paths), DTYPES[self.dtype], folder).to(device)
        return self.models[key]

    def with_decoder(self, spec: str) -> "Autoencoder":
        """Return the same representation with another decoder for the same latents.

        Latents of `flux2` may be decoded by `flux2-small-decoder`; no weights of `flux2` are needed for it. Latents of
        another shape or normalisation are a ValueError. The fingerprint stays: it is that of the encoder.
        """
        other = open_autoencoder(spec, self.dtype)
        for name in ("image_channels", "channels", "stride", "normalisation"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                raise ValueError(f"{name} is {there} in {spec} and {here} in {self.source}, which it shall decode")
        off = ((other.shift - self.shift) / self.std).abs().max().item()
        ratio = (other.std / self.std - 1).abs().max().item()
        if max(off, ratio) > 0.01:  # the same statistics in 16 bits are 0.4 % off
            raise ValueError(
                f"{spec} normalises otherwise than {self.source}, which it shall decode: "
                f"its means are up to {off:.3g} deviations off, its deviations {ratio:.3g}"
            )
        return replace(self, decoder=other)

    def save(self, folder: Path) -> None:
        header = {name: getattr(self, name) for name in ("name", *HEADER)}
        tensors = {"shift": self.shift, "std": self.std}
        if self.decoder is not None:
            header["decoder"] = {name: getattr(self.decoder, name) for name in HEADER}
            tensors |= {"decoder.shift": self.decoder.shift, "decoder.std": self.decoder.std}
        save_parts(folder, header, tensors)


HEADER: dict[str, type] = {
    "source": str,
    "class_name": str,
    "config": dict,
    "sha256": str,
    "dtype": str,
    "image_channels": int,
    "channels": int,
    "stride": int,
    "normalisation": str,
}


def load_autoencoder(header: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> Autoencoder:
    """Return the autoencoder that `save` wrote; its weights stay where they are until they are used."""
    values = {name: header[name] for name in HEADER}
    for name, kind in HEADER.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 1):
            raise ValueError(f"{name} is {values[name]!r:.40}, a {kind.__name__} is wanted")
    files.choose("autoencoder class", values["class_name"], CLASSES)
    files.choose("dtype", values["dtype"], DTYPES)
    files.choose("normalisation", values["normalisation"], dict.fromkeys(("none", "channel")))
    if not re.fullmatch("[0-9a-f]{64}", values["sha256"]):  # it names a folder
        raise ValueError(f"sha256 is {values['sha256']!r:.80}, 64 hexadecimal digits are wanted")
    shift, std = (tensors[prefix + name].float() for name in ("shift", "std"))
    if not shift.shape == std.shape == (values["channels"],):
        raise ValueError(f"shift is {list(shift.shape)} and std {list(std.shape)}, for {values['channels']} channels")
    decoder = load_autoencoder(header["decoder"], tensors, "decoder.") if not prefix and "decoder" in header else None
    return Autoencoder(**values, shift=shift, std=std, decoder=decoder)


def open_autoencoder(spec: str, dtype: str = "float32") -> Autoencoder:
    """Open the autoencoder that a spec names (see the module's docstring).

    `dtype` is that of the weights and what they compute, float32 or bfloat16; normalisation is in float32 with either.
    Where files are nowhere to be found, a ValueError names them, their source and the folder to put them in.
    """
    files.choose("dtype", dtype, DTYPES)
    folder = locate(spec)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, an autoencoder of diffusers is wanted")
    stated, paths = files.read_json(folder / "config.json"), find_weights(folder, weights_name(spec))
    if not isinstance(stated, dict):
        raise ValueError(f"{folder / 'config.json'} holds {stated!r:.40}, the config of an autoencoder is wanted")
    class_name = str(stated.get("_class_name"))
    files.choose("autoencoder class", class_name, CLASSES)
    config = {name: value for name, value in stated.items() if not name.startswith("_")}
    model = build(class_name, config)
    try:
        image_channels = int(model.config.get("in_channels") or model.config.get("input_channels") or 3)
        shape = to_raw(model, torch.zeros(1, image_channels, PROBE, PROBE, device="meta")).shape
        normalisation, shift, std = stated_normalisation(model, shape[1], paths)
    except Exception as error:  # see `build`
        raise ValueError(f"{folder} is no {class_name}: {one_line(error)}") from None
    return Autoencoder(
        source=f"{PREFIX}{folder}" if local(spec) else spec,
        class_name=class_name,
        config=config,
        sha256=digest(paths),
        dtype=dtype,
        image_channels=image_channels,
        channels=shape[1],
        stride=PROBE // shape[2],
        normalisation=normalisation,
        shift=shift,
        std=std,
    )


def stated_normalisation(model: Any, channels: int, paths: list[Path]) -> tuple[str, Tensor, Tensor]:
    """Return "none", shift and std as the autoencoder states them, or "channel", 0 and 1 where it states nothing."""
    config = model.config
    if CLASSES[type(model).__name__].patches:
        tensors = read_tensors(paths)
        shift = tensors["bn.running_mean"].float()
        std = (tensors["bn.running_var"].float() + config["batch_norm_eps"]).sqrt()
    elif config.get("latents_mean") and config.get("latents_std"):
        shift, std = (torch.tensor(config[name], dtype=torch.float32) for name in ("latents_mean", "latents_std"))
    elif config.get("scaling_factor") not in (None, 1):
        shift = torch.full((channels,), float(config.get("shift_factor") or 0))
        std = torch.full((channels,), 1 / config["scaling_factor"])
    else:
        return "channel", torch.zeros(channels), torch.ones(channels)
    if not shift.shape == std.shape == (channels,):
        raise ValueError(f"it states {len(shift)} means and {len(std)} deviations for {channels} channels")
    if not (torch.isfinite(shift) & torch.isfinite(std) & (std > 0)).all():
        raise ValueError(
            f"the deviations it states are in [{std.min():.3g}, {std.max():.3g}], positive ones are wanted"
        )
    return "none", shift, std


def column(values: Float[Tensor, " k"], like: Tensor) -> Float[Tensor, "k 1 1"]:
    return values.to(like.device)[:, None, None]


@torch.no_grad()
def to_raw(model: Any, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
    """Encode images in [-1, 1], without normalisation."""
    kind = CLASSES[type(model).__name__]
    output = model.encode(pixels.unsqueeze(2) if kind.frames else pixels, return_dict=False)[0]
    raw = output if isinstance(output, Tensor) else output.mode()
    if kind.patches:
        return cut_patches(raw, model.config.patch_size[0]).permute(0, 3, 1, 2)
    return raw.squeeze(2) if kind.frames else raw


@torch.no_grad()
def from_raw(model: Any, raw: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
    """Decode latents that `to_raw` gave."""
    kind = CLASSES[type(model).__name__]
    if kind.patches:
        raw = join_patches(raw.permute(0, 2, 3, 1), model.config.patch_size[0])
    pixels = model.decode(raw.unsqueeze(2) if kind.frames else raw, return_dict=False)[0]
    return pixels.squeeze(2) if kind.frames else pixels


def build(class_name: str, config: dict[str, Any]) -> Any:
    """Build a network of diffusers on the meta device, where it takes neither memory nor random numbers."""
    with needed("autoencoders", "autoencoders"):
        import diffusers
    made = getattr(diffusers, class_name, None)
    if made is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {class_name}, a newer one is wanted")
    taken = inspect.signature(made.__init__).parameters
    try:
        with torch.device("meta"):
            model = made(**{name: value for name, value in config.items() if name in taken})
    except Exception as error:  # no class says what it makes of a wrong config
        raise ValueError(f"no {class_name} can be made of its config: {one_line(error)}") from None
    if unknown := sorted(config.keys() - model.config.keys()):  # some classes add entries that they do not take
        raise ValueError(f"{class_name} of diffusers {diffusers.__version__} knows no {', '.join(unknown)}")
    return model.eval().requires_grad_(False)


def fill(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> Any:
    """Give a network its weights; tensors that are missing, too many, or of another shape are a ValueError."""
    tensors, expected = rename(tensors, model.config), model.state_dict()
    tensors = {
        name: torch.zeros((), dtype=torch.int64) for name in expected if name == "bn.num_batches_tracked"
    } | tensors
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"the weights in {folder} lack {name}")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(tensors[name].shape)} in {folder}, its config wants {list(tensor.shape)}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"the weights in {folder} hold {unknown[0]}, which a {type(model).__name__} has not")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model


def rename(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Give tensors the names that diffusers has for them now, from its older ones or the original release's."""
    if any(".mid.block_1." in name for name in tensors) and "down_block_types" in config:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        statistics = {name: tensor for name, tensor in tensors.items() if name.startswith("bn.")}
        plain = {
            re.sub(r"^(en|de)coder\.((post_)?quant_conv)", r"\2", name): tensor for name, tensor in tensors.items()
        }
        return convert_ldm_vae_checkpoint(plain, config) | statistics
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(older)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{older[m[2]]}.", name): tensor for name, tensor in tensors.items()}


def weights_name(spec: str) -> str:
    return KNOWN[spec].weights if spec in KNOWN else WEIGHTS


def home() -> Path:
    """Return the folder for autoencoders, $JLT_HOME/autoencoders."""
    return Path(os.environ.get("JLT_HOME") or "~/.cache/jlt").expanduser() / "autoencoders"


def local(spec: str) -> Path | None:
    """Return the folder that a spec names outright, if it does."""
    path = os.path.expanduser(spec.removeprefix(PREFIX))
    return Path(path).resolve() if spec.startswith(PREFIX) and os.path.isdir(path) else None


def locate(spec: str) -> Path:
    """Return the folder of config.json and weights that a spec names, fetched from the Hub if need be."""
    if folder := local(spec):
        return folder
    if spec.startswith(PREFIX):
        named = spec.removeprefix(PREFIX)
        parts = named.split("/")
        if len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
            raise ValueError(f"there is no folder {named}, nor is it ORG/NAME or ORG/NAME/SUBFOLDER of the Hub")
        place = Place("/".join(parts[:2]), "/".join(parts[2:]))
    else:
        place = files.choose("autoencoder", spec, KNOWN)
    folder = home() / place.repository / place.subfolder
    if folder.is_dir():
        return folder
    try:
        return download(place)
    except Exception as error:  # no network, no such repository, no permission, no client: all end here
        raise ValueError(
            f"{spec} is neither in {folder} nor to be had from the Hub ({one_line(error)}): "
            f"put config.json and {place.weights} from {place.url} into {folder}"
        ) from None


def download(place: Place) -> Path:
    """Return the folder of config.json and weights in the Hub's own cache, fetched if they are not there yet."""
    names = ["config.json", place.weights, INDEX, WEIGHTS.replace(".", "-*-of-*.")]
    paths = [f"{place.subfolder}/{name}".lstrip("/") for name in names]
    folder = Path(place.subfolder)
    return snapshot(place.repository, paths, lambda root: find_weights(root / folder, place.weights)) / folder


def find_weights(folder: Path, preferred: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of the weights in a folder, in the order of their names."""
    for name in (preferred, WEIGHTS):
        if (folder / name).is_file():
            return [folder / name]
    if (folder / INDEX).is_file():
        paths = [folder / name for name in parts_of(folder / INDEX)]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing, which {INDEX} names")
        return paths
    names = files.names(folder)
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return [folder / found[0]]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    held = ", ".join(sorted(found)) or (f"{pickles[0]}, a pickle, which is not opened" if pickles else "none")
    raise ValueError(f"{folder} holds no {preferred}, the weights wanted, but {held}")


def parts_of(index: Path) -> list[str]:
    """Return the names of the files that an index of weights in parts lists."""
    try:
        names = sorted(set(files.read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        names = []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index} is no index of weights")
    return names


def read_tensors(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return tensors


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of a file, or that of several files' digests, one a line."""
    digests = [files.sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
