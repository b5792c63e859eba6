"""Word counts equal those of tokenizers' own BertNormalizer + BertPreTokenizer, on anything, in any number of
processes."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.normalizers import NFC, NFKC, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from tokenizer_build.__main__ import app
from tokenizer_build.count import count_block, count_words, fold, map_in_order, read_counts, write_counts
from tokenizer_build.errors import InputError

ODD = (
    "aZ9 é e\u0301\u0323 İıßſΣς \t\n\r\x0b\x0c\x1c\x1f\x00\x7f\x85\xa0\xad\u200b\u2028\u3000\ufeff\ufffd"
    "漢字가각 ,.!_-'ﬁ①²[MASK]"
)
TEXT = st.text(st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8")), max_size=80)


def reference(text: str, lowercase: bool, form: str | None = None) -> Counter:
    normal = {None: lambda text: text, "NFC": NFC().normalize_str, "NFKC": NFKC().normalize_str}[form](text)
    normal = BertNormalizer(lowercase=lowercase).normalize_str(normal)
    return Counter(word for word, _ in BertPreTokenizer().pre_tokenize_str(normal))


@given(st.lists(TEXT, max_size=6), st.booleans(), st.sampled_from([None, "NFC", "NFKC"]))
@example([ODD, "a\x1cb\x85c\x0bd"], True, None)
@example([ODD, "x \u0301y ｶﾞ ﷺ a\u00a8"], False, "NFKC")
@example(["[MASK] [CLS]the[SEP] ##ing"], True, None)
@example(["e", "\u0301x"], True, "NFC")
def test_counts_equal_the_tokenizers_on_arbitrary_text(lines, lowercase, form):
    assert count_block(lines, lowercase, form) == reference("\n".join(lines), lowercase, form)


@pytest.mark.parametrize("lowercase, form", [(True, None), (False, "NFKC")])
def test_every_character_is_treated_as_the_tokenizer_treats_it(lowercase, form):
    for start in range(0, 0x30000, 0x1000):
        characters = [chr(c) for c in range(start, start + 0x1000) if not 0xD800 <= c < 0xE000]
        text = " ".join(f"a{c}b {c}" for c in characters)
        assert count_block([text], lowercase, form) == reference(text, lowercase, form)


def test_counts_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    lines = [f"Word{n % 701} naïve, {n % 13}\n" for n in range(400_000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines), encoding="utf-8")
    seen = []
    one = count_words([path], progress=seen.append, maximum=500)
    assert len(seen) > 1 and sum(seen) == 4 * len(lines)
    two = count_words([path], processes=2, maximum=500)
    assert list(one.items()) == list(two.items())
    assert one[","] == len(lines) and len(one) <= 500
    assert count_words([path])["naive"] == count_words([path], lowercase=False)["naïve"] == len(lines)


def triple(item: int) -> tuple[int, int]:
    return 3 * item, os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_the_stream_is_read_as_needed(processes):
    read = []

    def items():
        for item in range(50):
            read.append(item)
            yield item

    results = map_in_order(triple, items(), processes)
    first = next(results)
    assert first[0] == 0 and len(read) <= 2 * processes
    rest = [first, *results]
    assert [result[0] for result in rest] == [3 * item for item in range(50)]
    assert (os.getpid() in {result[1] for result in rest}) == (processes == 1)
    assert list(map_in_order(triple, [], processes)) == []


def test_beyond_the_maximum_the_rarest_words_go():
    counts = Counter({"often": 9, "twice": 2, "once": 1})
    fold(counts, {"often": 1, "new": 1}, maximum=3)
    assert counts == {"often": 10}
    counts = Counter({"often": 9, "twice": 2, "once": 1})
    fold(counts, {"once": 1}, maximum=3)
    assert counts == {"often": 9, "twice": 2, "once": 2}


def test_counts_file_is_sorted_and_the_same_every_time(tmp_path):
    counts = Counter({"b": 2, "a": 2, "naïve": 7, "z": 1})
    write_counts(counts, tmp_path / "new" / "counts.parquet")
    write_counts(dict(reversed(counts.items())), tmp_path / "again.parquet")
    read = read_counts(tmp_path / "new" / "counts.parquet")
    assert list(read.items()) == [("naïve", 7), ("a", 2), ("b", 2), ("z", 1)]
    assert (tmp_path / "new" / "counts.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.parquet", "new"]


def test_counts_of_parts_add_up_to_those_of_the_whole(lines, tmp_path):
    """Wherever the parts were counted, and in whatever order they are named."""
    for name, part in {"whole": lines, "first": lines[:150], "second": lines[150:]}.items():
        write_counts(count_block(part), tmp_path / f"{name}.parquet")
    whole, *parts = (tmp_path / f"{name}.parquet" for name in ("whole", "second", "first"))
    assert read_counts(*parts) == read_counts(whole)
    for name, files in {"of_whole": [whole], "of_parts": parts}.items():
        arguments = ["train", *map(str, files), "-o", str(tmp_path / name), "--size", "150"]
        app(arguments, standalone_mode=False)
    assert (tmp_path / "of_parts/vocab.txt").read_text() == (tmp_path / "of_whole/vocab.txt").read_text()


def test_what_holds_no_counts_is_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    for name in ("text.parquet", "absent.parquet"):
        with pytest.raises(InputError, match=f"{name} holds no word counts"):
            read_counts(tmp_path / name)


def test_counting_and_training_import_no_torch(corpus_file, tmp_path):
    program = f"""
import sys
from tokenizer_build.__main__ import app
counts = {str(tmp_path / "counts.parquet")!r}
app(["count", {str(corpus_file)!r}, "-o", counts, "--processes", "1"], standalone_mode=False)
app(["train", counts, "-o", {str(tmp_path)!r}, "--size", "200"], standalone_mode=False)
print(sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
