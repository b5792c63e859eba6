"""The vocabulary trainers: word counts -> a WordPiece vocabulary.

Every vocabulary holds the special tokens, then what is required (the corpus's alphabet and the user's words), then what
the trainer chose. All are functions of the counts alone. SentencePiece's BPE learns 30,000 candidates in a second;
`wordpiece` is computed by it too, since `tokenizers.WordPieceTrainer` gives another vocabulary on every run."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping

import sentencepiece
from tokenizers import Tokenizer

from tokenizer_build.count import split_chunk
from tokenizer_build.errors import InputError
from tokenizer_build.select import Words, fewest_pieces
from tokenizer_build.tokenizer import LONGEST_WORD, SPECIAL_TOKENS, make_tokenizer

CANDIDATES = 30_000  # learned by BPE; 60,000 give no better vocabulary
LEAST_SHARE = 1e-6  # of all characters
MOST_LONG = 1e-4  # share of words over LONGEST_WORD above which these are cut: no language with spaces has them
LONGEST_PIECE = 24  # characters, for learned pieces
# SentencePiece's options, of both its models
LEARNING = {"input_format": "tsv", "normalization_rule_name": "identity", "character_coverage": 1.0}
LEARNING |= dict.fromkeys(("hard_vocab_limit", "split_by_unicode_script", "split_by_number"), False)
LEARNING |= {"bos_id": -1, "eos_id": -1, "max_sentencepiece_length": LONGEST_PIECE, "num_threads": 1, "minloglevel": 2}
TRAINERS = {
    "fewest": "Fewest pieces for the corpus (see select), from learned candidates and the teacher's pieces.",
    "wordpiece": "BPE by count where `a` and `##a` are different symbols from the start, as in WordPieceTrainer.",
    "bpe": "SentencePiece's BPE, written as WordPiece.",
    "unigram": "SentencePiece's unigram model, written as WordPiece.",
    "prune": "Fewest pieces out of the teacher's vocabulary, and letters: hardly a piece needs a new embedding.",
}


def train_vocabulary(
    counts: Mapping[str, int],
    size: int,
    trainer: str = "fewest",
    *,
    required: Iterable[str] = (),
    characters: Iterable[str] | None = None,
    teacher_vocabulary: Iterable[str] = (),
    lowercase: bool = True,
) -> list[str]:
    """The pieces, in order of their ids, that one of TRAINERS chooses for the word counts. `required` words become one
    piece each, as a tokenizer with `lowercase` sees them; `characters` are the alphabet, by default that of the counts;
    `teacher_vocabulary` is of any family. InputError for no words, a required word that is cut, too small a size."""
    if not counts:
        raise InputError("there are no words to learn a vocabulary from: count a corpus with text in it")
    teacher = teacher_pieces(teacher_vocabulary)
    required = required_words(required, lowercase, known := set(teacher) if trainer == "prune" else None)
    characters = {*(alphabet(counts) if characters is None else characters), *"".join(required)}
    if known is not None:  # what it has only inside words, or only at their start, becomes both pieces
        characters = {c for c in characters if not known.isdisjoint(alphabet_pieces(c))}
    fixed = list(dict.fromkeys([*alphabet_pieces(sorted(characters)), *required]))
    room = size - len(SPECIAL_TOKENS)
    if room < len(fixed):
        what = f"{size} pieces cannot hold the special tokens, {len(characters)} characters and the required words"
        raise InputError(f"{what}: allow at least {len(SPECIAL_TOKENS) + len(fixed)}")
    if cuts_words(counts):
        whole, counts = counts, Counter()
        for word, count in whole.items():
            for start in range(0, len(word), LONGEST_WORD):
                counts[word[start : start + LONGEST_WORD]] += count
    spelt = (item for item in counts.items() if len(item[0]) <= LONGEST_WORD and characters.issuperset(item[0]))
    words = sorted(spelt, key=lambda item: (-item[1], item[0]))
    if trainer in ("fewest", "prune"):
        learned = learned_pieces(words, CANDIDATES, "bpe") if trainer == "fewest" else []
        chosen = fewest_pieces(words, learned + teacher, fixed, room, preferred=teacher)
    else:
        model = "unigram" if trainer == "unigram" else "bpe"
        chosen = fixed + learned_pieces(words, size, model, marked=trainer != "wordpiece")
    return list(dict.fromkeys(SPECIAL_TOKENS + chosen))[:size]


def check_trainer(name: str) -> None:
    """Raises InputError for a name that is none of TRAINERS."""
    if name not in TRAINERS:
        raise InputError(f"there is no trainer {name!r}: choose one of {', '.join(TRAINERS)}")


def train_tokenizer(
    counts: Mapping[str, int], size: int, trainer: str, *, lowercase: bool, form: str | None = None, **options
) -> Tokenizer:
    """The tokenizer of `train_vocabulary`'s pieces; options: more of its. form: see `make_normalizer`."""
    pieces = train_vocabulary(counts, size, trainer, lowercase=lowercase, **options)
    return make_tokenizer(pieces, lowercase=lowercase, form=form, cut_words=cuts_words(counts))


def required_words(words: Iterable[str], lowercase: bool, known: set[str] | None = None) -> list[str]:
    """The required words as the tokenizer will see them. known: the teacher's pieces, out of which `prune` chooses.
    Raises InputError for a word that the tokenizer would cut, or whose pieces, or letters', are not among the known."""
    if known is not None and not known:
        raise InputError("prune chooses among the teacher's pieces: name a teacher, or train fewest")
    found = []
    for word in words:
        parts = [part for chunk in word.split() for part in split_chunk(chunk, lowercase)]
        if len(parts) != 1 or len(parts[0]) > LONGEST_WORD:
            what = f"the required word {word!r} is {len(parts)} words for a BERT tokenizer and cannot be one piece"
            raise InputError(f"{what}: name single words without punctuation, of at most {LONGEST_WORD} characters")
        needed = () if known is None else (*parts, *alphabet_pieces(parts[0]))
        if missing := [piece for piece in needed if piece not in known]:
            raise InputError(f"the teacher has no piece {missing[0]!r}: prune cannot keep {parts[0]!r}: train fewest")
        found += parts
    return found


def cuts_words(counts: Mapping[str, int]) -> bool:
    """Whether WordPiece must cut words (see `make_tokenizer`): Thai, Lao, Khmer and Burmese clauses have no spaces."""
    return sum(count for word, count in counts.items() if len(word) > LONGEST_WORD) > MOST_LONG * sum(counts.values())


def alphabet(counts: Mapping[str, int]) -> list[str]:
    """Characters that are at least LEAST_SHARE of the corpus (in a small one: all that occur), sorted. Words with a
    rarer character become unknown: 1 word in 7,000 of English Wikipedia, books and reviews."""
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


def teacher_pieces(vocabulary: Iterable[str]) -> list[str]:
    """A vocabulary of any family, less its special tokens, as WordPiece (`start`, `##inside`), in order. `▁`
    (SentencePiece) and `Ġ` (byte-level BPE) open a word, and so do signs that are words of their own. Byte-level pieces
    beyond ASCII may be parts of characters: left out."""
    pieces = list(vocabulary)
    for mark in "▁Ġ":
        if sum(piece.startswith(mark) for piece in pieces) > len(pieces) / 10:
            own = [p for p in pieces if p != mark and (mark == "▁" or p.removeprefix(mark).isascii())]
            alone = {p for p in own if len(p) == 1 and [*split_chunk(f"a{p}", False)] == ["a", p]}  # punctuation
            pieces = [p[1:] if p.startswith(mark) else p if p in alone else f"##{p}" for p in own]
            pieces = list(dict.fromkeys(pieces))
    texts = [p[2:] if p.startswith("##") and len(p) > 2 else p for p in pieces]
    return [p for p, text in zip(pieces, texts, strict=True) if len(text) == 1 or [*split_chunk(text, False)] == [text]]


def learned_pieces(words: Words, size: int, model: str, marked: bool = True) -> list[str]:
    """Train SentencePiece (`bpe` or `unigram`) on word counts; its pieces as WordPiece, best first. With `marked`, a
    word's start is a symbol of its own, as in SentencePiece; without, a start letter is another letter than the same
    one inside a word, as in WordPieceTrainer. Words that hold such a mark themselves are left out."""
    characters = sorted({c for word, _ in words for c in word})
    starts = {c: chr(0xF0000 + number) for number, c in enumerate(characters)}
    letters = {mark: c for c, mark in starts.items()} | {"▁": ""}
    plain = (item for item in words if letters.keys().isdisjoint(item[0]))
    rows = [f"{word if marked else starts[word[0]] + word[1:]}\t{count}" for word, count in plain]
    if not rows:
        return []
    blob, options = io.BytesIO(), {"model_type": model, "vocab_size": size + 2 * len(characters) + 2}
    options |= LEARNING | {"sentence_iterator": iter(rows), "add_dummy_prefix": marked}
    sentencepiece.SentencePieceTrainer.train(model_writer=blob, **options)
    trained = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    learned = trained.id_to_piece(list(range(1, trained.get_piece_size())))  # 0 is the unknown piece
    pieces = [letters[p[0]] + p[1:] if p[0] in letters else f"##{p}" for p in learned]
    known = set(alphabet_pieces(characters))  # a character that is a word by itself starts its piece
    return [p for p in pieces if p and (p in known or len(p.removeprefix("##")) > 1)]
