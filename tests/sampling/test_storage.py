"""Generated images on disk: made once, and the same however often the making was stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from jlt import files
from jlt.data.representations import Pixels
from jlt.data.shards import Affine
from jlt.flow import TARGETS
from jlt.nn import Transformer, TransformerConfig
from jlt.sampling import Generator, batches, generate
from jlt.sampling.storage import batch_path, write_batch

LABELS = torch.arange(10) % 3
SETTINGS: dict[str, Any] = {"seed": 3, "steps": 2, "scale": 2.0, "batch_size": 4}


@pytest.fixture(scope="module")
def generator() -> Generator:
    model = Transformer(TransformerConfig(4, 1, 1, 16, 1, 2, num_classes=3))
    with torch.no_grad():
        model.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    header = {"name": "JLT-1x16/1", "step": 5, "floor": 0.05}
    return Generator(model, TARGETS["x"], Pixels(1), Affine((0.0,), (1.0,)), None, header, "ema-0.9", "abc")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", range(5))
def test_a_generation_that_was_killed_goes_on_to_the_same_images(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = generate(generator, LABELS, tmp_path / "whole", **SETTINGS)
    writes, made = [0], [0]
    write, sample = files.write_bytes, Generator.sample

    def dying_write(path: Path, data: bytes) -> None:
        if writes[0] == after:
            raise Killed
        writes[0] += 1
        write(path, data)

    def counting_sample(self: Generator, *arguments: Any, **named: Any) -> Any:
        made[0] += 1
        return sample(self, *arguments, **named)

    monkeypatch.setattr(Generator, "sample", counting_sample)
    monkeypatch.setattr(files, "write_bytes", dying_write)
    with pytest.raises(Killed):
        generate(generator, LABELS, tmp_path / "stopped", **SETTINGS)
    monkeypatch.setattr(files, "write_bytes", write)
    before = made[0]
    resumed = generate(generator, LABELS, tmp_path / "stopped", **SETTINGS)
    assert made[0] - before == 3 - max(after - 1, 0)  # nothing that was written is generated twice
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.latents, whole.latents)
    again = generate(generator, LABELS, tmp_path / "stopped", **SETTINGS)
    assert dataclasses.astuple(again)[3:] == dataclasses.astuple(resumed)[3:]  # seconds included
    assert made[0] - before == 3 - max(after - 1, 0)


def test_stored_images_are_those_of_one_call(generator: Generator, tmp_path: Path) -> None:
    stored = generate(generator, LABELS, tmp_path / "out", **SETTINGS)
    direct = generator.sample(LABELS, **SETTINGS)
    torch.testing.assert_close(stored.latents, direct.latents, rtol=0, atol=1e-4)
    assert (stored.evaluations, stored.network_passes) == (direct.evaluations, direct.network_passes) == (2, 3)


def test_batches_are_read_in_order_however_many_there_are(generator: Generator, tmp_path: Path) -> None:
    made = generator.sample(LABELS[:1], steps=1)
    for k in (100_000, 99_999, 3):
        write_batch(batch_path(tmp_path, k), dataclasses.replace(made, images=torch.full_like(made.images, k % 7)))
    assert [int(images[0, 0, 0, 0]) for images in batches(tmp_path)] == [k % 7 for k in (3, 99_999, 100_000)]


def test_other_images_are_not_mixed_in(generator: Generator, tmp_path: Path) -> None:
    generate(generator, LABELS, tmp_path / "out", **SETTINGS)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"made with other settings: steps is 2 there and 3 here; seed is"):
        generate(generator, LABELS, tmp_path / "out", **{**SETTINGS, "seed": 4, "steps": 3})
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no samples\.json"):
        generate(generator, LABELS, tmp_path / "mine", **SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda old: old[:-1], "images-00000.safetensors is damaged .* remove it, and the same command makes it again"),
        (lambda _: save({"weight": torch.zeros(1)}), "images-00000.safetensors holds no images that this command made"),
        (lambda _: save({"weight": torch.zeros(1)}, {"by": "another"}), "images-00000.safetensors holds no images"),
    ],
)
def test_a_damaged_or_foreign_batch_is_told_in_one_line(generator: Generator, tmp_path: Path, content, message) -> None:
    generate(generator, LABELS, tmp_path / "out", **SETTINGS)
    path = batch_path(tmp_path / "out", 0)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        list(batches(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        generate(generator, LABELS, tmp_path / "out", **SETTINGS)


def test_bad_input_leaves_nothing(generator: Generator, tmp_path: Path) -> None:
    for wrong in ({"solver": "huen"}, {"steps": 0}, {"interval": (1.0, 0.0)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"huen|at least 1|interval"):
            generate(generator, LABELS, tmp_path / "out", **{**SETTINGS, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_fills_is_refused(generator: Generator, tmp_path: Path) -> None:
    generate(generator, LABELS, tmp_path / "out", **SETTINGS)
    with files.locked(tmp_path / "out" / "samples.json"), pytest.raises(ValueError, match="in use by another process"):
        generate(generator, LABELS, tmp_path / "out", **SETTINGS)
