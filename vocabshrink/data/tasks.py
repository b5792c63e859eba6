"""Labelled tasks: a user's files as checked rows and batches, and a model's outputs as predictions and scores.

A task is a source of rows per split (`corpus.read_rows`). Whatever could silently train on nonsense is refused while
reading, with the file, the row and the remedy. The order of the labels travels with the task, because the commonest
defect of distilled classifiers is a teacher that counts its classes in another order: `check_label_order` and
`check_agreement` refuse it. Splits are encoded once into one lexicon, a sentence (or a token) per line, so that teacher
and student see the same words cut at the same places. Spans are counted as CoNLL does. Not done: confidence intervals,
strict spans. Shapes: R rows of a split, C labels (1 for scores); B, T and n: see batches.py."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tokenizer_build.corpus import read_rows
from tokenizer_build.errors import InputError
from tokenizer_build.files import parse_json, read_json, write_json
from vocabshrink.data.batches import Batch, Order, PieceTable, Segments, Sequences
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.run.recipe import TaskSection

UNLABELLED = -1
ORDER = "write its order in tasks.{}.labels (rows that number their labels keep meta.json's)"
LOGITS = "make them from the task's file, row for row, labels in its order"
INTEGER = re.compile(r"-?\d+")
SCHEMES = ("BI", "BIES", "BILU", "BMES")  # first letters of the tags beside O: IOB1 and IOB2, BIOES, BILOU, BMES
PREFIXES = set("".join(SCHEMES))


@dataclass(frozen=True)
class Rows:
    """One split. targets: [R] int64 labels, [R] float64 scores, or an int64 array of labels for each row of tokens;
    UNLABELLED (NaN for scores) where a test row has none."""

    first: list[str] | list[list[str]]  # a sentence each, or its tokens
    second: list[str] | None  # a pair's other sentence; None without pairs
    targets: np.ndarray | list[np.ndarray]
    numbers: np.ndarray | None = None  # [R] which of the file's `file_rows` rows these are; None: all of them
    file_rows: int | None = None

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Task:
    """A task as read. labels: names in the order of a model's outputs; empty for scores."""

    name: str
    kind: str
    labels: list[str]
    splits: dict[str, Rows]
    metrics: list[str]


def read_task(section: TaskSection, name: str) -> Task:
    """Reads and checks the files of `tasks.<name>`. Raises InputError for anything that could not be meant. Labels are
    named by the section, else by the meta.json beside the train file ("labels", or the label field's name), else by the
    training rows, sorted; rows give them by name, or by number in meta.json's order, else in the section's. The task is
    of pairs if the recipe names two fields, or none while the first training row has both."""
    paths = {split: path for split in ("train", "validation", "test") if (path := getattr(section, split))}
    rows = {split: list(read_rows(path)) for split, path in paths.items()}
    for split in paths:
        if not rows[split]:
            raise InputError(f"{paths[split]}: there are no rows in it: give at least one, or leave the split out")
    reader = _Reader(section, name, rows["train"])
    splits = {split: reader.split(rows[split], split) for split in paths}
    seen = np.unique(np.concatenate(list(map(np.atleast_1d, splits["train"].targets))))
    if len(seen) < 2:
        only = repr(reader.labels[seen[0]]) if reader.labels else seen[0]
        raise InputError(f"{paths['train']}: every row has the label {only}: give rows of at least two labels")
    metrics = section.metrics or reader.meta.get("metrics")
    metrics = choose_metrics(metrics, section.kind, reader.labels, f"tasks.{name}.metrics")
    return Task(name, section.kind, reader.labels, splits, metrics)


def _listed(value) -> list:
    """A row's tokens or their labels: a list, or a CSV cell with spaces between them."""
    if isinstance(value, str):
        return value.split()
    return value if isinstance(value, list) else [] if value is None else [value]


def _written(value) -> str | None:
    """A label as rows may write it, by name or by number; None for what cannot be one."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


class _Reader:
    """Turns fields into rows, with every check. codes: the output of everything that a row may write for a label."""

    def __init__(self, section: TaskSection, name: str, rows: list[tuple[str, dict]]):
        self.section, self.key, tokens = section, f"tasks.{name}", section.kind == "tokens"
        self.field = section.label or ("slots" if tokens else "label")
        self.pair = not tokens and len(section.text) == 2
        if section.text == TaskSection.model_fields["text"].default:  # the first training row says
            self.pair &= rows[0][1].get(section.text[-1]) is not None
        path = Path(section.train).expanduser().with_name("meta.json")
        try:
            self.meta = parse_json(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
            in_meta = self.meta.get(self.field, self.meta.get("slots" if tokens else "labels"))
            in_meta = [] if section.kind == "regression" else TypeAdapter(list[str] | None).validate_python(in_meta)
        except (ValueError, AttributeError):
            raise InputError(f'{path}: not {{"labels": [names in the order of numbers]}}: mend or remove it') from None
        labels = section.labels or in_meta
        if labels is None:  # rows that lack a label, or write what cannot be one, are refused when they are read
            values = (row.get(self.field) for _, row in rows)
            found = {_written(label) for value in values for label in (_listed(value) if tokens else [value])} - {None}
            labels = sorted(found, key=int if all(map(INTEGER.fullmatch, found)) else None)
        if len(set(labels)) < len(labels) or labels and section.kind == "regression":
            where = f"{self.key}.labels" if section.labels else path
            raise InputError(f"{where}: every label needs a name of its own, and a regression has none")
        self.labels, self.codes = labels, {label: index for index, label in enumerate(labels)}
        if not any(map(INTEGER.fullmatch, labels)):  # names are no numbers, so that rows may number them
            numbered = in_meta if in_meta and set(in_meta) == set(labels) else labels
            self.codes |= {str(number): self.codes[label] for number, label in enumerate(numbered)}

    def split(self, rows: list[tuple[str, dict]], split: str) -> Rows:
        """The rows of a split, all of them checked before sampling, so that a broken one is reported in any case."""
        section, numbers = self.section, None
        read = [self._row(place, row, split == "test") for place, row in rows]
        limit = section.train_rows if split == "train" else section.evaluation_rows
        if limit and limit < len(rows):
            numbers = np.sort(np.random.default_rng(0).permutation(len(rows))[:limit])
            read = [read[i] for i in numbers]
        first, *second, targets = map(list, zip(*read, strict=True))
        if section.kind != "tokens":
            targets = np.array(targets)
        if split == "test" and section.kind == "regression" and (targets == UNLABELLED).all():
            targets = np.full(len(read), np.nan)
        return Rows(first, *second or [None], targets, numbers, len(rows))

    def _row(self, place: str, row: dict, blind: bool) -> tuple:
        """The columns of a row: its text, a pair's other text, the target. blind: it may lack its label."""
        section, label = self.section, row.get(self.field)
        if section.kind == "tokens":
            tokens, labels, key = _listed(row.get(section.tokens)), _listed(label), "tokens"
            texts = {f"{section.tokens}[{number}]": token for number, token in enumerate(tokens or [None])}
        else:
            texts, key, last = {text: row.get(text) for text in section.text[: 1 + self.pair]}, "text", section.text[-1]
        for field, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                remedy = f"write it, or name its field in a recipe's {self.key}.{key} (of {', '.join(row)}"
                raise InputError(f"{place}: {field} is {text!r:.80}, not text: {remedy}; a CSV needs a header)")
        if section.kind != "tokens":
            if last not in texts and row.get(last) is not None:
                raise InputError(f"{place}: it has {last} and the first training row has none: give it in all or none")
            return *texts.values(), self._target(place, label, blind)
        labels = labels or [None] * len(tokens) * blind
        if len(labels) != len(tokens):
            raise InputError(f"{place}: {len(tokens)} {section.tokens} and {len(labels)} {self.field}: give each one")
        return tokens, np.array([self._target(place, label, blind) for label in labels], np.int64)

    def _target(self, place: str, value, blind: bool) -> int | float:
        """The score, or the output of a label as written."""
        if self.section.kind == "regression":
            try:
                score = math.nan if value is None else float(str(value))  # through a string, since True is no score
            except ValueError:
                score = math.nan
            if math.isfinite(score) or blind and value in (None, ""):
                return score
            fault, remedy = "no score", f"write a finite number, or name its field in a recipe's {self.key}.label"
        else:
            unknown = UNLABELLED if blind and value in (None, "", UNLABELLED, str(UNLABELLED)) else None
            code = self.codes.get(_written(value), unknown)
            if code is not None:
                return code
            fault = f"none of {', '.join(self.labels):.200}" if self.labels else "no single name or number"
            remedy = f"correct it, name its field in a recipe's {self.key}.label, or list it there or in meta.json"
        raise InputError(f"{place}: {self.field} {value!r:.80} is {fault}: {remedy} (scores need kind: regression)")


def check_label_order(task: Task, id2label: dict, origin: str | Path) -> bool:
    """Raises InputError for a teacher whose outputs mean other labels than the task's, or the same in another order.
    id2label: of a transformers config; case does not count. Whether it names its outputs: LABEL_0, ... say nothing."""
    theirs = [str(label) for _, label in sorted((int(number), label) for number, label in id2label.items())]
    unnamed = theirs == [f"LABEL_{number}" for number in range(len(theirs))] or not task.labels
    left, right = (list(map(str.casefold, labels)) for labels in (theirs, task.labels))
    if len(theirs) != (len(task.labels) or 1) or not (unnamed or left == right):
        ours = ", ".join(task.labels) or "a score"
        fault = f"its outputs are {', '.join(theirs)} and those of task {task.name} {ours}"
        raise InputError(f"{origin}: {fault}: {ORDER.format(task.name)}, or choose another teacher")
    return not unnamed


def check_agreement(task: Task, logits_by_row: np.ndarray | list[np.ndarray], origin: str | Path) -> None:
    """Raises InputError for outputs that mean the task's labels in another order: they would be right on a fifth more
    of the training rows, and on two more a label, which chance hardly gives."""
    if task.kind == "regression":
        return
    said = np.concatenate([np.atleast_1d(np.argmax(row, -1)) for row in logits_by_row])
    meant = np.concatenate(list(map(np.atleast_1d, task.splits["train"].targets)))
    known = (meant != UNLABELLED) & (task.kind != "tokens" or meant != [*task.labels, "O"].index("O"))
    table = np.zeros((len(task.labels),) * 2, np.int64)  # label, output
    np.add.at(table, (meant[known], said[known]), 1)
    _, outputs = linear_sum_assignment(table, maximize=True)
    if table[range(len(table)), outputs].sum() - table.trace() > max(known.sum() / 5, 2 * len(table)):
        order = ", ".join(task.labels[label] for label in np.argsort(outputs))
        fault = f"its outputs agree with the training rows in the order {order}, not as task {task.name} has it"
        raise InputError(f"{origin}: {fault}: {ORDER.format(task.name)}")


def read_logits(path: str | Path, task: Task) -> dict[str, np.ndarray]:
    """A teacher's stored outputs, {split: [R, C] float32}, for the rows that the task has. The safetensors file has
    `train.logits`, or `train`, and so on: a row for each of the split's file, or of the task's sample of it.
    Raises InputError if it does not fit the task, also if its `train.labels` do not."""
    if task.kind == "tokens":
        raise InputError(f"{path}: stored logits serve one label a row, not tokens: name tasks.{task.name}.teacher")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: no logits to read ({error}): correct tasks.{task.name}.logits") from None
    if not {"train", "train.logits"} & tensors.keys():
        raise InputError(f"{path}: train.logits is not in it (but {', '.join(tensors)}): {LOGITS}")
    found, width = {}, len(task.labels) or 1
    for split, rows in task.splits.items():
        logits, labels = tensors.get(f"{split}.logits", tensors.get(split)), tensors.get(f"{split}.labels")
        if logits is None:
            continue
        what, total = f"{path}: {split}.logits", rows.file_rows or len(rows)
        numbers = np.arange(total) if rows.numbers is None else rows.numbers
        logits = logits[:, None] if logits.ndim == width == 1 else logits
        if logits.ndim != 2 or len(logits) not in (total, len(rows)) or logits.shape[1] != width:
            needed = f"the task {total} rows of {width} ({', '.join(task.labels) or 'a score'})"
            raise InputError(f"{what} has shape {list(logits.shape)} and {needed}: {LOGITS}")
        found[split] = (logits[numbers] if len(logits) == total else logits).astype(np.float32)
        faults = {"is not finite": ~np.isfinite(found[split]).all(1)}
        if labels is not None and task.kind == "classification" and len(labels) in (total, len(rows)):
            labels = labels[numbers] if len(labels) == total else labels
            faults["has another label than the task's"] = (labels != rows.targets) & (rows.targets != UNLABELLED)
        for fault, wrong in faults.items():
            if wrong.any():
                raise InputError(f"{what} row {1 + numbers[wrong][0]} {fault}: {LOGITS}")
    return found


def predictions(task: Task, logits_by_row: np.ndarray | list[np.ndarray]) -> list:
    """What the outputs ([R, C], [R, 1] or [R] of scores, [tokens, C] for each row of tokens) say, row by row: a label's
    name, a score, or the names for the tokens. Raises InputError for NaN."""
    if not all(np.isfinite(row).all() for row in logits_by_row):
        raise InputError(f"task {task.name}: the model's outputs are not finite: lower the learning rate")
    if task.kind == "regression":
        return np.asarray(logits_by_row, np.float64).reshape(len(logits_by_row)).tolist()
    names = np.array(task.labels)
    return [names[np.argmax(row, -1)].tolist() for row in logits_by_row]


def score(task: Task, logits_by_row: np.ndarray | list[np.ndarray], split: str) -> dict[str, float]:
    """The task's metrics of the split's labelled rows, {} if none is; arguments and errors as of `predictions`."""
    targets, predicted = task.splits[split].targets, predictions(task, logits_by_row)
    if task.kind == "regression":
        known = np.isfinite(targets)
        by_row = sides = targets[known], np.array(predicted)[known]
    else:
        known = [i for i, target in enumerate(targets) if np.all(target != UNLABELLED)]
        numbers = [targets[i] for i in known], [np.argmax(logits_by_row[i], -1) for i in known]
        sides = [np.concatenate([np.atleast_1d(row) for row in side] or [[]]) for side in numbers]
        by_row = [[np.array(task.labels)[row] for row in side] for side in numbers]
    if not len(sides[0]):
        return {}
    return {name: float(METRICS[task.kind][name](*(by_row if name == "slot_f1" else sides))) for name in task.metrics}


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first token, one past the last) of every span in tags of one of SCHEMES; an I- after another kind, or
    outside of spans, begins one, as in CoNLL."""
    found, begun = set(), None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        inside = prefix in PREFIXES
        if begun is not None and (not inside or prefix in {"B", "S", "U"} or kind != begun[0]):
            found.add((*begun, index))
            begun = None
        if inside and begun is None:
            begun = kind, index
        if inside and prefix in {"E", "L", "S", "U"}:
            found.add((*begun, index + 1))
            begun = None
    return found


def slot_f1(targets: list[list[str]], predicted: list[list[str]]) -> float:
    """F1 of exactly found spans over all rows (Tjong Kim Sang and De Meulder 2003); 0 where there are none."""
    right = total = 0
    for tags, guessed in zip(targets, predicted, strict=True):
        wanted, found = spans(tags), spans(guessed)
        right, total = right + len(wanted & found), total + len(wanted) + len(found)
    return 2 * right / max(total, 1)


def correlation(of: Callable, targets: np.ndarray, predicted: np.ndarray) -> float:
    """A correlation that is 0, not undefined, for a model that gives every row the same score."""
    return of(targets, predicted).statistic if np.ptp(targets) and np.ptp(predicted) else 0.0


F1 = partial(f1_score, zero_division=0)  # of the second of two labels
MACRO = partial(f1_score, average="macro", zero_division=0)
METRICS: dict[str, dict[str, Callable]] = {  # by kind of task
    "classification": {"accuracy": accuracy_score, "f1": F1, "f1_macro": MACRO, "matthews": matthews_corrcoef},
    "regression": {"pearson": partial(correlation, pearsonr), "spearman": partial(correlation, spearmanr)},
    "tokens": {"slot_f1": slot_f1, "accuracy": accuracy_score, "f1_macro": MACRO},
}


def choose_metrics(asked: list[str] | None, kind: str, labels: list[str], where: str) -> list[str]:
    """The metrics asked for, else the usual ones of the kind. Raises InputError for one that does not fit, and for tags
    of spans that are of none of SCHEMES."""
    fitting = [metric for metric in METRICS[kind] if metric != "f1" or len(labels) == 2]
    if kind == "tokens" and (not asked or "slot_f1" in asked):
        prefixes = {label[0] if label[1:2] in ("-", "") else "" for label in labels if label != "O"}
        if not prefixes & {"B", "I"}:
            fitting.remove("slot_f1")
        elif not any(prefixes <= set(scheme) for scheme in SCHEMES):
            fault = f"the labels {', '.join(labels)} are tags of no scheme (B- and I-, and E- and S-)"
            raise InputError(f"{fault}: name {where}: [accuracy]")
    asked = asked or (fitting if kind == "regression" else fitting[0])
    asked = asked if isinstance(asked, list) else [asked]
    if wrong := [metric for metric in asked if metric not in fitting]:
        kind = f"{kind} of {len(labels)} labels" if labels else kind
        raise InputError(f"{where} (or meta.json's): {wrong[0]!r} is no metric of {kind}: list {', '.join(fitting)}")
    return asked


def headline(metrics: dict[str, float]) -> float:
    """One figure for a task: the mean of its metrics, as GLUE averages them (Wang et al. 2018)."""
    return sum(metrics.values()) / len(metrics) if metrics else math.nan


@dataclass(frozen=True)
class EncodedTask:
    """A task's splits as words. Row i of a split has the stream's lines starts[split][i] : starts[split][i + 1]."""

    task: Task
    lexicon: Lexicon
    stream: WordStream
    starts: dict[str, np.ndarray]


def encode_task(task: Task, teacher: Path, student: Path, folder: Path) -> EncodedTask:
    """Encodes all splits into one lexicon in `folder`, or reads it if the same rows were encoded before. Tokens but
    the first stand behind a space, so that byte-level vocabularies read them as in the sentence."""
    lines, starts = [], {}
    for split, rows in task.splits.items():
        if task.kind == "tokens":
            of_rows = [[" " * (place > 0) + token for place, token in enumerate(tokens)] for tokens in rows.first]
        else:
            of_rows = list(zip(rows.first, *([] if rows.second is None else [rows.second]), strict=True))
        starts[split] = len(lines) + np.cumsum([0, *map(len, of_rows)])
        lines.extend(chain.from_iterable(of_rows))
    contents = chain(((of / "tokenizer.json").read_bytes() for of in (teacher, student)), map(str.encode, lines))
    inputs = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    finished, encoded = folder / "task.json", {"sha256": inputs, "lines": len(lines)}
    if not finished.is_file() or read_json(finished) != encoded:
        finished.unlink(missing_ok=True)
        encode_corpus((lines[i : i + 10_000] for i in range(0, len(lines), 10_000)), teacher, student, folder)
        write_json(finished, encoded)
    return EncodedTask(task, Lexicon.load(folder), WordStream.load(folder), starts)


@dataclass
class TaskBatcher:
    """Batches of a split by number, and a model's outputs in the order of the split's rows."""

    encoded: EncodedTask
    name: str
    _: KW_ONLY
    batch_size: int
    seed: int
    sides: tuple[str, ...] = ("student",)  # or "teacher", or both
    max_pieces: int = 126  # of a sequence without its two outer special tokens
    shared: np.ndarray | None = None  # see `PieceTable`

    def __post_init__(self):
        self.task, self.split = self.encoded.task, self.encoded.task.splits[self.name]
        self.table = PieceTable(self.encoded.lexicon, shared=self.shared)
        self.rows, stream, starts = len(self.split), self.encoded.stream, self.encoded.starts[self.name]
        offsets = np.asarray(stream.line_offsets[starts[0] : starts[-1] + 1])
        words = np.asarray(stream.word_ids[offsets[0] : offsets[-1]], np.int64)
        line = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        row = np.repeat(np.arange(self.rows), np.diff(starts))[line]
        place = line + starts[0] - starts[row]  # which sentence of the pair, or which token
        # the words that fit: a sentence loses its end, a pair's longer sentence first, by whole words
        cost, pair = self.table.longest[words], self.split.second is not None
        group, groups = (2 * row + place, 2 * self.rows) if pair else (row, self.rows)
        sequences, limits = Sequences(words, group, groups), np.full(groups, self.max_pieces)
        if pair:
            room = self.max_pieces - max(self.table.teacher_special.between, self.table.student_special.between)
            left, right = sequences.sums(cost).reshape(-1, 2).T
            limits[::2] = np.maximum(room - right, -(-room // 2))
            limits[1::2] = np.maximum(room - left, room // 2)
        keep = sequences.running(cost) <= limits[group]
        self.words, row, place = words[keep], row[keep], place[keep]
        lengths, pieces = (np.bincount(row, weights, minlength=self.rows) for weights in (None, cost[keep]))
        self.segments = Segments(np.cumsum(lengths) - lengths, lengths, pieces)
        # by words: sorted as finely as by pieces, rows of a batch would have one label where labels go with lengths
        self.order = Order(lengths, max(1, self.batch_size), self.seed)
        self.second = place == 1 if pair else None
        self.tokens = self.labels = None
        if self.task.kind == "tokens":  # a token is labelled at its first word that both vocabularies can write
            line = starts[row] + place
            whole = np.flatnonzero(self.table.whole[self.words])
            first = whole[np.unique(line[whole], return_index=True)[1]]
            self.tokens, self.labels = np.full((2, len(self.words)), -100)
            self.tokens[first] = place[first]
            targets = np.concatenate(self.split.targets)[line[first] - starts[0]]
            self.labels[first] = np.where(targets == UNLABELLED, -100, targets)

    def batch(self, index: int) -> Batch:
        return self.of_rows(self.order.rows(index))

    def of_rows(self, rows: np.ndarray, labels: np.ndarray | None = None) -> Batch:
        """The batch of these rows [B]. labels: of the split's words, instead of the task's own."""
        labels = self.labels if labels is None else labels
        places, numbers = self.segments.places(rows)
        second, labels = (None if of_words is None else of_words[places] for of_words in (self.second, labels))
        sequences = Sequences(self.words[places], numbers, len(rows), second)
        sides = {side: self.table.gather(sequences, side == "student", labels=labels) for side in self.sides}
        batch = Batch(self.table.unit_mask(sequences), self.table.student_pieces(sequences), **sides)
        batch.rows = torch.from_numpy(np.asarray(rows, np.int64))
        if self.task.kind != "tokens":
            targets = torch.from_numpy(self.split.targets[rows])
            batch.targets = targets.float() if self.task.kind == "regression" else targets
        return batch

    def predict(self, model: Callable[[Batch], torch.Tensor], side: str = "student") -> np.ndarray | list[np.ndarray]:
        """A model's outputs in the order of the rows, as `score` takes them: [R, C], or [tokens, C] for each row.
        model: batch -> [B, C], or [B, T, C] for the pieces of `side`. A token that was cut off, or that has no piece,
        is answered O (the first label if there is no O)."""
        order, found, labels = np.argsort(self.segments.pieces, kind="stable"), [None] * self.rows, self.task.labels
        outside = np.array([label == ("O" if "O" in labels else labels[0]) for label in labels], np.float32)
        for rows in np.split(order, range(self.order.per_batch, self.rows, self.order.per_batch)):
            batch = self.of_rows(rows, self.tokens)
            places = getattr(batch, side).labels
            for pieces in filter(None, (batch.student, batch.teacher)):
                pieces.labels = None  # which were places here: no loss may take them for labels
            outputs = model(batch).float().cpu().numpy()
            for i, row in enumerate(rows):
                if places is None:
                    found[row] = outputs[i].reshape(-1)
                    continue
                found[row] = np.tile(outside, (len(self.split.first[row]), 1))
                where = places[i] >= 0
                found[row][places[i][where]] = outputs[i][where.numpy()]
        return found if self.tokens is not None else np.stack(found)
