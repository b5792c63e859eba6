"""A tokenizer folder made from a list of pieces, for `tokenizers`, AutoTokenizer and BertTokenizerFast alike.

The Tokenizer is built from its vocabulary and never from a trainer's leftovers: trainers leave the single
characters behind as added tokens, which would be cut out of the text before normalisation.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from tokenizer_build.candidates import LONGEST_WORD, SPECIAL_TOKENS
from tokenizer_build.errors import InputError

ROLES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}  # pad_token: [PAD], ...


def make_tokenizer(pieces: Sequence[str], *, lowercase: bool = True) -> Tokenizer:
    """The BERT tokenizer whose vocabulary is `pieces`, in the order of their ids."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise InputError("the vocabulary holds a piece twice: every piece needs its own id")
    if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
        raise InputError(f"the vocabulary has no {missing[0]}: it needs {' '.join(SPECIAL_TOKENS)}")
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(pieces: Sequence[str], folder: str | Path, *, lowercase: bool = True, max_length: int = 512) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt into `folder`, which may hold other files.

    `max_length` is the longest input, in pieces, that the model accepts. Every file appears whole or not at
    all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": max_length,
        **ROLES,
    }
    files = {
        "tokenizer.json": make_tokenizer(pieces, lowercase=lowercase).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "vocab.txt": "".join(f"{piece}\n" for piece in pieces),
    }
    for name, text in files.items():
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, or a BERT vocab.txt) or of a JSON file, of any family."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        text = file.read_text("utf-8", errors="replace")
        if '"model"' not in text or not text.lstrip().startswith("{"):
            raise InputError(f"{file} is no tokenizer of the `tokenizers` library: name a tokenizer.json")
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()  # all-MiniLM-L6-v2's file pads every input to 128 pieces
        tokenizer.no_truncation()
        return tokenizer
    if (path / "vocab.txt").is_file():
        settings = path / "tokenizer_config.json"
        known = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        lowercase = known.get("do_lower_case", True)
        pieces = (path / "vocab.txt").read_text("utf-8").removesuffix("\n").split("\n")
        return make_tokenizer(pieces, lowercase=lowercase)
    raise InputError(f"{path} has no tokenizer.json and no vocab.txt: name a tokenizer's folder or JSON file")
