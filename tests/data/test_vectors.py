"""Sentences are drawn evenly and never from held-out lines; vectors survive a kill and join into one teacher."""

import json

import numpy as np
import pytest

from tokenizer_build.errors import InputError
from vocabshrink.data.vectors import (
    BLOCK,
    StoredVectors,
    draw_sentences,
    read_sentences,
    store_vectors,
    write_sentences,
)
from vocabshrink.run.recipe import CorpusSection, VectorsStage


def corpus_of(tmp_path, **files: list[str]) -> CorpusSection:
    for name, lines in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CorpusSection(sources=[str(tmp_path / f"{name}.txt") for name in files], held_out_every=10)


def test_each_source_gives_its_share_and_held_out_lines_nothing(tmp_path):
    corpus = corpus_of(tmp_path, a=[f"alpha {i} is here." for i in range(995)], b=[f"beta {i}." for i in range(100)])
    drawn = draw_sentences(corpus, VectorsStage(sentences=100, shares=[1, 3]), seed=1)
    assert len(drawn) == len(set(drawn)) == 100
    assert sum(text.startswith("alpha") for text in drawn) == 25
    held_out = {f"alpha {i} is here." for i in range(9, 995, 10)} | {f"beta {i}." for i in range(4, 100, 10)}
    everything = draw_sentences(corpus, VectorsStage(sentences=10_000), seed=1)
    assert len(everything) == 1095 - 109 and not held_out & set(everything)
    numbers = [int(text.split()[1]) for text in drawn if text.startswith("alpha")]
    assert max(numbers) > 700 and min(numbers) < 300  # from all of the source, not its head
    assert drawn == draw_sentences(corpus, VectorsStage(sentences=100, shares=[1, 3]), seed=1)
    assert drawn != draw_sentences(corpus, VectorsStage(sentences=100, shares=[1, 3]), seed=2)


def test_a_line_is_cut_into_its_sentences(tmp_path):
    line = 'He said "No." She left! 1.5 of 3. 今日は晴れ。明日は雨。 — ... x'
    corpus = corpus_of(tmp_path, a=[line, line, "", "12 34", "w" * 700])
    assert sorted(draw_sentences(corpus, VectorsStage(), seed=0)) == sorted(
        ['He said "No."', "She left!", "1.5 of 3.", "今日は晴れ。", "明日は雨。"]
    )
    assert draw_sentences(corpus_of(tmp_path, a=[line, "Two. Lines."]), VectorsStage(unit="line"), seed=0)[0] in (
        line,
        "Two. Lines.",
    )


def test_a_corpus_without_sentences_is_refused(tmp_path):
    with pytest.raises(InputError, match="corpus: no sentence to take vectors of"):
        draw_sentences(corpus_of(tmp_path, a=["12", "--"]), VectorsStage(), seed=0)


def test_sentences_come_back_as_they_were(tmp_path):
    sentences = ["a\u2028b", 'c "d"\t\\', "émile ", "\u200d"]
    write_sentences(tmp_path, sentences)
    assert read_sentences(tmp_path) == sentences


def embed(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), ord(text[0]), 1.0] for text in texts], np.float32)


def test_a_killed_run_goes_on_with_the_block_that_it_was_at(tmp_path):
    sentences, calls = [chr(97 + i % 26) * (1 + i % 7) for i in range(2 * BLOCK + 5)], []

    def dying(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(texts)

    seen = []

    def saying(done: int):
        seen.append(done)
        return seen.append

    with pytest.raises(KeyboardInterrupt):
        store_vectors(tmp_path, "t", sentences, dying, saying)
    store_vectors(tmp_path, "t", sentences, dying, saying)
    assert calls == [BLOCK, BLOCK, BLOCK, 5] and seen == [0, BLOCK, BLOCK, BLOCK, 5]
    assert json.loads((tmp_path / "t.json").read_text())["done"] == len(sentences)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), embed(sentences).astype(np.float16))


def test_products_of_joined_vectors_are_the_weighted_mean_of_the_teachers_cosines(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, 6)), rng.normal(size=(9, 4)) + 5
    for name, vectors in {"first": first, "second": second}.items():
        np.save(tmp_path / f"{name}.npy", vectors.astype(np.float16))
    stored = StoredVectors.load(tmp_path, {"first": 3.0, "second": 1.0}, centered={"second"})
    rows = stored.rows(np.array([4, 0, 7]))
    assert rows.shape == (3, 10) and rows.dtype == np.float32 and len(stored.arrays[0]) == 9
    np.testing.assert_allclose((rows**2).sum(1), 1, atol=1e-6)

    def cosines(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return (unit @ unit.T)[np.ix_([4, 0, 7], [4, 0, 7])]

    expected = 0.75 * cosines(first) + 0.25 * cosines(second - second.mean(0))
    np.testing.assert_allclose(rows @ rows.T, expected, atol=2e-3)  # float16
