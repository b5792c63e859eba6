"""An index of passages beside a delivered embedder, and exact search in it: 20 ms for 10,000 passages.

The folder is replaced whole, by one builder at a time; index.json holds the sha256 of its files and of the graph."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, read_json, replacing_folder, write_json, write_jsonl
from vocabshrink.runtime.delivery import PASSAGE, QUERY, Delivery, load

ROWS_AT_ONCE = 65_536  # of the index while it is searched: 100 MB as float32 at 384 columns
EMBEDDED_AT_ONCE = 8_192  # passages, between two calls of `progress`
FILES = ("passages.jsonl", "vectors.npy")


def build_index(folder: str | Path, passages: Iterable[dict | str], *, threads=1, progress=lambda more: None) -> int:
    """Embed passages (texts, or dicts with a "text") into folder/index, behind the model's prompt for them; the number
    of passages. Writes passages.jsonl, vectors.npy [passages, dimension] float16 and index.json. progress: is told how
    many more are embedded. Raises InputError for a passage without a text, or for none."""
    folder, embedder, records = Path(folder).expanduser(), load(folder, threads), []
    for place, passage in enumerate(passages):
        records.append({"text": passage} if isinstance(passage, str) else passage)
        if not isinstance(records[-1], dict) or not isinstance(records[-1].get("text"), str):
            raise InputError(f'passage {place} is neither a text nor a dict with a "text" string')
    if not records:
        raise InputError("there is no passage to index: give one text or more")
    texts, vectors = [record["text"] for record in records], []
    for start in range(0, len(texts), EMBEDDED_AT_ONCE):
        vectors.append(embedder.embed(texts[start : start + EMBEDDED_AT_ONCE], prompt=PASSAGE).astype(np.float16))
        progress(len(vectors[-1]))
    with claimed(folder / ".index.lock", wait=True), replacing_folder(folder / "index") as new:
        write_jsonl(new / "passages.jsonl", records)
        np.save(new / "vectors.npy", np.concatenate(vectors))
        write_json(new / "index.json", _sums(new, embedder))
    return len(records)


class Index:
    """The opened index of a delivered embedder. Raises InputError for none, altered files, and another model's."""

    def __init__(self, folder: str | Path, threads: int = 1):
        place = (folder := Path(folder).expanduser()) / "index"
        for name in (*FILES, "index.json"):
            if not (place / name).is_file() or not (place / name).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{folder} has no index, or not a whole one within it ({name}): build the index again")
        self.embedder = load(folder, threads)
        if read_json(place / "index.json") != _sums(place, self.embedder):
            raise InputError(f"{place}: a file was altered or is another model's: build the index again")
        self.records = (place / "passages.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        self.vectors = np.load(place / "vectors.npy", mmap_mode="r", allow_pickle=False)

    def search(self, query: str, top: int = 5) -> list[dict]:
        """The `top` passages nearest to the query, best first: each passage's dict with "score", the cosine."""
        if top < 1:
            raise InputError(f"top is {top}: give 1 or more")
        question, scores = self.embedder.embed([query], prompt=QUERY)[0], []
        for start in range(0, len(self.vectors), ROWS_AT_ONCE):
            rows = self.vectors[start : start + ROWS_AT_ONCE].astype(np.float32)
            lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(question)
            scores.append(rows @ question / np.maximum(lengths, 1e-12))
        scores = np.concatenate(scores)
        best = np.argsort(-scores, kind="stable")[:top]
        return [{**json.loads(self.records[i]), "score": float(scores[i])} for i in best]


def _sums(place: Path, embedder: Delivery) -> dict[str, str]:
    sums = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in FILES}
    sums |= {"graph": embedder.manifest["files"][embedder.manifest["graph"]]["sha256"]}
    return sums | ({"prompt": prompt} if (prompt := embedder.prefix(PASSAGE)) else {})
