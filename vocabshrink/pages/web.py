"""A page that runs delivered models in the browser: a folder for any static server, and one file to open from a disk.

The page asks no other host for anything: models, transformers.js and onnxruntime-web lie beside it, and passages with
int8 vectors (a cosine moves by 0.003 at most). Browsers forbid a page opened from a disk to read the files beside it,
so standalone.html holds all of them, compressed, in its own text: 14 MB where the folder has 22. transformers.js
imports onnxruntime-web's WebGPU build (27 MB); an import map gives it the WebAssembly one (14 MB, 3.7 MB sent), which
runs every graph that `export` writes. One thread: more need headers."""

import base64
import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenizer_build.corpus import read_rows
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, replacing_folder
from vocabshrink.pages.page import write_page
from vocabshrink.runtime.delivery import KINDS, PASSAGE, QUERY, Delivery, load, name_of
from vocabshrink.runtime.index import Index

RUNTIME = {
    "onnxruntime": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "transformers": "@huggingface/transformers/dist/transformers.web.min.js",
    "wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
}
LOADED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # by transformers.js, beside the graph
DTYPES = {"onnx/model_q4.onnx": "q4", "onnx/model_quantized.onnx": "q8", "onnx/model.onnx": "fp32"}
SHOWN = [task for task in KINDS if task != "fill-mask"]
MOST_PASSAGES = 50_000  # 20 MB of vectors at 384 columns, and 20 ms a query


def build_web(artifacts: Sequence[Path], out: Path, passages: Path | None = None, *, node_modules: Path) -> int:
    """Write the page of delivered folders to `out`, replacing a page that is there; the number of passages. passages:
    JSONL of {"text", "source"?} for the first embedder to search, MOST_PASSAGES at most; else its own index, if it has
    one. Raises InputError for folders, passages or npm packages that cannot be used, and where `out` is no page."""
    if out.exists() and not (out / "standalone.html").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a page of ours: give another place or remove it")
    if missing := [path for name in RUNTIME.values() if not (path := node_modules / name).is_file()]:
        raise InputError(f"{missing[0]} is missing: npm ci --ignore-scripts --prefix {node_modules.parent}")
    data = {"models": [], "passages": 0, "of": 0, "runtime": {k: f"runtime/{Path(v).name}" for k, v in RUNTIME.items()}}
    copies = {data["runtime"][kind]: node_modules / name for kind, name in RUNTIME.items()}
    with replacing_folder(out) as place:
        for folder in artifacts:
            model, name = load(folder), name_of(folder)
            if model.task not in SHOWN:
                raise InputError(f"{folder} is for the task {model.task!r}: the page shows {', '.join(SHOWN)}")
            if (graph := model.manifest["graph"]) not in DTYPES:
                known = ", ".join(DTYPES)
                raise InputError(f"{folder}/{graph} is not a name that transformers.js knows: use one of {known}")
            if any(name == other["name"] for other in data["models"]):
                raise InputError(f"two of the folders are named {name}: rename one")
            entry = {"name": name, "task": model.task, "dtype": DTYPES[graph], "labels": model.labels}
            entry |= {"dimension": model.dimension, "longest": model.longest, "passages": False}
            entry |= {"before_query": model.prefix(QUERY), "before_passage": model.prefix(PASSAGE)}
            entry |= {"files": [file for file in (*LOADED, graph) if (folder / file).is_file()]}
            if model.task == "embedding" and not data["passages"]:
                data["passages"], data["of"] = _write_passages(place, folder, model, passages)
                entry["passages"] = data["passages"] > 0
            data["models"].append(entry)
            copies |= {f"models/{name}/{file}": folder / file for file in entry["files"]}
        if passages is not None and not data["passages"]:
            raise InputError(f"{passages} can only be searched by an embedder, and none of the folders is one: add one")
        for name, source in copies.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place / name)
        sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in place.rglob("*") if path.is_file()}
        data["bytes"] = sum(sizes.values())
        sums = {kind: sum(sizes[name] for name in sizes if name.startswith(kind)) for kind in ("model", "runtime")}
        files = {name: base64.b64encode(gzip.compress((place / name).read_bytes(), mtime=0)).decode() for name in sizes}
        packages = [node_modules / name / "package.json" for name in ("@huggingface/transformers", "onnxruntime-web")]
        versions = [read_json(package)["version"].split("-")[0] for package in packages]
        for name, packed in (("index.html", None), ("standalone.html", files)):
            write_page(place / name, "web.html", files=packed, data=data, sums=sums, versions=versions)
    return data["passages"]


def _write_passages(place: Path, folder: Path, model: Delivery, passages: Path | None) -> tuple[int, int]:
    """Write passages.json and vectors.bin (int8 [n, dimension], each row by its own scale); n, and of how many."""
    if passages is None and not (folder / "index").is_dir():
        return 0, 0
    if passages is None:
        index = Index(folder)
        rows = [json.loads(record) for record in index.records]
        vectors = index.vectors[:MOST_PASSAGES].astype(np.float32)
    else:
        rows = []
        for where, row in read_rows(passages):
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise InputError(f'{where} has no "text": write {{"text": ...}}')
            rows.append(row)
        if not rows:
            raise InputError(f"{passages} has 0 passages: give 1 or more")
        vectors = model.embed([row["text"] for row in rows[:MOST_PASSAGES]], prompt=PASSAGE)
    if len(rows) > MOST_PASSAGES:
        remark = f"the page takes the first {MOST_PASSAGES:,}"
        print(f"{passages or folder / 'index'} has {len(rows):,} passages: {remark}", file=sys.stderr)
    records = [{k: row[k] for k in ("text", "source") if isinstance(row.get(k), str)} for row in rows[:MOST_PASSAGES]]
    vectors *= 127 / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    (place / "vectors.bin").write_bytes(np.rint(vectors).astype(np.int8).tobytes())
    (place / "passages.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return len(records), len(rows)
