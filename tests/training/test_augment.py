"""Augmented rows: words by the masked-LM head or by the piece table, and a file that goes on where it was left."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, RobertaConfig, RobertaForMaskedLM

from vocabshrink.data.tasks import Rows, Task
from vocabshrink.models.teacher import load_teacher
from vocabshrink.run.recipe import AugmentSection
from vocabshrink.training import augment
from vocabshrink.training.augment import CandidateFinder, augment_task, augmented_rows

SETTINGS = AugmentSection(p=0.4, copies=5, candidates=6)


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tmp_path_factory):
    """With a head that does not give every place the same words."""
    folder = shutil.copytree(tiny_teacher, tmp_path_factory.mktemp("augment") / "teacher")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return load_teacher(str(folder))


@pytest.fixture(scope="module")
def headless(teacher):
    return dataclasses.replace(teacher, head=None)


@pytest.fixture(scope="module")
def whole(teacher):
    """Words that are one piece of the teacher's, longest first."""
    pieces = Tokenizer.from_file(str(teacher.folder / "tokenizer.json")).get_vocab()
    return sorted((p for p in pieces if p.isalpha() and len(p) > 1), key=lambda piece: (-len(piece), piece))


def task_of(first, targets, *, second=None, kind="classification", labels=("bad", "good")) -> Task:
    return Task("toy", kind, list(labels), {"train": Rows(first, second, targets)}, ["accuracy"])


@pytest.fixture(scope="module")
def task(lines):
    return task_of(lines[:150], np.arange(150) % 2)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------- candidates


@torch.no_grad()
def in_place_of_the_mask(teacher, sentence: str) -> list[str]:
    """The vocabulary by transformers' own logits at the sentence's [MASK]."""
    tokenizer = Tokenizer.from_file(str(teacher.folder / "tokenizer.json"))
    ids = tokenizer.encode(sentence).ids
    model = AutoModelForMaskedLM.from_pretrained(teacher.folder).eval()
    logits = model(input_ids=torch.tensor([ids])).logits[0, ids.index(tokenizer.token_to_id("[MASK]"))]
    return [tokenizer.id_to_token(i) for i in logits.argsort(descending=True).tolist()]


def test_a_word_of_one_piece_takes_the_heads_most_probable_words(teacher, whole):
    sentence = f"{whole[0]} {whole[1]} , {whole[2]} {whole[3]} ."
    words = CandidateFinder(teacher, 6)([(sentence,)])[0]
    for word, own in zip(words, whole[:4], strict=True):
        ranked = in_place_of_the_mask(teacher, sentence.replace(own, "[MASK]"))
        assert word.candidates == [piece for piece in ranked if piece in whole and piece != own][:6]


def test_what_a_word_takes_does_not_hang_on_its_neighbours_in_the_batch(teacher, lines):
    finder, sentences = CandidateFinder(teacher, 6), [(line,) for line in lines[:40]]
    assert finder(sentences[:3]) == finder(sentences)[:3]


def by_letters(teacher, pieces: list[str]) -> list[str]:
    """The vocabulary by cosine to the pieces' mean, each weighted by its letters."""
    tokenizer = Tokenizer.from_file(str(teacher.folder / "tokenizer.json"))
    table = teacher.table.weight.detach()
    weights = torch.tensor([float(len(piece.removeprefix("##"))) for piece in pieces])
    mean = weights @ table[[tokenizer.token_to_id(piece) for piece in pieces]]
    order = F.cosine_similarity(table, mean.unsqueeze(0)).argsort(descending=True)
    return [tokenizer.id_to_token(i) for i in order.tolist()]


def test_a_word_of_several_pieces_takes_the_nearest_of_the_table(teacher, headless, whole):
    long = whole[0]
    for used in (teacher, headless):
        (word,) = CandidateFinder(used, 6)([(f"{long}xq",)])[0]
        assert len(word.pieces) == 3
        assert word.candidates == [p for p in by_letters(teacher, [long, "##x", "##q"]) if p in whole][:6]
    assert word.candidates[0] == long
    (word,) = CandidateFinder(headless, 6)([(long,)])[0]  # without a head a word of one piece too, and never itself
    assert word.candidates == [p for p in by_letters(teacher, [long]) if p in whole and p != long][:6]


def test_a_word_that_its_pieces_say_nothing_of_is_masked_whole(teacher, headless, whole):
    """One mask for all its pieces: the head predicts words of one piece."""
    sentence = f"{whole[1]} xqxqxq {whole[2]}"
    word = CandidateFinder(teacher, 6)([(sentence,)])[0][1]
    ranked = in_place_of_the_mask(teacher, sentence.replace("xqxqxq", "[MASK]"))
    assert word.candidates == [piece for piece in ranked if piece in whole][:6]
    assert not CandidateFinder(headless, 6)([(sentence,)])[0][1].candidates


def test_numbers_signs_and_contractions_stay(headless, whole):
    a, b = whole[:2]
    sentence = f"{a} 42 , {b}'s {a}n't n't 4th 上海 e\u0301{a} ( {b} )"
    words = CandidateFinder(headless, 6)([(sentence,)])[0]
    assert [sentence[w.start : w.end] for w in words if w.candidates] == [a, b]


def test_the_word_itself_is_no_candidate_however_it_is_written(headless, whole):
    for written in (whole[0].capitalize(), whole[0].upper()):
        (word,) = CandidateFinder(headless, 6)([(written,)])[0]
        assert len(word.candidates) == 6 and whole[0] not in word.candidates


def test_a_sentence_beyond_the_positions_takes_nearest_words(teacher, headless, whole):
    sentence = (" ".join(whole[:5] * 20),)
    (words,), (nearest,) = (CandidateFinder(used, 6)([sentence]) for used in (teacher, headless))
    assert len(words) == 100 and words == nearest and all(word.candidates for word in words)


def test_the_teacher_runs_on_the_accelerator_s_device(teacher, whole, monkeypatch):
    device, moved = torch.device("cpu"), []
    monkeypatch.setattr(augment, "PartialState", lambda: SimpleNamespace(device=device))
    for module in (teacher.backbone, teacher.head):
        monkeypatch.setattr(module, "to", lambda device, module=module: moved.append((module, device)))
    CandidateFinder(teacher, 6)([(whole[0],)])
    assert moved == [(teacher.backbone, device), (teacher.head, device)]


def test_a_byte_level_teacher_gives_words_without_its_mark(lines, tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    vocabulary = tokenizer.get_vocab()
    known = [p[1:] for p in vocabulary if p.startswith("Ġ") and p[1:].isalpha() and len(p) > 2]
    words = CandidateFinder(load_teacher(str(tmp_path)), 6)([(f"{known[0]} {known[1]} , {known[2]}.",)])[0]
    assert all(word.candidates for word in words[1:])
    assert {new for word in words for new in word.candidates} <= set(known)


# -------------------------------------------------------------------------------------------------- rows


def test_the_rows_of_a_task(teacher, task, tmp_path):
    seen = []
    summary = augment_task(task, teacher, tmp_path / "toy.jsonl", SETTINGS, tmp_path / "work", progress=seen.append)
    rows, train = read(tmp_path / "toy.jsonl"), task.splits["train"]
    assert seen == [64, 64, 22] and summary["rows"] == 150 and summary["written"] == len(rows) > 700
    changed = total = 0
    for row in rows:
        assert set(row) == {"sentence1", "label", "source"}
        assert row["label"] == task.labels[train.targets[row["source"]]]
        old, new = train.first[row["source"]].split(), row["sentence1"].split()
        assert len(old) == len(new) and old != new
        changed, total = changed + sum(map(str.__ne__, old, new)), total + len(old)
        assert old[0][0].isupper() == new[0][0].isupper() and old[-1][-1] == new[-1][-1]
    assert 0.35 < changed / total < 0.45
    assert len({(row["source"], row["sentence1"]) for row in rows}) == len(rows)


def test_p_is_the_probability_of_each_word(teacher, task, tmp_path):
    augment_task(task, teacher, tmp_path / "none.jsonl", SETTINGS.model_copy(update={"p": 0.0}), tmp_path / "work")
    assert read(tmp_path / "none.jsonl") == []
    augment_task(task, teacher, tmp_path / "all.jsonl", SETTINGS.model_copy(update={"p": 1.0}), tmp_path / "work")
    for row in read(tmp_path / "all.jsonl"):
        old, new = task.splits["train"].first[row["source"]].split(), row["sentence1"].split()
        assert all(o != n for o, n in zip(old, new, strict=True) if o.isalpha())


def test_pairs_change_both_sentences_and_scores_stay(teacher, lines, tmp_path):
    task = task_of(lines[:20], np.arange(20) / 4, second=lines[20:40], kind="regression", labels=())
    augment_task(task, teacher, tmp_path / "toy.jsonl", SETTINGS, tmp_path / "work")
    rows = read(tmp_path / "toy.jsonl")
    assert all(row["label"] == row["source"] / 4 for row in rows)
    assert sum(row["sentence1"] != lines[row["source"]] for row in rows) > 90
    assert sum(row["sentence2"] != lines[20 + row["source"]] for row in rows) > 90


def test_tokens_keep_their_number_and_labels(teacher, whole, tmp_path):
    tokens = [[whole[0], f"{whole[1]} {whole[2]}", "42", whole[3].capitalize()], [whole[4], "."]]
    targets = [np.array([0, 1, 0, 1]), np.array([1, 0])]
    task = task_of(tokens, targets, kind="tokens", labels=("O", "B-x"))
    augment_task(task, teacher, tmp_path / "toy.jsonl", SETTINGS.model_copy(update={"p": 0.8}), tmp_path / "work")
    rows = read(tmp_path / "toy.jsonl")
    assert {row["source"] for row in rows} == {0, 1}
    for row in rows:
        assert len(row["tokens"]) == len(tokens[row["source"]])
        assert row["slots"] == [task.labels[i] for i in targets[row["source"]]]
        assert row["source"] == 1 or (
            row["tokens"][1].count(" ") == 1 and row["tokens"][2] == "42" and row["tokens"][3].istitle()
        )
    both = augmented_rows(task, tmp_path / "toy.jsonl")
    assert both.first[:2] == tokens and both.first[2:] == [row["tokens"] for row in rows]
    assert all(np.array_equal(both.targets[2 + k], targets[row["source"]]) for k, row in enumerate(rows))


# ------------------------------------------------------------------------------------------------ resume


def test_a_killed_run_goes_on_after_the_last_whole_block(teacher, task, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "ROWS_IN_BLOCK", 40)
    whole, out, work = tmp_path / "whole.jsonl", tmp_path / "toy.jsonl", tmp_path / "work"
    expected = augment_task(task, teacher, whole, SETTINGS, tmp_path / "other")

    def stop(rows):
        raise KeyboardInterrupt

    for _ in range(2):  # killed behind each of two blocks
        with pytest.raises(KeyboardInterrupt):
            augment_task(task, teacher, out, SETTINGS, work, progress=stop)
    assert not out.exists()
    seen = []
    assert augment_task(task, teacher, out, SETTINGS, work, progress=seen.append) == expected
    assert seen == [40, 30] and out.read_bytes() == whole.read_bytes()


def test_other_settings_rows_or_teachers_begin_anew(teacher, headless, task, tmp_path):
    out, seen = tmp_path / "toy.jsonl", []
    other = task_of(task.splits["train"].first, 1 - task.splits["train"].targets)
    for used, settings, asked in (
        (teacher, SETTINGS, task),
        (teacher, SETTINGS.model_copy(update={"p": 0.5}), task),
        (headless, SETTINGS, task),
        (teacher, SETTINGS, other),
    ):
        augment_task(asked, used, out, settings, tmp_path / "work", progress=seen.append)
    assert sum(seen) == 4 * 150
    augment_task(other, teacher, out, SETTINGS, tmp_path / "work", progress=seen.append)
    assert sum(seen) == 4 * 150


def test_training_rows_with_their_copies(teacher, task, tmp_path):
    out = tmp_path / "toy.jsonl"
    augment_task(task, teacher, out, SETTINGS, tmp_path / "work")
    copies, both = read(out), augmented_rows(task, out)
    train = task.splits["train"]
    assert both.first == [*train.first, *(row["sentence1"] for row in copies)] and both.second is None
    assert both.targets.dtype == train.targets.dtype
    assert both.targets.tolist() == [*train.targets, *(train.targets[row["source"]] for row in copies)]
