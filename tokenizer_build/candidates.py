"""Candidates for the vocabulary: the alphabet, pieces learned from the counts, and the teacher's pieces.

SentencePiece's BPE learns 30,000 pieces from a word-count table in a second on one thread, and gives the same pieces
every time; the trainer in `tokenizers` reads running text only and gives different ones on every run.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import sentencepiece

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


def alphabet_pieces(characters: Iterable[str]) -> list[str]:
    """Each character as a word's start, and inside words unless it is a word by itself wherever it stands."""
    inner = [f"##{c}" for c in characters if len(split_chunk(f"a{c}a", lowercase=False)) == 1]
    return [*characters, *inner]


def spellable_words(counts: Mapping[str, int], characters: Iterable[str]) -> list[tuple[str, int]]:
    """(word, count) of the words that the characters spell and WordPiece accepts, most frequent first."""
    known = set(characters)
    words = [item for item in counts.items() if len(item[0]) <= LONGEST_WORD and known.issuperset(item[0])]
    return sorted(words, key=lambda item: (-item[1], item[0]))


def teacher_pieces(vocabulary: Iterable[str]) -> list[str]:
    """A vocabulary of any family, less its special tokens, as WordPiece (`start`, `##inside`), in order.

    Families are told by their mark: `▁` (SentencePiece) and `Ġ` (byte-level BPE) open a word. Byte-level pieces beyond
    ASCII are left out: they may be parts of characters.
    """
    pieces = list(vocabulary)
    for mark in "▁Ġ":
        if sum(piece.startswith(mark) for piece in pieces) > len(pieces) / 10:
            own = [p for p in pieces if p != mark and (mark == "▁" or p.removeprefix(mark).isascii())]
            pieces = [p[1:] if p.startswith(mark) else f"##{p}" for p in own]
    texts = [p[2:] if p.startswith("##") and len(p) > 2 else p for p in pieces]
    words = [len(text) == 1 or (text and tuple(split_chunk(text, lowercase=False)) == (text,)) for text in texts]
    return list(compress(pieces, words))


def learned_pieces(words: Sequence[tuple[str, int]], size: int, model: str, marked: bool = True) -> list[str]:
    """Train SentencePiece (`bpe` or `unigram`) on word counts; its pieces as WordPiece, best first.

    With `marked`, a word's start is a symbol of its own that merges like any other, as in SentencePiece. Without, a
    start letter is another letter than the same one inside a word, as in WordPieceTrainer. Words that hold one of these
    marks (`▁` and private-use characters, one per letter) themselves are left out.
    """
    characters = sorted({c for word, _ in words for c in word})
    starts = {c: chr(0xF0000 + number) for number, c in enumerate(characters)}
    letters = {mark: c for c, mark in starts.items()} | {"▁": ""}
    rows = [
        f"{word if marked else starts[word[0]] + word[1:]}\t{count}"
        for word, count in words
        if letters.keys().isdisjoint(word)
    ]
    if not rows:
        return []
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(rows),
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
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    learned = trained.id_to_piece(list(range(1, trained.get_piece_size())))  # 0 is the unknown piece
    pieces = [letters[p[0]] + p[1:] if p[0] in letters else f"##{p}" for p in learned]
    # A character that is a word by itself starts its piece.
    known = set(alphabet_pieces(characters))
    return [p for p in pieces if p and (p in known or len(p.removeprefix("##")) > 1)]
