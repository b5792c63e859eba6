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
from vocabshrink.lexicon import Lexicon, WordStream

BLOCK_LINES = 50_000  # lines cut into segments at a time, so that memory does not grow with the corpus
POOL_BATCHES = 64  # batches sorted by length together: little padding, and still shuffled


@dataclass(frozen=True)
class Special:
    """Ids of one vocabulary's special tokens.

    double_sep: a pair is written as by RoBERTa, `<s> A </s> </s> B </s>` and without token types; else as by BERT.
    """

    cls: int
    sep: int
    pad: int
    mask: int
    double_sep: bool = False


@dataclass
class Pieces:
    """One model's side of a batch. All tensors are torch, int64.

    ids [B, T]: piece ids; student pieces are offset by the teacher's vocabulary size where the input is mixed.
    attention_mask [B, T]. units [B, T]: the piece's unit in its sequence, -1 at padding only.
    labels [B, T]: the true piece at masked positions, or a task's label at a word's first piece; -100 elsewhere; None
    without either. token_types [B, T]: 1 from the second sentence of a pair on; None without pairs, or without types.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    units: torch.Tensor
    labels: torch.Tensor | None = None
    token_types: torch.Tensor | None = None

    def to(self, device) -> "Pieces":
        return Pieces(*(v if v is None else v.to(device, non_blocking=True) for v in vars(self).values()))


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


def special_tokens(lexicon: Lexicon, side: str) -> Special:
    """Special ids of the "teacher" or "student" vocabulary.

    Raises:
        InputError: the tokenizer lacks one of them.
    """
    found = lexicon.meta[side]["special"]
    roles = ("cls", "sep", "pad", "mask")
    for role in roles:
        if found.get(role) is None:
            raise InputError(f"{side} tokenizer: it has no {role} token: add one to tokenizer.json")
    return Special(**{role: found[role] for role in roles}, double_sep=lexicon.meta[side].get("double_sep", False))


class PieceTable:
    """The two segmentations of every word as one CSR table, and batches of pieces gathered from it."""

    def __init__(self, lexicon: Lexicon, teacher_size: int | None = None, shared: np.ndarray | None = None):
        """The table of a lexicon's words.

        Args:
            teacher_size: rows of the teacher's table, where its model has more of them than its tokenizer has pieces.
            shared: [V_S] the teacher's id of each student piece, -1 where it has none (see `shared_pieces`); None:
                nothing is known to be spelt alike, and each word is one unit.
        """
        self.teacher_size = teacher_size or lexicon.meta["teacher"]["size"]
        self.student_size = lexicon.meta["student"]["size"]
        self.words = len(lexicon.counts)
        self.offsets = np.concatenate(
            [lexicon.teacher_offsets, lexicon.student_offsets[1:] + lexicon.teacher_offsets[-1]]
        )
        self.pieces = np.concatenate([lexicon.teacher_ids, lexicon.student_ids + self.teacher_size]).astype(np.int64)
        self.lengths = np.diff(self.offsets).astype(np.int64)
        self.longest = np.maximum(self.lengths[: self.words], self.lengths[self.words :])
        self.whole = (self.lengths[: self.words] > 0) & (self.lengths[self.words :] > 0)
        self.alike = self._spelt_alike(lexicon, shared)
        self.unit_counts = np.where(self.alike, self.lengths[: self.words], 1)
        self.teacher_special, self.student_special = (special_tokens(lexicon, side) for side in ("teacher", "student"))

    def _spelt_alike(self, lexicon: Lexicon, shared: np.ndarray | None) -> np.ndarray:
        """[W] bool: words of which both vocabularies make the same pieces."""
        teacher, student = self.lengths[: self.words], self.lengths[self.words :]
        if shared is None:
            return np.zeros(self.words, dtype=bool)
        alike = teacher == student
        lengths = np.where(alike, teacher, 0)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        of_teacher = lexicon.teacher_ids[np.repeat(lexicon.teacher_offsets[:-1], lengths) + within]
        of_student = lexicon.student_ids[np.repeat(lexicon.student_offsets[:-1], lengths) + within]
        alike[np.repeat(np.arange(self.words), lengths)[shared[of_student] != of_teacher]] = False
        return alike

    def gather(
        self,
        word_ids: np.ndarray,
        sequence: np.ndarray,
        count: int,
        from_student: np.ndarray | bool,
        *,
        second: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        masked: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
        combined: bool = False,
    ) -> Pieces:
        """Pads the words' pieces into sequences.

        Args:
            word_ids: [n] words of all sequences, one after the other. sequence: [n] their sequence numbers, rising.
            count: B. from_student: [n] bool (or one bool): which words are segmented with the student's vocabulary.
            second: [n] bool: words of a pair's second sentence, which follow the first's; None: single sentences.
            labels: [n] a task's label of each word, or -100. It stands at the first piece; words that one vocabulary
                cannot write lose it on every side, so that all sides have the same labels in the same order.
            masked: [n] bool: words predicted. 80 % of them become [MASK], 10 % random pieces, 10 % stay (BERT).
            combined: ids of the combined numbering, under the teacher's special tokens; else the vocabulary's own.
        """
        student_side = np.broadcast_to(np.asarray(from_student), word_ids.shape)
        rows = word_ids + student_side * self.words
        lengths = self.lengths[rows]
        before = np.cumsum(lengths) - lengths
        index = np.arange(int(lengths.sum()))
        within = index - np.repeat(before, lengths)
        ids = self.pieces[np.repeat(self.offsets[rows], lengths) + within]
        own = not combined and np.all(from_student)  # the student's numbering; of no words, one bool still says it
        special = self.student_special if own else self.teacher_special
        shift = self.teacher_size if own else 0
        ids = ids - shift

        per_sequence = np.bincount(sequence, weights=lengths, minlength=count).astype(np.int64)
        between = 0 if second is None else 1 + special.double_sep  # separators between the sentences of a pair
        last = per_sequence + 1 + between
        width = int(last.max(initial=1)) + 1
        column = index - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence) + 1
        if between:
            column = column + between * np.repeat(second, lengths)
        flat = np.repeat(np.arange(count), per_sequence) * width + column

        def place(values, fill):
            out = np.full(count * width, fill, dtype=np.int64)
            out[flat] = values
            return out.reshape(count, width)

        placed = None
        if labels is not None:
            labels = np.where(self.whole[word_ids], labels, -100)
            placed = place(np.where(within == 0, np.repeat(labels, lengths), -100), -100)
        if masked is not None:
            piece_masked = np.repeat(masked, lengths)
            placed = place(np.where(piece_masked, ids, -100), -100)
            ids = self._mask(ids, piece_masked, np.repeat(student_side, lengths), special, shift, rng)
        first_unit, totals = self._units(word_ids, sequence, count)
        units = place(np.repeat(first_unit, lengths) + within * np.repeat(self.alike[word_ids], lengths), -1)
        padded, row = place(ids, special.pad), np.arange(count)
        padded[:, 0], units[:, 0] = special.cls, 0
        token_types = None
        if between:
            first_sep = np.bincount(sequence, weights=lengths * ~second, minlength=count).astype(np.int64) + 1
            for step in range(between):  # RoBERTa's two are one unit, as BERT's one is
                padded[row, first_sep + step], units[row, first_sep + step] = special.sep, totals
            if not special.double_sep:
                columns = np.arange(width)
                token_types = ((columns > first_sep[:, None]) & (columns <= last[:, None])).astype(np.int64)
        padded[row, last], units[row, last] = special.sep, totals + (between > 0)
        attention = (np.arange(width) <= last[:, None]).astype(np.int64)
        return Pieces(
            *(None if a is None else torch.from_numpy(a) for a in (padded, attention, units, placed, token_types))
        )

    def _units(self, word_ids: np.ndarray, sequence: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Each word's first unit [n], and the number of units of each sequence before its separators [B]."""
        counts = self.unit_counts[word_ids]
        per_sequence = np.bincount(sequence, weights=counts, minlength=count).astype(np.int64)
        return np.cumsum(counts) - counts - (np.cumsum(per_sequence) - per_sequence)[sequence] + 1, per_sequence + 1

    def unit_mask(self, word_ids: np.ndarray, sequence: np.ndarray, count: int, *, pairs: bool = False) -> torch.Tensor:
        """[B, U] bool: true at special tokens and at words that both vocabularies can write."""
        first_unit, totals = self._units(word_ids, sequence, count)
        totals = totals + 1 + pairs
        mask = np.arange(int(totals.max(initial=0))) < totals[:, None]
        broken = ~self.whole[word_ids] & ~self.alike[word_ids]  # alike and broken: no piece, and no unit
        mask[sequence[broken], first_unit[broken]] = False
        return torch.from_numpy(mask)

    def _mask(self, ids, piece_masked, piece_student, special, shift, rng):
        """Replaces masked pieces: 80 % [MASK], 10 % a random piece of the same vocabulary, 10 % unchanged."""
        where = np.flatnonzero(piece_masked)
        draw = rng.random(len(where))
        ids = ids.copy()
        ids[where[draw < 0.8]] = special.mask
        noisy = where[(draw >= 0.8) & (draw < 0.9)]
        low = np.where(piece_student[noisy], self.teacher_size, 0)
        high = np.where(piece_student[noisy], self.teacher_size + self.student_size, self.teacher_size)
        ids[noisy] = rng.integers(low, high) - shift
        return ids


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
