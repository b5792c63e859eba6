"""Words as pieces of two vocabularies, and padded batches of pieces gathered from one table.

`PieceTable` is a CSR table of 2W rows: row w holds word w in the teacher's pieces, row W + w the same word in the
student's, whose ids are shifted by the size of the teacher's vocabulary (the combined numbering): a batch may mix both.

Hidden states and attention of two models are compared unit by unit. A word is one unit where the vocabularies spell it
differently, and as many units as pieces where they spell it alike: equal vocabularies are compared piece by piece, as
in the papers. [CLS] is unit 0, the separators are the last units.

Shapes: B sequences, T pieces in a padded sequence, U units in a padded sequence, n words of all sequences."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import Lexicon, within_rows


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
    of a pair: 1 as in BERT, 2 as in RoBERTa, which has no token types. Raises InputError if the tokenizer lacks one."""
    meta = lexicon.meta[side]
    found = {role: meta["special"].get(role) for role in Special._fields[:4]}
    if lacking := [role for role, number in found.items() if number is None]:
        raise InputError(f"{side} tokenizer: it has no {lacking[0]} token: add one to tokenizer.json")
    return Special(**found, between=1 + meta.get("double_sep", False))


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
