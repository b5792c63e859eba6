"""Batches from the word-id stream: any mixture of two vocabularies at memory speed, no tokenizer in the loop.

A batch is a pure function of (seed, step, rank). Nothing is shuffled on disk and no iterator has a state, so the
position in the data is the step number and a resumed run sees exactly the batches that it would have seen. How words
become pieces and units: see pieces.py, also for the shapes B, T, U and n. S segments.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain, pairwise

import numpy as np
import torch

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import Lexicon, WordStream, within_rows
from vocabshrink.data.pieces import Pieces, PieceTable, Sequences

BLOCK_LINES = 50_000  # lines cut into segments at a time, so that memory does not grow with the corpus
POOL_BATCHES = 64  # batches sorted by length together: little padding, and still shuffled


@dataclass
class Batch:
    """What one step sees.

    unit_mask [B, U] bool: true at units that every side has whole, special tokens included. tokens: student pieces.
    student, teacher: in that vocabulary's pieces; mixed: in both, combined ids; None if not asked for. targets: [B]
    int64 classes or [B] float scores of a task, whose split has this batch at `rows` [B] int64; None outside tasks.
    """

    unit_mask: torch.Tensor
    tokens: int
    student: Pieces | None = None
    teacher: Pieces | None = None
    mixed: Pieces | None = None
    targets: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        moves = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor | Pieces)
        }
        return replace(self, **moves)


@dataclass(frozen=True)
class Segments:
    """Training sequences: runs of words of the stream. starts [S] int64, lengths [S] int32 in words."""

    starts: np.ndarray
    lengths: np.ndarray

    def places(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] where the chosen segments' words stand in the stream, and [n] which of the chosen each is of."""
        lengths = self.lengths[chosen].astype(np.int64)
        numbers = np.repeat(np.arange(len(chosen)), lengths)
        return self.starts[chosen][numbers] + within_rows(lengths), numbers


def cut_segments(
    stream: WordStream,
    lexicon: Lexicon,
    *,
    unit: str,
    max_pieces: int,
    min_words: int,
    held_out_every: int,
    sides: tuple[str, ...] = ("mixed",),
) -> tuple[Segments, Segments]:
    """(training, held-out) segments: lines, or sentences if `unit` says so, cut where they exceed `max_pieces`.

    Pieces are counted in the vocabulary that needs more of them, so that any mixture fits; in the teacher's if only the
    teacher reads, so that what it learns does not depend on the student's. A line is never split between the two.
    Raises InputError if the corpus leaves nothing to train on.
    """
    table_lengths = np.diff(lexicon.teacher_offsets).astype(np.int64)
    if sides != ("teacher",):
        table_lengths = np.maximum(table_lengths, np.diff(lexicon.student_offsets))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, bool))]
    for first_line in range(0, len(stream.line_offsets) - 1, BLOCK_LINES):
        offsets = np.asarray(stream.line_offsets[first_line : first_line + BLOCK_LINES + 1])
        words = np.asarray(stream.word_ids[offsets[0] : offsets[-1]])
        if not len(words):
            continue
        local = offsets - offsets[0]
        new_run = np.zeros(len(words), dtype=bool)
        new_run[local[:-1][local[:-1] < len(words)]] = True
        if unit == "sentence":
            new_run[1:] |= lexicon.ends_sentence[words[:-1]] & ~lexicon.ends_sentence[words[1:]]
        cost = table_lengths[words]
        ends = np.cumsum(cost)
        # A word belongs to the window in which its last piece falls; a first word that began in the window before
        # may carry it a few pieces over, which is why windows are cut one longest ordinary word (8 pieces) short.
        before = (ends - cost)[new_run][np.cumsum(new_run) - 1]  # pieces of the block before the word's run
        window = (ends - before - 1) // max(1, max_pieces - 8)
        new_segment = new_run.copy()
        new_segment[1:] |= window[1:] != window[:-1]
        begin = np.flatnonzero(new_segment)
        length = np.diff(np.append(begin, len(words)))
        pieces = np.add.reduceat(cost, begin)
        line = np.searchsorted(local, begin, side="right") - 1 + first_line
        keep = (length >= min_words) & (pieces <= max_pieces)
        held_out = line % held_out_every == held_out_every - 1
        found.append((begin[keep] + offsets[0], length[keep].astype(np.int32), held_out[keep]))
    starts, lengths, held_out = map(np.concatenate, zip(*found, strict=True))
    if held_out.all():
        run = f"run of at least {min_words} words fits {max_pieces} pieces"
        raise InputError(f"corpus: no {run}: give more text or a larger max_length")
    return Segments(starts[~held_out], lengths[~held_out]), Segments(starts[held_out], lengths[held_out])


class Order:
    """The rows of each batch: shuffled every epoch, then sorted by length within pools, so that batches hardly pad."""

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
    """Batches of segments by number.

    batch_size: sequences, of which `group_size` (1, or 4: see `near_groups`) come from one segment. sides: "student",
    "teacher", "mixed". p: batch number -> share of mixed words in the student's pieces. mask: share of words masked.
    max_pieces: of a sequence without its special tokens.
    """

    table: PieceTable
    stream: WordStream
    lexicon: Lexicon
    segments: Segments
    _: KW_ONLY
    batch_size: int
    seed: int
    sides: tuple[str, ...]
    group_size: int = 1
    p: Callable[[int], float] = lambda index: 0.5
    mask: float = 0.0
    max_pieces: int = 126

    def __post_init__(self):
        self.order = Order(self.segments.lengths, max(1, self.batch_size // self.group_size), self.seed)
        self._rare = rare_words(self.lexicon) if self.group_size > 1 else None

    def batch(self, index: int) -> Batch:
        """The index-th batch of the run."""
        rng = np.random.default_rng((self.seed, 1, index))
        sequences = gather_words(self.stream, self.segments, self.order.rows(index))
        if self.group_size > 1:
            sequences = near_groups(sequences, self._rare, rng)
        return self.assemble(self._fit(sequences), rng, self.p(index))

    def assemble(self, sequences: Sequences, rng: np.random.Generator, p: float) -> Batch:
        """The batch of these words; a share p of them is in the student's pieces on the mixed side."""
        words, sides = len(sequences.words), {}
        masked = rng.random(words) < self.mask if self.mask else None
        for side in self.sides:
            mixed = side == "mixed"
            from_student = rng.random(words) < p if mixed else side == "student"
            sides[side] = self.table.gather(sequences, from_student, masked=masked, rng=rng, combined=mixed)
        return Batch(self.table.unit_mask(sequences), self.table.student_pieces(sequences), **sides)

    def _fit(self, sequences: Sequences) -> Sequences:
        """Drops the words at the end of a sequence that a swap for a longer word pushed over the limit."""
        keep = sequences.running(self.table.longest[sequences.words]) <= self.max_pieces
        return Sequences(sequences.words[keep], sequences.numbers[keep], sequences.count)


def gather_words(stream: WordStream, segments: Segments, chosen: np.ndarray) -> Sequences:
    """The words of the chosen segments."""
    places, numbers = segments.places(chosen)
    return Sequences(stream.word_ids[places].astype(np.int64), numbers, len(chosen))


def rare_words(lexicon: Lexicon) -> np.ndarray:
    """[W] bool: words worth telling apart: those the student splits and the teacher does not, or splits less."""
    more = np.diff(lexicon.student_offsets) > np.diff(lexicon.teacher_offsets)
    known = np.diff(lexicon.teacher_offsets) > 0
    rare = more & known & (lexicon.counts > 1)
    # A vocabulary that splits nothing more, or a tiny corpus: any word will do.
    return rare if rare.sum() >= 100 else known


def near_groups(sequences: Sequences, rare: np.ndarray, rng: np.random.Generator) -> Sequences:
    """Each sentence beside three near ones: the distinctions that piece means lose are those between near sentences.

    Sequence 4 i + j is variant j of sentence i: itself; one of its rare words swapped for another; one or two words
    dropped; its first or second half, or a rotation.
    """
    words, sequence, count = sequences.words, sequences.numbers, sequences.count
    lengths = np.bincount(sequence, minlength=count)
    first = np.cumsum(lengths) - lengths
    position = within_rows(lengths)

    # swap: one word a sentence, a rare one if there is one (rare words get the higher random keys)
    key = rng.random(len(words)) + rare[words]
    best = np.lexsort((key, sequence))[first + lengths - 1]
    swapped, pool = words.copy(), np.flatnonzero(rare)
    drawn = rng.integers(0, len(pool), count)
    drawn = (drawn + (pool[drawn] == words[best])) % len(pool)  # the word itself would be no swap
    swapped[best] = pool[drawn]

    # drop: one or two words, never all
    rank = np.empty(len(words), dtype=np.int64)
    rank[np.lexsort((rng.random(len(words)), sequence))] = position
    keep_drop = rank >= np.minimum(rng.integers(1, 3, count), lengths - 1)[sequence]

    # half or rotation
    kind = rng.integers(0, 3, count)[sequence]
    half = ((lengths + 1) // 2)[sequence]
    keep_half = (kind == 2) | ((position < half) == (kind == 0))
    rotated = np.where(kind == 2, words[first[sequence] + (position + half) % lengths[sequence]], words)

    all_of_them = np.ones(len(words), bool)
    variants = [(words, all_of_them), (swapped, all_of_them), (words, keep_drop), (rotated, keep_half)]
    all_words = np.concatenate([w[keep] for w, keep in variants])
    all_sequences = np.concatenate([4 * sequence[keep] + j for j, (_, keep) in enumerate(variants)])
    order = np.argsort(all_sequences, kind="stable")
    return Sequences(all_words[order], all_sequences[order], 4 * count)


def prefetch(batcher, indices: Iterator[int]) -> Iterator[Batch]:
    """The batches of `indices`, each made by `batcher.batch` in a thread while the one before is trained on.

    When the consumer stops early, by close() or Ctrl-C, the batch that was begun is finished and no other begun.
    """
    pool = ThreadPoolExecutor(1)
    begun = (pool.submit(batcher.batch, index) for index in indices)
    try:
        for batch, _ in pairwise(chain(begun, [None])):
            yield batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
