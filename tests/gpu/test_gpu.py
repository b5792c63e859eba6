"""What only a GPU can show: `pytest -m gpu tests/gpu` (a minute). Elsewhere skipped; with VOCABSHRINK_REHEARSE=1 the
same code runs on the CPU to its end, without what only a GPU has."""

import contextlib
import os

import pytest
import torch
from tiny_training import encode, make_batcher, perturb
from torch import nn

from vocabshrink.models.student import build_student, new_student_head
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DistillStage, StudentSection
from vocabshrink.training import loop
from vocabshrink.training.loop import Job, make_accelerator, read_meta, train
from vocabshrink.training.task import Distillation

REHEARSED = os.environ.get("VOCABSHRINK_REHEARSE") == "1"
HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_GPU or REHEARSED), reason="no GPU: pytest -m gpu on a host that has one"),
]
STEPS = 50
LOSSES = {"hidden_mse": 1.0, "batch_similarity": 10.0, "value_relations": 1.0, "student_masked_lm": 0.01}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# How far a loss may be from that of float32 without TF32, relative, over 50 steps; in bf16 it is 1.2e-4 on a CPU
BOUNDS = {"no": 1e-4, "tf32": 1e-3, "bf16": 3e-3, "fp16": 1e-3}


@pytest.fixture(scope="module")
def words(lines, tiny_teacher, tmp_path_factory):
    return encode(lines, tiny_teacher, tmp_path_factory.mktemp("words"))


@contextlib.contextmanager
def without_waiting():
    """A step that waits for the GPU raises."""
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")


def parts(tiny_teacher, words, stage: DistillStage) -> tuple:
    """(task, batcher, teacher) of a distillation of the tiny models, on the CPU."""
    vocabulary, encoded = words
    torch.manual_seed(0)
    teacher = load_teacher(str(tiny_teacher))
    perturb(teacher.backbone)  # as made, its layers add next to nothing, and so do their errors
    student, directions, *_ = build_student(StudentSection(**SHAPE), teacher, vocabulary)
    head = new_student_head(student, teacher)
    task = Distillation(stage, teacher, student, layer_pairs("uniform", 2, 4), head=head, directions=directions)
    return task, make_batcher(encoded, teacher, ("student", "teacher"), batch_size=16, mask=0.15), teacher


def trace(tiny_teacher, words, folder, *, precision="no", stop_at=None, optimizer="adamw") -> list[float]:
    """The losses of 50 steps; stop_at: a batch at which the run is killed."""
    stage = DistillStage(
        steps=STEPS,
        batch_size=16,
        max_length=42,
        learning_rate=1e-3,
        losses=LOSSES,
        precision="no" if precision == "tf32" else precision,
        mask=0.15,
        evaluations=0,
        optimizer=optimizer,
        checkpoint_minutes=1e-9,
    )
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    task, batcher, _ = parts(tiny_teacher, words, stage)
    if stop_at is not None:
        batch = batcher.batch

        def stopping(index):
            if index == stop_at:
                raise KeyboardInterrupt
            return batch(index)

        batcher.batch = stopping
    run = RunDir(folder)
    accelerator = make_accelerator(stage, run)
    assert accelerator.device.type == ("cuda" if HAS_GPU else "cpu")
    train(task, batcher, stage, Job(run, "distill", "f"), accelerator)
    return [row["loss"] for row in run.metrics()]


@pytest.fixture(scope="module")
def plain(tiny_teacher, words, tmp_path_factory):
    return trace(tiny_teacher, words, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("precision", BOUNDS)
def test_losses_of_a_precision_are_those_of_float32(precision, plain, tiny_teacher, words, tmp_path):
    if precision == "fp16" and not HAS_GPU:
        pytest.skip("fp16 needs a GPU")
    found = trace(tiny_teacher, words, tmp_path, precision=precision)
    assert len(found) == len(plain) == STEPS and plain[-1] < 0.95 * plain[0]
    worst = max(abs(ours - theirs) / theirs for ours, theirs in zip(found, plain, strict=True))
    print(f"{precision}: {worst:.2g} from float32's losses at most")
    assert worst <= BOUNDS[precision]


@torch.no_grad()
def test_the_first_loss_is_that_of_the_cpu(plain, tiny_teacher, words):
    task, batcher, _ = parts(tiny_teacher, words, DistillStage(steps=1, losses=LOSSES, mask=0.15))
    weights = task.weights(0)
    losses = task(batcher.batch(0))
    assert plain[0] == pytest.approx(sum(weights[name] * float(loss) for name, loss in losses.items()), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(optimizer, tiny_teacher, words, tmp_path):
    """Within the last bits: sums over pieces have no fixed order on a GPU."""
    whole = trace(tiny_teacher, words, tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        trace(tiny_teacher, words, tmp_path / "stopped", optimizer=optimizer, stop_at=30)
    assert 28 <= read_meta(tmp_path / "stopped/distill/checkpoints/last")["step"] <= 30
    resumed = trace(tiny_teacher, words, tmp_path / "stopped", optimizer=optimizer)
    assert resumed == pytest.approx(whole, rel=1e-4 if HAS_GPU else 0)


def test_no_step_waits_for_the_device(tiny_teacher, words, tmp_path, monkeypatch):
    take_step, taken = loop.take_step, []

    def watched(*arguments):
        taken.append(1)
        if len(taken) < 3:  # the first ones compile and allocate
            return take_step(*arguments)
        with without_waiting():
            return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", watched)
    trace(tiny_teacher, words, tmp_path, precision="bf16")
    assert len(taken) == STEPS


def test_fused_attention_gives_eager_s_states(folders):
    from vocabshrink.data.batches import Pieces
    from vocabshrink.models.forward import run_backbone

    device = "cuda" if HAS_GPU else "cpu"
    for family, folder in folders.items():
        backbone: nn.Module = load_teacher(str(folder)).backbone.to(device)
        ids, lengths = torch.randint(5, 200, (8, 30)), torch.tensor([30, 3, 17, 30, 8, 9, 22, 5])
        mask = (torch.arange(30) < lengths[:, None]).long()
        side = Pieces(torch.where(mask.bool(), ids, backbone.config.pad_token_id or 0), mask, ids)
        _ = side.lengths
        states = []
        for attention in ("eager", "sdpa") if family != "mpnet" else ("eager",):
            backbone.set_attn_implementation(attention)
            with torch.no_grad():
                states.append(run_backbone(backbone, side.to(device)).hidden[-1][mask.bool().to(device)])
        torch.testing.assert_close(states[-1], states[0], atol=1e-4, rtol=1e-4, msg=family)


@pytest.mark.parametrize("name", ["joint", "match", "two_stage", "vectors"])
def test_one_step_of_every_stage(name, tiny_teacher, headless_teacher, corpus_file, lines, tmp_path, monkeypatch):
    """The recipes of tests/stages/test_placement.py, with no second device but the real one."""
    import test_placement

    monkeypatch.setattr(test_placement, "install", lambda monkeypatch: None)
    monkeypatch.setattr("vocabshrink.stages.deliver.report", lambda context: {})  # the host has nothing to draw with
    monkeypatch.setattr("vocabshrink.cli.show_summary", lambda summary: None)
    monkeypatch.setattr(test_placement, "FarDevice", Nothing)
    test_placement.test_a_run_on_another_device(
        name, tiny_teacher, headless_teacher, corpus_file, lines, tmp_path, monkeypatch
    )


class Nothing(contextlib.nullcontext):
    """No device but the real one: nothing is counted."""

    @property
    def reads(self):
        return self

    def __len__(self):
        return 0

    def __getitem__(self, _):
        return []

    def __bool__(self):
        return True
