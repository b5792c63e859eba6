"""Pieces of one vocabulary in the other's: the pieces that both have, and how one spells what the other has.
Every piece is written as WordPiece writes it, the student's form: `##` marks a piece inside a word, where byte-level
BPE and SentencePiece mark one at its start with `Ġ` or `▁`."""

import re

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from vocabshrink.data.lexicon import ROLES


def piece_means(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, table: Tensor) -> Tensor:
    """[V_S, D]: for each student piece the mean of the teacher's pieces that spell it; its own row if it has one."""
    rows = torch.zeros(student_tokenizer.get_vocab_size(), table.shape[1])
    for piece, index in student_tokenizer.get_vocab().items():
        rows[index] = table[spell(piece, teacher_tokenizer)].float().mean(0)
    return rows


SPECIAL = {f"[{role.upper()}]": name for role, name in ROLES.items()}  # "[CLS]" -> RoBERTa's "<s>"
NAMES = {theirs: ours for ours, theirs in SPECIAL.items()}
LONGEST_SPELLING = 8  # student pieces; longer ones are names and strings of signs that a teacher hardly predicts
MARKED = re.compile(r"\[\w+\]|<[\w/|]+>")  # [CLS], <s>, [unused1]: no text spells them


def spell(piece: str, tokenizer: Tokenizer) -> list[int]:
    """The teacher's ids for a student piece."""
    if piece in SPECIAL and (role := first_known(tokenizer, piece, SPECIAL[piece])) is not None:
        return [role]
    unknown = first_known(tokenizer, "[UNK]", "<unk>") or 0
    text, inside = (piece[2:], True) if piece.startswith("##") and len(piece) > 2 else (piece, False)
    is_wordpiece = isinstance(tokenizer.model, models.WordPiece)
    if is_wordpiece and (known := tokenizer.token_to_id(piece)) is not None:
        return [known]
    # Elsewhere the space belongs to the word: `the` is `Ġthe` or `▁the`, and a teacher's `the` is the end of `bathe`. A
    # full stop follows its word without a space, so that the mark is taken off it as off `##` pieces.
    follows = inside or not any(map(str.isalnum, text))
    text = text if follows or is_wordpiece else " " + text
    if tokenizer.normalizer is not None:  # an uncased teacher reads `Berlin` as `berlin`
        text = tokenizer.normalizer.normalize_str(text)
    ids: list[int] = []
    for number, (word, _) in enumerate(tokenizer.pre_tokenizer.pre_tokenize_str(text)):
        if number == 0 and is_wordpiece:
            word = "##" * inside + word
        elif number == 0 and follows:
            word = word.removeprefix("▁").removeprefix("Ġ")
        ids += [token.id for token in tokenizer.model.tokenize(word)] if word else []
    return ids or [unknown]


def first_known(tokenizer: Tokenizer, *names: str) -> int | None:
    """The id of the first of `names` that the tokenizer has."""
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)


def shared_pieces(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> np.ndarray:
    """[V_S] int64: the teacher's id of the same piece (text and place in a word; special tokens by role), or -1."""
    shared = np.full(max(student_tokenizer.get_vocab().values()) + 1, -1, np.int64)
    for piece, index in student_tokenizer.get_vocab().items():
        ids = spell(piece, teacher_tokenizer)
        if len(ids) == 1 and as_wordpiece(teacher_tokenizer.id_to_token(ids[0]), teacher_tokenizer) == piece:
            shared[index] = ids[0]
    return shared


def spellings(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> np.ndarray:
    """[V_T, K] int64: the student's ids that spell each teacher piece, -1 behind them; K is at most 8.
    All -1: special tokens, parts of characters, characters that the student does not know, and longer spellings."""
    unknown = student_tokenizer.token_to_id("[UNK]")
    rows: list[list[int]] = [[] for _ in range(max(teacher_tokenizer.get_vocab().values()) + 1)]
    for piece, index in teacher_tokenizer.get_vocab().items():
        text = None if MARKED.fullmatch(piece) else as_wordpiece(piece, teacher_tokenizer)
        ids = spell(text, student_tokenizer) if text else []
        if unknown not in ids and len(ids) <= LONGEST_SPELLING:
            rows[index] = ids
    width = max(map(len, rows), default=1) or 1
    return np.array([ids + [-1] * (width - len(ids)) for ids in rows], np.int64).reshape(-1, width)


def as_wordpiece(piece: str, tokenizer: Tokenizer) -> str | None:
    """As WordPiece writes it: `Ġthe` and `▁the` are `the`, `ing` is `##ing`, `<s>` is `[CLS]`. None: no character."""
    if piece in NAMES:
        return NAMES[piece]
    if isinstance(tokenizer.model, models.WordPiece):
        return piece
    text = decoders.ByteLevel().decode([piece]) if "ByteLevel" in str(tokenizer.pre_tokenizer) else piece
    starts, text = text[:1] in (" ", "▁"), text.strip(" ▁")
    if not text or "\ufffd" in text:
        return None
    return text if starts or not text[0].isalnum() else f"##{text}"  # WordPiece cuts around signs: none is inside
