"""A run as a pipeline of diffusers: what the folder that `jlt export --to diffusers` writes loads.

    OUT/model_index.json     the pipeline's class, and those of its components
    OUT/pipeline.py          one line that imports JLTPipeline from here
    OUT/transformer/         the network: config.json (the checkpoint's header), weights, and such a line
    OUT/representation/      what normalises and decodes its latents, likewise
    OUT/vae/                 the autoencoder's own folder of diffusers, where the representation is one

It samples through `jlt.Generator`, so an image is that of `jlt sample` with the same seed, index and settings. This is
the one module that cannot be imported without an optional package; diffusers' loader and `jlt export` import it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from jlt import files
from jlt.data import Affine, Autoencoder, Representation
from jlt.data.autoencoders import DTYPES
from jlt.data.representations import REPRESENTATIONS
from jlt.flow import target
from jlt.nn import Transformer, TransformerConfig
from jlt.sampling import Generator, Making, Samples, default_scale
from jlt.sampling.output import picture


class JLTTransformer(ModelMixin, ConfigMixin):
    """The network; its configuration is the header of the checkpoint that it comes from."""

    @register_to_config
    def __init__(self, header: dict[str, Any]) -> None:
        super().__init__()
        self.network = Transformer(TransformerConfig(**header["model"]))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the prediction of the header's target at z, t in [0, 1] (0 is noise) and labels."""
        y = self.network(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=y) if return_dict else (y,)


class JLTRepresentation(ModelMixin, ConfigMixin):
    """What normalises latents and decodes them (jlt.data.representations), without the weights of an autoencoder.

    `shapes` are those of its `tensors` by name, and of the shift and scale of the latents' `affine`.
    """

    @register_to_config
    def __init__(self, header: dict[str, Any], shapes: dict[str, dict[str, list[int]]]) -> None:
        super().__init__()
        self.tensors, self.affine = slots(shapes["tensors"]), slots(shapes["affine"])

    def opened(self) -> tuple[Representation, Affine]:
        """Return both as the rest of jlt knows them."""
        header = dict(self.config.header)
        tensors = {name.replace("-", "."): tensor.detach().float() for name, tensor in self.tensors.items()}
        representation = files.choose("representation", header["name"], REPRESENTATIONS)(header, tensors)
        return representation, Affine(*(tuple(self.affine[key].float().tolist()) for key in ("shift", "scale")))


def slots(shapes: Mapping[str, Sequence[int]]) -> torch.nn.ParameterDict:
    """Return frozen tensors to load; a name holds no dot in PyTorch."""
    return torch.nn.ParameterDict(
        {k.replace(".", "-"): torch.nn.Parameter(torch.zeros(list(v)), requires_grad=False) for k, v in shapes.items()}
    )


class JLTPipeline(DiffusionPipeline):
    """Class-conditional images; `from_pretrained` makes one."""

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer: JLTTransformer, representation: JLTRepresentation, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, representation=representation, vae=vae)

    def generator(self) -> Generator:
        """Return the same model as `jlt.load` gives it."""
        header = dict(self.transformer.config.header)
        (representation, affine), names = self.representation.opened(), header["latents"]["class_names"]
        if isinstance(representation, Autoencoder) and self.vae is not None:
            decoder = representation.decoder or representation
            decoder.models[str(self.vae.device)] = self.vae.to(DTYPES[decoder.dtype])
        return Generator(
            model=self.transformer.network,
            target=target(header["target"]),
            representation=representation,
            affine=affine,
            class_names=None if names is None else tuple(names),
            header=header,
            weights=header["weights"],
            fingerprint=header["fingerprint"],
        )

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = Making.steps,
        guidance_scale: float | None = None,
        *,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        **how: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one image for each label.

        Args:
            class_labels: classes by index or name; num_classes means no class.
            num_inference_steps: steps of the time grid; ab2 evaluates once a step, heun twice but in the last.
            guidance_scale: 1 is none; by default the paper's 2.9, or 1 for an unconditional model.
            seed: with the image's place in the list it determines the image's noise.
            output_type: pil, np (float32 in [0, 1], (n, height, width, channels)), or latent.
            return_dict: return an ImagePipelineOutput rather than a tuple.
            how: solver, grid, interval, guidance, batch_size, first_index as in `Generator.sample`.
        """
        outputs: dict[str, Callable[[Samples], Any]] = {
            "pil": pictures,
            "np": arrays,
            "latent": lambda made: made.latents,
        }
        give = files.choose("output_type", output_type, outputs)
        generator = self.generator()
        asked = [class_labels] if isinstance(class_labels, int | str) else class_labels
        labels = [generator.label(label) if isinstance(label, str) else int(label) for label in asked]
        scale = default_scale(generator.model.config.num_classes) if guidance_scale is None else guidance_scale
        images = give(generator.sample(labels, steps=num_inference_steps, scale=scale, seed=seed, **how))
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def pictures(samples: Samples) -> list[Any]:
    return [picture(image) for image in samples.images]


def arrays(samples: Samples) -> Any:
    return (samples.images.permute(0, 2, 3, 1).float() / 255).numpy()


def assemble(generator: Generator, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> JLTPipeline:
    """Return a generator as a pipeline; `header` and `tensors` are what its representation saves."""
    own = {key: value for key, value in generator.header.items() if key != "files"}
    own |= {"weights": generator.weights, "fingerprint": generator.fingerprint}
    transformer = JLTTransformer(header=own)
    transformer.network.load_state_dict(generator.model.state_dict())
    state = {"tensors": dict(tensors), "affine": {k: torch.tensor(v) for k, v in vars(generator.affine).items()}}
    shapes = {part: {name: list(tensor.shape) for name, tensor in of.items()} for part, of in state.items()}
    representation = JLTRepresentation(header=dict(header), shapes=shapes)
    flat = {f"{part}.{name.replace('.', '-')}": tensor for part, of in state.items() for name, tensor in of.items()}
    representation.load_state_dict(flat)
    vae = None
    if isinstance(generator.representation, Autoencoder):
        vae = (generator.representation.decoder or generator.representation).model(torch.device("cpu"))
    return JLTPipeline(transformer, representation, vae)
