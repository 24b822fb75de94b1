"""Clean-latent prediction in latent diffusion Transformers (arXiv 2605.27102).

Rooms, in the order in which data flows; a room imports only from those before it:
`flow` (mathematics), `nn` (network, EMA, checkpoints), `data` (images to latents on disk), `sampling`, `training`,
`evaluation`, `experiments`, `cli`. `files` holds how anything is written to disk.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jlt.sampling.generator import Generator as Generator
    from jlt.sampling.generator import load as load

__version__ = "0.1.0"
__all__ = ["Generator", "__version__", "load"]


def __getattr__(name: str) -> Any:  # `import jlt` stays free of PyTorch
    if name in ("load", "Generator"):
        from jlt.sampling import generator

        return getattr(generator, name)
    raise AttributeError(f"module 'jlt' has no attribute {name!r}")
