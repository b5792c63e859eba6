"""The latency that the headline table prints. The table itself is checked on whole runs in test_pipeline.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from vocabshrink.models.forward import ModuleSettings
from vocabshrink.stages import deliver
from vocabshrink.stages.deliver import TIMED_SENTENCES, latency, teacher_latency


def test_latency_is_the_median_of_single_sentences_after_warming_up(monkeypatch):
    calls, seconds = [], [0.0]
    monkeypatch.setattr(deliver, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def embed(texts):
        calls.append(texts)
        seconds[0] += 0.05 if len(calls) <= 3 else 0.002  # a slow start must not count

    figure = latency(embed, [f"sentence {i}" for i in range(1000)])
    assert figure == pytest.approx(2)
    assert len(calls) == TIMED_SENTENCES + 3
    assert all(len(texts) == 1 for texts in calls)


def change_nothing(folder: Path) -> None:
    pass


def save_half(folder: Path) -> None:
    BertModel.from_pretrained(folder).half().save_pretrained(folder)


def shard(folder: Path) -> None:
    BertModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def lengthen_table(folder: Path) -> None:
    BertModel(BertConfig(vocab_size=320, hidden_size=32, num_attention_heads=4)).save_pretrained(folder)


def change_activation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))


@pytest.mark.parametrize(
    "change,words",
    [
        (change_nothing, None),
        (save_half, None),
        (shard, None),
        (lengthen_table, "300 pieces in tokenizer.json and 320"),
        (change_activation, "hidden_act 'mish'"),
    ],
)
def test_a_teacher_that_cannot_be_exported_has_no_latency(headless_teacher, tmp_path, lines, capsys, change, words):
    folder = Path(shutil.copytree(headless_teacher, tmp_path / "teacher"))
    change(folder)
    found = teacher_latency(folder, lines[:5], ModuleSettings())
    said = capsys.readouterr().err
    if words is None:
        assert found["teacher"] > 0 and not said
    else:
        assert found == {} and "the teacher's latency is left out: " in said and words in said


def test_an_optional_figure_fails_no_delivery(headless_teacher, tmp_path, lines, capsys, monkeypatch):
    """Whatever the export of a stranger stumbles over; and only what would be loaded is weighed."""

    def too_large(*_):
        raise ValueError("The Protobuf size exceeds 2 GB")

    monkeypatch.setattr(deliver, "export_model", too_large)
    assert teacher_latency(headless_teacher, lines[:5], ModuleSettings()) == {}
    assert "latency is left out: The Protobuf size" in capsys.readouterr().err
    folder = Path(shutil.copytree(headless_teacher, tmp_path / "teacher"))
    (folder / "other.safetensors").write_bytes(b"x" * 1000)
    delivered = SimpleNamespace(embed=None, manifest={"delivery_bytes": 1})
    delivered.embed = lambda texts, **_: list(texts)
    found = {"load": delivered, "load_model": torch.nn.Identity(), "torch_embedder": delivered.embed, "latency": 1.0}
    for name, value in found.items():
        monkeypatch.setattr(deliver, name, lambda *_, value=value, **__: value)
    held_out = SimpleNamespace(
        texts=lines[:5], rank_agreement=lambda *_: 1.0, neighbour_overlap=lambda *_: {"neighbour_overlap": 1.0}
    )
    folders = dict.fromkeys(("untrained", "trained", "delivered"), folder) | {"teacher": folder}
    found = deliver.measure_systems(held_out, {}, folders, ModuleSettings())
    assert found["bytes"] == {"teacher": (folder / "model.safetensors").stat().st_size, "delivered": 1}
    assert found["latency_ms"] == {"delivered": 1.0}


@pytest.mark.parametrize("family", ["distilbert", "roberta", "albert"])
def test_a_teacher_of_another_family_has_no_latency(folders, lines, capsys, family):
    assert teacher_latency(folders[family], lines[:5], ModuleSettings()) == {}
    assert "encoders can be exported" in capsys.readouterr().err
