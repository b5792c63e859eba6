"""Seeds decide everything: two recipes with every stage between them give the recorded losses and files.

Integers (vocabulary, word stream) must be the recorded bytes everywhere. Floating sums depend on the processor's
kernels, so losses are compared closely, and they and the deliveries exactly where processor and torch are those of the
recording. To record anew, after a change that is meant to change training: python tests/test_reproduces.py
"""

import hashlib
import json
import platform
import sys
from pathlib import Path

import pytest
import torch
import yaml

GOLDEN = Path(__file__).parent / "golden" / "runs.json"
TRAINING = {"steps": 20, "batch_size": 16, "max_length": 48, "learning_rate": 1e-3, "precision": "no", "evaluations": 1}
NEAR = {"unit": "sentence", "group_size": 4}
NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PHASE = {"epochs": 4, "steps": 20, "batch_size": 16, "precision": "no", "learning_rate": 1e-3}
LAYERS = {"attention_scores": 1, "hidden_mse": 1, "embedding_mse": 1}
RECIPES = {
    "joint": {
        "masked_lm_head": TRAINING,
        "dual": TRAINING | {"mode": "joint", "p_end": 1.0, "optimizer": "lamb"},
        "distill": TRAINING | {"mask": 0.15, "losses": LAYERS | {"student_masked_lm": 1, "masked_lm_match": 1}},
        "recovery": TRAINING | NEAR | {"losses": {"group_similarity": 20, "sentence_cosine": 0.5}},
        "student": NARROW,
        "finetune": {
            "teacher": PHASE,
            "phases": [PHASE | {"losses": LAYERS}, PHASE | {"losses": {"soft_labels": 1}}],
            "augment": {"copies": 2, "candidates": 3},
        },
    },
    "match": {
        "dual": TRAINING | NEAR | {"mode": "match"},
        "distill": TRAINING
        | {"losses": {"value_relations": 1, "attention_kl": 1, "hidden_cosine": {"weight": 1, "start": 0}}},
        "student": NARROW | {"initialize": "extract_importance"},
    },
}
FILES = ["vocab/vocab.txt", "vocab/tokenizer.json", "encode/word_ids.npy", "encode/line_offsets.npy"]
FILES += ["encode/lexicon.safetensors", "encode/words.jsonl"]
FLOATING = ["export/model/onnx/model_q4.onnx", "export/model/index/vectors.npy"]


def machine() -> dict:
    """What decides the last bits of a sum."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "torch": torch.__version__}


def run(name: str, teacher: Path, corpus: Path, lines: list[str], folder: Path) -> dict:
    """{"losses": {training: its 20 losses}, "sha256": {file: digest}} of a recipe run in `folder`."""
    from vocabshrink.cli import app

    words = ["ka", "lo", "mi"]
    rows = [{"sentence1": line, "label": int(any(w in line.lower().split() for w in words))} for line in lines[:120]]
    for split, part in {"train": rows[:80], "validation": rows[80:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "passages.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:9]))
    recipe = {
        "name": name,
        "teacher": {"model": str(teacher)},
        "corpus": {"sources": [str(corpus)], "held_out_every": 8, "processes": 1},
        "vocabulary": {"size": 160},
        "evaluation": {"sentences": 30},
        "delivery": {"weights": "int4-32", "max_positions": 48, "tolerance": 2},
        "index": {"passages": str(folder / "passages.jsonl")},
    } | RECIPES[name]
    if "finetune" in recipe:
        recipe |= {
            "data": str(folder),
            "tasks": {"made_up": {"train": "train.jsonl", "validation": "validation.jsonl"}},
        }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    app(["run", str(folder / "recipe.yaml")], standalone_mode=False)
    made = Path("artifacts") / name
    losses: dict[str, list[float]] = {}
    for path in [made / "metrics.jsonl", *sorted(made.glob("*/made_up/**/metrics.jsonl"))]:
        for row in map(json.loads, path.read_text().splitlines()):
            if row["kind"] == "train":
                losses.setdefault(row["stage"], []).append(row["loss"])
    digests = {file: hashlib.sha256((made / file).read_bytes()).hexdigest() for file in FILES + FLOATING}
    return {"losses": losses, "sha256": digests}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recorded_run(name, headless_teacher, corpus_file, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded = json.loads(GOLDEN.read_text())
    found, wanted = run(name, headless_teacher, corpus_file, lines, tmp_path), recorded["runs"][name]
    assert {file: found["sha256"][file] for file in FILES} == {file: wanted["sha256"][file] for file in FILES}
    assert list(found["losses"]) == list(wanted["losses"])
    for stage, losses in wanted["losses"].items():
        assert len(losses) == 20
        assert found["losses"][stage] == pytest.approx(losses, rel=1e-3), stage
    if recorded["machine"] == machine():
        assert found == wanted


def record() -> None:
    """Write the recording, by the fixtures' own functions."""
    import os
    import tempfile

    import conftest

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        lines = conftest.made_up_text()
        (place / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for folder in ("teacher", "headless", *RECIPES):
            (place / folder).mkdir()
        conftest.make_teacher(lines, place / "teacher")
        conftest.remove_head(place / "teacher", place / "headless")
        runs = {}
        for name in RECIPES:
            os.chdir(place / name)
            runs[name] = run(name, place / "headless", place / "corpus.txt", lines, place / name)
    GOLDEN.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(record())
