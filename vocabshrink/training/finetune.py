"""Fine-tuning on one task: phases one after the other, each a training (loop.py) that resumes, and a split's logits."""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from torch import nn

from tokenizer_build.files import replacing
from vocabshrink.data.batches import EncodedTask, TaskBatcher
from vocabshrink.data.tasks import score
from vocabshrink.models.families import positions_of
from vocabshrink.models.rounding import bake, is_rounded, quantization_aware
from vocabshrink.models.task_model import predict
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import Phase, TaskSection
from vocabshrink.training.loop import Job, make_accelerator, micro_batch, train
from vocabshrink.training.task import TaskTraining

EVALUATION_BATCH = 128  # sequences of like length in a forward pass


def phases_of(phases: list[Phase], section: TaskSection) -> list[Phase]:
    """The phases with a task's own epochs and, for scores, which have no distribution, with `logits_mse` in place of
    `soft_labels` (as TinyBERT and patient KD do on STS-B)."""
    found = []
    for phase in phases:
        losses = dict(phase.losses)
        if section.kind == "regression" and (soft := losses.pop("soft_labels", None)):
            losses.setdefault("logits_mse", soft.model_copy(update={"arguments": {}}))
        found.append(phase.model_copy(update={"epochs": section.epochs or phase.epochs, "losses": losses}))
    return found


def fit(
    training: TaskTraining, encoded: EncodedTask, phases: list[Phase], job: Job, seed: int, shared=None, rounding=None
) -> dict:
    """Trains phase after phase, each from where the one before ended; a phase that was cut off resumes.
    job: of all phases; in its section, {} stands for a phase's number. shared: see `PieceTable`. rounding: the formats
    of phases that train through it. Returns {"steps", "tokens", "seconds", "seconds_per_step", "phases": [train's]}."""
    results = []
    for number, phase in enumerate(phases):
        pairs, section = (), job.section.format(number)
        if training.teacher is not None:
            depths = (model.config.num_hidden_layers for model in (training.student, training.teacher))
            pairs = layer_pairs(phase.layer_map, *depths, seed=seed)
        if phase.through_rounding and not is_rounded(training.student):
            quantization_aware(training.student, rounding)
        training.begin(phase.losses, pairs)
        accelerator = make_accelerator(phase, job.run)
        options = {"batch_size": micro_batch(phase, accelerator, section), "seed": seed, "shared": shared}
        options["sides"] = ("student", "teacher")[: 1 + training.live]
        options["max_pieces"] = longest(phase, training.student, training.teacher)
        batcher = TaskBatcher(encoded, "train", **options)

        def evaluate(task: TaskTraining, phase: Phase = phase) -> dict:
            return score(encoded.task, logits_of(task.student, encoded, "validation", phase), "validation")

        steps = min(phase.steps or math.inf, math.ceil(phase.epochs * batcher.rows / phase.batch_size))
        settings, name = phase.model_copy(update={"steps": steps}), f"phase-{number + 1}"
        phase_job = Job(job.run, f"{job.stage}-seed-{seed}-{name}", f"{job.fingerprint} {name}", section)
        measure = evaluate if phase.evaluations else None
        results.append(train(training, batcher, settings, phase_job, accelerator, measure))
        accelerator.unwrap_model(training, keep_fp32_wrapper=False)  # else the next phase wraps the wrapper
    if is_rounded(training.student):
        bake(training.student)
    totals = {key: sum(result[key] for result in results) for key in ("steps", "tokens", "seconds")}
    return totals | {"seconds_per_step": totals["seconds"] / totals["steps"], "phases": results}


def longest(phase: Phase, *models: nn.Module | None) -> int:
    """Pieces of a sequence without its two special ones: the phase's, or what fits the model with fewest positions."""
    return min(phase.max_length, *(positions_of(model.config) for model in models if model is not None)) - 2


def logits_of(model: nn.Module, encoded: EncodedTask, split: str, phase: Phase, *, side: str = "student"):
    """The model's logits of a split, its rows cut as in training (see `predict`)."""
    options = {"batch_size": EVALUATION_BATCH, "seed": 0, "sides": (side,), "max_pieces": longest(phase, model)}
    return predict(model, TaskBatcher(encoded, split, **options), side=side, precision=phase.precision)


def write_logits(path: Path, logits: dict[str, np.ndarray]) -> None:
    """{split: [R, C]} as `read_logits` reads them."""
    with replacing(path) as temporary:
        save_file({f"{split}.logits": np.ascontiguousarray(values) for split, values in logits.items()}, temporary)
