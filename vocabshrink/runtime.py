"""Use a delivered embedder without torch: load it, embed texts, index passages and search them.

Needs numpy, onnxruntime and tokenizers, and imports the last two only when a folder is loaded: a first answer
takes 0.3 s and 80 MB where torch and transformers take 4 s and 415 MB. Every file is checked against
MANIFEST.json before it is read (10 ms for 7 MB). The index is a plain matrix and a query one product with it:
exact, 20 ms for 10,000 passages; an approximate index was not built.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError

ROWS_AT_ONCE = 65_536  # of the index while it is searched: 100 MB as float32 at 384 columns


class Embedder:
    """A loaded delivery: `manifest` (its MANIFEST.json), `dimension`, and `embed`."""

    def __init__(self, session, tokenizer, manifest: dict):
        self.session, self.tokenizer, self.manifest = session, tokenizer, manifest
        self.dimension: int = manifest["dimension"]

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Embeddings [len(texts), dimension] float32, in the order of the texts.

        A text longer than the manifest's max_positions pieces is cut there. Texts of like length share a
        batch, so little is padding.
        """
        if isinstance(texts, str):
            raise InputError("embed takes a list of texts: put the text between brackets")
        texts = list(texts)
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {place} is {type(text).__name__}, not a string")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give 1 or more")
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        encodings = self.tokenizer.encode_batch(texts)
        order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = len(encodings[rows[-1]].ids)
            feed = {
                name: np.zeros((len(rows), longest), dtype=np.int64)
                for name in ("input_ids", "attention_mask", "token_type_ids")
            }
            for line, i in enumerate(rows):
                ids = encodings[i].ids
                feed["input_ids"][line, : len(ids)] = ids
                feed["attention_mask"][line, : len(ids)] = 1
            out[rows] = self.session.run(["sentence_embedding"], feed)[0]
        return out


def load(folder: str | Path, threads: int = 1) -> Embedder:
    """The embedder of a delivered folder, on `threads` processor threads.

    Raises InputError where the manifest or a file is missing, altered, or outside the folder.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    paths = {name: _checked(folder, name, facts.get("sha256")) for name, facts in manifest["files"].items()}
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would burn a core
    graph = paths[manifest["graph"]]
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Embedder(session, Tokenizer.from_file(str(paths["tokenizer.json"])), manifest)


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


def _read_manifest(folder: Path) -> dict:
    path = folder / "MANIFEST.json"
    if not path.is_file():
        raise InputError(f"{folder} is no delivered model: it has no MANIFEST.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): export the model again") from error
    needed = {"graph", "dimension", "files"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise InputError(f"{path} lacks one of {sorted(needed)}: export the model again")
    for name in (manifest["graph"], "tokenizer.json"):
        if "sha256" not in manifest["files"].get(name, {}):
            raise InputError(f"{path} has no sha256 of {name}: export the model again")
    return manifest


def _checked(folder: Path, name: str, sha256: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"MANIFEST.json names {name}, which lies outside {folder}")
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole folder again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise InputError(f"{path} was altered (its sha256 is not MANIFEST.json's): copy the folder again")
    return path
