"""The one training loop, over Accelerate: from a laptop's CPU to several GPUs.
A task (task.py) gives named, unweighted losses; a batcher gives the batch of a step. The learning rate is a function of
the step, and so is the batch, so a resumed run is the run that was not stopped."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import get_total_norm

from tokenizer_build.errors import InputError
from tokenizer_build.files import checksum, clean, parse_json, read_json, replacing_folder, write_json
from vocabshrink.data.batches import Batch, mapped, prefetch
from vocabshrink.models.rounding import refit
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import TrainingSection
from vocabshrink.training.task import TrainingTask


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2): Adam's direction, each tensor's step scaled by its norm."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients, states = [p.grad.float() for p in parameters], [self.state[p] for p in parameters]
            for state, gradient in zip(states, gradients, strict=True):
                if not state:  # "step" on the CPU, so that nobody waits for it
                    state |= {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
                    state["step"] = torch.zeros(())
                state["step"] += 1
            if not parameters:
                continue
            step = states[0]["step"].item()
            means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
            scales = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**step))
            torch._foreach_add_(scales, group["eps"])
            directions = torch._foreach_div(torch._foreach_div(means, 1 - beta1**step), scales)
            torch._foreach_add_(directions, torch._foreach_mul(parameters, group["weight_decay"]))
            norms = zip(torch._foreach_norm(parameters), torch._foreach_norm(directions), strict=True)
            trusts = [torch.where((weight > 0) & (size > 0), weight / size, 1.0) for weight, size in norms]
            torch._foreach_mul_(directions, trusts)
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])


STEPS_OF_SCALES = 50  # after which the scales of a rounded student are fitted to its weights again
# fused: one pass over memory instead of eight, which is a fifth of a step of a small batch on a CPU
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "lamb": Lamb}


def rate_at(step: int, settings: TrainingSection) -> float:
    """Share of the peak learning rate at a step (0-based): linear warm-up, then the recipe's decay to zero."""
    if step < (warmup := round(settings.warmup * settings.steps)):
        return (step + 1) / warmup
    if settings.decay == "constant":
        return 1.0
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 1 - progress if settings.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(task: TrainingTask, settings: TrainingSection) -> list[dict]:
    """Embeddings at their own rate, everything else at the stage's; no decay on vectors and embeddings."""
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
    """A stage's accelerator. Raises InputError for fp16 without a GPU, and for processes that do not see each other."""
    if settings.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision: fp16 needs a GPU: use bf16 or no")
    if settings.threads and not torch.cuda.is_available():
        torch.set_num_threads(settings.threads)
    AcceleratorState._reset_state()  # else the precision of the process' first stage would be every stage's
    options = {"mixed_precision": settings.precision, "gradient_accumulation_steps": settings.gradient_accumulation}
    options |= {"log_with": settings.trackers or None, "project_dir": str(run.path)}
    accelerator = Accelerator(**options, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        remedy = "without a GPU, set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu"
        raise InputError(f"{launched} processes were started and each sees {accelerator.num_processes}: {remedy}")
    return accelerator


def micro_batch(settings: TrainingSection, accelerator: Accelerator, section: str, group: int = 1) -> int:
    """Sequences of an accumulation step, of all processes. Raises InputError where they cannot share whole groups."""
    processes, accumulation = accelerator.num_processes, settings.gradient_accumulation
    if settings.batch_size % (unit := processes * accumulation * group):
        what = f"cannot be shared by {processes} processes, {accumulation} accumulation steps and groups of {group}"
        raise InputError(f"{section}.batch_size {settings.batch_size} {what}: make it a multiple of {unit}")
    return settings.batch_size // accumulation


@dataclass(frozen=True)
class Job:
    """A training as its files and messages know it. stage: its name in metrics, and its folder's. fingerprint: of all
    that decides its outcome. section: the recipe's key of its settings, where that is not the stage's name."""

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
        key = f"{self.section or self.stage}.learning_rate (now {settings.learning_rate:g})"
        raise InputError(f"{self.stage}: {what}; {kept}: lower {key} or use precision: no")


@dataclass
class State:
    """How far a training is. losses: unweighted, of the last step whose numbers were looked at."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def train(
    task: TrainingTask, batcher, settings: TrainingSection, job: Job, accelerator, evaluate=None, clock=time.monotonic
) -> dict:
    """Trains the task in place for `settings.steps` optimizer steps, resuming from the job's checkpoint.
    Accumulation step a of a step is the batcher's batch step * accumulation + a (of `micro_batch` sequences), of which
    each process takes its part and means over that. clock: in seconds. Returns {"steps", "tokens", "seconds", "losses"}
    and, where there is any, the last "evaluation". Raises InputError for a checkpoint of another recipe or of another
    number of processes, a loss or parameters that are not finite (the last good checkpoint stays)."""
    optimizer = OPTIMIZERS[settings.optimizer](parameter_groups(task, settings))
    # to look for parameters without a gradient, DDP walks through every step's graph
    accelerator.ddp_handler.find_unused_parameters = not task.reads_all
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    state = resume(task, optimizer, job, accelerator)
    main, on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
    evaluate_at = {round(settings.steps * k / (settings.evaluations + 1)) for k in range(1, settings.evaluations + 2)}
    log_every, measured, each = max(1, settings.steps // 200), None, settings.gradient_accumulation
    log = Log(job, settings.steps, accelerator, state)
    started, saved_at = clock() - state.seconds, clock()

    def prepare(batch: Batch) -> Batch:
        batch = task.ready(batch.part(accelerator.process_index, accelerator.num_processes))
        return mapped(batch, torch.Tensor.pin_memory) if accelerator.device.type == "cuda" else batch

    batches = prefetch(batcher, iter(range(state.step * each, settings.steps * each)), prepare)
    with log.bar:
        while state.step < settings.steps:
            if state.step % STEPS_OF_SCALES == 0:  # steps that a resumed run shares
                refit(task)
            weights, rate = task.weights(state.step / settings.steps), rate_at(state.step, settings)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            losses, norm, tokens = take_step(wrapped, optimizer, batches, weights, settings.clip, accelerator)
            state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, clock() - started
            last = state.step == settings.steps
            logged = last or state.step == 1 or state.step % log_every == 0
            due = last or (main and clock() - saved_at > 60 * settings.checkpoint_minutes)
            if logged or due or on_cpu:  # not at each step of a GPU, which would have to wait for the numbers
                if logged or on_cpu:  # all processes together; a checkpoint is due by the main process's clock alone
                    losses = {name: accelerator.reduce(value, "mean") for name, value in losses.items()}
                state.losses = {name: float(value) for name, value in losses.items()}
                total = sum(weights[name] * value for name, value in state.losses.items())
                scaled = accelerator.scaler is not None  # fp16 skips a step whose gradient overflows by itself
                if not math.isfinite(total) or not (scaled or math.isfinite(norm)):
                    job.refuse(f"the loss is {total} at step {state.step} (gradient norm {norm:.3g})", settings)
            # a norm is one fused sum, and also finds values too large to compute on
            if due and not get_total_norm(p.detach() for p in task.parameters() if p.requires_grad).isfinite():
                job.refuse(f"the parameters are not finite after step {state.step}", settings)
            if main and logged:
                numbers = {"loss": total, "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
                log.step(state, numbers, aloud=last or state.step == 1 or state.step % (10 * log_every) == 0)
            if evaluate and main and state.step in evaluate_at:
                measured = evaluate(task)
                log.evaluation(state, measured)
            if due:
                if main:
                    meta = {"fingerprint": job.fingerprint, "processes": accelerator.num_processes} | vars(state)
                    save_checkpoint(job.checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)
                saved_at = clock()
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    result = {"steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3), "losses": state.losses}
    if evaluate and main:
        result["evaluation"] = evaluate(task) if measured is None else measured  # None: resumed after the last step
    return result


def resume(task: nn.Module, optimizer, job: Job, accelerator: Accelerator) -> State:
    """Puts the job's checkpoint back where there is one, and drops the metrics of steps after it."""
    state = State()
    if meta := read_meta(job.checkpoint):
        if meta["fingerprint"] != job.fingerprint:
            raise InputError(f"{job.checkpoint}: checkpoint of another recipe: delete it, or give the run another name")
        if (before := meta["processes"]) != accelerator.num_processes:
            raise InputError(f"{job.checkpoint}: of {before} processes, each with losses of its part: start as many")
        load_checkpoint(job.checkpoint, task, optimizer.optimizer, meta, accelerator.scaler)
        state = State(**{key: meta[key] for key in vars(state)})
    if accelerator.is_main_process:
        job.run.truncate_metrics(job.stage, state.step)
    accelerator.init_trackers(job.stage, config={"fingerprint": job.fingerprint})
    return state


def take_step(wrapped, optimizer, batches: Iterator[Batch], weights: dict, clip: float, accelerator) -> tuple:
    """One optimizer step: (this process's means of the unweighted losses, gradient norm, tokens of all processes)."""
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
    return means, norm, tokens


class Log:
    """What the main process tells of a training: rows of metrics, trackers, a bar on a terminal or lines in a file."""

    def __init__(self, job: Job, steps: int, accelerator: Accelerator, state: State):
        self.job, self.steps, self.accelerator = job, steps, accelerator
        self.began = self.before = replace(state)  # at the start, and at the last row
        console = Console(stderr=True, quiet=not accelerator.is_main_process)
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, console=console, disable=console.quiet or not sys.stderr.isatty())
        self.bar.add_task(job.stage, total=steps, completed=state.step, note="")

    def step(self, state: State, numbers: dict[str, float], *, aloud: bool) -> None:
        """Writes a row of metrics. aloud: without a terminal, prints a line too."""
        speed = round((state.tokens - self.before.tokens) / max(state.seconds - self.before.seconds, 1e-9))
        row = {"stage": self.job.stage, "kind": "train", "tokens_per_second": speed} | vars(state) | numbers
        self.job.run.append_metrics(row | {"seconds": round(state.seconds, 2)})
        losses = {f"losses/{name}": value for name, value in state.losses.items()}
        self.accelerator.log({"loss": numbers["loss"], "lr": numbers["lr"]} | losses, step=state.step)
        note = f"step {state.step}/{self.steps}  loss {numbers['loss']:.4f}  {speed:,} tokens/s"
        self.bar.update(TaskID(0), completed=state.step, note=note)
        if self.bar.disable and aloud:
            pace = (state.seconds - self.began.seconds) / (state.step - self.began.step) / 60
            left = f"{pace * (self.steps - state.step):.1f} min left"
            print(f"{self.job.stage} {note}  {left}", file=sys.stderr, flush=True)
        self.before = replace(state)

    def evaluation(self, state: State, measured: dict[str, float]) -> None:
        row = {"stage": self.job.stage, "step": state.step, "tokens": state.tokens, "kind": "evaluation"}
        self.job.run.append_metrics(row | {"metrics": measured})
        self.accelerator.log({f"evaluation/{name}": value for name, value in measured.items()}, step=state.step)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.bar.console.print(f"{self.job.stage} step {state.step}: {figures}", soft_wrap=True)


def trained_state(task: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters with a gradient, shared ones once, and the scales of roundings."""
    trained = {name: value.detach() for name, value in task.named_parameters() if value.requires_grad}
    return trained | {name: tensor for name, tensor in task.state_dict().items() if name.endswith(".scales")}


def save_checkpoint(folder: Path, task: nn.Module, optimizer, meta: dict, scaler=None) -> None:
    """Puts a checkpoint in the place of the one before. meta: JSON. Raises InputError for a full disk."""
    states, random = optimizer.state_dict()["state"], {"cpu": torch.get_rng_state()}
    moments = {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    files = {"model": trained_state(task), "optimizer": moments, "random": random}
    with replacing_folder(folder) as new:
        for name, tensors in files.items():
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, new / f"{name}.safetensors")
        write_json(new / "meta.json", meta | {"scaler": scaler.state_dict() if scaler else None})
        write_json(new / "sums.json", sums_of(new))


def sums_of(folder: Path) -> dict[str, int]:
    return {file.name: checksum(file) for file in folder.iterdir() if file.name != "sums.json"}


def read_meta(folder: Path) -> dict | None:
    """The checkpoint's meta, or None where there is none. Raises InputError for a damaged one."""
    clean(folder)
    if not folder.exists():
        return None
    with suppress(OSError, ValueError):  # missing, not UTF-8, no JSON
        if parse_json((folder / "sums.json").read_text(encoding="utf-8")) == sums_of(folder):
            return read_json(folder / "meta.json")
    raise InputError(f"{folder}: damaged checkpoint: delete the folder to train this stage anew")


def load_checkpoint(folder: Path, task: nn.Module, optimizer, meta: dict, scaler=None) -> None:
    """Puts a checkpoint back, in place. meta: of `read_meta`. Raises InputError for a checkpoint of other shapes."""
    saved, state, random = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer", "random"))
    current = trained_state(task)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in current.items()}:
        raise InputError(f"{folder}: of another recipe (shapes differ): delete it, or give the run another name")
    for name, tensor in current.items():
        tensor.copy_(saved[name])
    full = optimizer.state_dict() | {"state": {}}
    for key, value in state.items():
        index, name = key.split(".", 1)
        full["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(full)
    if scaler and meta["scaler"]:
        scaler.load_state_dict(meta["scaler"])
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
