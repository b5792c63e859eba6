"""The loop: its optimizer against the paper's formulas, and stopped, split or shared runs against whole ones."""

import itertools
import re
import sys
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from tiny_training import PLAIN, NumberBatcher, Numbers, Regression, encode, launch, run_both
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.run.engine import wait_for_everyone
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import TrainingSection, Weighted
from vocabshrink.training import loop
from vocabshrink.training.loop import (
    Job,
    Lamb,
    make_accelerator,
    micro_batch,
    parameter_groups,
    rate_at,
    read_meta,
    resume,
    train,
)

TIMES = ("seconds", "tokens_per_second")


def settings(**changed) -> TrainingSection:
    return TrainingSection(**({"steps": 12, "learning_rate": 0.05} | PLAIN | changed))


def run_training(folder, task=None, batcher=None, *, fingerprint="f", section="", evaluate=None, clock=None, **changed):
    """(task, result, run) of a training of the small regression."""
    run, chosen, task = RunDir(folder), settings(**changed), task or Regression()
    job, accelerator = Job(run, "distill", fingerprint, section), make_accelerator(chosen, run)
    clock = clock or itertools.count().__next__  # a second passes whenever it is looked at
    result = train(task, batcher or NumberBatcher(), chosen, job, accelerator, evaluate, clock)
    return task, result, run


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_weights(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    theirs = second.state_dict()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------- optimizer and schedule


def test_lamb_is_algorithm_2_of_the_paper():
    """You et al. 2020, written out with numbers: two steps of a matrix, a vector of zeros and an unused one."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.zeros(4), torch.ones(2)]
    gradients = [[torch.randn(w.shape, generator=generator) for w in start[:2]] for _ in range(2)]
    parameters = [nn.Parameter(w.clone()) for w in start]
    rate, beta1, beta2, eps, decay = 0.1, 0.8, 0.95, 1e-6, 0.02
    optimizer = Lamb(parameters, lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    weights, m, v = [w.double() for w in start], [0.0, 0.0], [0.0, 0.0]
    for step in (1, 2):
        for index, gradient in enumerate(gradients[step - 1]):
            parameters[index].grad = gradient.clone()
            g = gradient.double()
            m[index] = beta1 * m[index] + (1 - beta1) * g
            v[index] = beta2 * v[index] + (1 - beta2) * g**2
            r = (m[index] / (1 - beta1**step)) / ((v[index] / (1 - beta2**step)) ** 0.5 + eps)
            update = r + decay * weights[index]
            norm, size = weights[index].norm(), update.norm()
            ratio = norm / size if norm > 0 and size > 0 else 1.0
            weights[index] = weights[index] - rate * ratio * update
        optimizer.step()
        for parameter, expected in zip(parameters, weights, strict=True):
            torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(parameters[2], start[2]) and parameters[2] not in optimizer.state


def test_lamb_step_has_the_length_of_the_weights():
    weight = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    weight.grad = 1e3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    before = weight.detach().clone()
    Lamb([weight], lr=0.01).step()
    assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_rate_rises_then_decays(decay):
    chosen = settings(steps=100, warmup=0.1, decay=decay)
    rates = [rate_at(step, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and max(rates) == 1.0 and min(rates) > 0
    if decay == "constant":
        assert set(rates[9:]) == {1.0}
    else:
        assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[55] == pytest.approx(0.5) and rates[99] < 0.02
        assert rates[99] == pytest.approx(1 / 90 if decay == "linear" else 0.0003, abs=1e-4)


def test_rate_without_warm_up_and_with_nothing_else():
    assert rate_at(0, settings(steps=1)) == 1.0
    assert [rate_at(s, settings(steps=4, warmup=1.0)) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_parameter_groups():
    task = Regression()
    groups = parameter_groups(task, settings(embedding_learning_rate=0.4, weight_decay=0.03))
    found = {
        name: (group["lr"], group["peak"], group["weight_decay"])
        for group in groups
        for p in group["params"]
        for name, q in task.named_parameters()
        if p is q
    }
    assert found == {
        "first.weight": (0.05, 0.05, 0.03),
        "second.weight": (0.05, 0.05, 0.03),
        "first.bias": (0.05, 0.05, 0.0),
        "second.bias": (0.05, 0.05, 0.0),
        "table.weight": (0.4, 0.4, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == 5
    same = parameter_groups(task, settings())
    assert {group["lr"] for group in same} == {0.05}
    with pytest.raises(InputError, match="nothing to train"):
        parameter_groups(task.requires_grad_(False), settings())


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_trains_and_logs_unweighted_losses(tmp_path):
    seen = []
    task, result, run = run_training(
        tmp_path, steps=40, evaluations=3, evaluate=lambda task: seen.append(task) or {"agreement": 0.5}
    )
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 41))
    first, last = rows[0], rows[-1]
    fresh, batch = Regression(), NumberBatcher().batch(0)
    expected = {name: float(value.detach()) for name, value in fresh(batch).items()}
    assert first["losses"] == pytest.approx(expected)
    assert first["loss"] == pytest.approx(expected["squares"] + expected["absolute"])  # the second starts at 1.0
    weight = 1.0 - 0.5 * 39 / 40  # and ends at 0.5
    assert last["loss"] == pytest.approx(last["losses"]["squares"] + weight * last["losses"]["absolute"])
    mean = lambda rows: sum(row["losses"]["squares"] for row in rows) / len(rows)  # noqa: E731
    assert mean(rows[-8:]) < 0.8 * mean(rows[:8])
    assert [row["step"] for row in run.metrics() if row["kind"] == "evaluation"] == [10, 20, 30, 40]
    assert seen == [task] * 4 and result["evaluation"] == {"agreement": 0.5}
    assert run_training(tmp_path, steps=40, evaluate=lambda task: {"agreement": 0.7})[1]["evaluation"] == {
        "agreement": 0.7  # measured anew behind the last step, where a killed run may stand
    }
    assert result["steps"] == 40 and result["tokens"] == 320 and result["losses"] == last["losses"]
    assert rows[0]["lr"] == 0.05 and rows[20]["lr"] == pytest.approx(0.025) and last["tokens"] == 320


def test_the_first_step_is_adamws(tmp_path):
    """One step of the loop against torch by hand: clipped gradient, rate, decay."""
    task, _, run = run_training(tmp_path, steps=1, clip=0.1)
    by_hand, batch = Regression(), NumberBatcher().batch(0)
    losses = by_hand(batch)
    (losses["squares"] + losses["absolute"]).backward()
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    norm = torch.stack([p.grad.norm() for p in trained]).norm()
    assert norm > 0.1 and run.metrics()[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for p in trained:
        p.grad *= 0.1 / (norm + 1e-6)
    torch.optim.AdamW(parameter_groups(by_hand, settings())).step()
    assert_same_weights(task, by_hand, 1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_run_that_was_not_stopped(optimizer, accumulation, tmp_path):
    options = {
        "optimizer": optimizer,
        "gradient_accumulation": accumulation,
        "evaluations": 2,
        "batch_size": 8,
        "checkpoint_minutes": 1e-9,
        "warmup": 0.2,
    }

    def evaluate(task):
        return {"norm": task.first.weight.norm().item()}

    whole, result, whole_run = run_training(
        tmp_path / "whole", batcher=NumberBatcher(accumulation), evaluate=evaluate, **options
    )
    stop = NumberBatcher(accumulation, stop_at=7 * accumulation)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "stopped", batcher=stop, evaluate=evaluate, **options)
    checkpoint = tmp_path / "stopped" / "distill" / "checkpoints" / "last"
    reached = read_meta(checkpoint)["step"]
    assert 5 <= reached <= 7
    # rows of steps after the checkpoint, which a crash may leave, are written anew
    RunDir(tmp_path / "stopped").append_metrics({"stage": "distill", "step": reached + 1, "kind": "train"})
    torch.manual_seed(1234)
    task = Regression()
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    task, resumed, run = run_training(
        tmp_path / "stopped", task=task, batcher=NumberBatcher(accumulation), evaluate=evaluate, **options
    )
    assert_same_weights(whole, task)
    assert timeless(run.metrics()) == timeless(whole_run.metrics())
    assert timeless([resumed]) == timeless([result])


def test_a_run_stopped_after_its_last_step_has_its_result(tmp_path):
    task, result, run = run_training(tmp_path)
    again, resumed, _ = run_training(tmp_path, batcher=NumberBatcher(stop_at=0))
    assert timeless([resumed]) == timeless([result]) and len(run.metrics()) == 12
    assert_same_weights(task, again)


def test_accumulated_halves_are_the_whole_batch(tmp_path):
    whole, _, whole_run = run_training(tmp_path / "whole", batch_size=8)
    halves, _, run = run_training(tmp_path / "halves", batcher=NumberBatcher(2), batch_size=8, gradient_accumulation=2)
    assert_same_weights(whole, halves, 2e-5)
    for ours, theirs in zip(run.metrics(), whole_run.metrics(), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5)
        assert ours["tokens"] == theirs["tokens"]


class Poisoned(Regression):
    """A loss that is not a number, or a gradient that is not, from one input on."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, batch):
        losses = super().forward(batch)
        self.calls += 1
        if self.calls == 6:
            if self.kind == "loss":
                losses["squares"] = losses["squares"] * float("nan")
            else:
                losses["squares"] = losses["squares"] + (self.second.bias[0] * 0).sqrt()
        return losses


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(kind, tmp_path):
    with pytest.raises(InputError, match=r"distill: the loss is .* at step 6 .*checkpoint of step 5 is kept") as e:
        run_training(tmp_path, task=Poisoned(kind), checkpoint_minutes=1e-9)
    assert "lower distill.learning_rate (now 0.05)" in str(e.value)
    checkpoint = tmp_path / "distill" / "checkpoints" / "last"
    assert read_meta(checkpoint)["step"] == 5
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    with pytest.raises(InputError, match="at step 6 .*no checkpoint yet"):
        run_training(tmp_path / "other", task=Poisoned(kind))


@pytest.mark.parametrize("section", ["", "finetune.phases.1"])
def test_parameters_that_are_not_finite_are_no_success(section, tmp_path, monkeypatch):
    """The loss of the only step was computed before the step ruined the weights."""
    monkeypatch.setattr(loop, "rate_at", lambda step, settings: 3e38)  # a recipe's own is refused
    key = section or "distill"
    with pytest.raises(
        InputError, match=rf"parameters are not finite after step 1; no checkpoint yet: lower {key}.learning_rate \(now"
    ):
        run_training(tmp_path, section=section, steps=1)
    assert not list(tmp_path.rglob("checkpoints"))


def test_the_remedy_names_the_key_of_the_settings(tmp_path):
    with pytest.raises(InputError, match=r"loss is .*: lower finetune.phases.0.learning_rate \(now 0.05\)"):
        run_training(tmp_path, task=Poisoned("loss"), section="finetune.phases.0")


def test_checkpoints_come_by_the_clock_also_between_logged_steps_of_a_gpu(tmp_path, monkeypatch):
    """There, numbers are looked at where a step is logged (here every tenth) or a checkpoint is due."""
    run, chosen, saved, reduced = RunDir(tmp_path), settings(steps=2000, checkpoint_minutes=1), [], []
    accelerator = make_accelerator(chosen, run)
    accelerator.device_placement = False
    monkeypatch.setattr(type(accelerator), "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Numbers, "to", lambda self, device: self)
    monkeypatch.setattr(loop, "mapped", lambda batch, function: batch)  # there is no memory to pin
    monkeypatch.setattr(type(accelerator), "reduce", lambda self, value, how: reduced.append(1) or value)
    monkeypatch.setattr(loop, "save_checkpoint", lambda folder, task, optimizer, meta, scaler: saved.append(meta))
    seconds = itertools.count(step=10)
    with pytest.raises(KeyboardInterrupt):
        train(
            Regression(),
            NumberBatcher(stop_at=21),
            chosen,
            Job(run, "distill", "f"),
            accelerator,
            clock=seconds.__next__,
        )
    assert [meta["step"] for meta in saved] == [4, 8, 12, 16, 20]  # a step looks twice, at ten seconds a look
    assert all(meta["losses"] for meta in saved) and len(reduced) == 3 * 2  # steps 1, 10 and 20, of two losses


@pytest.mark.parametrize(("steps", "said"), [(6, [1, 6]), (25, [1, 10, 20, 25])])
def test_a_log_says_the_first_and_the_last_step_and_the_time_that_is_left(steps, said, tmp_path, capsys):
    run_training(tmp_path, steps=steps)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == [f"{step}/{steps}" for step in said]
    assert all("tokens/s" in line and line.endswith("min left") for line in lines)
    assert lines[-1].endswith("  0.0 min left")
    # a step looks at the clock twice, and once more before the first
    assert lines[0].endswith(f"  {2 * (steps - 1) / 60:.1f} min left")


def test_a_terminal_shows_a_bar_and_keeps_the_evaluations(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    run_training(tmp_path, steps=6, evaluations=1, evaluate=lambda task: {"accuracy": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    assert "distill step 6: accuracy 0.5000" in [line.rstrip() for line in shown]
    assert re.match(
        r"distill ━+ 100% 0:00:00 step 6/6  loss \d", next(line for line in reversed(shown) if line.strip())
    )
    assert not any("min left" in line for line in shown)  # those lines are for a file


def test_a_batch_is_shared_evenly_or_not_at_all():
    def shared(batch_size, processes, group=1, **changed):
        chosen = settings(batch_size=batch_size, **changed)
        return micro_batch(chosen, SimpleNamespace(num_processes=processes), "finetune.phases.0", group)

    assert shared(12, 3) == 12 and shared(48, 3, 4, gradient_accumulation=2) == 24
    for arguments in ((10, 3), (12, 2, 4)):
        with pytest.raises(InputError, match=r"finetune.phases.0.batch_size .* cannot be shared by .* a multiple of"):
            shared(*arguments)


def test_a_checkpoint_of_another_recipe_or_number_of_processes_is_refused(tmp_path):
    """Losses that compare the sequences of a batch compare those of one process: its share decides them."""
    task, _, run = run_training(tmp_path)
    with pytest.raises(InputError, match="checkpoint of another recipe"):
        run_training(tmp_path, fingerprint="g")
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(InputError, match="last: of 1 processes, each with losses of its part: start as many"):
        resume(task, None, Job(run, "distill", "f"), two)


def test_stages_of_one_process_may_differ_in_precision(tmp_path):
    for precision in ("bf16", "no", "bf16"):
        accelerator = make_accelerator(settings(precision=precision), RunDir(tmp_path))
        assert accelerator.mixed_precision == precision
        assert not accelerator.ddp_handler.broadcast_buffers  # stored logits and spellings, alike in all processes
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        make_accelerator(settings(precision="fp16"), RunDir(tmp_path))


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started and each sees 1"):
        make_accelerator(settings(), RunDir(tmp_path))


def test_bf16_trains(tmp_path):
    task, _, run = run_training(tmp_path, precision="bf16")
    assert all(p.dtype == torch.float32 for p in task.parameters())
    plain = run_training(tmp_path / "plain")[2].metrics()[0]["losses"]
    first = run.metrics()[0]["losses"]
    assert first == pytest.approx(plain, rel=0.03) and first != plain


def test_tensorboard_writes_its_events(tmp_path):
    _, _, run = run_training(
        tmp_path, trackers=["tensorboard"], evaluations=1, evaluate=lambda task: {"agreement": 0.5}
    )
    (events,) = (tmp_path / "distill").glob("events.out.tfevents*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events)).Reload()
    assert {"loss", "lr", "losses/squares", "evaluation/agreement"} <= set(found.Tags()["scalars"])
    assert [scalar.step for scalar in found.Scalars("loss")] == list(range(1, 13))
    assert found.Scalars("loss")[-1].value == pytest.approx(run.metrics()[-2]["loss"])


# ---------------------------------------------------------------------------------------- two processes


def test_two_processes_are_one(tiny_teacher, lines, tmp_path):
    """One batch is one step whatever the number of processes: two processes on the CPU against one.

    A regression and a distillation from the word stream, whose one process accumulates what the two take. Only the
    main process writes.
    """
    vocabulary, encoded = encode(lines, tiny_teacher, tmp_path)
    launch("tiny_training", tmp_path / "two", tiny_teacher, vocabulary, encoded, cwd=tmp_path)
    run_both(tmp_path / "one", tiny_teacher, vocabulary, encoded, accumulation=2)
    two, one = RunDir(tmp_path / "two").metrics(), RunDir(tmp_path / "one").metrics()
    assert len(list((tmp_path / "two").rglob("*.jsonl"))) == 1
    assert [(row["stage"], row["step"]) for row in two] == [(row["stage"], row["step"]) for row in one]
    assert len(two) == 12
    for ours, theirs in zip(two, one, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, abs=1e-4)
        assert ours["tokens"] == theirs["tokens"]  # of both, counted and not guessed from the main process's
    _, _, full = run_training(tmp_path / "full", steps=6, learning_rate=0.05)
    for ours, theirs in zip(two, full.metrics(), strict=False):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
        assert ours["tokens"] == theirs["tokens"]
    assert two[0]["losses"] != two[5]["losses"]
    for stage in ("numbers", "distill"):
        assert read_meta(tmp_path / "two" / stage / "checkpoints" / "last")["step"] == 6


def test_processes_wait_for_the_main_one_s_stages_for_days(monkeypatch):
    """Ten minutes, NCCL's patience, are less than a large corpus takes to count."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **options: asked.append(options) or MagicMock())
    wait_for_everyone()
    assert asked[0]["timeout"] >= timedelta(days=1)


def test_weights_of_losses_are_linear_in_the_run():
    task = Regression()
    task.losses = {"squares": Weighted(weight=3.0), "absolute": Weighted(weight=0.5, start=1.0)}
    assert [task.weights(p) for p in (0.0, 0.5, 1.0)] == [
        {"squares": 3.0, "absolute": 1.0},
        {"squares": 3.0, "absolute": 0.75},
        {"squares": 3.0, "absolute": 0.5},
    ]
