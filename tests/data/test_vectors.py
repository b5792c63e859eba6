"""Sentences are drawn evenly and never from held-out lines; vectors survive a kill and join into one teacher."""

import json

import numpy as np
import pytest

from tokenizer_build.corpus import read_parallel
from tokenizer_build.errors import InputError
from vocabshrink.data.batches import repeated
from vocabshrink.data.vectors import BLOCK, Sentences, draw_sentences, store_vectors, stored_vectors
from vocabshrink.run.recipe import CorpusSection, VectorsStage


def corpus_of(tmp_path, **files: list[str]) -> CorpusSection:
    for name, lines in files.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CorpusSection(sources=[str(tmp_path / f"{name}.txt") for name in files], held_out_every=10)


def texts_of(corpus: CorpusSection, seed: int = 1, **section) -> list[str]:
    return draw_sentences(corpus, VectorsStage(**section), seed).texts


def test_each_source_gives_its_share_and_held_out_lines_nothing(tmp_path):
    corpus = corpus_of(tmp_path, a=[f"alpha {i} is here." for i in range(995)], b=[f"beta {i}." for i in range(100)])
    drawn = texts_of(corpus, sentences=100, shares=[1, 3])
    assert len(drawn) == len(set(drawn)) == 100
    assert sum(text.startswith("alpha") for text in drawn) == 25
    held_out = {f"alpha {i} is here." for i in range(9, 995, 10)} | {f"beta {i}." for i in range(4, 100, 10)}
    everything = texts_of(corpus, sentences=10_000)
    assert len(everything) == 1095 - 109 and not held_out & set(everything)
    numbers = [int(text.split()[1]) for text in drawn if text.startswith("alpha")]
    assert max(numbers) > 700 and min(numbers) < 300  # from all of the source, not its head
    assert drawn == texts_of(corpus, sentences=100, shares=[1, 3])
    assert drawn != texts_of(corpus, seed=2, sentences=100, shares=[1, 3])


def test_a_line_is_cut_into_its_sentences(tmp_path):
    line = 'He said "No." She left! 1.5 of 3. 今日は晴れ。明日は雨。 — ... x'
    corpus = corpus_of(tmp_path, a=[line, line, "", "12 34", "w" * 700])
    assert sorted(texts_of(corpus)) == sorted(['He said "No."', "She left!", "1.5 of 3.", "今日は晴れ。", "明日は雨。"])
    assert texts_of(corpus_of(tmp_path, a=[line, "Two. Lines."]), unit="line")[0] in (line, "Two. Lines.")


def test_a_corpus_without_sentences_is_refused(tmp_path):
    with pytest.raises(InputError, match="corpus: no sentence to take vectors of"):
        draw_sentences(corpus_of(tmp_path, a=["12", "--"]), VectorsStage(), seed=0)


def test_sentences_come_back_as_they_were(tmp_path):
    texts = ["a\u2028b", 'c "d"\t\\', "émile ", "\u200d"]
    Sentences(texts, np.array([0, 1, 2, 0]), np.array([1.0, 2.5, 1.0, 1.0])).save(tmp_path)
    found = Sentences.load(tmp_path)
    assert (found.texts, found.own, found.rows.tolist()) == (texts, texts[:3], [0, 1, 2, 0])
    assert found.times.tolist() == [1.0, 2.5, 1.0, 1.0]


def embed(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), ord(text[0]), 1.0] for text in texts], np.float32)


def test_a_killed_run_goes_on_with_the_block_that_it_was_at(tmp_path, capfd):
    sentences, calls = [chr(97 + i % 26) * (1 + i % 7) for i in range(2 * BLOCK + 5)], []

    def dying(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(texts)

    with pytest.raises(KeyboardInterrupt):
        store_vectors(tmp_path, "t", sentences, dying, "vectors of t")
    store_vectors(tmp_path, "t", sentences, dying, "vectors of t")
    assert calls == [BLOCK, BLOCK, BLOCK, 5]
    said, reached = capfd.readouterr().err.splitlines(), (BLOCK, 2 * BLOCK, len(sentences))
    starts = [f"vectors of t: {done:,} of {len(sentences):,}, " for done in reached]
    assert len(said) == 3 and all(map(str.startswith, said, starts))
    assert json.loads((tmp_path / "t.json").read_text())["done"] == len(sentences)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), embed(sentences).astype(np.float16))


def test_products_of_joined_vectors_are_the_weighted_mean_of_the_teachers_cosines(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, 6)), rng.normal(size=(9, 4)) + 5
    for name, vectors in {"first": first, "second": second}.items():
        np.save(tmp_path / f"{name}.npy", vectors.astype(np.float16))
    rows_of = stored_vectors(tmp_path, {"first": 3.0, "second": 1.0}, centered={"second"})
    rows = rows_of(np.array([4, 0, 7]))
    assert rows.shape == (3, 10) and rows.dtype == np.float32 and len(rows_of(slice(10))) == 9
    np.testing.assert_allclose((rows**2).sum(1), 1, atol=1e-6)

    def cosines(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return (unit @ unit.T)[np.ix_([4, 0, 7], [4, 0, 7])]

    expected = 0.75 * cosines(first) + 0.25 * cosines(second - second.mean(0))
    np.testing.assert_allclose(rows @ rows.T, expected, atol=2e-3)  # float16


def corpus_of_languages(tmp_path, alpha: float, **languages: list[str]) -> CorpusSection:
    files = {name: corpus_of(tmp_path, **{name: lines}).sources for name, lines in languages.items()}
    return CorpusSection(sources=[], languages=files, alpha=alpha, held_out_every=10)


def test_each_language_gives_the_share_of_its_size_to_the_power_alpha(tmp_path):
    lines = {"en": [f"alpha {i} is here." for i in range(900)], "de": [f"beta {i}." for i in range(100)]}
    for alpha, of_german in ((1.0, 12), (0.5, 30)):  # 810 and 90 lines to train on: a tenth, and a quarter
        drawn = draw_sentences(corpus_of_languages(tmp_path, alpha, **lines), VectorsStage(sentences=120), 1)
        assert len(drawn.texts) == len(set(drawn.texts)) == 120
        german = [text.startswith("beta") for text in drawn.texts]
        assert abs(sum(german) - of_german) <= 1 and max(drawn.times) < 1.1
    everything = draw_sentences(corpus_of_languages(tmp_path, 0.5, **lines), VectorsStage(sentences=600), 1)
    german = np.array([text.startswith("beta") for text in everything.texts])
    assert (german.sum(), (~german).sum()) == (90, 450)  # all the German there is, which is repeated instead
    rows = repeated(everything.times, seed=1)
    assert set(rows) == set(range(540)) and (~german[rows]).sum() == 450
    assert german[rows].sum() == pytest.approx(150, abs=12)


def test_translations_learn_the_vector_of_their_lines_first_sentence(tmp_path):
    (tmp_path / "pairs.tsv").write_text('Good day.\tGuten Tag.\tBonjour.\n\n"alpha 1"\talpha eins\n', encoding="utf-8")
    corpus = corpus_of(tmp_path, a=[f"alpha {i}" for i in range(9)])
    drawn = draw_sentences(corpus.model_copy(update={"parallel": [str(tmp_path / "pairs.tsv")]}), VectorsStage(), 0)
    assert drawn.own[-1] == "Good day." and sorted(drawn.own[:-1]) == [f"alpha {i}" for i in range(9)]
    assert drawn.texts[10:] == ["Guten Tag.", "Bonjour.", "alpha eins"]
    assert [drawn.texts[row] for row in drawn.rows[10:]] == ["Good day.", "Good day.", "alpha 1"]
    assert drawn.rows[:10].tolist() == list(range(10)) and set(drawn.times) == {1.0}


def test_a_line_without_a_translation_is_refused(tmp_path):
    (tmp_path / "pairs.tsv").write_text("Good day.\tGuten Tag.\nalone\t \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"pairs.tsv: line 2 has no translation: write SENTENCE tab TRANSLATION"):
        list(read_parallel([tmp_path / "pairs.tsv"]))
