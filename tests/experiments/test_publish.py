"""What `jlt push` uploads is a folder that `jlt.load` opens, and its card says what the run's record says."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import jlt
from jlt import files
from jlt.data import Pixels
from jlt.evaluation import records
from jlt.evaluation.records import Record, Value
from jlt.experiments.publish import publish
from jlt.nn import EMA, Transformer, TransformerConfig, checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = Transformer(TransformerConfig(4, 3, 2, 8, 1, 1, num_classes=2), seed=3)
    header = {
        "name": "JLT-small/2",
        "target": "x",
        "floor": 0.05,
        "step": 1234,
        "training": {"learning_rate": 0.002, "times": {"name": "logit-normal"}, "betas": [0.9, 0.95]},
        "latents": {"affine": {"shift": [0.0] * 3, "scale": [1.0] * 3}, "class_names": ["ant", "bee"]},
    }
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    folder = checkpoint.folder_of(tmp_path / "run", 1234)
    ema = EMA(model, [0.9, 0.5], [0.1])
    ema.averages[0.5]["output.bias"] += 1
    checkpoint.save(folder, model, ema, optimizer, header, lambda inner: Pixels(3).save(inner / "representation"))
    record = Record(
        kind="evaluation",
        name="JLT-small/2",
        values={"FD (EfficientNet-Lite0)": Value(52.25, 7.5, 3), "seconds": Value(9, unit="s")},
        settings={"steps": 12, "interval": [0.1, 1.0]},
        pictures={"Samples": "samples.png"},
        command="jlt evaluate run latents",
        commit="abc|def",
        hardware="an abacus",
    )
    records.write(record, tmp_path / "run" / "evaluation" / "record.json")
    (tmp_path / "run" / "evaluation" / "samples.png").write_bytes(b"a picture")
    return tmp_path / "run"


def test_the_folder_is_the_chosen_weights_and_opens_as_the_run_does(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert publish(run, "org/small", to=out) == str(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoint.json", "ema-0.9.safetensors", "record.json", "representation", "samples.png",
    ]  # fmt: skip
    shutil.move(run, tmp_path / "gone")
    here, there = jlt.load(out), jlt.load(tmp_path / "gone")
    assert here.fingerprint == there.fingerprint
    assert torch.equal(here.sample([0, 1], steps=3).images, there.sample([0, 1], steps=3).images)
    with pytest.raises(ValueError, match="unknown weights 'model'"):
        jlt.load(out, "model")


def test_several_weights_lie_side_by_side_and_the_first_average_is_the_default(run: Path, tmp_path: Path) -> None:
    publish(run, "org/small", ["model", "0.5", "model"], to=tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {"model.safetensors", "ema-0.5.safetensors"}
    assert jlt.load(tmp_path / "out").weights == "ema-0.5"
    assert jlt.load(tmp_path / "out", "model").weights == "model"
    publish(run, "org/small", ["power=0.1"], to=tmp_path / "power")
    card = (tmp_path / "power" / "README.md").read_text()
    assert 'weights="power=0.1"' in card
    assert "jlt sample org/small samples --weights power=0.1`" in card
    assert jlt.load(tmp_path / "power", "power=0.1").weights == "power-0.1"


def test_the_card_states_values_settings_and_how_they_came_about(run: Path, tmp_path: Path) -> None:
    publish(run, "org/small", license="apache-2.0", to=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: apache-2.0" in front
    assert "library_name: jlt" in front
    size = sum(parameter.numel() for parameter in jlt.load(run).model.parameters())
    for fact in (
        f"{size:,} parameters", "predicts `x`", "3 x 4 x 4", "step 1,234", 'jlt.load("org/small")', "`ema-0.9`",
        "± 7.5", "steps 12", "jlt evaluate run latents", "an abacus", "| learning_rate | 0.002 |",
        "name logit-normal", "![Samples](samples.png)", "ant, bee",
    ):  # fmt: skip
        assert fact in card, fact
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1].replace("org/small", str(tmp_path / "out")), found)  # the snippet that a reader copies
    assert found["images"].shape == (2, 3, 4, 4)


def test_a_run_without_a_record_says_that_nothing_was_measured(run: Path, tmp_path: Path) -> None:
    publish(run / "checkpoints" / "step-00001234", "org/small", ["model"], to=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured." in card
    assert 'jlt.load("org/small", weights="model")' in card


def test_the_upload_is_the_folder_and_its_failure_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
            calls.append((repository, private, exist_ok))
            return "https://hub/org/small"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            if repo_id == "org/refused":
                raise RuntimeError("401\nnot allowed")
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert publish(run, "org/small", private=True) == "https://hub/org/small"
    assert calls == [("org/small", True, True)]
    publish(run, "org/small", to=tmp_path / "out")
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert names == sorted(
        str(p.relative_to(tmp_path / "uploaded")) for p in (tmp_path / "uploaded").rglob("*") if p.is_file()
    )
    assert all(files.sha256(tmp_path / "out" / n) == files.sha256(tmp_path / "uploaded" / n) for n in names)
    with pytest.raises(ValueError, match=r"^org/refused was not uploaded: 401 not allowed$"):
        publish(run, "org/refused")


def test_an_upload_that_is_not_to_be_is_refused_first(run: Path, tmp_path: Path) -> None:
    for name in ("small", "org/small@main", "a/b/c"):
        with pytest.raises(ValueError, match=f"must be ORG/NAME, got {name}"):
            publish(run, name, to=tmp_path / "out")
    with pytest.raises(ValueError, match="is not an empty folder"):
        publish(run, "org/small", to=run)
    (run / "checkpoints" / "step-00001234" / "ema-0.9.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="has SHA-256"):
        publish(run, "org/small", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()
