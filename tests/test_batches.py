"""Batches gathered from the lexicon are what the two tokenizers give, masked, mixed and drawn as promised."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import made_up_text, wordpiece_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast

from tokenizer_build.errors import InputError
from vocabshrink import batches
from vocabshrink.batches import (
    Batch,
    Batcher,
    PieceTable,
    Segments,
    cut_segments,
    gather_words,
    near_groups,
    prefetch,
    rare_words,
    special_tokens,
)
from vocabshrink.lexicon import Lexicon, WordStream, encode_corpus

LIMIT = 40  # pieces without special tokens: many lines need more, so that cutting is at work
SIDES = ("mixed", "student", "teacher")


@pytest.fixture(scope="module")
def student_folder(lines, tmp_path_factory):
    """A small WordPiece vocabulary whose special tokens have other ids than the teacher's."""
    folder = tmp_path_factory.mktemp("student")
    special = ["[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"]
    pieces = special + wordpiece_pieces(lines, 120)[5:]
    BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(lines):
    """The corpus with what corpora have: an empty line, unknown characters, an invisible one, several sentences."""
    pairs = map(" ".join, zip(lines[::4], lines[1::4], strict=True))
    return [*lines, "", "한국 kalo 한 mine!", "kalo \u200b mine \u00ad ru", *pairs]


@pytest.fixture(scope="module")
def encoded(text, tiny_teacher, student_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    encode_corpus([text], tiny_teacher, student_folder, folder)
    return Lexicon.load(folder), WordStream.load(folder)


@pytest.fixture(scope="module")
def table(encoded):
    return PieceTable(encoded[0])


@pytest.fixture(scope="module")
def segments(encoded):
    lexicon, stream = encoded
    return cut_segments(stream, lexicon, unit="line", max_pieces=LIMIT, min_words=2, held_out_every=7)


@pytest.fixture(scope="module")
def make_batcher(encoded, table, segments):
    def make(**options) -> Batcher:
        keywords = {"batch_size": 8, "seed": 3, "sides": SIDES, "max_pieces": LIMIT, "segments": segments[0]} | options
        return Batcher(keywords.pop("table", table), encoded[1], encoded[0], keywords.pop("segments"), **keywords)

    return make


def words_of(encoded, line_numbers):
    """(word ids, sequence numbers) of whole lines."""
    stream = encoded[1]
    parts = [np.asarray(stream.word_ids[stream.line_offsets[i] : stream.line_offsets[i + 1]]) for i in line_numbers]
    sequence = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return np.concatenate(parts).astype(np.int64), sequence


def pieces_of(lexicon, word, from_student, shift=0):
    """A word's pieces read off the lexicon's tables, one word at a time: the slow reference."""
    offsets, ids = (
        (lexicon.student_offsets, lexicon.student_ids)
        if from_student
        else (lexicon.teacher_offsets, lexicon.teacher_ids)
    )
    return [int(piece) + (shift if from_student else 0) for piece in ids[offsets[word] : offsets[word + 1]]]


def same(left, right) -> bool:
    """Whether two batches are equal to the last number."""
    if left is None or right is None:
        return left is right
    if dataclasses.is_dataclass(left):
        return all(same(a, b) for a, b in zip(vars(left).values(), vars(right).values(), strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


class TestGather:
    @pytest.mark.parametrize("from_student", [False, True])
    def test_is_what_the_tokenizer_gives(self, text, encoded, table, tiny_teacher, student_folder, from_student):
        tokenizer = AutoTokenizer.from_pretrained(student_folder if from_student else tiny_teacher)
        for start in range(0, len(text), 64):
            numbers = range(start, min(start + 64, len(text)))
            expected = tokenizer([text[i] for i in numbers], padding=True, return_tensors="pt")
            words, sequence = words_of(encoded, numbers)
            found = table.gather(words, sequence, len(numbers), from_student)
            assert torch.equal(found.ids, expected["input_ids"])
            assert torch.equal(found.attention_mask, expected["attention_mask"])
            assert found.labels is None

    @given(data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_mixed_input_word_by_word(self, data, encoded, table):
        lexicon = encoded[0]
        sentences = data.draw(st.lists(st.lists(st.integers(0, table.words - 1), max_size=9), min_size=1, max_size=5))
        words = np.array([w for s in sentences for w in s], dtype=np.int64)
        sequence = np.repeat(np.arange(len(sentences)), [len(s) for s in sentences])
        choice = np.array(data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words))), dtype=bool)
        found = table.gather(words, sequence, len(sentences), choice, combined=True)
        special, k = table.teacher_special, 0
        for row, sentence in enumerate(sentences):
            ids, places = [special.cls], [-1]
            for place, word in enumerate(sentence):
                pieces = pieces_of(lexicon, word, choice[k], table.teacher_size)
                ids, places, k = ids + pieces, places + [place] * len(pieces), k + 1
            ids, places = [*ids, special.sep], [*places, -1]
            padding = found.ids.shape[1] - len(ids)
            assert found.ids[row].tolist() == ids + [special.pad] * padding
            assert found.words[row].tolist() == places + [-1] * padding
            assert found.attention_mask[row].tolist() == [1] * len(ids) + [0] * padding
        assert found.ids.shape[1] == int(found.attention_mask.sum(1).max())  # not a column more than needed

    def test_a_teacher_with_more_rows_than_pieces(self, encoded, table):
        wide = PieceTable(encoded[0], table.teacher_size + 12)
        words, sequence = words_of(encoded, range(20))
        for choice in (True, False):
            plain, other = (t.gather(words, sequence, 20, choice) for t in (table, wide))
            assert torch.equal(plain.ids, other.ids)
        mixed = wide.gather(words, sequence, 20, True, combined=True)
        inside = mixed.words >= 0
        assert torch.equal(mixed.ids[inside] - wide.teacher_size, wide.gather(words, sequence, 20, True).ids[inside])

    def test_longest_is_of_either_side(self, encoded, table):
        lexicon = encoded[0]
        for word in range(0, table.words, 7):
            assert table.longest[word] == max(len(pieces_of(lexicon, word, side)) for side in (False, True))

    @pytest.mark.parametrize("role", ["cls", "sep", "pad", "mask"])
    def test_a_tokenizer_without_a_special_token_is_refused(self, encoded, role):
        meta = {"student": {"special": {"cls": 1, "sep": 2, "pad": 0, "mask": 3} | {role: None}}}
        with pytest.raises(InputError, match=f"student tokenizer: it has no {role} token"):
            special_tokens(SimpleNamespace(meta=meta), "student")


class TestMasking:
    @pytest.fixture(scope="class")
    def masked(self, encoded, table):
        """The three sides of 20,000 words of which every third is masked, and the clean sides."""
        words, sequence = words_of(encoded, range(400))
        words, sequence = np.tile(words, 4), np.concatenate([sequence + 400 * k for k in range(4)])
        rng = np.random.default_rng(5)
        chosen, choice = rng.random(len(words)) < 1 / 3, rng.random(len(words)) < 0.5

        def gather(side, **masking):
            return table.gather(words, sequence, 1600, side[0], combined=side[1], **masking)

        sides = {"student": (True, False), "teacher": (False, False), "mixed": (choice, True)}
        clean = {name: gather(side) for name, side in sides.items()}
        noisy = {name: gather(side, masked=chosen, rng=rng) for name, side in sides.items()}
        return clean, noisy, (words, sequence, chosen, choice)

    @pytest.mark.parametrize("side", SIDES)
    def test_labels_are_the_true_pieces_at_masked_words_only(self, masked, side):
        clean, noisy, (words, sequence, chosen, _) = masked
        first = np.searchsorted(sequence, np.arange(1600))
        before, after = clean[side], noisy[side]
        number = torch.from_numpy(first).unsqueeze(1) + before.words
        hidden = torch.from_numpy(chosen)[number.clamp_min(0)] & (before.words >= 0)
        assert torch.equal(after.labels, torch.where(hidden, before.ids, -100))
        assert torch.equal(after.ids[~hidden], before.ids[~hidden])
        assert torch.equal(after.words, before.words) and torch.equal(after.attention_mask, before.attention_mask)

    def test_the_same_words_on_every_side(self, masked):
        _, noisy, (words, sequence, chosen, _) = masked
        assert 0.3 < chosen.mean() < 0.37
        for row in range(0, 1600, 13):
            found = [set(noisy[side].words[row][noisy[side].labels[row] >= 0].tolist()) for side in SIDES]
            expected = set(np.flatnonzero(chosen[sequence == row]).tolist())
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


class TestSegments:
    @pytest.mark.parametrize("unit", ["line", "sentence"])
    def test_are_runs_of_whole_words_of_one_line(self, encoded, unit):
        lexicon, stream = encoded
        both = cut_segments(stream, lexicon, unit=unit, max_pieces=LIMIT, min_words=3, held_out_every=7)
        offsets = np.asarray(stream.line_offsets)
        cost = np.maximum(np.diff(lexicon.teacher_offsets), np.diff(lexicon.student_offsets))
        used = np.zeros(len(stream.word_ids), int)
        for held_out, segments in zip((False, True), both, strict=True):
            assert len(segments.starts) > 20
            for start, length in zip(segments.starts, segments.lengths, strict=True):
                line = np.searchsorted(offsets, start, side="right") - 1
                assert start + length <= offsets[line + 1] and length >= 3
                assert (line % 7 == 6) == held_out
                words = stream.word_ids[start : start + length]
                assert cost[words].sum() <= LIMIT
                if unit == "sentence":
                    ends = np.flatnonzero(lexicon.ends_sentence[words])
                    assert len(ends) == 0 or ends[0] + len(ends) == length  # only at the end
                used[start : start + length] += 1
        assert used.max() == 1 and used.mean() > 0.9  # never twice, and hardly anything is left out

    def test_short_lines_stay_whole(self, encoded):
        lexicon, stream = encoded
        training, held_out = cut_segments(
            stream, lexicon, unit="line", max_pieces=500, min_words=1, held_out_every=10**6
        )
        offsets = np.asarray(stream.line_offsets)
        assert len(held_out.starts) == 0
        assert training.starts.tolist() == offsets[:-1][np.diff(offsets) > 0].tolist()

    def test_a_run_of_marks_ends_one_sentence(self, tmp_path, tiny_teacher, student_folder):
        encode_corpus([["kalo mine ru?! Sa to vi we... zu bra", "ru mine"]], tiny_teacher, student_folder, tmp_path)
        lexicon, stream = Lexicon.load(tmp_path), WordStream.load(tmp_path)
        training, _ = cut_segments(stream, lexicon, unit="sentence", max_pieces=500, min_words=1, held_out_every=9)
        assert training.starts.tolist() == [0, 5, 12, 14] and training.lengths.tolist() == [5, 7, 2, 2]

    def test_blocks_change_nothing(self, encoded, monkeypatch):
        lexicon, stream = encoded

        def cut():
            return cut_segments(stream, lexicon, unit="sentence", max_pieces=LIMIT, min_words=2, held_out_every=5)

        whole = cut()
        monkeypatch.setattr(batches, "BLOCK_LINES", 3)
        for left, right in zip(whole, cut(), strict=True):
            assert np.array_equal(left.starts, right.starts) and np.array_equal(left.lengths, right.lengths)

    def test_nothing_to_train_on_is_refused(self, encoded):
        lexicon, stream = encoded
        with pytest.raises(InputError, match="no run of at least 5000 words fits 40 pieces: give more text"):
            cut_segments(stream, lexicon, unit="line", max_pieces=LIMIT, min_words=5000, held_out_every=7)


def clean_words(batcher: Batcher, index: int) -> list[tuple[int, ...]]:
    """The word ids of each segment of a batch, by the segments themselves."""
    chosen = batcher._segments_of(index)
    return [int(s) for s in batcher.segments.starts[chosen]]


class TestBatcher:
    @pytest.mark.parametrize("group_size", [1, 4])
    def test_a_batch_is_a_function_of_its_number(self, make_batcher, group_size):
        options = {"group_size": group_size, "mask": 0.15, "p": lambda index: 0.3 + index / 1000}
        one, other = make_batcher(**options), make_batcher(**options)
        numbers = [0, 5, one.per_epoch, one.per_epoch + 3, 2 * one.per_epoch - 1]
        first = {i: one.batch(i) for i in numbers}
        assert all(same(first[i], other.batch(i)) for i in reversed(numbers))
        assert all(same(first[i], one.batch(i)) for i in (numbers[3], numbers[0], numbers[4], numbers[1]))
        assert not same(first[0], first[5]) and not same(first[0], make_batcher(**options, seed=4).batch(0))

    @pytest.mark.parametrize(("batch_size", "group_size"), [(8, 1), (7, 1), (12, 4), (1, 1), (3, 4), (10**6, 1)])
    def test_every_segment_once_an_epoch(self, make_batcher, segments, batch_size, group_size):
        batcher = make_batcher(batch_size=batch_size, group_size=group_size)
        orders = []
        for epoch in range(2):
            seen = [s for i in range(batcher.per_epoch) for s in clean_words(batcher, epoch * batcher.per_epoch + i)]
            assert sorted(seen) == sorted(segments[0].starts.tolist())
            orders.append(seen)
        if batcher.per_batch < len(segments[0].starts):
            assert orders[0] != orders[1]

    def test_batches_hold_their_segments_and_no_held_out_line(self, make_batcher, encoded, segments, table):
        stream, batcher = encoded[1], make_batcher(sides=("teacher",))
        offsets = np.asarray(stream.line_offsets)
        for index in range(batcher.per_epoch):
            starts = clean_words(batcher, index)
            assert all((np.searchsorted(offsets, s, side="right") - 1) % 7 != 6 for s in starts)
            words, sequence = gather_words(stream, batcher.segments, batcher._segments_of(index))
            assert same(batcher.batch(index).teacher, table.gather(words, sequence, len(starts), False))
        assert not set(segments[0].starts) & set(segments[1].starts)

    def test_lengths_are_pooled(self, make_batcher, segments):
        """Little padding: within a batch lengths are near, although batches come in any order."""
        batcher = make_batcher()
        spread = [np.ptp(segments[0].lengths[batcher._segments_of(i)]) for i in range(batcher.per_epoch)]
        assert np.mean(spread) <= 2 < np.ptp(segments[0].lengths)
        means = [segments[0].lengths[batcher._segments_of(i)].mean() for i in range(batcher.per_epoch)]
        assert means != sorted(means)

    @pytest.mark.parametrize("group_size", [1, 4])
    @pytest.mark.parametrize("limit", [LIMIT, 12])
    def test_nothing_exceeds_the_limit(self, make_batcher, group_size, limit):
        """Also where a swap brings in a longer word, or segments were cut longer than the batch may be."""
        batcher = make_batcher(batch_size=16, group_size=group_size, max_pieces=limit)
        widths = []
        for index in range(batcher.per_epoch):
            batch = batcher.batch(index)
            for side in SIDES:
                lengths = getattr(batch, side).attention_mask.sum(1)
                assert len(lengths) <= 16 and lengths.max() == getattr(batch, side).ids.shape[1]
                widths.append(int(lengths.max()))
        assert max(widths) <= limit + 2
        assert max(widths) >= limit  # and it is used to the full

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_extremes_of_p(self, make_batcher, table, p):
        batch = make_batcher(p=lambda index: p).batch(2)
        inside, side = batch.mixed.words >= 0, batch.student if p else batch.teacher
        assert torch.equal(batch.mixed.words, side.words) and torch.equal(
            batch.mixed.attention_mask, side.attention_mask
        )
        assert torch.equal(batch.mixed.ids[inside], side.ids[inside] + (table.teacher_size if p else 0))
        outside = ~inside & (batch.mixed.attention_mask == 1)
        special = table.teacher_special
        assert set(batch.mixed.ids[outside].tolist()) == {special.cls, special.sep}

    def test_p_is_a_rate_of_words_and_follows_the_step(self, make_batcher, table, encoded):
        """Measured on words that the student splits, since only these can be told apart by their pieces."""
        batcher = make_batcher(batch_size=64, p=lambda index: 0.2 if index == 0 else 0.7)
        for index, expected in ((0, 0.2), (1, 0.7)):
            mixed = batcher.batch(index).mixed
            first = torch.cat([torch.zeros(len(mixed.words), 1, dtype=torch.int64) - 1, mixed.words[:, :-1]], 1)
            starts = (mixed.words >= 0) & (mixed.words != first)
            from_student = mixed.ids[starts] >= table.teacher_size
            assert (
                abs(from_student.float().mean() - expected) < 5 * (expected * (1 - expected) / len(from_student)) ** 0.5
            )

    def test_word_mask_is_of_words_that_both_sides_have(self, encoded, table, make_batcher):
        lexicon = encoded[0]
        words = np.arange(table.words)
        batch = make_batcher().assemble(words, np.zeros(len(words), np.int64), 1, np.random.default_rng(0), 0.5)
        expected = [all(pieces_of(lexicon, word, side) for side in (False, True)) for word in words]
        assert batch.word_mask.tolist() == [expected]
        ragged = make_batcher().batch(1)
        counts = [int(row.max()) + 1 for row in ragged.teacher.words]
        assert ragged.word_mask.shape[1] == max(counts) and ragged.word_mask.sum(1).tolist() == counts

    def test_word_mask_without_a_piece_on_either_side(self):
        side = {"size": 9, "special": {"cls": 1, "sep": 2, "pad": 0, "mask": 3}}
        lexicon = SimpleNamespace(
            teacher_offsets=np.array([0, 1, 1, 2]),
            teacher_ids=np.array([5, 6], np.int32),
            counts=np.ones(3, int),
            student_offsets=np.array([0, 1, 2, 2]),
            student_ids=np.array([7, 8], np.int32),
            meta={"teacher": side, "student": side},
        )
        stream, segments = SimpleNamespace(word_ids=np.arange(3)), Segments(np.array([0]), np.array([3], np.int32))
        batch = Batcher(PieceTable(lexicon), stream, lexicon, segments, batch_size=1, seed=0, sides=SIDES).batch(0)
        assert batch.word_mask.tolist() == [[True, False, False]]
        assert batch.teacher.words.tolist() == [[-1, 0, 2, -1]] and batch.student.words.tolist() == [[-1, 0, 1, -1]]

    def test_the_same_segment_is_mixed_anew_each_time(self, make_batcher, segments):
        one = Segments(segments[0].starts[:1], segments[0].lengths[:1])
        batcher = make_batcher(segments=one, sides=("mixed",))
        assert len({str(batcher.batch(index).mixed.ids.tolist()) for index in range(30)}) == 30

    def test_masks_and_sides_are_those_asked_for(self, make_batcher):
        batch = make_batcher(sides=("student",), mask=1.0).batch(0)
        assert batch.teacher is None and batch.mixed is None
        assert torch.equal(batch.student.labels >= 0, batch.student.words >= 0)
        assert make_batcher(sides=("student",)).batch(0).student.labels is None

    def test_tokens_are_student_pieces(self, make_batcher):
        batch = make_batcher().batch(0)
        assert batch.tokens == int(batch.student.attention_mask.sum())

    def test_moves_to_a_device(self, make_batcher):
        batch = make_batcher(sides=("student",)).batch(0)
        assert isinstance(batch.to("cpu"), Batch) and same(batch, batch.to("cpu"))

    def test_prefetch_keeps_the_order(self, make_batcher):
        batcher = make_batcher(mask=0.15)
        numbers = [0, 3, 1, batcher.per_epoch + 2, 2, 0]
        expected = [make_batcher(mask=0.15).batch(i) for i in numbers]
        found = list(prefetch(batcher, iter(numbers)))
        assert len(found) == len(numbers) and all(same(a, b) for a, b in zip(found, expected, strict=True))
        assert list(prefetch(batcher, iter([]))) == []

    def test_prefetch_passes_errors_on(self, make_batcher):
        def fail(index):
            raise InputError("no p")

        with pytest.raises(InputError, match="no p"):
            next(prefetch(make_batcher(p=fail), iter([0])))


class TestRareWords:
    def test_are_those_that_the_student_splits_more(self, tmp_path, tiny_teacher, student_folder):
        encode_corpus([[*made_up_text(3000, seed=1), "kaqq miqqru"]], tiny_teacher, student_folder, tmp_path)
        lexicon = Lexicon.load(tmp_path)
        rare = rare_words(lexicon)
        assert not rare[-2:].any()  # seen once
        pieces = [[len(pieces_of(lexicon, w, side)) for side in (False, True)] for w in range(len(lexicon.words))]
        assert rare.tolist() == [s > t > 0 and c > 1 for (t, s), c in zip(pieces, lexicon.counts, strict=True)]
        assert rare.sum() >= 100

    def test_any_word_where_there_are_few(self):
        teacher, student = np.array([0, 1, 1, 2]), np.array([0, 2, 3, 4])
        lexicon = SimpleNamespace(teacher_offsets=teacher, student_offsets=student, counts=np.array([9, 9, 9]))
        assert rare_words(lexicon).tolist() == [True, False, True]  # the second has no piece for the teacher


def groups(draw):
    sentences = draw(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=6))
    rare = np.array(draw(st.lists(st.booleans(), min_size=10, max_size=10)), dtype=bool)
    rare[draw(st.tuples(st.integers(0, 4), st.integers(5, 9)))[0]] = True
    rare[draw(st.integers(5, 9))] = True
    return sentences, rare, draw(st.integers(0, 10**6))


class TestNearGroups:
    @given(st.composite(groups)())
    @settings(max_examples=300, deadline=None)
    def test_properties(self, drawn):
        sentences, rare, seed = drawn
        words = np.array([w for s in sentences for w in s])
        sequence = np.repeat(np.arange(len(sentences)), [len(s) for s in sentences])
        before = words.copy()
        found, numbers = near_groups((words, sequence), len(sentences), rare, np.random.default_rng(seed))
        assert np.array_equal(words, before) and np.all(np.diff(numbers) >= 0)
        assert set(numbers.tolist()) == set(range(4 * len(sentences)))  # 4 i + j, and none is empty
        for i, sentence in enumerate(sentences):
            itself, swapped, dropped, part = (found[numbers == 4 * i + j].tolist() for j in range(4))
            assert itself == sentence
            changed = [k for k in range(len(sentence)) if swapped[k] != sentence[k]]
            assert len(swapped) == len(sentence) and len(changed) == 1
            assert rare[swapped[changed[0]]]  # a rare word comes in, and for a rare word if there is one
            assert rare[sentence[changed[0]]] or not rare[sentence].any()
            assert max(1, len(sentence) - 2) <= len(dropped) < len(sentence) and is_subsequence(dropped, sentence)
            half = (len(sentence) + 1) // 2
            assert part in (sentence[:half], sentence[half:], sentence[half:] + sentence[:half])

    def test_every_kind_comes_up(self):
        sentence = np.arange(10)
        counts = {"first": 0, "second": 0, "rotation": 0, 1: 0, 2: 0}
        places = set()
        for seed in range(300):
            found, numbers = near_groups(
                (sentence, np.zeros(10, int)), 1, np.ones(12, bool), np.random.default_rng(seed)
            )
            part = found[numbers == 3].tolist()
            counts["rotation" if len(part) == 10 else "first" if part[0] == 0 else "second"] += 1
            counts[10 - int((numbers == 2).sum())] += 1
            places.add(int(np.flatnonzero(found[numbers == 1] != sentence)[0]))
        assert all(80 < counts[kind] < 120 for kind in ("first", "second", "rotation"))
        assert 120 < counts[1] < 180 and places == set(range(10))

    def test_reach_the_batch_in_order(self, make_batcher, encoded, table):
        batcher = make_batcher(sides=("teacher",), batch_size=16, group_size=4, max_pieces=500)
        chosen = batcher._segments_of(0)
        words, sequence = gather_words(encoded[1], batcher.segments, chosen)
        plain = table.gather(words, sequence, len(chosen), False)
        grouped = batcher.batch(0).teacher
        assert len(grouped.ids) == 4 * len(chosen) == 16
        assert torch.equal(grouped.ids[::4, : plain.ids.shape[1]], plain.ids)


def is_subsequence(short: list, long: list) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


def test_gather_words_reads_any_segments(encoded):
    stream = encoded[1]
    segments = Segments(np.array([5, 0, 12]), np.array([3, 2, 4], np.int32))
    words, sequence = gather_words(stream, segments, np.array([2, 0]))
    assert words.tolist() == [*stream.word_ids[12:16].tolist(), *stream.word_ids[5:8].tolist()]
    assert sequence.tolist() == [0, 0, 0, 0, 1, 1, 1] and words.dtype == np.int64


def test_the_student_is_another_vocabulary(tiny_teacher, student_folder, encoded):
    """Guards these tests: they would show little if both sides had the same pieces or special ids."""
    teacher, student = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (tiny_teacher, student_folder))
    assert teacher.get_vocab_size() == 300 and student.get_vocab_size() == 120
    assert all(teacher.token_to_id(t) != student.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    lexicon = encoded[0]
    assert (np.diff(lexicon.student_offsets) > np.diff(lexicon.teacher_offsets)).sum() >= 100
