"""The vocabulary trainers: f(counts, size, *, required, teacher_vocabulary) -> pieces in order of id.

All give a WordPiece vocabulary: the special tokens, then what is required (the corpus's alphabet and the
user's pieces), then what the trainer chose; at most `size` pieces, fewer where the corpus has no more to
offer. All are functions of the counts alone: no thread, process count or hash seed changes a byte.

`wordpiece` is what `tokenizers.WordPieceTrainer` does (BPE by count; `##a` and `a` are different symbols from
the start), computed by SentencePiece because the former gives another vocabulary on every run. `bpe` and
`unigram` are SentencePiece's own, its word mark turned into `##`; unigram's probabilities are not kept, since
WordPiece always takes the longest match, and that costs it pieces per word.
"""

from collections.abc import Callable, Mapping, Sequence

from tokenizer_build.candidates import (
    SPECIAL_TOKENS,
    alphabet,
    alphabet_pieces,
    learned_pieces,
    spellable_words,
    teacher_pieces,
)
from tokenizer_build.errors import InputError
from tokenizer_build.select import fewest_pieces

CANDIDATES = 30_000  # learned by BPE; 60,000 give no better vocabulary

Counts = Mapping[str, int]
Vocabulary = Mapping[str, int] | None


def train_fewest(
    counts: Counts, size: int, *, required: Sequence[str] = (), teacher_vocabulary: Vocabulary = None
) -> list[str]:
    """Fewest pieces for the corpus (see `select`), from learned candidates and the teacher's pieces.

    The teacher's are preferred where that costs next to nothing; without a teacher, learned ones suffice.
    """
    characters = alphabet(counts)
    fixed = _fixed(counts, characters, required, size)
    words = spellable_words(counts, characters)
    candidates = learned_pieces(words, CANDIDATES, "bpe")
    known = teacher_pieces(teacher_vocabulary or {})
    return SPECIAL_TOKENS + fewest_pieces(words, candidates + known, fixed, size - len(SPECIAL_TOKENS), known)


def train_prune(
    counts: Counts, size: int, *, required: Sequence[str] = (), teacher_vocabulary: Vocabulary = None
) -> list[str]:
    """Fewest pieces out of the teacher's vocabulary alone: no piece needs a new embedding.

    The alphabet is that of the corpus as far as the teacher has it; other characters are unknown to both.
    """
    if not teacher_vocabulary:
        raise InputError("prune chooses among the teacher's pieces: name a teacher, or train fewest")
    pieces = set(teacher_pieces(teacher_vocabulary))
    if missing := [piece for piece in required if piece not in pieces]:
        raise InputError(f"the teacher has no piece {missing[0]!r}, so prune cannot keep it: train fewest")
    characters = [c for c in alphabet(counts) if pieces.issuperset(alphabet_pieces([c]))]
    fixed = _fixed(counts, characters, required, size)
    words = spellable_words(counts, characters)
    return SPECIAL_TOKENS + fewest_pieces(words, pieces, fixed, size - len(SPECIAL_TOKENS))


def train_wordpiece(
    counts: Counts, size: int, *, required: Sequence[str] = (), teacher_vocabulary: Vocabulary = None
) -> list[str]:
    """BPE by count over `a` and `##a`, as WordPieceTrainer does it; the teacher is not looked at."""
    return _learned(counts, size, required, "bpe", marked=False)


def train_bpe(
    counts: Counts, size: int, *, required: Sequence[str] = (), teacher_vocabulary: Vocabulary = None
) -> list[str]:
    """SentencePiece's BPE, written as WordPiece; the teacher is not looked at."""
    return _learned(counts, size, required, "bpe", marked=True)


def train_unigram(
    counts: Counts, size: int, *, required: Sequence[str] = (), teacher_vocabulary: Vocabulary = None
) -> list[str]:
    """SentencePiece's unigram model, written as WordPiece; the teacher is not looked at."""
    return _learned(counts, size, required, "unigram", marked=True)


TRAINERS: dict[str, Callable[..., list[str]]] = {
    "fewest": train_fewest,
    "wordpiece": train_wordpiece,
    "bpe": train_bpe,
    "unigram": train_unigram,
    "prune": train_prune,
}


def _learned(counts: Counts, size: int, required: Sequence[str], model: str, marked: bool) -> list[str]:
    characters = alphabet(counts)
    pieces = SPECIAL_TOKENS + _fixed(counts, characters, required, size)
    learned = learned_pieces(spellable_words(counts, characters), size, model, marked)
    pieces += [piece for piece in dict.fromkeys(learned) if piece not in set(pieces)]
    return pieces[:size]


def _fixed(counts: Counts, characters: Sequence[str], required: Sequence[str], size: int) -> list[str]:
    """The alphabet's pieces and the required ones, once each; InputError where `size` cannot hold them."""
    if not counts:
        raise InputError("there are no words to learn a vocabulary from: count a corpus with text in it")
    if bad := [piece for piece in required if not piece or any(c.isspace() for c in piece)]:
        raise InputError(f"the required piece {bad[0]!r} is empty or holds white space: name single words")
    own = [piece for piece in required if piece not in SPECIAL_TOKENS]
    fixed = list(dict.fromkeys([*alphabet_pieces(characters), *own]))
    least = len(SPECIAL_TOKENS) + len(fixed)
    if size < least:
        raise InputError(
            f"{size} pieces cannot hold the {len(SPECIAL_TOKENS)} special tokens, the alphabet "
            f"({len(characters)} characters) and the required words: allow at least {least}"
        )
    return fixed
