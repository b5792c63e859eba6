"""Use a delivered model without torch: embed, classify, label words, fill a mask.

Needs numpy, onnxruntime and tokenizers, and imports the last two only when a folder is loaded: a first answer takes
0.3 s and 80 MB where torch and transformers take 4 s and 415 MB. Whatever is read from a folder is first checked
against MANIFEST.json (10 ms for 7 MB), and nothing outside the folder is read.

    model = load("artifacts/minilm-l6-7mb")
    model.embed(["a text", "another"])            # [2, 384] float32
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tokenizer_build.errors import InputError
from vocabshrink.runtime.kinds import KINDS

CHARACTERS_A_PIECE = 32  # of a long text at first: a text is tokenised no further than it is read
INPUTS = {"input_ids", "attention_mask", "token_type_ids"}  # of a graph; the last may be missing
Text = str | tuple[str, str]


class Delivery:
    """A loaded delivery: its `manifest`, `task` (a key of KINDS) and, where it has them, `dimension` and `labels`.

    Texts are cut at the manifest's max_positions pieces. Texts of similar length share a batch of `batch_size`, so
    that there is little padding; answers come in the order of the texts. Each method raises InputError for a model of
    another task and for what is not a text: not a string, empty, or with a lone surrogate.
    """

    def __init__(self, session, tokenizer, manifest: dict, labels: list[str]):
        self.session, self.tokenizer, self.manifest, self.labels = session, tokenizer, manifest, labels
        self.task: str = manifest["task"]
        self.dimension: int | None = manifest.get("dimension")
        self.inputs = [put.name for put in session.get_inputs()]

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Embeddings [len(texts), dimension] float32."""
        texts = self._texts("embed", texts)
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        for i, row in self._run(self._encode(texts), batch_size):
            out[i] = row
        return out

    def classify(self, texts: Sequence[Text], batch_size: int = 32) -> tuple[list[str], np.ndarray]:
        """The likeliest label of each text or (first, second) pair, and scores [len(texts), len(labels)] float32.

        Scores are probabilities in the order of `labels`, or the plain output of a model with one label.
        """
        texts = self._texts("classify", texts)
        scores = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for i, row in self._run(self._encode(texts), batch_size):
            scores[i] = softmax(row) if len(row) > 1 else row
        return [self.labels[best] for best in scores.argmax(axis=1)], scores

    def label_tokens(self, texts: Sequence[str | Sequence[str]], batch_size: int = 32) -> list[list[dict]]:
        """For each text (or list of words) its words: [{"word", "label", "score"}]; those beyond the cut are left out.

        A text is split at white space. A word's label is that of its first piece.
        """
        if not isinstance(texts, str):
            texts = [_words_of(i, text) if isinstance(text, (list, tuple)) else text for i, text in enumerate(texts)]
        words = [text.split() for text in self._texts("label_tokens", texts)]
        # A word is a piece or more, so words beyond max_positions are never seen: they need not be tokenised.
        encodings = self.tokenizer.encode_batch([row[: self.longest] for row in words], is_pretokenized=True)
        out: list[list[dict]] = [[] for _ in words]
        for i, row in self._run(encodings, batch_size):
            scores, places = softmax(row), encodings[i].word_ids
            for word in dict.fromkeys(place for place in places if place is not None):
                of_labels = scores[places.index(word)]
                best = int(of_labels.argmax())
                out[i].append({"word": words[i][word], "label": self.labels[best], "score": float(of_labels[best])})
        return out

    def fill_mask(self, texts: Sequence[str], top: int = 5, batch_size: int = 32) -> list[list[dict]]:
        """For each text, which has one [MASK], the likeliest pieces, best first: [{"piece", "score", "text"}]."""
        mask = self.mask_token
        texts = self._texts("fill_mask", texts)
        encodings = self._encode(texts)
        number = self.tokenizer.token_to_id(mask)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if text.count(mask) != 1 or encoding.ids.count(number) != 1:
                raise InputError(
                    f"text {i} has {text.count(mask)} {mask} within the first {self.longest} pieces: give one"
                )
        out: list[list[dict]] = [[] for _ in texts]
        for i, row in self._run(encodings, batch_size):
            scores = softmax(row[encodings[i].ids.index(number)])
            for piece in np.argsort(-scores, kind="stable")[:top]:
                name = self.tokenizer.id_to_token(int(piece))
                before, after = texts[i].split(mask)
                inner = name.startswith("##")  # it joins the word before it
                filled = before.rstrip() + name[2:] + after if inner else before + name + after
                out[i].append({"piece": name, "score": float(scores[piece]), "text": filled})
        return out

    @property
    def longest(self) -> int:
        """The most pieces that are read of a text."""
        return self.tokenizer.truncation["max_length"]

    @property
    def mask_token(self) -> str:
        """What stands for the word to guess: [MASK], or <mask> in RoBERTa's family."""
        return "<mask>" if self.tokenizer.token_to_id("[MASK]") is None else "[MASK]"

    def _texts(self, method: str, texts: Sequence[Text]) -> list[Text]:
        """The texts as a list, each checked."""
        if KINDS[self.task].method != method:
            needed = next(task for task, kind in KINDS.items() if kind.method == method)
            raise InputError(f"{method} needs a model of the task {needed!r}: this one's is {self.task!r}")
        if isinstance(texts, (str, bytes)):
            raise InputError(f"{method} takes a list of texts: put the text between brackets")
        texts = list(texts)
        for i, text in enumerate(texts):
            pair = isinstance(text, tuple) and len(text) == 2 and method == "classify"
            for part in text if pair else (text,):
                check_text(f"text {i}", part)
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
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            shape = (len(rows), len(encodings[rows[-1]].ids))
            feed = {name: np.zeros(shape, dtype=np.int64) for name in INPUTS}
            for line, i in enumerate(rows):
                count = len(encodings[i].ids)
                feed["input_ids"][line, :count] = encodings[i].ids
                feed["attention_mask"][line, :count] = 1
                feed["token_type_ids"][line, :count] = encodings[i].type_ids
            output = self.session.run([KINDS[self.task].output], {name: feed[name] for name in self.inputs})[0]
            yield from zip(rows, output, strict=True)


def load(folder: str | Path, threads: int = 1) -> Delivery:
    """The model of a delivered folder, on `threads` processor threads.

    Raises InputError where the manifest or a file is missing, altered, outside the folder or of another model, and
    where the graph's inputs and outputs are not what the manifest says.
    """
    if threads < 1:
        raise InputError(f"threads is {threads}: give 1 or more")
    folder = Path(folder)
    manifest = _read_manifest(folder)
    files = _checked(folder, manifest)
    config, graph = json.loads(files.get("config.json", b"{}")), folder / manifest["graph"]
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would burn a core
    try:  # by its path, so that onnxruntime looks for external weights inside the folder alone
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common class but this
        raise InputError(f"{graph} is no graph that onnxruntime {onnxruntime.__version__} runs ({error})") from error
    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InputError(f"{folder}/tokenizer.json is no tokenizer ({error}): export the model again") from error
    tokenizer.no_padding()
    if "max_positions" in manifest or tokenizer.truncation is None:
        tokenizer.enable_truncation(manifest.get("max_positions", 512))
    labels = _labels(folder, config) if KINDS[manifest["task"]].labelled else []
    delivery = Delivery(session, tokenizer, manifest, labels)
    _check_graph(graph, delivery, config)
    return delivery


def check_text(name: str, text: str) -> None:
    """Raise InputError where the text is no string, is empty, or has half of a surrogate pair."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}, not a string")
    if not text.strip():
        raise InputError(f"{name} is empty: leave it out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(
            f"{name} has a lone surrogate ({half!r}, character {error.start}): decode it again with errors='replace'"
        ) from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """[..., n] -> probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _start(text: Text, size: int) -> Text:
    """About the first `size` characters of a text (of both, of a pair), cut where a word ends."""
    if isinstance(text, tuple):
        return tuple(_start(part, size) for part in text)
    if len(text) <= size:
        return text
    cut = re.compile(r"\s").search(text, size)
    return text[: cut.start()] if cut and cut.start() <= 2 * size else text


def _words_of(place: int, words: Sequence[str]) -> str:
    for word in words:
        if not isinstance(word, str) or len(word.split()) != 1:
            raise InputError(f"text {place} has the word {word!r}: give words without white space")
    return " ".join(words)


def _read_manifest(folder: Path) -> dict:
    path = folder / "MANIFEST.json"
    if not path.is_file():
        raise InputError(f"{folder} is no delivered model: it has no MANIFEST.json")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): export the model again") from error
    needed = {"graph", "files"}
    if isinstance(manifest, dict):
        manifest.setdefault("task", "embedding")
        needed |= {"dimension"} if manifest["task"] == "embedding" else set()
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise InputError(f"{path} lacks one of {sorted(needed)}: export the model again")
    if manifest["task"] not in KINDS:
        known = list(KINDS)
        raise InputError(f"{path} has the task {manifest['task']!r}, not one of {known}: use a newer vocabshrink")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise InputError(f"{path}: files is not names with facts: export the model again")
    for name in (manifest["graph"], "tokenizer.json"):
        if not isinstance(name, str) or not isinstance(files.get(name, {}).get("sha256"), str):
            raise InputError(f"{path} has no sha256 of {name}: export the model again")
    return manifest


def _checked(folder: Path, manifest: dict) -> dict[str, bytes]:
    """What the runtime reads (graph, tokenizer and, where the manifest has its sha256, config.json), once its bytes are
    those of the manifest."""
    inside, files = folder.resolve(), manifest["files"]
    for name in files:
        if "\0" in name or not (folder / name).resolve().is_relative_to(inside):
            raise InputError(f"MANIFEST.json names {name!r}, which lies outside {folder}: it is not to be trusted")
    contents, altered = {}, []
    for name in (manifest["graph"], "tokenizer.json", "config.json"):
        if "sha256" not in (facts := files.get(name, {})):
            continue
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing: copy the whole folder again")
        contents[name] = path.read_bytes()
        if (found := len(contents[name])) < facts.get("bytes", 0):
            raise InputError(f"{path} is truncated ({found:,} of {facts['bytes']:,} bytes): copy the folder again")
        if hashlib.sha256(contents[name]).hexdigest() != facts["sha256"]:
            altered.append(path)
    if len(altered) == len(contents):
        raise InputError(f"{folder}/MANIFEST.json is another model's (no file has its sha256): copy the folder again")
    if altered:
        raise InputError(f"{altered[0]} was altered (its sha256 is not MANIFEST.json's): copy the folder again")
    return contents


def _labels(folder: Path, config: dict) -> list[str]:
    """The labels in the order of the logits: config.json's id2label."""
    names = config.get("id2label")
    if not names or set(names) != {str(i) for i in range(len(names))}:
        raise InputError(
            f"{folder}/config.json, or its sha256 in MANIFEST.json, lacks id2label: export the model again"
        )
    return [names[str(i)] for i in range(len(names))]


def _check_graph(path: Path, delivery: Delivery, config: dict) -> None:
    """Raise InputError where the graph's inputs and outputs are not those that the manifest promises."""
    task, session, pieces = delivery.task, delivery.session, delivery.tokenizer.get_vocab_size()
    if not INPUTS - {"token_type_ids"} <= set(delivery.inputs) <= INPUTS:
        found = sorted(delivery.inputs)
        raise InputError(f"{path} has the inputs {found}, not input_ids and attention_mask: export the model again")
    output = next((put for put in session.get_outputs() if put.name == KINDS[task].output), None)
    if output is None:
        raise InputError(f"{path} has no output {KINDS[task].output}, which the task {task!r} needs: another model's")
    kinds = [(put, "tensor(int64)") for put in session.get_inputs()] + [(output, "tensor(float)")]
    for put, kind in kinds:
        if put.type != kind:
            raise InputError(f"{path}: {put.name} is {put.type}, not {kind}: export the model again")
    wide = {"embedding": delivery.dimension, "fill-mask": pieces}.get(task, len(delivery.labels))
    if isinstance(output.shape[-1], int) and output.shape[-1] != wide:
        raise InputError(
            f"{path}: {output.name} has {output.shape[-1]} columns where {wide} are promised: it is another model's"
        )
    if pieces > config.get("vocab_size", pieces):
        rows = config["vocab_size"]
        raise InputError(f"tokenizer.json has {pieces:,} pieces and the model {rows:,}: it is another model's")
