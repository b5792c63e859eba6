"""Every stage on a second device (far_device.py): what is built, moved and measured in which order, and no step that
waits for the device."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from far_device import FarDevice, install

from vocabshrink.training import loop
from vocabshrink.training.losses import LOSSES

SHORT = {"steps": 1, "batch_size": 8, "max_length": 48, "precision": "no", "evaluations": 0}
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PHASE = {"epochs": 1, "steps": 1, "batch_size": 8, "precision": "no"}


def losses_of(place: str) -> dict:
    """Every loss that the stage can compute, those of layers by a map of its own."""
    return {name: 1.0 for name, loss in LOSSES.items() if place in loss.stands_in and name != "bank_similarity"}


GROUPS = {"unit": "sentence", "group_size": 4, "mask": 0.15}
RECIPES = {
    "joint": {
        "masked_lm_head": SHORT,
        "dual": SHORT | {"mode": "joint", "losses": losses_of("joint"), "optimizer": "lamb"},
        "distill": SHORT | GROUPS | {"losses": losses_of("distill")},
        "recovery": SHORT | GROUPS | {"losses": {"group_similarity": 20, "sentence_cosine": 0.5}},
        "finetune": {
            "teacher": PHASE,
            "phases": [PHASE | {"losses": losses_of("finetune")}, PHASE | {"through_rounding": True}],
            "rounded": "int8",
            "augment": {"copies": 1, "candidates": 2},
        },
    },
    "match": {
        "dual": SHORT | GROUPS | {"mode": "match", "losses": losses_of("match")},
        "student": NARROW | {"initialize": "extract_importance"},
    },
    "two_stage": {"dual": SHORT | {"mode": "two_stage"}, "distill": SHORT | {"losses": {"hidden_mse": 1}}},
    "vectors": {  # all that mpnet_7mb.yaml asks for: another model's layers, fitted, and a factorised table
        "vocabulary": {"tokenizer": "start"},
        "student": {
            "initialize": "extract_importance",
            "intermediate_size": 32,
            "embedding_size": 16,
            "calibration": 8,
        },
        "vectors": {"sentences": 60, "max_length": 48},
        "distill": SHORT | {"losses": {"bank_similarity": 1.0, "sentence_cosine": 1.0}},
    },
}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # which keeps its values here
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_on_another_device(name, tiny_teacher, headless_teacher, corpus_file, lines, tmp_path, monkeypatch):
    from vocabshrink.cli import app

    monkeypatch.chdir(tmp_path)
    rows = [{"sentence1": line, "label": int("ka" in line.lower())} for line in lines[:40]]
    for split, part in {"train": rows[:24], "validation": rows[24:]}.items():
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = {
        "name": name,
        "teacher": {"model": str(headless_teacher if "masked_lm_head" in RECIPES[name] else tiny_teacher)},
        "corpus": {"sources": [str(corpus_file)], "held_out_every": 8, "processes": 1},
        "vocabulary": {"size": 160},
        "student": NARROW,
        "evaluation": {"sentences": 20 if name != "two_stage" else 0},
        "delivery": {"weights": "int4-32", "max_positions": 48, "tolerance": 2} if name == "joint" else None,
    } | RECIPES[name]
    if name == "vectors":
        recipe["student"] = recipe["student"] | {"start": str(tiny_teacher)}
        recipe["vectors"] = recipe["vectors"] | {"teachers": {"second": {"model": str(headless_teacher)}}}
    if "finetune" in recipe:
        recipe["tasks"] = {"made_up": {"train": "train.jsonl", "validation": "validation.jsonl"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    install(monkeypatch)
    device, steps, take_step = FarDevice(), [], loop.take_step

    def counted(*arguments):
        before = len(device.reads)
        found = take_step(*arguments)
        steps.append(device.reads[before:])
        return found

    monkeypatch.setattr(loop, "take_step", counted)
    with device:
        app(["run", "recipe.yaml"], standalone_mode=False)
    assert steps and not any(steps), steps
    assert device.reads  # of losses that are logged, and of what evaluation measures


def test_the_device_is_one(monkeypatch):
    """Guards these tests: mixed tensors are refused and reads counted, as on a GPU."""
    with FarDevice() as device:
        far, mask = torch.arange(4.0).to("meta"), torch.tensor([True, False, True, False])
        with pytest.raises(RuntimeError, match="add: tensors on the device and, of shapes"):
            far + torch.ones(4)
        assert (far * 2).device.type == "meta" and not device.reads
        assert far[mask.to("meta")].sum().item() == 2 and len(device.reads) == 2
        assert far.cpu().tolist() == [0, 1, 2, 3] and len(device.reads) == 3
