"""What cannot work is refused before anything runs: from the recipe, the files it names and the models' configs."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from test_pipeline import DISTILL, TRAINING, tiny_recipe
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tokenizer_build import tokenizer
from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from vocabshrink.cli import app
from vocabshrink.data.tasks import read_logits, read_task
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.run.recipe import TaskSection, parse_recipe
from vocabshrink.stages import checks
from vocabshrink.stages.checks import check_recipe

NARROW = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STORED = DISTILL | {"losses": {"sentence_cosine": 1}, "group_size": 1}
SCORES = {"distill": TRAINING | {"losses": {"attention_scores": 1}}}
TASK = {"tasks": {"made_up": {"train": "none.jsonl", "validation": "none.jsonl"}}, "finetune": {}}

# family of the teacher -> [(sections, what is said)]
REFUSED = {
    "bert": [
        ({"masked_lm_head": TRAINING}, "has a masked-LM head already: remove masked_lm_head"),
        ({"student": {"hidden_size": 30}}, "num_attention_heads 4 does not divide hidden_size 30"),
        ({"student": {"num_hidden_layers": 5}, "distill": DISTILL}, "the student has 5 layers and the teacher only 2"),
        ({"distill": DISTILL | {"layer_map": [[1, 3]]}}, r"pair \(1, 3\) is outside"),
        ({"student": {"initialize": "extract_random", "intermediate_size": 99}}, "intermediate_size 99 is over"),
        ({"dual": {"mode": "match", "steps": 2, "losses": {"teacher_masked_lm": 1}}}, "dual.losses.teacher_masked_lm"),
        ({"evaluation": {"sentences": 5}}, "evaluation.sentences: 5 are too few to check the delivery"),
        ({"evaluation": {"sentences": 30, "stsb": {"rated": "none.jsonl"}}}, "evaluation.stsb.rated: none.jsonl: no"),
        ({"index": {"passages": "none.jsonl"}}, "index.passages: none.jsonl: no such file"),
        (TASK, "tasks.made_up.train: none.jsonl: no such file"),
        ({"delivery": {"budget": "20kB"}}, "over the budget"),
        ({"teacher_sha256": "0" * 64}, "sha256 is .*, the recipe's is 0+: not the same weights"),
    ],
    "albert": [
        ({"student": NARROW | {"initialize": "extract_importance"}}, "a albert teacher does not have BERT's layers")
    ],
    "mpnet": [
        (SCORES, "mpnet: how its attention is computed is not known"),
        ({"distill": DISTILL | {"max_length": 65}}, "distill.max_length 65 is over the student's 64 positions"),
    ],
}


@pytest.mark.parametrize(
    "family, sections, sentence", [(family, *case) for family, cases in REFUSED.items() for case in cases]
)
def test_is_refused(family, sections, sentence, folders, corpus_file):
    sections = dict(sections)
    data = tiny_recipe(folders[family], corpus_file, "untrained")
    if sha256 := sections.pop("teacher_sha256", None):
        data["teacher"] |= {"sha256": sha256}
    with pytest.raises(InputError, match=sentence):
        check_recipe(parse_recipe(data | sections, "test"))


ROWS = [{"sentence1": f"kalo {i}", "label": "abc"[i % 3]} for i in range(60)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_head_of_every_named_file_is_read_first(tiny_teacher, corpus_file, tmp_path):
    pointer = tmp_path / "pointer.txt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    rows, bodies = write_rows(tmp_path / "rows.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", [{"body": "a"}])
    blank = write_rows(tmp_path / "blank.jsonl", [*ROWS, {"sentence1": "kalo"}])

    def task(**files):
        return {"tasks": {"made_up": {"train": rows, "validation": rows} | files}, "finetune": {}}

    for sections, sentence in (
        (
            {"corpus": {"sources": [str(corpus_file), str(pointer)]}},
            "corpus.sources: .*pointer.txt is a Git LFS pointer",
        ),
        ({"corpus": {"sources": [bodies]}}, "corpus.sources: .*b.jsonl: row 1 has no column 'text'"),
        ({"index": {"passages": bodies}}, "index.passages: .*b.jsonl: row 1 has no column 'text'"),
        ({"evaluation": {"sentences": 30, "stsb": {"v": bodies}}}, "evaluation.stsb.v: .*row 1 needs sentence1"),
        ({"vocabulary": {"required": ["kalo", "new-york"]}}, "required word 'new-york' is 3 words"),
        ({"vocabulary": {"tokenizer": str(tmp_path)}}, "has no tokenizer.json and no vocab.txt"),
        ({"vocabulary": {"tokenizer": "./none"}}, "vocabulary.tokenizer ./none: no such file or folder"),
        (
            {"vocabulary": {"tokenizer": "teacher", "lowercase": False}},
            "vocabulary.lowercase: False is not what .* does",
        ),
        ({"vocabulary": {"tokenizer": "teacher", "required": ["kalo"]}}, "vocabulary.required: a given tokenizer"),
        (task(train=blank), "blank.jsonl: row 61: label None is none of a, b, c"),
        (task(teacher="nowhere/none"), "tasks.made_up.teacher nowhere/none: neither a local folder"),
        ({"student": {"start": "./none"}}, "student.start ./none: no such folder"),
        (
            {"vectors": {"sentences": 9, "teachers": {"second": {"model": "./none"}}}, "distill": STORED},
            "vectors.teachers.second.model ./none: no such folder",
        ),
        (task(teacher=str(tiny_teacher)), "its outputs are LABEL_0, LABEL_1 and those of task made_up a, b, c"),
        (task(logits=rows), "no logits to read"),
    ):
        data = tiny_recipe(tiny_teacher, corpus_file, "untrained") | sections
        with pytest.raises(InputError, match=sentence):
            check_recipe(parse_recipe(data, "test"))
    check_recipe(parse_recipe(tiny_recipe(tiny_teacher, corpus_file, "untrained") | task(), "test"))


def test_text_without_sentences_is_refused_before_it_is_counted(tiny_teacher, lines, tmp_path):
    live = {"evaluation": {"sentences": 0}, "delivery": None, "distill": DISTILL}
    words = [line.rstrip(".!?,24 ").split() for line in lines]
    long = [" ".join(words[i] + words[i + 1] + words[i + 2] + words[i + 3] + words[i + 4]) for i in range(300)]
    for text, sections, sentence in (
        ([" ".join(line[:3]) for line in words], {}, "only 0 sentences of 4 words or more, 20 are needed: give"),
        ([" ".join(line[:3]) for line in words], live, "only 0 sentences of 4 words or more, 1 are needed"),
        (["ka lo. mi ne! ru sa?"] * 400, {}, "only 0 sentences of 4 words or more"),
        (lines[:100], {}, "only 12 sentences of 4 words .*: give more text or hold out more"),
        (long, {}, None),  # of which the first words are taken
        (lines[:100], live, None),
        (["ka lo. mi ne! ru sa?"] * 400, live, None),  # whole lines are trained on
    ):
        (tmp_path / "text.txt").write_text("\n".join(text))
        recipe = parse_recipe(tiny_recipe(tiny_teacher, tmp_path / "text.txt", "untrained") | sections, "test")
        with pytest.raises(InputError, match=f"^corpus: {sentence}") if sentence else nullcontext():
            check_recipe(recipe)


def test_a_teacher_s_tokenizer_is_read_twice_at_most(folders, corpus_file, monkeypatch):
    """By those that look at it, and by the one that takes it apart: XLM-R's takes seconds."""
    read, parse = [], tokenizer.parse_tokenizer
    monkeypatch.setattr(tokenizer, "parse_tokenizer", lambda *given: (read.append(given[1]), parse(*given))[1])
    folder = shutil.copytree(folders["xlm-roberta"], corpus_file.with_name("xlmr"))
    sections = {"vectors": {"sentences": 9}, "distill": STORED}
    check_recipe(parse_recipe(tiny_recipe(folder, corpus_file, "untrained") | sections, "test"))
    assert len(read) <= 2 and {path.parent for path in read} == {folder}


BROKEN = {
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "empty": b"",
    "cut": None,
    "page": b"<!doctype html>",
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_broken_downloads_are_named(name, tiny_teacher, corpus_file, tmp_path):
    for how, content in BROKEN.items():
        folder = shutil.copytree(tiny_teacher, tmp_path / how)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(InputError, match=f"{how}.*(be read|not JSON|be loaded)"):
            check_recipe(parse_recipe(tiny_recipe(folder, corpus_file, "untrained"), "test"))


@pytest.mark.parametrize("kind", ["classification", "tokens"])
def test_a_teacher_that_orders_its_unnamed_labels_otherwise(kind, tiny_teacher, corpus_file, tmp_path, monkeypatch):
    """LABEL_0, LABEL_1, LABEL_2: what it says of the training rows tells the order."""
    tokens = kind == "tokens"
    loader = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    loader.from_pretrained(tiny_teacher, num_labels=3).save_pretrained(folder)
    rows = [{"tokens": [row["sentence1"]], "slots": [row["label"]]} for row in ROWS] if tokens else ROWS
    path, order, seen = write_rows(tmp_path / "rows.jsonl", rows), [0, 1, 2], []

    def logits_of(model, encoded, split, phase):
        seen.append(len(encoded.task.splits["train"]))
        said = [np.eye(3)[order][target] for target in encoded.task.splits["train"].targets]
        return said if tokens else np.stack(said)

    task = {"train": path, "validation": path, "teacher": str(folder), "kind": kind}
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained") | {"tasks": {"made_up": task}, "finetune": {}}
    check_recipe(parse_recipe(data, "test"))  # random outputs, which agree in no order
    monkeypatch.setattr(checks, "logits_of", logits_of)
    check_recipe(parse_recipe(data, "test"))
    order[:] = [1, 2, 0]
    with pytest.raises(InputError, match="teacher: its outputs agree with the training rows in the order c, a, b, not"):
        check_recipe(parse_recipe(data, "test"))
    assert seen == [60, 60]


def test_given_logits_of_another_order_are_refused_and_those_of_an_own_teacher_are_not(
    tiny_teacher, corpus_file, tmp_path
):
    """A teacher of the task itself knows its order, however little it learnt in a few steps."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    section = TaskSection(train=path, validation=path, logits=str(tmp_path / "logits.safetensors"))
    task = read_task(section, "made_up")
    save_file({"train": np.eye(3)[(task.splits["train"].targets + 1) % 3]}, section.logits)
    assert read_logits(section.logits, task)["train"].shape == (len(ROWS), 3)
    given = section.model_dump(include={"train", "validation", "logits"})
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained") | {"tasks": {"made_up": given}, "finetune": {}}
    with pytest.raises(InputError, match="logits.safetensors: its outputs agree with the training rows in the order"):
        check_recipe(parse_recipe(data, "test"))


def test_a_folder_that_joins_poolings_needs_the_recipes_word(tiny_teacher, corpus_file, tmp_path):
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    for name, content in ModuleSettings().files(32, 48).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": ["cls", "mean"]})
    data = tiny_recipe(folder, corpus_file, "untrained")
    with pytest.raises(InputError, match="pooling by cls and mean cannot be learnt: give teacher.pooling, one of mean"):
        check_recipe(parse_recipe(data, "test"))
    check_recipe(parse_recipe(data | {"teacher": {"model": str(folder), "pooling": "max"}}, "test"))


@pytest.mark.parametrize("how", ["extract_random", "extract_importance"])
def test_a_refused_extraction_leaves_no_stage_folder(how, folders, corpus_file, tmp_path, monkeypatch):
    data = tiny_recipe(folders["albert"], corpus_file, "untrained", student={"initialize": how})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    words = f"^student.initialize {how}: a albert teacher does not have BERT's layers: choose teacher or random$"
    with pytest.raises(InputError, match=words):
        app(["run", "recipe.yaml"], standalone_mode=False)
    assert not list(tmp_path.glob("artifacts/*/*"))


@pytest.mark.parametrize("mode", ["joint", "two_stage"])
def test_dual_training_needs_a_head(mode, headless_teacher, corpus_file):
    data = tiny_recipe(headless_teacher, corpus_file, mode)
    with pytest.raises(InputError, match="needs a masked-LM head .* add a masked_lm_head section"):
        check_recipe(parse_recipe(data, "test"))
    check_recipe(parse_recipe(data | {"masked_lm_head": TRAINING}, "test"))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "albert", "distilbert", "mpnet"])
def test_teachers_of_every_family_pass(family, folders, corpus_file):
    check_recipe(parse_recipe(tiny_recipe(folders[family], corpus_file, "match"), "test"))


def test_a_teacher_s_unknown_piece_may_be_its_padding(tiny_teacher, corpus_file, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "[PAD]"}))
    check_recipe(parse_recipe(tiny_recipe(folder, corpus_file, "match"), "test"))


def test_a_decoder_is_no_teacher(tiny_teacher, corpus_file, tmp_path):
    for file in tiny_teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(InputError, match="bert has a decoder: only encoders can be teachers"):
        check_recipe(parse_recipe(tiny_recipe(tmp_path, corpus_file, "untrained"), "test"))
