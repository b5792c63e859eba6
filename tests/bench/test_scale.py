"""The measurements of growth: on a tiny text they run to their end, and the tables say what was measured."""

import json
import sys
from pathlib import Path

import pytest
from bench import scale

ROOT = Path(__file__).parents[2]


def test_a_short_corpus_is_read_again_and_every_text_begins_alike(corpus_file, tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    words = len(corpus_file.read_text().split())
    found = scale.write_texts(
        [str(corpus_file)], {short: ("words", 100), long: ("bytes", 1.5 * corpus_file.stat().st_size)}
    )
    assert found["short"]["times_read"] == 1 and 100 <= found["short"]["words"] < 130
    assert found["long"]["times_read"] == 2 and words < found["long"]["words"] < 2 * words
    assert long.read_text().startswith(short.read_text()) and long.read_text().startswith(corpus_file.read_text())
    assert found["long"]["bytes"] == long.stat().st_size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_the_stages_are_measured(corpus_file, tiny_teacher, tmp_path, monkeypatch):
    sizes, rows = [400, 2000], {}
    monkeypatch.setattr(scale, "done_before", lambda run, names: None)  # they are, in this order
    texts = scale.write_texts([str(corpus_file)], {tmp_path / f"text-{n}.txt": ("words", n) for n in sizes})
    for name in scale.STAGES:
        for words in map(str, sizes):
            where = tmp_path, str(tiny_teacher), scale.text_of(name, words, sizes)
            rows.setdefault(name, {})[words] = scale.part(name, words, *where, 1)
            assert rows[name][words]["seconds"] > 0 and rows[name][words]["peak_mb"] > 0
    assert rows["count"]["400"]["words"] < rows["count"]["2000"]["words"] == rows["encode"]["2000"]["words"]
    text = scale.tables({"rows": rows, "texts": texts, "words": sizes, "device": "this one"})
    assert "this one" in text and "| `encode` | 2,000 | " in text and "| `vectors` | 10^3 | TODO" in text


def test_slopes_are_exponents_and_what_is_missing_is_said():
    row = {"seconds": 2.0, "peak_mb": 100.0, "start_mb": 90.0, "disk_mb": 4.0, "distinct_words": 50, "words": 1000}
    more = row | {"seconds": 20.0, "peak_mb": 190.0, "disk_mb": 40.0, "distinct_words": 158}
    found = {"rows": {"encode": {"1000": row, "10000": more}}, "words": [1000, 10000]}
    text = scale.tables(found)
    assert "| `encode` | 1.00 | 0.50 | 10,000.00 | 4,000.00 |" in text
    assert "| `count` | TODO | TODO | TODO | TODO |" in text
    assert "| `encode` | 555,556 | 555.56 | 4,000.00 |" in text
    assert "| `encode` | TODO | TODO | TODO | 4,000.00 |" in scale.tables(found | {"words": [10000]})
    found["rows"]["encode"]["10000"] = more | {"seconds": None}
    assert "| `encode` | TODO | 0.50 |" in scale.tables(found)


def test_the_document_has_the_figures_of_today():
    stored, document = ROOT / "artifacts/bench/scale.json", (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    found = json.loads(stored.read_text()) if stored.is_file() else {}
    assert f"{scale.BEGIN}\n{scale.tables(found)}\n{scale.END}" in document
