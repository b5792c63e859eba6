"""TODO: runtime.index."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from vocabshrink.runtime.delivery import load

ROWS_AT_ONCE = 65_536  # of the index while it is searched: 100 MB as float32 at 384 columns


def build_index(folder: str | Path, passages: Iterable[dict | str], *, batch_size: int = 32, threads: int = 1) -> int:
    """Embed passages (texts, or dicts with a "text") into folder/index; the number of passages.

    Writes passages.jsonl and vectors.npy [passages, dimension] float16; an index that was there is replaced.
    """
    folder = Path(folder)
    embedder = load(folder, threads)
    records = []
    for place, passage in enumerate(passages):
        record = {"text": passage} if isinstance(passage, str) else passage
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'passage {place} is neither a text nor a dict with a "text" string')
        records.append(record)
    if not records:
        raise InputError("there is no passage to index: give one text or more")
    vectors = embedder.embed([record["text"] for record in records], batch_size).astype(np.float16)
    index = folder / "index"
    index.mkdir(exist_ok=True)
    lines, matrix = index / ".passages.jsonl.tmp", index / ".vectors.npy.tmp"
    with open(lines, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(matrix, "wb") as out:
        np.save(out, vectors)
    os.replace(lines, index / "passages.jsonl")
    os.replace(matrix, index / "vectors.npy")
    return len(records)


def search(folder: str | Path, query: str, top: int = 5, threads: int = 1) -> list[dict]:
    """The `top` passages of folder/index nearest to the query, best first.

    Each is the passage's dict with "score", its cosine with the query.
    Raises InputError where there is no index or its two files disagree.
    """
    folder = Path(folder)
    lines, matrix = folder / "index" / "passages.jsonl", folder / "index" / "vectors.npy"
    if not lines.is_file() or not matrix.is_file():
        raise InputError(f"{folder} has no index: build one with vocabshrink.runtime.build_index")
    if top < 1:
        raise InputError(f"top is {top}: give 1 or more")
    vectors = np.load(matrix, mmap_mode="r", allow_pickle=False)
    records = lines.read_text(encoding="utf-8").split("\n")[:-1]
    embedder = load(folder, threads)
    if vectors.shape != (len(records), embedder.dimension):
        raise InputError(
            f"{matrix} is {vectors.shape} where {(len(records), embedder.dimension)} is needed: build the index again"
        )
    question = embedder.embed([query])[0]
    question /= max(float(np.linalg.norm(question)), 1e-12)
    scores = np.empty(len(records), dtype=np.float32)
    for start in range(0, len(records), ROWS_AT_ONCE):
        rows = vectors[start : start + ROWS_AT_ONCE].astype(np.float32)
        scores[start : start + len(rows)] = rows @ question / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
    best = np.argsort(-scores, kind="stable")[:top]
    return [{**json.loads(records[i]), "score": float(scores[i])} for i in best]
