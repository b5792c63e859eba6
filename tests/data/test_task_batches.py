"""Batches of tasks are the tokenizers' own encoding, cut by whole words, and outputs come back in the rows' order."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import wordpiece_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from vocabshrink.data import tasks
from vocabshrink.data.batches import Batch
from vocabshrink.data.tasks import Rows, Task, TaskBatcher, encode_task, predictions, score


@pytest.fixture(scope="module")
def student_folder(lines, tmp_path_factory):
    """A small WordPiece vocabulary whose special tokens have other ids than the teacher's."""
    folder = tmp_path_factory.mktemp("student")
    pieces = ["[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"] + wordpiece_pieces(lines, 120)[5:]
    BertTokenizerFast(vocab={p: i for i, p in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_teacher(lines, tmp_path_factory):
    """Folder of a RoBERTa-like tokenizer."""
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(lines, vocab_size=400, special_tokens=special, show_progress=False)
    folder = tmp_path_factory.mktemp("roberta")
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    RobertaTokenizerFast(vocab=tokenizer.get_vocab(), merges=merges).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tiny_teacher, byte_level_teacher):
    return {"bert": tiny_teacher, "roberta": byte_level_teacher}


WORDS = [
    "kalo",
    "mine",
    "Rusa",
    "tovi",
    "zubra",
    "qxz",
    "it's",
    "42.",
    "한국",
    "caf\u00e9",
    "wequ\u200b",
    "\u200b",
    "a\u00a0b",
]
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def task_of(first, second=None, *, kind="classification", targets=None, labels=("no", "yes"), validation=None) -> Task:
    if targets is None:
        targets = np.arange(len(first)) % 2
    splits = {"train": Rows(first, second, targets)} | ({"validation": validation} if validation else {})
    return Task("made", kind, list(labels), splits, ["accuracy"])


def in_order(batcher: TaskBatcher) -> Iterator[Batch]:
    """Every row once, as they stand in the file."""
    for start in range(0, batcher.rows, batcher.order.per_batch):
        yield batcher.of_rows(np.arange(start, min(start + batcher.order.per_batch, batcher.rows)))


def real(side, tensor=None) -> list[list[int]]:
    """The rows without padding."""
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(side.ids if tensor is None else tensor, side.attention_mask, strict=True)
    ]


class TestEncoding:
    @pytest.mark.parametrize("family", ["bert", "roberta"])
    @pytest.mark.parametrize("pair", [False, True])
    def test_batches_are_the_tokenizers_own_encoding(self, teachers, student_folder, tmp_path, family, pair):
        tokenizers = {
            "teacher": AutoTokenizer.from_pretrained(teachers[family]),
            "student": AutoTokenizer.from_pretrained(student_folder),
        }

        @given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=6))
        @settings(max_examples=40)
        def holds(rows):
            first, second = map(list, zip(*rows, strict=True))
            first, second = [*first, "ru"], [*second, "mine"]  # so that there are words at all
            task = task_of(first, second if pair else None)
            encoded = encode_task(task, teachers[family], student_folder, tmp_path)
            batcher = TaskBatcher(encoded, "train", batch_size=4, seed=0, sides=("student", "teacher"), max_pieces=900)
            for batch in in_order(batcher):
                numbers = batch.rows.tolist()
                for name, tokenizer in tokenizers.items():
                    side = getattr(batch, name)
                    texts = [[text[i] for i in numbers] for text in ([first, second] if pair else [first])]
                    expected = tokenizer(*texts)
                    assert real(side) == expected["input_ids"]
                    if pair and name == "student" or family == "bert" and pair:
                        assert real(side, side.token_types) == expected["token_type_ids"]
                    else:
                        assert side.token_types is None
                assert batch.targets.tolist() == [i % 2 for i in numbers]
                assert batch.tokens == int(batch.student.attention_mask.sum())
                units = torch.stack([side.units.max(1).values for side in (batch.student, batch.teacher)])
                assert units.max() + 1 == batch.unit_mask.shape[1] and torch.equal(units[0], units[1])

        holds()

    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_tokens_are_read_as_in_the_sentence(self, teachers, student_folder, tmp_path, family):
        """And a token's label stands at its first piece on either side."""
        tokenizers = {
            "teacher": AutoTokenizer.from_pretrained(teachers[family]),
            "student": AutoTokenizer.from_pretrained(student_folder),
        }

        @given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=1, max_size=5))
        @settings(max_examples=40)
        def holds(rows):
            rows = [*rows, ["ru"]]  # so that there are words at all
            targets = [np.arange(len(row)) + 20 * i for i, row in enumerate(rows)]  # every token its own label
            task = task_of(rows, kind="tokens", targets=targets, labels=list(map(str, range(100))))
            encoded = encode_task(task, teachers[family], student_folder, tmp_path)
            batcher = TaskBatcher(encoded, "train", batch_size=3, seed=0, sides=("student", "teacher"), max_pieces=900)
            for batch in in_order(batcher):
                assert batch.targets is None
                for name, tokenizer in tokenizers.items():
                    side, sentences = getattr(batch, name), [" ".join(rows[i]) for i in batch.rows]
                    assert real(side) == tokenizer(sentences)["input_ids"]
                    for place, i in enumerate(batch.rows.tolist()):
                        seen = [k for k, token in enumerate(rows[i]) if token != "\u200b"]  # BERT reads it as nothing
                        before = [tokenizer(" ".join(rows[i][:k]))["input_ids"][:-1] for k in seen]
                        expected = {len(ids): 20 * i + k for ids, k in zip(before, seen, strict=True)}
                        labels = side.labels[place].tolist()
                        assert {where: label for where, label in enumerate(labels) if label != -100} == expected

        holds()

    def test_is_done_once_for_the_same_rows(self, teachers, student_folder, tmp_path, monkeypatch):
        rows = Rows(["mine kalo"], None, np.array([1]))
        task = task_of(["kalo mine", "ru"], validation=rows)
        first = encode_task(task, teachers["bert"], student_folder, tmp_path)
        assert first.starts["train"].tolist() == [0, 1, 2] and first.starts["validation"].tolist() == [2, 3]
        calls, encode = [], tasks.encode_corpus
        monkeypatch.setattr(tasks, "encode_corpus", lambda *args: calls.append(args) or encode(*args))
        again = encode_task(task, teachers["bert"], student_folder, tmp_path)
        assert not calls and np.array_equal(again.stream.word_ids, first.stream.word_ids)
        for other, teacher in (
            (task_of(["kalo mine", "ru"], validation=Rows(["mine kalu"], None, np.array([1]))), "bert"),
            (task, "bert"),
            (task, "roberta"),
        ):
            encode_task(other, teachers[teacher], student_folder, tmp_path)
        assert len(calls) == 3

    def test_a_crash_leaves_no_half_truth(self, teachers, student_folder, tmp_path, monkeypatch):
        def fail(*args):
            raise KeyboardInterrupt

        encode_task(task_of(["kalo mine"]), teachers["bert"], student_folder, tmp_path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tasks, "write_json", fail)  # the new words are there and the mark is not
            encode_task(task_of(["mine ru kalo"]), teachers["bert"], student_folder, tmp_path)
        found = encode_task(task_of(["kalo mine"]), teachers["bert"], student_folder, tmp_path)
        assert found.stream.line_offsets.tolist() == [0, 2]


@pytest.fixture(scope="module")
def long_task(lines, teachers, student_folder, tmp_path_factory):
    """Pairs of many lengths, encoded."""
    rng = np.random.default_rng(0)
    first, second = ([" ".join(rng.choice(lines, rng.integers(1, 4))) for _ in range(60)] for _ in range(2))
    return encode_task(task_of(first, second), teachers["bert"], student_folder, tmp_path_factory.mktemp("long"))


def halves(side, row) -> tuple[list[int], list[int]]:
    """Pieces of the two sentences of a pair, special tokens left out."""
    ids, types = (t[row][side.attention_mask[row].bool()].tolist() for t in (side.ids, side.token_types))
    first = types.index(1)
    return ids[1 : first - 1], ids[first:-1]


class TestTruncation:
    @pytest.mark.parametrize("limit", [10, 17, 40, 61])
    def test_the_longer_sentence_loses_its_end_by_whole_words(self, long_task, limit):
        sides = ("student", "teacher")
        whole, cut = (
            TaskBatcher(long_task, "train", batch_size=60, seed=0, sides=sides, max_pieces=n).of_rows(np.arange(60))
            for n in (10_000, limit)
        )
        assert cut.student.ids.shape[1] <= limit + 2 and cut.teacher.ids.shape[1] <= limit + 2
        shortened, longest = 0, int(np.diff(long_task.lexicon.student_offsets).max())
        for row in range(60):
            before, after = halves(whole.student, row), halves(cut.student, row)
            room, sizes = limit - 1, list(map(len, before))
            while sum(sizes) > room:  # a piece at a time off the longer, the second where they are equal
                sizes[int(sizes[1] >= sizes[0])] -= 1
            for full, kept, size in zip(before, after, sizes, strict=True):
                assert kept == full[: len(kept)] and size - longest < len(kept) <= size
                shortened += len(kept) < len(full)
            if sum(map(len, before)) <= room:
                assert before == after
            # and the same words are left on both sides
            assert cut.student.units[row].max() == cut.teacher.units[row].max()
        assert shortened > 0

    def test_of_single_sentences(self, teachers, student_folder, tmp_path):
        task = task_of(["kalo mine ru sato", "kalo"])
        batcher = TaskBatcher(
            encode_task(task, teachers["bert"], student_folder, tmp_path), "train", batch_size=2, seed=0, max_pieces=9
        )
        tokenizer = AutoTokenizer.from_pretrained(student_folder)
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("kalo", "mine", "ru", "sato")]
        fitting = next(n for n in (4, 3, 2, 1) if sum(map(len, words[:n])) <= 9)
        assert fitting < 4
        found = real(batcher.of_rows(np.array([0])).student)[0][1:-1]
        assert found == [piece for word in words[:fitting] for piece in word]

    def test_of_tokens_cuts_labels_too(self, teachers, student_folder, tmp_path):
        task = task_of([["kalo", "mine", "ru"]], kind="tokens", targets=[np.array([0, 1, 0])])
        encoded = encode_task(task, teachers["bert"], student_folder, tmp_path)
        batcher = TaskBatcher(encoded, "train", batch_size=1, seed=0, max_pieces=1000)
        whole = batcher.of_rows(np.array([0])).student
        size = int(whole.attention_mask.sum()) - 2
        batch = TaskBatcher(encoded, "train", batch_size=1, seed=0, max_pieces=size - 1).of_rows(np.array([0]))
        assert batch.student.labels[batch.student.labels >= 0].tolist() == [0, 1]

    def test_nothing_may_be_left(self, teachers, student_folder, tmp_path):
        """Text that a vocabulary reads as nothing, or a first word that is too long, is an empty sequence."""
        task = task_of(["\u200b", "kalominerusatovi" * 3, "ru"])
        encoded = encode_task(task, teachers["bert"], student_folder, tmp_path)
        batcher = TaskBatcher(encoded, "train", batch_size=3, seed=0, sides=("student", "teacher"), max_pieces=5)
        batch = next(in_order(batcher))
        assert batch.student.attention_mask.sum(1).tolist()[:2] == [2, 2]
        only = batcher.of_rows(np.array([0, 1]))
        assert only.student.ids.shape == (2, 2) and only.unit_mask.all() and only.tokens == 4


class TestBatcher:
    def test_a_batch_is_a_function_of_its_number(self, long_task):
        one, other = (TaskBatcher(long_task, "train", batch_size=8, seed=3) for _ in range(2))
        rows = {index: one.batch(index).rows.tolist() for index in (0, 9, 3, 16)}
        assert all(other.batch(index).rows.tolist() == rows[index] for index in (16, 3, 0, 9))
        assert TaskBatcher(long_task, "train", batch_size=8, seed=4).batch(0).rows.tolist() != rows[0]
        assert (one.rows, one.order.per_epoch) == (60, 8)

    def test_every_row_once_an_epoch(self, long_task):
        batcher = TaskBatcher(long_task, "train", batch_size=8, seed=3)
        for epoch in (0, 1):
            seen = [batcher.batch(8 * epoch + i).rows.tolist() for i in range(8)]
            assert sorted(sum(seen, [])) == list(range(60))
            assert sum(seen, []) != list(range(60))

    def test_targets(self, teachers, student_folder, tmp_path):
        task = task_of(["kalo", "mine"], kind="regression", targets=np.array([0.5, 2]), labels=())
        encoded = encode_task(task, teachers["bert"], student_folder, tmp_path)
        batch = TaskBatcher(encoded, "train", batch_size=2, seed=0).of_rows(np.array([1, 0]))
        assert batch.targets.dtype == torch.float32 and batch.targets.tolist() == [2, 0.5]
        assert batch.rows.dtype == torch.int64 and batch.rows.tolist() == [1, 0]
        assert batch.teacher is None and batch.mixed is None

    def test_shared_pieces_are_units(self, teachers, tmp_path):
        encoded = encode_task(task_of(["kalo mine", "ru"]), teachers["bert"], teachers["bert"], tmp_path)
        shared = np.arange(300)
        batch = TaskBatcher(encoded, "train", batch_size=2, seed=0, shared=shared).of_rows(np.array([0]))
        assert batch.student.units.tolist() == [list(range(batch.student.ids.shape[1]))]


class TestPredict:
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_in_the_order_of_the_rows(self, long_task, side):
        batcher = TaskBatcher(long_task, "train", batch_size=8, seed=0, sides=("student", "teacher"))
        widths = []

        def model(batch):
            widths.append(getattr(batch, side).ids.shape[1])
            return torch.stack([batch.rows, -batch.rows], 1).bfloat16()

        found = batcher.predict(model, side)
        assert found.shape == (60, 2) and found.dtype == np.float32
        assert found[:, 0].tolist() == torch.arange(60).bfloat16().tolist()
        unsorted = [getattr(batch, side).ids.shape[1] for batch in in_order(batcher)]
        assert sum(widths) < sum(unsorted) and len(widths) == len(unsorted)
        assert score(long_task.task, batcher.predict(lambda b: torch.eye(2)[b.targets]), "train") == {"accuracy": 1}

    def test_of_scores(self, teachers, student_folder, tmp_path):
        task = task_of(["kalo", "mine", "ru"], kind="regression", targets=np.array([0.5, 2, 1]), labels=())
        batcher = TaskBatcher(
            encode_task(task, teachers["bert"], student_folder, tmp_path), "train", batch_size=2, seed=0
        )
        assert batcher.predict(lambda batch: batch.targets).tolist() == [[0.5], [2], [1]]
        assert predictions(task, batcher.predict(lambda batch: batch.targets[:, None])) == [0.5, 2, 1]

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_of_tokens(self, teachers, student_folder, tmp_path, side):
        """Each token is answered by its own first piece; those that are cut off or invisible are O."""
        rows = [["kalo", "\u200b", "mine"], ["ru", "sa"], ["kalo"] * 40]
        targets = [np.array([1, 2, 2]), np.array([2, -1]), np.ones(40, int)]
        task = task_of(rows, kind="tokens", targets=targets, labels=["x", "O", "B-y"])
        encoded = encode_task(task, teachers["roberta"], student_folder, tmp_path)
        sides = ("student", "teacher")
        batcher = TaskBatcher(encoded, "train", batch_size=2, seed=0, sides=sides, max_pieces=30)

        def model(batch):
            """Class 0 at a token's first piece (that of the side), class 2 elsewhere."""
            assert batch.student.labels is None and batch.teacher.labels is None
            pieces = getattr(batcher.of_rows(batch.rows.numpy()), side)
            first = pieces.labels >= 0
            return torch.where(first[..., None], torch.tensor([9.0, 0, 0]), torch.tensor([0, 0, 9.0]))

        found = batcher.predict(model, side)
        answers = [np.argmax(row, 1).tolist() for row in found]
        assert answers[0] == [0, 1, 0]
        assert answers[1] == [0, 2]  # the unlabelled one is answered too, and had no label in the batch
        assert len(answers[2]) == 40 and answers[2][0] == 0 and answers[2][-1] == 1
        assert set(answers[2]) == {0, 1} and answers[2] == sorted(answers[2])
