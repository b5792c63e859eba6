"""A page that runs delivered models in the browser: a folder for any static server, and one file to open from a disk.

The folder holds index.html, the models in the layout that transformers.js reads, transformers.js itself with
onnxruntime-web's WebAssembly build, and passages with int8 vectors (a quarter of float32; a cosine moves by 0.003 at
most). The page asks no other host for anything. Browsers forbid a page opened from a disk to read the files beside
it, so standalone.html holds all of them, compressed, in its own text: 14 MB where the folder has 22.

transformers.js imports onnxruntime-web's WebGPU build: 27 MB of WebAssembly whose CPU kernels lack
GatherBlockQuantized. An import map gives it the plain WebAssembly build instead, 14 MB (3.7 MB as servers compress
it), which runs every graph that `export` writes. One thread: more need headers that static servers do not send.
"""

import base64
import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, read_jsonl, replacing_folder
from vocabshrink.pages.page import write_page
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
    artifacts: Sequence[str | Path],
    out: str | Path,
    passages: str | Path | None = None,
    title: str = "Search by meaning, in your browser",
    *,
    examples: dict[str, list[str]] | None = None,
    node_modules: str | Path = "tests/js/node_modules",
) -> dict:
    """Write the page of one or several delivered folders to `out`, replacing a page that is there.

    passages: JSONL of {"text", "source"?} for the first embedder to search; without it, the embedder's own index,
    and without an index, only what is pasted into the page. Beyond MOST_PASSAGES, the first are taken; the page and
    stderr say so. examples: texts to try, by task.

    Returns {"files": {name: bytes}, "model": bytes, "runtime": bytes, "passages": number searched}.

    Raises:
        InputError: `load` refuses a folder, the page cannot show its task, npm's packages are missing, the passages
            are not as above, or something other than a page is at `out`.
    """
    out, node_modules = Path(out), Path(node_modules)
    if out.exists() and not (out / "standalone.html").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a page of ours: give another place or remove it")
    missing = [name for name in RUNTIME.values() if not (node_modules / name).is_file()]
    if missing:
        raise InputError(
            f"{node_modules / missing[0]} is missing: npm ci --ignore-scripts --prefix {node_modules.parent}"
        )
    with replacing_folder(out) as place:
        models, count, total = [], 0, 0
        for folder in map(Path, artifacts):
            entry, model = _copy_model(place, folder, examples or {})
            if any(entry["name"] == other["name"] for other in models):
                raise InputError(f"two of the folders are named {entry['name']}: rename one")
            if model.task == "embedding" and not count:
                count, total = _write_passages(place, folder, model, passages)
                entry["passages"] = count > 0
            models.append(entry)
        if passages is not None and not count:
            raise InputError(f"{passages} can only be searched by an embedder, and none of the folders is one: add one")
        (place / "runtime").mkdir()
        for name in RUNTIME.values():
            shutil.copyfile(node_modules / name, place / "runtime" / Path(name).name)
        return _write_html(place, models, {"passages": count, "of": total}, title, node_modules)


def _copy_model(place: Path, folder: Path, examples: dict) -> tuple[dict, object]:
    """What the page must know of a model whose files are copied to place/models, and the model."""
    model = load(folder)
    graph, name = model.manifest["graph"], folder.resolve().name
    if model.task not in SHOWN:
        raise InputError(f"{folder} is for the task {model.task!r}: the page shows {', '.join(SHOWN)}")
    if graph not in DTYPES:
        raise InputError(f"{folder}/{graph} is not a name that transformers.js knows: use one of {', '.join(DTYPES)}")
    files = [file for file in (*LOADED, graph) if (folder / file).is_file()]
    for file in files:
        target = place / "models" / name / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target)
    entry = {"name": name, "task": model.task, "dtype": DTYPES[graph], "files": files, "labels": model.labels}
    entry |= {"dimension": model.dimension, "longest": model.longest, "passages": False}
    return entry | {"examples": examples.get(model.task, [])}, model


def _write_passages(place: Path, folder: Path, model, passages: str | Path | None) -> tuple[int, int]:
    """Write passages.json and vectors.bin (int8 [passages, dimension], each row by its own scale).

    Returns how many were taken, and of how many.
    """
    source = folder / "index" / "passages.jsonl" if passages is None else Path(passages)
    if passages is None and not source.is_file():
        return 0, 0
    records = []
    for number, row in read_jsonl(source):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise InputError(f'{source}, line {number} has no "text": write {{"text": ...}}')
        records.append({key: row[key] for key in ("text", "source") if isinstance(row.get(key), str)})
    if not records:
        raise InputError(f"{source} has 0 passages: give 1 or more")
    total, records = len(records), records[:MOST_PASSAGES]
    if total > len(records):
        print(f"{source} has {total:,} passages: the page takes the first {len(records):,}", file=sys.stderr)
    if passages is None and (matrix := folder / "index" / "vectors.npy").is_file():
        vectors = np.load(matrix, mmap_mode="r", allow_pickle=False)[: len(records)].astype(np.float32)
        if vectors.shape != (len(records), model.dimension):
            raise InputError(f"{matrix} does not belong to {source}: build the index again")
    else:
        vectors = model.embed([record["text"] for record in records])
    vectors *= 127 / np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12)
    (place / "vectors.bin").write_bytes(np.rint(vectors).astype(np.int8).tobytes())
    (place / "passages.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return len(records), total


def _write_html(place: Path, models: list[dict], counts: dict, title: str, node_modules: Path) -> dict:
    """Write index.html and standalone.html over the files in `place`; what `build_web` returns."""
    sizes = {str(path.relative_to(place)): path.stat().st_size for path in sorted(place.rglob("*")) if path.is_file()}
    sums = {kind: sum(size for name, size in sizes.items() if name.startswith(kind)) for kind in ("model", "runtime")}
    runtime = {kind: f"runtime/{Path(name).name}" for kind, name in RUNTIME.items()}
    data = {"models": models, "runtime": runtime, "bytes": sum(sizes.values()), **counts}
    versions = [
        read_json(node_modules / package / "package.json")["version"].split("-")[0]
        for package in ("@huggingface/transformers", "onnxruntime-web")
    ]
    packed = {name: base64.b64encode(gzip.compress((place / name).read_bytes(), mtime=0)).decode() for name in sizes}
    for name, files in (("index.html", None), ("standalone.html", packed)):
        write_page(place / name, "web", title=title, data=data, sums=sums, versions=versions, files=files)
        sizes[name] = (place / name).stat().st_size
    return {"files": sizes, **sums, "passages": counts["passages"]}
