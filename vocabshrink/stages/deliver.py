"""The last stages: deliveries, each loaded back and measured before it is in place, and the report of the run.
The delivery is measured as its users run it: from text, through its own tokenizer and graph, without torch."""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import PartialState

from tokenizer_build.corpus import read_rows
from tokenizer_build.files import read_json
from vocabshrink.data.held_out import Embed, HeldOut, read_rated_pairs, spearman
from vocabshrink.data.tasks import Rows, Task, score
from vocabshrink.delivery.export import ExportSettings, export_model
from vocabshrink.models.forward import ModuleSettings, torch_embedder
from vocabshrink.models.loading import load_config, load_model, weight_files, weights_sha256
from vocabshrink.models.student import read_student, save_student
from vocabshrink.pages.page import write_page
from vocabshrink.run.engine import Context, say, saying
from vocabshrink.run.recipe import DeliverySection
from vocabshrink.runtime.delivery import Delivery, load
from vocabshrink.runtime.index import build_index
from vocabshrink.stages import inputs
from vocabshrink.stages.plan import delivered_config, student_shape

TIMED_SENTENCES = 100
LONGEST = 128  # pieces that the teacher and the students in torch read


def export(context: Context) -> dict:
    """Writes the deliveries of the embedder and of each task's model, loaded back and measured."""
    recipe, section, modules = context.recipe, context.recipe.delivery, inputs.shared_modules(context.recipe)[0]
    shape = delivered_config(recipe, student_shape(recipe, load_config(inputs.teacher_folder(recipe.teacher))))
    section = section.model_copy(update={"max_positions": shape.max_position_embeddings})
    settings = ExportSettings("embedding", section, modules, context.force)
    figures = {} if section.tasks_only else export_embedder(context, settings)
    if recipe.finetune and recipe.finetune.save_models:
        for name, task in inputs.read_tasks(recipe).items():
            figures[name] = export_task(context, task, settings)
    return figures


def report(context: Context) -> dict:
    """Writes report.html of whatever the run's folder holds."""
    from vocabshrink.pages.report import write_report  # the only stage that needs the report extra

    return {"report": write_report(context.dir).name}


def export_embedder(context: Context, settings: ExportSettings) -> dict:
    """Delivers the trained embedder, measured beside its teacher and itself before training."""
    recipe, folder, held_out = context.recipe, context.folder, inputs.read_held_out(context)
    teacher = inputs.read_teacher(context)
    before = [trained.with_name("untrained") for trained in context.students.values()]
    if (untrained := next(filter(Path.is_dir, before), folder / "untrained")) not in before:  # nothing was trained
        save_student(untrained, inputs.start_student(context, teacher).model, None, context.vocabulary, teacher.modules)
    done = [*context.students.values()] or [untrained]
    trained = done[-2] if recipe.recovery and len(done) > 1 else done[-1]  # before rounding came into it
    systems = {"teacher": teacher.folder, "untrained": untrained, "trained": trained}
    rated = {name: read_rated_pairs(path) for name, path in recipe.evaluation.stsb.items()}
    figures: dict = {}

    def measure(delivered: Path) -> dict:
        said = teacher.modules, inputs.shared_modules(recipe)[1]
        figures.update(measure_systems(held_out, rated, systems | {"delivered": delivered}, *said))
        return {name: row for name, row in figures.items() if name not in ("bytes", "latency_ms")}

    manifest = write(context, done[-1], folder / "model", settings, measure=measure, gates=["rank_agreement", *rated])
    figures["bytes"]["delivered"] = manifest["delivery_bytes"]
    student = read_student(untrained)
    figures["parameters_by_block"] = {"teacher": blocks_of(teacher.backbone), "student": blocks_of(student)}
    if recipe.index:
        passages = [row for _, row in islice(read_rows(recipe.index.passages), recipe.index.limit)]
        options = {"threads": os.cpu_count() or 1, "progress": saying("export: passages indexed", 1, len(passages))}
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
    origin = {"recipe": recipe.name, "teacher_sha256": weights_sha256(inputs.teacher_folder(recipe.teacher))}
    full = export_model(source, folder, settings, manifest=origin | (manifest or {}), **options)
    if settings.delivery.kernel == "auto" and full.get("kernel") == "float":
        say(f"export: {folder.name} in 8-bit activations is another model: kernel float, slower and exact")
    facts = {"manifest": full, "teacher": recipe.teacher.model, "vocabulary": vocabulary, "quality": full["quality"]}
    facts["sources"] = [Path(source).name for source in recipe.corpus.sources]
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


def measure_systems(
    held_out: HeldOut, rated: dict[str, Rows], folders: dict[str, Path], modules: ModuleSettings, prompt=None
) -> dict[str, dict[str, float]]:
    """{"bytes", "rank_agreement", "neighbour_overlap", "latency_ms", each rated set}: {system: figure}. folders: of
    "teacher", "untrained", "trained" and "delivered". prompt: before every text that the teacher reads."""
    delivery, teacher, embedders = load(folders["delivered"]), folders["teacher"], {}
    pooled = replace(modules, dense=())
    for name, said in {"teacher": modules, "untrained": pooled, "trained": pooled}.items():
        backbone, before = load_model(folders[name]).to(PartialState().device), prompt if name == "teacher" else None
        embedders[name] = torch_embedder(backbone, folders[name], said, max_length=LONGEST, prompt=before)
    embedders["delivered"] = partial(delivery.embed, prompt="")
    vectors = {name: embed(held_out.texts) for name, embed in embedders.items()}
    target = vectors.pop("teacher")
    weights = sum(path.stat().st_size for path in weight_files(teacher))
    times = teacher_latency(teacher, held_out.texts, modules)
    figures = {
        "bytes": {"teacher": weights, "delivered": delivery.manifest["delivery_bytes"]},
        "rank_agreement": {name: held_out.rank_agreement(found, target) for name, found in vectors.items()},
        "latency_ms": times | {"delivered": latency(delivery.embed, held_out.texts)},
    }
    overlaps = {name: held_out.neighbour_overlap(found, target) for name, found in vectors.items()}
    for key in overlaps["delivered"]:
        figures[key] = {name: found[key] for name, found in overlaps.items()}
    figures |= {name: {of: spearman(pairs, embed) for of, embed in embedders.items()} for name, pairs in rated.items()}
    return {key: {name: round(value, 4) for name, value in row.items()} for key, row in figures.items()}


def teacher_latency(folder: Path, texts: list[str], modules: ModuleSettings) -> dict[str, float]:
    """{"teacher": milliseconds} as a float32 graph; {} and a word on stderr where it cannot be exported."""
    with tempfile.TemporaryDirectory() as place:
        try:
            positions = min(LONGEST, load_config(folder).max_position_embeddings)
            section = DeliverySection(weights="fp32", max_positions=positions, budget=10**12)
            export_model(folder, place, ExportSettings("embedding", section, modules))
            return {"teacher": latency(load(Path(place)).embed, texts)}
        except Exception as error:  # of any kind, also of onnx beyond 2 GB: the figure is worth no failed delivery
            say(f"the teacher's latency is left out: {error}")
            return {}


def latency(embed: Embed, texts: list[str]) -> float:
    """Median milliseconds for one sentence, over the first sentences, after three to warm up."""
    times = []
    for text in texts[:3] + texts[:: max(1, len(texts) // TIMED_SENTENCES)][:TIMED_SENTENCES]:
        started = time.perf_counter()
        embed([text])
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[3:])
