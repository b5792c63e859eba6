"""The stages of labelled tasks: `task_teacher` fine-tunes the teacher, `augment` adds rows, `finetune` trains students.

The unit of work is one training: a task, a setting of the grid, a seed. Its folder is under the stage's `checkpoints/`,
which an unfinished stage keeps, and ends with `metrics.json`: a stage that is started again skips finished trainings.
The grid is searched as the papers do: every setting with the first seed, the best on validation with all. A seed
decides the new head, what else starts at random, and the order of rows."""

import itertools
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import PartialState
from safetensors.numpy import save_file
from torch import nn

from tokenizer_build.errors import InputError
from tokenizer_build.files import hash_of, plain, read_json, read_values, replacing, write_json, write_jsonl
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.tasks import EncodedTask, Rows, Task, TaskBatcher, encode_task, headline, read_logits, score
from vocabshrink.data.vectors import store_vectors
from vocabshrink.models.families import positions_of
from vocabshrink.models.loading import load_config, resolve_model
from vocabshrink.models.rounding import bake, fake_quantize_, quantization_aware
from vocabshrink.models.spelling import shared_pieces
from vocabshrink.models.student import read_student, save_model
from vocabshrink.models.teacher import head_of, load_task_model, predict, student_model
from vocabshrink.run.engine import Context, saying, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import Phase, TaskSection
from vocabshrink.stages import inputs
from vocabshrink.training.augment import augment_task, augmented_rows
from vocabshrink.training.loop import Job, make_accelerator, micro_batch, train
from vocabshrink.training.losses import readers
from vocabshrink.training.task import TaskTraining, live_teacher

LABELLED_WORDS = 126  # of a text that a tagger labels
TEACHER_SEED = 0  # one fine-tuned teacher serves every seed of the students, as in the papers
EVALUATION_BATCH = 128  # sequences of like length in a forward pass


def task_teacher(context: Context) -> dict:
    """Fine-tunes the teacher on each task that names neither a fine-tuned teacher nor stored logits.

    Writes TASK/model (a transformers folder), TASK/logits.safetensors (of every split; not for token tasks) and
    TASK/metrics.json. Returns {task: its metrics on validation}, "average"."""
    recipe, units, results = context.recipe, context.folder / "checkpoints", {}
    for name, task in inputs.read_tasks(recipe).items():
        if recipe.tasks[name].trains_teacher:
            make = partial(train_teacher, context, task)
            results[name] = once(context, units / name, name, "", TEACHER_SEED, make)
    for name in results if PartialState().is_main_process else ():
        own = {"ignore": shutil.ignore_patterns(".*", "encoded"), "dirs_exist_ok": True}
        shutil.copytree(units / name, context.folder / name, **own)
    validation = {name: result["validation"] for name, result in results.items()}
    return validation | {"average": statistics.fmean(map(headline, validation.values()))}


def train_teacher(context: Context, task: Task, unit: Path, mark: str) -> dict:
    """Fine-tunes the teacher on one task, in the folder `unit`, and returns what was measured."""
    folder = inputs.teacher_folder(context.recipe.teacher)
    phases = phases_of([context.recipe.finetune.teacher], context.recipe.tasks[task.name])
    with PartialState().main_process_first():
        encoded = encode_task(task, folder, folder, unit / "encoded")
    torch.manual_seed(TEACHER_SEED)
    model = load_task_model(str(folder), task, trained=False)
    job = Job(RunDir(unit), task.name, mark, "finetune.teacher")
    result = fit(TaskTraining(model, task.kind), encoded, phases, job, TEACHER_SEED)
    if PartialState().is_main_process:
        logits = {split: logits_of(model, encoded, split, phases[-1]) for split in task.splits}
        result |= {split: score(task, logits[split], split) for split in task.splits if split != "train"}
        save_model(unit / "model", model, folder)
        if task.kind != "tokens":
            write_logits(unit / "logits.safetensors", logits)
    return result


def label_texts(model: str, draw: Callable[[], list[str]], folder: Path, asked: dict) -> dict:
    """What a trained classifier, cross-encoder or tagger answers to texts, as a task of a recipe: rows in train.jsonl
    and validation.jsonl, logits.safetensors (not of words). If each text has one tab, texts are pairs. Goes on where a
    killed call stopped. Raises InputError: see `load_task_model`; for a cross-encoder's texts that are no pairs."""
    if not (mark := folder / "asked.json").is_file() or read_json(mark) != plain(asked):
        shutil.rmtree(folder, ignore_errors=True)
        write_jsonl(folder / "texts.jsonl", draw())
        write_json(mark, asked)
    source, texts = resolve_model(model), read_values(folder / "texts.jsonl")
    (kind, labels), pairs = head_of(source, load_config(source)), all(text.count("\t") == 1 for text in texts)
    task = Task("task", kind, labels, {}, [])
    teacher = load_task_model(model, task, trained=True)
    if hasattr(teacher.config, "sentence_transformers") and not pairs:
        raise InputError(f"{model} reads pairs of texts: write one tab between the two of each line")
    teacher, phase = teacher.to(PartialState().device), Phase(batch_size=64)

    def answer(chosen: list[str]) -> np.ndarray:
        """[n, C] logits; of words their labels [n, LABELLED_WORDS], padded."""
        columns = list(zip(*(text.split("\t") for text in chosen), strict=True)) if pairs else [chosen]
        first = [text.split()[:LABELLED_WORDS] for text in chosen] if kind == "tokens" else list(columns[0])
        targets = [np.zeros(len(words), np.int64) for words in first] if kind == "tokens" else np.zeros(len(first))
        rows = Rows(first, list(columns[1]) if pairs else None, targets)
        with TemporaryDirectory() as place:
            encoded = encode_task(replace(task, splits={"train": rows}), source, source, Path(place))
            logits = logits_of(teacher, encoded, "train", phase, side="teacher")
        if kind != "tokens":
            return logits
        numbers = np.full((len(chosen), LABELLED_WORDS), -1)
        for row, found in zip(numbers, logits, strict=True):
            row[: len(found)] = found.argmax(-1)
        return numbers

    store_vectors(folder, "answers", texts, answer, "texts labelled by the teacher")
    answers, every = np.load(folder / "answers.npy").astype(np.float32), max(2, min(20, len(texts) // 100))

    def row_of(text: str, answer: np.ndarray) -> dict:
        if kind == "tokens":
            slots = [labels[int(number)] for number in answer if number >= 0]
            return {"tokens": text.split()[: len(slots)], "slots": slots}
        sides = {f"sentence{side}": part for side, part in enumerate(text.split("\t") if pairs else [text], 1)}
        return sides | {"label": labels[answer.argmax()] if labels else float(answer[0])}

    held_out, section = np.arange(len(texts)) % every == 0, {"teacher": model, "kind": kind}
    numbers = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    for split, chosen in numbers.items():
        write_jsonl(path := folder / f"{split}.jsonl", (row_of(texts[i], answers[i]) for i in chosen))
        section[split] = str(path.absolute())
    if kind != "tokens":
        write_logits(path := folder / "logits.safetensors", {split: answers[i] for split, i in numbers.items()})
        section["logits"] = str(path.absolute())
    return section | ({"labels": labels} if labels else {})


def augment(context: Context) -> dict:
    """Writes the augmented training rows of every task."""
    section, teacher = context.recipe.finetune.augment, inputs.read_teacher(context)
    work, progress = context.folder / "checkpoints", saying("augment: rows", 1_000_000)
    return {
        name: augment_task(task, teacher, context.folder / f"{name}.jsonl", section, work, progress)
        for name, task in inputs.read_tasks(context.recipe).items()
    }


def finetune(context: Context) -> dict:
    """Fine-tunes the student on every task, for every seed, at the grid's best setting.

    Writes TASK/seed-N/metrics.json and metrics.jsonl, TASK/grid.json (headline by setting) where there is a grid, and
    TASK/model, the median seed's, where the recipe saves models. Returns {task: {metric: {"median", "min", "max",
    "seeds"}}} on validation; "test" and "rounded" of the same form; "average", "seconds_per_step", "tokens"."""
    stage, folder, found = context.recipe.finetune, context.folder, {}
    for name, task in inputs.read_tasks(context.recipe).items():
        trainings, tried = TaskTrainings(context, task), {}
        settings = list(stage.points(trainings.phases))
        if len(settings) > 1:
            tried = {setting: headline(trainings.train(setting, stage.seeds[0])["validation"]) for setting in settings}
        best = max(settings, key=lambda setting: tried.get(setting, 0.0))
        results = {seed: trainings.train(best, seed) for seed in stage.seeds}
        found[name] = list(results.values())
        if PartialState().is_main_process:
            for seed in results:
                own = {"ignore": shutil.ignore_patterns(".*", "model"), "dirs_exist_ok": True}
                shutil.copytree(trainings.unit(best, seed), folder / name / f"seed-{seed}", **own)
            if tried:
                write_json(folder / name / "grid.json", tried)
            if stage.save_models:
                seed = sorted(results, key=lambda seed: headline(results[seed]["validation"]))[(len(results) - 1) // 2]
                shutil.copytree(trainings.unit(best, seed) / "model", folder / name / "model")
                write_json(folder / name / "metrics.json", results[seed])  # of the model beside it
    return summary_of(found)


class TaskTrainings:
    """The trainings of one task, and what they share: its encoded rows, its teacher, the teacher's logits."""

    def __init__(self, context: Context, task: Task):
        self.context, self.name, self.folder = context, task.name, context.folder / "checkpoints" / task.name
        self.stage, self.section = context.recipe.finetune, context.recipe.tasks[task.name]
        self.phases = phases_of(self.stage.phases, self.section)
        self.reads = set().union(*(phase.losses for phase in self.phases)) - {"labels"}
        self.teacher_folder = inputs.teacher_folder(context.recipe.teacher)
        self.reader = resolve_model(self.section.teacher) if self.section.teacher else self.teacher_folder  # of words
        made = context.folder_of("task_teacher") / self.name / "model"
        self.tuned = str(made.absolute()) if self.section.trains_teacher else self.section.teacher  # teacher
        self.task = task
        if self.stage.augment:  # the copies follow the training rows
            made = context.folder_of("augment") / f"{self.name}.jsonl"
            self.task = replace(task, splits=task.splits | {"train": augmented_rows(task, made)})

    def unit(self, setting: str, seed: int) -> Path:
        """The folder of one training."""
        return self.folder / setting / f"seed-{seed}"

    @cached_property
    def encoded(self) -> EncodedTask:
        with PartialState().main_process_first():
            return encode_task(self.task, self.reader, self.context.vocabulary, self.folder / "encoded")

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The fine-tuned teacher, where a phase runs it."""
        live = live_teacher(self.reads, stored=self.logits is not None)
        return load_task_model(self.tuned, self.task, trained=True) if live else None

    @cached_property
    def logits(self) -> torch.Tensor | None:
        """[rows, C]: the teacher's logits of the training rows, read where they are stored, else made once and kept.
        None where no phase reads them, and for token tasks, whose teacher is run in training."""
        if not readers(self.reads, "teacher logits") or self.task.kind == "tokens":
            return None
        path = self.folder / "logits.safetensors"
        if self.section.logits:
            path = Path(self.section.logits)
        elif not (self.section.teacher or self.stage.augment):
            path = Path(self.tuned).with_name("logits.safetensors")
        else:
            encoded = self.encoded  # by all processes: they wait for each other there
            if PartialState().is_main_process and not path.is_file():
                teacher = load_task_model(self.tuned, self.task, trained=True).to(PartialState().device)
                logits = logits_of(teacher, encoded, "train", self.stage.phases[-1], side="teacher")
                write_logits(path, {"train": logits})
            PartialState().wait_for_everyone()
        return torch.from_numpy(read_logits(path, self.task)["train"])

    def train(self, setting: str, seed: int) -> dict:
        """One training's metrics, made now or before."""
        unit, make = self.unit(setting, seed), partial(self._train, setting, seed)
        return once(self.context, unit, self.name, setting, seed, make)

    def _train(self, setting: str, seed: int, unit: Path, mark: str) -> dict:
        torch.manual_seed(seed)
        if before := [*self.context.students.values()]:
            body = read_student(before[-1])
            directions = None if self.teacher is None else inputs.start_directions(self.context)
        else:
            body, directions, *_ = inputs.start_student(self.context, inputs.read_teacher(self.context))
        if load_tokenizer(self.reader).get_vocab() != load_tokenizer(self.teacher_folder).get_vocab():
            directions = None  # they say nothing of another model's dimensions
        phases = self.stage.points(self.phases)[setting]
        options = {"pools": inputs.teacher_modules(self.context.recipe.teacher), "directions": directions}
        options |= {"teacher": self.teacher, "logits": self.logits}
        training = TaskTraining(student_model(body, self.task, self.teacher_folder), self.task.kind, **options)
        tokenizers = map(load_tokenizer, (self.context.vocabulary, self.reader))
        shared = None if self.teacher is None else shared_pieces(*tokenizers)
        job = Job(RunDir(unit), self.name, mark, "finetune.phases.{}")
        result = fit(training, self.encoded, phases, job, seed, shared=shared, rounding=self.stage.rounded)
        if PartialState().is_main_process:

            def measure(split: str) -> dict:
                return score(self.task, logits_of(training.student, self.encoded, split, phases[-1]), split)

            result |= {split: measure(split) for split in self.task.splits if split != "train"}
            if self.stage.save_models:
                save_model(unit / "model", training.student, self.context.vocabulary)
            if self.stage.rounded:  # last: the weights are replaced
                fake_quantize_(training.student, self.stage.rounded)
                result["rounded"] = measure("validation")
        return result | {"task": self.name, "seed": seed, "setting": setting}


def once(context: Context, unit: Path, task: str, setting: str, seed: int, make: Callable[[Path, str], dict]) -> dict:
    """The metrics in a training's folder `unit`, or what `make` gives, written there last. make: of the folder and the
    hash of what decides the training: other tasks, seeds and settings do not, they may come later. Raises InputError
    for another recipe's."""
    settings = settings_of(context.recipe, context.stage.name)
    own = {key: value for key, value in settings.get("finetune", {}).items() if key in ("phases", "rounded")}
    settings |= {"tasks": settings["tasks"][task], "finetune": own}
    mark, done = hash_of([settings, setting, seed]), unit / "metrics.json"
    if not done.is_file():
        result = make(unit, mark)
        if PartialState().is_main_process:
            write_json(done, result | {"fingerprint": mark})
            for entry in unit.iterdir():  # only resuming needs these
                if (entry / "checkpoints").is_dir():
                    shutil.rmtree(entry)
        PartialState().wait_for_everyone()
    result = read_json(done)
    if result["fingerprint"] != mark:
        raise InputError(f"{unit}: made by another recipe: delete the folder, or give the run another name")
    return result


def summary_of(units: dict[str, list[dict]]) -> dict:
    """Median and range over each task's seeds, and what the trainings cost; see `finetune`."""
    splits: dict[str, dict] = {"validation": {}, "test": {}, "rounded": {}}
    for (split, found), (name, results) in itertools.product(splits.items(), units.items()):
        if metrics := results[0].get(split):
            found[name] = {metric: spread([result[split][metric] for result in results]) for metric in metrics}
    for split in ("validation", "rounded") if splits["rounded"] else ("validation",):
        medians = [statistics.median(headline(result[split]) for result in results) for results in units.values()]
        splits[split]["average"] = statistics.fmean(medians)
    steps, seconds = (sum(result[key] for one in units.values() for result in one) for key in ("steps", "seconds"))
    costs = {"seconds_per_step": seconds / steps, "tokens": sum(results[0]["tokens"] for results in units.values())}
    return splits.pop("validation") | costs | splits


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "seeds": len(values)}


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


def fit(training: TaskTraining, encoded: EncodedTask, phases, job: Job, seed: int, shared=None, rounding=None) -> dict:
    """Trains phase after phase, each from where the one before ended; a phase that was cut off resumes.
    job: of all phases; in its section, {} stands for a phase's number. shared: see `PieceTable`. rounding: the formats
    of phases that train through it. Returns {"steps", "tokens", "seconds", "seconds_per_step", "phases": [train's]}."""
    results, rounded = [], False
    for number, phase in enumerate(phases):
        pairs, section = (), job.section.format(number)
        if training.teacher is not None:
            depths = (model.config.num_hidden_layers for model in (training.student, training.teacher))
            pairs = layer_pairs(phase.layer_map, *depths, seed=seed)
        if phase.through_rounding and not rounded:
            rounded = True
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
    if rounded:
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
