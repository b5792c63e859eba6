"""Sizes, start-up, memory, speed and quality of delivered models beside their peers, in one run on one machine.

Every system is measured from text to answer, in processes of its own: our runtime for a delivery (and for the teacher,
exported as fp32 and int8 ONNX), model2vec for static vectors distilled from the same teacher. Lengths are in pieces of
the teacher's tokenizer, and all systems get the same texts: a small vocabulary needs more pieces for them, and that is
part of its price. Systems take turns, round after round, so that a machine that slows down slows all of them.

- Cold start: from the start of a Python process to its first answer; the median of several. RSS: that process's peak.
- Bytes: the files that the system's loader needs, and the same gzipped one by one, as servers do.
- Quality, where task folders are given: Spearman of the cosine for scored pairs; else the accuracy of a logistic
  regression on the embeddings (a linear probe), its strength chosen on held-out training rows.
"""

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
from rich.table import Table

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, read_jsonl, replacing_folder, write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.run.folder import processor
from vocabshrink.runtime.delivery import load, name_of
from vocabshrink.runtime.kinds import KINDS

LENGTHS, BATCHES = (16, 64, 128), (1, 32)
STATIC_BUDGET = 7_000_000
WORDS = """the quick study of small models shows that a short list of common words is enough for most sentences while
rare names are written as several pieces and the reader of a long page about rivers machines music or law will not
notice which parts of it were ever joined because meaning comes from what stands around each word"""
PROBE_ROWS = 8_000  # of the training set, at most: enough for a linear probe, minutes less than all of SST-2
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of the probe, sklearn's C
COLD_START = {
    "delivery": "from vocabshrink import load; answer = load(PATH).METHOD(['a first question'])",
    "static": "from model2vec import StaticModel as M; answer = M.from_pretrained(PATH).encode(['a first question'])",
}
REPORT = """
import json, time
answered = time.time()
with open('/proc/self/status') as file:
    peak = next(int(line.split()[1]) / 1000 for line in file if line.startswith('VmHWM'))
print(json.dumps({'answered': answered, 'rss_mb': peak, 'answer': len(answer)}))
"""


@dataclass(frozen=True)
class System:
    """A name, a folder, and what opens it: "delivery" (our runtime) or "static" (model2vec)."""

    name: str
    folder: Path
    kind: str

    def open(self, threads: int) -> Callable[[list[str]], object]:
        """The function from texts to answers."""
        if self.kind == "static":
            from model2vec import StaticModel

            return StaticModel.from_pretrained(str(self.folder)).encode
        model = load(self.folder, threads)
        if not KINDS[model.task].any_text:
            known = [task for task, kind in KINDS.items() if kind.any_text]
            raise InputError(f"{self.folder} is for the task {model.task!r}: bench measures {known}")
        return getattr(model, KINDS[model.task].method)

    @property
    def files(self) -> list[Path]:
        """What its loader needs."""
        if self.kind == "static":
            return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
        manifest = load(self.folder).manifest
        needed = manifest.get("loaders", {}).get("onnxruntime", {}).get("files")
        return [self.folder / name for name in needed or [*manifest["files"], "MANIFEST.json"]]


@dataclass(frozen=True)
class Calls:
    """What is timed: lengths in pieces, texts in a batch, numbers of threads (None: one and all), seconds of calls for
    each of their combinations, in three rounds, and cold starts."""

    lengths: Sequence[int] = LENGTHS
    batches: Sequence[int] = BATCHES
    threads: Sequence[int] | None = None
    seconds: float = 2.0
    starts: int = 5


def bench(
    artifacts: Sequence[str | Path],
    *,
    teacher: str | Path | None = None,
    static: bool = True,
    peers: str | Path = "artifacts/bench/peers",
    out: str | Path = "artifacts/bench/delivery.json",
    tasks: dict[str, str | Path] | None = None,
    calls: Calls | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measure delivered folders, and with a `teacher` folder its ONNX fp32 and int8 and (`static`) its static vectors.

    Peers are made once and kept in `peers`. `tasks`: {name: folder with train/test.jsonl} for the quality. Writes `out`
    and returns what it says: {"machine", "lengths", "systems": {name: {"bytes", "gzip_bytes", "files",
    "cold_start_seconds", "rss_mb", "latency": {threads: {"LENGTHxBATCH": {"p50_ms", "p95_ms", "texts_per_second",
    "calls"}}}, "quality": {task: value}}}}.
    Raises InputError for a folder that is no delivery and where a package is missing.
    """
    calls = calls or Calls()
    systems = [System(name_of(folder), Path(folder), "delivery") for folder in artifacts]
    if not systems:
        raise InputError("there is nothing to measure: give one delivered folder or more")
    for system in systems:
        system.open(1)
    if teacher is not None:
        systems += teacher_systems(Path(teacher), Path(peers), progress)
        systems += [static_system(Path(teacher), Path(peers), progress)] if static else []
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders have one name ({', '.join(names)}): rename one")
    results: dict[str, dict] = {}
    for system in systems:
        progress(f"{system.name}: bytes, cold start")
        contents = {path.relative_to(system.folder).as_posix(): path.read_bytes() for path in system.files}
        results[system.name] = {
            "kind": system.kind,
            "bytes": sum(map(len, contents.values())),
            "gzip_bytes": sum(len(gzip.compress(content, 6, mtime=0)) for content in contents.values()),
            "files": {name: len(content) for name, content in contents.items()},
            **cold_start(system, calls.starts),
            "latency": {},
        }
    tokenizer = Path(teacher or systems[0].folder) / "tokenizer.json"
    texts = {length: text_of(length, tokenizer) for length in calls.lengths}
    for threads in calls.threads or sorted({1, os.cpu_count() or 1}):
        times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
        for turn in range(3):
            for system in systems:
                progress(f"{system.name}: {threads} thread{'s' * (threads > 1)}, round {turn + 1} of 3")
                for key, more in timed_apart(system, threads, texts, calls.batches, calls.seconds / 3).items():
                    times[system.name][key] += more
        for name, by_key in times.items():
            figures = {key: statistics_of(found, int(key.partition("x")[2])) for key, found in by_key.items()}
            results[name]["latency"][str(threads)] = figures
    for task, folder in (tasks or {}).items():
        for system in systems:
            if system.kind == "static" or load(system.folder).task == "embedding":
                progress(f"{system.name}: {task}")
                quality = task_quality(system.open(os.cpu_count() or 1), Path(folder))
                results[system.name].setdefault("quality", {})[task] = round(quality, 4)
    report = {"machine": machine(), "lengths": list(calls.lengths), "systems": results}
    write_json(Path(out), report)
    return report


def teacher_systems(teacher: Path, peers: Path, progress: Callable[[str], None]) -> list[System]:
    """The teacher as ONNX, fp32 and int8, written by our own exporter: the same nodes as the deliveries'."""
    systems = []
    for weights in ("fp32", "int8"):
        folder = peers / f"teacher-{weights}"
        if not (folder / "MANIFEST.json").is_file():
            from vocabshrink.delivery.export import ExportSettings, export_model

            progress(f"exporting {teacher} as {weights}")
            # signed: the fastest int8 there is, so that the peer is not slowed down
            settings = ExportSettings("embedding", weights, max(LENGTHS), kernel="signed", force=True)
            export_model(teacher, folder, settings)
        systems.append(System(folder.name, folder, "delivery"))
    return systems


def static_system(teacher: Path, peers: Path, progress: Callable[[str], None]) -> System:
    """The teacher's static vectors by model2vec, int8, as wide as STATIC_BUDGET allows."""
    folder = peers / "model2vec"
    if not (folder / "model.safetensors").is_file():
        try:
            from model2vec.distill import distill
        except ImportError as error:
            raise InputError(
                f"the static peer needs {error.name}: pip install 'model2vec[distill]>=0.10', or leave it out"
            ) from error
        progress(f"distilling {teacher} into static vectors (a minute or more)")
        pieces = len(read_json(teacher / "tokenizer.json")["model"]["vocab"])
        width = int((STATIC_BUDGET - 500_000) / pieces) // 8 * 8  # its tokenizer.json takes 450 KB
        model = distill(str(teacher), pca_dims=width, quantize_to="int8")
        with replacing_folder(folder) as new:
            model.save_pretrained(str(new))
    return System(folder.name, folder, "static")


def text_of(length: int, tokenizer_file: Path) -> str:
    """A text of `length` pieces, special tokens included, or one more where a word takes two."""
    tokenizer = load_tokenizer(tokenizer_file)
    words = WORDS.split() * (1 + length // len(WORDS.split()))
    pieces = [len(tokenizer.encode(word, add_special_tokens=False).ids) for word in words]
    special = len(tokenizer.encode("").ids)
    return " ".join(words[: 1 + int(np.searchsorted(special + np.cumsum(pieces), length))])


def cold_start(system: System, starts: int) -> dict[str, float]:
    """{"cold_start_seconds", "rss_mb"}: medians over processes, the first (whose files may be on disk yet) left out."""
    code = COLD_START[system.kind].replace("PATH", repr(str(system.folder.resolve()))) + REPORT
    if system.kind == "delivery":
        code = code.replace("METHOD", KINDS[load(system.folder).task].method)
    found = []
    for _ in range(starts + 1):
        began = time.time()
        said = _answer(["-c", code], system)
        found.append((said["answered"] - began, said["rss_mb"]))
    seconds, peak = np.median(found[1:], axis=0)
    return {"cold_start_seconds": round(float(seconds), 3), "rss_mb": round(float(peak), 1)}


def timed_apart(
    system: System, threads: int, texts: dict[int, str], batches: Sequence[int], seconds: float
) -> dict[str, list[float]]:
    """{"LENGTHxBATCH": seconds of each call}, measured in a process of its own."""
    asked = {"folder": str(system.folder), "kind": system.kind, "threads": threads, "seconds": seconds}
    asked |= {"texts": texts, "batches": list(batches)}
    return _answer(["-m", "vocabshrink.lab.bench"], system, json.dumps(asked), threads=threads)


def _answer(arguments: list[str], system: System, sent: str = "", *, threads: int = 1) -> dict:
    """The line of JSON that a Python process of its own prints."""
    once = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).resolve().parents[2])
    once["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, input=sent, env=os.environ | once, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise InputError(f"{system.name}: measuring {system.folder} failed ({last})")
    return json.loads(done.stdout)


def time_calls(call: Callable[[], object], seconds: float, least: int = 5) -> list[float]:
    """Seconds of each call, after two to warm up: `least` calls or more, until `seconds` are over."""
    for _ in range(2):
        call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def statistics_of(times: Sequence[float], batch: int) -> dict[str, float]:
    """Seconds of calls of `batch` texts -> p50 and p95 in milliseconds, texts a second."""
    p50, p95 = 1000 * np.percentile(times, [50, 95])
    return {
        "p50_ms": round(float(p50), 3),
        "p95_ms": round(float(p95), 3),
        "texts_per_second": round(batch * len(times) / sum(times), 1),
        "calls": len(times),
    }


def task_quality(embed: Callable[[list[str]], np.ndarray], folder: Path) -> float:
    """Spearman of cosines with the scores of a pair task, else a linear probe's accuracy.

    On test.jsonl, or validation.jsonl where test has no file. Rows: {"sentence1", "sentence2"?, "label"}.
    """
    found = [path for name in ("test", "validation") if (path := folder / f"{name}.jsonl").is_file()]
    if not found:
        raise InputError(f"{folder} has neither test.jsonl nor validation.jsonl: give a task's folder")
    rows = _rows(found[0])
    if "sentence2" in rows[0]:
        from vocabshrink.data.held_out import read_rated_pairs

        if not isinstance(rows[0]["label"], float):
            raise InputError(f"{found[0]} has pairs without scores: the linear probe takes single sentences")
        return read_rated_pairs(found[0]).spearman(embed)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from sklearn.preprocessing import normalize

    train = _rows(folder / "train.jsonl")
    chosen = np.random.default_rng(0).permutation(len(train))[:PROBE_ROWS]
    split = ShuffleSplit(1, test_size=0.2, random_state=0)
    probe = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, cv=split)
    sides = [[train[i] for i in chosen], rows]
    vectors = [normalize(embed([row["sentence1"] for row in side])) for side in sides]
    labels = [[row["label"] for row in side] for side in sides]
    return float(probe.fit(vectors[0], labels[0]).score(vectors[1], labels[1]))


def _rows(path: Path) -> list[dict]:
    rows = [row for _, row in read_jsonl(path)]
    if not rows or any(not {"sentence1", "label"} <= row.keys() for row in rows):
        raise InputError(f"{path} is empty or lacks sentence1 or label in a row: give a task's folder")
    return rows


def machine() -> dict:
    """What the figures were measured on."""
    names = [name for name in ("onnxruntime", "tokenizers", "numpy", "model2vec") if util.find_spec(name)]
    packages = {name: metadata.version(name) for name in names}
    return {"cpu": processor(), "threads": os.cpu_count(), "python": platform.python_version(), "packages": packages}


def bench_tables(report: dict) -> list[Table]:
    """Sizes, start-up and quality; then p50 / p95 milliseconds and texts a second by length, batch and threads."""
    systems = report["systems"]
    sizes = {
        name: {
            "bytes": f"{system['bytes']:,}",
            "gzipped": f"{system['gzip_bytes']:,}",
            "cold start, s": f"{system['cold_start_seconds']:.2f}",
            "RSS, MB": f"{system['rss_mb']:.0f}",
            **{task: f"{value:.4f}" for task, value in system.get("quality", {}).items()},
        }
        for name, system in systems.items()
    }
    tables = [_table("Size, start and quality", sizes)]
    for threads in next(iter(systems.values()))["latency"]:
        cells: dict[str, dict[str, str]] = {name: {} for name in systems}
        for name, system in systems.items():
            for key, found in system["latency"][threads].items():
                length, batch = key.split("x")
                milliseconds = f"{found['p50_ms']:.2f} / {found['p95_ms']:.2f}"
                cells[name][f"{length} pieces\nbatch {batch}"] = f"{milliseconds}\n{found['texts_per_second']:,.0f}/s"
        tables.append(_table(f"p50 / p95 ms, texts a second: {threads} thread{'s' * (threads != '1')}", cells))
    return tables


def _table(title: str, rows: dict[str, dict[str, str]]) -> Table:
    """A row for each system, a column for each key that any of them has."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(row.get(column, "") for column in columns))
    return table


def _time_here() -> None:
    """The process that `timed_apart` starts: from standard input what to time, to standard output the seconds."""
    asked = json.load(sys.stdin)
    answer = System("", Path(asked["folder"]), asked["kind"]).open(asked["threads"])
    times = {}
    for length, text in asked["texts"].items():
        for batch in asked["batches"]:
            times[f"{length}x{batch}"] = time_calls(lambda texts=[text] * batch: answer(texts), asked["seconds"])
    print(json.dumps(times))


if __name__ == "__main__":
    _time_here()
