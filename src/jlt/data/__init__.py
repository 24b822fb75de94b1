"""Data: image sources, representations, and latents on disk. See each module's docstring for its contract."""

from jlt.data.autoencoders import Autoencoder, open_autoencoder
from jlt.data.encoding import encode, real_images, reconstruct
from jlt.data.representations import REPRESENTATIONS, PatchPCA, Pixels, Representation, load_representation
from jlt.data.shards import Affine, Latents, Manifest, open_latents, splits
from jlt.data.sources import SOURCES, Source, Subset, held_out_indices, open_source

__all__ = [
    "REPRESENTATIONS",
    "SOURCES",
    "Affine",
    "Autoencoder",
    "Latents",
    "Manifest",
    "PatchPCA",
    "Pixels",
    "Representation",
    "Source",
    "Subset",
    "encode",
    "held_out_indices",
    "load_representation",
    "open_autoencoder",
    "open_latents",
    "open_source",
    "real_images",
    "reconstruct",
    "splits",
]
