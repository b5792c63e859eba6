"""A kit goes to a host that has nothing else, is trained on, and comes back as a model."""

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import yaml
from gpu import ablation, kit, train

from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.models.student import read_student

DISTILL = {"steps": 2, "batch_size": 8, "max_length": 48, "precision": "no"}


@pytest.mark.parametrize("stored", [True, False])
def test_a_kit_trains_where_nothing_else_is(stored, tiny_teacher, corpus_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, corpus = shutil.copytree(tiny_teacher, "teacher"), shutil.copy(corpus_file, "text.txt")
    recipe = {
        "teacher": {"model": str(teacher)},
        "corpus": {"processes": 1, "held_out_every": 4},
        "student": {"initialize": "extract_importance", "intermediate_size": 32},
        "evaluation": {"sentences": 0},
        "delivery": None,
        "distill": DISTILL | {"losses": {"bank_similarity" if stored else "batch_similarity": 1.0}},
    }
    if stored:
        recipe["student"] |= {"start": str(shutil.copytree(tiny_teacher, "start")), "embedding_size": 16}
        recipe |= {"vocabulary": {"tokenizer": "start"}, "vectors": {"sentences": 80, "max_length": 48}}
    else:
        recipe["vocabulary"] = {"size": 160}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"name": "made_up"}))
    packing = {"recipe": tmp_path / "recipe.yaml", "teacher": None, "part_bytes": 100_000, "no_wheels": True, "set": []}
    kit.pack(Namespace(corpus=[corpus], out=tmp_path / "parts", ablations=False, **packing))
    for gone in ("teacher", "start", "artifacts"):
        shutil.rmtree(gone, ignore_errors=True)
    (tmp_path / "text.txt").unlink()
    parts, host = sorted((tmp_path / "parts").iterdir()), tmp_path / "host"
    assert len(parts) > 1
    for part in parts:
        shutil.move(part, tmp_path / "arrived" / part.name)
        assert kit.unpack(tmp_path / "arrived", host) == (part == parts[-1])
    wall = {"minutes": 0.0, "reserve": 0.0, "probe_steps": 3, "work": tmp_path / "work", "overrides": []}
    train.train(Namespace(kit=host, out=tmp_path / "shards", **wall))
    train.join(tmp_path / "shards", tmp_path / "student")
    trained, joined = (read_student(tmp_path / place) for place in ("work/run/distill/student", "student"))
    assert type(joined) is type(trained) and (tmp_path / "student/tokenizer.json").is_file()
    for name, value in trained.state_dict().items():
        assert torch.equal(value.half().float(), joined.state_dict()[name]), name


def test_a_kit_has_what_an_ablation_needs(tiny_teacher, corpus_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, corpus = shutil.copytree(tiny_teacher, "teacher"), shutil.copy(corpus_file, "text.txt")
    rows = [{"sentence1": f"the {word} of the day", "label": word} for word in ("north", "south")] * 8
    (tmp_path / "data/wind").mkdir(parents=True)
    (tmp_path / "data/wind/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phase = {
        "epochs": 1,
        "batch_size": 8,
        "max_length": 32,
        "learning_rate": 1e-3,
        "precision": "no",
        "losses": {"labels": 1},
    }
    base = {
        "name": "base",
        "teacher": {"model": str(teacher), "sha256": "0" * 64},  # in fp16 it is another
        "corpus": {"sources": [], "processes": 1, "held_out_every": 4},
        "vocabulary": {"size": 160},
        "student": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        "masked_lm_head": {"steps": 1, "mask": 0.15, "batch_size": 8, "max_length": 48, "precision": "no"},
        "dual": DISTILL | {"mask": 0.15, "mode": "joint", "losses": {"teacher_masked_lm": 1, "student_masked_lm": 1}},
        "distill": DISTILL | {"mask": 0.15, "losses": {"student_masked_lm": 1}},
        "data": "data",
        "tasks": {"wind": {"train": "wind/rows.jsonl", "validation": "wind/rows.jsonl"}},
        "finetune": {"phases": [phase], "save_models": False},
        "evaluation": {"sentences": 0},
        "delivery": None,
    }
    variants = {"alone": {"dual": None}, "dual": {"distill": None}, "neither": {"dual": None, "distill": None}}
    about = {"name": "made_up", "title": "Made up", "base": "base.yaml", "baseline": "alone", "variants": variants}
    for name, content in {"base": base, "table": about}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    packing = {"recipe": tmp_path / "base.yaml", "teacher": None, "part_bytes": 100_000, "no_wheels": True, "set": []}
    kit.pack(Namespace(corpus=[corpus], out=tmp_path / "parts", ablations=True, words=10**6, **packing))
    for gone in ("teacher", "data"):
        shutil.rmtree(gone)
    (tmp_path / "text.txt").unlink()
    assert kit.unpack(tmp_path / "parts", tmp_path / "host")
    given = ["ablation.py", "--kit", "host", "--out", "out", "--work", "work", "--file", "table.yaml", "dual.steps=3"]
    monkeypatch.setattr("sys.argv", given)
    ablation.main()
    found = json.loads((tmp_path / "out/masked_words.json").read_text())
    assert found["neither"]["masked_words"] is None and found["neither"]["tokens"] == 0
    assert 0 <= found["dual"]["masked_words"] <= 1 and 0 <= found["alone"]["masked_words"] <= 1
    assert json.loads((tmp_path / "out/summary.json").read_text())["finished"] == 3
    assert "neither" in (tmp_path / "out/table.md").read_text()


class Parrot:
    """Says the pieces of one text, whatever it is given, but for a word of it."""

    def __init__(self, ids: list[int]):
        self.ids = torch.tensor(ids)

    def to(self, device):
        return self

    def __call__(self, ids, mask):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(self.ids).expand(len(ids), -1, -1))


def test_a_masked_word_counts_where_all_of_its_pieces_are_named(tiny_teacher, monkeypatch):
    encoding = load_tokenizer(tiny_teacher).encode("the traveller came")
    words = [place for place, word in enumerate(encoding.word_ids) if word == 1]
    assert len(words) > 1 and encoding.word_ids[-2] == 2
    found = {}
    for name, wrong in {"nothing": [], "a piece": words[-1:], "a word": words}.items():
        said = [0 if place in wrong else piece for place, piece in enumerate(encoding.ids)]
        monkeypatch.setattr(ablation, "load_model", lambda folder, loader, said=said: Parrot(said))
        found[name] = ablation.masked_words(tiny_teacher, ["the traveller came"] * 400)
    assert found["nothing"] == 1 and found["a piece"] == found["a word"] == pytest.approx(2 / 3, abs=0.1)
