"""Pieces gathered from the lexicon are what the two tokenizers give, masked, mixed and laid out as promised."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer, RobertaTokenizerFast
from word_tables import (
    SIDES,
    inner,
    lacking,
    make_student,
    make_text,
    pairs_of,
    pieces_of,
    same,
    same_strings,
    units_of,
    words_of,
)

from vocabshrink.data.batches import PieceTable, Sequences
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus


@pytest.fixture(scope="module")
def student_folder(lines, tmp_path_factory):
    return make_student(lines, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def text(lines):
    return make_text(lines)


@pytest.fixture(scope="module")
def encoded(text, tiny_teacher, student_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    encode_corpus([text], tiny_teacher, student_folder, folder)
    return Lexicon.load(folder), WordStream.load(folder)


@pytest.fixture(scope="module")
def table(encoded):
    return PieceTable(encoded[0])


@pytest.fixture(scope="module")
def sharing(encoded, tiny_teacher, student_folder):
    """The table that knows which words both vocabularies spell alike."""
    return PieceTable(encoded[0], shared=same_strings(tiny_teacher, student_folder))


@pytest.fixture(scope="module")
def equal(text, tiny_teacher, tmp_path_factory):
    """(lexicon, stream, table) of a student with the teacher's own vocabulary."""
    folder = tmp_path_factory.mktemp("equal")
    encode_corpus([text], tiny_teacher, tiny_teacher, folder)
    lexicon = Lexicon.load(folder)
    return lexicon, WordStream.load(folder), PieceTable(lexicon, shared=np.arange(300))


@pytest.fixture(scope="module")
def byte_level(text, lines, student_folder, tmp_path_factory):
    """(lexicon, stream, folder of the teacher's tokenizer) with a RoBERTa-like teacher."""
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(lines, vocab_size=400, special_tokens=special, show_progress=False)
    folder, encoded = tmp_path_factory.mktemp("roberta"), tmp_path_factory.mktemp("encoded_byte_level")
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    RobertaTokenizerFast(vocab=tokenizer.get_vocab(), merges=merges).save_pretrained(folder)
    encode_corpus([text], folder, student_folder, encoded)
    return Lexicon.load(encoded), WordStream.load(encoded), folder


class TestGather:
    @pytest.mark.parametrize("from_student", [False, True])
    def test_is_what_the_tokenizer_gives(self, text, encoded, table, tiny_teacher, student_folder, from_student):
        tokenizer = AutoTokenizer.from_pretrained(student_folder if from_student else tiny_teacher)
        for start in range(0, len(text), 64):
            numbers = range(start, min(start + 64, len(text)))
            expected = tokenizer([text[i] for i in numbers], padding=True, return_tensors="pt")
            found = table.gather(words_of(encoded, numbers), from_student)
            assert torch.equal(found.ids, expected["input_ids"])
            assert torch.equal(found.attention_mask, expected["attention_mask"])
            assert found.labels is None

    @given(data=st.data())
    @settings(max_examples=60)
    def test_mixed_input_word_by_word(self, data, encoded, table, sharing, tiny_teacher, student_folder):
        lexicon, table = encoded[0], data.draw(st.sampled_from([table, sharing]))
        shared = same_strings(tiny_teacher, student_folder) if table is sharing else np.full(table.student_size, -2)
        sentence = st.lists(st.integers(0, table.words - 1), max_size=9)
        paired = data.draw(st.booleans())
        rows = data.draw(st.lists(st.tuples(sentence, sentence if paired else st.just([])), min_size=1, max_size=5))
        words = np.array([w for a, b in rows for w in a + b], dtype=np.int64)
        sequence = np.repeat(np.arange(len(rows)), [len(a + b) for a, b in rows])
        second = np.array([k >= len(a) for a, b in rows for k in range(len(a + b))], dtype=bool) if paired else None
        choice = np.array(data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words))), dtype=bool)
        sequences = Sequences(words, sequence, len(rows), second)
        found, mask = table.gather(sequences, choice, combined=True), table.unit_mask(sequences)
        special, k, widths = table.teacher_special, 0, []
        for row, sentences in enumerate(rows):
            ids, units, types, whole = [special.cls], [0], [0], [True]
            separators = []
            for number, sentence in enumerate(sentences[: 1 + paired]):
                for word in sentence:
                    pieces = pieces_of(lexicon, word, choice[k], table.teacher_size)
                    count = units_of(lexicon, word, shared)
                    ids, types, k = ids + pieces, types + [number] * len(pieces), k + 1
                    units += [len(whole) + (j if count > 1 else 0) for j in range(len(pieces))]
                    written = all(pieces_of(lexicon, word, side) for side in (False, True))
                    whole += [written] * count
                separators.append(len(units))
                ids, types, units = [*ids, special.sep], [*types, number], [*units, None]
            for number, place in enumerate(separators):  # the last units
                units[place] = len(whole) + number
            whole += [True] * len(separators)
            padding = found.ids.shape[1] - len(ids)
            assert found.ids[row].tolist() == ids + [special.pad] * padding
            assert found.units[row].tolist() == units + [-1] * padding
            assert found.attention_mask[row].tolist() == [1] * len(ids) + [0] * padding
            assert found.token_types is None if not paired else found.token_types[row].tolist() == types + [0] * padding
            assert mask[row].tolist() == whole + [False] * (mask.shape[1] - len(whole))
            widths.append(len(whole))
        assert found.ids.shape[1] == int(found.attention_mask.sum(1).max())  # not a column more than needed
        assert mask.shape[1] == max(widths)

    def test_a_teacher_with_more_rows_than_pieces(self, encoded, table):
        wide = PieceTable(encoded[0], table.teacher_size + 12)
        words = words_of(encoded, range(20))
        for choice in (True, False):
            plain, other = (t.gather(words, choice) for t in (table, wide))
            assert torch.equal(plain.ids, other.ids)
        mixed = wide.gather(words, True, combined=True)
        inside = inner(mixed)
        assert torch.equal(mixed.ids[inside] - wide.teacher_size, wide.gather(words, True).ids[inside])

    @pytest.mark.parametrize("from_student", [False, True])
    def test_sentences_without_words_keep_their_special_tokens(self, table, from_student):
        none = np.zeros(0, np.int64)
        special = table.student_special if from_student else table.teacher_special
        found = table.gather(Sequences(none, none, 2), from_student)
        assert found.ids.tolist() == [[special.cls, special.sep]] * 2 and found.units.tolist() == [[0, 1]] * 2
        assert table.unit_mask(Sequences(none, none, 2)).tolist() == [[True, True]] * 2
        pairs = table.gather(Sequences(none, none, 1, none.astype(bool)), from_student)
        assert pairs.ids.tolist() == [[special.cls, special.sep, special.sep]]
        assert pairs.token_types.tolist() == [[0, 0, 1]] and pairs.units.tolist() == [[0, 1, 2]]

    def test_longest_is_of_either_side(self, encoded, table):
        lexicon = encoded[0]
        for word in range(0, table.words, 7):
            assert table.longest[word] == max(len(pieces_of(lexicon, word, side)) for side in (False, True))


class TestUnits:
    """Single sentences and pairs, whose separators are the last units."""

    def both(self, table, encoded, paired):
        numbers = range(0, 200)
        words = pairs_of(encoded, numbers, range(200, 400)) if paired else words_of(encoded, numbers)
        return *(table.gather(words, side) for side in (False, True)), table.unit_mask(words)

    @pytest.mark.parametrize("paired", [False, True])
    def test_are_pieces_where_the_vocabularies_are_equal(self, equal, paired):
        teacher, student, mask = self.both(equal[2], equal, paired)
        assert same(teacher, student)
        assert torch.equal(mask, teacher.attention_mask.bool())
        assert equal[2].alike.all()
        for units, attention in zip(teacher.units, teacher.attention_mask, strict=True):
            length = int(attention.sum())
            assert sorted(units[:length].tolist()) == list(range(length)) and (units[length:] == -1).all()
            assert paired or units[:length].tolist() == list(range(length))

    @pytest.mark.parametrize("paired", [False, True])
    def test_are_as_fine_as_they_can_be(self, encoded, sharing, tiny_teacher, student_folder, paired):
        """A unit is the same piece on both sides, or a word of which the vocabularies make different pieces."""
        teacher, student, mask = self.both(sharing, encoded, paired)
        shared = same_strings(tiny_teacher, student_folder)
        kinds = {"special": 0, "piece": 0, "word": 0}
        for row in range(len(mask)):
            count = int(mask[row].sum())
            for unit in range(count):
                theirs = teacher.ids[row, teacher.units[row] == unit].tolist()
                ours = student.ids[row, student.units[row] == unit].tolist()
                special = unit == 0 or unit >= count - 1 - paired
                equal = theirs == [int(shared[piece]) for piece in ours]
                kind = "special" if special else "piece" if equal else "word"
                assert len(ours) == len(theirs) == 1 if kind != "word" else len(ours) + len(theirs) > 2
                kinds[kind] += 1
        assert min(kinds.values()) >= 400
        several = sharing.alike & (sharing.unit_counts > 1)
        assert several.sum() >= 4 and not sharing.alike.all()

    def test_without_shared_pieces_are_words(self, encoded, table):
        teacher, student, mask = self.both(table, encoded, False)
        words = np.diff(encoded[1].line_offsets)[:200]
        assert not table.alike.any() and mask.sum(1).tolist() == (words + 2).tolist()
        assert (teacher.units.max(1).values + 1).tolist() == (student.units.max(1).values + 1).tolist()


class TestPairs:
    @pytest.mark.parametrize("from_student", [False, True])
    @pytest.mark.parametrize("teacher", ["bert", "roberta"])
    def test_are_laid_out_as_the_tokenizer_does(
        self, text, encoded, byte_level, tiny_teacher, student_folder, teacher, from_student
    ):
        """Also beside a teacher of another family, and with an empty sentence on either side."""
        lexicon, stream, folder = byte_level if teacher == "roberta" else (*encoded, tiny_teacher)
        table = PieceTable(lexicon)
        tokenizer = AutoTokenizer.from_pretrained(student_folder if from_student else folder)
        empty = text.index("")
        firsts, seconds = [*range(60), empty, 5, empty], [*range(100, 160), 4, empty, empty]
        expected = tokenizer(
            [text[i] for i in firsts], [text[i] for i in seconds], padding=True, return_tensors="pt", truncation=False
        )
        words = pairs_of((lexicon, stream), firsts, seconds)
        found = table.gather(words, from_student)
        assert torch.equal(found.ids, expected["input_ids"])
        assert torch.equal(found.attention_mask, expected["attention_mask"])
        if teacher == "roberta" and not from_student:
            assert found.token_types is None and not expected.get("token_type_ids", torch.zeros(1)).any()
        else:
            assert torch.equal(found.token_types, expected["token_type_ids"]) and found.token_types.any()
        mixed = table.gather(words, np.zeros(len(words.words), bool), combined=True)
        if not from_student:
            assert same(mixed, found)  # mixed input is laid out as the teacher's

    def test_two_separators_are_one_unit(self, byte_level):
        """So that a RoBERTa teacher's `</s> </s>` is compared with the student's one [SEP]."""
        table = PieceTable(byte_level[0])
        words = pairs_of(byte_level, range(50), range(50, 100))
        teacher, student = (table.gather(words, side) for side in (False, True))
        mask = table.unit_mask(words)
        for row in range(50):
            count = int(mask[row].sum())
            for side, special, times in ((teacher, table.teacher_special, 2), (student, table.student_special, 1)):
                where = (side.units[row] == count - 2).nonzero().flatten().tolist()
                assert side.ids[row, where].tolist() == [special.sep] * times and np.ptp(where) == times - 1
                assert side.ids[row, side.units[row] == count - 1].tolist() == [special.sep]
                assert side.ids[row, side.units[row] == 0].tolist() == [special.cls]

    def test_masking_leaves_the_layout(self, encoded, sharing):
        words = pairs_of(encoded, range(50), range(50, 100))
        masked, rng = np.ones(len(words.words), bool), np.random.default_rng(0)
        plain = sharing.gather(words, True)
        noisy = sharing.gather(words, True, masked=masked, rng=rng)
        assert torch.equal(noisy.units, plain.units) and torch.equal(noisy.token_types, plain.token_types)
        assert torch.equal(noisy.labels, torch.where(inner(plain), plain.ids, -100))


class TestLabels:
    @pytest.mark.parametrize("paired", [False, True])
    def test_stand_at_first_pieces(self, encoded, sharing, paired):
        pairs = pairs_of(encoded, range(50), range(50, 100))
        words = pairs.words
        labels = np.where(np.arange(len(words)) % 3 == 0, -100, np.arange(len(words)))
        sequences = pairs if paired else dataclasses.replace(pairs, second=None)
        sides = [sharing.gather(sequences, side, labels=labels) for side in (False, True)]
        for side, from_student in zip(sides, (False, True), strict=True):
            where = side.labels >= 0
            assert side.labels[where].tolist() == labels[labels >= 0].tolist()  # in order, each once
            first = [pieces_of(encoded[0], words[k], from_student)[0] for k in side.labels[where].tolist()]
            assert side.ids[where].tolist() == first
        assert torch.equal(*(side.units[side.labels >= 0] for side in sides))

    def test_of_words_that_one_side_lacks_are_gone_on_both(self):
        table = PieceTable(lacking())
        words, labels = Sequences(np.arange(3), np.zeros(3, int), 1), np.array([7, 8, 9])
        found = [table.gather(words, side, labels=labels).labels.tolist() for side in (0, 1)]
        assert found == [[[-100, 7, -100, -100]]] * 2


class TestMasking:
    @pytest.fixture(scope="class")
    def masked(self, encoded, table):
        """The three sides of 20,000 words of which every third is masked, and the clean sides."""
        once = words_of(encoded, range(400))
        words, sequence = np.tile(once.words, 4), np.concatenate([once.numbers + 400 * k for k in range(4)])
        rng = np.random.default_rng(5)
        chosen, choice = rng.random(len(words)) < 1 / 3, rng.random(len(words)) < 0.5

        def gather(side, **masking):
            return table.gather(Sequences(words, sequence, 1600), side[0], combined=side[1], **masking)

        sides = {"student": (True, False), "teacher": (False, False), "mixed": (choice, True)}
        clean = {name: gather(side) for name, side in sides.items()}
        noisy = {name: gather(side, masked=chosen, rng=rng) for name, side in sides.items()}
        return clean, noisy, (words, sequence, chosen, choice)

    @pytest.mark.parametrize("side", SIDES)
    def test_labels_are_the_true_pieces_at_masked_words_only(self, masked, side):
        clean, noisy, (words, sequence, chosen, _) = masked
        first = np.searchsorted(sequence, np.arange(1600))
        before, after = clean[side], noisy[side]
        number = torch.from_numpy(first).unsqueeze(1) + before.units - 1
        hidden = torch.from_numpy(chosen)[number.clamp(0, len(words) - 1)] & inner(before)
        assert torch.equal(after.labels, torch.where(hidden, before.ids, -100))
        assert torch.equal(after.ids[~hidden], before.ids[~hidden])
        assert torch.equal(after.units, before.units) and torch.equal(after.attention_mask, before.attention_mask)

    def test_the_same_words_on_every_side(self, masked):
        _, noisy, (words, sequence, chosen, _) = masked
        assert 0.3 < chosen.mean() < 0.37
        for row in range(0, 1600, 13):
            found = [set(noisy[side].units[row][noisy[side].labels[row] >= 0].tolist()) for side in SIDES]
            expected = set((np.flatnonzero(chosen[sequence == row]) + 1).tolist())
            assert found == [expected] * 3

    @pytest.mark.parametrize("side", SIDES)
    def test_rates(self, masked, table, side):
        """80 % [MASK], 10 % random, 10 % unchanged, within five standard deviations."""
        _, noisy, _ = masked
        pieces = noisy[side]
        hidden = pieces.labels >= 0
        ids, labels = pieces.ids[hidden], pieces.labels[hidden]
        count = len(ids)
        mask = (table.student_special if side == "student" else table.teacher_special).mask
        is_mask, kept = ids == mask, ids == labels
        noise = ids[~is_mask & ~kept]
        for rate, expected in ((is_mask, 0.8), (kept, 0.1)):
            assert abs(rate.float().mean() - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
        assert len(noise) > 0.08 * count and len(noise.unique()) > 80

    def test_random_pieces_are_of_the_same_vocabulary(self, masked, table):
        _, noisy, (_, sequence, _, choice) = masked
        assert noisy["student"].ids.min() >= 0 and noisy["student"].ids.max() < table.student_size
        assert noisy["teacher"].ids.min() >= 0 and noisy["teacher"].ids.max() < table.teacher_size
        mixed, labels = noisy["mixed"].ids, noisy["mixed"].labels
        noise = (labels >= 0) & (mixed != labels) & (mixed != table.teacher_special.mask)
        assert torch.equal(mixed[noise] >= table.teacher_size, labels[noise] >= table.teacher_size)
        assert mixed.max() < table.teacher_size + table.student_size
        student = mixed[noise & (labels >= table.teacher_size)] - table.teacher_size
        assert student.min() < 20 and student.max() > table.student_size - 20  # all of it is drawn from
