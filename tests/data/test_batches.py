"""Batches gathered from the lexicon are what the two tokenizers give, masked, mixed and drawn as promised."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import made_up_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from word_tables import SIDES, inner, lacking, make_student, make_text, pieces_of, same, same_strings

from tokenizer_build.errors import InputError
from vocabshrink.data import batches
from vocabshrink.data.batches import (
    Batch,
    Batcher,
    PieceTable,
    Segments,
    Sequences,
    cut_segments,
    gather_words,
    near_groups,
    prefetch,
    rare_words,
)
from vocabshrink.data.lexicon import Lexicon, WordStream, encode_corpus

LIMIT = 40  # pieces without special tokens: many lines need more, so that cutting is at work


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
def segments(encoded):
    lexicon, stream = encoded
    return cut_segments(stream, lexicon, unit="line", max_pieces=LIMIT, min_words=2, held_out_every=7)


@pytest.fixture(scope="module")
def make_batcher(encoded, table, segments):
    def make(**options) -> Batcher:
        keywords = {"batch_size": 8, "seed": 3, "sides": SIDES, "max_pieces": LIMIT, "segments": segments[0]} | options
        return Batcher(keywords.pop("table", table), encoded[1], encoded[0], keywords.pop("segments"), **keywords)

    return make


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
            for start, length, pieces in zip(*vars(segments).values(), strict=True):
                line = np.searchsorted(offsets, start, side="right") - 1
                assert start + length <= offsets[line + 1] and length >= 3
                assert (line % 7 == 6) == held_out
                words = stream.word_ids[start : start + length]
                assert cost[words].sum() == pieces <= LIMIT
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
        monkeypatch.setattr(batches, "BLOCK_WORDS", 30)
        for left, right in zip(whole, cut(), strict=True):
            assert np.array_equal(left.starts, right.starts) and np.array_equal(left.lengths, right.lengths)

    def test_nothing_to_train_on_is_refused(self, encoded, table):
        lexicon, stream = encoded
        none, _ = cut_segments(stream, lexicon, unit="line", max_pieces=LIMIT, min_words=5000, held_out_every=7)
        with pytest.raises(InputError, match="no run of enough words fits 40 pieces: give more text"):
            Batcher(table, stream, lexicon, none, batch_size=4, seed=0, sides=("student",), max_pieces=LIMIT)


def clean_words(batcher: Batcher, index: int) -> list[tuple[int, ...]]:
    """The word ids of each segment of a batch, by the segments themselves."""
    chosen = batcher.order.rows(index)
    return [int(s) for s in batcher.segments.starts[chosen]]


class TestBatcher:
    @pytest.mark.parametrize("group_size", [1, 4])
    def test_a_batch_is_a_function_of_its_number(self, make_batcher, group_size):
        options = {"group_size": group_size, "mask": 0.15, "p": lambda index: 0.3 + index / 1000}
        one, other = make_batcher(**options), make_batcher(**options)
        numbers = [0, 5, one.order.per_epoch, one.order.per_epoch + 3, 2 * one.order.per_epoch - 1]
        first = {i: one.batch(i) for i in numbers}
        assert all(same(first[i], other.batch(i)) for i in reversed(numbers))
        assert all(same(first[i], one.batch(i)) for i in (numbers[3], numbers[0], numbers[4], numbers[1]))
        assert not same(first[0], first[5]) and not same(first[0], make_batcher(**options, seed=4).batch(0))

    @pytest.mark.parametrize(("batch_size", "group_size"), [(8, 1), (7, 1), (12, 4), (1, 1), (3, 4), (10**6, 1)])
    def test_every_segment_once_an_epoch(self, make_batcher, segments, batch_size, group_size):
        batcher = make_batcher(batch_size=batch_size, group_size=group_size)
        orders = []
        for epoch in range(2):
            seen = [
                s
                for i in range(batcher.order.per_epoch)
                for s in clean_words(batcher, epoch * batcher.order.per_epoch + i)
            ]
            assert sorted(seen) == sorted(segments[0].starts.tolist())
            orders.append(seen)
        if batcher.order.per_batch < len(segments[0].starts):
            assert orders[0] != orders[1]

    def test_batches_hold_their_segments_and_no_held_out_line(self, make_batcher, encoded, segments, table):
        stream, batcher = encoded[1], make_batcher(sides=("teacher",))
        offsets = np.asarray(stream.line_offsets)
        for index in range(batcher.order.per_epoch):
            starts = clean_words(batcher, index)
            assert all((np.searchsorted(offsets, s, side="right") - 1) % 7 != 6 for s in starts)
            words = gather_words(stream, batcher.segments, batcher.order.rows(index))
            assert words.count == len(starts) and same(batcher.batch(index).teacher, table.gather(words, False))
        assert not set(segments[0].starts) & set(segments[1].starts)

    def test_lengths_are_pooled(self, make_batcher, segments):
        """Little padding: within a batch lengths in pieces are near, although batches come in any order."""
        batcher = make_batcher()
        batches = [batcher.batch(i) for i in range(batcher.order.per_epoch)]
        longest = [np.maximum(batch.student.lengths, batch.teacher.lengths) for batch in batches]
        assert np.mean(list(map(np.ptp, longest))) <= 2 < np.ptp(np.concatenate(longest))
        means = [lengths.mean() for lengths in longest]
        assert means != sorted(means)

    @pytest.mark.parametrize("group_size", [1, 4])
    @pytest.mark.parametrize("limit", [LIMIT, 12])
    def test_nothing_exceeds_the_limit(self, make_batcher, group_size, limit):
        """Also where a swap brings in a longer word, or segments were cut longer than the batch may be."""
        batcher = make_batcher(batch_size=16, group_size=group_size, max_pieces=limit)
        widths = []
        for index in range(batcher.order.per_epoch):
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
        inside, side = inner(batch.mixed), batch.student if p else batch.teacher
        assert torch.equal(batch.mixed.units, side.units) and torch.equal(
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
            before = torch.cat([torch.zeros(len(mixed.units), 1, dtype=torch.int64) - 1, mixed.units[:, :-1]], 1)
            starts = inner(mixed) & (mixed.units != before)
            from_student = mixed.ids[starts] >= table.teacher_size
            assert (
                abs(from_student.float().mean() - expected) < 5 * (expected * (1 - expected) / len(from_student)) ** 0.5
            )

    def test_unit_mask_is_of_units_that_both_sides_have(self, encoded, table):
        lexicon = encoded[0]
        words = np.arange(table.words)
        one = Sequences(words, np.zeros(len(words), np.int64), 1)
        expected = [all(pieces_of(lexicon, word, side) for side in (False, True)) for word in words]
        assert table.unit_mask(one).tolist() == [[True, *expected, True]]

    @pytest.mark.parametrize("fine", [False, True])
    def test_unit_mask_covers_the_units_of_every_side(self, make_batcher, table, sharing, fine):
        ragged = make_batcher(table=sharing if fine else table).batch(1)
        for side in SIDES:
            counts = [int(row.max()) + 1 for row in getattr(ragged, side).units]
            assert ragged.unit_mask.shape[1] == max(counts) and ragged.unit_mask.sum(1).tolist() == counts

    @pytest.mark.parametrize("shared", [None, np.arange(9)])
    def test_unit_mask_without_a_piece_on_either_side(self, shared):
        lexicon = lacking()
        stream, segments = SimpleNamespace(word_ids=np.arange(3)), Segments(*np.array([[0], [3], [3]]))
        table = PieceTable(lexicon, shared=shared)
        batch = Batcher(table, stream, lexicon, segments, batch_size=1, seed=0, sides=SIDES).batch(0)
        assert batch.unit_mask.tolist() == [[True, True, False, False, True]]
        assert batch.teacher.units.tolist() == [[0, 1, 3, 4]] and batch.student.units.tolist() == [[0, 1, 2, 4]]

    def test_a_word_without_pieces_on_both_sides_is_no_unit(self):
        lexicon = lacking()
        offsets = np.array([0, 1, 1])  # of two words, the second empty
        lexicon.teacher_offsets, lexicon.student_offsets, lexicon.counts = offsets, offsets, np.ones(2, int)
        lexicon.teacher_ids, lexicon.student_ids = lexicon.teacher_ids[:1], lexicon.student_ids[:1]
        for shared, expected in ((np.full(9, 5), [True] * 4), (None, [True, True, False, True, True])):
            table, words = PieceTable(lexicon, shared=shared), np.array([0, 1, 0])
            sequences = Sequences(words, np.zeros(3, int), 1)
            assert table.unit_mask(sequences).tolist() == [expected]
            units = table.gather(sequences, False).units
            assert units.tolist() == [np.flatnonzero(expected).tolist()]

    def test_the_same_segment_is_mixed_anew_each_time(self, make_batcher, segments):
        batcher = make_batcher(segments=segments[0].take([1]), sides=("mixed",))
        assert len({str(batcher.batch(index).mixed.ids.tolist()) for index in range(30)}) == 30

    def test_masks_and_sides_are_those_asked_for(self, make_batcher):
        batch = make_batcher(sides=("student",), mask=1.0).batch(0)
        assert batch.teacher is None and batch.mixed is None
        assert torch.equal(batch.student.labels >= 0, inner(batch.student))
        assert make_batcher(sides=("student",)).batch(0).student.labels is None

    def test_tokens_are_student_pieces(self, make_batcher):
        batch = make_batcher().batch(0)
        assert batch.tokens == int(batch.student.attention_mask.sum())

    def test_moves_to_a_device(self, make_batcher):
        batch = make_batcher(sides=("student", "mixed"), mask=0.1).batch(0)
        assert isinstance(batch.to("cpu"), Batch) and same(batch, batch.to("cpu"))
        batch.targets, batch.rows = torch.zeros(8), torch.arange(8)
        batch.student.token_types = torch.zeros_like(batch.student.ids)
        moved = batch.to("meta")
        assert moved.teacher is None and moved.tokens == batch.tokens
        assert (moved.mixed.token_types, moved.targets.shape, moved.rows.shape) == (None, (8,), (8,))
        tensors = [*vars(moved.student).values(), moved.unit_mask, moved.targets, moved.rows, moved.mixed.ids]
        assert {tensor.device.type for tensor in tensors} == {"meta"}

    @pytest.mark.parametrize(("group_size", "processes"), [(1, 2), (1, 3), (4, 2)])
    def test_processes_share_the_batch_of_one(self, make_batcher, group_size, processes):
        """So that a run may go on with another number of them; also where the last batch is too short for all."""
        batcher = make_batcher(batch_size=24, group_size=group_size, mask=0.15)
        lengths = [len(batcher.order.rows(index)) for index in range(batcher.order.per_epoch)]
        for index in (0, 1, lengths.index(min(lengths))):
            whole = batcher.batch(index)
            groups = torch.arange(len(whole.unit_mask)).view(-1, group_size)
            for rank, part in enumerate(whole.part(rank, processes) for rank in range(processes)):
                rows = groups[rank::processes].flatten()
                rows = rows if len(rows) else groups[0]
                assert part.tokens == whole.tokens and part.unit_mask.sum() == whole.unit_mask[rows].sum()
                for side in SIDES:
                    ours, theirs = getattr(part, side), getattr(whole, side)
                    width = int(theirs.lengths[rows].max())
                    assert ours.ids.shape == (len(rows), width) and not theirs.attention_mask[rows, width:].any()
                    for name in ("ids", "units", "labels", "attention_mask"):
                        assert torch.equal(getattr(ours, name), getattr(theirs, name)[rows, :width])
                    assert ours.units.max() < part.unit_mask.shape[1]
        parts = [make_batcher(batch_size=24).batch(1).part(rank, 2) for rank in range(2)]
        positions = [part.student.attention_mask.numel() for part in parts]
        assert max(positions) < 1.15 * min(positions)  # neither waits for the other

    def test_prefetch_keeps_the_order(self, make_batcher):
        batcher = make_batcher(mask=0.15)
        numbers = [0, 3, 1, batcher.order.per_epoch + 2, 2, 0]
        expected = [make_batcher(mask=0.15).batch(i) for i in numbers]
        found = list(prefetch(batcher, iter(numbers)))
        assert len(found) == len(numbers) and all(same(a, b) for a, b in zip(found, expected, strict=True))
        assert list(prefetch(batcher, iter([]))) == []

    def test_prefetch_begins_no_batch_for_a_consumer_that_stopped(self):
        """As Ctrl-C stops it: what was begun is finished, what waits is dropped, and the thread ends."""
        begun, go_on = [], threading.Event()

        def make(index):
            begun.append(index)
            return index if index == 0 else go_on.wait() and index

        threads, batches = set(threading.enumerate()), prefetch(SimpleNamespace(batch=make), iter(range(9)))
        assert next(batches) == 0
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
        assert begun in ([0], [0, 1]) and set(threading.enumerate()) == threads

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
    @settings(max_examples=300)
    def test_properties(self, drawn):
        sentences, rare, seed = drawn
        words = np.array([w for s in sentences for w in s])
        sequence = np.repeat(np.arange(len(sentences)), [len(s) for s in sentences])
        before = words.copy()
        groups = near_groups(Sequences(words, sequence, len(sentences)), rare, np.random.default_rng(seed))
        found, numbers = groups.words, groups.numbers
        assert groups.count == 4 * len(sentences) and np.array_equal(words, before) and np.all(np.diff(numbers) >= 0)
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
            one = Sequences(sentence, np.zeros(10, int), 1)
            groups = near_groups(one, np.ones(12, bool), np.random.default_rng(seed))
            found, numbers = groups.words, groups.numbers
            part = found[numbers == 3].tolist()
            counts["rotation" if len(part) == 10 else "first" if part[0] == 0 else "second"] += 1
            counts[10 - int((numbers == 2).sum())] += 1
            places.add(int(np.flatnonzero(found[numbers == 1] != sentence)[0]))
        assert all(80 < counts[kind] < 120 for kind in ("first", "second", "rotation"))
        assert 120 < counts[1] < 180 and places == set(range(10))

    def test_reach_the_batch_in_order(self, make_batcher, encoded, table):
        batcher = make_batcher(sides=("teacher",), batch_size=16, group_size=4, max_pieces=500)
        chosen = batcher.order.rows(0)
        plain = table.gather(gather_words(encoded[1], batcher.segments, chosen), False)
        grouped = batcher.batch(0).teacher
        assert len(grouped.ids) == 4 * len(chosen) == 16
        assert torch.equal(grouped.ids[::4, : plain.ids.shape[1]], plain.ids)


def is_subsequence(short: list, long: list) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


def test_gather_words_reads_any_segments(encoded):
    stream = encoded[1]
    segments = Segments(*np.array([[5, 0, 12], [3, 2, 4], [6, 4, 8]]))
    found = gather_words(stream, segments, np.array([2, 0]))
    assert found.words.tolist() == [*stream.word_ids[12:16].tolist(), *stream.word_ids[5:8].tolist()]
    assert found.numbers.tolist() == [0, 0, 0, 0, 1, 1, 1] and found.words.dtype == np.int64 and found.count == 2


def test_the_student_is_another_vocabulary(tiny_teacher, student_folder, encoded):
    """Guards these tests: they would show little if both sides had the same pieces or special ids."""
    teacher, student = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (tiny_teacher, student_folder))
    assert teacher.get_vocab_size() == 300 and student.get_vocab_size() == 120
    assert all(teacher.token_to_id(t) != student.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    lexicon = encoded[0]
    assert (np.diff(lexicon.student_offsets) > np.diff(lexicon.teacher_offsets)).sum() >= 100
