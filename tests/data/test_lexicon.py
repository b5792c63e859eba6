"""The lexicon gives, for any text and every family, the pieces that the tokenizers themselves give."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer_build.count import count_block
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import LONGEST_WORD, SPECIAL_TOKENS, load_tokenizer, make_tokenizer, save_tokenizer
from tokenizer_build.trainers import cuts_words, train_vocabulary
from vocabshrink.data import lexicon
from vocabshrink.data.held_out import behind_spaces, text_of
from vocabshrink.data.lexicon import Lexicon, WordStream, check_family, encode_corpus, sentence_lengths

ENGLISH = [
    "The cat doesn't sit on the mat, it's 42.5 degrees!",
    "Don't!! We've 3 naïve cafés (and 12 more)...",
    "Her  father's house — “the old one” — isn't far away.",
    "Ελλάδα, 한국어, 日本語 and the Ελλάδα again?",
]
# characters on which tokenizers disagree: white space, removed, composed, expanding, marks of the families
TRICKY = [
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u00a0 ",
    "\u2028",
    "\u3000",
    "\u200b",
    "\u200d",
    "\u00ad",
    "\ufeff",
    "\ufffd",
    "\u0301",
    "\u0338",
    "\u0600",
    "\u0d4e",
    "\U0001f3fb",
    "\U0001f600",
    "\U000e0001",
    "\u061c",
    "\u2581",
    "\u2581 ",
    "Ġ",
    "'",
    "’",
    ".",
    ",",
    "!",
    "``",
    "''",
    "'s",
    "'t",
    "İ",
    "ß",
    "Σ",
    "é",
    "e\u0301",
    "ﬁ",
    "½",
    "…",
    "¨",
    "´",
    "ͺ",
    "한",
    "각",
    "\u1100",
    "\u1161",
    "一",
    "二",
    "ｶ",
    "ﾞ",
    "あ",
    "ไ",
    "்",
    "the",
    "cat",
    "a",
    "B",
    "1",
    "22",
    "_",
    "-",
    "##a",
    "[MASK]",
    "[UNK]",
    "[CLS]",
    "<mask>",
    "</s>",
    "<s>",
    "<unk>",
]
TEXTS = st.one_of(st.lists(st.sampled_from(TRICKY), max_size=14).map("".join), st.text(max_size=25))


def bert(folder, *, lowercase=True):
    folder.mkdir()
    alphabet = sorted(set("".join(ENGLISH)) | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?'<>[]/#") - {" "})
    alphabet = sorted({c.lower() for c in alphabet}) if lowercase else alphabet
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *alphabet, *("##" + c for c in alphabet), "the", "cat", "##at"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def roberta(folder, *, add_prefix_space, normalizer=None):
    """Byte-level BPE whose merges include runs of white space, so that cutting one would show."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH * 3 + ["a   b \u00a0 c  \u00a0 \u00a0 d      e"] * 20, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=add_prefix_space)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def unigram(folder, normalizer, pre_tokenizer):
    folder.mkdir()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(ENGLISH * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def charsmap(folder) -> bytes:
    """SentencePiece's own nmt_nfkc table, out of a model trained here."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    (folder / "text").write_text("\n".join(ENGLISH * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "model"),
        vocab_size=90,
        minloglevel=2,
        hard_vocab_limit=False,
        num_threads=1,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString((folder / "model.model").read_bytes())
    return model.normalizer_spec.precompiled_charsmap


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Folder of every kind of teacher that is promised to work, by name."""
    root = tmp_path_factory.mktemp("families")
    n, p, table = normalizers, pre_tokenizers, normalizers.Precompiled(charsmap(root))
    split, metaspace = p.WhitespaceSplit(), p.Metaspace(prepend_scheme="always")
    to_one = n.Replace(Regex(" {2,}"), " ")
    quotes = [n.Replace("``", '"'), n.Replace("''", '"')]
    albert = [*quotes, n.NFKD(), n.StripAccents(), n.Lowercase(), table]
    return {
        "bert": bert(root / "bert"),
        "bert-cased": bert(root / "bert-cased", lowercase=False),
        "roberta": roberta(root / "roberta", add_prefix_space=False),
        "roberta-prefix": roberta(root / "roberta-prefix", add_prefix_space=True),
        "roberta-nmt": roberta(root / "roberta-nmt", add_prefix_space=False, normalizer=n.Nmt()),
        "xlm-r": unigram(root / "xlm-r", table, p.Sequence([split, metaspace])),
        "xlm-r-converted": unigram(
            root / "xlm-r-converted",
            n.Sequence([table, n.Strip(left=False, right=True), n.Replace(Regex(" {2,}"), "▁")]),
            metaspace,
        ),
        "albert": unigram(root / "albert", n.Sequence(albert), p.Sequence([split, metaspace])),
        "albert-converted": unigram(root / "albert-converted", n.Sequence([*albert, to_one]), metaspace),
        "first": unigram(root / "first", n.Sequence([n.NFKC()]), p.Metaspace(prepend_scheme="first")),
        "deberta-v3": unigram(
            root / "deberta-v3",
            n.Sequence([n.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), n.NFC(), n.Strip(left=False, right=True)]),
            p.Sequence([p.Punctuation("isolated"), metaspace]),
        ),
    }


FAMILIES = (
    "bert",
    "bert-cased",
    "roberta",
    "roberta-prefix",
    "roberta-nmt",
    "xlm-r",
    "xlm-r-converted",
    "albert",
    "albert-converted",
    "first",
    "deberta-v3",
)


def reference(folder) -> Tokenizer:
    """The file as it is, but for truncation and padding; special tokens written in the text are text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def whole_line_ids(folder, line) -> list[int]:
    return reference(folder).encode(line, add_special_tokens=False).ids


def pieces_of(key: bytes) -> tuple[list[int], list[int]]:
    """Teacher's and student's pieces out of an encoder's key of a word."""
    size, *pieces = np.frombuffer(key, np.int32).tolist()
    return pieces[:size], pieces[size:]


def line_ids(words: Lexicon, stream: WordStream, line: int, side: str) -> list[int]:
    offsets, ids = getattr(words, f"{side}_offsets"), getattr(words, f"{side}_ids")
    start, end = stream.line_offsets[line : line + 2]
    return [int(piece) for w in stream.word_ids[start:end] for piece in ids[offsets[w] : offsets[w + 1]]]


def encode(tmp_path, lines, teacher, student, **options):
    totals = encode_corpus([lines], teacher, student, tmp_path, **options)
    return totals, Lexicon.load(tmp_path), WordStream.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("student", ["bert", "bert-cased"])
def test_any_text_has_the_pieces_of_the_tokenizers(families, family, student):
    folders = families[family], families[student]
    encoder = lexicon._Encoder(*(folder / "tokenizer.json" for folder in folders))  # its cache stays for all
    teacher, student = map(reference, folders)

    @settings(max_examples=150, database=None, derandomize=True)
    @given(st.lists(TEXTS, max_size=3))
    @example(ENGLISH)
    @example(["a\u200b b", "a\u00a0 \u00a0b", "؀ b", "x ", " x", "a\tb", "```` '' '", "a▁ ▁b", "a▁  b"])
    def holds(lines):
        _, _, word_ids, lengths = encoder.encode(lines)
        words = [pieces_of(key) for key in encoder.words]
        ends = np.cumsum(lengths)
        assert len(lengths) == len(lines) and lengths.sum() == len(word_ids)
        for line, start, end in zip(lines, ends - lengths, ends, strict=True):
            found = [words[w] for w in word_ids[start:end]]
            assert [p for w in found for p in w[0]] == teacher.encode(line, add_special_tokens=False).ids
            assert [p for w in found for p in w[1]] == student.encode(line, add_special_tokens=False).ids
            assert all(w[0] or w[1] for w in found)

    holds()


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_lines(families, family, tmp_path, lines):
    lines = [*ENGLISH, "", "   ", *lines[:20], "[MASK] <mask> </s>[SEP]", ""]
    totals, words, stream = encode(tmp_path / "out", lines, families[family], families["bert"])
    assert totals["lines"] == len(lines) == len(stream.line_offsets) - 1
    for i, line in enumerate(lines):
        for side, name in (("teacher", family), ("student", "bert")):
            assert line_ids(words, stream, i, side) == whole_line_ids(families[name], line)
    assert totals["words"] == len(stream.word_ids) == words.counts.sum()
    assert totals["distinct_words"] == len(words.counts) == len(words.words) == len(words.ends_sentence)
    assert (words.counts == np.bincount(stream.word_ids)).all()
    first_seen = np.unique(stream.word_ids, return_index=True)[1]
    assert (np.diff(first_seen) > 0).all()  # numbered by first occurrence
    for side in ("teacher", "student"):
        pieces = sum(len(line_ids(words, stream, i, side)) for i in range(len(lines)))
        assert totals[f"{side}_pieces"] == pieces
    vocabulary, counts = load_tokenizer(families["bert"]), Counter()
    for i in range(len(lines)):
        counts.update(map(vocabulary.id_to_token, line_ids(words, stream, i, "student")))
    counts |= dict.fromkeys(["[CLS]", "[SEP]"], len(lines))  # around every line
    assert {vocabulary.id_to_token(i): n for i, n in enumerate(words.student_counts) if n} == counts
    assert isinstance(stream.word_ids, np.memmap) and stream.word_ids.dtype == np.uint32
    assert stream.line_offsets.dtype == np.int64 and words.teacher_ids.dtype == np.int32
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"lexicon.safetensors", "line_offsets.npy", "meta.json", "word_ids.npy", "words.jsonl"}


SCRIPTS = [
    "我喜欢学习机器学习。今天天气很好！ﾊﾛｰ",
    "今日は東京で美味しい寿司を食べました。ｶﾞｷﾞ か\u3099 が ﾞ",
    "ฉันชอบกินข้าวผัด และดื่มน้ำชา ๑๒๓ฯ",
    "أنا أحب القراءة\u200f والكتابة في المكتبة، مَرْحَبًا؟ می\u200cخواهم",
    "मुझे हिन्दी में पढ़ना अच्छा लगता है। क्\u200dषत्रिय ढ\u093c ढ़",
    "한국어를 배우고 \u1112\u1161\u11ab있어요.",
    "mixed 中文 and English, עברית \u202bright\u202c e\u0301 é ﬁn ½ ① ＡＢＣ 👩\u200d👩\u200d👧 \ufeff",
]


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_every_script_is_counted_learnt_and_encoded_as_the_tokenizers_do(families, tmp_path, lowercase):
    """Counts are the pre-tokenizer's words, the vocabulary spells them all, and the lexicon has each teacher's ids."""
    counts = count_block(SCRIPTS, lowercase)
    split = pre_tokenizers.BertPreTokenizer()
    normalized = map(normalizers.BertNormalizer(lowercase=lowercase).normalize_str, SCRIPTS)
    assert counts == Counter(word for line in normalized for word, _ in split.pre_tokenize_str(line))
    save_tokenizer(
        make_tokenizer(train_vocabulary(counts, 400, lowercase=lowercase), lowercase=lowercase), tmp_path / "student"
    )
    student = reference(tmp_path / "student")
    assert not any("[UNK]" in student.encode(line).tokens for line in SCRIPTS)
    if not lowercase:
        assert student.decode(student.encode("हिन्दी में").ids) == "हिन्दी में"  # the vowel signs too
    for family in FAMILIES:
        _, words, stream = encode(tmp_path / family, SCRIPTS, families[family], tmp_path / "student")
        for i, line in enumerate(SCRIPTS):
            assert line_ids(words, stream, i, "teacher") == whole_line_ids(families[family], line), (family, line)
            assert line_ids(words, stream, i, "student") == student.encode(line, add_special_tokens=False).ids


@pytest.mark.parametrize("family", FAMILIES[:-1])  # the last marks signs as if there were spaces before them
def test_words_are_written_as_the_teacher_read_them(families, family, tmp_path):
    """Where spaces are pieces, or parts of pieces, a sentence has none that the text did not have."""
    unknown = {reference(families[family]).token_to_id(token) for token in ("<unk>", "[UNK]")}
    texts = [line for line in ENGLISH + SCRIPTS if line.isprintable() and "  " not in line]
    texts = [line for line in texts if unknown.isdisjoint(whole_line_ids(families[family], line))]
    _, words, stream = encode(tmp_path, texts, families[family], families["bert"])
    apart = behind_spaces(words, load_tokenizer(families[family]))
    assert len(texts) > 1
    for i, line in enumerate(texts):
        written = text_of(words, stream.word_ids[slice(*stream.line_offsets[i : i + 2])], apart)
        assert whole_line_ids(families[family], written) == whole_line_ids(families[family], line), written


CLAUSES = ["ฉันชอบกินข้าวผัดและดื่มน้ำชา" * 12, "ខ្ញុំចូលចិត្តញ៉ាំបាយ" * 9, "e\u0301" * 130 + " x", "ﷺ½" * 70]


def test_words_of_any_length_and_every_unicode_form_are_encoded_as_the_tokenizers_do(families, tmp_path):
    """Thai and Khmer clauses are longer than WordPiece reads; nothing is unknown that the alphabet can write."""
    lines = [*SCRIPTS, *CLAUSES]
    counts = count_block(lines, False, "NFKC")
    assert cuts_words(counts) and max(map(len, counts)) > 3 * LONGEST_WORD
    pieces, reads = train_vocabulary(counts, 420, lowercase=False), {"form": "NFKC", "cut_words": cuts_words(counts)}
    save_tokenizer(make_tokenizer(pieces, lowercase=False, **reads), tmp_path / "student")
    student = reference(tmp_path / "student")
    assert not any("[UNK]" in student.encode(line).tokens for line in lines)
    assert student.encode("é ﬁ").ids == student.encode("e\u0301 fi").ids
    for family in FAMILIES:
        _, words, stream = encode(tmp_path / family, lines, families[family], tmp_path / "student")
        for i, line in enumerate(lines):
            assert line_ids(words, stream, i, "teacher") == whole_line_ids(families[family], line), (family, line)
            assert line_ids(words, stream, i, "student") == student.encode(line, add_special_tokens=False).ids


def surfaces(tmp_path, line, teacher, student):
    _, words, stream = encode(tmp_path / "out", [line], teacher, student)
    return [words.words[w] for w in stream.word_ids], words


def test_words_are_the_finest_stretches_that_both_tokenizers_cut(families, tmp_path):
    found, _ = surfaces(tmp_path / "a", "Don't!! We  go", families["roberta"], families["bert"])
    assert [w for w in found if not w.isspace()] == ["Don", "'t", "!!", "We", "go"]
    found, _ = surfaces(tmp_path / "b", "Don't!! We  go 一一", families["bert"], families["bert-cased"])
    assert found == ["Don", "'", "t", "!", "!", "We", "go", "一", "一"]
    found, _ = surfaces(tmp_path / "c", "Don't!! We  go", families["xlm-r"], families["bert"])
    assert found == ["Don't!!", "We", "go"]


@pytest.mark.parametrize(("place", "sentences"), [(0, 3), (1, 2), (2, 1)], ids=["chinese", "japanese", "thai"])
def test_scripts_without_spaces_have_words_too(place, sentences, families, tmp_path):
    """A line of Chinese is one word to SentencePiece, a clause of Thai to BERT too: words end where both cut."""
    line = SCRIPTS[place].replace(" ", "")
    save_tokenizer(
        make_tokenizer([*SPECIAL_TOKENS, *(mark + c for mark in ("", "##") for c in sorted(set(line)))]),
        tmp_path / "bert",
    )
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=103, unk_token="<unk>", special_tokens=special, show_progress=False)
    unigram.train_from_iterator([line, *line] * 9, trainer)
    (tmp_path / "unigram").mkdir()
    unigram.save(str(tmp_path / "unigram/tokenizer.json"))
    for teacher in (tmp_path / "unigram", tmp_path / "bert", families["roberta"]):
        _, words, stream = encode(tmp_path / "out", [line], teacher, tmp_path / "bert")
        apart, found = behind_spaces(words, tokenizer := load_tokenizer(teacher)), len(stream.word_ids)
        assert found > 8 and line_ids(words, stream, 0, "teacher") == whole_line_ids(teacher, line)
        assert whole_line_ids(teacher, text_of(words, stream.word_ids, apart)) == whole_line_ids(teacher, line)
        assert sum(lengths := sentence_lengths(line, tokenizer)) >= found and len(lengths) == sentences


def test_one_word_for_one_pair_of_segmentations(families, tmp_path):
    _, words = surfaces(tmp_path / "a", "The the THE", families["bert"], families["bert"])
    assert words.words == ["The"] and words.counts.tolist() == [3]
    _, words = surfaces(tmp_path / "b", "The the THE", families["bert"], families["bert-cased"])
    assert words.words == ["The", "the", "THE"]


def test_text_that_one_side_removes_is_kept_for_the_other(families, tmp_path):
    found, words = surfaces(tmp_path, "a   b \x01 c", families["roberta"], families["bert"])
    empty = np.flatnonzero(np.diff(words.student_offsets) == 0)
    assert [words.words[w] for w in empty] == ["  ", "\x01"]
    assert (np.diff(words.teacher_offsets) > 0).all()


def test_ends_of_sentences_and_meta(families, tmp_path):
    _, words, _ = encode(tmp_path, ["So? yes... 3.5! 日本語。 a.b,"], families["roberta"], families["bert"])
    ends = {w for w, end in zip(words.words, words.ends_sentence, strict=True) if end}
    assert ends == {"?", "...", "!", "。", "."}
    assert words.meta["student"]["special"] == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert words.meta["teacher"]["special"] == {"pad": 1, "unk": 3, "cls": 0, "sep": 2, "mask": 4}
    assert (words.meta["teacher"]["size"], words.meta["teacher"]["family"]) == (330, "byte-level")


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_files_do_not_depend_on_processes_blocks_or_cache(families, family, tmp_path, lines, monkeypatch):
    lines = [line.upper() if i % 7 == 3 else line for i, line in enumerate([*lines, *ENGLISH])]
    blocks = [lines[i : i + 30] for i in range(0, len(lines), 30)]
    encode_corpus(blocks, families[family], families["bert"], tmp_path / "one")
    encode_corpus(blocks, families[family], families["bert"], tmp_path / "two", processes=2)
    encode_corpus([lines], families[family], families["bert"], tmp_path / "whole")
    monkeypatch.setattr(lexicon, "CACHED_CHUNKS", 20)
    monkeypatch.setattr(lexicon, "CACHED_CHARACTERS", 5)
    progress = []
    encode_corpus(blocks, families[family], families["bert"], tmp_path / "small", progress=progress.append)
    assert sum(progress) == json.loads((tmp_path / "one" / "meta.json").read_text())["words"]
    for file in sorted((tmp_path / "one").iterdir()):
        for other in ("two", "whole", "small"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), (file.name, other)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-r"])
def test_a_very_long_chunk_is_exact_and_not_cached(families, family):
    line = "catat" * 20_000
    encoder = lexicon._Encoder(*(families[name] / "tokenizer.json" for name in (family, "bert")))
    encoder.encode(["the " + line, line + " the"])
    assert max(map(len, encoder.cache)) <= 4
    _, _, word_ids, _ = encoder.encode([line])
    words = [pieces_of(key) for key in encoder.words]
    assert [p for w in word_ids for p in words[w][0]] == whole_line_ids(families[family], line)


def test_the_corpus_is_read_no_faster_than_it_is_encoded(families, tmp_path):
    """Workers may run ahead by a few blocks; a pool's map would read the whole corpus into memory."""
    read = written = furthest = 0

    def blocks():
        nonlocal read, furthest
        for _ in range(60):
            read += 1
            furthest = max(furthest, read - written)
            yield ENGLISH

    def progress(words):
        nonlocal written
        written += 1

    encode_corpus(blocks(), families["bert"], families["bert"], tmp_path, processes=2, progress=progress)
    assert written == 60 and furthest <= 8


def refuse(tmp_path, change):
    """check_family's message for a byte-level tokenizer changed by `change(tokenizer)`."""
    tmp_path.mkdir(exist_ok=True)
    folder = roberta(tmp_path / "changed", add_prefix_space=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError) as error:
        check_family(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("pre_tokenizer", pre_tokenizers.Split("", "isolated"), "Split"),  # one character at a time
        ("pre_tokenizer", pre_tokenizers.UnicodeScripts(), "UnicodeScripts"),
        ("pre_tokenizer", pre_tokenizers.Metaspace(split=False), "whole sentences"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False), "whole sentences"),
        ("pre_tokenizer", pre_tokenizers.Punctuation(), "whole sentences"),
        ("normalizer", normalizers.Prepend("▁"), "Prepend"),
        ("normalizer", normalizers.Replace(Regex("a b"), "c"), "Replace"),
        ("normalizer", normalizers.Replace(". ", "c"), "Replace"),
        ("normalizer", normalizers.Strip(left=True), "beside it"),
        ("model", models.BPE(dropout=0.1), "samples"),
    ],
)
def test_tokenizers_that_cannot_be_exact_are_refused_by_name(tmp_path, attribute, value, reason):
    assert reason in refuse(tmp_path, lambda tokenizer: setattr(tokenizer, attribute, value))


def test_added_tokens_that_reach_across_spaces_are_refused(tmp_path):
    assert "'new york'" in refuse(tmp_path / "a", lambda tokenizer: tokenizer.add_tokens(["new york"]))
    greedy = AddedToken("new", rstrip=True, single_word=True)
    assert "'new'" in refuse(tmp_path / "b", lambda tokenizer: tokenizer.add_tokens([greedy]))


def test_other_added_tokens_are_exact(families, tmp_path):
    for name in ("bert", "xlm-r"):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = Tokenizer.from_file(str(families[name] / "tokenizer.json"))
        tokenizer.add_tokens(["c++", AddedToken("left", lstrip=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        line = "the c++ cat  left. xc++y  c++"
        _, words, stream = encode(folder / "out", [line], folder, families["bert"])
        assert line_ids(words, stream, 0, "teacher") == whole_line_ids(folder, line)


def test_families_by_name(families):
    names = {family: check_family(folder) for family, folder in families.items()}
    assert names["bert"] == "wordpiece" and names["roberta"] == "byte-level"
    assert names["albert"] == names["deberta-v3"] == "metaspace"


def test_bad_input_is_one_sentence(families, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no tokenizer.json and no vocab.txt"):
        encode_corpus([ENGLISH], tmp_path / "empty", families["bert"], tmp_path / "out")
    (tmp_path / "empty/tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer.json is not"):
        check_family(tmp_path / "empty")
    with pytest.raises(InputError, match="WordPiece"):
        encode_corpus([ENGLISH], families["bert"], families["roberta"], tmp_path / "out")
    for nothing in ([], [[]], [["", "  "]]):
        with pytest.raises(InputError, match="no words"):
            encode_corpus(nothing, families["bert"], families["bert"], tmp_path / "out")
    with pytest.raises(InputError, match="meta.json is missing: run the stage that writes it"):
        Lexicon.load(tmp_path / "out")
    monkeypatch.setattr(lexicon._Encoder, "safe", lambda self, character: True)
    with pytest.raises(InputError, match=r"(?s)albert-converted.*'a\\u200b b'"):  # the check on the corpus itself
        monkeypatch.setattr(lexicon, "EDGES", ())
        teacher = families["albert-converted"]
        encode_corpus([["the", "a\u200b b"]], teacher, families["bert"], tmp_path / "out")


@pytest.mark.parametrize("role", ["cls", "sep", "pad", "mask"])
def test_a_tokenizer_without_a_special_token_is_refused(families, tmp_path, role):
    content = (families["bert"] / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(content.replace(f"[{role.upper()}]", "[X]"), encoding="utf-8")
    with pytest.raises(InputError, match=f"the tokenizer has no {role} token: add one to tokenizer.json"):
        encode_corpus([ENGLISH], tmp_path, families["bert"], tmp_path / "out")


def test_a_mixture_of_two_runs_does_not_load_and_what_was_loaded_stays(families, tmp_path):
    totals, words, stream = encode(tmp_path, ENGLISH, families["bert"], families["bert"])

    def blocks():
        yield ["other words"]
        raise OSError("the machine went down")

    with pytest.raises(OSError, match="went down"):
        encode_corpus(blocks(), families["bert"], families["bert"], tmp_path)
    assert len(stream.word_ids) == totals["words"] and int(stream.word_ids.max()) < len(words.counts)
    with pytest.raises(InputError, match="meta.json is missing: run the stage that writes it"):
        Lexicon.load(tmp_path)
