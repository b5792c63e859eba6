"""A labelled task's rows as batches of both vocabularies.

All splits are encoded once into one lexicon, a sentence (or a token) per line, so that teacher and student see the same
words cut at the same places, and a batch is a gather. A token's label stands at its first piece on each side. Cost: a
split's words in memory, as int64. Not done: splits that do not fit there.

Shapes: R rows of a split, C labels (1 for scores), B sequences, T pieces of a padded sequence.
"""

import hashlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from tokenizer_build.files import read_json, write_json
from vocabshrink.data.batches import Batch, Order, Segments
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus, tokenizer_file
from vocabshrink.data.pieces import PieceTable, Sequences
from vocabshrink.data.tasks import UNLABELLED, Task

BLOCK_LINES = 10_000


@dataclass(frozen=True)
class EncodedTask:
    """A task's splits as words. Row i of a split has the stream's lines starts[split][i] : starts[split][i + 1]."""

    task: Task
    lexicon: Lexicon
    stream: WordStream
    starts: dict[str, np.ndarray]


def encode_task(task: Task, teacher: str | Path, student: str | Path, folder: Path) -> EncodedTask:
    """Encodes all splits into one lexicon in `folder`, or reads it if the same rows were encoded before.

    teacher, student: folders of tokenizers. A line is a sentence, or a token of a token task: from the second on behind
    a space, so that byte-level vocabularies read the tokens as they stand in the sentence.
    """
    lines, starts = [], {}
    for split, rows in task.splits.items():
        if task.kind == "tokens":
            of_rows = [[" " * (place > 0) + token for place, token in enumerate(tokens)] for tokens in rows.first]
        else:
            of_rows = list(zip(rows.first, *([] if rows.second is None else [rows.second]), strict=True))
        starts[split] = len(lines) + np.cumsum([0, *map(len, of_rows)])
        lines.extend(chain.from_iterable(of_rows))
    contents = chain((tokenizer_file(path).read_bytes() for path in (teacher, student)), map(str.encode, lines))
    inputs = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    finished, encoded = folder / "task.json", {"sha256": inputs, "lines": len(lines)}
    if not finished.is_file() or read_json(finished) != encoded:
        finished.unlink(missing_ok=True)
        blocks = (lines[start : start + BLOCK_LINES] for start in range(0, len(lines), BLOCK_LINES))
        encode_corpus(blocks, teacher, student, folder)
        write_json(finished, encoded)
    return EncodedTask(task, Lexicon.load(folder), WordStream.load(folder), starts)


@dataclass
class TaskBatcher:
    """Batches of a split by number, and a model's outputs in the order of the split's rows.

    sides: "student", "teacher" or both. max_pieces: of a sequence without its two outer special tokens. shared: see
    `PieceTable`.
    """

    encoded: EncodedTask
    name: str
    _: KW_ONLY
    batch_size: int
    seed: int
    sides: tuple[str, ...] = ("student",)
    max_pieces: int = 126
    shared: np.ndarray | None = None

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
        self.sizes = np.bincount(row, weights=cost[keep], minlength=self.rows)  # pieces of each row
        lengths = np.bincount(row, minlength=self.rows)
        self.segments = Segments(np.cumsum(lengths) - lengths, lengths)
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
        """The index-th batch of the run."""
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

        model: batch -> [B, C], or [B, T, C] for the pieces of `side`. Rows of like length go together. A token that was
        cut off, or that has no piece, is answered O (the first label if there is no O).
        """
        order, found = np.argsort(self.sizes, kind="stable"), [None] * self.rows
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
                found[row] = np.zeros((len(self.split.first[row]), len(self.task.labels)), np.float32)
                found[row][:, self.task.labels.index("O") if "O" in self.task.labels else 0] = 1
                where = places[i] >= 0
                found[row][places[i][where]] = outputs[i][where.numpy()]
        return found if self.tokens is not None else np.stack(found)
