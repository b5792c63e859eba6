"""The stages of real tasks: `task_teacher` fine-tunes the teacher on labels, `finetune` the student, over seeds.

The unit of work is one training: a task, a setting of the grid, a seed. Its folder stands under the stage's
`checkpoints/`, the one place that an unfinished stage keeps, and ends with `metrics.json`: a stage that is started
again skips what has one, so that a crash costs at most the unit in work (and of that, what the loop's own checkpoint
does not hold). At its end the stage puts the results where readers look: `TASK/seed-N/metrics.json`, `TASK/model`.

The grid is searched as the papers do: every setting with the first seed, the best on validation then with all seeds.
What is random about a seed is the new head, what the student does not start from anything, and the order of rows.
"""

import hashlib
import itertools
import json
import shutil
import statistics
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from pydantic import ValidationError
from torch import nn
from transformers import BertModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json
from vocabshrink.data.metrics import headline
from vocabshrink.data.task_batches import EncodedTask, encode_task
from vocabshrink.data.tasks import Task, read_logits, score
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.models.task_model import load_task_model, save_task_model, student_model
from vocabshrink.models.teacher import load_model
from vocabshrink.run.engine import Context, saying_millions, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import FinetuneStage, Phase, TaskSection, explain
from vocabshrink.stages.inputs import (
    read_shared_pieces,
    read_tasks,
    read_teacher,
    start_directions,
    start_student,
    teacher_folder,
    vocabulary_folder,
)
from vocabshrink.training.augment import augment_task, augmented_rows
from vocabshrink.training.finetune import fit, logits_of, phases_of, write_logits
from vocabshrink.training.task_training import OF_LOGITS, TaskTraining, live_teacher

TEACHER_SEED = 0  # one fine-tuned teacher serves every seed of the students, as in the papers


def task_teacher(context: Context) -> dict:
    """Fine-tunes the teacher on the labels of each task that names neither a fine-tuned teacher nor stored logits.

    Writes TASK/model (a transformers folder), TASK/logits.safetensors (every split's; not for token tasks) and
    TASK/metrics.json. Reads no student and no vocabulary. Returns {task: its metrics on validation}, "average".
    """
    recipe, folder, results = context.recipe, context.folder, {}
    stage, tasks, of_teacher = recipe.finetune.teacher, read_tasks(recipe), teacher_folder(recipe)
    for name, task in tasks.items():
        section, unit = recipe.tasks[name], folder / "checkpoints" / name
        if not section.trains_teacher:
            continue
        phases = phases_of([stage], section)
        mark = fingerprint(context, name, "", TEACHER_SEED)
        if finished(unit, mark) is None:
            with PartialState().main_process_first():
                encoded = encode_task(task, of_teacher, of_teacher, unit / "encoded")
            torch.manual_seed(TEACHER_SEED)
            model = load_task_model(str(of_teacher), task, trained=False)
            result = fit(TaskTraining(model, task.kind), encoded, phases, RunDir(unit), name, TEACHER_SEED, mark)
            if PartialState().is_main_process:
                logits = {split: logits_of(model, encoded, split, phases[-1]) for split in task.splits}
                result |= {split: score(task, logits[split], split) for split in task.splits if split != "train"}
                save_task_model(unit / "model", model, of_teacher)
                if task.kind != "tokens":
                    write_logits(unit / "logits.safetensors", logits)
                finish(unit, result, mark)
            PartialState().wait_for_everyone()
        results[name] = finished(unit, mark)
    PartialState().wait_for_everyone()  # all have read what is about to go
    if PartialState().is_main_process:
        for name in results:
            deliver(folder / "checkpoints" / name, folder / name, ("model", "logits.safetensors"))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    validation = {name: result["validation"] for name, result in results.items()}
    return validation | {"average": statistics.fmean(map(headline, validation.values()))}


def finetune(context: Context) -> dict:
    """Fine-tunes the student on every task, for every seed, at the grid's best setting.

    Writes TASK/seed-N/metrics.json and metrics.jsonl, TASK/grid.json (headline on validation by setting, where there
    is a grid) and, where the recipe saves models, TASK/model: the median seed's, on validation.

    Returns: {task: {metric: {"median", "min", "max", "seeds" (how many)}}} on validation, "average" (over tasks, of the
    median headline), "seconds_per_step", "tokens" (read in one seed's trainings), "test" and "rounded" (as on
    validation; the latter of rounded weights, with an "average" of its own).

    Raises:
        InputError: a phase needs of a task's teacher what there is not; see also `load_task_model`, `read_logits`.
    """
    stage, folder, chosen = context.recipe.finetune, context.folder, {}
    tasks = read_tasks(context.recipe)
    subjects = {name: Subject(context, task, folder / "checkpoints" / name) for name, task in tasks.items()}
    for subject in subjects.values():
        subject.check()  # all of them before the first is trained
    for name, subject in subjects.items():
        points, tried = subject.points, {}
        if len(points) > 1:
            tried = {point: headline(subject.train(point, stage.seeds[0])["validation"]) for point in points}
        best = max(points, key=lambda point: tried.get(point, 0.0))
        units = {seed: subject.train(best, seed) for seed in stage.seeds}
        chosen[name] = (list(units.values()), best)
        if PartialState().is_main_process:
            for seed in units:
                deliver(subject.folder / best / f"seed-{seed}", folder / name / f"seed-{seed}", ())
            if tried:
                write_json(folder / name / "grid.json", tried)
            if stage.save_models:
                seed = sorted(units, key=lambda seed: headline(units[seed]["validation"]))[(len(units) - 1) // 2]
                shutil.copytree(subject.folder / best / f"seed-{seed}" / "model", folder / name / "model")
                write_json(folder / name / "metrics.json", units[seed])  # of the model beside it
    PartialState().wait_for_everyone()  # all have read what is about to go
    if PartialState().is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return summary_of({name: units for name, (units, _) in chosen.items()})


def augment(context: Context) -> dict:
    """Writes the augmented training rows of every task."""
    section, teacher = context.recipe.finetune.augment, read_teacher(context)
    return {
        name: augment_task(
            task,
            teacher,
            context.folder / f"{name}.jsonl",
            p=section.p,
            copies=section.copies,
            candidates=section.candidates,
            seed=0,
            progress=saying_millions("augment", "rows", every=1),
        )
        for name, task in read_tasks(context.recipe).items()
    }


class Subject:
    """A task with what all its trainings share: its encoded rows, its teacher, the teacher's logits of its rows."""

    def __init__(self, context: Context, task: Task, folder: Path):
        self.context, self.rows, self.name, self.folder = context, task, task.name, folder
        self.stage: FinetuneStage = context.recipe.finetune
        self.section: TaskSection = context.recipe.tasks[task.name]
        self.phases = phases_of(self.stage.phases, self.section)
        self.reads = set().union(*(phase.losses for phase in self.phases)) - {"labels"}

    @cached_property
    def points(self) -> dict[str, list[Phase]]:
        """The grid's settings: name -> phases. The last phase's settings vary.

        Raises:
            InputError: a value that the setting does not take.
        """
        *before, last = self.phases
        points, grid = {}, self.stage.grid
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            try:
                phase = Phase.model_validate(last.model_dump() | point)
            except ValidationError as error:
                raise InputError(f"finetune.grid: {explain(error.errors()[0])}") from None
            points["_".join(f"{key}-{value:g}" for key, value in point.items()) or "only"] = [*before, phase]
        return points

    def check(self) -> None:
        """Refuses losses whose teacher is not there, before anything is trained."""
        where = f"tasks.{self.name}"
        layers = sorted(self.reads - OF_LOGITS)
        if self.section.logits and not self.section.teacher:
            if layers:
                raise InputError(
                    f"{where}.logits are logits alone and losses.{layers[0]} reads the teacher's layers: add "
                    f"{where}.teacher, or take the logits out and add finetune.teacher"
                )
            if self.reads and self.stage.augment:
                raise InputError(f"{where}.logits has none of augmented rows: add {where}.teacher, or do not augment")
        self.points  # noqa: B018

    @cached_property
    def task(self) -> Task:
        """The task, with the augmented copies behind its training rows where the recipe augments."""
        task = self.rows
        if not self.stage.augment:
            return task
        made = self.context.folder_of("augment") / f"{self.name}.jsonl"
        return replace(task, splits=task.splits | {"train": augmented_rows(task, made)})

    @cached_property
    def encoded(self) -> EncodedTask:
        with PartialState().main_process_first():
            return encode_task(self.task, self.of_teacher, vocabulary_folder(self.context), self.folder / "encoded")

    @property
    def of_teacher(self) -> Path:
        """The folder of the teacher that no task has trained."""
        return teacher_folder(self.context.recipe)

    @property
    def teacher_folder(self) -> str | None:
        """The fine-tuned teacher's folder; None where there are only stored logits."""
        if not self.section.trains_teacher:
            return self.section.teacher
        return str((self.context.folder_of("task_teacher") / self.name / "model").absolute())

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The fine-tuned teacher, where a phase runs it."""
        if not live_teacher(self.reads, stored=self.logits is not None):
            return None
        return load_task_model(self.teacher_folder, self.task, trained=True)

    @cached_property
    def logits(self) -> torch.Tensor | None:
        """[rows, C]: the teacher's logits of the training rows, read where they are stored, else made once and kept.

        None where no phase reads them, and for token tasks, whose teacher is run in training.
        """
        if not self.reads & OF_LOGITS or self.task.kind == "tokens":
            return None
        path = self.folder / "logits.safetensors"
        if self.section.logits:
            path = Path(self.section.logits)
        elif not (self.section.teacher or self.stage.augment):
            path = Path(self.teacher_folder).with_name("logits.safetensors")
        else:
            encoded = self.encoded  # by all processes: they wait for each other there
            if PartialState().is_main_process and not path.is_file():
                teacher = load_task_model(self.teacher_folder, self.task, trained=True).to(PartialState().device)
                logits = logits_of(teacher, encoded, "train", self.stage.phases[-1], side="teacher")
                write_logits(path, {"train": logits})
            PartialState().wait_for_everyone()
        return torch.from_numpy(read_logits(path, self.task)["train"])

    def train(self, point: str, seed: int) -> dict:
        """One training, or what it gave before."""
        phases, unit = self.points[point], self.folder / point / f"seed-{seed}"
        mark = fingerprint(self.context, self.name, point, seed)
        if (result := finished(unit, mark)) is not None:
            return result
        torch.manual_seed(seed)
        body, directions = self.student()
        training = TaskTraining(
            student_model(body, self.task, self.of_teacher),
            self.task.kind,
            teacher=self.teacher,
            logits=self.logits,
            directions=directions,
            pooling=self.context.recipe.teacher.pooling,
            normalize=self.context.recipe.teacher.normalize,
        )
        shared = read_shared_pieces(self.context) if self.teacher is not None else None
        options = {"shared": shared, "rounding": self.stage.rounded}
        result = fit(training, self.encoded, phases, RunDir(unit), self.name, seed, mark, **options)
        if PartialState().is_main_process:
            for split in (s for s in self.task.splits if s != "train"):
                logits = logits_of(training.student, self.encoded, split, phases[-1])
                result[split] = score(self.task, logits, split)
            if self.stage.save_models:
                save_task_model(unit / "model", training.student, vocabulary_folder(self.context))
            if self.stage.rounded:  # last: the weights are replaced
                logits = logits_of(
                    fake_quantize_(training.student, self.stage.rounded), self.encoded, "validation", phases[-1]
                )
                result["rounded"] = score(self.task, logits, "validation")
            finish(unit, result | {"task": self.name, "seed": seed, "setting": point}, mark)
        PartialState().wait_for_everyone()
        return finished(unit, mark)

    def student(self) -> tuple[BertModel, torch.Tensor | None]:
        """The body to fine-tune, as the stages before left it, and the directions that its projections start from."""
        if not self.context.students:
            student, directions, _ = start_student(self.context, read_teacher(self.context))
            return student, directions
        student = load_model(BertModel, [*self.context.students.values()][-1], add_pooling_layer=False).eval()
        return student, None if self.teacher is None else start_directions(self.context)


def fingerprint(context: Context, name: str, point: str, seed: int) -> str:
    """What decides one training. Not the other tasks, nor the other seeds and settings: they may come later."""
    settings = settings_of(context.recipe, context.stage.name)
    section = settings.get("finetune", {})
    own = {key: section[key] for key in ("phases", "rounded") if key in section}
    settings |= {"tasks": settings["tasks"][name], "finetune": own}
    return hashlib.sha256(json.dumps([settings, point, seed], sort_keys=True).encode()).hexdigest()


def finished(unit: Path, mark: str) -> dict | None:
    """What a training gave before, or None. Raises InputError where it was another recipe's."""
    if not (unit / "metrics.json").is_file():
        return None
    result = read_json(unit / "metrics.json")
    if result["fingerprint"] != mark:
        raise InputError(f"{unit}: made by another recipe: delete the folder, or give the run another name")
    return result


def finish(unit: Path, result: dict, mark: str) -> None:
    """Writes a training's metrics.json, last, and frees what only its resuming needs."""
    write_json(unit / "metrics.json", result | {"fingerprint": mark})
    for entry in unit.iterdir():
        if (entry / "checkpoints").is_dir():
            shutil.rmtree(entry)


def deliver(unit: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copies a finished training's figures, and what else is named, to where readers look."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("metrics.json", "metrics.jsonl", *names):
        source = unit / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy(source, folder / name)


def summary_of(units: dict[str, list[dict]]) -> dict:
    """Median and range over each task's seeds, and what the trainings cost; see `finetune`."""
    splits: dict[str, dict] = {"validation": {}, "test": {}, "rounded": {}}
    for (split, found), (name, results) in itertools.product(splits.items(), units.items()):
        if metrics := results[0].get(split):
            found[name] = {metric: spread([result[split][metric] for result in results]) for metric in metrics}
    every = list(itertools.chain(*units.values()))

    def average(split: str) -> float:
        return statistics.fmean(
            statistics.median(headline(result[split]) for result in results) for results in units.values()
        )

    if splits["rounded"]:
        splits["rounded"]["average"] = average("rounded")
    return splits["validation"] | {
        "average": average("validation"),
        "seconds_per_step": sum(result["seconds"] for result in every) / sum(result["steps"] for result in every),
        "tokens": sum(results[0]["tokens"] for results in units.values()),
        "test": splits["test"],
        "rounded": splits["rounded"],
    }


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "seeds": len(values)}
