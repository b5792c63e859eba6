"""The vocabulary trainers: word counts -> a WordPiece vocabulary.

Every vocabulary holds the special tokens, then what is required (the corpus's alphabet and the user's words), then what
the trainer chose; at most `size` pieces, fewer where the corpus has no more to offer. All are functions of the counts
alone: no thread, process count or hash seed changes a byte.

`wordpiece` is computed by SentencePiece because `tokenizers.WordPieceTrainer` gives another vocabulary on every run.
`bpe` and `unigram` are SentencePiece's own, its word mark turned into `##`; unigram's probabilities are not kept, since
WordPiece always takes the longest match, and that costs it pieces per word. Only `fewest` and `prune` look at the
teacher: `fewest` prefers its pieces where that costs next to nothing, and does well without them.
"""

from collections.abc import Iterable, Mapping

from tokenizer_build.candidates import alphabet, alphabet_pieces, learned_pieces, spellable_words, teacher_pieces
from tokenizer_build.count import split_chunk
from tokenizer_build.errors import InputError
from tokenizer_build.select import fewest_pieces
from tokenizer_build.tokenizer import LONGEST_WORD, SPECIAL_TOKENS

CANDIDATES = 30_000  # learned by BPE; 60,000 give no better vocabulary
TRAINERS = {
    "fewest": "Fewest pieces for the corpus (see select), from learned candidates and the teacher's pieces.",
    "wordpiece": "BPE by count where `a` and `##a` are different symbols from the start, as in WordPieceTrainer.",
    "bpe": "SentencePiece's BPE, written as WordPiece.",
    "unigram": "SentencePiece's unigram model, written as WordPiece.",
    "prune": "Fewest pieces out of the teacher's vocabulary alone: no piece needs a new embedding.",
}


def train_vocabulary(
    counts: Mapping[str, int],
    size: int,
    trainer: str = "fewest",
    *,
    required: Iterable[str] = (),
    teacher_vocabulary: Iterable[str] = (),
    lowercase: bool = True,
) -> list[str]:
    """The pieces, in order of their ids, that one of TRAINERS chooses for the word counts.

    `required` words become one piece each, written as a tokenizer with `lowercase` (lower case and no accents) sees
    them; `teacher_vocabulary` is of any family. Raises InputError for counts without words, for a required word that
    cannot be one piece, and where `size` cannot hold the special tokens, the alphabet and the required words.
    """
    if not counts:
        raise InputError("there are no words to learn a vocabulary from: count a corpus with text in it")
    required, teacher = [one_word(word, lowercase) for word in required], teacher_pieces(teacher_vocabulary)
    characters = {*alphabet(counts), *"".join(required)}
    if trainer == "prune":
        characters &= _known_characters(set(teacher), required, characters)
    fixed = list(dict.fromkeys([*alphabet_pieces(sorted(characters)), *required]))
    least = len(SPECIAL_TOKENS) + len(fixed)
    if size < least:
        raise InputError(
            f"{size} pieces cannot hold the {len(SPECIAL_TOKENS)} special tokens, the alphabet "
            f"({len(characters)} characters) and the required words: allow at least {least}"
        )
    words, room = spellable_words(counts, characters), size - len(SPECIAL_TOKENS)
    if trainer == "fewest":
        candidates = learned_pieces(words, CANDIDATES, "bpe") + teacher
        chosen = fewest_pieces(words, candidates, fixed, room, preferred=teacher)
    elif trainer == "prune":
        chosen = fewest_pieces(words, teacher, fixed, room)
    else:
        model = "unigram" if trainer == "unigram" else "bpe"
        chosen = fixed + learned_pieces(words, size, model, marked=trainer != "wordpiece")
    return list(dict.fromkeys(SPECIAL_TOKENS + chosen))[:size]


def one_word(word: str, lowercase: bool) -> str:
    """A required word as the tokenizer will see it. Raises InputError where the tokenizer would cut it."""
    words = [part for chunk in word.split() for part in split_chunk(chunk, lowercase)]
    if len(words) != 1 or len(words[0]) > LONGEST_WORD:
        raise InputError(
            f"the required word {word!r} is {len(words)} words for a BERT tokenizer ({' '.join(words)}) and cannot be "
            f"one piece: name single words without punctuation, of at most {LONGEST_WORD} characters"
        )
    return words[0]


def _known_characters(teacher: set[str], required: Iterable[str], characters: Iterable[str]) -> set[str]:
    """The characters that the teacher has pieces for; InputError for a required word that it lacks pieces for."""
    if not teacher:
        raise InputError("prune chooses among the teacher's pieces: name a teacher, or train fewest")
    for word in required:
        if missing := [piece for piece in (word, *alphabet_pieces(word)) if piece not in teacher]:
            raise InputError(f"the teacher has no piece {missing[0]!r}, so prune cannot keep {word!r}: train fewest")
    return {c for c in characters if teacher.issuperset(alphabet_pieces(c))}
