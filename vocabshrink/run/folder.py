"""The folder of one run: where each stage writes, and how a finished stage differs from a crashed one.

A stage owns one folder and writes `DONE` into it last, with the checksums of its files, which later stages verify. An
unfinished attempt is thrown away when the stage starts again, except its `checkpoints/`, from which training resumes.
Every file appears whole or not at all. Of several processes of one run only the main one may write here."""

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tokenizer_build import files
from tokenizer_build.errors import InputError

# What a fine-tuning's summary says beside its tasks' names.
OF_SUMMARY = {"average", "seconds_per_step", "tokens", "test", "rounded", "minutes"}
PACKAGES = ("vocabshrink", "torch", "transformers", "tokenizers", "accelerate", "onnxruntime", "numpy", "model2vec")


@dataclass(frozen=True)
class RunDir:
    """The run folder at `path`; it need not exist yet."""

    path: Path

    def stage(self, name: str) -> Path:
        """Folder of a stage, existing or not."""
        return self.path / name

    def is_done(self, name: str) -> bool:
        """Whether the stage ran to its end."""
        return (self.stage(name) / "DONE").is_file()

    def start(self, name: str) -> None:
        """Empties the stage's folder. `checkpoints/` stays unless the stage is finished: then it is done again from
        nothing. Without checkpoints the stage's metrics go too; with them, training truncates them."""
        folder = self.stage(name)
        keep = set() if self.is_done(name) else {"checkpoints"}
        (folder / "DONE").unlink(missing_ok=True)  # first: a crash while emptying must not look finished
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            elif entry.name not in keep:
                shutil.rmtree(entry)
        if not (folder / "checkpoints").is_dir():
            self.truncate_metrics(name, -1)

    def finish(self, name: str, summary: dict) -> None:
        """Writes the stage's summary.json, sees that all of its files are on the disk, then writes `DONE`.
        The checkpoints go, which are larger than all that is kept."""
        folder, sums = self.stage(name), {}
        files.write_json(folder / "summary.json", summary)
        for path in sorted(folder.rglob("*")):
            if "checkpoints" not in (inside := path.relative_to(folder)).parts:
                sums |= {inside.as_posix(): files.checksum(path)} if path.is_file() else {}
            if path.is_dir() or inside.as_posix() in sums:  # names among checkpoints too, whose files are synced
                files.sync(path)
        files.sync(folder)
        files.write_json(folder / "DONE", sums)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def verify(self, name: str) -> None:
        """Raises InputError for a file of a finished stage that is not as the stage left it."""
        folder = self.stage(name)
        for inside, found in files.read_json(folder / "DONE").items() if (folder / "DONE").stat().st_size else ():
            if not (folder / inside).is_file() or files.checksum(folder / inside) != found:
                what = f"{folder / inside} is damaged, altered or missing since stage {name} wrote it"
                raise InputError(f"{what}: delete {folder} to have the stage done again")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out of the run until the block ends. Raises InputError where one is in it already."""
        with files.claimed(lock := self.path / ".lock") as mine:
            if not mine:
                holder = lock.read_text(encoding="utf-8") or "another process"
                raise InputError(f"{self.path}: {holder} is at work on this run: wait for it, or choose another name")
            yield

    def append_metrics(self, row: dict) -> None:
        """Adds one row to metrics.jsonl; it is on the disk when this returns."""
        path = self.path / "metrics.jsonl"
        with files.naming_bad_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(files.plain(row), ensure_ascii=False) + "\n")
            for changed in (path, self.path)[: 1 + new]:
                files.sync(changed)

    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl, without a last line that a crash cut short."""
        path = self.path / "metrics.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        whole = io.BytesIO(content[: content.rfind(b"\n") + 1])
        return [row for _, row in files.read_jsonl(path, whole)]

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Drops the rows that `stage` wrote after `step`: a resumed stage will write them again."""
        if (self.path / "metrics.jsonl").is_file():
            rows = [row for row in self.metrics() if row.get("stage") != stage or row.get("step", 0) <= step]
            files.write_jsonl(self.path / "metrics.jsonl", rows)

    def write_environment(self) -> None:
        """Writes environment.json: what a reader needs to judge a figure, and nothing about who ran it."""
        torch = sys.modules.get("torch")  # only where the caller has loaded it: this layer is free of torch
        gpus = range(torch.cuda.device_count()) if torch else ()
        packages = [name for name in PACKAGES if any(metadata.Distribution.discover(name=name))]
        environment = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": processor(),
            "cpu_count": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(index) for index in gpus],
            "git_commit": git_commit(),
        }
        files.write_json(self.path / "environment.json", environment)


@dataclass(frozen=True)
class SharedRunDir(RunDir):
    """A run whose stages are in `shared`, a folder of many runs, each under the hash of the settings that decide it
    (settings_of: stage name -> those settings): what two runs have in common is made once. The rest is at `path`."""

    shared: Path
    settings_of: Callable[[str], dict]

    def stage(self, name: str) -> Path:
        return Path(self.shared) / f"{name}-{files.hash_of(self.settings_of(name))}"


def task_rows(tasks: dict) -> list[tuple[str, ...]]:
    """(task, metric, median, min, max) of a fine-tuning's summary as text, the average of the tasks last."""
    rows = [
        (task, metric, *(f"{figures[key]:.4f}" for key in ("median", "min", "max")))
        for task in tasks.keys() - OF_SUMMARY
        for metric, figures in tasks[task].items()
    ]
    return [*sorted(rows), ("average", "", f"{tasks['average']:.4f}", "", "")]


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"(?im)^model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this checkout; None for an installed package, whose surroundings would mislead."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or not shutil.which("git"):
        return None
    answer = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None
