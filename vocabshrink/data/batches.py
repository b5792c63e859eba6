"""Batches of the corpus, out of word ids: words as pieces of two vocabularies, gathered from one table.

`PieceTable` is a CSR table of 2W rows: row w holds word w in the teacher's pieces, row W + w the same word in the
student's, whose ids are shifted by the size of the teacher's vocabulary (the combined numbering): a batch may mix both.
A batch is a pure function of (seed, step); each of several processes draws it whole and takes every n-th sequence.

Hidden states and attention of two models are compared unit by unit. A word is one unit where the vocabularies spell it
differently, and as many units as pieces where they spell it alike: equal vocabularies are compared piece by piece, as
in the papers. [CLS] is unit 0, the separators are the last units.

Shapes: B sequences, T pieces and U units of a padded sequence, n words of all sequences, S segments of the corpus."""

import copy
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import Lexicon, WordStream, within_rows

BLOCK_WORDS = 1_000_000  # cut into segments at a time, so that memory grows neither with the corpus nor with its lines
POOL_BATCHES = 64  # batches sorted by length together: little padding, and still shuffled


def mapped(part, function: Callable[[torch.Tensor], torch.Tensor]):
    """A copy of a batch or one side, its tensors and the lists already made of them as `function` gives them."""
    if isinstance(part, torch.Tensor):
        return function(part)
    if isinstance(part, dict):
        return {key: tuple(map(function, tensors)) for key, tensors in part.items()}
    if not hasattr(part, "to"):  # no batch and no side: what stays on the host
        return part
    new = copy.copy(part)
    vars(new).update((name, mapped(value, function)) for name, value in vars(part).items())
    return new


@dataclass
class Pieces:
    """One model's side of a batch: tensors [B, T], int64. Its lists of places and lengths are made when first asked
    for, and kept: on the host, before `to`, they cost a step nothing; on a GPU they make it wait."""

    ids: torch.Tensor  # in mixed input, student pieces are offset by the teacher's vocabulary size
    attention_mask: torch.Tensor
    units: torch.Tensor  # the piece's unit in its sequence, -1 at padding only
    labels: torch.Tensor | None = None  # the true piece where masked, a task's label at a word's first piece; else -100
    token_types: torch.Tensor | None = None  # 1 from the second sentence of a pair on; None without pairs or types

    @cached_property
    def lengths(self) -> np.ndarray:
        """[B] pieces of each sequence."""
        return self.attention_mask.sum(1).cpu().numpy()

    @cached_property
    def labelled(self) -> torch.Tensor:
        """[n] places of the labels in the flattened side, rising."""
        return (self.labels.flatten() >= 0).nonzero().squeeze(1)

    def masked(self, unit_count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The n masked pieces' true ids [n], units numbered through the batch [n]; how many each unit has [B U]."""
        first = torch.arange(len(self.units), device=self.units.device).unsqueeze(1) * unit_count
        labels, units = (values.flatten()[self.labelled] for values in (self.labels, self.units + first))
        return labels, units, units.new_zeros(len(first) * unit_count).index_add(0, units, torch.ones_like(units))

    def part(self, rows: torch.Tensor) -> "Pieces":
        """The sequences of these rows, padded to the longest of them."""
        width = int(self.lengths[rows].max())
        return Pieces(*(None if v is None else v[rows, :width] for v in map(vars(self).get, self.__match_args__)))

    def to(self, device) -> "Pieces":
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Sequences:
    """The words of B sequences, one sequence after the other."""

    words: np.ndarray  # [n] word ids
    numbers: np.ndarray  # [n] each word's sequence, rising
    count: int  # B, empty sequences included
    second: np.ndarray | None = None  # [n] bool: words of a pair's second sentence, which follow the first's

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[B] int64: the sum of values [n] over each sequence."""
        return np.bincount(self.numbers, weights=values, minlength=self.count).astype(np.int64)

    def running(self, values: np.ndarray) -> np.ndarray:
        """[n] int64: the running sum of values [n] within each sequence."""
        sums = self.sums(values)
        return np.cumsum(values) - (np.cumsum(sums) - sums)[self.numbers]


Special = namedtuple("Special", ["cls", "sep", "pad", "mask", "between"])  # between: separators, see `special_tokens`


def special_tokens(lexicon: Lexicon, side: str) -> Special:
    """Ids of the "teacher" or "student" vocabulary's special tokens, and the number of separators between the sentences
    of a pair: 1 as in BERT, 2 as in RoBERTa, which has no token types."""
    meta = lexicon.meta[side]
    return Special(*(meta["special"][role] for role in Special._fields[:4]), between=1 + meta["double_sep"])


class PieceTable:
    """The two segmentations of every word as one CSR table, and batches of pieces gathered from it."""

    def __init__(self, lexicon: Lexicon, teacher_size: int | None = None, shared: np.ndarray | None = None):
        """teacher_size: rows of the teacher's table, if its model has more of them than its tokenizer has pieces.
        shared: [V_S] the teacher's id of each student piece or -1 (see `shared_pieces`); None: a word is one unit."""
        self.teacher_size = teacher_size or lexicon.meta["teacher"]["size"]
        self.student_size = lexicon.meta["student"]["size"]
        self.words = len(lexicon.counts)
        self.offsets = np.append(lexicon.teacher_offsets, lexicon.student_offsets[1:] + lexicon.teacher_offsets[-1])
        self.pieces = np.append(lexicon.teacher_ids, lexicon.student_ids + self.teacher_size).astype(np.int64)
        self.lengths = np.diff(self.offsets).astype(np.int64)
        teacher, student = self.lengths[: self.words], self.lengths[self.words :]
        self.longest, self.whole = np.maximum(teacher, student), (teacher > 0) & (student > 0)
        self.alike = (teacher == student) & (shared is not None)  # both vocabularies make the same pieces of the word
        if shared is not None:
            words, lengths = np.flatnonzero(self.alike), teacher[self.alike]
            starts = (np.repeat(self.offsets[rows], lengths) for rows in (words, self.words + words))
            of_teacher, of_student = (self.pieces[start + within_rows(lengths)] for start in starts)
            self.alike[np.repeat(words, lengths)[shared[of_student - self.teacher_size] != of_teacher]] = False
        self.unit_counts = np.where(self.alike, teacher, 1)
        self.teacher_special, self.student_special = (special_tokens(lexicon, side) for side in ("teacher", "student"))

    def gather(
        self, sequences: Sequences, student: np.ndarray | bool, *, labels=None, masked=None, rng=None, combined=False
    ) -> Pieces:
        """Pads the words' pieces into sequences. student [n] bool (or one bool): which words are segmented with the
        student's vocabulary. labels [n]: a task's label of each word, or -100; it stands at the first piece, of
        words that both vocabularies can write. masked [n] bool: words to predict, see `_mask`. combined: ids of the
        combined numbering, under the teacher's special tokens; otherwise the vocabulary's own."""
        words, count, second = sequences.words, sequences.count, sequences.second
        rows = words + np.asarray(student) * self.words
        lengths = self.lengths[rows]
        within = within_rows(lengths)
        own = not combined and np.all(student)  # the student's numbering; of no words, one bool still says it
        special, shift = (self.student_special, self.teacher_size) if own else (self.teacher_special, 0)
        ids = self.pieces[np.repeat(self.offsets[rows], lengths) + within]

        sizes = sequences.sums(lengths)
        between = 0 if second is None else special.between
        last = sizes + 1 + between
        width = int(last.max(initial=1)) + 1
        column = within_rows(sizes) + 1 + (between * np.repeat(second, lengths) if between else 0)
        flat = np.repeat(np.arange(count), sizes) * width + column

        def place(values, fill):
            out = np.full((count, width), fill, dtype=np.int64)
            out.ravel()[flat] = values
            return out

        placed = None
        if labels is not None:
            labels = np.where(self.whole[words], labels, -100)
            placed = place(np.where(within == 0, np.repeat(labels, lengths), -100), -100)
        if masked is not None:
            piece_masked = np.repeat(masked, lengths)
            placed = place(np.where(piece_masked, ids - shift, -100), -100)
            self._mask(ids, np.flatnonzero(piece_masked), special.mask + shift, rng)
        first_unit, totals = self._units(sequences)
        units = place(np.repeat(first_unit, lengths) + within * np.repeat(self.alike[words], lengths), -1)
        padded, row = place(ids - shift, special.pad), np.arange(count)
        attention = (np.arange(width) <= last[:, None]).astype(np.int64)
        padded[:, 0], units[:, 0] = special.cls, 0
        token_types = None
        if between:
            first_sep = sequences.sums(lengths * ~second) + 1
            for step in range(between):  # RoBERTa's two are one unit, as BERT's one is
                padded[row, first_sep + step], units[row, first_sep + step] = special.sep, totals
            if between == 1:
                token_types = attention * (np.arange(width) > first_sep[:, None])
        padded[row, last], units[row, last] = special.sep, totals + (between > 0)
        arrays = padded, attention, units, placed, token_types
        return Pieces(*(None if array is None else torch.from_numpy(array) for array in arrays))

    def student_pieces(self, sequences: Sequences) -> int:
        """Pieces of the sequences in the student's vocabulary, special tokens included: the tokens of a batch."""
        special = 2 + (0 if sequences.second is None else self.student_special.between)
        return int(self.lengths[sequences.words + self.words].sum()) + special * sequences.count

    def unit_mask(self, sequences: Sequences) -> torch.Tensor:
        """[B, U] bool: true at special tokens and at words that both vocabularies can write."""
        words = sequences.words
        first_unit, totals = self._units(sequences)
        totals = totals + 1 + (sequences.second is not None)
        mask = np.arange(int(totals.max(initial=0))) < totals[:, None]
        broken = ~self.whole[words] & ~self.alike[words]  # alike and broken: no piece, and no unit
        mask[sequences.numbers[broken], first_unit[broken]] = False
        return torch.from_numpy(mask)

    def _units(self, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
        """Each word's first unit [n], and the number of units of each sequence before its separators [B]."""
        counts = self.unit_counts[sequences.words]
        return sequences.running(counts) - counts + 1, sequences.sums(counts) + 1

    def _mask(self, ids: np.ndarray, where: np.ndarray, mask: int, rng: np.random.Generator) -> None:
        """80 % of the masked pieces become [MASK], 10 % a random one of the same vocabulary (Devlin et al. 2019)."""
        draw = rng.random(len(where))
        ids[where[draw < 0.8]] = mask
        noisy = where[(draw >= 0.8) & (draw < 0.9)]
        of_student = ids[noisy] >= self.teacher_size
        low = of_student * self.teacher_size
        ids[noisy] = rng.integers(low, low + np.where(of_student, self.student_size, self.teacher_size))


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
        of_rows = ("targets", "rows", "vectors")
        parts |= {name: value[rows] for name in of_rows if (value := getattr(self, name)) is not None}
        return replace(self, unit_mask=self.unit_mask[rows, :units], lists={}, **parts)

    def to(self, device) -> "Batch":
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Segments:
    """Runs of words of the stream: starts [S] int64, lengths [S] int32 in words, pieces [S] int64 as of `longest`."""

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
    begins = np.unique(np.searchsorted(stream.line_offsets[:-1], np.arange(*stream.line_offsets[[0, -1]], BLOCK_WORDS)))
    for first_line, end in pairwise([*begins, len(stream.line_offsets) - 1]):
        offsets = np.asarray(stream.line_offsets[first_line : end + 1])
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


def prefetch(batcher, indices: Iterator[int], prepare: Callable[[Batch], Batch] = lambda batch: batch):
    """The batches of `indices`, made and prepared in a thread, one ahead of the consumer, until it stops."""
    pool = ThreadPoolExecutor(1)
    begun = (pool.submit(lambda index=index: prepare(batcher.batch(index))) for index in indices)
    try:
        for batch, _ in pairwise(chain(begun, [None])):
            yield batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
