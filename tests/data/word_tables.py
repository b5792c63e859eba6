"""What the tests of pieces and of batches share: a corpus, a student's vocabulary, and the slow reference."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from conftest import wordpiece_pieces
from tokenizers import Tokenizer
from transformers import BertTokenizerFast

from vocabshrink.data.batches import Sequences

SIDES = ("mixed", "student", "teacher")


def make_student(lines, folder):
    """A small WordPiece vocabulary whose pieces have other ids than the teacher's."""
    special = ["[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"]
    pieces = special + wordpiece_pieces(lines, 120)[:4:-1]
    BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    return folder


def make_text(lines):
    """The corpus with what corpora have: words that every vocabulary spells letter by letter, an empty line, unknown
    characters, an invisible one, several sentences."""
    pairs = map(" ".join, zip(lines[::4], lines[1::4], strict=True))
    return ["Qxz wqx 987, xyqw qxz.", *lines, "", "한국 kalo 한 mine!", "kalo \u200b mine \u00ad ru", *pairs]


def same_strings(teacher_folder, student_folder) -> np.ndarray:
    """[V_S]: the teacher's id of the same string, or -1; the special tokens are left out."""
    teacher, student = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (teacher_folder, student_folder))
    pieces = (student.id_to_token(i) for i in range(student.get_vocab_size()))
    found = [None if piece.startswith("[") else teacher.token_to_id(piece) for piece in pieces]
    return np.array([-1 if i is None else i for i in found])


def words_of(encoded, line_numbers) -> Sequences:
    """Whole lines."""
    stream = encoded[1]
    line_numbers = list(line_numbers)
    parts = [np.asarray(stream.word_ids[stream.line_offsets[i] : stream.line_offsets[i + 1]]) for i in line_numbers]
    sequence = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Sequences(np.concatenate(parts).astype(np.int64), sequence, len(parts))


def pieces_of(lexicon, word, from_student, shift=0):
    """A word's pieces read off the lexicon's tables, one word at a time: the slow reference."""
    offsets, ids = (
        (lexicon.student_offsets, lexicon.student_ids)
        if from_student
        else (lexicon.teacher_offsets, lexicon.teacher_ids)
    )
    return [int(piece) + (shift if from_student else 0) for piece in ids[offsets[word] : offsets[word + 1]]]


def pairs_of(encoded, firsts, seconds) -> Sequences:
    """Pairs of lines."""
    flat = words_of(encoded, [i for pair in zip(firsts, seconds, strict=True) for i in pair])
    return Sequences(flat.words, flat.numbers // 2, flat.count // 2, flat.numbers % 2 == 1)


def units_of(lexicon, word, shared) -> int:
    """A word's units by the definition: its pieces where both vocabularies make the same ones of it, else one."""
    teacher, student = (pieces_of(lexicon, word, side) for side in (False, True))
    return len(teacher) if teacher == [shared[piece] for piece in student] else 1


def same(left, right) -> bool:
    """Whether two batches are equal to the last number."""
    if left is None or right is None:
        return left is right
    if dataclasses.is_dataclass(left):
        fields = [field.name for field in dataclasses.fields(left)]  # not the lists that one of them has made
        return all(same(getattr(left, name), getattr(right, name)) for name in fields)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def inner(side) -> torch.Tensor:
    """[B, T] bool: pieces of words; what is neither padding nor special."""
    first = torch.arange(side.ids.shape[1]) == 0
    last = side.units == side.units.max(1, keepdim=True).values
    if side.token_types is not None:
        last |= side.units == side.units.max(1, keepdim=True).values - 1
    return side.attention_mask.bool() & ~first & ~last


def lacking():
    """A lexicon of three words: one that both sides write, one without teacher pieces, one without student pieces."""
    side = {"size": 9, "special": {"cls": 1, "sep": 2, "pad": 0, "mask": 3}, "double_sep": False}
    return SimpleNamespace(
        teacher_offsets=np.array([0, 1, 1, 2]),
        teacher_ids=np.array([5, 6], np.int32),
        counts=np.ones(3, int),
        student_offsets=np.array([0, 1, 2, 2]),
        student_ids=np.array([7, 8], np.int32),
        meta={"teacher": side, "student": side},
    )
