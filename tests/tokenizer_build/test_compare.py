"""The comparison against figures worked out by hand, for tokenizers of three families; the command line."""

from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenizer_build.__main__ import main
from tokenizer_build.compare import compare, markdown
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import SPECIAL_TOKENS, load_tokenizer, make_tokenizer, save_tokenizer

COUNTS = {"ab": 6, "abc": 3, "x": 1}


@pytest.fixture
def folders(tmp_path):
    save_tokenizer(make_tokenizer([*SPECIAL_TOKENS, "a", "b", "ab", "##b", "##c"]), tmp_path / "first")
    save_tokenizer(make_tokenizer([*SPECIAL_TOKENS, "a", "##b", "##c", "x"]), tmp_path / "second")
    return {"first": tmp_path / "first", "second": tmp_path / "second" / "tokenizer.json"}


def loaded(folders):
    return {name: load_tokenizer(path) for name, path in folders.items()}


def test_measures_are_what_they_say(folders):
    measured = compare(COUNTS, loaded(folders))
    assert measured["first"] == {
        "size": 10,
        "pieces_per_word": (6 + 3 * 2 + 1) / 10,
        "coverage": 0.6,
        "unknown_rate": 0.1,
        "overlap_with_first": 1.0,
    }
    assert measured["second"] == {
        "size": 9,
        "pieces_per_word": (6 * 2 + 3 * 3 + 1) / 10,
        "coverage": 0.1,
        "unknown_rate": 0.0,
        "overlap_with_first": 0.75,
    }
    lines = markdown(measured).splitlines()
    assert len(lines) == 4 and len(set(map(len, lines))) == 1
    assert " ".join(lines[2].split()) == "| first | 10 | 1.3000 | 60.00% | 10.00% | 100.00% |"


def test_other_families_are_measured_too(folders):
    byte_level = Tokenizer(
        models.BPE(
            {"a": 0, "b": 1, "c": 2, "x": 3, "Ġ": 4, "Ġa": 5, "Ġab": 6, "Ġx": 7}, [("Ġ", "a"), ("Ġa", "b"), ("Ġ", "x")]
        )
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁ab", -1.0), ("c", -2.0), ("▁", -3.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    measured = compare(COUNTS, {**loaded(folders), "bytes": byte_level, "unigram": unigram})
    assert measured["bytes"]["pieces_per_word"] == 1.3 and measured["bytes"]["coverage"] == 0.7
    assert measured["bytes"]["unknown_rate"] == 0.0
    assert measured["bytes"]["overlap_with_first"] == pytest.approx(4 / 7)  # a, ab, ##b, ##c of 7 less Ġ
    assert measured["unigram"]["unknown_rate"] == 0.1 and measured["unigram"]["coverage"] == 0.6


def test_nothing_to_compare_is_refused(folders):
    with pytest.raises(InputError, match="nothing to compare"):
        compare({}, loaded(folders))
    with pytest.raises(InputError, match="nothing to compare"):
        compare(COUNTS, {})


@pytest.fixture
def run(in_process):
    return partial(in_process, main)


def test_the_command_line_counts_trains_and_compares(run, corpus_file, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Zugzwang\n")
    counted = run("count", corpus_file, "-o", tmp_path / "counts.parquet", "--processes", 1)
    assert counted.returncode == 0 and "distinct" in counted.stdout
    first, again = (
        run("train", tmp_path / "counts.parquet", "-o", tmp_path / name, "--size", 150, "--require", words)
        for name in "ab"
    )
    assert first.returncode == again.returncode == 0 and "| pieces |" in first.stdout
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert "zugzwang" in (tmp_path / "a" / "vocab.txt").read_text().split("\n")
    compared = run("compare", tmp_path / "counts.parquet", tmp_path / "a", tmp_path / "b")
    assert compared.returncode == 0 and compared.stdout.count("100.00%") == 2


def test_the_command_line_explains_itself(run, corpus_file, tmp_path):
    assert all(command in run("--help").stdout for command in ("count", "train", "compare"))
    words, counts = tmp_path / "words.txt", tmp_path / "counts.parquet"
    words.write_text("two words\n")
    assert run("count", corpus_file, "-o", counts, "--cased", "--processes", 1).returncode == 0
    for arguments, sentence in (
        (["count", tmp_path / "absent.txt"], "absent.txt: no such file"),
        (["train", corpus_file], "holds no word counts or is missing: run `tokenizer_build count`"),
        (["train", counts], "was counted with --cased: give --cased here too"),
        (["train", counts, "--cased", "--size", 10], "allow at least"),
        (["train", counts, "--trainer", "best"], "there is no trainer 'best'"),
        (["train", counts, "--cased", "--require", words], "'two words' is 2 words"),
    ):
        out = run(*arguments, "-o", tmp_path / "out.parquet")
        assert out.returncode == 2 and out.stdout == "" and "Traceback" not in out.stderr
        assert out.stderr.startswith("error: ") and sentence in out.stderr
