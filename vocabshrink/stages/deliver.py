"""The last stages: deliveries, each loaded back and measured before it is in place, and the report of the run."""

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from tokenizer_build.corpus import read_rows
from tokenizer_build.files import read_json
from vocabshrink.data.held_out import read_rated_pairs
from vocabshrink.data.tasks import Rows, Task, score
from vocabshrink.delivery.export import ExportSettings, export_model
from vocabshrink.delivery.measure import measure_systems
from vocabshrink.models.loading import load_config, weights_sha256
from vocabshrink.models.student import read_student, save_student
from vocabshrink.models.teacher import Teacher
from vocabshrink.pages.page import write_page
from vocabshrink.run.engine import Context, say
from vocabshrink.runtime.delivery import Delivery, load
from vocabshrink.runtime.index import build_index
from vocabshrink.runtime.kinds import KINDS
from vocabshrink.stages import inputs
from vocabshrink.stages.plan import delivered_config, student_shape


def export(context: Context) -> dict:
    """Writes the deliveries of the embedder and of each task's model, loaded back and measured."""
    recipe, section, said = context.recipe, context.recipe.delivery, inputs.teacher_modules(context.recipe)
    options = {"kernel": section.kernel, "safetensors": section.safetensors, "tolerance": section.tolerance}
    options |= {"budget_bytes": section.budget, "force": context.force}
    # of stored vectors the teacher read each text behind its prompt, the student without (unless behind shares of them)
    bare = recipe.vectors and not recipe.vectors.prompts
    named = ("pooling", "normalize", *(() if bare else ("prompts", "default_prompt")))
    options |= {key: getattr(said, key) for key in named} | {"dimensions": section.dimensions or []}
    shape = delivered_config(recipe, student_shape(recipe, load_config(inputs.teacher_folder(recipe))))
    settings = ExportSettings("embedding", section.weights, shape.max_position_embeddings, **options)
    figures = {} if section.tasks_only else export_embedder(context, settings)
    if recipe.finetune and recipe.finetune.save_models:
        for name, task in inputs.read_tasks(recipe).items():
            figures[name] = export_task(context, task, settings)
    return figures


def report(context: Context) -> dict:
    """Writes report.html of whatever the run's folder holds."""
    from vocabshrink.pages.report import write_report  # the only stage that needs the report extra

    return {"report": write_report(context.dir).name}


def untrained_student(context: Context, teacher: Teacher) -> Path:
    """The folder of the student as it was before the first training, or as it is made here where none was."""
    for trained in context.students.values():
        if (folder := trained.with_name("untrained")).is_dir():
            return folder
    student = inputs.start_student(context, teacher).model
    save_student(
        folder := context.folder / "untrained", student, None, context.vocabulary, teacher.pooling, teacher.normalize
    )
    return folder


def export_embedder(context: Context, settings: ExportSettings) -> dict:
    """Delivers the trained embedder, measured beside its teacher and itself before training."""
    recipe, folder, held_out = context.recipe, context.folder, inputs.read_held_out(context)
    teacher = inputs.read_teacher(context)
    untrained = untrained_student(context, teacher)
    pooled = {"pooling": settings.pooling, "normalize": settings.normalize}
    done = [*context.students.values()] or [untrained]
    trained = done[-2] if recipe.recovery and len(done) > 1 else done[-1]  # before rounding came into it
    systems = {"teacher": inputs.teacher_folder(recipe), "untrained": untrained, "trained": trained}
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    figures: dict = {}

    def measure(delivered: Path) -> dict:
        prompt = inputs.evaluated_prompt(recipe)
        figures.update(measure_systems(held_out, rated, systems | {"delivered": delivered}, prompt=prompt, **pooled))
        return {name: row for name, row in figures.items() if name not in ("bytes", "latency_ms")}

    manifest = write(context, done[-1], folder / "model", settings, measure=measure, gates=["rank_agreement", *rated])
    figures["bytes"]["delivered"] = manifest["delivery_bytes"]
    figures["parameters_by_block"] = {
        "teacher": blocks_of(teacher.backbone),
        "student": blocks_of(read_student(untrained)),
    }
    if recipe.index:
        passages = islice((row for _, row in read_rows(recipe.index.passages)), recipe.index.limit)
        options = {"progress": lambda done, total: say(f"export: {done:,} of {total:,} passages indexed")}
        options["threads"] = os.cpu_count() or 1
        figures["indexed_passages"] = build_index(folder / "model", passages, **options)
    return figures


def export_task(context: Context, task: Task, settings: ExportSettings) -> dict:
    """Delivers a task's fine-tuned model, measured on its validation rows."""
    source = context.folder_of("finetune") / task.name
    rows, before = task.splits["validation"], read_json(source / "metrics.json")["validation"]

    def measure(delivered: Path) -> dict:
        after = score(task, outputs_of(load(delivered), task, rows), "validation")
        return {metric: {"trained": before[metric], "delivered": after[metric]} for metric in after}

    settings = replace(settings, task="tokens" if task.kind == "tokens" else "classification")
    of_task = {"trained_for": task.name, "pairs": rows.second is not None}
    manifest = write(context, source / "model", context.folder / task.name, settings, measure=measure, manifest=of_task)
    return {"bytes": manifest["delivery_bytes"]} | manifest["quality"]


def write(context: Context, source: Path, folder: Path, settings: ExportSettings, *, manifest=None, **options) -> dict:
    """`export_model`, whose manifest says which run the model is of, and the model card; the manifest."""
    recipe, vocabulary = context.recipe, read_json(context.vocabulary / "comparison.json")
    origin = {"recipe": recipe.name, "teacher_sha256": weights_sha256(inputs.teacher_folder(recipe))}
    full = export_model(source, folder, settings, manifest=origin | (manifest or {}), **options)
    facts = {"manifest": full, "teacher": recipe.teacher.model, "vocabulary": vocabulary, "quality": full["quality"]}
    facts |= {"sources": [Path(source).name for source in recipe.corpus.sources], "kind": KINDS[full["task"]]}
    facts["name"] = folder.name if folder.name != "model" else recipe.name
    facts["systems"] = list(dict.fromkeys(system for row in full["quality"].values() for system in row))
    write_page(folder / "README.md", "card.md", **facts)
    return full


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
