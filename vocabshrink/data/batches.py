"""Batches from the word-id stream: any mixture of two vocabularies at memory speed, no tokenizer in the loop.

A batch is a pure function of (seed, step, rank). Nothing is shuffled on disk and no iterator has a state, so the
position in the data is the step number and a resumed run sees exactly the batches that it would have seen.

Both vocabularies' segmentations stand in one CSR table of 2W rows (row w: word w in the teacher's pieces; row W + w:
in the student's), and student pieces are numbered after the teacher's. Segmenting a batch with any mixture is then a
gather; whole-word masks and the alignment of the two models fall out of it.

Hidden states and attention of two models are compared unit by unit. A word is one unit where the vocabularies spell it
differently, and as many units as pieces where they spell it alike: so equal vocabularies are compared piece by piece,
as the papers do, and different ones wherever they can be. [CLS] is unit 0, the separators are the last units.

Shapes: B sequences, T pieces in a padded sequence, U units in a padded sequence, n words of all sequences.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import Lexicon, WordStream
from vocabshrink.data.pieces import Pieces, PieceTable

BLOCK_LINES = 50_000  # lines cut into segments at a time, so that memory does not grow with the corpus
POOL_BATCHES = 64  # batches sorted by length together: little padding, and still shuffled


@dataclass
class Batch:
    """What one step sees.

    student: in the student's pieces. teacher: in the teacher's. mixed: mixed, in combined ids. unit_mask [B, U] bool:
    true at units that every side has whole, special tokens included. Sides that a task does not ask for are None.
    tokens: student pieces. targets: [B] int64 classes or [B] float scores of a task, whose training set has this batch
    at `rows` [B] int64; None outside tasks. recorded: the teacher's view of the batch where it was kept (recorded.py).
    """

    student: Pieces | None
    teacher: Pieces | None
    mixed: Pieces | None
    unit_mask: torch.Tensor
    tokens: int
    targets: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    recorded: Any = None

    def to(self, device) -> "Batch":
        def move(value):
            if isinstance(value, Pieces):
                return value.to(device)
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return Batch(*map(move, vars(self).values()))


@dataclass(frozen=True)
class Segments:
    """Training sequences: runs of words of the stream. starts [S] int64, lengths [S] int32 in words."""

    starts: np.ndarray
    lengths: np.ndarray


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
    """Cuts the stream at line ends (and, for unit "sentence", at sentence ends) and at `max_pieces`.

    Pieces are counted in the vocabulary that needs more of them, so any mixture fits; where the teacher alone reads, in
    the teacher's, so that what it learns does not depend on the student's. A line is never split between training and
    held-out segments.

    Returns: (training, held out) segments. Raises InputError where the corpus leaves none to train on.
    """
    table_lengths = np.diff(lexicon.teacher_offsets).astype(np.int64)
    if sides != ("teacher",):
        table_lengths = np.maximum(table_lengths, np.diff(lexicon.student_offsets))
    found: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {False: [], True: []}
    line_offsets = stream.line_offsets
    for first_line in range(0, len(line_offsets) - 1, BLOCK_LINES):
        offsets = np.asarray(line_offsets[first_line : first_line + BLOCK_LINES + 1])
        words = np.asarray(stream.word_ids[offsets[0] : offsets[-1]])
        if not len(words):
            continue
        local = offsets - offsets[0]
        new_run = np.zeros(len(words), dtype=bool)
        new_run[local[:-1][local[:-1] < len(words)]] = True
        if unit == "sentence":
            new_run[1:] |= lexicon.ends_sentence[words[:-1]] & ~lexicon.ends_sentence[words[1:]]
        starts = np.flatnonzero(new_run)
        run = np.cumsum(new_run) - 1
        cost = table_lengths[words]
        ends = np.cumsum(cost)
        # A word belongs to the window in which its last piece falls; a first word that began in the window before
        # may carry it a few pieces over, which is why windows are cut one longest ordinary word (8 pieces) short.
        window = (ends - (ends[starts] - cost[starts])[run] - 1) // max(1, max_pieces - 8)
        new_segment = new_run.copy()
        new_segment[1:] |= window[1:] != window[:-1]
        begin = np.flatnonzero(new_segment)
        length = np.diff(np.append(begin, len(words)))
        pieces = np.add.reduceat(cost, begin)
        line = np.searchsorted(local, begin, side="right") - 1 + first_line
        keep = (length >= min_words) & (pieces <= max_pieces)
        for held_out in (False, True):
            chosen = keep & ((line % held_out_every == held_out_every - 1) == held_out)
            found[held_out].append((begin[chosen] + offsets[0], length[chosen].astype(np.int32)))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int32))
    training, held_out = (
        Segments(*(np.concatenate(parts) for parts in zip(*(found[side] or [empty]), strict=True)))
        for side in (False, True)
    )
    if not len(training.starts):
        raise InputError(
            f"corpus: no run of at least {min_words} words fits {max_pieces} pieces: give more text "
            "or a larger max_length"
        )
    return training, held_out


Side = tuple[np.ndarray, np.ndarray]  # words of all sequences [n], their sequence numbers [n]


class Batcher:
    """Batches of segments by step number."""

    def __init__(
        self,
        table: PieceTable,
        stream: WordStream,
        lexicon: Lexicon,
        segments: Segments,
        *,
        batch_size: int,
        seed: int,
        sides: tuple[str, ...],
        group_size: int = 1,
        p: Callable[[int], float] = lambda step: 0.5,
        mask: float = 0.0,
        max_pieces: int = 126,
    ):
        self.table, self.stream, self.segments = table, stream, segments
        self.per_batch = max(1, batch_size // group_size)
        self.seed, self.sides, self.group_size, self.p, self.mask = seed, sides, group_size, p, mask
        self.max_pieces = max_pieces
        self.per_epoch = max(1, -(-len(segments.starts) // self.per_batch))
        self._epoch: tuple[int, np.ndarray] | None = None
        self._rare = rare_words(lexicon) if group_size > 1 else None

    def batch(self, index: int) -> Batch:
        """The index-th batch of the run."""
        rng = np.random.default_rng((self.seed, 1, index))
        chosen = self._segments_of(index)
        words, sequence = gather_words(self.stream, self.segments, chosen)
        if self.group_size > 1:
            words, sequence = near_groups((words, sequence), len(chosen), self._rare, rng)
        count = len(chosen) * self.group_size
        words, sequence = self._fit(words, sequence, count)
        return self.assemble(words, sequence, count, rng, self.p(index))

    def assemble(self, words, sequence, count, rng, p) -> Batch:
        table = self.table
        masked = rng.random(len(words)) < self.mask if self.mask else None
        gathered: dict[str, Pieces | None] = {"student": None, "teacher": None, "mixed": None}
        for side in self.sides:
            from_student = {"student": True, "teacher": False}.get(side)
            if from_student is None:
                from_student = rng.random(len(words)) < p
            gathered[side] = table.gather(
                words, sequence, count, from_student, masked=masked, rng=rng, combined=side == "mixed"
            )
        tokens = int(table.lengths[words + table.words].sum()) + 2 * count
        return Batch(**gathered, unit_mask=table.unit_mask(words, sequence, count), tokens=tokens)

    def _segments_of(self, index: int) -> np.ndarray:
        """Segment numbers of a batch: shuffled, then sorted by length within pools, so that batches hardly pad."""
        epoch, position = divmod(index, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            order = rng.permutation(len(self.segments.starts))
            pool = self.per_batch * POOL_BATCHES
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = np.concatenate([p[np.argsort(self.segments.lengths[p], kind="stable")] for p in pools])
            self._epoch = (epoch, order)
            self._batch_order = rng.permutation(self.per_epoch)
        start = int(self._batch_order[position]) * self.per_batch
        return self._epoch[1][start : start + self.per_batch]

    def _fit(self, words, sequence, count):
        """Drops the words at the end of a sequence that a swap for a longer word pushed over the limit."""
        cost = self.table.longest[words]
        ends = np.cumsum(cost)
        first = np.searchsorted(sequence, np.arange(count))
        before = np.concatenate([[0], ends])[first]
        keep = ends - before[sequence] <= self.max_pieces
        return (words, sequence) if keep.all() else (words[keep], sequence[keep])


def gather_words(stream: WordStream, segments: Segments, chosen: np.ndarray) -> Side:
    """Words of the chosen segments, one after the other, and each word's position among the chosen."""
    lengths = segments.lengths[chosen].astype(np.int64)
    ends = np.cumsum(lengths)
    index = np.repeat(segments.starts[chosen] - (ends - lengths), lengths) + np.arange(int(ends[-1]))
    return stream.word_ids[index].astype(np.int64), np.repeat(np.arange(len(chosen)), lengths)


def rare_words(lexicon: Lexicon) -> np.ndarray:
    """Words worth telling apart: those the student splits and the teacher does not, or splits less.

    Returns: [W] bool.
    """
    more = np.diff(lexicon.student_offsets) > np.diff(lexicon.teacher_offsets)
    known = np.diff(lexicon.teacher_offsets) > 0
    rare = more & known & (lexicon.counts > 1)
    # A vocabulary that splits nothing more, or a tiny corpus: any word will do.
    return rare if rare.sum() >= 100 else known


def near_groups(side: Side, count: int, rare: np.ndarray, rng: np.random.Generator) -> Side:
    """Each sentence beside three near ones: the distinctions that piece means lose are those between near sentences.

    The four: the sentence; one of its rare words swapped for another rare word; one or two words dropped; its first
    or second half, or a rotation. Sequence 4 i + j is variant j of sentence i.
    """
    words, sequence = side
    lengths = np.bincount(sequence, minlength=count)
    first = np.cumsum(lengths) - lengths
    position = np.arange(len(words)) - first[sequence]

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
    return all_words[order], all_sequences[order]


def prefetch(batcher: Batcher, indices: Iterator[int]) -> Iterator[Batch]:
    """The batches of `indices`, each made in a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for index in indices:
            following = pool.submit(batcher.batch, index)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
