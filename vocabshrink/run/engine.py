"""The engine that runs stages: a finished one is skipped, an unfinished training stage resumes.

A finished stage made under other settings is refused, with the first setting that differs."""

import importlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tokenizer_build.corpus import expand
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json, write_text
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import Recipe, TaskSection, dump_recipe
from vocabshrink.run.stage import STAGES, Stage, needed, setting, stages_of

# The settings that name the files which a stage reads itself: it is made of their content, too.
FILES = dict.fromkeys(("task_teacher", "augment", "finetune"), "tasks")
FILES |= {"count": "corpus.sources", "vectors": "corpus.sources corpus.parallel"}
FILES["export"] = "evaluation.stsb index.passages"
SAMPLES, SAMPLE = 64, 1 << 16  # of a file's content: their number, about, and the bytes of each
# Settings that change how fast or how visibly a run goes, but not what it makes.
IMMATERIAL = {"processes", "threads", "trackers", "evaluations", "checkpoint_minutes"}


@dataclass(frozen=True)
class Run:
    """A recipe and the folder of its run. force: export writes a delivery that fails its gates, and says so in it."""

    recipe: Recipe
    dir: RunDir
    force: bool = False


@dataclass(frozen=True)
class Context(Run):
    """What a stage works with: its run, its own folder, and the folders of the stages that it needs."""

    _: KW_ONLY
    stage: Stage

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return self.dir.stage(self.stage.name)

    def folder_of(self, name: str) -> Path:
        """The folder of a stage that this one needs, or of one that those need."""
        if name not in needed(self.stage):
            raise LookupError(f"stage {self.stage.name} reads {name}, which it does not say it needs")
        return self.dir.stage(name)

    @property
    def vocabulary(self) -> Path:
        """The folder of the student's tokenizer."""
        return self.folder_of("vocab")

    def has(self, name: str) -> bool:
        """Whether the recipe asks for a stage that this one may need."""
        return name in needed(self.stage) and STAGES[name].asked(self.recipe)

    @property
    def students(self) -> dict[str, Path]:
        """The students trained before this stage, each from the one before: {stage: its folder}."""
        return {n: self.dir.stage(n) / "student" for n, stage in STAGES.items() if stage.student and self.has(n)}

    @property
    def fingerprint(self) -> str:
        """What decides the stage's output, as text: a checkpoint of another one is refused."""
        return json.dumps(settings_of(self.recipe, self.stage.name), sort_keys=True)


def settings_of(recipe: Recipe, name: str) -> dict:
    """{section.key: value} of what decides a stage's output: what it reads itself and what the stages it needs read."""
    stage, chosen = STAGES[name], {}
    for other in [] if stage.alone else stage.needs.split():
        if STAGES[other].asked(recipe):
            chosen |= settings_of(recipe, other)
    return chosen | {path: material(setting(recipe, path)) for path in stage.reads.split()}


def material(value: Any) -> Any:
    """A section as plain values, without what changes nothing but speed or looks."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: material(item) for key, item in value.items() if key not in IMMATERIAL}
    return [material(item) for item in value] if isinstance(value, list) else value


def first_difference(before: Any, now: Any, path: str = "") -> str | None:
    """The first key whose value differs, as `key (before -> now)`."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (first_difference(before.get(k), now.get(k), f"{path}.{k}".lstrip(".")) for k in before | now)
        return next(filter(None, found), None)
    return None if before == now else f"{path} ({json.dumps(before)} -> {json.dumps(now)})"


def files_of(recipe: Recipe, name: str) -> dict[str, list[int]]:
    """{path: [bytes, checksum of samples]} of the files outside of the run that a stage's own settings name."""
    named, found = [setting(recipe, path) for path in FILES.get(name, "").split()], {}
    while named:
        value = named.pop()
        if isinstance(value, TaskSection):
            named += [value.train, value.validation, value.test, value.logits]
        elif isinstance(value, list | dict):
            named += value.values() if isinstance(value, dict) else value
        elif value:
            with suppress(InputError):  # for what is not there, which the stage says that reads it
                found |= {path: content_of(path) for path in expand([value]) if Path(path).is_file()}
    return found


def content_of(path: str) -> list[int]:
    """The bytes of a file, and a checksum of samples of its content."""
    size, samples = os.path.getsize(path), 0
    with open(path, "rb") as file:
        for start in range(0, size, max(SAMPLE, size // SAMPLES)):
            file.seek(start)
            samples = zlib.crc32(file.read(SAMPLE), samples)
    return [size, samples]


def refuse_changed(folder: Path, files: dict[str, list[int]]) -> None:
    """Raises InputError where a file that a stage read has changed, or another came beside it; a file may be gone."""
    before = read_json(folder / "settings.json").get("files", {})
    changed = sorted(path for path in files if before.get(path) != files[path])
    if changed and before.keys() & files.keys():
        raise InputError(f"{changed[0]} is not what it was when {folder} was made from it: put back what was there")


def run_stage(run: Run, name: str) -> bool:
    """Runs one stage unless it is done; whether it ran. Raises InputError where a stage that it needs is not done, is
    damaged, or was done under other settings or from other text."""
    stage, folder = STAGES[name], run.dir.stage(name)
    if missing := [n for n in stage.needs.split() if STAGES[n].asked(run.recipe) and not run.dir.is_done(n)]:
        raise InputError(f"{run.dir.path}: stage {name} needs {missing[0]} first: run that, or all by `run`")
    settings = settings_of(run.recipe, name)
    if run.dir.is_done(name) and name != "report":  # a report is cheap, and stale as soon as any stage ran again
        before = {key: value for key, value in read_json(folder / "settings.json").items() if key != "files"}
        if different := first_difference(before, settings):
            raise InputError(f"{folder}: made by another recipe: {different}: give the run another name, or delete it")
        if main_process():
            refuse_changed(folder, files_of(run.recipe, name))
        say(f"{name}: done before")
        return False
    if main_process():
        for other in sorted(needed(stage)):
            if STAGES[other].asked(run.recipe) and run.dir.is_done(other):
                run.dir.verify(other)
                refuse_changed(run.dir.stage(other), files_of(run.recipe, other))
        files = files_of(run.recipe, name)
        if (folder / "checkpoints").is_dir() and (folder / "settings.json").is_file():
            refuse_changed(folder, files)  # from which training would go on
        run.dir.start(name)
        write_json(folder / "settings.json", settings | ({"files": files} if files else {}))
        write_text(run.dir.path / "recipe.yaml", dump_recipe(run.recipe))
        run.dir.write_environment()
    wait_for_everyone()
    do = getattr(importlib.import_module(f"vocabshrink.stages.{stage.module}"), name)
    started = time.monotonic()
    summary = do(Context(**vars(run), stage=stage)) if stage.trains or main_process() else {}
    wait_for_everyone()  # before the checkpoints go, which all read
    if main_process():
        minutes = (time.monotonic() - started) / 60
        run.dir.finish(name, {"minutes": round(minutes, 2)} | summary)
        shown = "  ".join(f"{key} {value}" for key, value in summary.items() if isinstance(value, int | float | str))
        say(f"{name}: {minutes:.1f} min  {shown}")
    wait_for_everyone()
    return True


def summarise(run: Run, since: float | None = None) -> dict:
    """Writes and returns summary.json of the run: what delivery and tasks measured, and the minutes. since: the Unix
    time from which they are counted; None: those of the stages are added up."""
    done = {n: read_json(run.dir.stage(n) / "summary.json") for n in stages_of(run.recipe) if run.dir.is_done(n)}
    minutes = sum(s["minutes"] for s in done.values()) if since is None else (time.time() - since) / 60
    summary = {"minutes": round(minutes, 2)} | {k: v for k, v in done.get("export", {}).items() if isinstance(v, dict)}
    if "finetune" in done:
        summary["tasks"] = done["finetune"]
    write_json(run.dir.path / "summary.json", summary)
    return summary


def main_process() -> bool:
    """Whether this is the process that writes, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Returns when every process of the launcher has come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # The first of a process to be made decides what it sees: on CPUs nobody, unless told of them. Others wait here
        # while the main process counts words for hours; after ten minutes, NCCL would take them for dead.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7)).wait_for_everyone()


def say(text: str) -> None:
    """A line on stderr, of the main process alone."""
    if main_process():
        print(text, file=sys.stderr, flush=True)


def saying(what: str, every: int, total: int = 0, done: int = 0) -> Callable[[int], None]:
    """A progress callback that adds up what it is given to `done`, and says so at every `every`; where `total` says how
    many there will be, also how long the rest will take at this pace."""
    started, begun = time.monotonic(), done

    def progress(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if done // every > before // every:
            left = (time.monotonic() - started) / (done - begun) * (total - done) / 60
            say(f"{what}: {done:,}" + (f" of {total:,}, {left:.1f} min left" if total else ""))

    return progress
