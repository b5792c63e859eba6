"""Batches of the corpus and of labelled tasks, out of word ids: no tokenizer in the loop.

A batch is a pure function of (seed, step); each of several processes draws it whole and takes every n-th sequence. A
task's splits are encoded once into one lexicon, a sentence (or a token) per line, so that teacher and student see the
same words cut at the same places. Shapes B, T, U and n: see pieces.py; S segments, R rows of a split."""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus, tokenizer_file, within_rows
from vocabshrink.data.pieces import Pieces, PieceTable, Sequences, mapped
from vocabshrink.data.tasks import UNLABELLED, Task

BLOCK_LINES = 50_000  # lines cut into segments at a time, so that memory does not grow with the corpus
PER_ROW = ("targets", "rows", "vectors")  # what a batch has of each of its sequences, if anything
POOL_BATCHES = 64  # batches sorted by length together: little padding, and still shuffled


@dataclass
class Batch:
    """What one step sees; a side that was not asked for is None."""

    unit_mask: torch.Tensor  # [B, U] bool: true at units that every side has whole, special tokens included
    tokens: int  # student pieces, in all processes' parts
    student: Pieces | None = None
    teacher: Pieces | None = None
    mixed: Pieces | None = None  # pieces of both vocabularies, combined ids
    targets: torch.Tensor | None = None  # [B] int64 classes or [B] float scores of a task of sentences
    rows: torch.Tensor | None = None  # [B] int64: where a task's split has them
    vectors: torch.Tensor | None = None  # [B, D] float32: the teachers' stored sentence vectors, see vectors.py
    group: int = 1  # near sentences that follow each other
    lists: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)  # of places, see `once`

    @property
    def sides(self) -> dict[str, Pieces]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Pieces)}

    @cached_property
    def counted(self) -> torch.Tensor:
        """[n] places of the units that count in the flattened [B U], rising. Made on the host, as in `Pieces`."""
        return self.unit_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def counted_pairs(self) -> torch.Tensor:
        """[m] places of the pairs of such units of a sequence in the flattened [B U U], rising."""
        return (self.unit_mask.unsqueeze(1) & self.unit_mask.unsqueeze(2)).flatten().nonzero().squeeze(1)

    def once(self, name: str, make: Callable[["Batch", Any], tuple], table: Any) -> tuple[torch.Tensor, ...]:
        """The lists that a loss makes of the batch and a table, made when they are first asked for, and kept."""
        if name not in self.lists:
            self.lists[name] = make(self, table)
        return self.lists[name]

    def part(self, rank: int, processes: int) -> "Batch":
        """What one of several processes takes: every n-th group of sequences, so that all have like lengths. Of the
        last, short batch of an epoch a process without a group of its own takes the first."""
        if processes == 1:
            return self
        groups = torch.arange(len(self.unit_mask)).view(-1, self.group)
        rows = (groups[rank::processes] if rank < len(groups) else groups[:1]).flatten()
        parts = {name: side.part(rows) for name, side in self.sides.items()}
        units = 1 + max(int(side.units.max()) for side in parts.values())
        parts |= {name: value[rows] for name in PER_ROW if (value := getattr(self, name)) is not None}
        return replace(self, unit_mask=self.unit_mask[rows, :units], lists={}, **parts)

    def to(self, device) -> "Batch":
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Segments:
    """Training sequences: runs of words of the stream. starts [S] int64, lengths [S] int32 in words; pieces [S] int64,
    in the vocabulary that needs more of them for each word."""

    starts: np.ndarray
    lengths: np.ndarray
    pieces: np.ndarray

    def take(self, chosen: np.ndarray) -> "Segments":
        """Those of these numbers, or where a mask is true."""
        return Segments(self.starts[chosen], self.lengths[chosen], self.pieces[chosen])

    def places(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] where the chosen segments' words stand in the stream, and [n] which of the chosen each is of."""
        lengths = self.lengths[chosen].astype(np.int64)
        numbers = np.repeat(np.arange(len(chosen)), lengths)
        return self.starts[chosen][numbers] + within_rows(lengths), numbers


def cut_segments(
    stream: WordStream, lexicon: Lexicon, *, unit: str, max_pieces: int, min_words: int, held_out_every: int, sides=()
) -> tuple[Segments, Segments]:
    """(training, held-out) segments, which never share a line: lines, or sentences if `unit` says so, cut where they
    exceed `max_pieces` in the vocabulary that needs more of them, or in the teacher's if only the teacher reads."""
    of_teacher = np.diff(lexicon.teacher_offsets)
    longest = np.maximum(of_teacher, np.diff(lexicon.student_offsets))
    cost_of_word = of_teacher if sides == ("teacher",) else longest
    found = [[np.zeros(0, kind) for kind in (np.int64, np.int32, np.int64, bool)]]
    for first_line in range(0, len(stream.line_offsets) - 1, BLOCK_LINES):
        offsets = np.asarray(stream.line_offsets[first_line : first_line + BLOCK_LINES + 1])
        words = np.asarray(stream.word_ids[offsets[0] : offsets[-1]])
        if not len(words):
            continue
        local = offsets - offsets[0]
        new_run = np.zeros(len(words), dtype=bool)
        new_run[local[local < len(words)]] = True
        if unit == "sentence":
            new_run[1:] |= lexicon.ends_sentence[words[:-1]] & ~lexicon.ends_sentence[words[1:]]
        cost = cost_of_word[words]
        # A word belongs to the window in which its last piece falls; a first word that began in the window before
        # may carry it a few pieces over, which is why windows are cut one longest ordinary word (8 pieces) short.
        ends = np.cumsum(cost)
        before = (ends - cost)[new_run][np.cumsum(new_run) - 1]  # pieces of the block before the word's run
        window = (ends - before - 1) // max(1, max_pieces - 8)
        new_run[1:] |= window[1:] != window[:-1]
        begin = np.flatnonzero(new_run)
        length = np.diff(np.append(begin, len(words)))
        line = np.searchsorted(local, begin, side="right") + first_line  # the first is 1
        keep = (length >= min_words) & (np.add.reduceat(cost, begin) <= max_pieces)
        parts = begin + offsets[0], length.astype(np.int32), np.add.reduceat(longest[words], begin)
        found.append([part[keep] for part in (*parts, line % held_out_every == 0)])
    *parts, held_out = map(np.concatenate, zip(*found, strict=True))
    return Segments(*parts).take(~held_out), Segments(*parts).take(held_out)


def repeated(times: np.ndarray, seed: int) -> np.ndarray:
    """The numbers of rows in order, each as often as `times` [R] says, on the average."""
    often = np.floor(times + np.random.default_rng((seed, 3)).random(len(times)))
    return np.repeat(np.arange(len(times)), often.astype(np.int64))


class Order:
    """The rows of each batch: shuffled every epoch, then sorted by pieces within pools, so that batches hardly pad."""

    def __init__(self, lengths: np.ndarray, per_batch: int, seed: int):
        self.lengths, self.per_batch, self.seed = lengths, per_batch, seed
        self.per_epoch = max(1, math.ceil(len(lengths) / per_batch))
        self._epoch: tuple = (None,)  # the last one used: its number, its order, the order of its batches

    def rows(self, index: int) -> np.ndarray:
        """Row numbers of the index-th batch."""
        epoch, position = divmod(index, self.per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            order = rng.permutation(len(self.lengths))
            pool = self.per_batch * POOL_BATCHES
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([p[np.argsort(self.lengths[p], kind="stable")] for p in pools])
            self._epoch = epoch, order, rng.permutation(self.per_epoch)
        _, order, batches = self._epoch
        start = int(batches[position]) * self.per_batch
        return order[start : start + self.per_batch]


@dataclass
class Batcher:
    """Batches of segments by number."""

    table: PieceTable
    stream: WordStream
    lexicon: Lexicon
    segments: Segments
    _: KW_ONLY
    batch_size: int  # sequences
    seed: int
    sides: tuple[str, ...]  # "student", "teacher", "mixed"
    group_size: int = 1  # sequences from one segment: 1, or 4 (see `near_groups`)
    p: Callable[[int], float] = lambda index: 0.5  # batch number -> share of mixed words in the student's pieces
    mask: float = 0.0  # share of words
    max_pieces: int = 126  # of a sequence without its special tokens
    vectors: Callable[[np.ndarray], np.ndarray] | None = None  # segment numbers -> their stored vectors [n, D]

    def __post_init__(self):
        """Raises InputError where there is nothing to train on."""
        if not len(self.segments.lengths):
            raise InputError(f"corpus: no run of enough words fits {self.max_pieces} pieces: give more text")
        # sorted by words instead, a third of a batch of short sentences was padding
        self.order = Order(self.segments.pieces, max(1, self.batch_size // self.group_size), self.seed)
        self._rare = rare_words(self.lexicon) if self.group_size > 1 else None

    def batch(self, index: int) -> Batch:
        """The index-th batch of the run."""
        rng = np.random.default_rng((self.seed, 1, index))
        rows = self.order.rows(index)
        sequences = gather_words(self.stream, self.segments, rows)
        if self.group_size > 1:
            sequences = near_groups(sequences, self._rare, rng)
        # without the words at the end of a sequence that a swap for a longer word pushed over the limit
        keep = sequences.running(self.table.longest[sequences.words]) <= self.max_pieces
        sequences = Sequences(sequences.words[keep], sequences.numbers[keep], sequences.count)
        words, sides = len(sequences.words), {}
        masked = rng.random(words) < self.mask if self.mask else None
        for side in self.sides:
            mixed = side == "mixed"
            from_student = rng.random(words) < self.p(index) if mixed else side == "student"
            sides[side] = self.table.gather(sequences, from_student, masked=masked, rng=rng, combined=mixed)
        if self.vectors is not None:
            sides["vectors"] = torch.from_numpy(self.vectors(rows))
        sides |= {"unit_mask": self.table.unit_mask(sequences), "tokens": self.table.student_pieces(sequences)}
        return Batch(**sides, group=self.group_size)


def gather_words(stream: WordStream, segments: Segments, chosen: np.ndarray) -> Sequences:
    """The words of the chosen segments."""
    places, numbers = segments.places(chosen)
    return Sequences(stream.word_ids[places].astype(np.int64), numbers, len(chosen))


def rare_words(lexicon: Lexicon) -> np.ndarray:
    """[W] bool: words worth telling apart: those the student splits and the teacher does not, or splits less."""
    teacher, student = np.diff(lexicon.teacher_offsets), np.diff(lexicon.student_offsets)
    known = teacher > 0
    rare = known & (student > teacher) & (lexicon.counts > 1)
    return rare if rare.sum() >= 100 else known  # in a tiny corpus, or if nothing is split more, any word will do


def near_groups(sequences: Sequences, rare: np.ndarray, rng: np.random.Generator) -> Sequences:
    """Each sentence beside three near ones, whose distinctions piece means lose: sequence 4 i + j is variant j of
    sentence i: itself; one of its rare words swapped; one or two words dropped; a half of it, or a rotation."""
    words, sequence, count = sequences.words, sequences.numbers, sequences.count
    lengths = np.bincount(sequence, minlength=count)
    first, position = np.cumsum(lengths) - lengths, within_rows(lengths)

    # swap: one word a sentence, a rare one if there is one (rare words get the higher random keys)
    best = np.lexsort((rng.random(len(words)) + rare[words], sequence))[first + lengths - 1]
    swapped, pool = words.copy(), np.flatnonzero(rare)
    drawn = rng.integers(0, len(pool), count)
    swapped[best] = pool[(drawn + (pool[drawn] == words[best])) % len(pool)]  # the word itself would be no swap

    # drop: one or two words, never all
    rank = np.empty(len(words), dtype=np.int64)
    rank[np.lexsort((rng.random(len(words)), sequence))] = position
    keep_drop = rank >= np.minimum(rng.integers(1, 3, count), lengths - 1)[sequence]

    # half or rotation
    kind, half = rng.integers(0, 3, count)[sequence], ((lengths + 1) // 2)[sequence]
    keep_half = (kind == 2) | ((position < half) == (kind == 0))
    rotated = np.where(kind == 2, words[first[sequence] + (position + half) % lengths[sequence]], words)

    everything = np.ones(len(words), bool)
    variants = [(words, everything), (swapped, everything), (words, keep_drop), (rotated, keep_half)]
    all_words = np.concatenate([variant[keep] for variant, keep in variants])
    all_sequences = np.concatenate([4 * sequence[keep] + j for j, (_, keep) in enumerate(variants)])
    order = np.argsort(all_sequences, kind="stable")
    return Sequences(all_words[order], all_sequences[order], 4 * count)


@dataclass(frozen=True)
class EncodedTask:
    """A task's splits as words. Row i of a split has the stream's lines starts[split][i] : starts[split][i + 1]."""

    task: Task
    lexicon: Lexicon
    stream: WordStream
    starts: dict[str, np.ndarray]


def encode_task(task: Task, teacher: str | Path, student: str | Path, folder: Path) -> EncodedTask:
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
    contents = chain((tokenizer_file(path).read_bytes() for path in (teacher, student)), map(str.encode, lines))
    inputs = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    finished, encoded = folder / "task.json", {"sha256": inputs, "lines": len(lines)}
    if not finished.is_file() or read_json(finished) != encoded:
        finished.unlink(missing_ok=True)
        blocks = (lines[start : start + 10_000] for start in range(0, len(lines), 10_000))
        encode_corpus(blocks, teacher, student, folder)
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


def prefetch(batcher, indices: Iterator[int], prepare: Callable[[Batch], Batch] = lambda batch: batch):
    """The batches of `indices`, made and prepared in a thread, one ahead of the consumer, until it stops."""
    pool = ThreadPoolExecutor(1)
    begun = (pool.submit(lambda index=index: prepare(batcher.batch(index))) for index in indices)
    try:
        for batch, _ in pairwise(chain(begun, [None])):
            yield batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
