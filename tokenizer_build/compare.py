"""How well tokenizers of any family fit a corpus, measured on its word counts.

Every word is encoded once, after a space, by the tokenizer itself and weighted by its count. For tokenizers
that look at words alone (BERT's) that is exact; those that mark spaces (byte-level BPE, SentencePiece) see
every word, punctuation too, as if it followed a space, which is close but not the running text.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from tokenizer_build.candidates import teacher_pieces
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer

BATCH = 10_000  # words
HEADINGS = {
    "size": "pieces",
    "pieces_per_word": "pieces/word",
    "coverage": "one-piece words",
    "unknown_rate": "unknown words",
    "overlap_with_first": "in the first",
}


def compare(counts: Mapping[str, int], tokenizers: Mapping[str, str | Path]) -> dict[str, dict[str, float]]:
    """Measure tokenizers (name -> folder or tokenizer.json) on the same counts.

    Each gets: `size`, the pieces in its vocabulary; `pieces_per_word`, over all occurrences of all words, an
    unknown word counting as the pieces it yields (1 for WordPiece); `coverage`, the share of occurrences
    that are one known piece; `unknown_rate`, the share with an unknown piece; and `overlap_with_first`, the
    share of its pieces, special tokens left out and all families written alike, that the first has too.
    """
    if not counts or not tokenizers:
        raise InputError("nothing to compare: give word counts with words in them and at least one tokenizer")
    loaded = {name: load_tokenizer(path) for name, path in tokenizers.items()}
    vocabularies = {name: set(teacher_pieces(tokenizer.get_vocab())) for name, tokenizer in loaded.items()}
    first = next(iter(vocabularies.values()))
    out = {}
    for name, tokenizer in loaded.items():
        own = vocabularies[name]
        out[name] = {
            "size": tokenizer.get_vocab_size(),
            **measure(counts, tokenizer),
            "overlap_with_first": len(own & first) / max(1, len(own)),
        }
    return out


def measure(counts: Mapping[str, int], tokenizer: Tokenizer) -> dict[str, float]:
    """`pieces_per_word`, `coverage` and `unknown_rate` of one tokenizer (see `compare`)."""
    unknown = _unknown_id(tokenizer)
    words = list(counts)
    pieces = whole = unknowns = 0
    for start in range(0, len(words), BATCH):
        batch = words[start : start + BATCH]
        encodings = tokenizer.encode_batch_fast([f" {word}" for word in batch], add_special_tokens=False)
        for word, encoding in zip(batch, encodings, strict=True):
            ids, count = encoding.ids, counts[word]
            pieces += count * len(ids)
            if unknown in ids:
                unknowns += count
            elif len(ids) == 1:
                whole += count
    total = sum(counts.values())
    return {"pieces_per_word": pieces / total, "coverage": whole / total, "unknown_rate": unknowns / total}


def table(measured: Mapping[str, Mapping[str, float]]):
    """The comparison as a rich table."""
    from rich.table import Table

    out = Table("tokenizer", *HEADINGS.values())
    for name, values in measured.items():
        out.add_row(name, *_cells(values))
    return out


def markdown(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The comparison as a Markdown table."""
    rows = [
        ["tokenizer", *HEADINGS.values()],
        ["---", *("--:" for _ in HEADINGS)],
        *([name, *_cells(values)] for name, values in measured.items()),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(values: Mapping[str, float]) -> list[str]:
    shares = [f"{values[key]:.2%}" for key in ("coverage", "unknown_rate", "overlap_with_first")]
    return [f"{values['size']:,}", f"{values['pieces_per_word']:.4f}", *shares]


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    model = json.loads(tokenizer.to_str())["model"]
    if (number := model.get("unk_id")) is not None:
        return number
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
