import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from jlt import files
from jlt.data import open_latents
from jlt.data.authors_latents import import_latents
from jlt.data.representations import Pixels
from jlt.data.sources import held_out_indices

SHAPE = (128, 4, 4)
COUNTS = (5, 7, 3)


def write_theirs(folder, dtype=torch.bfloat16, change=lambda k, tensors: tensors):
    """Write files as the authors name them; return all latents, flipped latents and labels in order."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, made = torch.Generator().manual_seed(0), []
    for k, count in enumerate(COUNTS):
        latents, flipped = torch.randn(2, count, *SHAPE, generator=generator).to(dtype)
        labels = torch.arange(count) % 3
        tensors = change(k, {"latents": latents, "latents_flip": flipped, "labels": labels})
        save_file(
            {name: t.contiguous() for name, t in tensors.items()}, folder / f"latents_rank00_shard{k:03d}.safetensors"
        )
        made.append(tensors)
    return made


def bring(folder, out, **options):
    import_latents(folder, out, ("ant", "bee", "cow"), Pixels(SHAPE[0]), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_held_out", [0, 4])
def test_every_latent_arrives_in_order_as_it_was(tmp_path, dtype, num_held_out):
    made = write_theirs(tmp_path / "theirs", dtype)
    bring(tmp_path / "theirs", tmp_path / "ours", num_held_out=num_held_out, shard_size=4)
    labels = torch.cat([part["labels"] for part in made])
    held_out = held_out_indices(labels.numpy(), num_held_out).tolist()
    training = [index for index in range(15) if index not in held_out]
    for split, indices in {"train": training, "held-out": held_out}.items():
        if not indices:
            assert not (tmp_path / "ours" / split).exists()
            continue
        latents = open_latents(tmp_path / "ours", split, verify=True)
        assert latents.labels.tolist() == labels[indices].tolist()
        assert latents.manifest.class_names == ("ant", "bee", "cow")
        all_of_them = torch.arange(len(indices))
        expected = torch.cat([part["latents"] for part in made])[indices].float()
        # bfloat16 of a normal variable fits float16 exactly, but for numbers below 6e-8
        torch.testing.assert_close(latents.gather(all_of_them), expected, rtol=0, atol=6e-8)
        mean, variance = latents.statistics()
        torch.testing.assert_close(mean, torch.tensor(latents.manifest.mean, dtype=torch.float64))
        torch.testing.assert_close(variance, torch.tensor(latents.manifest.variance, dtype=torch.float64))
        if split == "train":
            flipped = torch.cat([part["latents_flip"] for part in made])[indices].float()
            found = latents.gather(all_of_them, torch.ones(len(indices), dtype=torch.bool))
            torch.testing.assert_close(found, flipped, rtol=0, atol=6e-8)


def test_a_stopped_import_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    write_theirs(tmp_path / "theirs")
    bring(tmp_path / "theirs", tmp_path / "whole", num_held_out=3, shard_size=4)
    hashes = {
        p.relative_to(tmp_path / "whole"): files.sha256(p) for p in (tmp_path / "whole").rglob("*") if p.is_file()
    }
    for stop in range(len(hashes)):
        out, written, replaced = tmp_path / f"stopped-{stop}", [], files.replaced

        def failing(path, written=written, replaced=replaced, stop=stop):
            written.append(path)
            if len(written) > stop:
                raise OSError(28, "No space left on device")
            return replaced(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "replaced", failing)
            if stop < len(hashes):
                with pytest.raises(OSError, match="No space"):
                    bring(tmp_path / "theirs", out, num_held_out=3, shard_size=4)
        kept = {
            path: path.stat().st_mtime_ns
            for path in out.rglob("shard-*.safetensors")
            if path.with_suffix(".sha256").exists()
        }
        bring(tmp_path / "theirs", out, num_held_out=3, shard_size=4)
        assert {p.relative_to(out): files.sha256(p) for p in out.rglob("*") if p.is_file()} == hashes
        assert {path: path.stat().st_mtime_ns for path in kept} == kept  # whole shards are not made again
        shutil.rmtree(out)


def test_a_damaged_shard_is_made_again(tmp_path):
    write_theirs(tmp_path / "theirs")
    bring(tmp_path / "theirs", tmp_path / "ours", shard_size=4)
    shard = tmp_path / "ours" / "train" / "shard-00001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-3] + b"???")
    bring(tmp_path / "theirs", tmp_path / "ours", shard_size=4)
    assert shard.read_bytes() == before


def nan(k, tensors):
    if k == 1:
        tensors["latents_flip"][2, 0, 0, 0] = float("nan")
    return tensors


def label_out_of_range(k, tensors):
    return {**tensors, "labels": tensors["labels"] + k}


CASES = {
    "un-normalised": (lambda k, t: {**t, "latents": t["latents"] * 4}, "latents have channel variance 15.8"),
    "un-normalised mirrored": (lambda k, t: {**t, "latents_flip": t["latents_flip"] * 4}, "latents_flip have .* 1[56]"),
    "off centre": (lambda k, t: {**t, "latents": t["latents"] + 3}, "channel mean of 3"),
    "not a number": (nan, "shard001.safetensors: latents_flip of image 2 are not finite"),
    "other shape": (lambda k, t: {**t, **{n: t[n][:, :, :2] for n in ("latents", "latents_flip")}} if k == 2 else t,
                    r"shard002.safetensors holds latents of \[128, 2, 4\], .* of \[128, 4, 4\]"),
    "label out of range": (label_out_of_range, "has the label 4, there are 3 class names"),
    "no mirrored latents": (lambda k, t: {n: t[n] for n in ("latents", "labels")}, "lacks latents_flip; it holds"),
    "32 bits": (lambda k, t: {**t, "latents": t["latents"].float()}, "latents are F32, F16 or BF16 is wanted"),
    "fewer labels": (lambda k, t: {**t, "labels": t["labels"][1:]}, r"latents are \[5, 128, 4, 4\].* labels \[4\]"),
    "fractional labels": (lambda k, t: {**t, "labels": t["labels"].float()}, "labels are torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_that_are_not_what_is_promised_are_one_line(tmp_path, case):
    change, message = CASES[case]
    write_theirs(tmp_path / "theirs", change=change)
    with pytest.raises(ValueError, match=message) as caught:
        bring(tmp_path / "theirs", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_a_cut_file_and_another_imports_folder_are_refused(tmp_path):
    write_theirs(tmp_path / "theirs")
    bring(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match="shard_size is 4096 there and 8 here"):
        bring(tmp_path / "theirs", tmp_path / "ours", shard_size=8)
    with pytest.raises(ValueError, match="128 channels, pixels has 3"):
        import_latents(tmp_path / "theirs", tmp_path / "ours", None, Pixels(3))
    cut = tmp_path / "theirs" / "latents_rank00_shard001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard001\.safetensors is not a whole safetensors file"):
        bring(tmp_path / "theirs", tmp_path / "ours")


def test_what_was_written_does_not_depend_on_the_files_it_came_from(tmp_path):
    made = write_theirs(tmp_path / "theirs")
    joined = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    (tmp_path / "one").mkdir()
    save_file(joined, tmp_path / "one" / "all.safetensors")
    for name in ("theirs", "one"):
        bring(tmp_path / name, tmp_path / f"ours-{name}", shard_size=4)
    manifests = [open_latents(tmp_path / f"ours-{name}").manifest for name in ("theirs", "one")]
    assert replace(manifests[0], source={}) == replace(manifests[1], source={})
    assert load_file(tmp_path / "ours-one" / "train" / "shard-00000.safetensors")["latents"].shape == (4, *SHAPE)
