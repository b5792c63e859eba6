"""A tokenizer folder made from a list of pieces, for `tokenizers`, AutoTokenizer and BertTokenizerFast alike.

Never from a trainer's leftovers: trainers leave the single characters behind as added tokens."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFC, NFKC, BertNormalizer, Normalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from tokenizers.processors import TemplateProcessing

from tokenizer_build.errors import InputError
from tokenizer_build.files import decode, read_json, stamp, write_json, write_text

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# BertNormalizer's options as tokenizer_config.json names them
BERT = dict(lowercase="do_lower_case", strip_accents="strip_accents", handle_chinese_chars="tokenize_chinese_chars")
LONGEST_WORD = 100  # characters: WordPiece makes any longer word unknown
FORMS = {"NFC": NFC(), "NFKC": NFKC()}  # Unicode's normal forms that compose


def make_normalizer(lowercase: bool, form: str | None = None) -> Normalizer:
    """BERT's, which leaves accents alone unless it lowercases, behind one of FORMS where `form` names it."""
    bert = BertNormalizer(lowercase=lowercase)
    return normalizers.Sequence([FORMS[form], bert]) if form else bert


def make_tokenizer(
    pieces: Sequence[str], *, lowercase: bool = True, form: str | None = None, cut_words: bool = False
) -> Tokenizer:
    """The BERT tokenizer whose vocabulary is `pieces`, in the order of their ids. form: see `make_normalizer`.
    cut_words: words are cut every LONGEST_WORD characters, for scripts that write clauses without spaces."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing or len(ids) != len(pieces):
        what = f"has no {missing[0]}" if missing else "holds a piece twice"
        raise InputError(f"the vocabulary {what}: it needs {' '.join(SPECIAL_TOKENS)} and every piece once")
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = make_normalizer(lowercase, form), BertPreTokenizer()
    if cut_words:
        cut = Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")
        tokenizer.pre_tokenizer = PreTokenizerSequence([tokenizer.pre_tokenizer, cut])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def adopt_tokenizer(path: str | Path) -> Tokenizer:
    """A WordPiece tokenizer as a student's: pieces, normalizer, pre-tokenizer and added tokens as they are, ids without
    gaps, in BERT's frame of [CLS] and [SEP]. Raises InputError for another family or other special tokens."""
    given = shared_tokenizer(path)
    if not isinstance(given.model, WordPiece) or given.model.continuing_subword_prefix != "##":
        raise InputError(f"{path} is a {type(given.model).__name__} tokenizer: name a WordPiece one that writes ##")
    if not (vocabulary := given.get_vocab()).keys() >= set(SPECIAL_TOKENS):
        raise InputError(f"{path} lacks one of {' '.join(SPECIAL_TOKENS)}: name a tokenizer that has them")
    tokenizer = make_tokenizer(sorted(vocabulary, key=vocabulary.get))
    tokenizer.model.max_input_chars_per_word = given.model.max_input_chars_per_word
    tokenizer.normalizer, tokenizer.pre_tokenizer = given.normalizer, given.pre_tokenizer
    for token in given.get_added_tokens_decoder().values():
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def lowercases(tokenizer: Tokenizer) -> bool:
    """Whether upper case is lost on this tokenizer."""
    return tokenizer.normalizer is not None and "A" not in tokenizer.normalizer.normalize_str("A")


def form_of(tokenizer: Tokenizer) -> str | None:
    """The one of FORMS that this tokenizer brings text to."""
    probe = "ﬁe\u0301"  # of which NFKC takes the ligature apart, and both put the accent on its letter
    found = tokenizer.normalizer.normalize_str(probe) if tokenizer.normalizer else probe
    return next((name for name, form in FORMS.items() if form.normalize_str(probe) == found), None)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int = 512) -> None:
    """Write tokenizer.json, tokenizer_config.json and vocab.txt into `folder`. `max_length` is the longest input, in
    pieces, that the model accepts."""
    folder, normalizer, settings = Path(folder), tokenizer.normalizer, {"tokenizer_class": "PreTrainedTokenizerFast"}
    bert = isinstance(normalizer, BertNormalizer) and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
    if bert and tokenizer.model.max_input_chars_per_word == LONGEST_WORD:  # all of which BertTokenizer builds anew
        settings = {"tokenizer_class": "BertTokenizer"} | {key: getattr(normalizer, ours) for ours, key in BERT.items()}
    settings |= {"model_max_length": max_length}
    settings |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}  # pad_token: [PAD], ...
    pieces = sorted((vocabulary := tokenizer.get_vocab()), key=vocabulary.get)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", settings)
    write_text(folder / "vocab.txt", "".join(f"{piece}\n" for piece in pieces))


def parse_tokenizer(content: bytes, origin: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content; it neither pads nor truncates, and special tokens that stand in a
    text are text. Raises InputError, naming the origin, for what is none or breaks the tokenizers library."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()  # all-MiniLM-L6-v2's file pads every input to 128 pieces
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        tokenizer.encode("", "")  # a post-processor of unknown pieces breaks only here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics, which are not even those
        raise InputError(f"{origin} is not a tokenizer that can be read ({error}): name a tokenizer.json") from None
    return tokenizer


def shared_tokenizer(path: str | Path) -> Tokenizer:
    """`load_tokenizer`, which takes seconds of a large file, once while the files stay as they are. Only to be read."""
    path = Path(os.path.expanduser(path))
    path = file if (file := path / "tokenizer.json").is_file() else path
    return _load_once(path, stamp(path if path.is_dir() else path.parent))


@lru_cache(4)
def _load_once(path: Path, files: object) -> Tokenizer:
    return load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, or a BERT vocab.txt) or of a JSON file, of any family, as of
    `parse_tokenizer`. Raises InputError naming the file where there is none or it cannot be read."""
    path = Path(os.path.expanduser(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        tokenizer, beside = parse_tokenizer(file.read_bytes(), file), file.with_name("sentence_bert_config.json")
        if beside.is_file() and read_json(beside).get("do_lower_case") and not lowercases(tokenizer):
            kept = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *kept])  # as sentence-transformers
        return tokenizer
    vocabulary, settings = path / "vocab.txt", path / "tokenizer_config.json"
    if not vocabulary.is_file():
        raise InputError(f"{path} has no tokenizer.json and no vocab.txt: name a tokenizer's folder or JSON file")
    asked = read_json(settings) if settings.is_file() else {}
    pieces = decode(vocabulary.read_bytes(), vocabulary).replace("\r\n", "\n").removesuffix("\n").split("\n")
    tokenizer = make_tokenizer(pieces)
    tokenizer.normalizer = BertNormalizer(**{ours: asked[key] for ours, key in BERT.items() if key in asked})
    tokenizer.encode_special_tokens = True
    return tokenizer
