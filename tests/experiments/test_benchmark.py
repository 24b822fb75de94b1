"""Runs, and images made elsewhere, against statistics on disk."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jlt.cli import main
from jlt.data import encode, real_images
from jlt.data.idx import Arrays
from jlt.evaluation import inception, records, references
from jlt.evaluation.distances import kernel_distance
from jlt.evaluation.features import Pixels
from jlt.evaluation.protocol import by_class, measure, reference
from jlt.experiments.asking import Sampling
from jlt.experiments.benchmark import benchmark, make_reference
from jlt.experiments.evaluate import prepare_judge
from jlt.sampling import Making
from jlt.training import TrainConfig, train

Fork = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = TrainConfig(size="1x16x2", steps=12, batch_size=6, warmup_steps=1, learning_rate=1e-2, ema_decays=(0.5,))
SAMPLING = Sampling(num_images=31, steps=2, batch_size=6)
IN_SIXES = Sampling(batch_size=6)


def pictures(count: int, seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    images = np.ascontiguousarray(pictures(40, 0)[..., :1].transpose(0, 3, 1, 2))
    source = Arrays("mnist", images, np.arange(40) % 4, ("a", "b", "c", "d"), "test")
    encode(source, folder / "latents", stride=2, num_held_out=10)
    train(CONFIG, folder / "latents", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of 80 images, of which 50 are kept."""
    folder = tmp_path_factory.mktemp("real")
    np.savez(folder / "images.npz", pictures(80, 1))
    make_reference(str(folder / "images.npz"), folder / "real.npz", "pixels", keep=50, images=True, batch_size=7)
    return folder / "real.npz"


def values(path: Path | None) -> dict[str, Any]:
    assert path is not None
    found = records.read(path).parts[0].values
    return {name: value for name, value in found.items() if "time" not in name}


def test_a_run_scores_what_its_stored_images_score(run: Path, real: Path, tmp_path: Path) -> None:
    path = benchmark(str(run), real, tmp_path, SAMPLING, "pixels")
    stored = sorted((tmp_path / "samples").glob("*.safetensors"))
    assert len(stored) == 6
    images = torch.cat([load_file(part)["images"] for part in stored])
    against = reference(torch.from_numpy(pictures(80, 1)).permute(0, 3, 1, 2), Pixels(8), "real")
    expected = measure(images, against, Pixels(8))["FD (pixels 8 x 8)"].value
    found = values(path)
    assert found["FD (pixels 8 x 8)"].value == pytest.approx(expected, rel=1e-9)
    assert (found["evaluations"].value, found["network passes"].value) == (2, 3)  # t = 0 is unguided
    assert found["FD (pixels 8 x 8), over fifths of 6"].count == 5


def test_a_record_states_how_its_images_were_made_and_with_what_they_were_compared(
    run: Path, real: Path, tmp_path: Path
) -> None:
    path = benchmark(str(run), real, tmp_path, SAMPLING, "pixels")
    assert path is not None
    record = records.read(path)
    expected = {
        "solver": Making.solver, "grid": Making.grid, "steps": 2, "guidance_scale": 2.9,
        "guidance_interval": [0.1, 1.0], "weights": "ema-0.5",
        "num_images": 31, "seed": 0, "labels": "in turn over 4 classes", "reference": "real.npz",
        "reference's images": f"80 of npz:{real.parent / 'images.npz'}", "extractor": "pixels 8 x 8",
        "images compared for KD, precision, recall, density, coverage": "31 with 50",
    }  # fmt: skip
    assert {name: record.settings[name] for name in expected} == expected
    assert {"weights", "reference", "extractor"} <= record.fingerprints.keys()
    assert record.parts[1].name == "31 of the reference's own images"
    floor = record.parts[1].values["FD (pixels 8 x 8)"].value
    assert 0 < floor < record.parts[0].values["FD (pixels 8 x 8)"].value


def test_an_evaluation_goes_on_with_the_images_that_are_there(run: Path, real: Path, tmp_path: Path) -> None:
    whole = values(benchmark(str(run), real, tmp_path, SAMPLING, "pixels"))
    stored = sorted((tmp_path / "samples").glob("*.safetensors"))
    stored[3].unlink()
    kept = {part: part.stat().st_mtime_ns for part in stored if part.exists()}
    assert values(benchmark(str(run), real, tmp_path, SAMPLING, "pixels")) == whole
    assert {part: part.stat().st_mtime_ns for part in kept} == kept


RANKS = """
from pathlib import Path
import torch
from jlt.experiments.benchmark import benchmark
from jlt.experiments.asking import Sampling

torch.set_num_threads(1)
source, reference, out, count = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
sampling = Sampling(num_images=31, steps=2, batch_size=6)
sys.exit(max(forked(count, lambda rank: benchmark(source, reference, out, sampling, "pixels"))))
"""


@pytest.mark.usefixtures("one_thread")
def test_no_result_depends_on_the_number_of_processes(run: Path, real: Path, tmp_path: Path, fork: Fork) -> None:
    count = 4  # of 6 batches: the last round lacks two
    alone = values(benchmark(str(run), real, tmp_path / "1", SAMPLING, "pixels"))
    done = fork(RANKS, run, real, tmp_path / "many", count)
    assert done.returncode == 0, done.stderr
    assert values(tmp_path / "many" / "record.json") == alone


def test_images_score_the_same_from_a_folder_and_from_an_array(real: Path, tmp_path: Path) -> None:
    images = pictures(20, 2)
    np.savez(tmp_path / "images.npz", images)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:03d}.png")
    from_array = benchmark(str(tmp_path / "images.npz"), real, tmp_path / "a", IN_SIXES, "pixels")
    from_folder = benchmark(str(tmp_path / "images"), real, tmp_path / "b", IN_SIXES, "pixels", image_size=8)
    assert values(from_array) == values(from_folder)
    assert from_array is not None
    assert records.read(from_array).settings["image size"] == "8 x 8"


def test_a_references_own_images_are_at_its_distance_0(real: Path, tmp_path: Path) -> None:
    found = values(benchmark(str(real.parent / "images.npz"), real, tmp_path, IN_SIXES, "pixels"))
    assert found["FD (pixels 8 x 8)"].value == pytest.approx(0, abs=1e-9)
    assert found["coverage (pixels 8 x 8)"].value == 1


def test_the_images_of_latents_are_a_reference(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(640, dtype=torch.uint8).reshape(10, 1, 8, 8)
    source = Arrays("mnist", images.numpy(), np.arange(10) % 2, ("a", "b"), "ten")
    encode(source, tmp_path / "latents", stride=2, num_held_out=2)
    monkeypatch.setattr("jlt.data.encoding.open_source", lambda *arguments: source)
    make_reference(str(tmp_path / "latents"), tmp_path / "r.npz", "pixels")
    assert references.read(tmp_path / "r.npz", Pixels(8)).count == 8


@pytest.mark.filterwarnings("ignore:.*not writable")
def test_fids_network_measures_images_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With random weights in the real file's format, and the statistics that ADM publishes: images, no features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(inception.bare_network().state_dict(), tmp_path / "weights.pth")
    extractor = f"inception-unverified:{tmp_path / 'weights.pth'}"
    np.savez(tmp_path / "images.npz", pictures(10, 3))
    images, made = str(tmp_path / "images.npz"), tmp_path / "reference.npz"
    assert main(["reference", images, str(made), "--extractor", extractor, "--images", "--keep", "5"]) == 0
    assert "10 images" in capsys.readouterr().out
    with np.load(made) as file:
        shapes = {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
        published = {name: file[name] for name in shapes}
    assert shapes == {
        "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (5, 8, 8, 3),
    }  # fmt: skip
    np.savez(tmp_path / "published.npz", **published)
    command = ["evaluate", images, "--reference", str(tmp_path / "published.npz"), "--out", str(tmp_path / "out")]
    assert main([*command, "--extractor", extractor]) == 0
    found = values(tmp_path / "out" / "record.json")
    name = records.read(tmp_path / "out" / "record.json").settings["extractor"]
    assert [key.removesuffix(f" ({name})") for key in found] == [
        "FD", "sFD", "IS", "KD", "precision", "recall", "density", "coverage",
    ]  # fmt: skip
    assert not any("FID" in key for key in found)
    assert found[f"FD ({name})"].value == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_compared_is_one_line(run: Path, real: Path, tmp_path: Path, capsys: Any) -> None:
    images = str(real.parent / "images.npz")
    for arguments, message in [
        ([str(run)], "neither was given"),
        ([str(run), "--reference", str(real), "--seeds", "1", "1"], "seeds must differ, got 1, 1"),
        ([images, "--reference", str(real), "--out", "o", "--seeds", "0", "1"], "has neither latents nor seeds"),
        ([images, "--reference", str(real), "--out", "o", "--seeds", "5"], "has neither latents nor seeds"),
        (
            [images, "--reference", str(real), "--out", "o", "--num-images", "50", "--steps", "9"],
            "its images are all measured as they are, steps, num_images is for runs",
        ),
        ([images, "--reference", str(real), "--out", "o", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        ([str(run), "--reference", str(real), "--image-size", "9"], "is a run, whose images have their own size"),
        ([str(run), str(run.parent / "latents"), "--image-size", "9"], "image_size is 9, but the images of a run"),
        ([images, "--reference", str(real)], "is no folder of a run; say with --out where its record goes"),
        ([images, "--reference", str(tmp_path / "absent.npz"), "--out", "o"], "jlt reference makes them"),
        (
            [images, "--reference", str(real), "--out", "o", "--extractor", "efficientnet-lite0"],
            "are of dimension 1280",
        ),
        ([images, "--reference", str(real), "--out", "o", "--image-size", "9"], "not 9 x 9"),
    ]:
        options = [] if "--extractor" in arguments else ["--extractor", "pixels"]
        assert main(["evaluate", *arguments, *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (run / "evaluation").exists()
    assert main(["reference", images, str(tmp_path / "r.json"), "--extractor", "pixels"]) == 2
    assert "does not end in .npz" in capsys.readouterr().err


def test_seeds_give_each_value_its_mean_and_spread(run: Path, real: Path, tmp_path: Path) -> None:
    alone = [
        values(benchmark(str(run), real, tmp_path / str(seed), replace(SAMPLING, seed=seed), "pixels"))
        for seed in (3, 4)
    ]
    path = benchmark(str(run), real, tmp_path / "both", SAMPLING, "pixels", seeds=(3, 4))
    name, found = "FD (pixels 8 x 8)", values(path)
    a, b = (each[name].value for each in alone)
    assert found[name].value == pytest.approx((a + b) / 2, rel=1e-12)
    assert found[name].spread == pytest.approx(abs(a - b) / 2**0.5, rel=1e-9)
    assert (found[name].count, found["evaluations"]) == (2, replace(alone[0]["evaluations"], count=2))
    assert path is not None
    assert records.read(path).settings["seeds"] == [3, 4]
    assert "seed" not in records.read(path).settings


def test_guidance_is_measured_as_it_is_asked_for(run: Path, real: Path, tmp_path: Path) -> None:
    rules = {"apg": replace(SAMPLING, guidance="apg:eta=0.5"), "auto": replace(SAMPLING, guidance="auto", guide=run)}
    for name, sampling in rules.items():
        path = benchmark(str(run), real, tmp_path / name, sampling, "pixels")
        assert path is not None
        settings = records.read(path).settings
        assert settings["guidance"] == sampling.guidance
        assert (settings["guide"] is None) == (name == "apg")


def test_a_run_is_measured_by_class_beside_its_representations_ceiling(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.ascontiguousarray(pictures(40, 0)[..., :1].transpose(0, 3, 1, 2))
    source = Arrays("mnist", images, np.arange(40) % 4, ("a", "b", "c", "d"), "test")
    monkeypatch.setattr("jlt.data.encoding.open_source", lambda *arguments: source)
    latents = run.parent / "latents"
    make_reference(str(latents), tmp_path / "images.npz", "pixels")
    make_reference(str(latents), tmp_path / "decoded.npz", "pixels", decoded=True)
    made = references.read(tmp_path / "decoded.npz", Pixels(8))
    assert "training images, encoded and decoded by patch-pca" in made.name
    assert made.image_size == "8 x 8"
    path = benchmark(str(run), tmp_path / "images.npz", tmp_path / "out", SAMPLING, "pixels", latents=latents)
    assert path is not None
    record = records.read(path)
    ceiling, classes = record.parts[1:]  # no floor: there are as many real images as are compared
    assert ceiling.name == "10 held-out images, encoded and decoded"
    against = references.read(tmp_path / "images.npz", Pixels(8))
    held_out = torch.from_numpy(
        np.stack([image for image, _ in (real_images(latents, "held-out")[i] for i in range(10))])
    )
    expected = measure(held_out, against, Pixels(8))["FD (pixels 8 x 8)"].value
    assert ceiling.values["FD (pixels 8 x 8)"].value == pytest.approx(
        expected, rel=1e-3
    )  # PCA of all channels, 16 bits
    assert set(classes.parts[0].values) == {"a", "b", "c", "d"}
    assert record.settings["reference's image size"] == record.settings["image size"] == "8 x 8"
    stored = torch.cat([load_file(file)["images"] for file in sorted((tmp_path / "out" / "samples").glob("*.safe*"))])
    seen = reference(stored, Pixels(8), "samples", labels=torch.arange(31) % 4)
    assert {name: value.value for name, value in classes.parts[0].values.items()} == pytest.approx(
        {"abcd"[k]: distance for k, distance in by_class(seen, against).items()}, rel=1e-6
    )


def test_images_of_one_class_are_measured_without_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.ascontiguousarray(pictures(40, 0)[..., :1].transpose(0, 3, 1, 2))
    source = Arrays("mnist", images, np.zeros(40, dtype=np.int64), ("a",), "test")
    monkeypatch.setattr("jlt.data.encoding.open_source", lambda *arguments: source)
    encode(source, tmp_path / "latents", stride=2, num_held_out=10)
    assert set(prepare_judge(tmp_path / "latents", 10, "pixels").real_values) == {
        "FD (pixels 8 x 8)", "KD (pixels 8 x 8)",
    }  # fmt: skip


def test_the_distance_of_a_class_is_that_of_its_images_alone() -> None:
    images = torch.from_numpy(pictures(30, 5)).permute(0, 3, 1, 2)
    labels = torch.tensor([0, 1, -1]).repeat(10)
    ours, theirs = (reference(images[i::2], Pixels(4), "", labels=labels[i::2]) for i in (0, 1))
    found = by_class(ours, theirs)
    assert set(found) == {0, 1}  # images without a label are of no class
    for k in found:
        sides = [Pixels(4)(images[i::2][labels[i::2] == k]) for i in (0, 1)]
        assert found[k] == pytest.approx(kernel_distance(*sides), rel=1e-12)
