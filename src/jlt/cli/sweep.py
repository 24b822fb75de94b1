"""`jlt sweep RUN [LATENTS]`."""

from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.places import OptionalLatentsPath, RunPath
from jlt.evaluation import records
from jlt.experiments.asking import Sampling
from jlt.experiments.benchmark import own_folder
from jlt.experiments.report import text_table
from jlt.experiments.sweep import Factors, sweep


def run(
    source: RunPath,
    latents: OptionalLatentsPath = None,
    factors: Annotated[Factors, tyro.conf.arg(name="")] = Factors(),  # noqa: B008
    *,
    reference: Path | None = None,
    extractor: str = "efficientnet-lite0",
    by: str = "FD",
    num: int = 1000,
    seed: int = 1,
    full: int = 5000,
    final_seeds: tuple[int, ...] = (0,),
    guide: Path | None = None,
    batch_size: int = 100,
    share: str | None = None,
    device: str = "cpu",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Find the best guidance, average and solver of a run on few images, then score the best at full count.

    Every option below that takes several values is swept; all combinations are measured. Each point is written as it is
    done: the same command goes on where it was stopped, and values added later cost their points only. Afterwards
    `jlt report OUT` makes a page with the heat map and a table of all points. For ImageNet 256:

    jlt sweep RUN --reference REF.npz --extractor inception --scale 1.5 2 2.5 3 3.5 --interval 0 1 0.1 1 0.2 0.9
    --num 10000 --full 50000

    Several GPUs take points in turn: torchrun --nproc-per-node 8 -m jlt sweep ... --device cuda. So do the jobs of an
    array, in any order: jlt sweep ... --share $SLURM_ARRAY_TASK_ID/16, and then the same command without --share.

    Args:
        source: a run folder (its last checkpoint), a checkpoint folder, or ORG/NAME of the Hub.
        latents: the folder of latents it was trained on; its held-out images are the reference, if no other is given.
        factors: the values that are swept.
        reference: statistics of real images that jlt reference made or others published, a .npz file.
        extractor: features: efficientnet-lite0, pixels, inception, inception:PATH of its weights, or dinov2:FOLDER.
        by: the metric that decides: FD, KD (unbiased, for few images), IS, precision, recall, density, coverage, or
            on inception FID, sFID, KID.
        num: images a point.
        seed: of the points' noise.
        full: images of the best point's final score.
        final_seeds: seeds of the final score, others than the points'.
        guide: for guidance auto, the run or checkpoint of a smaller or less trained model of the same latents.
        batch_size: images at once.
        share: K/N: every N-th point from the K-th on, and no final score.
        device: where networks run, such as cuda.
        out: folder for all that is written; by default `sweep` in the run folder.
        json: print the record as JSON.
    """
    if latents is None and reference is None:
        raise ValueError("a sweep compares with the held-out images of LATENTS or with --reference; neither was given")
    sampling = Sampling(num_images=num, guide=guide, seed=seed, batch_size=batch_size)
    out = own_folder(source, "sweep") if out is None else out
    path = sweep(
        source, out, factors, sampling, latents=latents, reference=reference, extractor=extractor, by=by, full=full,
        final_seeds=final_seeds, share=share, device=device,
    )  # fmt: skip
    if path is not None:
        record = records.read(path)
        tables = [text_table(table) for table in (*(part for part in record.parts if part.kind == "points"), record)]
        print(path.read_text() if json else "\n\n".join([*tables, str(path)]))
    elif share is not None:
        print(f"{out / 'points'}: share {share} is measured; the same command without --share scores the best")
