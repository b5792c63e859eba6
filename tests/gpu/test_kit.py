"""A kit goes to a host that has nothing else, is trained on, and comes back as a model."""

import shutil
from argparse import Namespace

import pytest
import torch
import yaml
from gpu import kit, train

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
    kit.pack(Namespace(corpus=[corpus], out=tmp_path / "parts", **packing))
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
