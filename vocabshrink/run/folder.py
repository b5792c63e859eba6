"""The folder of one run: where each stage writes, and how a finished stage differs from a crashed one.

A stage owns one folder and writes `DONE` into it last, so "is it done?" is one look at the disk and needs no
database. Every file is written under a temporary name in the same folder and renamed: a reader sees the old
file or the new one, never half of one. An unfinished attempt is thrown away when the stage starts again, but
for its `checkpoints/`, from which training resumes. The cost is one rename per file and one small append per
metrics row. There is no lock: two runs in one folder at once are the user's mistake, and when several
processes train together, only the main one may write here.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tokenizer_build.errors import InputError
from tokenizer_build.files import naming_full_disk, plain, write_json, write_text

# What a fine-tuning's summary says beside its tasks' names.
OF_SUMMARY = {"average", "seconds_per_step", "tokens", "test", "rounded", "minutes"}
PACKAGES = ("vocabshrink", "torch", "transformers", "tokenizers", "accelerate", "onnxruntime", "numpy", "model2vec")


@dataclass(frozen=True)
class RunDir:
    """The run folder at `path`; it need not exist yet."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path))

    def stage(self, name: str) -> Path:
        """Folder of a stage, existing or not."""
        return self.path / name

    def is_done(self, name: str) -> bool:
        """Whether the stage ran to its end."""
        return (self.stage(name) / "DONE").is_file()

    def start(self, name: str) -> Path:
        """Empty the stage's folder and return it.

        `checkpoints/` of an unfinished attempt stays. Starting a finished stage means doing it again from
        nothing, so its checkpoints go too. Without checkpoints the stage's metrics rows go as well; with
        them, the caller knows the step it resumes from and calls `truncate_metrics`.
        """
        folder = self.stage(name)
        keep = set() if self.is_done(name) else {"checkpoints"}
        (folder / "DONE").unlink(missing_ok=True)  # first: a crash while emptying must not look finished
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.name in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if not (folder / "checkpoints").is_dir():
            self.truncate_metrics(name, -1)
        return folder

    def finish(self, name: str, summary: dict) -> None:
        """Write the stage's summary.json, then `DONE`."""
        write_json(self.stage(name) / "summary.json", summary)
        write_text(self.stage(name) / "DONE", "")

    def append_metrics(self, row: dict) -> None:
        """Add one row to metrics.jsonl; it is on its way to the disk when this returns."""
        path = self.path / "metrics.jsonl"
        with naming_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")

    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl, without a last line that a crash cut short."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        rows = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise InputError(f"{path} line {number} is not JSON ({error}); delete that line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is not a JSON object; delete that line")
            rows.append(row)
        return rows

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Drop the rows that `stage` wrote after `step`: a resumed stage will write them again."""
        if not (self.path / "metrics.jsonl").is_file():
            return
        rows = [r for r in self.metrics() if r.get("stage") != stage or r.get("step", 0) <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.path / "metrics.jsonl", text)

    def write_environment(self) -> None:
        """Write environment.json: what a reader needs to judge a figure, and nothing about who ran it."""
        write_json(
            self.path / "environment.json",
            {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "versions": {"python": platform.python_version(), **_versions()},
                "platform": f"{platform.system()} {platform.machine()}",
                "cpu": processor(),
                "cpu_count": os.cpu_count(),
                "gpus": _gpu_names(),
                "git_commit": _git_commit(),
            },
        )


@dataclass(frozen=True)
class SharedRunDir(RunDir):
    """A run whose stages stand in `shared`, a folder of many runs, each under the hash of the settings that decide it.

    So what two runs have in common is made once. settings_of: stage name -> those settings (`Run.settings_of`). At
    `path` are the run's own files alone: recipe, environment, and the metrics of the stages that it made itself.
    """

    shared: Path
    settings_of: Callable[[str], dict]
    _stages: dict[str, Path] = field(default_factory=dict, init=False, repr=False, compare=False)

    def stage(self, name: str) -> Path:
        if name not in self._stages:  # asked for thousands of times, and a recipe does not change
            text = json.dumps(plain(self.settings_of(name)), sort_keys=True)
            self._stages[name] = Path(self.shared) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self._stages[name]


def task_rows(tasks: dict) -> list[tuple[str, ...]]:
    """(task, metric, median, min, max) of a fine-tuning's summary as text, the average of the tasks last."""
    rows = [
        (task, metric, *(f"{figures[key]:.4f}" for key in ("median", "min", "max")))
        for task, metrics in tasks.items()
        if task not in OF_SUMMARY
        for metric, figures in metrics.items()
    ]
    return [*rows, ("average", "", f"{tasks['average']:.4f}", "", "")]


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:  # read from the metadata: importing torch to ask its version takes seconds
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")  # only where the caller has loaded it: this layer is free of torch
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None  # an installed package: the commit of whatever repository surrounds it would mislead
    try:
        answer = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
