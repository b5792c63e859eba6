"""TODO: data.pieces."""

from dataclasses import dataclass

import numpy as np
import torch

from tokenizer_build.errors import InputError
from vocabshrink.data.lexicon import Lexicon


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
