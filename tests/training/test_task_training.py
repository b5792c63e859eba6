"""Task models: transformers' own heads and files, and training that reads a teacher only as far as it must."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import wordpiece_pieces
from tiny_training import NARROW, perturb
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import make_tokenizer, save_tokenizer
from vocabshrink.data.batches import Pieces
from vocabshrink.data.tasks import Rows, Task, TaskBatcher, encode_task
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.student import build_student, save_model
from vocabshrink.models.teacher import CLASSIFIERS, load_task_model, load_teacher, predict, student_model, task_logits
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import Phase, StudentSection
from vocabshrink.stages import tasks
from vocabshrink.stages.tasks import fit
from vocabshrink.training.loop import Job
from vocabshrink.training.task import TaskTraining

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
FAMILIES = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**SHAPE, max_position_embeddings=40),
    "xlm-roberta": XLMRobertaConfig(**SHAPE, max_position_embeddings=40),
    "camembert": CamembertConfig(**SHAPE, max_position_embeddings=40),
    "mpnet": MPNetConfig(**SHAPE, max_position_embeddings=40),
    "electra": ElectraConfig(**SHAPE, embedding_size=8),
    "albert": AlbertConfig(**SHAPE, embedding_size=8),
    "distilbert": DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=40),
}
LOADERS = {"classification": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


def a_task(lines: list[str], kind: str = "classification", *, pairs: bool = False, rows: int = 24) -> Task:
    """Three labels (or a score, or a tag a token) for made-up rows."""
    rng, lines = np.random.default_rng(0), [" ".join(line.split()[:5]) for line in lines]
    first = [line.split() if kind == "tokens" else line for line in lines[:rows]]
    targets = {
        "classification": rng.integers(0, 3, rows),
        "regression": rng.random(rows) * 5,
        "tokens": [rng.integers(0, 3, len(row)) for row in first],
    }[kind]
    split = Rows(first, lines[rows : 2 * rows] if pairs else None, targets)
    names = [] if kind == "regression" else ["O", "B-x", "I-x"] if kind == "tokens" else ["no", "maybe", "yes"]
    return Task("toy", kind, names, {"train": split, "validation": split}, ["accuracy"])


@pytest.fixture(scope="module")
def vocabulary(lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 150)), folder)
    return folder


def batcher_of(task, teacher, vocabulary, folder, **options) -> TaskBatcher:
    encoded = encode_task(task, teacher, vocabulary, folder)
    options = {"batch_size": 8, "seed": 0, "sides": ("student", "teacher"), "max_pieces": 60} | options
    return TaskBatcher(encoded, "train", **options)


def a_student(task, teacher_folder, vocabulary, shape=NARROW, seed=0):
    torch.manual_seed(seed)
    body, directions, _, _ = build_student(StudentSection(**shape), load_teacher(str(teacher_folder)), vocabulary)
    return student_model(body, task, teacher_folder), body, directions


def a_teacher(task, teacher_folder):
    torch.manual_seed(5)
    model = load_task_model(str(teacher_folder), task, trained=False)
    perturb(model)
    return model


# ------------------------------------------------------------------------------------------------ models


@torch.no_grad()
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_logits_are_those_of_transformers(family, kind):
    assert set(FAMILIES) == set(CLASSIFIERS)
    torch.manual_seed(0)
    config = FAMILIES[family].__class__.from_dict(FAMILIES[family].to_dict() | {"num_labels": 3})
    model = LOADERS[kind].from_config(config).eval()
    perturb(model)
    ids = torch.randint(5, 40, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6], [9]])).long()
    hidden = run_backbone(model.base_model, Pieces(ids, mask, ids)).hidden[-1]
    torch.testing.assert_close(task_logits(model, hidden, kind), model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens"])
def test_a_student_s_model_is_its_body_with_the_task_s_labels(kind, lines, tiny_teacher, vocabulary):
    task = a_task(lines, kind)
    model, body, _ = a_student(task, tiny_teacher, vocabulary)
    for name, value in body.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value)
    assert model.config.id2label == ({0: "score"} if kind == "regression" else dict(enumerate(task.labels)))
    again, other = (a_student(task, tiny_teacher, vocabulary, seed=seed)[0].classifier.weight for seed in (0, 1))
    assert torch.equal(model.classifier.weight, again)
    assert not torch.equal(model.classifier.weight, other)


def test_the_pooler_is_the_teacher_s_where_it_has_one_of_this_shape(lines, tiny_teacher, vocabulary, tmp_path):
    task, teacher = a_task(lines), a_teacher(a_task(lines), tiny_teacher)
    save_model(tmp_path / "with", teacher, tiny_teacher)
    pooler = teacher.bert.pooler.dense.weight
    of = {
        (folder, width): student_model(
            a_student(task, tiny_teacher, vocabulary, {"hidden_size": width})[1], task, folder
        ).bert.pooler.dense.weight
        for folder, width in ((tmp_path / "with", 32), (tmp_path / "with", 16), (tiny_teacher, 32))
    }
    assert torch.equal(of[tmp_path / "with", 32], pooler)
    assert of[tmp_path / "with", 16].shape == (16, 16)
    assert not torch.equal(of[tiny_teacher, 32], pooler)  # it has none, and the student's is random


@torch.no_grad()
@pytest.mark.parametrize("kind, pairs", [("classification", False), ("classification", True), ("regression", True)])
def test_what_is_saved_loads_unchanged_and_agrees_on_text(kind, pairs, lines, tiny_teacher, vocabulary, tmp_path):
    task = a_task(lines, kind, pairs=pairs)
    model, _, _ = a_student(task, tiny_teacher, vocabulary)
    perturb(model)
    batcher = batcher_of(task, tiny_teacher, vocabulary, tmp_path / "encoded")
    found = predict(model, batcher, precision="no")
    save_model(tmp_path / "model", model, vocabulary)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == model.config.id2label
    rows = task.splits["train"]
    inputs = tokenizer(rows.first, rows.second, return_tensors="pt", padding=True)
    np.testing.assert_allclose(found, loaded(**inputs).logits.numpy(), atol=1e-5)
    assert found.shape == (len(rows), 1 if kind == "regression" else 3)


@torch.no_grad()
def test_taggers_are_saved_too_and_answer_for_every_token(lines, tiny_teacher, vocabulary, tmp_path):
    task = a_task(lines, "tokens")
    model, _, _ = a_student(task, tiny_teacher, vocabulary)
    perturb(model)
    save_model(tmp_path / "model", model, vocabulary)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found = predict(model, batcher_of(task, tiny_teacher, vocabulary, tmp_path / "encoded"), precision="no")
    for tokens, logits in zip(task.splits["train"].first, found, strict=True):
        inputs = tokenizer(tokens, is_split_into_words=True, return_tensors="pt")
        words = inputs.word_ids()
        first = [words.index(number) for number in range(len(tokens))]
        np.testing.assert_allclose(logits, loaded(**inputs).logits[0, first].numpy(), atol=1e-5)


def test_a_fine_tuned_teacher_is_checked(lines, tiny_teacher, tmp_path):
    task = a_task(lines)
    save_model(tmp_path / "right", a_teacher(task, tiny_teacher), tiny_teacher)
    loaded = load_task_model(str(tmp_path / "right"), task, trained=True)
    assert loaded.config.id2label == dict(enumerate(task.labels)) and not loaded.training
    turned = Task("toy", "classification", task.labels[::-1], task.splits, task.metrics)
    with pytest.raises(InputError, match=r"right: its outputs are no, maybe, yes and those of task toy yes, maybe, no"):
        load_task_model(str(tmp_path / "right"), turned, trained=True)
    three = BertForSequenceClassification.from_pretrained(tmp_path / "right")
    three.bert.save_pretrained(tmp_path / "body")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "body" / name).write_bytes((tiny_teacher / name).read_bytes())
    with pytest.raises(InputError, match=r"body: no head for task toy in its weights: name a model fine-tuned"):
        load_task_model(str(tmp_path / "body"), task, trained=True)


def test_a_family_without_a_known_head_is_refused(lines, tiny_teacher, tmp_path):
    from transformers import DebertaV2Config, DebertaV2Model

    DebertaV2Model(DebertaV2Config(**SHAPE | {"vocab_size": 300})).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_teacher / name).read_bytes())
    with pytest.raises(InputError, match=r"deberta-v2 cannot be a task teacher: use one of bert, albert, "):
        load_task_model(str(tmp_path), a_task(lines), trained=False)


def test_a_teacher_of_another_task_gets_a_new_head(lines, tiny_teacher, tmp_path):
    """Intermediate tasks: a model fine-tuned on three labels is a teacher to train on a score."""
    save_model(tmp_path / "three", a_teacher(a_task(lines), tiny_teacher), tiny_teacher)
    model = load_task_model(str(tmp_path / "three"), a_task(lines, "regression"), trained=False)
    assert model.classifier.weight.shape == (1, 32)


# ------------------------------------------------------------------------------------------------ training

EVERYTHING = {"labels": 1.0, "soft_labels": 1.0, "hidden_mse": 1.0, "embedding_mse": 1.0, "attention_scores": 1.0}


def training_of(task, teacher_folder, vocabulary, losses, *, teacher=None, logits=None, shape=NARROW) -> TaskTraining:
    model, _, directions = a_student(task, teacher_folder, vocabulary, shape)
    training = TaskTraining(model, task.kind, teacher=teacher, logits=logits, directions=directions)
    layers = model.config.num_hidden_layers
    training.begin(Phase(losses=losses).losses, layer_pairs("uniform", layers, 4) if teacher else ())
    return training


@pytest.mark.parametrize(
    "losses, live, head, up",
    [
        ({"labels": 1.0}, False, True, False),
        ({"soft_labels": 1.0, "labels": 0.5}, True, True, False),
        ({"hidden_mse": 1.0, "attention_scores": 1.0}, True, False, True),
        (EVERYTHING, True, True, True),
    ],
)
def test_a_phase_trains_what_its_losses_read(losses, live, head, up, lines, tiny_teacher, vocabulary, tmp_path):
    task = a_task(lines, pairs=True)
    training = training_of(task, tiny_teacher, vocabulary, losses, teacher=a_teacher(task, tiny_teacher))
    assert training.live == live
    batch = batcher_of(task, tiny_teacher, vocabulary, tmp_path).batch(0)
    values = training(batch)
    assert set(values) == set(losses) and all(torch.isfinite(value) for value in values.values())
    sum(values.values()).backward()
    trained = {name for name, p in training.named_parameters() if p.requires_grad}
    assert not {name for name in trained if training.get_parameter(name).grad is None}
    assert {"student.classifier.weight", "student.bert.pooler.dense.weight"} <= trained or not head
    assert head or not any("classifier" in name or "pooler" in name for name in trained)
    assert ("up.weight" in trained) == up
    assert not any(name.startswith("teacher.") for name in trained)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classification", "regression", "tokens"])
def test_agreement_with_the_teacher_is_zero(kind, lines, tiny_teacher, tmp_path):
    """A student that is its teacher, on the teacher's vocabulary."""
    task = a_task(lines, kind, pairs=kind != "tokens")
    teacher = a_teacher(task, tiny_teacher)
    losses = ["hidden_mse", "embedding_mse", "attention_scores", "attention_kl", "value_relations", "logits_mse"]
    losses += [] if kind == "regression" else ["soft_labels"]
    training = training_of(task, tiny_teacher, tiny_teacher, dict.fromkeys(losses, 1.0), teacher=teacher, shape={})
    training.student.load_state_dict(teacher.state_dict())
    for name, value in training(batcher_of(task, tiny_teacher, tiny_teacher, tmp_path).batch(1)).items():
        assert abs(float(value)) < 1e-6, name


@torch.no_grad()
def test_stored_logits_are_worth_the_live_teacher(lines, tiny_teacher, vocabulary, tmp_path):
    task = a_task(lines, pairs=True)
    teacher, losses = a_teacher(task, tiny_teacher), {"soft_labels": 1.0, "logits_mse": 1.0, "labels": 1.0}
    batcher = batcher_of(task, tiny_teacher, vocabulary, tmp_path)
    logits = torch.from_numpy(predict(teacher, batcher, side="teacher", precision="no"))
    live = training_of(task, tiny_teacher, vocabulary, losses, teacher=teacher)
    stored = training_of(task, tiny_teacher, vocabulary, losses, logits=logits)
    assert live.live and not stored.live
    without_teacher = batcher_of(task, tiny_teacher, vocabulary, tmp_path, sides=("student",))
    for index in range(4):
        expected, found = live(batcher.batch(index)), stored(without_teacher.batch(index))
        for name in losses:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_stored_logits_go_before_those_of_a_teacher_that_runs(lines, tiny_teacher, vocabulary, tmp_path):
    """A user's logits stay the target in a phase that also reads the teacher's layers."""
    task = a_task(lines)
    logits = torch.randn(len(task.splits["train"]), 3)
    teacher, losses = a_teacher(task, tiny_teacher), {"hidden_mse": 1.0, "logits_mse": 1.0}
    training = training_of(task, tiny_teacher, vocabulary, losses, teacher=teacher, logits=logits)
    batch = batcher_of(task, tiny_teacher, vocabulary, tmp_path).batch(0)
    forward = training.view(batch)
    assert torch.equal(forward.teacher.logits, logits[batch.rows])
    assert len(forward.teacher.hidden) == 5


def test_a_later_phase_starts_where_the_one_before_ended(lines, tiny_teacher, vocabulary):
    task = a_task(lines)
    training = training_of(task, tiny_teacher, vocabulary, {"hidden_mse": 1.0}, teacher=a_teacher(task, tiny_teacher))
    before = {name: value.clone() for name, value in training.state_dict().items()}
    training.begin(Phase(losses={"soft_labels": 1.0}).losses, layer_pairs("last", 2, 4))
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
    assert training.pairs == ((1, (3,)), (2, (4,))) and not training.up.weight.requires_grad


def test_dropout_stays_off(lines, tiny_teacher, vocabulary, tmp_path):
    task = a_task(lines)
    training = training_of(task, tiny_teacher, vocabulary, EVERYTHING, teacher=a_teacher(task, tiny_teacher))
    training.train()
    batch = batcher_of(task, tiny_teacher, vocabulary, tmp_path).batch(0)
    first, second = training(batch), training(batch)
    assert all(torch.equal(first[name], second[name]) for name in EVERYTHING)


# ------------------------------------------------------------------------------------------------ phases


def fitted(lines, tiny_teacher, vocabulary, folder, phases):
    task = a_task(lines)
    encoded = encode_task(task, tiny_teacher, vocabulary, folder / "encoded")
    training = TaskTraining(a_student(task, tiny_teacher, vocabulary)[0], task.kind)
    return fit(training, encoded, phases, Job(RunDir(folder), "toy", "f", "finetune.phases.{}"), 1)


def test_a_phase_that_goes_wrong_names_its_own_learning_rate(lines, tiny_teacher, vocabulary, tmp_path):
    good = Phase(epochs=1, batch_size=8, precision="no", learning_rate=1e-3)
    bad = good.model_copy(update={"learning_rate": 3e38})
    with pytest.raises(InputError, match=r"seed-1-phase-2: .* lower finetune\.phases\.1\.learning_rate \(now 3e\+38"):
        fitted(lines, tiny_teacher, vocabulary, tmp_path, [good, bad])


def test_processes_that_do_not_divide_a_phase_s_batch_are_refused(
    lines, tiny_teacher, vocabulary, tmp_path, monkeypatch
):
    """Else three processes of a batch of 32 would train on 30 rows a step."""
    monkeypatch.setattr(tasks, "make_accelerator", lambda *arguments: SimpleNamespace(num_processes=3))
    with pytest.raises(InputError, match=r"finetune\.phases\.0\.batch_size 32 cannot be shared by 3 processes"):
        fitted(lines, tiny_teacher, vocabulary, tmp_path, [Phase(epochs=1)])
