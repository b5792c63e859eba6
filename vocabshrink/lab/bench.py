"""Sizes, start-up, memory, speed and quality of delivered models beside their peers, in one run on one machine.

Every system is measured from text to answer, in processes of its own: our runtime for a delivery (and for the
teacher, exported as fp32 and int8 ONNX), model2vec for static vectors distilled from the same teacher. A length is a
number of pieces under the teacher's tokenizer, and all systems are given the same texts: a small vocabulary needs
more pieces for them, and that is part of its price. Systems take turns, round after round, so that a machine that slows
down slows all of them.

- Cold start: from the start of a Python process to the printed first answer; the median of several. RSS: the peak of
  that process.
- Bytes: what the system's loader needs, as files, and each gzipped as servers do.
- Quality, where task folders are given: Spearman of the cosine for scored pairs; else the accuracy of a logistic
  regression on the embeddings (a linear probe), its strength chosen on held-out training rows.
"""

import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.table import Table

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.runtime.delivery import load

LENGTHS, BATCHES = (16, 64, 128), (1, 32)
STATIC_BUDGET = 7_000_000
WORDS = """the quick study of small models shows that a short list of common words is enough for most sentences while
rare names are written as several pieces and the reader of a long page about rivers machines music or law will not
notice which parts of it were ever joined because meaning comes from what stands around each word"""
PROBE_ROWS = 8_000  # of the training set, at most: enough for a linear probe, minutes less than all of SST-2
METHODS = {"embedding": "embed", "classification": "classify", "tokens": "label_tokens"}
COLD_START = {
    "delivery": "from vocabshrink import load; answer = load(PATH).METHOD(['a first question'])",
    "static": "from model2vec import StaticModel as M; answer = M.from_pretrained(PATH).encode(['a first question'])",
}
PEAK = """
import json
with open('/proc/self/status') as file:
    peak = next(int(line.split()[1]) / 1000 for line in file if line.startswith('VmHWM'))
print(json.dumps({'rss_mb': peak, 'answer': len(answer)}), flush=True)
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
        if model.task not in METHODS:
            raise InputError(f"{self.folder} is for the task {model.task!r}: bench measures {list(METHODS)}")
        return getattr(model, METHODS[model.task])

    @property
    def files(self) -> list[Path]:
        """What its loader needs."""
        if self.kind == "static":
            return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
        manifest = load(self.folder).manifest
        needed = manifest.get("loaders", {}).get("onnxruntime", {}).get("files")
        return [self.folder / name for name in needed or [*manifest["files"], "MANIFEST.json"]]


def bench(
    artifacts: Sequence[str | Path],
    *,
    teacher: str | Path | None = None,
    static: bool = True,
    peers: str | Path = "artifacts/bench/peers",
    out: str | Path = "artifacts/bench/delivery.json",
    tasks: dict[str, str | Path] | None = None,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] | None = None,
    seconds: float = 2.0,
    starts: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measure delivered folders, and with a `teacher` folder its ONNX fp32 and int8 and (`static`) its static vectors.

    Peers are made once and kept in `peers`. `tasks`: {name: folder with train/test.jsonl} for the quality.
    `threads`: by default one and all. `seconds`: of calls for each length, batch and number of threads, in three
    rounds; `starts`: cold starts. Writes `out` and returns what it says: {"machine", "lengths", "systems": {name:
    {"bytes", "gzip_bytes", "files", "cold_start_seconds", "rss_mb", "latency": {threads: {"LENGTHxBATCH": {"p50_ms",
    "p95_ms", "texts_per_second", "calls"}}}, "quality": {task: value}}}}.
    Raises InputError for a folder that is no delivery and where a package is missing.
    """
    systems = [System(Path(folder).resolve().name, Path(folder), "delivery") for folder in artifacts]
    if not systems:
        raise InputError("there is nothing to measure: give one delivered folder or more")
    for system in systems:
        system.open(1)
    if teacher is not None:
        systems += teacher_systems(Path(teacher), Path(peers), progress)
        if static:
            systems.append(static_system(Path(teacher), Path(peers), progress))
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders have one name ({', '.join(names)}): rename one")
    threads = threads or sorted({1, os.cpu_count() or 1})
    tokenizer = Path(teacher or systems[0].folder) / "tokenizer.json"
    texts = {length: text_of(length, tokenizer) for length in lengths}
    results: dict[str, dict] = {}
    for system in systems:
        progress(f"{system.name}: bytes, cold start")
        sizes = {path.relative_to(system.folder).as_posix(): path.stat().st_size for path in system.files}
        results[system.name] = {
            "kind": system.kind,
            "bytes": sum(sizes.values()),
            "gzip_bytes": sum(len(gzip.compress(path.read_bytes(), 6, mtime=0)) for path in system.files),
            "files": sizes,
            **cold_start(system, starts),
        }
    for count in threads:
        times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for turn in range(3):
            for system in systems:
                progress(f"{system.name}: {count} thread{'s' * (count > 1)}, round {turn + 1} of 3")
                for key, more in timed_apart(system, count, texts, batches, seconds / 3).items():
                    times[system.name].setdefault(key, []).extend(more)
        for name, by_key in times.items():
            results[name].setdefault("latency", {})[str(count)] = {
                key: statistics_of(found, int(key.partition("x")[2])) for key, found in by_key.items()
            }
    for task, folder in (tasks or {}).items():
        for system in systems:
            if system.kind == "static" or load(system.folder).task == "embedding":
                progress(f"{system.name}: {task}")
                quality = results[system.name].setdefault("quality", {})
                quality[task] = round(task_quality(system.open(os.cpu_count() or 1), Path(folder)), 4)
    report = {"machine": machine(), "lengths": list(lengths), "systems": results}
    write_json(Path(out), report)
    return report


def teacher_systems(teacher: Path, peers: Path, progress: Callable[[str], None]) -> list[System]:
    """The teacher as ONNX, fp32 and int8, written by our own exporter: the same nodes as the deliveries'."""
    systems = []
    for weights in ("fp32", "int8"):
        folder = peers / f"teacher-{weights}"
        if not (folder / "MANIFEST.json").is_file():
            from vocabshrink.delivery.export import export_model

            progress(f"exporting {teacher} as {weights}")
            # signed: the fastest int8 there is, so that the peer is not slowed down
            export_model(
                teacher,
                folder,
                task="embedding",
                formats=weights,
                kernel="signed",
                max_positions=max(LENGTHS),
                force=True,
            )
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
        pieces = len(json.loads((teacher / "tokenizer.json").read_bytes())["model"]["vocab"])
        width = int((STATIC_BUDGET - 500_000) / pieces) // 8 * 8  # its tokenizer.json takes 450 KB
        model = distill(str(teacher), pca_dims=width, quantize_to="int8")
        peers.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".model2vec.", dir=peers))
        model.save_pretrained(str(place))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(place, folder)
    return System(folder.name, folder, "static")


def text_of(length: int, tokenizer_file: Path) -> str:
    """A text of `length` pieces, special tokens included, or one more where a word takes two."""
    tokenizer = load_tokenizer(tokenizer_file)
    words, count = WORDS.split(), 1
    while len(tokenizer.encode(" ".join(words[:count])).ids) < length:
        count += 1
        if count > len(words):
            words += words
    return " ".join(words[:count])


def cold_start(system: System, starts: int) -> dict[str, float]:
    """{"cold_start_seconds", "rss_mb"}: medians over processes, the first (whose files may be on disk yet) left out."""
    code = COLD_START[system.kind].replace("PATH", repr(str(system.folder.resolve()))) + PEAK
    if system.kind == "delivery":
        code = code.replace("METHOD", METHODS[load(system.folder).task])
    seconds, peaks = [], []
    for _ in range(starts + 1):
        began = time.perf_counter()
        found, elapsed = _answer(["-c", code], system, began=began)
        seconds.append(elapsed)
        peaks.append(found["rss_mb"])
    return {
        "cold_start_seconds": round(float(np.median(seconds[1:])), 3),
        "rss_mb": round(float(np.median(peaks[1:])), 1),
    }


def timed_apart(
    system: System, threads: int, texts: dict[int, str], batches: Sequence[int], seconds: float
) -> dict[str, list[float]]:
    """{"LENGTHxBATCH": seconds of each call}, measured in a process of its own."""
    asked = {"folder": str(system.folder), "kind": system.kind, "threads": threads, "seconds": seconds}
    asked |= {"texts": texts, "batches": list(batches)}
    return _answer(["-m", "vocabshrink.lab.bench"], system, json.dumps(asked), threads=threads)[0]


def _answer(arguments: list[str], system: System, sent: str = "", *, threads: int = 1, began: float = 0.0):
    """(a process's line of JSON, seconds until it came)."""
    once = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    root = str(Path(__file__).resolve().parents[2])
    once["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=os.environ | once, **pipes) as process:
        if sent:
            process.stdin.write(sent)
            process.stdin.close()
        line = process.stdout.readline()
        elapsed = time.perf_counter() - began
        process.stdin = None
        rest = process.communicate()[1]
    if process.returncode or not line:
        last = (rest.strip().splitlines() or ["no word of why"])[-1]
        raise InputError(f"{system.name}: measuring {system.folder} failed ({last})")
    return json.loads(line), elapsed


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
    held_out = next(
        (folder / f"{name}.jsonl" for name in ("test", "validation") if (folder / f"{name}.jsonl").is_file()), None
    )
    if held_out is None:
        raise InputError(f"{folder} has neither test.jsonl nor validation.jsonl: give a task's folder")
    rows = _rows(held_out)
    if "sentence2" in rows[0]:
        from scipy.stats import spearmanr

        if not isinstance(rows[0]["label"], float):
            raise InputError(f"{held_out} has pairs without scores: the linear probe takes single sentences")
        first, second = (_unit(embed([row[name] for row in rows])) for name in ("sentence1", "sentence2"))
        return float(spearmanr((first * second).sum(1), [row["label"] for row in rows]).statistic)
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    train = _rows(folder / "train.jsonl")
    chosen = np.random.default_rng(0).permutation(len(train))[:PROBE_ROWS]
    train = [train[i] for i in chosen]
    vectors, labels = _unit(embed([row["sentence1"] for row in train])), [row["label"] for row in train]
    fit, check, fit_labels, check_labels = train_test_split(vectors, labels, test_size=0.2, random_state=0)

    def probe(strength: float, rows: np.ndarray, targets: list) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(rows, targets)

    strengths = (0.1, 1.0, 10.0, 100.0)
    best = max(strengths, key=lambda strength: probe(strength, fit, fit_labels).score(check, check_labels))
    answers = _unit(embed([row["sentence1"] for row in rows]))
    return float(probe(best, vectors, labels).score(answers, [row["label"] for row in rows]))


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise InputError(f"{path} is missing: give a task's folder")
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSONL ({error}): write one object a line") from error
    if not rows or any(not isinstance(row, dict) or not {"sentence1", "label"} <= row.keys() for row in rows):
        raise InputError(f"{path} is empty or lacks sentence1 or label in a row: give a task's folder")
    return rows


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def machine() -> dict:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    packages = {}
    for name in ("onnxruntime", "tokenizers", "numpy", "model2vec"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": model, "threads": os.cpu_count(), "python": platform.python_version(), "packages": packages}


def bench_tables(report: dict) -> list[Table]:
    """Sizes, start-up and quality; then p50 / p95 milliseconds and texts a second by length, batch and threads."""
    systems = report["systems"]
    tasks = list(dict.fromkeys(task for system in systems.values() for task in system.get("quality", {})))
    sizes = Table("", "bytes", "gzipped", "cold start, s", "RSS, MB", *tasks, title="Size, start and quality")
    for name, system in systems.items():
        quality = [f"{system['quality'][task]:.4f}" if task in system.get("quality", {}) else "" for task in tasks]
        start = f"{system['cold_start_seconds']:.2f}"
        sizes.add_row(
            name, f"{system['bytes']:,}", f"{system['gzip_bytes']:,}", start, f"{system['rss_mb']:.0f}", *quality
        )
    tables = [sizes]
    for threads in next(iter(systems.values()))["latency"]:
        keys = list(next(iter(systems.values()))["latency"][threads])
        columns = [f"{key.partition('x')[0]} pieces\nbatch {key.partition('x')[2]}" for key in keys]
        title = f"p50 / p95 ms, texts a second: {threads} thread{'s' * (threads != '1')}"
        table = Table("", *columns, title=title)
        for name, system in systems.items():
            cells = [system["latency"][threads][key] for key in keys]
            table.add_row(
                name, *(f"{c['p50_ms']:.2f} / {c['p95_ms']:.2f}\n{c['texts_per_second']:,.0f}/s" for c in cells)
            )
        tables.append(table)
    for table in tables:
        for column in table.columns[1:]:
            column.justify = "right"
    return tables


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
