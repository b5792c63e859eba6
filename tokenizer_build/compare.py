"""How well tokenizers of any family fit a corpus, measured on its word counts.

Every word is encoded once, after a space, and weighted by its count: exact for tokenizers that look at words alone
(BERT's), close for those that mark spaces, which see punctuation as if it followed one."""

import json
from collections.abc import Iterable, Iterator, Mapping

from tokenizers import Encoding, Tokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.trainers import teacher_pieces

BATCH = 10_000  # words
HEADINGS = ["tokenizer", "pieces", "pieces/word", "one-piece words", "unknown words", "in the first"]
Measures = dict[str, float]
FORMATS = [",d", ".4f", ".2%", ".2%", ".2%"]  # of the measures, in the order of `compare`


def compare(counts: Mapping[str, int], tokenizers: Mapping[str, Tokenizer], *, used=False) -> dict[str, Measures]:
    """Measure tokenizers by name on the same counts: `measure`; `size`, in pieces; and `overlap_with_first`, the share
    of its pieces (`used`: that these words use) that the first has, written alike."""
    if not counts or not tokenizers:
        raise InputError("nothing to compare: give word counts with words in them and at least one tokenizer")
    measured, first = {}, set()
    for name, tokenizer in tokenizers.items():
        pieces = set(teacher_pieces(tokenizer.get_vocab()))
        first = first or pieces
        if used:
            ids = {i for _, encoding in _encoded(counts, tokenizer) for i in encoding.ids}
            pieces = set(teacher_pieces(map(tokenizer.id_to_token, ids)))
        measured[name] = {"size": tokenizer.get_vocab_size(), **measure(counts, tokenizer)}
        measured[name]["overlap_with_first"] = len(pieces & first) / max(1, len(pieces))
    return measured


def measure(counts: Mapping[str, int], tokenizer: Tokenizer) -> Measures:
    """Over all occurrences of all words: `pieces_per_word`, where an unknown word counts as the pieces it yields (1 for
    WordPiece); `coverage`, the share that are one known piece; `unknown_rate`, the share with an unknown piece."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id")  # unigram's; the other families name a piece
    if unknown is None and model.get("unk_token"):
        unknown = tokenizer.token_to_id(model["unk_token"])
    pieces = whole = unknowns = 0
    for word, encoding in _encoded(counts, tokenizer):
        ids, count = encoding.ids, counts[word]
        pieces += count * len(ids)
        if unknown in ids:
            unknowns += count
        elif len(ids) == 1:
            whole += count
    total = sum(counts.values())
    return {"pieces_per_word": pieces / total, "coverage": whole / total, "unknown_rate": unknowns / total}


def _encoded(words: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Encoding]]:
    """Each word and its encoding behind a space."""
    words = list(words)
    for start in range(0, len(words), BATCH):
        batch = words[start : start + BATCH]
        encodings = tokenizer.encode_batch_fast([f" {word}" for word in batch], add_special_tokens=False)
        yield from zip(batch, encodings, strict=True)


def markdown(measured: Mapping[str, Measures]) -> str:
    """The comparison as a Markdown table whose columns line up in a terminal too."""
    rows = [HEADINGS, *([name, *map(format, values.values(), FORMATS)] for name, values in measured.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
