"""A teacher's kept answers: the losses of the live teacher, read without running it again."""

import math

import pytest
import torch
from tiny_training import NARROW, PLAIN, encode, make_batcher, perturb

from tokenizer_build.errors import InputError
from vocabshrink.models.student import build_student
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.engine import Run, run_stage
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, StudentSection, parse_recipe
from vocabshrink.training.distillation import Distillation
from vocabshrink.training.losses import ATTENTION, LOSSES, readers
from vocabshrink.training.recorded import RecordingBatcher

NOT_KEPT = set(readers(LOSSES, "pieces"))
SENTENCES = {"sentence_cosine", "group_similarity", "batch_similarity"}
LAYERS = {"hidden_mse": 1.0, "batch_similarity": 1.0}
KEPT = sorted({*readers(LOSSES, "hidden", *ATTENTION), *SENTENCES} - NOT_KEPT)


@pytest.fixture(scope="module")
def encoded(lines, tiny_teacher, tmp_path_factory):
    return encode(lines, tiny_teacher / "tokenizer.json", tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def parts(encoded, tiny_teacher, tmp_path):
    """A function of losses: (task, batcher, recording batcher), on two vocabularies, groups of four."""

    def make(losses):
        vocabulary, folder = encoded
        stage = DistillStage(steps=4, batch_size=8, group_size=4, losses=losses, layer_map="uniform", **PLAIN)
        torch.manual_seed(0)
        teacher = load_teacher(str(tiny_teacher))
        student, directions, _ = build_student(
            StudentSection(**NARROW | {"num_attention_heads": 4}), teacher, vocabulary
        )
        perturb(student)
        task = Distillation(stage, teacher, student, layer_pairs("uniform", 2, 4), directions=directions)
        batcher = make_batcher(folder, teacher, ("student", "teacher"), group_size=4)
        return task, batcher, RecordingBatcher(batcher, task, tmp_path / "kept", "no")

    return make


@pytest.mark.parametrize("loss", KEPT)
def test_kept_answers_give_the_losses_of_the_live_teacher(loss, parts):
    task, batcher, recording = parts({loss: 1.0})
    with torch.no_grad():
        for index in (0, 3):
            live, kept = task(batcher.batch(index))[loss], task(recording.batch(index))[loss]
            assert kept.item() == pytest.approx(live.item(), rel=5e-3, abs=1e-5)  # float16


def test_all_losses_that_can_be_kept_are(parts):
    assert set(KEPT) | NOT_KEPT | {"student_masked_lm"} >= set(LOSSES) - {
        "teacher_masked_lm",
        "parameters_down",
        "parameters_up",
        "labels",
        "soft_labels",
        "logits_mse",
    }


def test_the_teacher_runs_once(parts, tmp_path, monkeypatch):
    task, _, recording = parts({"hidden_mse": 1.0, "sentence_cosine": 1.0})
    first = task(recording.batch(1))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["1.safetensors"]
    monkeypatch.setattr(task, "run", None)
    again = recording.batch(1)
    with pytest.raises(TypeError):
        recording.batch(2)
    monkeypatch.undo()
    assert task(again) == first


def test_recovery_records_too(tiny_teacher, corpus_file, tmp_path):
    """A run whose `recovery` reads what its `distill` recorded: the same batches of the same teacher."""
    stage = {"steps": 3, "batch_size": 16, "max_length": 48, "precision": "no", "evaluations": 0, "losses": LAYERS}
    recipe = {
        "name": "recorded",
        "teacher": {"model": str(tiny_teacher)},
        "corpus": {"sources": [str(corpus_file)], "held_out_every": 8, "processes": 1},
        "vocabulary": {"size": 160},
        "evaluation": {"sentences": 30},
        "delivery": {"weights": "int8", "max_positions": 48},
        "distill": stage | {"learning_rate": 1e-3, "record_teacher": True},
        "recovery": stage | {"learning_rate": 1e-4, "record_teacher": True},
    }
    run = Run(parse_recipe(recipe, "test"), RunDir(tmp_path))
    for name in ("count", "vocab", "encode", "distill", "recovery"):
        assert run_stage(run, name)
    (folder,) = tmp_path.glob("teacher-*")
    assert sorted(path.name for path in folder.iterdir()) == [f"{step}.safetensors" for step in range(3)]
    losses = [row["loss"] for row in run.dir.metrics() if (row["stage"], row["kind"]) == ("recovery", "train")]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_gradients_reach_the_student(parts):
    task, _, recording = parts({"hidden_mse": 1.0, "attention_scores": 1.0, "batch_similarity": 1.0})
    sum(task(recording.batch(0)).values()).backward()
    assert all(p.grad is not None for name, p in task.student.named_parameters() if "layer.0" in name)
    assert all(p.grad is None for p in task.teacher.parameters())


def test_what_reads_pieces_is_refused(parts):
    for loss in NOT_KEPT - {"masked_lm_match", "masked_lm_reduce"}:
        with pytest.raises(InputError, match=f"losses.{loss} reads the teacher piece by piece"):
            parts({loss: 1.0})
