"""Sizes, start-up, memory and speed of delivered models beside their peers, in one run on one machine.

    python tests/bench/deliveries.py FOLDER... [--teacher FOLDER] [--no-static] [--seconds 2]
                                     [--out artifacts/bench/delivery.json]

Every system is measured from text to answer, in processes of its own: our runtime for a delivery and for the teacher as
fp32 and int8 ONNX, model2vec for static vectors of the same teacher. All get the same texts, whose length is in the
teacher's pieces: that a small vocabulary needs more is part of its price. They take turns, so that a machine that slows
down slows all of them. Such a process runs this file, which therefore imports only what every system needs."""

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import timeit
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

import numpy as np

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, replacing_folder, write_json
from vocabshrink.run.folder import RunDir
from vocabshrink.runtime.delivery import KINDS, load, name_of

LENGTHS, BATCHES, ROUNDS = (16, 64, 128), (1, 32), 3
STATIC_BUDGET = 7_000_000
WORDS = """the quick study of small models shows that a short list of common words is enough for most sentences while
rare names are written as several pieces and the reader of a long page about rivers machines music or law will not
notice which parts of it were ever joined because meaning comes from what stands around each word"""


@dataclass(frozen=True)
class System:
    """A name, a folder, and what opens it: "delivery" (our runtime) or "static" (model2vec)."""

    name: str
    folder: Path
    kind: str = "delivery"

    def files(self) -> list[Path]:
        """What its loader needs."""
        if self.kind == "static":
            return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
        manifest = load(self.folder).manifest
        whole = {"onnxruntime": {"files": [*manifest["files"], "MANIFEST.json"]}}  # older deliveries name no loaders
        return [self.folder / name for name in manifest.get("loaders", whole)["onnxruntime"]["files"]]

    def measure(self, threads: int, **asked) -> dict:
        """What `answer_here` says in a process of its own, and its "cold_start_seconds". Raises InputError."""
        asked |= {"kind": self.kind, "folder": str(self.folder.resolve()), "threads": threads}
        once = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        once["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command, began = [sys.executable, __file__, "--here"], time()
        done = subprocess.run(command, input=json.dumps(asked), env=os.environ | once, capture_output=True, text=True)
        if done.returncode or not done.stdout:
            last = done.stderr.strip().rpartition("\n")[2]
            raise InputError(f"{self.name}: measuring {self.folder} failed ({last or 'no word of why'})")
        said = json.loads(done.stdout)
        return said | {"cold_start_seconds": said["answered"] - began}


def answer_here(kind: str, folder: str, threads: int, texts: dict[str, str], batches: list[int], seconds: float):
    """Answers a first question, then times calls. Returns {"answered": Unix time, "rss_mb": this process's peak until
    then, "times": {"LENGTHxBATCH": seconds of each call}}. texts: {length: text}."""
    if kind == "static":
        from model2vec import StaticModel

        answer = StaticModel.from_pretrained(folder).encode
    else:
        model = load(folder, threads)
        if model.task == "fill-mask":  # whose texts must hold a mask
            raise InputError(f"{folder} is for the task {model.task!r}: leave it out")
        answer = getattr(model, KINDS[model.task].method)
    answer(["a first question"])
    answered, status = time(), Path("/proc/self/status").read_text()  # getrusage counts the parent's memory too
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1000
    cells = {f"{length}x{batch}": [text] * batch for length, text in texts.items() for batch in batches}
    times = {cell: time_calls(lambda some=some: answer(some), seconds) for cell, some in cells.items()}
    return {"answered": answered, "rss_mb": peak, "times": times}


def time_calls(call: Callable[[], object], seconds: float, least: int = 5) -> list[float]:
    """Seconds of each call, after two to warm up: as many calls as `seconds` are enough for, `least` or more."""
    timer = timeit.Timer(call)
    once = max(min(timer.repeat(2, number=1)), 1e-9)
    return timer.repeat(max(least, int(seconds / once)), number=1)


def bench(
    artifacts: Sequence[str | Path],
    *,
    teacher: str | Path | None = None,
    static: bool = True,
    out: str | Path = "artifacts/bench/delivery.json",
    seconds: float = 2.0,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
) -> dict:
    """Measure deliveries, and with a `teacher` its ONNX fp32 and int8 and (`static`) its static vectors; these peers
    are made once, beside `out`. Writes `out` and returns what it says: {"machine", "lengths", "systems": {name: {what
    `weigh` gives, medians of "cold_start_seconds" and "rss_mb", "latency": {threads: {"LENGTHxBATCH":
    `statistics_of`}}}}}. lengths: in pieces; seconds: of calls for each length, batch and number of threads (one and
    all). Raises InputError for a folder that is no delivery and where a package is missing."""
    from vocabshrink.run.engine import say

    if not (systems := [System(name_of(folder), Path(folder)) for folder in artifacts]):
        raise InputError("there is nothing to measure: give one delivered folder or more")
    if teacher is not None:
        from vocabshrink.models.loading import resolve_model

        teacher = resolve_model(str(teacher))
        systems += peers(teacher, Path(out).parent / "peers", static)
    results = {system.name: weigh(system) for system in systems}
    if len(results) < len(systems):
        raise InputError(f"two of the folders have one name ({', '.join(s.name for s in systems)}): rename one")
    texts = {length: text_of(length, (teacher or systems[0].folder) / "tokenizer.json") for length in lengths}
    asked = {"texts": texts, "batches": list(batches), "seconds": seconds / ROUNDS}
    said: dict[str, dict[str, list[dict]]] = {name: defaultdict(list) for name in results}  # by number of threads
    for threads, turn, system in itertools.product(sorted({1, os.cpu_count() or 1}), range(1, ROUNDS + 1), systems):
        say(f"{system.name}: {threads} thread{'s' * (threads > 1)}, round {turn} of {ROUNDS}")
        said[system.name][str(threads)].append(system.measure(threads, **asked))
    for name, found in results.items():
        rounds = said[name]
        for key, digits in (("cold_start_seconds", 3), ("rss_mb", 1)):  # medians: the first reads from the disk
            found[key] = round(float(np.median([one[key] for some in rounds.values() for one in some])), digits)
        found["latency"] = {}
        for threads, some in rounds.items():
            cells = {cell: [seconds for one in some for seconds in one["times"][cell]] for cell in some[0]["times"]}
            found["latency"][threads] = {cell: statistics_of(cells[cell], cell) for cell in cells}
    RunDir(Path(out).parent).write_environment()
    machine = read_json(Path(out).parent / "environment.json")
    write_json(Path(out), report := {"machine": machine, "lengths": list(lengths), "systems": results})
    return report


def weigh(system: System) -> dict:
    """A system's kind, and what its loader needs: "bytes", "gzip_bytes" (one by one, as servers do), "files"."""
    contents = {path.relative_to(system.folder).as_posix(): path.read_bytes() for path in system.files()}
    zipped = sum(len(gzip.compress(content, 6, mtime=0)) for content in contents.values())
    files = {name: len(content) for name, content in contents.items()}
    return {"kind": system.kind, "bytes": sum(files.values()), "gzip_bytes": zipped, "files": files}


def peers(teacher: Path, place: Path, static: bool) -> list[System]:
    """The teacher as ONNX, fp32 and int8, written by our own exporter: the same nodes as the deliveries'. With `static`
    also its static vectors by model2vec, int8, as wide as STATIC_BUDGET allows. Made once, in folders of `place`."""
    from vocabshrink.delivery.export import ExportSettings, export_model
    from vocabshrink.run.engine import say
    from vocabshrink.run.recipe import DeliverySection

    systems = [System(name, place / name) for name in ("teacher-fp32", "teacher-int8")]
    for system, weights in zip(systems, ("fp32", "int8"), strict=True):
        if not (system.folder / "MANIFEST.json").is_file():
            say(f"exporting {teacher} as {weights}")
            # signed: the fastest int8 there is, so that the peer is not slowed down
            section = DeliverySection(weights=weights, max_positions=max(LENGTHS), kernel="signed")
            settings = ExportSettings("embedding", section, force=True)
            export_model(teacher, system.folder, settings)
    vectors = System("model2vec", place / "model2vec", "static")
    if static and not (vectors.folder / "model.safetensors").is_file():
        try:
            from model2vec.distill import distill
        except ImportError as error:
            remedy = "pip install 'model2vec[distill]>=0.10', or leave it out"
            raise InputError(f"the static peer needs {error.name}: {remedy}") from error
        say(f"distilling {teacher} into static vectors (a minute or more)")
        pieces = len(read_json(teacher / "tokenizer.json")["model"]["vocab"])
        width = int((STATIC_BUDGET - 500_000) / pieces) // 8 * 8  # its tokenizer.json takes 450 KB
        with replacing_folder(vectors.folder) as new:
            distill(str(teacher), pca_dims=width, quantize_to="int8").save_pretrained(str(new))
    return [*systems, vectors] if static else systems


def text_of(length: int, tokenizer_file: Path) -> str:
    """A text of `length` pieces, special tokens included, or one more where a word takes two."""
    from tokenizer_build.tokenizer import load_tokenizer

    tokenizer, words = load_tokenizer(tokenizer_file), WORDS.split() * (1 + length // 50)
    pieces = [len(tokenizer.encode(word, add_special_tokens=False).ids) for word in words]
    needed = length - len(tokenizer.encode("").ids)
    return " ".join(words[: 1 + int(np.searchsorted(np.cumsum(pieces), needed))])


def statistics_of(times: Sequence[float], cell: str) -> dict[str, float]:
    """Seconds of the calls of a cell LENGTHxBATCH -> p50 and p95 in milliseconds, texts a second, calls."""
    p50, p95 = (round(1000 * float(found), 3) for found in np.percentile(times, [50, 95]))
    rate = round(int(cell.partition("x")[2]) * len(times) / sum(times), 1)
    return {"p50_ms": p50, "p95_ms": p95, "texts_per_second": rate, "calls": len(times)}


def bench_tables(report: dict) -> list[tuple]:
    """(title, heads, rows) of sizes and start-up; then, for each `threads`, of milliseconds and texts a second."""
    systems, size = report["systems"], "{bytes:,} {gzip_bytes:,} {cold_start_seconds:.2f} {rss_mb:.0f}".format
    rows = [(name, *size(**found).split()) for name, found in systems.items()]
    tables = [("Size and start", ("", "bytes", "gzipped", "cold start, s", "RSS, MB"), rows)]
    speed = "{p50_ms:.2f} / {p95_ms:.2f}\n{texts_per_second:,.0f}/s".format
    for threads, cells in next(iter(systems.values()))["latency"].items():
        heads = ["", *(cell.replace("x", " pieces\nbatch ") for cell in cells)]
        rows = [(name, *(speed(**c) for c in found["latency"][threads].values())) for name, found in systems.items()]
        tables.append((f"p50 / p95 ms, texts a second: {threads} thread{'s' * (threads != '1')}", heads, rows))
    return tables


def main() -> None:
    from rich.console import Console

    from vocabshrink.cli import table_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--teacher", help="folder or package:NAME/FOLDER, exported as a peer")
    parser.add_argument("--no-static", dest="static", action="store_false", help="no model2vec peer of the teacher")
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench/delivery.json"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls for each length, batch, number of threads")
    try:
        report = bench(**vars(parser.parse_args()))
    except InputError as error:
        parser.error(str(error))
    Console().print(*(table_of(*table) for table in bench_tables(report)))


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        print(json.dumps(answer_here(**json.load(sys.stdin))))
    else:
        main()
