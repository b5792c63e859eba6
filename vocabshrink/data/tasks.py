"""Labelled tasks: a user's files as checked rows, as batches of both vocabularies, and as the figures of the papers.

A task is one JSONL or CSV file a split. Whatever could train silently on nonsense is refused while reading, with the
file, the row and the mend: an unknown label, a row without text, a single class. The names and the order of the labels
travel with the task, because the commonest defect of distilled classifiers is a teacher that counts its classes in
another order: `check_label_order` refuses it.

Rows become batches as the corpus does. All splits are encoded once into one lexicon, a sentence or a token a line, so
that teacher and student see the same words cut at the same places, and a batch is a gather: no tokenizer runs during
training. A token's label stands at its first piece on each side.

Shapes: R rows of a split, C labels (1 for scores), B sequences, T pieces of a padded sequence.
"""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tokenizer_build.errors import InputError
from vocabshrink.data.metrics import FITTING, METRICS
from vocabshrink.run.recipe import TaskSection

UNLABELLED = -1
INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Rows:
    """One split.

    first: a sentence each, or the list of its tokens. second: a pair's other sentence; None without pairs. targets:
    [R] int64 labels, [R] float64 scores, or an int64 array of labels for each row of tokens; UNLABELLED (NaN for
    scores) where a test row has none. numbers: [R] which rows of the file these are, None: all of them; of how many.
    """

    first: list[str] | list[list[str]]
    second: list[str] | None
    targets: np.ndarray | list[np.ndarray]
    numbers: np.ndarray | None = None
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


# ---------------------------------------------------------------------------------------------- reading


def read_task(section: TaskSection, name: str) -> Task:
    """Reads and checks the files of `tasks.<name>`.

    Labels are named by the section, else by the meta.json beside the train file ("labels", or the label field's own
    name), else they are the distinct labels of the training rows, sorted. A row gives its label by name, or by number:
    the position in meta.json's order, else in the section's.

    Raises:
        InputError: with file, row and mend, for anything that could not be meant (see the module's docstring).
    """
    paths = {split: Path(path) for split in ("train", "validation", "test") if (path := getattr(section, split))}
    meta = _read_meta(paths["train"].with_name("meta.json"))
    rows = {split: read_rows(path) for split, path in paths.items()}
    labels, codes = _labels(section, name, meta, rows["train"])
    pair = _is_pair(section, rows["train"])
    reader = _Reader(section, name, labels, codes, pair)
    splits = {split: reader.split(paths[split], rows[split], split) for split in paths}
    seen = np.unique(np.concatenate(splits["train"].targets) if section.kind == "tokens" else splits["train"].targets)
    if len(seen) < 2:
        only = repr(labels[seen[0]]) if labels else seen[0]
        raise InputError(f"{paths['train']}: every row has the label {only}: give rows of at least two labels")
    return Task(name, section.kind, labels, splits, _metrics(section, name, meta, labels))


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(row number, fields) of a .jsonl or .csv file; the number is the line, or the record with the header as 1."""
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise InputError(f"{path}: the suffix says neither .jsonl nor .csv: write the rows as one of them")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such task file: correct its path in the tasks section") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}: write the rows as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a task file: {error.strerror}") from None
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    if not rows:
        raise InputError(f"{path}: there are no rows in it: give at least one, or leave the split out")
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # str.splitlines would cut at U+2028, which JSON allows
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{path}: row {number} is not a JSON object: write one object a line")
            rows.append((number, row))
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[int, dict]]:
    reader, rows, header, number = csv.reader(io.StringIO(text), strict=True), [], None, 0
    try:
        for number, cells in enumerate(reader, 1):
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise InputError(f"{path}: the header names a column twice: {', '.join(header)}: rename one")
            else:
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}: row {number} has {len(cells)} cells and the header {len(header)}: quote cells that "
                        "hold commas"
                    )
                rows.append((number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise InputError(f"{path}: row {number + 1} is not CSV ({error}): double the quotes inside quotes") from None
    return rows


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a JSON file ({error}): mend it or take it away") from None
    if not isinstance(meta, dict):
        raise InputError(f'{path}: not a JSON object: write {{"labels": [...]}} or take it away')
    return meta


def _label_field(section: TaskSection) -> str:
    return section.label or ("slots" if section.kind == "tokens" else "label")


def _named_in_meta(section: TaskSection, meta: dict) -> list[str] | None:
    names = meta.get(_label_field(section), meta.get("slots" if section.kind == "tokens" else "labels"))
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        path = Path(section.train).with_name("meta.json")
        raise InputError(f"{path}: its labels are not a list of names: write them in the order of their numbers")
    return names


def _labels(section: TaskSection, name: str, meta: dict, rows: list) -> tuple[list[str], dict[str, int]]:
    """The labels in the order of the outputs, and the output of everything that a row may write."""
    if section.kind == "regression":
        if section.labels:
            raise InputError(f"tasks.{name}.labels: a regression has scores, no labels: leave labels out")
        return [], {}
    in_meta = _named_in_meta(section, meta)
    labels = section.labels or in_meta
    if labels is None:
        field, found = _label_field(section), set()
        for number, row in rows:
            for value in _label_values(row.get(field), section.kind):
                if isinstance(value, bool) or not isinstance(value, str | int | None):
                    raise InputError(
                        f"{section.train}: row {number}: {field} is {_shown(value)}, no label: write a name or a "
                        "number, or set kind: regression for scores"
                    )
                found |= set() if value in (None, "") else {str(value)}  # rows without are told of when they are read
        numeric = all(INTEGER.fullmatch(label) for label in found)
        labels = sorted(found, key=int) if numeric else sorted(found)
    if len(set(labels)) < len(labels):
        raise InputError(f"tasks.{name}.labels: a label is written twice: every output needs a name of its own")
    return labels, _codes(labels, in_meta or labels)


def _shown(value) -> str:
    """A value for a message of one sentence."""
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."


def _codes(labels: list[str], numbered: list[str]) -> dict[str, int]:
    """Label as written -> output. Numbers count in the order of `numbered`, unless the names are numbers themselves."""
    codes = {label: index for index, label in enumerate(labels)}
    if set(numbered) != set(labels):
        numbered = labels
    if not any(INTEGER.fullmatch(label) for label in labels):
        codes |= {str(number): codes[label] for number, label in enumerate(numbered)}
    return codes


def _label_values(value, kind: str) -> list:
    """The labels in a field, split at spaces where a CSV cell has a row's."""
    if kind != "tokens":
        return [value]
    return value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]


def _is_pair(section: TaskSection, rows: list) -> bool:
    """Whether the task is of pairs: the first row says so, where the recipe has not named the fields."""
    if section.kind == "tokens" or len(section.text) == 1:
        return False
    return section.text != TaskSection.model_fields["text"].default or rows[0][1].get(section.text[1]) is not None


@dataclass(frozen=True)
class _Reader:
    """Turns fields into rows, with every check."""

    section: TaskSection
    name: str
    labels: list[str]
    codes: dict[str, int]
    pair: bool

    @property
    def field(self) -> str:
        return _label_field(self.section)

    def split(self, path: Path, rows: list[tuple[int, dict]], split: str) -> Rows:
        section, total = self.section, len(rows)
        limit = section.train_rows if split == "train" else section.evaluation_rows
        # checked before sampling: a broken row is told of whatever the sample
        read = [self._row(f"{path}: row {number}", row, split == "test") for number, row in rows]
        numbers = None
        if limit and limit < total:
            numbers = np.sort(np.random.default_rng(0).permutation(total)[:limit])
            read = [read[i] for i in numbers]
        first, second, targets = (list(column) for column in zip(*read, strict=True))
        if section.kind != "tokens":
            targets = np.array(targets, np.float64 if section.kind == "regression" else np.int64)
            if split == "test" and section.kind == "regression" and (targets == UNLABELLED).all():
                targets = np.full(len(targets), np.nan)
        return Rows(first, second if self.pair else None, targets, numbers, total)

    def _row(self, where: str, row: dict, may_lack_label: bool) -> tuple:
        section = self.section
        if section.kind == "tokens":
            tokens = self._tokens(where, row)
            return tokens, None, self._token_labels(where, row.get(self.field), len(tokens), may_lack_label)
        first = self._text(where, row, section.text[0])
        second = self._text(where, row, section.text[1]) if self.pair else None
        if not self.pair and len(section.text) > 1 and row.get(section.text[1]) is not None:
            raise InputError(
                f"{where} has {section.text[1]} and the first training row has none: give it in all rows or in none"
            )
        label = row.get(self.field)
        if label in (None, "") and not may_lack_label:
            raise InputError(
                f"{where} has no {self.field}: add it, or name the label's field in tasks.{self.name}.label"
            )
        read = self._score if section.kind == "regression" else self._label
        return first, second, read(where, label, may_lack_label)

    def _text(self, where: str, row: dict, field: str) -> str:
        if field not in row:
            raise InputError(
                f"{where} has no {field} (but {', '.join(map(str, row)) or 'nothing'}): add it, or name the fields in "
                f"tasks.{self.name}.text; a CSV needs a header line"
            )
        return _checked_text(where, field, row[field])

    def _tokens(self, where: str, row: dict) -> list[str]:
        field = self.section.tokens
        tokens = row.get(field)
        if isinstance(tokens, str):
            tokens = tokens.split()
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"{where} has no list {field}: add it, or name its field in tasks.{self.name}.tokens")
        return [_checked_text(where, f"{field}[{i}]", token) for i, token in enumerate(tokens)]

    def _token_labels(self, where: str, value, count: int, may_lack_label: bool) -> np.ndarray:
        if value in (None, "", []) and may_lack_label:
            return np.full(count, UNLABELLED)
        values = _label_values(value, "tokens")
        if value is None or len(values) != count:
            found = 0 if value is None else len(values)
            raise InputError(f"{where} has {count} {self.section.tokens} and {found} {self.field}: give each token one")
        return np.array([self._label(where, label, may_lack_label) for label in values], np.int64)

    def _label(self, where: str, value, may_lack_label: bool) -> int:
        code = self.codes.get(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
        if code is None and may_lack_label and value in (None, "", UNLABELLED, str(UNLABELLED)):
            return UNLABELLED
        if code is None:
            names = ", ".join(self.labels[:12]) + (", ..." if len(self.labels) > 12 else "")
            raise InputError(
                f"{where}: label {_shown(value)} is none of {names}: correct it, or add it to tasks.{self.name}.labels"
            )
        return code

    def _score(self, where: str, value, may_lack_label: bool) -> float:
        if value in (None, "") and may_lack_label:
            return math.nan
        try:
            score = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{where}: {self.field} is {_shown(value)}, no score: write a finite number")
        return score


def _checked_text(where: str, field: str, text) -> str:
    if not isinstance(text, str):
        raise InputError(f"{where}: {field} is {_shown(text)}, not text: write it as a string")
    if not text.strip():
        raise InputError(f"{where}: {field} is empty: write its text or take the row out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {field} has a lone surrogate: mend its encoding") from None
    return text


def check_label_order(task: Task, id2label: dict, origin: str | Path) -> None:
    """Refuses a teacher whose outputs mean other labels than the task's, or the same in another order.

    id2label: of a transformers config, its keys int or str. transformers' own LABEL_0, LABEL_1, ... say nothing and are
    accepted; upper and lower case are the same.
    """
    if task.kind == "regression":
        if len(id2label) != 1:
            raise InputError(
                f"{origin}: it has {len(id2label)} outputs and task {task.name} is a regression: train one"
            )
        return
    named = {int(number): str(label) for number, label in id2label.items()}
    theirs = [named[number] for number in sorted(named)]
    if len(theirs) != len(task.labels):
        raise InputError(
            f"{origin}: it has {len(theirs)} labels and task {task.name} has {len(task.labels)} "
            f"({', '.join(task.labels)}): choose a teacher of this task"
        )
    if theirs == [f"LABEL_{number}" for number in range(len(theirs))]:
        return
    left, right = ([label.casefold() for label in labels] for labels in (theirs, task.labels))
    if left != right:
        other = "its labels are in another order" if sorted(left) == sorted(right) else "it has other labels"
        raise InputError(
            f"{origin}: {other}: {', '.join(theirs)} instead of {', '.join(task.labels)}: write its order in "
            f"tasks.{task.name}.labels (rows that number their labels keep meta.json's), or choose another teacher"
        )


def read_logits(path: str | Path, task: Task) -> dict[str, np.ndarray]:
    """A teacher's stored outputs, {split: [R, C] float32}, for the rows that the task has.

    The safetensors file has `train.logits`, or `train`, and so for other splits: a row for each row of the split's file
    or, where the task sampled it, of the sample. `train.labels`, where it has them, must be the task's.

    Raises:
        InputError: a file that cannot be read, another number of rows or of labels, not finite, other labels.
    """
    if task.kind == "tokens":
        raise InputError(f"{path}: stored logits serve one label a row, not tokens: name tasks.{task.name}.teacher")
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of logits: correct tasks.{task.name}.logits") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}): write the logits anew") from None
    found, width = {}, len(task.labels) or 1
    for split, rows in task.splits.items():
        logits = tensors.get(f"{split}.logits", tensors.get(split))
        if logits is None:
            continue
        if logits.ndim == 1 and width == 1:
            logits = logits[:, None]
        total = len(rows) if rows.file_rows is None else rows.file_rows
        if logits.ndim != 2 or len(logits) not in (total, len(rows)):
            raise InputError(
                f"{path}: {split} has logits of shape {list(logits.shape)} and the task {total} rows: make them from "
                "the same file, row for row"
            )
        if logits.shape[1] != width:
            raise InputError(
                f"{path}: {split} has {logits.shape[1]} logits a row and the task {width} labels "
                f"({', '.join(task.labels) or 'a score'}): choose a teacher of this task"
            )
        sampled = len(logits) == total and rows.numbers is not None
        logits = (logits[rows.numbers] if sampled else logits).astype(np.float32)
        if not (finite := np.isfinite(logits).all(1)).all():
            raise InputError(f"{path}: {split} row {_file_row(rows, finite)} is not finite: write the logits anew")
        labels = tensors.get(f"{split}.labels")
        if labels is not None and task.kind == "classification" and len(labels) in (total, len(rows)):
            same = (labels[rows.numbers] if sampled else labels) == rows.targets
            if not (same | (rows.targets == UNLABELLED)).all():
                raise InputError(
                    f"{path}: {split} row {_file_row(rows, same)} has another label than the task's file: make the "
                    "logits from the same file, row for row, with the labels in the same order"
                )
        found[split] = logits
    if "train" not in found:
        raise InputError(f"{path}: it has no tensor train.logits (but {', '.join(tensors)}): write the logits anew")
    return found


def _file_row(rows: Rows, good: np.ndarray) -> int:
    """Number, from 1, in the split's file of the first row that is not good."""
    first = int(np.flatnonzero(~good)[0])
    return 1 + (first if rows.numbers is None else int(rows.numbers[first]))


def _metrics(section: TaskSection, name: str, meta: dict, labels: list[str]) -> list[str]:
    """The recipe's metrics, else meta.json's, else the usual of the kind."""
    bio = any(label.startswith(("B-", "I-")) for label in labels)
    usual = {
        "classification": ["accuracy"],
        "regression": ["pearson", "spearman"],
        "tokens": ["slot_f1" if bio else "accuracy"],
    }
    metrics, fitting = section.metrics or meta.get("metrics") or usual[section.kind], FITTING[section.kind]
    for metric in metrics:
        if metric not in fitting:
            raise InputError(
                f"tasks.{name}.metrics (or meta.json's): {metric!r} is no metric of {section.kind}: use "
                f"{', '.join(fitting)}"
            )
        if metric == "f1" and len(labels) != 2:
            raise InputError(f"tasks.{name}.metrics: f1 is of two labels and there are {len(labels)}: use f1_macro")
    return list(metrics)


def predictions(task: Task, logits_by_row: np.ndarray | list[np.ndarray]) -> list:
    """What the outputs say, row by row: a label's name, a score, or the names for the tokens.

    logits_by_row: [R, C], [R, 1] or [R] for scores, and for token tasks [tokens, C] for each row.

    Raises:
        InputError: outputs that are not finite.
    """
    if not all(np.isfinite(row).all() for row in logits_by_row):
        raise InputError(f"task {task.name}: the model's outputs are not finite: lower the learning rate")
    if task.kind == "regression":
        return np.asarray(logits_by_row, np.float64).reshape(len(logits_by_row)).tolist()
    if task.kind == "classification":
        return [task.labels[i] for i in np.argmax(logits_by_row, 1)]
    return [[task.labels[i] for i in np.argmax(row, 1)] for row in logits_by_row]


def score(task: Task, logits_by_row: np.ndarray | list[np.ndarray], split: str) -> dict[str, float]:
    """The task's metrics, of the split's labelled rows (see `predictions` for the shapes); {} where no row has a label.

    Raises:
        InputError: outputs that are not finite.
    """
    targets, predicted = task.splits[split].targets, predictions(task, logits_by_row)
    if len(predicted) != len(targets):
        raise ValueError(f"{split} has {len(targets)} rows and the model answered {len(predicted)}")
    if task.kind == "regression":
        known = np.isfinite(targets)
        sides = targets[known], np.array(predicted)[known]
    else:
        rows = [np.atleast_1d(target) for target in targets]
        named = [row if task.kind == "tokens" else [row] for row in predicted]
        kept = [(t, p) for t, p in zip(rows, named, strict=True) if (t != UNLABELLED).all()]
        by_row = [[task.labels[i] for i in t] for t, _ in kept], [p for _, p in kept]
        index = {label: i for i, label in enumerate(task.labels)}
        sides = tuple(np.array([index[label] for row in side for label in row]) for side in by_row)
    if not len(sides[0]):
        return {}
    return {name: METRICS[name](*(by_row if name == "slot_f1" else sides)) for name in task.metrics}
