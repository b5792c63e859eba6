"""Distillation: the teacher never moves, the student does, and agreement is worth nothing."""

import pytest
import torch
from tiny_training import NARROW, PLAIN, encode, make_batcher, mean_loss
from transformers import BertForMaskedLM

from vocabshrink.distillation import Distillation
from vocabshrink.layer_map import layer_pairs
from vocabshrink.lexicon import encode_corpus
from vocabshrink.loop import make_accelerator, train
from vocabshrink.recipe import DistillStage, StudentSection
from vocabshrink.run_dir import RunDir
from vocabshrink.student import build_student, save_student
from vocabshrink.teacher import MaskedLMHead, load_teacher

SENTENCES = {"hidden_mse": 1.0, "sentence_cosine": 1.0, "batch_similarity": 1.0}
DOWN = {"weight": 1.0, "direction": "down"}


@pytest.fixture(scope="module")
def words(lines, tiny_teacher, tmp_path_factory):
    """(folder of the student's vocabulary, folder of lexicon and stream)."""
    return encode(lines, tiny_teacher, tmp_path_factory.mktemp("words"))


def make(words, teacher_folder, losses, shape=NARROW, **options):
    """(task, batcher, stage)"""
    stage = DistillStage(**({"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "losses": losses} | PLAIN | options))
    torch.manual_seed(0)
    teacher = load_teacher(str(teacher_folder))
    student, directions, _ = build_student(StudentSection(**shape), teacher, words[0])
    width = student.config.hidden_size
    head = MaskedLMHead(width, width, student.config.vocab_size) if "student_masked_lm" in losses else None
    pairs = layer_pairs(stage.layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    task = Distillation(stage, teacher, student, pairs, head=head, directions=directions)
    batcher = make_batcher(words[1], teacher, ("student", "teacher"), mask=stage.mask, group_size=stage.group_size)
    return task, batcher, stage


@pytest.mark.parametrize(
    "losses",
    [
        SENTENCES,
        {"hidden_cosine": DOWN, "embedding_mse": 1.0},
        {"hidden_normalized": 1.0, "student_masked_lm": 0.1},
        {"group_similarity": 1.0, "sentence_cosine": 1.0},
    ],
)
def test_the_student_learns_and_the_teacher_never_moves(losses, words, tiny_teacher, tmp_path):
    options = {"mask": 0.15} if "student_masked_lm" in losses else {}
    options |= {"group_size": 4} if "group_similarity" in losses else {}
    task, batcher, stage = make(words, tiny_teacher, losses, **options)
    before, loss_before = {name: value.clone() for name, value in task.state_dict().items()}, mean_loss(task, batcher)
    run = RunDir(tmp_path)
    train(task, batcher, stage, run, "distill", fingerprint="f", accelerator=make_accelerator(stage, run))
    assert mean_loss(task, batcher) < 0.8 * loss_before
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith("teacher.")}
    weights = {name for name in before if name.startswith("student.") and name.endswith("weight")}
    assert len(weights) > 15 and weights <= moved


@pytest.mark.parametrize(
    "losses, reads",
    [
        ({"hidden_mse": 1.0}, {"up"}),
        ({"hidden_mse": DOWN}, {"down"}),
        ({"hidden_mse": 1.0, "hidden_cosine": DOWN}, {"up", "down"}),
        ({"hidden_mse": DOWN, "batch_similarity": 1.0}, {"down"}),
        ({"hidden_mse": DOWN, "sentence_cosine": 1.0}, {"up", "down"}),
        ({"embedding_mse": 1.0, "batch_similarity": 1.0}, {"up"}),
        ({"batch_similarity": 1.0}, set()),
        ({"student_masked_lm": 1.0}, set()),
    ],
)
def test_helpers_that_no_loss_reads_are_frozen(losses, reads, words, tiny_teacher):
    options = {"mask": 0.15} if "student_masked_lm" in losses else {}
    task, batcher, _ = make(words, tiny_teacher, losses, **options)
    helpers = {name.split(".")[0] for name, p in task.named_parameters() if p.requires_grad}
    assert helpers - {"student", "head"} == reads
    sum(task(batcher.batch(0)).values()).backward()
    assert not {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}
    assert all(p.grad is None for p in task.teacher.parameters())


def test_agreement_is_zero(lines, tiny_teacher, tmp_path):
    """A student that is its teacher, on the teacher's own vocabulary: every distance is nothing."""
    encode_corpus([lines], tiny_teacher, tiny_teacher, tmp_path)
    names = (
        "hidden_mse",
        "hidden_cosine",
        "hidden_normalized",
        "embedding_mse",
        "sentence_cosine",
        "group_similarity",
        "batch_similarity",
    )
    task, batcher, _ = make((tiny_teacher, tmp_path), tiny_teacher, dict.fromkeys(names, 1.0), {}, group_size=4)
    assert isinstance(task.up, torch.nn.Identity) and isinstance(task.down, torch.nn.Identity)
    for index in range(3):
        for name, value in task(batcher.batch(index)).items():
            assert abs(float(value.detach())) < 1e-6, name


@torch.no_grad()
def test_the_masked_lm_loss_is_that_of_transformers(words, tiny_teacher, tmp_path):
    task, batcher, _ = make(words, tiny_teacher, {"student_masked_lm": 1.0}, mask=0.15)
    for parameter in task.head.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    save_student(tmp_path / "student", task.student, task.head, words[0], "mean", True)
    reference = BertForMaskedLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    side = batcher.batch(2).student
    assert int((side.labels >= 0).sum()) > 5
    expected = reference(input_ids=side.ids, attention_mask=side.attention_mask, labels=side.labels).loss
    torch.testing.assert_close(task(batcher.batch(2))["student_masked_lm"], expected)


def test_dropout_stays_off(words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, SENTENCES)
    task.train()
    assert not any(module.training for module in task.modules())
    first, second = (task(batcher.batch(0)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in SENTENCES)
    assert task.embedding_parameters()[0] is task.student.get_input_embeddings().weight
