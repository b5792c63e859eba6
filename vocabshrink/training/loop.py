"""The one training loop, over Accelerate: from a laptop's CPU to several GPUs.

A task is an `nn.Module` whose forward gives named, unweighted losses; a batcher gives the batch of a step. The loop
does the rest: precision, accumulation, clipping, schedule, evaluation, logging, checkpoints and resuming. The learning
rate is a function of the step, and so is the batch, so a resumed run is the run that was not stopped.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batcher, prefetch
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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad.float()
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                state["step"] += 1
                step = state["step"].item()
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                direction = state["exp_avg"] / (1 - beta1**step)
                direction = direction / ((state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"])
                direction = direction + group["weight_decay"] * parameter
                weight_norm, step_norm = parameter.norm(), direction.norm()
                trust = torch.where(
                    (weight_norm > 0) & (step_norm > 0), weight_norm / step_norm, torch.ones_like(weight_norm)
                )
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
    embedding_rate = settings.embedding_learning_rate or settings.learning_rate
    groups: dict[tuple[float, float], list] = {}
    for parameter in task.parameters():
        if parameter.requires_grad:
            is_embedding = id(parameter) in embeddings
            rate = embedding_rate if is_embedding else settings.learning_rate
            decay = settings.weight_decay if parameter.ndim > 1 and not is_embedding else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise InputError("nothing to train: every parameter is frozen: check losses and train_teacher")
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def make_accelerator(settings: TrainingSection, run: RunDir) -> Accelerator:
    """The accelerator of a stage.

    Raises:
        InputError: fp16 without a GPU; processes that were started together and do not see each other.
    """
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
        # Accelerate takes several processes without a GPU for strangers; they would write into one folder.
        raise InputError(
            f"{launched} processes were started and each sees {accelerator.num_processes}: without a GPU, set "
            "ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        )
    return accelerator


def train(
    task: TrainingTask,
    batcher: Batcher,
    settings: TrainingSection,
    run: RunDir,
    stage: str,
    *,
    fingerprint: str,
    accelerator: Accelerator,
    evaluate: Callable[[TrainingTask], dict] | None = None,
) -> dict:
    """Trains the task in place for `settings.steps` optimizer steps, resuming from the stage's checkpoint.

    Rank r of W processes takes micro-batch (step * accumulation + a) * W + r, so one batch of the recipe is one step
    whatever the number of processes; `batcher` must be made for batch_size / (W * accumulation).

    Returns: {"steps", "tokens", "seconds", "losses"}, and the last "evaluation" where there is any. Raises InputError:
    a checkpoint of another recipe, a loss that is not a number (the last good checkpoint stays).
    """
    optimizer = OPTIMIZERS[settings.optimizer](parameter_groups(task, settings))
    checkpoint = run.stage(stage) / "checkpoints" / "last"
    meta = read_meta(checkpoint)
    if meta and meta["fingerprint"] != fingerprint:
        raise InputError(f"{checkpoint}: checkpoint of another recipe: delete the folder, or give the run another name")
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    step, tokens, seconds = 0, 0, 0.0
    parts: dict[str, float] = {}
    if meta:
        load_checkpoint(checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)
        step, tokens, seconds, parts = meta["step"], meta["tokens"], meta["seconds"], meta["losses"]
    if accelerator.is_main_process:
        run.truncate_metrics(stage, step)
    if settings.trackers:
        accelerator.init_trackers(stage, config={"fingerprint": fingerprint})
    world, accumulation = accelerator.num_processes, settings.gradient_accumulation
    evaluate_at = {round(settings.steps * k / (settings.evaluations + 1)) for k in range(1, settings.evaluations + 1)}
    log_every = max(1, settings.steps // 200)
    first_step, started, saved_at = step, time.monotonic() - seconds, time.monotonic()
    measured: dict | None = None
    micro = range(step * accumulation, settings.steps * accumulation)
    batches = prefetch(batcher, (m * world + accelerator.process_index for m in micro))
    window_tokens, window_start = tokens, time.monotonic()

    def save():
        if accelerator.is_main_process:
            meta = {
                "stage": stage,
                "step": step,
                "tokens": tokens,
                "seconds": time.monotonic() - started,
                "losses": parts,
                "fingerprint": fingerprint,
            }
            save_checkpoint(checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)

    with progress_bar(accelerator.is_main_process) as bar:
        shown = bar.add_task(stage, total=settings.steps, completed=step, note="")
        while step < settings.steps:
            task.before_step(step)
            weights, rate = task.weights(step / settings.steps), rate_at(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            step_parts, step_tokens = {}, 0
            for _ in range(accumulation):
                batch = next(batches)
                with accelerator.accumulate(wrapped):
                    losses = wrapped(batch.to(accelerator.device))
                    loss = sum(weights[name] * value.float() for name, value in losses.items())
                    accelerator.backward(loss)
                    norm = (
                        accelerator.clip_grad_norm_(task.parameters(), settings.clip)
                        if accelerator.sync_gradients
                        else None
                    )
                    optimizer.step()
                    optimizer.zero_grad()
                step_tokens += batch.tokens
                for name, value in losses.items():
                    step_parts[name] = step_parts.get(name, 0) + value.detach().float() / accumulation
            step += 1
            tokens += step_tokens * world
            checked = step % log_every == 0 or step in (1, settings.steps) or accelerator.device.type == "cpu"
            if checked:  # not each time on a GPU, which would have to wait for the number
                parts = {name: float(accelerator.reduce(value, "mean")) for name, value in step_parts.items()}
                total = sum(weights[name] * value for name, value in parts.items())
                scaled = accelerator.scaler is not None  # fp16 skips a step whose gradient overflows by itself
                if not math.isfinite(total) or (norm is not None and not scaled and not math.isfinite(norm)):
                    kept = (
                        f"the checkpoint of step {meta_step} is kept"
                        if (meta_step := last_saved(checkpoint))
                        else "no checkpoint yet"
                    )
                    raise InputError(
                        f"{stage}: the loss is {total} at step {step} (gradient norm {float(norm or 0):.3g}); {kept}: "
                        f"lower {stage}.learning_rate (now {settings.learning_rate:g}) or use precision: no"
                    )
            if accelerator.is_main_process and (step % log_every == 0 or step in (1, settings.steps)):
                now = time.monotonic()
                row = {
                    "stage": stage,
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(now - started, 2),
                    "kind": "train",
                    "loss": total,
                    "losses": parts,
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": float(norm) if norm is not None else None,
                    "tokens_per_second": round((tokens - window_tokens) / max(now - window_start, 1e-9)),
                }
                window_tokens, window_start = tokens, now
                run.append_metrics(row)
                note = f"loss {total:.4f}  {row['tokens_per_second']:,} tokens/s"
                bar.update(shown, completed=step, note=note)
                if not sys.stderr.isatty() and (step % (10 * log_every) == 0 or step in (1, settings.steps)):
                    left = (
                        (now - started) / max(step - first_step, 1) * (settings.steps - step)
                        if step > first_step
                        else 0
                    )
                    print(
                        f"{stage} step {step}/{settings.steps}  {note}  {left / 60:.1f} min left",
                        file=sys.stderr,
                        flush=True,
                    )
                if settings.trackers:
                    accelerator.log(
                        {"loss": total, "lr": row["lr"], **{f"losses/{k}": v for k, v in parts.items()}}, step=step
                    )
            if evaluate and accelerator.is_main_process and (step in evaluate_at or step == settings.steps):
                measured = evaluate(task)
                run.append_metrics(
                    {"stage": stage, "step": step, "tokens": tokens, "kind": "evaluation", "metrics": measured}
                )
                bar.console.print(
                    f"{stage} step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in measured.items()), soft_wrap=True
                )
                if settings.trackers:
                    accelerator.log({f"evaluation/{k}": v for k, v in measured.items()}, step=step)
            # Only what was checked is saved, so that a loss gone wrong never replaces the good checkpoint.
            if checked and (time.monotonic() - saved_at > 60 * settings.checkpoint_minutes or step == settings.steps):
                save()
                saved_at = time.monotonic()
    accelerator.wait_for_everyone()
    if settings.trackers:
        accelerator.end_training()
    result = {"steps": step, "tokens": tokens, "seconds": round(time.monotonic() - started, 1), "losses": parts}
    if evaluate and accelerator.is_main_process:
        result["evaluation"] = evaluate(task) if measured is None else measured  # None: resumed behind the last step
    return result


def last_saved(checkpoint: Path) -> int:
    meta = read_meta(checkpoint)
    return meta["step"] if meta else 0


def progress_bar(shown: bool) -> Progress:
    """A bar on a terminal; in a log, nothing but the plain lines."""
    console = Console(stderr=True, quiet=not shown)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty()))
