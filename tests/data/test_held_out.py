"""Figures of agreement against scipy and brute force; embeddings that do not depend on their company."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.batches import Segments, cut_segments
from vocabshrink.data.held_out import HeldOut, held_out_texts, read_rated_pairs, spearman
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus
from vocabshrink.data.tasks import Rows
from vocabshrink.models.forward import ModuleSettings, torch_embedder


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class TestHeldOut:
    def test_rank_agreement_is_scipys(self):
        rng = np.random.default_rng(0)
        student, teacher = rng.normal(size=(40, 5)), rng.normal(size=(40, 7))
        teacher[:, :5] += student * 2
        pairs = np.array([(a, (a + k) % 40) for a in range(40) for k in (1, 7)])
        expected = spearmanr(*[[cosine(v[a], v[b]) for a, b in pairs] for v in (student, teacher)]).statistic
        found = HeldOut([""] * 40, pairs).rank_agreement(student, teacher)
        assert found == pytest.approx(expected) and 0.1 < found < 0.95

    def test_rank_agreement_of_a_model_with_itself_and_its_opposite(self):
        angles = np.array([0, 0.1, 0.4, 0.9, 1.5])
        vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
        held_out = HeldOut([""] * 5, np.array([[0, k] for k in range(1, 5)]))
        assert held_out.rank_agreement(vectors * 7, vectors) == 1  # lengths do not count
        reverse = vectors[[0, 4, 3, 2, 1]]
        assert held_out.rank_agreement(reverse, vectors) == -1

    @given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 10**6))
    @settings(max_examples=50)
    def test_neighbour_overlap_is_brute_force(self, count, top, seed):
        """Over every fourth text; the near ones between them do not count."""
        rng = np.random.default_rng(seed)
        student, teacher = rng.normal(size=(4 * count, 6)), rng.normal(size=(4 * count, 3))

        def named(vectors, i):
            others = [j for j in range(count) if j != i]
            return set(sorted(others, key=lambda j: -cosine(vectors[4 * i], vectors[4 * j]))[:top])

        expected = [len(named(student, i) & named(teacher, i)) / min(top, count - 1) for i in range(count)]
        held_out = HeldOut([""] * 4 * count, np.zeros((0, 2), int))
        assert held_out.neighbour_overlap(student, teacher, top) == {
            "neighbour_overlap": pytest.approx(np.mean(expected))
        }
        assert held_out.neighbour_overlap(student, student * 2, top)["neighbour_overlap"] == 1


class TestHeldOutTexts:
    @pytest.fixture(scope="class")
    def encoded(self, lines, tiny_teacher, tmp_path_factory):
        folder = tmp_path_factory.mktemp("encoded")
        encode_corpus([lines], tiny_teacher, tiny_teacher, folder)
        return Lexicon.load(folder), WordStream.load(folder)

    def cut(self, encoded, every: int):
        lexicon, stream = encoded
        return cut_segments(stream, lexicon, unit="sentence", max_pieces=126, min_words=4, held_out_every=every)[1]

    def test_are_sentences_and_their_near_ones(self, encoded, lines, tiny_teacher):
        lexicon, stream = encoded
        held_out = held_out_texts(stream, lexicon, load_tokenizer(tiny_teacher), self.cut(encoded, 5), 30, 1, {})
        assert len(held_out.texts) == 120 and held_out.pairs.shape == (120, 2)
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        known = {" ".join(tokenizer.tokenize(line)) for line in lines[4::5]}
        for text in held_out.texts[::4]:  # text that the tokenizer reads as it read the held-out line
            assert " ".join(tokenizer.tokenize(text)) in known
            assert 4 <= len(text.split()) <= 40
        assert all(text for text in held_out.texts)
        near, random = held_out.pairs[:90], held_out.pairs[90:]
        assert {tuple(p) for p in near} == {(4 * i, 4 * i + j) for i in range(30) for j in (1, 2, 3)}
        assert random[:, 0].tolist() == sorted(random[:, 1]) == list(range(0, 120, 4))

    def test_are_the_same_for_the_same_seed(self, encoded, tiny_teacher):
        lexicon, stream = encoded
        segments = self.cut(encoded, 5)
        tokenizer = load_tokenizer(tiny_teacher)
        first, again, other = (held_out_texts(stream, lexicon, tokenizer, segments, 25, seed, {}) for seed in (1, 1, 2))
        assert first.texts == again.texts and np.array_equal(first.pairs, again.pairs) and first.texts != other.texts

    def test_have_4_to_40_words(self, encoded, tiny_teacher):
        lexicon, stream = encoded
        starts = np.arange(0, len(stream.word_ids) - 50, 50)
        lengths = np.resize(np.array([3, 4, 40, 41], np.int32), len(starts))
        segments = Segments(starts, lengths, lengths)
        held_out = held_out_texts(stream, lexicon, load_tokenizer(tiny_teacher), segments, 1000, 1, {})
        assert {len(text.split()) for text in held_out.texts[::4]} == {4, 40}

    def test_too_few_are_refused(self, encoded, tiny_teacher):
        lexicon, stream = encoded
        with pytest.raises(InputError, match="only 10 sentences of 4 words or more, 20 are needed: give more text"):
            held_out_texts(stream, lexicon, load_tokenizer(tiny_teacher), self.cut(encoded, 40), 30, 1, {})

    def test_of_text_in_long_sentences_the_first_words_are_taken(self, encoded, tiny_teacher):
        lexicon, stream = encoded
        starts = np.arange(0, len(stream.word_ids) - 50, 50)
        long = Segments(starts, *np.full((2, len(starts)), 50))
        held_out = held_out_texts(stream, lexicon, load_tokenizer(tiny_teacher), long, 30, 1, {})
        assert {len(text.split()) for text in held_out.texts[::4]} == {40} and len(held_out.texts) == 120


class TestTorchEmbedder:
    @pytest.fixture(scope="class")
    def backbone(self, tiny_teacher):
        return AutoModel.from_pretrained(tiny_teacher, add_pooling_layer=False).eval()

    @pytest.fixture(scope="class")
    def texts(self, lines):
        return [*lines[:50], "", "kalo", *lines[50:70]]

    @pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("mean", False), ("cls", True)])
    def test_is_the_model_sentence_by_sentence(self, backbone, tiny_teacher, texts, pooling, normalize):
        """bfloat16 keeps eight bits, so states of size one differ in the second decimal place."""
        found = torch_embedder(backbone, tiny_teacher, ModuleSettings(pooling, normalize), max_length=64)(texts)
        assert found.dtype == np.float32 and found.shape == (len(texts), 32)
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        for text, vector in zip(texts, found, strict=True):
            with torch.no_grad():
                hidden = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = hidden.mean(0) if pooling == "mean" else hidden[0]
            expected = (expected / expected.norm() if normalize else expected).numpy()
            assert np.abs(vector - expected).max() < 0.02 * max(1, np.abs(expected).max())
            assert cosine(vector, expected) > 0.9995

    def test_does_not_depend_on_order_or_company(self, backbone, tiny_teacher, texts):
        embed = torch_embedder(backbone, tiny_teacher, ModuleSettings(), max_length=64, batch_size=16)
        order = np.random.default_rng(0).permutation(len(texts))
        vectors, shuffled = embed(texts), embed([texts[i] for i in order])
        assert np.abs(shuffled - vectors[order]).max() < 0.01
        assert np.abs(embed(texts[7:8]) - vectors[7]).max() < 0.01
        assert np.abs(vectors[0] - vectors[1]).max() > 0.02  # while different texts do differ

    def test_cuts_at_the_models_positions(self, backbone, tiny_teacher):
        """The model has 64 positions, which the length asked for may exceed."""
        embed = torch_embedder(backbone, tiny_teacher, ModuleSettings(), max_length=512)
        long, cut = embed(["a " * 500, "a " * 62])
        assert np.abs(long - cut).max() < 0.01

    @pytest.mark.parametrize(("asked", "own"), [(6, None), (6, 48), (48, 6)])
    def test_cuts_at_the_length_asked_for_or_at_the_folders(self, asked, own, backbone, tiny_teacher):
        said = ModuleSettings(max_seq_length=own)
        first, second, other = torch_embedder(backbone, tiny_teacher, said, max_length=asked)(
            ["a b c d e f g", "a b c d x y z", "a b c x y z g"]
        )
        assert np.abs(first - second).max() < 0.01 < np.abs(first - other).max()


class TestPairs:
    def test_spearman_is_scipys(self):
        rng = np.random.default_rng(2)
        vectors = {name: rng.normal(size=4) for name in "abcdefgh"}
        rated = Rows(list("abcd"), list("efgh"), np.array([3.0, 1, 4, 1.5]))
        expected = spearmanr(
            [cosine(vectors[a], vectors[b]) for a, b in zip("abcd", "efgh", strict=True)], rated.targets
        )
        found = spearman(rated, lambda texts: np.stack([vectors[t] for t in texts]))
        assert found == pytest.approx(expected.statistic)

    def test_are_read_as_they_stand(self, tmp_path):
        rows = [
            {"sentence1": "a\u2028b", "sentence2": "ü", "label": 0.5},
            {"sentence1": "c", "sentence2": "d", "label": 4},
        ]
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
        (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
        rated = read_rated_pairs(tmp_path / "pairs.jsonl")
        assert (rated.first, rated.second, rated.targets.tolist()) == (["a\u2028b", "c"], ["ü", "d"], [0.5, 4.0])

    @pytest.mark.parametrize(
        "row",
        [
            "{",
            "[1, 2]",
            "3",
            '{"sentence1": "a", "sentence2": "b"}',
            '{"sentence1": "a", "label": 3}',
            '{"sentence1": "a", "sentence2": "b", "label": "good"}',
            '{"sentence1": "a", "sentence2": "b", "label": null}',
            '{"sentence1": "a", "sentence2": 7, "label": 3}',
            '{"sentence1": null, "sentence2": "b", "label": 3}',
            '{"sentence1": "a", "sentence2": "b", "label": NaN}',
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path, row):
        good = json.dumps({"sentence1": "a", "sentence2": "b", "label": 1})
        (tmp_path / "pairs.jsonl").write_text(f"{good}\n{good}\n{row}\n{good}\n", encoding="utf-8")
        with pytest.raises(
            InputError,
            match=r"pairs.jsonl: row 3 (needs sentence1, sentence2 and a numeric label|is not a JSON object.*)$",
        ):
            read_rated_pairs(tmp_path / "pairs.jsonl")

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "no rated pairs"),
            (b'{"sentence1": "a", "sentence2": "b", "label": 1}', "no rated pairs"),
            (b"\xff", "not UTF-8 text at byte 0"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, content, sentence):
        (tmp_path / "pairs.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            read_rated_pairs(tmp_path / "pairs.jsonl")

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="none.jsonl: no such file, .*: correct its path"):
            read_rated_pairs(tmp_path / "none.jsonl")


def test_a_model_without_positions_is_cut_at_the_length(tiny_teacher):
    """Models with relative positions only name no number of them."""

    class Backbone(torch.nn.Module):
        config = SimpleNamespace(pad_token_id=0, hidden_size=2)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, attention_mask, output_hidden_states):
            lengths = attention_mask.sum(1)[:, None, None].expand(*input_ids.shape, 2)
            return SimpleNamespace(last_hidden_state=lengths * self.weight)

    found = torch_embedder(Backbone(), tiny_teacher, ModuleSettings(normalize=False), max_length=9)(["a", "a " * 50])
    assert found.tolist() == [[3, 3], [9, 9]]
