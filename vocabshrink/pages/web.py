"""A page that runs delivered models in the browser: a folder for any static server, and one file to open from a disk.

The folder holds index.html, the models in the layout that transformers.js reads, transformers.js itself with
onnxruntime-web's WebAssembly build, and passages with int8 vectors (a quarter of float32; a cosine moves by 0.003 at
most). Nothing is asked of any other host. Browsers forbid a page on a disk to read the files beside it, so
standalone.html holds all of them, compressed, in its own text: 14 MB where the folder has 22.

transformers.js imports onnxruntime-web's WebGPU build: 27 MB of WebAssembly whose processor kernels lack
GatherBlockQuantized. An import map gives it the plain WebAssembly build instead, 14 MB (3.7 MB as servers compress
it), which runs every graph that `export` writes. One thread: more need headers that static servers do not send.
"""

import base64
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from vocabshrink.runtime.delivery import load
from vocabshrink.runtime.kinds import KINDS

RUNTIME = {
    "onnxruntime": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "transformers": "@huggingface/transformers/dist/transformers.web.min.js",
    "wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
}
LOADED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # by transformers.js, beside the graph
DTYPES = {"onnx/model_q4.onnx": "q4", "onnx/model_quantized.onnx": "q8", "onnx/model.onnx": "fp32"}
SHOWN = tuple(task for task, kind in KINDS.items() if kind.any_text)
MOST_PASSAGES = 50_000  # 20 MB of vectors at 384 columns, and 20 ms a query


def build_web(
    artifacts: str | Path | Sequence[str | Path],
    out: str | Path,
    passages: str | Path | None = None,
    title: str = "Search by meaning, in your browser",
    *,
    examples: dict[str, list[str]] | None = None,
    node_modules: str | Path = "tests/js/node_modules",
) -> dict:
    """Write the page of one or several delivered folders to `out`; {file: bytes}, and sums under "model", "runtime".

    `passages`: JSONL of {"text", "source"?}, searched by the first embedder; without it the embedder's own index is
    taken where it has one, else the page searches what is pasted into it. `examples`: texts to try, by task.
    A page that was at `out` is replaced. Raises InputError for a folder that `load` refuses, a task that the page
    does not show, missing packages of npm, and a place where something else lies.
    """
    folders = [Path(artifacts)] if isinstance(artifacts, (str, Path)) else [Path(folder) for folder in artifacts]
    out, node_modules = Path(out), Path(node_modules)
    if out.exists() and not (out / "standalone.html").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no page of ours: give another place or remove it")
    for name in RUNTIME.values():
        if not (node_modules / name).is_file():
            raise InputError(
                f"{node_modules / name} is missing: npm ci --ignore-scripts --prefix {node_modules.parent}"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        sums = _write(place, folders, passages, title, examples or {}, node_modules)
        os.chmod(place, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return sums


def _write(place: Path, folders: list[Path], passages, title: str, examples: dict, node_modules: Path) -> dict:
    import jinja2

    models, count = [], 0
    for folder in folders:
        model = load(folder)
        if model.task not in SHOWN:
            raise InputError(f"{folder} is for the task {model.task!r}: the page shows {SHOWN}")
        graph = model.manifest["graph"]
        if graph not in DTYPES:
            raise InputError(f"{folder}/{graph} is no name that transformers.js knows: use one of {list(DTYPES)}")
        name = folder.resolve().name
        if any(name == other["folder"] for other in models):
            raise InputError(f"two of the folders are named {name}: rename one")
        names = [name for name in (*LOADED, graph) if (folder / name).is_file()]
        for file in names:
            target = place / "models" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)
        searched = model.task == "embedding" and not count
        if searched:
            count = _write_passages(place, folder, model, passages)
        models.append(
            {
                "folder": name,
                "name": name,
                "task": model.task,
                "dtype": DTYPES[graph],
                "files": names,
                "labels": model.labels,
                "dimension": model.dimension,
                "longest": model.longest,
                "passages": searched and count > 0,
                "examples": examples.get(model.task, []),
            }
        )
    if passages is not None and not count:
        raise InputError(f"{passages} can be searched by an embedder only, and none of the folders is one: add one")
    (place / "runtime").mkdir()
    for name in RUNTIME.values():
        shutil.copyfile(node_modules / name, place / "runtime" / Path(name).name)
    sizes = {str(path.relative_to(place)): path.stat().st_size for path in sorted(place.rglob("*")) if path.is_file()}
    sums = {kind: sum(size for name, size in sizes.items() if name.startswith(kind)) for kind in ("models", "runtime")}
    versions = {
        name: json.loads((node_modules / package / "package.json").read_bytes())["version"].split("-")[0]
        for name, package in (("transformers", "@huggingface/transformers"), ("onnxruntime", "onnxruntime-web"))
    }
    data = {
        "models": models,
        "runtime": {kind: f"runtime/{Path(name).name}" for kind, name in RUNTIME.items()},
        "passages": count,
        "bytes": sum(sizes.values()),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True)
    template = environment.get_template("web.html.jinja")
    facts = {
        "title": title,
        "data": data,
        "names": [model["name"] for model in models],
        "model_bytes": sums["models"],
        "runtime_bytes": sums["runtime"],
        "versions": versions,
    }
    (place / "index.html").write_text(template.render(**facts, files=None), encoding="utf-8")
    packed = {name: base64.b64encode(gzip.compress((place / name).read_bytes(), mtime=0)).decode() for name in sizes}
    (place / "standalone.html").write_text(template.render(**facts, files=packed), encoding="utf-8")
    pages = {name: (place / name).stat().st_size for name in ("index.html", "standalone.html")}
    return {"files": sizes | pages, "model": sums["models"], "runtime": sums["runtime"], "passages": count}


def _write_passages(place: Path, folder: Path, model, passages: str | Path | None) -> int:
    """passages.json and vectors.bin (int8 [passages, dimension], each row by its own scale); how many there are."""
    source = folder / "index" / "passages.jsonl" if passages is None else Path(passages)
    if not source.is_file():
        if passages is None:
            return 0
        raise InputError(f"{source} is missing: give a JSONL file of passages")
    records = []
    for number, line in enumerate(source.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source}, line {number} is not JSON ({error}): write one object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"].strip():
            raise InputError(f'{source}, line {number} has no "text": write {{"text": ...}}')
        shown = {"text": record["text"]}
        if isinstance(record.get("source"), str):
            shown["source"] = record["source"]
        records.append(shown)
    if not 1 <= len(records) <= MOST_PASSAGES:
        raise InputError(f"{source} has {len(records):,} passages: give 1 to {MOST_PASSAGES:,}")
    vectors = model.embed([record["text"] for record in records])
    vectors *= 127 / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    (place / "vectors.bin").write_bytes(np.rint(vectors).astype(np.int8).tobytes())
    (place / "passages.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return len(records)
