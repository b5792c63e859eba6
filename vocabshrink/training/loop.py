"""The one training loop, over Accelerate: from a laptop's CPU to several GPUs.

A task (task.py) gives named, unweighted losses; a batcher gives the batch of a step. The loop does the rest: precision,
accumulation, clipping, schedule, evaluation, logging, checkpoints and resuming. The learning rate is a function of the
step, and so is the batch, so a resumed run is the run that was not stopped.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Batcher, prefetch
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import TrainingSection
from vocabshrink.training.checkpoint import load_checkpoint, read_meta, save_checkpoint
from vocabshrink.training.task import TrainingTask


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, each tensor's step scaled by its norm. The paper's
    optimizer for batches of thousands; torch has none."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                state, gradient = self.state[parameter], parameter.grad.float()
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(gradient)}
                    state["exp_avg_sq"] = torch.zeros_like(gradient)
                state["step"] += 1
                step, mean, squares = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(gradient, 1 - beta1)
                squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                direction = mean / (1 - beta1**step) / ((squares / (1 - beta2**step)).sqrt() + group["eps"])
                direction = direction + group["weight_decay"] * parameter
                weight, size = parameter.norm(), direction.norm()
                trust = torch.where((weight > 0) & (size > 0), weight / size, torch.ones_like(weight))
                parameter.add_(direction * trust, alpha=-group["lr"])


# fused: one pass over memory instead of eight, which is a fifth of a step of a small batch on a CPU
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "lamb": Lamb}


def rate_at(step: int, settings: TrainingSection) -> float:
    """Share of the peak learning rate at a step (0-based): linear warm-up, then the recipe's decay to zero."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.decay == "constant":
        return 1.0
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 1 - progress if settings.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(task: TrainingTask, settings: TrainingSection) -> list[dict]:
    """Embeddings at their own rate, everything else at the stage's; no decay on vectors. Frozen ones are left out."""
    embeddings = {id(p) for p in task.embedding_parameters()}
    groups: dict[tuple[float, float], list] = {}
    for parameter in (parameter for parameter in task.parameters() if parameter.requires_grad):
        rate, decay = settings.learning_rate, settings.weight_decay if parameter.ndim > 1 else 0.0
        if id(parameter) in embeddings:
            rate, decay = settings.embedding_learning_rate or rate, 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise InputError("nothing to train: every parameter is frozen: check losses and train_teacher")
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def make_accelerator(settings: TrainingSection, run: RunDir) -> Accelerator:
    """The accelerator of a stage. Raises InputError: fp16 without a GPU; processes that do not see each other."""
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision: fp16 needs a GPU: use bf16 or no")
    if settings.threads and not torch.cuda.is_available():
        torch.set_num_threads(settings.threads)
    AcceleratorState._reset_state()  # else the precision of the process' first stage would be every stage's
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        log_with=settings.trackers or None,
        project_dir=str(run.path),
        gradient_accumulation_steps=settings.gradient_accumulation,
        # a loss of lower layers, or of attention alone, leaves parameters behind it without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        # without a GPU, Accelerate does not connect processes unless told to; they would write into one folder
        raise InputError(
            f"{launched} processes were started and each sees {accelerator.num_processes}: without a GPU, set "
            "ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    return accelerator


def share_of_batch(settings: TrainingSection, accelerator: Accelerator, section: str, group: int = 1) -> int:
    """Sequences of one process in one accumulation step. section: the settings' key in the recipe.

    Raises InputError: the batch cannot be shared evenly, in whole groups; rounding would change what a step is.
    """
    processes, accumulation = accelerator.num_processes, settings.gradient_accumulation
    if settings.batch_size % (processes * accumulation * group):
        raise InputError(
            f"{section}.batch_size {settings.batch_size} cannot be shared by {processes} processes, {accumulation} "
            f"accumulation steps and groups of {group}: make it a multiple of {processes * accumulation * group}"
        )
    return settings.batch_size // (processes * accumulation)


@dataclass(frozen=True)
class Job:
    """A training as its files and messages know it. stage: its name in metrics, and its folder's in `run`. fingerprint:
    of all that decides its outcome. section: the recipe's key of its settings, where that is not the stage's name."""

    run: RunDir
    stage: str
    fingerprint: str
    section: str = ""

    @property
    def checkpoint(self) -> Path:
        return self.run.stage(self.stage) / "checkpoints" / "last"

    def refuse(self, what: str, settings: TrainingSection) -> NoReturn:
        """Ends a training that went wrong, saying what is kept of it and which key to change."""
        meta = read_meta(self.checkpoint)
        kept = f"the checkpoint of step {meta['step']} is kept" if meta else "no checkpoint yet"
        raise InputError(
            f"{self.stage}: {what}; {kept}: lower {self.section or self.stage}.learning_rate (now "
            f"{settings.learning_rate:g}) or use precision: no"
        )


@dataclass
class Progress:
    """How far a training is. losses: unweighted, of the last step whose numbers were looked at."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def train(
    task: TrainingTask,
    batcher: Batcher,
    settings: TrainingSection,
    job: Job,
    accelerator: Accelerator,
    evaluate: Callable[[TrainingTask], dict] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict:
    """Trains the task in place for `settings.steps` optimizer steps, resuming from the job's checkpoint.

    Rank r of W processes takes micro-batch (step * accumulation + a) * W + r, so one batch of the recipe is one step
    whatever the number of processes; `batcher` must be made for `share_of_batch`. clock: in seconds.

    Returns: {"steps", "tokens", "seconds", "losses"}, and the last "evaluation" where there is any. Raises InputError:
    a checkpoint of another recipe; a loss or parameters that are not finite (the last good checkpoint stays).
    """
    optimizer = OPTIMIZERS[settings.optimizer](parameter_groups(task, settings))
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    progress = resume(task, optimizer, job, accelerator)
    main, on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
    evaluate_at = {round(settings.steps * k / (settings.evaluations + 1)) for k in range(1, settings.evaluations + 2)}
    log_every, measured = max(1, settings.steps // 200), None
    began, logged_before = replace(progress), replace(progress)
    started, saved_at = clock() - progress.seconds, clock()
    world, accumulation = accelerator.num_processes, settings.gradient_accumulation
    micro = range(progress.step * accumulation, settings.steps * accumulation)
    batches = prefetch(batcher, (m * world + accelerator.process_index for m in micro))
    with progress_bar(job.stage, progress.step, settings.steps, shown=main) as bar:
        while progress.step < settings.steps:
            task.before_step(progress.step)
            weights, rate = task.weights(progress.step / settings.steps), rate_at(progress.step, settings)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            losses, norm, tokens = take_step(wrapped, optimizer, batches, weights, settings.clip, accelerator)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
            progress.seconds = clock() - started
            last = progress.step == settings.steps
            logged = last or progress.step == 1 or progress.step % log_every == 0
            due = last or (main and clock() - saved_at > 60 * settings.checkpoint_minutes)
            if logged or due or on_cpu:  # not at each step of a GPU, which would have to wait for the numbers
                if logged or on_cpu:  # all processes together; a checkpoint is due by the main process's clock alone
                    losses = {name: accelerator.reduce(value, "mean") for name, value in losses.items()}
                progress.losses = {name: float(value) for name, value in losses.items()}
                total = sum(weights[name] * value for name, value in progress.losses.items())
                scaled = accelerator.scaler is not None  # fp16 skips a step whose gradient overflows by itself
                if not math.isfinite(total) or not (scaled or math.isfinite(norm)):
                    job.refuse(f"the loss is {total} at step {progress.step} (gradient norm {norm:.3g})", settings)
            if due and not is_finite(task):
                job.refuse(f"the parameters are not finite after step {progress.step}", settings)
            if main and logged:
                numbers = {"loss": total, "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
                note = log_step(job, progress, logged_before, numbers, accelerator)
                logged_before = replace(progress)
                bar.update(TaskID(0), completed=progress.step, note=note)
                if bar.disable and (last or progress.step == 1 or progress.step % (10 * log_every) == 0):
                    pace = (progress.seconds - began.seconds) / (progress.step - began.step)
                    left = f"{pace * (settings.steps - progress.step) / 60:.1f} min left"
                    text = f"{job.stage} step {progress.step}/{settings.steps}  {note}  {left}"
                    print(text, file=sys.stderr, flush=True)
            if evaluate and main and progress.step in evaluate_at:
                measured = evaluate(task)
                bar.console.print(log_evaluation(job, progress, measured, accelerator), soft_wrap=True)
            if due:
                if main:
                    meta = {"stage": job.stage, "fingerprint": job.fingerprint} | vars(progress)
                    save_checkpoint(job.checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)
                saved_at = clock()
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    seconds = round(progress.seconds, 3)
    result = {"steps": progress.step, "tokens": progress.tokens, "seconds": seconds, "losses": progress.losses}
    if evaluate and main:
        result["evaluation"] = evaluate(task) if measured is None else measured  # None: resumed after the last step
    return result


def resume(task: nn.Module, optimizer, job: Job, accelerator: Accelerator) -> Progress:
    """Puts the job's checkpoint back where there is one, and drops the metrics of steps after it."""
    meta, progress = read_meta(job.checkpoint), Progress()
    if meta and meta["fingerprint"] != job.fingerprint:
        what = "checkpoint of another recipe: delete the folder, or give the run another name"
        raise InputError(f"{job.checkpoint}: {what}")
    if meta:
        load_checkpoint(job.checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)
        progress = Progress(**{key: meta[key] for key in vars(progress)})
    if accelerator.is_main_process:
        job.run.truncate_metrics(job.stage, progress.step)
    if accelerator.log_with:
        accelerator.init_trackers(job.stage, config={"fingerprint": job.fingerprint})
    return progress


def take_step(
    wrapped: nn.Module, optimizer, batches: Iterator[Batch], weights: dict, clip: float, accelerator
) -> tuple:
    """One optimizer step.

    Returns: (means of its unweighted losses on this process, the gradient's norm, tokens of all processes).
    """
    means, tokens, accumulation = {}, 0, accelerator.gradient_accumulation_steps
    for _ in range(accumulation):
        batch = next(batches)
        with accelerator.accumulate(wrapped):
            losses = wrapped(batch.to(accelerator.device))
            accelerator.backward(sum(weights[name] * value.float() for name, value in losses.items()))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        tokens += batch.tokens
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach().float() / accumulation
    return means, norm, tokens * accelerator.num_processes


def is_finite(task: nn.Module) -> bool:
    """Whether the trained parameters' norm is, which is one fused sum and also finds values too large to compute on."""
    trained = [parameter.detach() for parameter in task.parameters() if parameter.requires_grad]
    return bool(nn.utils.get_total_norm(trained).isfinite())


def log_step(job: Job, progress: Progress, before: Progress, numbers: dict, accelerator: Accelerator) -> str:
    """Writes a row of metrics, and returns what is shown of it. before: the progress at the row before."""
    speed = round((progress.tokens - before.tokens) / max(progress.seconds - before.seconds, 1e-9))
    row = {"stage": job.stage, "kind": "train", "tokens_per_second": speed} | vars(progress) | numbers
    job.run.append_metrics(row | {"seconds": round(progress.seconds, 2)})
    losses = {f"losses/{name}": value for name, value in progress.losses.items()}
    accelerator.log({"loss": numbers["loss"], "lr": numbers["lr"]} | losses, step=progress.step)
    return f"loss {numbers['loss']:.4f}  {speed:,} tokens/s"


def log_evaluation(job: Job, progress: Progress, measured: dict, accelerator: Accelerator) -> str:
    """Writes the metrics of an evaluation, and returns what is shown of them."""
    row = {"stage": job.stage, "step": progress.step, "tokens": progress.tokens, "kind": "evaluation"}
    job.run.append_metrics(row | {"metrics": measured})
    accelerator.log({f"evaluation/{name}": value for name, value in measured.items()}, step=progress.step)
    return f"{job.stage} step {progress.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in measured.items())


def progress_bar(stage: str, step: int, steps: int, *, shown: bool) -> Bar:
    """A bar on a terminal; none in a log, which gets plain lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=not shown)
    disable = not (shown and sys.stderr.isatty())
    bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=console, disable=disable)
    bar.add_task(stage, total=steps, completed=step, note="")
    return bar
