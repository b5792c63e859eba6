"""The stages of tasks: what they write, that they learn, and that a crash costs no finished training."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import wordpiece_pieces
from tiny_training import NARROW, context_of
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import vocabshrink.stages.tasks
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from vocabshrink.data.tasks import encode_task, headline, predictions, read_logits, score
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.models.teacher import load_task_model
from vocabshrink.run.engine import Run, run_stage, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import Phase, TaskSection, parse_recipe
from vocabshrink.run.stage import stages_of
from vocabshrink.stages.checks import check_all_losses, check_task
from vocabshrink.stages.inputs import read_tasks, read_teacher, start_directions, teacher_folder
from vocabshrink.stages.tasks import finetune, logits_of, phases_of, spread, task_teacher
from vocabshrink.training.augment import augment_task

KIND = {"topic": "classification", "rating": "regression", "slots": "tokens"}
MARKS = {"bad": "kata", "good": "zubra"}  # words that decide a row's label
PLAIN = {"precision": "no", "warmup": 0.0, "batch_size": 8, "max_length": 64, "learning_rate": 3e-3}
SOFT = {"losses": {"soft_labels": 1.0}, "epochs": 0.5, **PLAIN}
LAYERS = {"losses": {"hidden_mse": 1.0, "attention_kl": 1.0}, "epochs": 0.5, **PLAIN}


@pytest.fixture(scope="module")
def data(lines, tmp_path_factory) -> Path:
    """Three tasks that a word decides, 64 rows to train on and 24 for each other split."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    words = sorted({word.strip(".,!?").lower() for line in lines for word in line.split()} - {"42"})
    for split, count in (("train", 64), ("validation", 24), ("test", 24)):
        rows = {name: [] for name in KIND}
        for _ in range(count):
            label = rng.choice(sorted(MARKS))
            tokens = rng.choices(words, k=5)
            tokens.insert(rng.randrange(5), MARKS[label])
            slots = ["B-mark" if token in MARKS.values() else "O" for token in tokens]
            text = {"sentence1": " ".join(tokens[:4]), "sentence2": " ".join(tokens[4:])}
            rows["topic"].append(text | {"label": label})
            rows["rating"].append(text | {"label": float(label == "good") * 3 + len(tokens[0]) / 10})
            rows["slots"].append({"tokens": tokens, "slots": slots})
        for name, found in rows.items():
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def make(data, model, path, *, tasks=("topic",), changes=None, **finetune_section) -> Run:
    """A run whose vocabulary is there; `changes` are of every task."""
    sections = {
        name: {s: str(data / f"{name}-{s}.jsonl") for s in ("train", "validation", "test")}
        | {"kind": KIND[name]}
        | (changes or {})
        for name in tasks
    }
    finetune_section = {"teacher": {"epochs": 8, **PLAIN}, "seeds": [1, 2, 3]} | finetune_section
    recipe = {
        "name": "toy",
        "teacher": {"model": str(model)},
        "corpus": {"sources": ["none.txt"]},
        "student": NARROW,
        "tasks": sections,
        "finetune": finetune_section,
    }
    run = Run(parse_recipe(recipe, "recipe"), RunDir(path))
    texts = [line for file in sorted(data.glob("topic-*")) for line in file.read_text().split("\n")]
    save_tokenizer(make_tokenizer(wordpiece_pieces(texts, 120)), run.dir.stage("vocab"))
    return run


@pytest.fixture(scope="module")
def taught(data, tiny_teacher, tmp_path_factory) -> Run:
    """A run whose teachers are trained, on all three tasks."""
    run = make(data, tiny_teacher, tmp_path_factory.mktemp("taught"), tasks=KIND)
    run_stage(run, "task_teacher")
    return run


def with_teachers(taught, data, model, path, **options) -> Run:
    """Another run beside the same fine-tuned teachers."""
    run = make(data, model, path, **options)
    run.dir.stage("task_teacher").symlink_to(taught.dir.stage("task_teacher"))
    return run


def losses_of(unit: Path) -> list[float]:
    rows = [json.loads(line) for line in (unit / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


# ------------------------------------------------------------------------------------------------ teachers


def test_teachers_learn_their_tasks_and_are_written(taught, tiny_teacher):
    folder = taught.dir.stage("task_teacher")
    assert {path.name for path in folder.iterdir()} == {"DONE", *KIND, "settings.json", "summary.json"}
    summary = read_json(folder / "summary.json")
    assert summary["topic"]["accuracy"] > 0.8 and summary["slots"]["slot_f1"] > 0.8
    assert summary["average"] == pytest.approx(np.mean([headline(summary[name]) for name in KIND]))
    for name in KIND:
        figures = read_json(folder / name / "metrics.json")
        assert figures["steps"] == 64 and figures["validation"] == summary[name] and figures["test"]
        assert losses_of(folder / name)[-1] < 0.5 * losses_of(folder / name)[0]
        assert (folder / name / "logits.safetensors").exists() == (name != "slots")


@torch.no_grad()
def test_a_teacher_s_files_agree_with_each_other(taught):
    folder, task = taught.dir.stage("task_teacher") / "topic", read_tasks(taught.recipe)["topic"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32).eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    logits = read_logits(folder / "logits.safetensors", task)
    assert set(logits) == {"train", "validation", "test"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for split, rows in task.splits.items():
        inputs = tokenizer(rows.first, rows.second, return_tensors="pt", padding=True)
        np.testing.assert_allclose(model(**inputs).logits.numpy(), logits[split], atol=1e-4)
    assert score(task, logits["test"], "test") == read_json(folder / "metrics.json")["test"]


@pytest.mark.parametrize("family", ["roberta", "bert-cased"])
def test_a_task_s_teacher_reads_with_its_own_tokenizer(family, data, tiny_teacher, folders, tmp_path, monkeypatch):
    """Another tokenizer than teacher.model's, and another width: its logits are its own on the text itself."""
    model = tmp_path / "tuned"
    source = folders["roberta"] if family == "roberta" else tiny_teacher
    labels = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    AutoModelForSequenceClassification.from_pretrained(source, **labels).save_pretrained(model)
    if family == "roberta":
        (model / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    else:  # as many pieces in another order: the wrong ids would give no error
        pieces = sorted((vocabulary := load_tokenizer(source).get_vocab()), key=vocabulary.get)
        save_tokenizer(make_tokenizer(pieces[:5] + pieces[:4:-1], lowercase=False), model)
    run = make(data, tiny_teacher, tmp_path / "run", changes={"teacher": str(model)}, phases=[LAYERS, SOFT], seeds=[1])
    check_task(task := read_tasks(run.recipe)["topic"], run.recipe.tasks["topic"])
    trainings = vocabshrink.stages.tasks.TaskTrainings(context_of(run, "finetune"), task)
    own, rows = load_tokenizer(model), task.splits["train"]
    trained = AutoModelForSequenceClassification.from_pretrained(model).eval()
    for number in range(6):
        ids = torch.tensor([pair_ids(own, family, rows.first[number], rows.second[number])])
        types = {} if family == "roberta" else {"token_type_ids": second_sentence(own, rows, number)}
        np.testing.assert_allclose(trained(ids, **types).logits.detach()[0], trainings.logits[number], atol=0.02)
    real, directions = vocabshrink.stages.tasks.TaskTraining, []

    def made(*models, **options):
        directions.append(options["directions"])
        return real(*models, **options)

    monkeypatch.setattr(vocabshrink.stages.tasks, "TaskTraining", made)
    assert np.isfinite(finetune(context_of(run, "finetune"))["topic"]["accuracy"]["median"])
    assert directions == [None]  # those of teacher.model say nothing of this one's dimensions


def pair_ids(tokenizer, family: str, first: str, second: str) -> list[int]:
    """A pair's ids by hand, in the frame of the family."""
    left, right = (tokenizer.encode(text, add_special_tokens=False).ids for text in (first, second))
    cls, sep = ("<s>", ["</s>"] * 2) if family == "roberta" else ("[CLS]", ["[SEP]"])
    names = [[cls], sep, sep[:1]]
    begin, between, end = ([tokenizer.token_to_id(name) for name in part] for part in names)
    return begin + left + between + right + end


def second_sentence(tokenizer, rows, number: int) -> torch.Tensor:
    """[1, T]: 1 for the pieces of a pair's second sentence."""
    return torch.tensor([tokenizer.encode(rows.first[number], rows.second[number]).type_ids])


def test_a_task_with_its_own_teacher_is_left_alone(taught, data, tiny_teacher, tmp_path):
    model = str(taught.dir.stage("task_teacher") / "topic" / "model")
    run = make(data, tiny_teacher, tmp_path, changes={"teacher": model}, phases=[SOFT], seeds=[1])
    assert "task_teacher" not in stages_of(run.recipe)
    assert finetune(context_of(run, "finetune"))["topic"]["accuracy"]["seeds"] == 1


# ------------------------------------------------------------------------------------------------ students


def test_students_learn_and_the_summary_says_how_well(taught, data, tiny_teacher, tmp_path):
    phases, names = [LAYERS, SOFT | {"epochs": 4}], ("rating", "slots")
    run = with_teachers(taught, data, tiny_teacher, tmp_path, tasks=names, phases=phases, seeds=[1, 2])
    summary = finetune(context_of(run, "finetune"))
    assert summary["slots"]["slot_f1"]["median"] > 0.8
    assert set(summary["rating"]) == {"pearson", "spearman"} and set(summary["test"]) == set(names)
    assert summary["rounded"] == {}
    folder, headlines = run.dir.stage("finetune"), []
    for name in names:
        units = {seed: read_json(folder / name / f"seed-{seed}" / "metrics.json") for seed in (1, 2)}
        for metric, found in summary[name].items():
            assert found == spread([unit["validation"][metric] for unit in units.values()])
        headlines += [headline(unit["validation"]) for unit in units.values()]
        assert all(unit["steps"] == 4 + 32 and len(unit["phases"]) == 2 for unit in units.values())
        assert len({tuple(losses_of(folder / name / f"seed-{seed}")) for seed in units}) == 2
    assert summary["average"] == pytest.approx(np.mean(headlines))
    assert summary["tokens"] > 2 * 36 * 8 * 8 and "seconds_per_step" in summary
    assert list(folder.rglob("checkpoints")) == [folder / "checkpoints"]  # no finished training's, and the stage's own


@pytest.mark.parametrize("name, epochs", [("topic", 0.5), ("slots", 3)])
def test_the_median_seed_s_model_is_delivered(name, epochs, taught, data, tiny_teacher, tmp_path):
    run = with_teachers(taught, data, tiny_teacher, tmp_path, tasks=[name], phases=[{"epochs": epochs, **PLAIN}])
    finetune(context_of(run, "finetune"))
    folder, task = run.dir.stage("finetune") / name, read_tasks(run.recipe)[name]
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "model", "seed-1", "seed-2", "seed-3"]
    loader = AutoModelForTokenClassification if name == "slots" else AutoModelForSequenceClassification
    model = loader.from_pretrained(folder / "model", dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, logits = task.splits["validation"], []
    for index, first in enumerate(rows.first):
        if name == "slots":
            inputs = tokenizer(first, is_split_into_words=True, return_tensors="pt")
            words = inputs.word_ids()
            logits.append(model(**inputs).logits[0, [words.index(i) for i in range(len(first))]].numpy())
        else:
            logits.append(model(**tokenizer(first, rows.second[index], return_tensors="pt")).logits[0].numpy())
    figures = {seed: read_json(folder / f"seed-{seed}" / "metrics.json")["validation"] for seed in (1, 2, 3)}
    median = sorted(figures.values(), key=headline)[1]
    assert read_json(folder / "metrics.json")["validation"] == median
    assert score(task, logits, "validation") == pytest.approx(median, abs=1e-3)
    assert len(predictions(task, logits)) == 24


def test_no_model_is_kept_where_none_is_wanted(data, tiny_teacher, tmp_path):
    run = make(data, tiny_teacher, tmp_path, phases=[{"steps": 3, **PLAIN}], save_models=False, teacher=None)
    finetune(context_of(run, "finetune"))
    folder = run.dir.stage("finetune") / "topic"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {
        f"seed-{seed}/metrics.{kind}" for seed in (1, 2, 3) for kind in ("json", "jsonl")
    }


@pytest.mark.parametrize("name", ["topic", "slots"])
def test_rounded_weights_are_scored_beside_the_trained(name, taught, data, tiny_teacher, tmp_path):
    options = {"tasks": [name], "phases": [{"epochs": 3, **PLAIN}], "seeds": [1], "rounded": "int4-32"}
    run = with_teachers(taught, data, tiny_teacher, tmp_path, **options)
    summary = finetune(context_of(run, "finetune"))
    folder, task = run.dir.stage("finetune") / name, read_tasks(run.recipe)[name]
    unit = read_json(folder / "metrics.json")
    model = load_task_model(str(folder / "model"), task, trained=True)  # as trained: rounding came after
    phase, vocabulary = run.recipe.finetune.phases[-1], run.dir.stage("vocab")
    encoded = encode_task(task, teacher_folder(run.recipe.teacher), vocabulary, tmp_path / "rows")
    assert score(task, logits_of(model, encoded, "validation", phase), "validation") == unit["validation"]
    logits = logits_of(fake_quantize_(model, "int4-32"), encoded, "validation", phase)
    assert score(task, logits, "validation") == unit["rounded"]
    assert summary["rounded"] == {name: {m: spread([v]) for m, v in unit["rounded"].items()}} | {
        "average": headline(unit["rounded"])
    }


@pytest.mark.parametrize("name", ["rating", "slots"])
def test_a_model_trained_through_the_rounding_is_what_its_delivery_holds(name, taught, data, tiny_teacher, tmp_path):
    phases = [SOFT | {"epochs": 4}, SOFT | {"epochs": 2, "through_rounding": True}]
    options = {"tasks": [name], "phases": phases, "seeds": [1], "rounded": "int4-32"}
    run = with_teachers(taught, data, tiny_teacher, tmp_path, **options)
    finetune(context_of(run, "finetune"))
    folder, task = run.dir.stage("finetune") / name, read_tasks(run.recipe)[name]
    unit, model = read_json(folder / "metrics.json"), load_task_model(str(folder / "model"), task, trained=True)
    assert unit["rounded"] == unit["validation"]
    assert losses_of(folder / "seed-1")[-1] < 0.7 * losses_of(folder / "seed-1")[0]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in fake_quantize_(model, "int4-32").named_parameters():
        assert torch.allclose(parameter, before[name], rtol=1e-3, atol=1e-6), name


def test_the_first_task_of_a_process_starts_like_any_other(taught, data, tiny_teacher, tmp_path):
    run = with_teachers(taught, data, tiny_teacher, tmp_path, phases=[LAYERS])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert start_directions(context_of(run, "finetune")) is not None and torch.rand(1) == expected


def test_soft_labels_of_scores_are_their_squares():
    section = TaskSection(train="t", validation="v", kind="regression", epochs=5)
    weights = {"labels": 0.5, "soft_labels": {"weight": 2.0, "temperature": 3.0}}
    (phase,) = phases_of([Phase(losses=weights)], section)
    assert phase.epochs == 5 and set(phase.losses) == {"labels", "logits_mse"}
    assert phase.losses["logits_mse"].weight == 2.0 and phase.losses["logits_mse"].arguments == {}
    (phase,) = phases_of([Phase(losses=weights)], section.model_copy(update={"kind": "classification", "epochs": None}))
    assert phase.epochs == 3 and set(phase.losses) == {"labels", "soft_labels"}


def test_the_grid_s_best_setting_is_taken(data, tiny_teacher, tmp_path):
    grid = {"learning_rate": [1e-9, 3e-3], "batch_size": [8, 16]}
    options = {"phases": [{"epochs": 3, **PLAIN}], "grid": grid, "seeds": [1, 2], "teacher": None}
    run = make(data, tiny_teacher, tmp_path, tasks=["slots"], **options)
    finetune(context_of(run, "finetune"))
    folder = run.dir.stage("finetune") / "slots"
    tried = read_json(folder / "grid.json")
    assert set(tried) == {f"learning_rate-{rate}_batch_size-{size}" for rate in ("1e-09", "0.003") for size in (8, 16)}
    best = max(tried, key=tried.get)
    assert best.startswith("learning_rate-0.003") and tried[best] > 0.5
    for seed in (1, 2):
        unit = read_json(folder / f"seed-{seed}" / "metrics.json")
        assert unit["setting"] == best
        assert unit["steps"] == 3 * 64 // int(best.rpartition("-")[2])


def test_a_setting_that_there_is_not_is_refused_with_the_recipe(data, tiny_teacher, tmp_path):
    with pytest.raises(InputError, match=r"finetune: grid: batch_size: .*8\.5"):
        make(data, tiny_teacher, tmp_path, grid={"batch_size": [8, 8.5]}, teacher=None)


def test_stored_logits_need_no_teacher(taught, data, tiny_teacher, tmp_path):
    """And are worth the teacher that gave them."""
    logits = str(taught.dir.stage("task_teacher") / "topic" / "logits.safetensors")
    own = make(data, tiny_teacher, tmp_path / "own", changes={"logits": logits}, phases=[SOFT], seeds=[1])
    beside = with_teachers(taught, data, tiny_teacher, tmp_path / "beside", phases=[SOFT], seeds=[1])
    finetune(context_of(own, "finetune")), finetune(context_of(beside, "finetune"))
    first, second = (losses_of(run.dir.stage("finetune") / "topic" / "seed-1") for run in (own, beside))
    assert first == second
    for options, sentence in (
        ({"phases": [LAYERS]}, r"tasks.topic.logits are logits alone, and losses.attention_kl reads the teacher"),
        ({"phases": [SOFT], "augment": {"copies": 2}}, r"tasks.topic.logits has none of augmented rows"),
    ):
        run = make(data, tiny_teacher, tmp_path / "refused", changes={"logits": logits}, **options)
        with pytest.raises(InputError, match=sentence):
            check_all_losses(run.recipe)


@pytest.mark.parametrize("name", ["topic", "slots"])
def test_augmented_rows_are_trained_on_with_the_teacher_s_logits(name, taught, data, tiny_teacher, tmp_path):
    more = {"p": 0.4, "copies": 2, "candidates": 3}
    options = {"tasks": [name], "phases": [SOFT], "seeds": [1], "augment": more}
    run = with_teachers(taught, data, tiny_teacher, tmp_path, **options)
    made = augment_task(
        read_tasks(run.recipe)[name],
        read_teacher(context_of(run, "augment")),
        run.dir.stage("augment") / f"{name}.jsonl",
        run.recipe.finetune.augment,
        tmp_path / "work",
    )
    assert made["written"] > 64
    finetune(context_of(run, "finetune"))
    unit = read_json(run.dir.stage("finetune") / name / "seed-1" / "metrics.json")
    assert unit["steps"] == -(-(64 + made["written"]) // 16)


def test_spread():
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0, "seeds": 4}


# ------------------------------------------------------------------------------------------------ resuming


class Killed(BaseException):
    pass


def killing(monkeypatch, at: int) -> list[str]:
    """The loop's trainings by name, of which the `at`-th is killed at its end, before its figures are written."""
    begun, train = [], vocabshrink.stages.tasks.train

    def counted(task, batcher, settings, job, *others):
        begun.append(job.stage)
        result = train(task, batcher, settings, job, *others)
        if len(begun) == at:
            raise Killed
        return result

    monkeypatch.setattr(vocabshrink.stages.tasks, "train", counted)
    return begun


def finish_all(run: Run) -> dict:
    for name in ("count", "vocab", "encode"):
        run.dir.stage(name).mkdir(exist_ok=True)
        (run.dir.stage(name) / "DONE").touch()
        (run.dir.stage(name) / "settings.json").write_text(json.dumps(settings_of(run.recipe, name)))
    run_stage(run, "finetune")
    return read_json(run.dir.stage("finetune") / "summary.json")


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_crash_costs_no_finished_training(at, taught, data, tiny_teacher, tmp_path, monkeypatch):
    options = {"phases": [LAYERS, SOFT], "seeds": [1, 2]}
    whole = with_teachers(taught, data, tiny_teacher, tmp_path / "whole", **options)
    expected = finish_all(whole)
    run = with_teachers(taught, data, tiny_teacher, tmp_path / "cut", **options)
    with monkeypatch.context() as patched:
        killing(patched, at)
        if at <= 4:
            with pytest.raises(Killed):
                finish_all(run)
        else:  # killed while the results were put in their place
            patched.setattr(vocabshrink.stages.tasks, "summary_of", lambda units: (_ for _ in ()).throw(Killed))
            patched.setattr(vocabshrink.stages.tasks.shutil, "rmtree", lambda *a, **k: None)
            with pytest.raises(Killed):
                finish_all(run)
    begun = killing(monkeypatch, -1)
    found = finish_all(run)
    seeds = {1: [1, 1, 2, 2], 4: [2, 2], 5: []}[at]
    assert [name.split("-")[2] for name in begun] == [str(seed) for seed in seeds]
    timeless = ("minutes", "seconds_per_step")
    assert {k: v for k, v in found.items() if k not in timeless} == {
        k: v for k, v in expected.items() if k not in timeless
    }
    for seed in (1, 2):
        units = (each.dir.stage("finetune") / "topic" / f"seed-{seed}" for each in (whole, run))
        first, second = map(losses_of, units)
        assert first == second
    assert not (run.dir.stage("finetune") / "checkpoints").exists()


def test_a_teacher_s_crash_costs_no_finished_teacher(data, tiny_teacher, tmp_path, monkeypatch):
    run = make(data, tiny_teacher, tmp_path, tasks=KIND, teacher={"steps": 4, **PLAIN})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killing(patched, 2)
        run_stage(run, "task_teacher")
    begun = killing(monkeypatch, -1)
    run_stage(run, "task_teacher")
    assert [name.split("-")[0] for name in begun] == ["rating", "slots"]
    assert all((run.dir.stage("task_teacher") / name / "model" / "config.json").exists() for name in KIND)
    assert task_teacher(context_of(run, "task_teacher"))["topic"]  # nothing in its way


def test_what_another_recipe_left_is_refused(data, tiny_teacher, tmp_path, monkeypatch):
    options = {"seeds": [1, 2], "teacher": None}
    run = make(data, tiny_teacher, tmp_path, phases=[{"steps": 3, **PLAIN}], **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killing(patched, 2)
        finetune(context_of(run, "finetune"))
    other = make(data, tiny_teacher, tmp_path, phases=[{"steps": 4, **PLAIN}], **options)
    with pytest.raises(InputError, match=r"only/seed-1: made by another recipe: delete the folder"):
        finetune(context_of(other, "finetune"))
    more = make(data, tiny_teacher, tmp_path, phases=[{"steps": 3, **PLAIN}], seeds=[1, 2, 3], teacher=None)
    begun = killing(monkeypatch, -1)
    finetune(context_of(more, "finetune"))  # another seed is no other recipe
    assert [name.split("-")[2] for name in begun] == ["2", "3"]
