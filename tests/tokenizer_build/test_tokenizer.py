"""The written folder loads in every loader, and all of them cut any text alike."""

import json
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import (
    SPECIAL_TOKENS,
    adopt_tokenizer,
    form_of,
    load_tokenizer,
    lowercases,
    make_tokenizer,
    save_tokenizer,
)

PIECES = [*SPECIAL_TOKENS, *"abcdeéé!漢", *(f"##{c}" for c in "abcdeé"), "abc", "##bcd", "É"]
TEXT = st.text(st.one_of(st.sampled_from("abcdeéÉABC !漢\t\u0301\x1c"), st.characters(codec="utf-8")), max_size=40)
PIECES = list(dict.fromkeys(PIECES))


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def loaded(request, tmp_path_factory):
    from transformers import AutoTokenizer, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(make_tokenizer(PIECES, lowercase=request.param), folder, max_length=64)
    only_vocabulary = tmp_path_factory.mktemp("vocabulary")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (only_vocabulary / name).write_bytes((folder / name).read_bytes())
    return [
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        load_tokenizer(folder),
        load_tokenizer(only_vocabulary),
        AutoTokenizer.from_pretrained(folder),
        BertTokenizerFast.from_pretrained(folder),
        BertTokenizerFast.from_pretrained(only_vocabulary),
    ]


@given(TEXT)
@example("[MASK] abcd [unused] ABC É漢a")
@example("[CLS]")
@example("a" * 101 + " " + "b" * 100)
def test_all_loaders_cut_alike(loaded, text):
    ids = [(t.encode(text).ids if isinstance(t, Tokenizer) else t(text)["input_ids"]) for t in loaded]
    if any(token in text for token in SPECIAL_TOKENS):  # which our own loader reads as text, and the others as tokens
        assert "[MASK]" not in text or [4 in row for row in ids] == [True, False, False, True, True, True]
        assert ids[1] == ids[2]
        ids = [ids[0], *ids[3:]]
    assert all(other == ids[0] for other in ids[1:])


def test_pairs_lengths_and_special_tokens(loaded):
    for tokenizer in loaded[3:]:
        assert tokenizer.model_max_length == 64
        assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
        assert tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"]) == [
            "[CLS]",
            "a",
            "[SEP]",
            "b",
            "[SEP]",
        ]
        assert tokenizer.pad_token_id == 0 and tokenizer.mask_token == "[MASK]"
        assert set(tokenizer.added_tokens_encoder) == set(SPECIAL_TOKENS)


def test_the_files_are_as_promised(tmp_path):
    save_tokenizer(make_tokenizer(PIECES), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert (tmp_path / "vocab.txt").read_text("utf-8").split("\n") == [*PIECES, ""]
    saved = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert [token["content"] for token in saved["added_tokens"]] == SPECIAL_TOKENS
    assert list(saved["model"]["vocab"]) == PIECES
    first = (tmp_path / "tokenizer.json").read_bytes()
    save_tokenizer(make_tokenizer(PIECES), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_a_loaded_tokenizer_neither_pads_nor_truncates(tmp_path):
    tokenizer = make_tokenizer(PIECES)
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(8)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(file)):
        assert loaded.padding is None and loaded.truncation is None
        assert len(loaded.encode("a b " * 20, add_special_tokens=False).ids) == 40
        assert len(loaded.encode("a").ids) == 3


def test_a_given_tokenizer_is_taken_as_it_is(tmp_path):
    """Normalizer, pre-tokenizer, added tokens and the longest word travel: no piece becomes unreachable."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    given = make_tokenizer([*PIECES, "Ab", "##-", "ü"])
    given.model.max_input_chars_per_word = 9
    parts = {
        "german": (normalizers.BertNormalizer(lowercase=True, strip_accents=False), given.pre_tokenizer),
        "cased": (normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False), given.pre_tokenizer),
        "nfc": (normalizers.NFC(), pre_tokenizers.WhitespaceSplit()),
        "none": (None, pre_tokenizers.WhitespaceSplit()),
    }
    for name, (normalizer, pre_tokenizer) in parts.items():
        given.normalizer, given.pre_tokenizer = normalizer, pre_tokenizer
        given.add_tokens(["[name]", AddedToken("c++", single_word=True)])
        (tmp_path / name).mkdir()
        given.save(str(tmp_path / name / "tokenizer.json"))
        save_tokenizer(adopt_tokenizer(tmp_path / name), tmp_path / f"{name}-own")
        own, auto = load_tokenizer(tmp_path / f"{name}-own"), AutoTokenizer.from_pretrained(tmp_path / f"{name}-own")
        text = "É e\u0301 é Ab ab 漢a ü a-b [name] c++ " + "a" * 10
        assert (
            own.encode(text).tokens == given.encode(text).tokens == auto.convert_ids_to_tokens(auto(text)["input_ids"])
        )
        assert own.get_vocab_size() == len((tmp_path / f"{name}-own" / "vocab.txt").read_text("utf-8").splitlines())
        assert lowercases(own) == (name == "german")


def test_a_tokenizer_that_composes_and_cuts_long_words_is_what_transformers_loads(tmp_path):
    from transformers import AutoTokenizer

    pieces = [*SPECIAL_TOKENS, "é", "f", "##i", *"กข", *("##" + c for c in "กข")]
    save_tokenizer(make_tokenizer(pieces, lowercase=False, form="NFKC", cut_words=True), tmp_path)
    own, auto = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "e\u0301 é ﬁ " + "กข" * 125
    ids = own.encode(text).ids
    assert auto(text)["input_ids"] == ids and own.token_to_id("[UNK]") not in ids
    assert own.encode(text, add_special_tokens=False).tokens[:4] == ["é", "é", "f", "##i"]
    assert len(ids) == 2 + 4 + 250
    assert form_of(own) == "NFKC" and not lowercases(own)
    assert [form_of(make_tokenizer(pieces, form=form, lowercase=False)) for form in ("NFC", None)] == ["NFC", None]
    assert form_of(make_tokenizer(pieces)) is None


def test_a_bare_vocabulary_keeps_its_settings(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("".join(f"{piece}\r\n" for piece in PIECES).encode())
    settings = {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("É abc", add_special_tokens=False).tokens == ["é", "abc"]


def test_tokenizers_that_a_student_cannot_have_are_refused(tmp_path):
    from tokenizers import models

    path = tmp_path / "tokenizer.json"
    for model, reason in (
        (models.Unigram([("a", 0.0)], 0), "Unigram tokenizer: name a WordPiece one"),
        (
            models.WordPiece({"[UNK]": 0}, unk_token="[UNK]", continuing_subword_prefix="@@"),
            "WordPiece one that writes",
        ),
        (models.WordPiece({"[UNK]": 0, "<s>": 1}, unk_token="[UNK]"), r"lacks one of \[PAD\]"),
    ):
        Tokenizer(model).save(str(path))
        with pytest.raises(InputError, match=f"tokenizer.json.*{reason}"):
            adopt_tokenizer(path)


def test_bad_vocabularies_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="twice"):
        make_tokenizer([*PIECES, "a"])
    with pytest.raises(InputError, match=r"no \[MASK\]"):
        make_tokenizer(PIECES[:4])
    with pytest.raises(InputError, match="no tokenizer.json and no vocab.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(InputError, match="vocab.txt: not UTF-8 text at byte 6"):
        load_tokenizer(tmp_path)
    whole = make_tokenizer(PIECES).to_str().encode()
    for content in (b"", b"{", b"[]", b'{"a": 1}', b'{"model": {}}', whole[:-40], b"\xff" + whole, b"model " + whole):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer that"):
            load_tokenizer(tmp_path)


def test_loading_needs_what_the_base_install_has():
    program = "import sys, tokenizer_build.tokenizer; print({'pyarrow', 'sentencepiece', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"


@pytest.mark.parametrize("part", ["normalizer", "post_processor"])
def test_what_the_tokenizers_library_panics_on_is_refused(part, tmp_path):
    """A panic is no Exception, and would end the program past every handler."""
    spec = json.loads(make_tokenizer([*SPECIAL_TOKENS, "ka"]).to_str())
    if part == "normalizer":
        spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    else:
        spec["post_processor"]["pair"][2]["SpecialToken"]["id"] = "[NONE]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)
