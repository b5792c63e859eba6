"""The last stages: deliveries, each loaded back and measured before it is in place, and the report of the run."""

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from tokenizer_build.corpus import read_rows
from tokenizer_build.files import read_json
from vocabshrink.data.held_out import read_rated_pairs
from vocabshrink.data.tasks import Rows, Task, score
from vocabshrink.delivery.export import ExportSettings, export_model, write_card
from vocabshrink.delivery.measure import measure_systems
from vocabshrink.models.loading import weights_sha256
from vocabshrink.models.student import save_student
from vocabshrink.models.teacher import Teacher
from vocabshrink.run.engine import Context, say
from vocabshrink.runtime.delivery import Delivery, load
from vocabshrink.runtime.index import build_index
from vocabshrink.stages import inputs


def export(context: Context) -> dict:
    """Writes the deliveries of the embedder and of each task's model, loaded back and measured.

    Returns their figures, tasks' under their names.
    """
    recipe, teacher = context.recipe, inputs.read_teacher(context)
    student = inputs.start_student(context, teacher).model
    section = recipe.delivery
    options = {"kernel": section.kernel, "safetensors": section.safetensors, "tolerance": section.tolerance}
    said = inputs.teacher_modules(recipe)
    options |= {"pooling": said.pooling, "normalize": said.normalize}
    options |= {"prompts": said.prompts, "default_prompt": said.default_prompt}
    options |= {"budget_bytes": section.budget, "force": context.force}
    positions = min(section.max_positions, student.config.max_position_embeddings)
    settings = ExportSettings("embedding", section.weights, positions, **options)
    origin = {"recipe": recipe.name, "teacher_sha256": weights_sha256(inputs.teacher_folder(recipe))}
    figures = export_embedder(context, teacher, student, settings, origin)
    if recipe.finetune and recipe.finetune.save_models:
        for name, task in inputs.read_tasks(recipe).items():
            figures[name] = export_task(context, task, settings, origin)
    return figures


def report(context: Context) -> dict:
    """Writes report.html of whatever the run's folder holds."""
    from vocabshrink.pages.report import write_report  # the only stage that needs the report extra

    return {"report": write_report(context.dir).name}


def export_embedder(
    context: Context, teacher: Teacher, student: PreTrainedModel, settings: ExportSettings, origin: dict
) -> dict:
    """Delivers the trained embedder, measured beside its teacher and itself before training. student: as it starts.
    origin: what the manifest says of the run."""
    recipe, folder, held_out = context.recipe, context.folder, inputs.read_held_out(context)
    pooled = {"pooling": settings.pooling, "normalize": settings.normalize}
    save_student(folder / "untrained", student, None, context.vocabulary, **pooled)
    done = [*context.students.values()] or [folder / "untrained"]
    trained = done[-2] if recipe.recovery and len(done) > 1 else done[-1]  # before rounding came into it
    systems = {"teacher": inputs.teacher_folder(recipe), "untrained": folder / "untrained", "trained": trained}
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    figures: dict = {}

    def measure(delivered: Path) -> dict:
        figures.update(measure_systems(held_out, rated, systems | {"delivered": delivered}, **pooled))
        return {name: row for name, row in figures.items() if name not in ("bytes", "latency_ms")}

    manifest = export_model(
        done[-1], folder / "model", settings, measure=measure, gates=["rank_agreement", *rated], manifest=origin
    )
    figures["bytes"]["delivered"] = manifest["delivery_bytes"]
    figures["parameters_by_block"] = {"teacher": blocks_of(teacher.backbone), "student": blocks_of(student)}
    write_card(folder / "model", manifest, **sources_of(context))
    if recipe.index:
        passages = islice((row for _, row in read_rows(recipe.index.passages)), recipe.index.limit)
        options = {"progress": lambda done, total: say(f"export: {done:,} of {total:,} passages indexed")}
        options["threads"] = os.cpu_count() or 1
        figures["indexed_passages"] = build_index(folder / "model", passages, **options)
    return figures


def export_task(context: Context, task: Task, settings: ExportSettings, origin: dict) -> dict:
    """Delivers a task's fine-tuned model, measured on its validation rows."""
    source, folder = context.folder_of("finetune") / task.name, context.folder / task.name
    rows, before = task.splits["validation"], read_json(source / "metrics.json")["validation"]

    def measure(delivered: Path) -> dict:
        after = score(task, outputs_of(load(delivered), task, rows), "validation")
        return {metric: {"trained": before[metric], "delivered": after[metric]} for metric in after}

    manifest = export_model(
        source / "model",
        folder,
        replace(settings, task="tokens" if task.kind == "tokens" else "classification"),
        measure=measure,
        manifest=origin | {"trained_for": task.name, "pairs": rows.second is not None},
    )
    write_card(folder, manifest, **sources_of(context))
    return {"bytes": manifest["delivery_bytes"]} | manifest["quality"]


def sources_of(context: Context) -> dict:
    """Where a delivery comes from, as `write_card` takes it."""
    return {
        "teacher": context.recipe.teacher.model,
        "sources": [Path(source).name for source in context.recipe.corpus.sources],
        "vocabulary": read_json(context.vocabulary / "comparison.json"),
    }


def outputs_of(model: Delivery, task: Task, rows: Rows) -> list[np.ndarray]:
    """What a delivery says of each row, in the form that `score` takes: [C], or of a token task [words, C]."""
    if task.kind != "tokens":
        texts = rows.first if rows.second is None else list(zip(rows.first, rows.second, strict=True))
        return list(model.classify(texts)[1])
    numbers = ([task.labels.index(entry["label"]) for entry in row] for row in model.label_tokens(rows.first))
    return [np.eye(len(task.labels))[row] for row in numbers]


def blocks_of(model) -> dict[str, int]:
    """Parameters of the piece table, of the other embeddings and of the layers, whatever the family."""
    pieces = model.get_input_embeddings().weight.numel()
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "embeddings" in name)
    return {"pieces": pieces, "other embeddings": embeddings - pieces, "layers": model.num_parameters() - embeddings}
