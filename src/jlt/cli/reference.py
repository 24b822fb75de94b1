"""`jlt reference SOURCE OUT.npz`."""

from jlt.cli.places import OutPath, SourceSpec
from jlt.evaluation.statistics import KEPT
from jlt.experiments.benchmark import make_reference


def run(
    source: SourceSpec,
    out: OutPath,
    *,
    extractor: str = "inception",
    image_size: int | None = None,
    keep: int = KEPT,
    images: bool = False,
    decoded: bool = False,
    batch_size: int = 100,
    device: str = "cpu",
) -> None:
    """Make the statistics of real images that `jlt evaluate --reference` compares with.

    The file is read by ADM's and torch-fidelity's tools too, and theirs by jlt. On several GPUs: torchrun
    --nproc-per-node 8 -m jlt reference ... --device cuda

    Args:
        source: images, as for jlt encode (a folder, tar:PATH, parquet:PATH, hf:NAME, FILE.npz, ...); or a folder of
            latents, for the images of its training split.
        out: the .npz file to write.
        extractor: features: inception, inception:PATH of its weights, dinov2:FOLDER, efficientnet-lite0,
            pixels.
        image_size: side of the centre crop of photographs; by default 256.
        keep: images, drawn at random, whose features are kept for KID, precision, recall, density and coverage.
        images: keep those images too, as ADM does.
        decoded: take what the latents decode to, in place of the images that they were made from.
        batch_size: images at once.
        device: where the network runs, such as cuda.
    """
    if (
        line := make_reference(source, out, extractor, image_size, keep, images, batch_size, device, decoded)
    ) is not None:
        print(line)
