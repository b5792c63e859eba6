"""Use a delivered model without torch: embed, classify, label words, fill a mask.

Imports onnxruntime and tokenizers only when a folder is loaded: a first answer takes 0.3 s and 80 MB where torch and
transformers take 4 s and 415 MB. Whatever is read is checked against MANIFEST.json, and nothing outside the folder is.

    model = load("artifacts/mpnet-7mb")
    model.embed(["a text", "another"])            # [2, 384] float32"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from tokenizer_build.files import parse_json

CHARACTERS_A_PIECE = 32  # of a long text at first: a text is tokenised no further than it is read
# A graph's inputs and the tokenizer's names for them; the last may be missing.
INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
Text = str | tuple[str, str]
Prompt = str | Sequence[str] | None  # a name, or several of which the first that is known counts
# Options of sentence-transformers' encode that change what it gives, and the only value of each that is possible here
USUAL = {"convert_to_tensor": False, "output_value": "sentence_embedding", "precision": "float32"}
# All of its options in their order, so that they may be given by position
BY_PLACE = ("prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision")
BY_PLACE += ("convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim")
QUERY, PASSAGE = ("query",), ("passage", "document")  # names of the prompts for what searches and for what is searched


@dataclass(frozen=True)
class Kind:
    """What a delivered model is for."""

    method: str  # of `Delivery`
    architecture: str  # transformers' class
    output: str = "logits"  # the graph's output that is read
    labelled: bool = False  # config.json names a label for each column of the output


# A manifest's "task" -> its kind; what the model card says of each stands in its template
KINDS = {
    "embedding": Kind("embed", "BertModel", output="sentence_embedding"),
    "classification": Kind("classify", "BertForSequenceClassification", labelled=True),
    "tokens": Kind("label_tokens", "BertForTokenClassification", labelled=True),
    "fill-mask": Kind("fill_mask", "BertForMaskedLM"),
}


class Delivery:
    """A loaded delivery: its `manifest`, `task` (a key of KINDS), `labels` ([] where it has none), `dimension` and
    `prompts` ({name: what stands before each text}). A text is cut at `longest` pieces; `batch_size` texts of like
    length share a batch. Methods raise InputError for a model of another task and for no text (`check_text`)."""

    def __init__(self, session, tokenizer, manifest: dict, labels: list[str]):
        self.session, self.tokenizer, self.manifest, self.labels = session, tokenizer, manifest, labels
        self.task: str = manifest["task"]
        self.dimension: int | None = manifest.get("dimension")
        self.longest: int = manifest["max_positions"]
        self.prompts: dict[str, str] = manifest.get("prompts", {})

    def embed(
        self, texts: Sequence[str], batch_size: int = 32, *, prompt: Prompt = None, dimensions: int | None = None
    ) -> np.ndarray:
        """Embeddings [len(texts), dimension] float32. prompt: see `prefix`. dimensions: only so many of the first, at
        unit length if the whole is; of a model that was trained for it."""
        return self._embed(self.prefix(prompt), self._texts("embed", texts), batch_size, dimensions)

    def encode(self, sentences: str | Sequence[str], *placed, **others) -> np.ndarray:
        """`embed` under the signature of `SentenceTransformer.encode`: float32 [len(sentences), dimension], or
        [dimension] of a single text; a text may be empty. Options, by name or in the order of BY_PLACE: prompt_name;
        prompt, the words themselves; batch_size; normalize_embeddings; truncate_dim (`dimensions`). InputError for
        those that ask for other than float32 arrays; the rest is ignored."""
        others = dict(zip(BY_PLACE, placed, strict=False)) | others
        for name, usual in USUAL.items():
            if others.get(name, usual) != usual:
                raise InputError(f"encode(..., {name}={others[name]!r}): only {usual!r} is possible: leave it out")
        texts = self._texts("embed", [sentences] if isinstance(sentences, str) else sentences, empty=True)
        words = others.get("prompt")
        before = self.prefix(others.get("prompt_name")) if words is None else words
        vectors = self._embed(before, texts, others.get("batch_size", 32), others.get("truncate_dim"))
        vectors = unit(vectors) if others.get("normalize_embeddings") else vectors
        return vectors[0] if isinstance(sentences, str) else vectors

    def _embed(self, before: str, texts: list[str], batch_size: int, dimensions: int | None) -> np.ndarray:
        trained = self.manifest.get("dimensions", [])
        if dimensions is not None and dimensions not in trained:
            known = ", ".join(map(str, trained)) or f"{self.dimension}, all of them, so leave it out"
            raise InputError(f"dimensions is {dimensions}: this model was trained for {known}")
        out = np.empty((len(texts), dimensions or self.dimension), dtype=np.float32)
        for i, row in self._run(self._encode([before + text for text in texts]), batch_size):
            out[i] = row[:dimensions]
        return unit(out) if dimensions and self.manifest.get("normalize", True) else out

    def classify(self, texts: Sequence[Text], batch_size: int = 32) -> tuple[list[str], np.ndarray]:
        """The likeliest label of each text or (first, second) pair, and scores [len(texts), len(labels)] float32:
        probabilities in the order of `labels`, or the plain output of a model with one label."""
        texts = self._texts("classify", texts)
        scores = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for i, row in self._run(self._encode(texts), batch_size):
            scores[i] = softmax(row) if len(row) > 1 else row
        return [self.labels[best] for best in scores.argmax(axis=1)], scores

    def label_tokens(self, texts: Sequence[str | Sequence[str]], batch_size: int = 32) -> list[list[dict]]:
        """For each text (split at white space) or list of words one {"word", "label", "score"} a word, in order, of its
        first piece; a word without one, or beyond the cut, is O (the first label if there is no O), score 0."""
        words = [text.split() if isinstance(text, str) else list(text) for text in self._texts("label_tokens", texts)]
        # A word is a piece or more, so words beyond max_positions are never seen: they need not be tokenised.
        encodings = self.tokenizer.encode_batch([row[: self.longest] for row in words], is_pretokenized=True)
        unread = {"label": "O" if "O" in self.labels else self.labels[0], "score": 0.0}
        out = [[{"word": word} | unread for word in row] for row in words]
        for i, row in self._run(encodings, batch_size):
            scores, places = softmax(row), encodings[i].word_ids
            for word in dict.fromkeys(place for place in places if place is not None):
                of_labels = scores[places.index(word)]
                best = int(of_labels.argmax())
                out[i][word] |= {"label": self.labels[best], "score": float(of_labels[best])}
        return out

    def fill_mask(self, texts: Sequence[str], top: int = 5, batch_size: int = 32) -> list[list[dict]]:
        """For each text, which has one [MASK], the likeliest pieces, best first: [{"piece", "score", "text"}]."""
        mask = "<mask>" if self.tokenizer.token_to_id("[MASK]") is None else "[MASK]"  # the former in RoBERTa's family
        number, texts = self.tokenizer.token_to_id(mask), self._texts("fill_mask", texts)
        encodings = self._encode(texts)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if not text.count(mask) == encoding.ids.count(number) == 1:
                raise InputError(f"text {i} must have one {mask} within its first {self.longest} pieces")
        out: list[list[dict]] = [[] for _ in texts]
        for i, row in self._run(encodings, batch_size):
            scores = softmax(row[encodings[i].ids.index(number)])
            for piece in np.argsort(-scores, kind="stable")[:top]:
                name = self.tokenizer.id_to_token(int(piece))
                before, after = texts[i].split(mask)
                filled = before.rstrip() + name[2:] if name.startswith("##") else before + name  # ## joins two pieces
                out[i].append({"piece": name, "score": float(scores[piece]), "text": filled + after})
        return out

    def prefix(self, prompt: Prompt = None) -> str:
        """What stands before each text: the prompt of this name, or of the first of these names that the model has;
        its default prompt for None, and for names of which it has none. Raises InputError for an unknown name."""
        if isinstance(prompt, str) and prompt not in {"", *self.prompts}:
            raise InputError(f"prompt {prompt!r} is unknown: this model's are {', '.join(self.prompts) or 'none'}")
        names = [prompt] if isinstance(prompt, str) else [*(prompt or ()), self.manifest.get("default_prompt")]
        return next((self.prompts[name] for name in names if name in self.prompts), "")

    def _texts(self, method: str, texts: Sequence[Text], empty: bool = False) -> list[Text]:
        """The texts as a list, each checked; for `label_tokens` also lists of words, for `classify` also pairs."""
        if KINDS[self.task].method != method:
            needed = next(task for task, kind in KINDS.items() if kind.method == method)
            raise InputError(f"{method} needs a model of the task {needed!r}: this one's is {self.task!r}")
        if isinstance(texts, (str, bytes)):
            raise InputError(f"{method} takes a list of texts: put the text between brackets")
        texts = list(texts)
        for i, text in enumerate(texts):
            words = method == "label_tokens" and isinstance(text, (list, tuple))
            pair = method == "classify" and isinstance(text, tuple) and len(text) == 2
            for part in (text or [""]) if pair or words else [text]:
                check_text(f"text {i}", part, empty)
        return texts

    def _encode(self, texts: list[Text]) -> list:
        """Encodings of the texts; of a long one only as much is tokenised as fills the model's positions."""
        size = CHARACTERS_A_PIECE * self.longest
        encodings = self.tokenizer.encode_batch([_start(text, size) for text in texts])
        for i, text in enumerate(texts):
            cut = size
            while len(encodings[i].ids) < self.longest and _start(text, cut) != text:
                cut *= 8  # spaces, or words that are one piece however long: read on
                encodings[i] = self.tokenizer.encode_batch([_start(text, cut)])[0]
        return encodings

    def _run(self, encodings: list, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(place, the graph's output for that text), longest last; rows of token outputs hold padding at their end."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give 1 or more")
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        names = [put.name for put in self.session.get_inputs()]
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [encodings[i] for i in rows]
            for encoding in batch:
                encoding.pad(len(batch[-1].ids))
            feed = {name: np.array([getattr(one, INPUTS[name]) for one in batch], dtype=np.int64) for name in names}
            try:
                found = self.session.run([KINDS[self.task].output], feed)[0]
            except Exception as error:  # onnxruntime's have no common class but this
                raise InputError(f"the graph cannot be run ({error}): export the model again") from error
            yield from zip(rows, found, strict=True)


def load(folder: str | Path, threads: int = 1) -> Delivery:
    """The model of a delivered folder, on `threads` processor threads. Raises InputError where manifest or file are
    missing, altered, outside the folder or of another model."""
    if threads < 1:
        raise InputError(f"threads is {threads}: give 1 or more")
    folder = Path(folder).expanduser()
    manifest, contents = _read(folder)
    from tokenizer_build.tokenizer import parse_tokenizer

    reading = folder / manifest["graph"]
    try:
        session = open_graph(contents[manifest["graph"]], threads)
        reading = folder / "config.json"
        config = {} | parse_json(contents["config.json"])
        names = {str(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    except Exception as error:  # onnxruntime's have no common class but this
        raise InputError(f"{reading} cannot be read ({error}): update onnxruntime, or export again") from error
    tokenizer = parse_tokenizer(contents["tokenizer.json"], folder / "tokenizer.json")
    tokenizer.enable_truncation(manifest["max_positions"])
    tokenizer.encode_special_tokens = manifest["task"] != "fill-mask"  # a [SEP] in a text is text, as in training
    labels = [names.get(str(i)) for i in range(len(names))] if KINDS[manifest["task"]].labelled else []
    delivery = Delivery(session, tokenizer, manifest, labels)
    if wrong := _misfit(delivery, config):
        raise InputError(f"{folder}: {wrong}: MANIFEST.json or config.json is another model's: export the model again")
    return delivery


def open_graph(graph: bytes, threads: int = 1):
    """An onnxruntime session of a graph's bytes on the CPU, and of no other file. Raises what onnxruntime does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what fails is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would burn a core
    # a graph may name more files for its weights: where nothing is, it finds none
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", f"{os.devnull}/nowhere")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def name_of(folder: str | Path) -> str:
    """A delivered folder's name for people: its own, or its run's where a run wrote it as RUN/export/model."""
    return next(part for part in reversed(Path(folder).resolve().parts) if part not in ("model", "export"))


def check_text(name: str, text: str, empty: bool = False) -> None:
    """Raise InputError where the text is no string, is empty (unless it may be), or has half of a surrogate pair."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}, not a string")
    if not (empty or text.strip()):
        raise InputError(f"{name} is empty: leave it out")
    if half := re.search(r"[\ud800-\udfff]", text):
        raise InputError(f"{name} has a lone surrogate ({half[0]!r}, character {half.start()}): mend its encoding")


def unit(vectors: np.ndarray) -> np.ndarray:
    """[n, D], each row divided by its length."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[..., n] -> probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _start(text: Text, size: int) -> Text:
    """About the first `size` characters of a text (of both, of a pair), cut where a word ends."""
    if isinstance(text, tuple):
        return tuple(_start(part, size) for part in text)
    cut = re.compile(r"\s").search(text, size)
    return text[: cut.start()] if cut and cut.start() <= 2 * size else text


def _read(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """The manifest, and the contents of graph, tokenizer.json and config.json, whose sha256 it says."""
    path = folder / "MANIFEST.json"
    if not path.is_file():
        raise InputError(f"{folder} is no delivered model: it has no MANIFEST.json")
    try:
        manifest = {"task": None} | parse_json(path.read_bytes())
    except (ValueError, TypeError) as error:  # the latter for JSON that is no object
        raise InputError(f"{path} is not a JSON object: export the model again") from error
    if manifest["task"] not in [*KINDS]:
        raise InputError(f"{path}: the task {manifest['task']!r} is unknown: update vocabshrink or export again")
    needed = {"graph": str, "files": dict, "max_positions": int}
    needed |= {"dimension": int} if manifest["task"] == "embedding" else {}
    needed |= {key: kind for key, kind in {"prompts": dict, "dimensions": list}.items() if key in manifest}
    for key, kind in needed.items():
        if not isinstance(found := manifest.get(key), kind) or kind is int and not 0 < found < 2**31:
            raise InputError(f"{path} is not one of a delivery: {key} is {found!r}: export the model again")
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":  # the hub's cache, whose files are links to its repository's own blobs
        inside.append(inside[0].parents[1] / "blobs")
    for name in (manifest["graph"], *manifest["files"]):
        within = False
        with suppress(OSError, ValueError, RuntimeError):  # too long; a NUL; a link to itself
            within = any((folder / name).resolve().is_relative_to(place) for place in inside)
        if not within:
            raise InputError(f"{path} names {name!r}, which lies outside the folder: it is not to be trusted")
    contents = {}
    for name in (manifest["graph"], "tokenizer.json", "config.json"):
        if not os.path.isfile(folder / name):  # False for a name that is too long, too
            raise InputError(f"{folder / name} is missing: copy the whole folder again")
        contents[name], facts = (folder / name).read_bytes(), manifest["files"].get(name)
        if not isinstance(facts, dict) or facts.get("sha256") != hashlib.sha256(contents[name]).hexdigest():
            what = f"{folder / name} ({len(contents[name]):,} bytes) is not the file of MANIFEST.json"
            raise InputError(f"{what}: it was altered, cut short or is another model's: copy the whole folder again")
    return manifest, contents


def _misfit(delivery: Delivery, config: dict) -> str | None:
    """What the manifest and config.json promise and the graph does not hold, in a few words."""
    task, labels, pieces = delivery.task, delivery.labels, delivery.tokenizer.get_vocab_size()
    inputs = {put.name: put.type for put in delivery.session.get_inputs()}
    expected = {name: "tensor(int64)" for name in INPUTS if name != "token_type_ids" or name in inputs}
    output = {put.name: put for put in delivery.session.get_outputs()}.get(KINDS[task].output)
    if not all(isinstance(text, str) for text in delivery.prompts.values()):
        return "MANIFEST.json has a prompt that is no text"
    if None in labels or KINDS[task].labelled and not labels:
        return "config.json lacks id2label"
    if inputs != expected:
        return f"the graph's inputs are {inputs}, not {expected}"
    if output is None or output.type != "tensor(float)":
        return f"the graph has no output {KINDS[task].output} of tensor(float)"
    columns = {"embedding": delivery.dimension, "fill-mask": pieces}.get(task, len(labels))
    if output.shape and isinstance(output.shape[-1], int) and output.shape[-1] != columns:
        return f"{output.name} has {output.shape[-1]} columns where {columns} are promised"
    if not isinstance(rows := config.get("vocab_size", pieces), int) or pieces > rows:
        return f"tokenizer.json has {pieces:,} pieces and the model {rows}"
    return None
