"""Dual training: what moves in each mode, which table predicts which piece, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from conftest import wordpiece_pieces
from tiny_training import NARROW, PLAIN, encode, make_batcher, mean_loss, perturb
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModel

from tokenizer_build.tokenizer import make_tokenizer, save_tokenizer
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.student import build_student
from vocabshrink.models.teacher import MaskedLMHead, load_teacher
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DualStage, StudentSection, TrainingSection, Weighted
from vocabshrink.training.loop import Job, make_accelerator, train
from vocabshrink.training.losses import LOSSES, readers
from vocabshrink.training.task import DualTraining, HeadTraining

COMPARING = {name for name in readers(LOSSES, "teacher") if LOSSES[name].stands_in >= {"joint", "match"}}
SIDES = {"joint": ("mixed", "student"), "two_stage": ("mixed",), "match": ("mixed", "teacher")}
EQUAL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def words(lines, tiny_teacher, tmp_path_factory):
    """(folder of the student's vocabulary, folder of lexicon and stream)."""
    return encode(lines, tiny_teacher, tmp_path_factory.mktemp("words"))


def make(words, teacher_folder, mode, shape=NARROW, **changed):
    """(task, batcher, stage)"""
    stage = DualStage(**({"steps": 30, "mode": mode, "learning_rate": 3e-3} | PLAIN | changed))
    torch.manual_seed(0)
    teacher = load_teacher(str(teacher_folder))
    student, directions, _, _ = build_student(StudentSection(**shape), teacher, words[0])
    head = None
    if mode == "joint":
        head = MaskedLMHead(student.config.hidden_size, student.config.hidden_size, student.config.vocab_size)
    depth = teacher.config.num_hidden_layers
    pairs = layer_pairs("uniform", depth if mode == "match" else 2, depth)
    task = DualTraining(stage, teacher, student, pairs, student_head=head, directions=directions)
    mask = 0.0 if mode == "match" else 0.15
    batcher = make_batcher(words[1], teacher, SIDES[mode], mask=mask, p=lambda index: stage.p)
    return task, batcher, stage


def backward(task, batcher) -> None:
    sum(task(batcher.batch(0)).values()).backward()


def moving(task) -> set[str]:
    """Names of the parameters whose gradient is not nothing."""
    return {name for name, p in task.named_parameters() if p.grad is not None and bool(p.grad.any())}


def names_under(task, *prefixes) -> set[str]:
    return {name for name, _ in task.named_parameters() if name.startswith(prefixes)}


TABLE = "student.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("mode", "losses", "all_read"),
    [
        ("joint", ["teacher_masked_lm", "student_masked_lm"], True),
        ("joint", ["teacher_masked_lm", "hidden_mse"], False),  # the last layers might be under no pair of the map
        ("joint", ["batch_similarity", "student_masked_lm"], False),  # nothing reads the mixed input's map up
        ("two_stage", ["teacher_masked_lm"], True),
        ("match", ["hidden_mse"], True),
    ],
)
def test_processes_look_for_parameters_without_a_gradient_where_there_may_be_some(
    mode, losses, all_read, words, tiny_teacher
):
    task, batcher, _ = make(words, tiny_teacher, mode, losses=dict.fromkeys(losses, 1.0))
    assert task.reads_all == all_read
    backward(task, batcher)
    unread = {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}
    assert not (unread and all_read) and bool(unread) == ("batch_similarity" in losses)


@pytest.mark.parametrize("shape", [NARROW, EQUAL])
@pytest.mark.parametrize("mode", ["joint", "two_stage", "match"])
def test_what_has_a_gradient(mode, shape, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, mode, shape)
    perturb(task)
    backward(task, batcher)
    up = names_under(task, "embedding.up")  # an affine map where widths differ, else nothing
    assert len(up) == (2 if shape is NARROW else 0)
    teacher = names_under(task, "teacher.", "teacher_head.") | {"student_bias"}
    expected = {
        "joint": teacher | up | names_under(task, "student.", "head.", "projections.up"),
        "two_stage": teacher | up | {TABLE},
        "match": up | {TABLE},
    }[mode]
    # A key's bias moves nothing: softmax is blind to it, but for rounding. The rest must match exactly.
    blind = {name for name in expected if name.endswith("key.bias")}
    assert moving(task) - blind == expected - blind
    waiting = {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}
    assert not waiting, "processes would wait for these"
    assert {name for name, p in task.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize(
    "losses",
    [
        {"student_masked_lm": 1.0, "teacher_masked_lm": 1.0, "hidden_mse": {"weight": 1.0, "direction": "down"}},
        {"student_masked_lm": 1.0, "teacher_masked_lm": 1.0, "batch_similarity": 1.0, "parameters_down": 1.0},
        {"student_masked_lm": 1.0, "hidden_cosine": 1.0, "parameters_up": 1.0, "parameters_down": 1.0},
        {"teacher_masked_lm": 1.0, "hidden_mse": 1.0, "sentence_cosine": 1.0},
        {"teacher_masked_lm": 1.0, "attention_kl": 1.0, "value_relations": 1.0, "hidden_mse": 1.0},
        {name: 1.0 for name in LOSSES if "joint" in LOSSES[name].stands_in},
    ],
)
@pytest.mark.parametrize("shape", [NARROW, EQUAL])
def test_no_parameter_waits_for_a_gradient_that_never_comes(losses, shape, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, "joint", shape, losses=losses)
    found = task(batcher.batch(0))
    assert found.keys() == losses.keys() and all(torch.isfinite(v) and v > 0 for v in found.values())
    sum(found.values()).backward()
    assert not {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_the_teacher_does_not_learn_from_the_student(name, words, tiny_teacher):
    """In joint mode its states are targets, whatever the loss reads; only masked LM moves it."""
    task, batcher, _ = make(words, tiny_teacher, "joint", losses={name: 1.0, "teacher_masked_lm": 1.0})
    loss = task(batcher.batch(0))[name]
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert moving(task) and not moving(task) & names_under(task, "teacher.", "teacher_head.")


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_every_comparison_serves_in_match_mode(name, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, "match", losses={name: 1.0})
    loss = task(batcher.batch(0))[name]
    loss.backward()
    assert torch.isfinite(loss) and loss > 0 and TABLE in moving(task)


def test_a_teacher_that_is_not_trained_stays(words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, "two_stage", train_teacher=False)
    backward(task, batcher)
    assert moving(task) == names_under(task, "embedding.up") | {TABLE, "student_bias"}


@pytest.mark.parametrize("mode", ["joint", "two_stage", "match"])
def test_the_loss_falls_and_only_what_may_move_has_moved(mode, words, tiny_teacher, tmp_path):
    rate = 3e-3 if mode == "match" else 1e-2
    task, batcher, stage = make(words, tiny_teacher, mode, learning_rate=rate)
    before, loss_before = {name: value.clone() for name, value in task.state_dict().items()}, mean_loss(task, batcher)
    run = RunDir(tmp_path)
    train(task, batcher, stage, Job(run, "dual", "f"), make_accelerator(stage, run))
    assert len(run.metrics()) == 30
    assert mean_loss(task, batcher) < 0.95 * loss_before
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    if mode == "match":
        assert moved == {TABLE, "embedding.student_table.weight"} | {
            f"{place}.{kind}" for place in ("up", "embedding.up") for kind in ("weight", "bias")
        }
    else:
        assert {"teacher.encoder.layer.0.output.dense.weight", TABLE, "embedding.up.weight"} <= moved
        assert ("student.encoder.layer.0.output.dense.weight" in moved) == (mode == "joint")


@torch.no_grad()
def test_the_vocabulary_that_segmented_a_word_predicts_it(words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, "two_stage")
    task.student_bias.normal_()
    task.teacher_head.bias.normal_()
    first, batch = task.embedding.teacher_table.num_embeddings, batcher.batch(3)
    labels = batch.mixed.labels
    hidden = run_backbone(task.teacher, batch.mixed, embeddings=task.embedding(batch.mixed.ids)).hidden[-1]
    terms = {"teacher": [], "student": []}
    for row, column in (labels >= 0).nonzero().tolist():
        label, state = int(labels[row, column]), task.teacher_head.transform(hidden[row, column])
        if label < first:
            scores = task.embedding.teacher_table.weight @ state + task.teacher_head.bias
            terms["teacher"].append(-F.log_softmax(scores, 0)[label])
        else:
            rows = task.embedding.up(task.student.get_input_embeddings().weight)
            terms["student"].append(-F.log_softmax(rows @ state + task.student_bias, 0)[label - first])
    assert len(terms["teacher"]) > 3 and len(terms["student"]) > 3
    expected = torch.stack(terms["teacher"] + terms["student"]).mean()
    torch.testing.assert_close(task(batch)["teacher_masked_lm"], expected)


@pytest.mark.parametrize("p", [0.0, 1.0])
@torch.no_grad()
def test_mixing_is_the_teachers_or_the_students_segmentation(p, words, tiny_teacher):
    task, batcher, _ = make(words, tiny_teacher, "match", p=p)
    batch, first = batcher.batch(1), task.embedding.teacher_table.num_embeddings
    side = batch.mixed
    last = side.attention_mask.sum(1, keepdim=True) - 1
    words = (side.units > 0) & (torch.arange(side.units.shape[1]) < last)  # neither [CLS] nor [SEP], nor padding
    assert bool(((side.ids[words] >= first) == bool(p)).all())
    losses = task(batch)
    assert losses.keys() == {"hidden_mse", "batch_similarity", "sentence_cosine"}
    for name, value in losses.items():  # agreement is worth nothing
        assert (float(value) < 1e-6) == (p == 0), name


def test_a_teacher_whose_table_is_narrower_than_its_layers(lines, tmp_path):
    """ALBERT: the map up of pieces and the map up of hidden states are two."""
    folder = tmp_path / "albert"
    save_tokenizer(make_tokenizer(wordpiece_pieces(lines, 300)), folder)
    config = AlbertConfig(
        vocab_size=300,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    AlbertForMaskedLM(config).save_pretrained(folder)
    words = encode(lines, folder, tmp_path)
    shape = NARROW | {"hidden_size": 8}
    losses = {"teacher_masked_lm": 1.0, "student_masked_lm": 1.0, "hidden_mse": 1.0, "sentence_cosine": 1.0}
    for mode, chosen in (("joint", losses), ("match", None)):
        task, batcher, _ = make(words, folder, mode, shape, losses=chosen)
        assert task.embedding.up.weight.shape == (16, 8) and task.up.weight.shape == (32, 8)
        backward(task, batcher)
        assert not {name for name, p in task.named_parameters() if p.requires_grad and p.grad is None}


def test_head_training_trains_the_head_alone(words, tiny_teacher, tmp_path):
    AutoModel.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((tiny_teacher / name).read_bytes())
    teacher = load_teacher(str(tmp_path / "m"))
    assert teacher.head is None
    torch.manual_seed(0)
    teacher.head = MaskedLMHead(32, 32, 300)
    task = HeadTraining(teacher, {"teacher_masked_lm": Weighted()})
    body = {name: value.clone() for name, value in teacher.backbone.state_dict().items()}
    stage, run = TrainingSection(steps=30, learning_rate=0.1, **PLAIN), RunDir(tmp_path / "run")
    batcher = make_batcher(words[1], teacher, ("teacher",), mask=0.3)
    loss_before = mean_loss(task, batcher)
    train(task, batcher, stage, Job(run, "teacher", "f"), make_accelerator(stage, run))
    assert mean_loss(task, batcher) < 0.95 * loss_before
    assert all(torch.equal(value, body[name]) for name, value in teacher.backbone.state_dict().items())
    assert task.embedding_parameters() == []
