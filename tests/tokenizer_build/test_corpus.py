"""The corpus stream: every format gives the same lines, and every bad file a sentence that names it."""

import bz2
import gzip
import json
import lzma
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from tokenizer_build import corpus
from tokenizer_build.corpus import check_sources, read_blocks, read_lines
from tokenizer_build.errors import InputError

DOCUMENTS = ["One line.\nAnd another, naïve one.", "", "  \n", 'With a "quote", a comma\nand 漢字']
LINES = ["One line.", "And another, naïve one.", 'With a "quote", a comma', "and 漢字"]


def write(path, documents=DOCUMENTS, column="text"):
    name = path.name
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)
        return path
    if ".jsonl" in name:
        text = "".join(json.dumps({column: document, "n": 1}) + "\n" for document in documents)
    elif ".csv" in name:
        rows = ('"' + document.replace('"', '""') + '",1\n' for document in documents)
        text = f"{column},n\n" + "".join(rows)
    else:
        text = "\n".join(documents)
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    if path.suffix in (".zst", ".lz4"):
        with pyarrow.output_stream(str(path), compression={".zst": "zstd", ".lz4": "lz4"}[path.suffix]) as file:
            file.write(text.encode())
    else:
        path.write_bytes(compress(text.encode()))
    return path


NAMES = [
    "a.txt",
    "a.jsonl",
    "a.csv",
    "a.parquet",
    "a.unknown",
    "a.txt.gz",
    "a.txt.zst",
    "a.jsonl.bz2",
    "a.csv.xz",
    "a.jsonl.lz4",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_lines(name, tmp_path):
    assert list(read_lines([write(tmp_path / name)])) == LINES


def test_folders_are_sorted_and_skip_what_is_no_corpus(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "below" / "b.txt", ["second"])
    write(tmp_path / "a.jsonl", ["first"])
    write(tmp_path / ".hidden" / "c.txt", ["never"])
    (tmp_path / "image.png").write_bytes(b"\0\1")
    assert list(read_lines([tmp_path])) == ["first", "second"]
    assert list(read_lines([f"{tmp_path}/**/*.txt"])) == ["second"]
    assert list(read_lines(str(tmp_path))) == ["first", "second"]


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [line.strip() for line in read_lines([path])] == ["one", "two"]


def test_lines_do_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    text = "".join(f"line {n} naïve 漢字\n" for n in range(200))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for chunk in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(corpus, "CHUNK", chunk)
        assert "".join(f"{line}\n" for line in read_lines([tmp_path / "a.txt"])) == text


def test_blocks_hold_the_lines_in_order(tmp_path):
    path = write(tmp_path / "a.txt", [f"{n:09d}" for n in range(100)])
    blocks = list(read_blocks([path], length=100))
    assert [len(block) for block in blocks] == [12] * 8 + [4]
    assert [line for block in blocks for line in block] == list(read_lines([path]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_long_lines_are_cut_at_white_space(name, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 100)
    monkeypatch.setattr(corpus, "CHUNK", 64)
    text = "some words\tof a very long line " * 100
    lines = list(read_lines([write(tmp_path / name, [text])]))
    assert max(map(len, lines)) <= 100 < len(text)
    assert " ".join(lines).split() == text.split()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", ["汉字也要读", "ฉันชอบกินข้าวผัดน้ำ"], ids=["chinese", "thai"])
def test_scripts_without_spaces_are_cut_between_characters(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 1000)
    monkeypatch.setattr(corpus, "CHUNK", 64)
    lines = list(read_lines([write(tmp_path / name, [text * 1000])]))
    assert "".join(lines) == text * 1000 and 5 <= len(lines) < 50
    assert not any(unicodedata.category(line[0])[0] == "M" for line in lines)  # a vowel sign stays with its letter


def test_tables_of_any_dialect_lose_no_row(tmp_path):
    def rows(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return list(read_lines([tmp_path / name]))

    assert rows("a.tsv", 'text\tn\n"Great movie\t1\nfine\t0\nlast"\t2\n') == ['"Great movie', "fine", 'last"']
    assert rows("b.tsv", 'n\t"text"\n1\t"say ""so"""\n2\t"a" and "b"\n') == ['say "so"', '"a" and "b"']
    assert rows("a.csv", 'text;n\n"a; b, c";1\nd, e;2\n') == ["a; b, c", "d, e"]
    assert rows("a.json", '\n[{"text": "a"},\n {"text": "b"}]\n'[1:]) == ["a", "b"]
    refused("c.csv: row 2 has 3 cells, the header 2: quote", write_raw(tmp_path / "c.csv", "text,n\na, b,1\n"))
    refused("d.csv: the header names a column twice: text, text", write_raw(tmp_path / "d.csv", "text,text\na,b\n"))
    refused("e.tsv: row 3 has 1 cells, the header 2", write_raw(tmp_path / "e.tsv", 'text\tn\na\t1\n"b\nc"\t2\n'))
    refused("f.json: row 2 is not a JSON object", write_raw(tmp_path / "f.json", '[{"text": "a"}, "b"]'))


def write_raw(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_home_and_heads(tmp_path, monkeypatch):
    """`~` is the home folder; `check_sources` reads the head of every file and no more."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl")
    assert list(read_lines(["~/a.jsonl"])) == list(read_lines(["~/*.jsonl"])) == LINES
    write_raw(tmp_path / "late.jsonl", '{"text": "a"}\n{"body": "b"}\n')
    check_sources(["~/a.jsonl", tmp_path / "late.jsonl", "datasets:wiki:train"])
    write_raw(tmp_path / "z.jsonl", '{"body": "b"}\n')
    with pytest.raises(InputError, match=r"z.jsonl: row 1 has no column 'text'"):
        check_sources(["~"])
    pointer = write_raw(tmp_path / "a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("a.txt is a Git LFS pointer", pointer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_fifty_megabytes_without_a_space_are_refused(name, tmp_path):
    path = write(tmp_path / name, ["fine", "x" * 50_000_000])
    with pytest.raises(InputError, match=r"a\.\w+: .*without white space"):
        list(read_lines([path]))


def test_endless_text_is_refused_before_it_is_read(tmp_path, monkeypatch):
    reads = []

    class Endless:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, size):
            reads.append(size)
            return b"x" * size

        readline = read

    monkeypatch.setattr(corpus, "_open", lambda path, compression: Endless())
    with pytest.raises(InputError, match="without white space"):
        list(read_lines([write(tmp_path / "a.txt", ["x"])]))
    assert sum(reads) < 8_000_000


def refused(match, *sources, column="text"):
    with pytest.raises(InputError, match=match):
        list(read_lines(sources, column))


def test_bad_files_are_named_with_the_place(tmp_path):
    def file(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    refused("no text in .*empty.txt", file("empty.txt", b""))
    refused("no text in .*blank.txt", file("blank.txt", b" \n\n\t\n"))
    refused("no text in an empty list")
    refused(r"binary.txt: not UTF-8 text at byte 3 \(0x00\)", file("binary.txt", b"\x7fEL\0\0\0" * 99))
    refused(r"utf16.txt: not UTF-8", file("utf16.txt", "text\n".encode("utf-16")))
    refused(r"latin.txt: not UTF-8 text at byte 7 \(0xef\): .*iconv", file("latin.txt", b"line\nna\xefve\n"))
    refused(r"bom.txt: not UTF-8 text at byte 5 ", file("bom.txt", b"\xef\xbb\xbfab\xff"))
    refused(r"late.txt: not UTF-8 text at byte 2000000", file("late.txt", b"ab\n" * 666_666 + b"ab\xff\n"))
    refused(r"bad.jsonl: row 2 is not a JSON object \(.*column 13", file("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n'))
    refused(r"list.jsonl: row 1 is not a JSON object", file("list.jsonl", b'["a"]\n'))
    refused(r"number.jsonl: row 2: 1 is no text", file("number.jsonl", b'\n{"text": 1}\n'))
    refused(
        r"half.jsonl: row 1 is not a JSON object \(.*surrogates not allowed",
        file("half.jsonl", b'{"text": "a\\ud800"}\n'),
    )
    refused(r"nul.jsonl: not UTF-8 text at byte 15 \(0x00\)", file("nul.jsonl", b'{"text": "a"}\n\n\0'))
    refused(r"quote.csv cannot be read after row 2 \(.*expected after", file("quote.csv", b'text,n\na,1\n"a"b,1\n'))
    refused(r"torn.parquet .*parquet", file("torn.parquet", b"PAR1 no parquet"))
    refused(r"torn.txt.gz cannot be read", file("torn.txt.gz", gzip.compress(b"text\n" * 999)[:-9]))
    refused(r"false.txt.gz cannot be read", file("false.txt.gz", b"no gzip at all"))
    refused(r"absent.txt: no such file", tmp_path / "absent.txt")
    (tmp_path / "folder").mkdir()
    refused("folder: no such file, and no folder or glob with files of text", tmp_path / "folder")
    refused("write datasets:NAME:SPLIT", "datasets:name")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_missing_column_lists_those_there_are(name, tmp_path):
    refused("has no column 'body': choose one of text", write(tmp_path / name), column="body")
    assert list(read_lines([write(tmp_path / f"b{name}", column="body")], "body")) == LINES


def test_hub_data_sets_are_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return [{"text": document} for document in DOCUMENTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_lines(["datasets:wiki:en:train"])) == LINES
    assert asked == [(("wiki", "en"), {"split": "train", "streaming": True})]
    refused("has no column 'body'", "datasets:wiki:train", column="body")
