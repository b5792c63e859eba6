"""Candidates for the vocabulary: the alphabet, pieces learned from the counts, and the teacher's pieces.

SentencePiece's BPE learns 30,000 pieces from a word-count table in a second on one thread, and gives the same
pieces every time; the trainer in `tokenizers` reads running text only and gives different ones on every run.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tokenizer_build.count import split_chunk
from tokenizer_build.tokenizer import LONGEST_WORD

LEAST_SHARE = 1e-6  # of all characters
LONGEST_PIECE = 24  # characters, for learned pieces


def alphabet(counts: Mapping[str, int]) -> list[str]:
    """Characters that are at least LEAST_SHARE of the corpus (in a small one: all that occur), sorted.

    Words with a rarer character become unknown: 1 word in 7,000 of English Wikipedia, books and reviews.
    """
    seen: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            seen[character] += count
    least = LEAST_SHARE * seen.total()
    return sorted(character for character, count in seen.items() if count >= least)


def always_alone(characters: Iterable[str]) -> set[str]:
    """Those that are words by themselves wherever they stand: punctuation and Chinese characters."""
    return {c for c in characters if len(split_chunk(f"a{c}a", lowercase=False)) > 1}


def alphabet_pieces(characters: Sequence[str]) -> list[str]:
    """Each character as a word's start, and inside words where it can stand there (see `always_alone`)."""
    alone = always_alone(characters)
    return [*characters, *(f"##{c}" for c in characters if c not in alone)]


def spellable_words(counts: Mapping[str, int], characters: Iterable[str]) -> list[tuple[str, int]]:
    """(word, count) of the words that the characters spell and WordPiece accepts, most frequent first."""
    known = set(characters)
    words = [item for item in counts.items() if len(item[0]) <= LONGEST_WORD and known.issuperset(item[0])]
    return sorted(words, key=lambda item: (-item[1], item[0]))


def teacher_pieces(vocabulary: Iterable[str]) -> list[str]:
    """A vocabulary of any family, less its special tokens, as WordPiece (`start`, `##inside`), in order.

    Families are told by their mark: `▁` (SentencePiece) and `Ġ` (byte-level BPE) open a word. Byte-level
    pieces beyond ASCII are left out: they may be parts of characters.
    """
    vocabulary = list(vocabulary)
    for mark in "▁Ġ":
        if sum(piece.startswith(mark) for piece in vocabulary) > len(vocabulary) / 10:
            own = [piece for piece in vocabulary if mark == "▁" or piece.removeprefix(mark).isascii()]
            vocabulary = [p[1:] if p.startswith(mark) else f"##{p}" for p in own if p != mark]
    out = []
    for piece in vocabulary:
        text = piece[2:] if piece.startswith("##") and len(piece) > 2 else piece
        if len(text) == 1 or (text and tuple(split_chunk(text, lowercase=False)) == (text,)):
            out.append(piece)
    return out


def learned_pieces(words: Sequence[tuple[str, int]], size: int, model: str, marked: bool = True) -> list[str]:
    """Train SentencePiece (`bpe` or `unigram`) on word counts; its pieces as WordPiece, best first.

    With `marked`, a word's start is a symbol of its own that merges like any other, as in SentencePiece.
    Without, a start letter is another letter than the same one inside a word, as in WordPieceTrainer. Both
    marks (`▁`, a private-use character) cannot be mistaken for text: words that hold them are left out.
    """
    import sentencepiece

    characters = sorted({c for word, _ in words for c in word})
    never = {f"##{c}" for c in always_alone(characters)}
    first = 0xF0000  # supplementary private use: one code point per letter that stands at a word's start
    starts = {c: chr(first + number) for number, c in enumerate(characters)}
    letters = {mark: c for c, mark in starts.items()}
    mark = "▁"
    usable = [(w, n) for w, n in words if mark not in w and not any(c in letters for c in w)]
    if not usable:
        return []
    rows = (f"{w if marked else starts[w[0]] + w[1:]}\t{n}" for w, n in usable)
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows,
        input_format="tsv",
        model_writer=blob,
        model_type=model,
        vocab_size=size + 2 * len(characters) + 2,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=marked,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=LONGEST_PIECE,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        input_sentence_size=0,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    out = []
    for number in range(trained.get_piece_size()):
        piece = trained.id_to_piece(number)
        if trained.is_unknown(number) or piece == mark:
            continue
        if piece[0] == mark:
            out.append(piece[1:])
        elif piece[0] in letters:
            out.append(letters[piece[0]] + piece[1:])
        else:
            out.append(f"##{piece}")
    return [piece for piece in out if piece not in never]
