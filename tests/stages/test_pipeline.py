"""Whole runs on a tiny teacher: exact files, log rows, refusals, in every mode of dual training."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import dequantize
from safetensors.torch import load_file
from tiny_training import Halves, context_of, launch
from transformers import AutoModel, AutoModelForMaskedLM

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json
from vocabshrink.cli import show_summary
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.models.rounding import quantize
from vocabshrink.models.student import read_student
from vocabshrink.run.engine import Run, run_stage, summarise
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import parse_recipe
from vocabshrink.run.stage import stages_of
from vocabshrink.runtime.delivery import load
from vocabshrink.stages import tasks, training
from vocabshrink.stages.checks import check_recipe
from vocabshrink.stages.inputs import read_teacher
from vocabshrink.stages.training import read_trained_teacher
from vocabshrink.training import loop

TRAINING = {"steps": 6, "batch_size": 16, "max_length": 48, "learning_rate": 1e-3, "precision": "no", "evaluations": 1}
DISTILL = TRAINING | {
    "unit": "sentence",
    "group_size": 4,
    "losses": {"group_similarity": 20, "batch_similarity": 20, "sentence_cosine": 0.5},
}
MODES = {
    "match": {"dual": TRAINING | {"mode": "match", "p_end": 1.0, "unit": "sentence"}, "distill": DISTILL},
    "joint": {
        "dual": TRAINING
        | {
            "mode": "joint",
            "optimizer": "lamb",
            "losses": {
                "student_masked_lm": 1,
                "teacher_masked_lm": 1,
                "parameters_up": 1,
                "parameters_down": 1,
                "hidden_mse": 1,
            },
        },
        "student": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "two_stage": {
        "dual": TRAINING | {"mode": "two_stage"},
        "distill": TRAINING
        | {"mask": 0.15, "losses": {"student_masked_lm": 1, "hidden_cosine": {"weight": 1, "start": 0}}},
        "student": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "untrained": {},
}


def tiny_recipe(teacher, corpus, mode: str, /, **changes) -> dict:
    data = {
        "name": mode,
        "teacher": {"model": str(teacher)},
        "corpus": {"sources": [str(corpus)], "held_out_every": 8, "processes": 1},
        "vocabulary": {"size": 160},
        "evaluation": {"sentences": 30},
        "delivery": {"weights": "int8", "max_positions": 48, "tolerance": 0.5},
    }
    return data | MODES[mode] | changes


def run_all(data: dict, folder) -> Run:
    run = Run(parse_recipe(data, "test"), RunDir(folder))
    check_recipe(run.recipe)
    for name in stages_of(run.recipe):
        if name == "report":
            summarise(run)
        run_stage(run, name)
    return run


@pytest.fixture(scope="module")
def match_run(tiny_teacher, corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "match"
    stsb = folder.with_name("rated.jsonl")
    rows = [
        {"sentence1": a, "sentence2": b, "label": i}
        for i, (a, b) in enumerate([("ka lo", "ka lo."), ("mi", "ne"), ("ru", "sa to")])
    ]
    stsb.write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = folder.with_name("passages.jsonl")
    passages.write_text(
        "".join(
            json.dumps({"text": t, "source": f"s{i}"}) + "\n"
            for i, t in enumerate(["ka lo mi", "ne ru sa", "vi we zu"])
        )
    )
    data = tiny_recipe(tiny_teacher, corpus_file, "match", index={"passages": str(passages)})
    data["evaluation"] |= {"stsb": {"stsb_test": str(stsb)}}
    return data, run_all(data, folder)


def test_run_leaves_its_documented_files(match_run):
    _, run = match_run
    present = {str(p.relative_to(run.dir.path)) for p in run.dir.path.rglob("*") if p.is_file()}
    expected = {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "count/counts.parquet",
        "vocab/tokenizer.json",
        "vocab/tokenizer_config.json",
        "vocab/vocab.txt",
        "vocab/comparison.json",
        "encode/word_ids.npy",
        "dual/student/model.safetensors",
        "distill/student/model.safetensors",
        "distill/student/config.json",
        "distill/student/modules.json",
        "export/model/MANIFEST.json",
        "export/model/onnx/model_quantized.onnx",
        "export/model/index/vectors.npy",
    } | {f"{stage}/DONE" for stage in stages_of(run.recipe)}
    assert expected <= present
    assert not [name for name in present if name.endswith((".pkl", ".bin", ".pt", ".tmp")) or ".partial" in name]


def test_metrics_and_summary(match_run):
    _, run = match_run
    rows = run.dir.metrics()
    for stage, names in (
        ("dual", {"hidden_mse", "batch_similarity", "sentence_cosine"}),
        ("distill", set(DISTILL["losses"])),
    ):
        train = [row for row in rows if row["stage"] == stage and row["kind"] == "train"]
        assert [row["step"] for row in train] == list(range(1, 7))
        assert all(set(row["losses"]) == names for row in train)
        assert all(a["tokens"] < b["tokens"] for a, b in zip(train, train[1:], strict=False))
        assert [row["step"] for row in rows if row["stage"] == stage and row["kind"] == "evaluation"] == [3, 6]
    summary = json.loads((run.dir.path / "summary.json").read_text())
    assert {"minutes", "bytes", "rank_agreement", "neighbour_overlap", "latency_ms", "stsb_test"} <= set(summary)
    assert set(summary["rank_agreement"]) == {"untrained", "trained", "delivered"}
    assert set(summary["bytes"]) == set(summary["latency_ms"]) == {"teacher", "delivered"}
    manifest = json.loads((run.dir.path / "export/model/MANIFEST.json").read_text())
    on_disk = sum(
        (run.dir.path / "export/model" / name).stat().st_size for name in [*manifest["files"], "MANIFEST.json"]
    )
    assert summary["bytes"]["delivered"] == manifest["delivery_bytes"] == on_disk
    assert manifest["quality"]["rank_agreement"] == summary["rank_agreement"]


def test_the_delivery_answers_like_the_student(match_run):
    _, run = match_run
    from transformers import AutoModel

    from vocabshrink.models.forward import torch_embedder
    from vocabshrink.runtime.delivery import load
    from vocabshrink.runtime.index import Index

    student = run.dir.path / "distill" / "student"
    embed = torch_embedder(AutoModel.from_pretrained(student).eval(), student, ModuleSettings(), max_length=48)
    texts = ["Ka lo mi.", "vi we zu bra cli", "ne"]
    assert (load(run.dir.path / "export/model").embed(texts) * embed(texts)).sum(1).min() > 0.98
    assert Index(run.dir.path / "export/model").search("vi we zu", 1)[0]["source"] == "s2"


def test_the_resolved_recipe_is_the_recipe(match_run):
    _, run = match_run
    assert parse_recipe(yaml.safe_load((run.dir.path / "recipe.yaml").read_text()), "resolved") == run.recipe


def test_finished_stages_are_skipped(match_run, capsys):
    data, run = match_run
    before = (run.dir.path / "distill/student/model.safetensors").stat().st_mtime_ns
    again = Run(parse_recipe(data, "test"), run.dir)
    assert not any(run_stage(again, name) for name in stages_of(again.recipe) if name != "report")
    assert (run.dir.path / "distill/student/model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_is_refused_by_the_key_that_differs(match_run):
    data, run = match_run
    changed = data | {"vocabulary": {"size": 170}}
    with pytest.raises(InputError, match=r"vocabulary\.size \(160 -> 170\)"):
        run_stage(Run(parse_recipe(changed, "test"), run.dir), "encode")


@pytest.mark.parametrize("mode", ["joint", "two_stage", "untrained"])
def test_every_mode_runs_to_its_end(mode, tiny_teacher, corpus_file, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    train, began = training.train, []

    def spy(task, *given, **named):
        began.append({name: value.clone() for name, value in task.student.state_dict().items()})
        return train(task, *given, **named)

    monkeypatch.setattr(training, "train", spy)
    run = run_all(tiny_recipe(tiny_teacher, corpus_file, mode), tmp_path / mode)
    assert all(run.dir.is_done(name) for name in stages_of(run.recipe))
    trained = {"joint": "dual/student", "two_stage": "distill/student", "untrained": "export/untrained"}[mode]
    model, tokenizer = (
        AutoModel.from_pretrained(run.dir.path / trained),
        AutoTokenizer.from_pretrained(run.dir.path / trained),
    )
    assert model.config.vocab_size == len(tokenizer) <= 160
    assert np.isfinite(model(**tokenizer("ka lo mi", return_tensors="pt")).last_hidden_state.detach().numpy()).all()
    rows = [row for row in run.dir.metrics() if row["kind"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    # what is called untrained is the student that training began with, its random parts too
    (untrained,) = run.dir.path.glob("*/untrained")
    for name, value in read_student(untrained).state_dict().items() if began else ():
        assert torch.equal(value, began[0][name]), name


@pytest.mark.parametrize("mode", ["match", "joint"])
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "albert", "distilbert"])
def test_teachers_of_every_family(family, mode, folders, corpus_file, tmp_path):
    """Byte-level BPE, SentencePiece and WordPiece teachers, from text to delivery."""
    run = run_all(tiny_recipe(folders[family], corpus_file, mode), tmp_path / "run")
    figures = json.loads((run.dir.path / "summary.json").read_text())
    assert figures["rank_agreement"]["delivered"] > figures["rank_agreement"]["trained"] - 0.1
    lexicon = json.loads((run.dir.path / "encode/meta.json").read_text())
    assert lexicon["teacher"]["family"] != "wordpiece" or family == "distilbert"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_stored_in_half_precision_goes_through_export(dtype, tiny_teacher, corpus_file, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "half")
    AutoModelForMaskedLM.from_pretrained(tiny_teacher).to(dtype).save_pretrained(folder)
    assert read_json(folder / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    run = run_all(tiny_recipe(folder, corpus_file, "joint"), tmp_path / "run")
    figures = read_json(run.dir.path / "summary.json")
    assert figures["rank_agreement"]["delivered"] > figures["rank_agreement"]["trained"] - 0.1
    for saved in ("dual/student", "dual/teacher"):
        assert {v.dtype for v in load_file(run.dir.path / saved / "model.safetensors").values()} == {torch.float32}


def test_a_teacher_without_head_gets_one(tiny_teacher, corpus_file, tmp_path):
    """And the delivery pools as its sentence-transformers files say, and has their prompts."""
    folder = tmp_path / "headless"
    AutoModel.from_pretrained(tiny_teacher).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_teacher / name).read_bytes())
    modules = ModuleSettings("max", False, prompts={"query": "ka "}, default_prompt="query")
    for name, content in modules.files(32, 48).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    joint = tiny_recipe(folder, corpus_file, "joint")
    with pytest.raises(InputError, match="add a masked_lm_head section"):
        check_recipe(parse_recipe(joint, "test"))
    run = run_all(joint | {"masked_lm_head": TRAINING | {"steps": 30, "learning_rate": 1e-2}}, tmp_path / "with")
    losses = [row["loss"] for row in run.dir.metrics() if row["stage"] == "masked_lm_head"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert read_teacher(context_of(run, "distill")).head is not None
    delivery = load(run.dir.path / "export/model")
    said = {"pooling": "max", "normalize": False, "prompts": modules.prompts, "default_prompt": "query"}
    assert said.items() <= delivery.manifest.items()
    assert 'Prompt `query`: "ka " before each text' in (run.dir.path / "export/model/README.md").read_text()
    np.testing.assert_allclose(delivery.embed(["mi"]), delivery.embed(["ka mi"], prompt=""), atol=1e-6)


def test_the_head_that_dual_training_trained_is_the_one_that_distillation_reads(tiny_teacher, corpus_file, tmp_path):
    distill = TRAINING | {"mask": 0.15, "losses": {"student_masked_lm": 1, "masked_lm_match": 1}}
    run = run_all(tiny_recipe(tiny_teacher, corpus_file, "joint", distill=distill), tmp_path / "run")
    context = context_of(run, "distill")
    teacher = read_teacher(context)
    before = teacher.head.dense.weight.clone()
    read_trained_teacher(context, teacher)
    kept = load_file(run.dir.stage("dual") / "teacher_head/model.safetensors")
    assert torch.equal(teacher.head.dense.weight, kept["cls.predictions.transform.dense.weight"])
    assert not torch.equal(teacher.head.dense.weight, before)


def test_a_killed_stage_resumes_to_the_same_student(tiny_teacher, corpus_file, tmp_path, monkeypatch):
    import vocabshrink.training.loop as loop

    changes = {"distill": DISTILL | {"checkpoint_minutes": 1e-9}}
    whole = run_all(tiny_recipe(tiny_teacher, corpus_file, "untrained", **changes), tmp_path / "whole")
    data, folder = tiny_recipe(tiny_teacher, corpus_file, "untrained", **changes), tmp_path / "killed"
    real, calls = loop.save_checkpoint, []

    def die_after_three(*arguments, **options):
        real(*arguments, **options)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", die_after_three)
    with pytest.raises(KeyboardInterrupt):
        run_all(data, folder)
    monkeypatch.setattr(loop, "save_checkpoint", real)
    resumed = run_all(data, folder)
    weights = [run.dir.path / "distill/student/model.safetensors" for run in (whole, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    steps = [row["step"] for row in resumed.dir.metrics() if row["kind"] == "train"]
    assert steps == list(range(1, 7))


def test_what_is_called_untrained_is_what_training_began_with(tiny_teacher, corpus_file, tmp_path, monkeypatch):
    began, real = [], training.train

    def train(task, *arguments, **options):
        began.append({name: value.clone() for name, value in task.student.state_dict().items()})
        return real(task, *arguments, **options)

    monkeypatch.setattr(training, "train", train)
    student = {"initialize": "extract_random", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained", student=student, distill=DISTILL)
    run = Run(parse_recipe(data, "test"), RunDir(tmp_path / "run"))
    for name in ("count", "vocab", "encode", "distill"):
        run_stage(run, name)
    kept, trained = (read_student(run.dir.stage("distill") / name).state_dict() for name in ("untrained", "student"))
    assert all(torch.equal(began[0][name], value) for name, value in kept.items())
    assert not all(torch.equal(began[0][name], value) for name, value in trained.items())


def test_stored_vectors_outlive_a_kill_at_the_end_of_their_stage(tiny_teacher, corpus_file, tmp_path, monkeypatch):
    distill = {"steps": 1, "batch_size": 4, "max_length": 32, "losses": {"sentence_cosine": 1}}
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained", vectors={"sentences": 40}, distill=distill)
    run = Run(parse_recipe(data, "test"), RunDir(tmp_path / "killed"))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "finish", die)
        run_stage(run, "vectors")
    before = (run.dir.stage("vectors") / "teacher.npy").read_bytes()
    monkeypatch.setattr("vocabshrink.stages.training.torch_embedder", lambda *arguments, **options: die)
    run_stage(run, "vectors")  # embeds nothing again
    assert (run.dir.stage("vectors") / "teacher.npy").read_bytes() == before
    assert not (run.dir.stage("vectors") / "checkpoints").exists()


@pytest.fixture
def begun(tiny_teacher, lines, tmp_path):
    """A run on a corpus of its own, up to `encode`; the corpus."""
    corpus = tmp_path / "own.txt"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    run = Run(
        parse_recipe(tiny_recipe(tiny_teacher, corpus, "untrained", distill=DISTILL), "test"), RunDir(tmp_path / "run")
    )
    for name in ("count", "vocab"):
        run_stage(run, name)
    return run, corpus


@pytest.mark.parametrize("hidden", [False, True])
def test_other_text_in_the_same_file_is_refused_by_name(hidden, begun):
    run, corpus = begun
    whole, about = corpus.read_text(), corpus.stat()
    corpus.touch()
    run_stage(run, "encode")  # it is the text that counts
    corpus.write_text(whole.replace("ka", "zz"))  # as long as before
    if hidden:
        os.utime(corpus, ns=(about.st_atime_ns, about.st_mtime_ns))
    for name in ("count", "distill"):
        with pytest.raises(InputError, match=r"own\.txt is not what it was when .*count was made from it: put back"):
            run_stage(run, name)
    corpus.unlink()
    assert not run_stage(run, "count")  # its words are counted, whatever became of it
    corpus.write_text(whole)
    assert not run_stage(run, "encode")


def test_a_damaged_stage_is_refused_before_it_is_read(begun):
    run, _ = begun
    run_stage(run, "encode")
    path = run.dir.stage("encode") / "word_ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="word_ids.npy is damaged, altered or missing since stage encode"):
        run_stage(run, "distill")


def test_over_budget_leaves_no_delivery(tiny_teacher, corpus_file, tmp_path):
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained")
    data["delivery"] |= {"budget": 20_000}
    with pytest.raises(InputError, match="over the budget"):
        run_all(data, tmp_path / "run")
    assert not (tmp_path / "run/export/model").exists()


def test_a_vocabulary_that_is_there_is_taken_as_it_is(match_run, tiny_teacher, corpus_file, tmp_path):
    """The delivery's own tokenizer leads back to the vocabulary that it came from."""
    _, run = match_run
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained")
    data["vocabulary"] = {"size": 999, "tokenizer": str(run.dir.path / "export/model")}
    again = Run(parse_recipe(data, "test"), RunDir(tmp_path / "again"))
    for name in ("count", "vocab"):
        run_stage(again, name)
    assert (again.dir.stage("vocab") / "vocab.txt").read_bytes() == (run.dir.stage("vocab") / "vocab.txt").read_bytes()
    assert json.loads((again.dir.stage("vocab") / "tokenizer.json").read_text()) == json.loads(
        (run.dir.stage("vocab") / "tokenizer.json").read_text()
    )


def test_the_teachers_own_vocabulary_is_kept_piece_by_piece(tiny_teacher, corpus_file, tmp_path):
    data = tiny_recipe(tiny_teacher, corpus_file, "untrained")
    data["vocabulary"] = {"tokenizer": "teacher"}
    run = Run(parse_recipe(data, "test"), RunDir(tmp_path / "own"))
    for name in ("count", "vocab"):
        run_stage(run, name)
    assert (run.dir.stage("vocab") / "vocab.txt").read_text() == (tiny_teacher / "vocab.txt").read_text()


def quantize_of(model, name: str, format: str) -> float:
    """How much one more rounding changes a weight, against its largest value."""
    weight = model.get_parameter(name).detach().numpy()
    return abs(dequantize(quantize(weight, format)) - weight).max() / abs(weight).max()


def recipe_of_tasks(teacher, corpus_file, lines, folder) -> dict:
    """TinyBERT's two phases on augmented rows, after general distillation; 80 rows that a word decides."""
    words = ["ka", "lo", "mi"]
    rows = [{"sentence1": line, "label": int(any(w in line.lower().split() for w in words))} for line in lines[:120]]
    for name, part in {"train": rows[:80], "validation": rows[80:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    phase = {"epochs": 1, "batch_size": 16, "precision": "no", "learning_rate": 1e-3}
    return tiny_recipe(
        teacher,
        corpus_file,
        "untrained",
        student={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
        distill=TRAINING | {"losses": {"attention_scores": 1, "hidden_mse": 1, "embedding_mse": 1}},
        data=str(folder),
        tasks={"made_up": {"train": "train.jsonl", "validation": "validation.jsonl"}},
        finetune={
            "teacher": phase,
            "phases": [
                phase | {"losses": {"attention_scores": 1, "hidden_mse": 1, "embedding_mse": 1}},
                phase | {"losses": {"soft_labels": 1}},
            ],
            "augment": {"copies": 2, "candidates": 3},
            "rounded": "int4-32",
            "seeds": [1, 2],
        },
        recovery=DISTILL | {"learning_rate": 1e-4},
        delivery={"weights": "int4-32", "max_positions": 48, "tolerance": 0.5, "safetensors": "fp16"},
    )


def test_tasks_run_from_augmentation_to_report(tiny_teacher, corpus_file, lines, tmp_path, capsys):
    """Each stage once and never again."""
    run = run_all(recipe_of_tasks(tiny_teacher, corpus_file, lines, tmp_path), tmp_path / "run")
    summary = summarise(run)
    show_summary(summary)
    shown = capsys.readouterr().out
    assert "rank agreement" in shown and "by block" not in shown and "made_up" in shown and "average" in shown
    result = summary["tasks"]
    export = tmp_path / "run/export"
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    texts = [row["sentence1"] for row in rows]
    labels, scores = load(export / "made_up").classify(texts)
    assert scores.shape == (40, 2) and set(labels) <= {"0", "1"}
    right = sum(int(label) == row["label"] for label, row in zip(labels, rows, strict=True)) / 40
    assert summary["made_up"]["accuracy"]["delivered"] == pytest.approx(right)
    # recovery left in the student what the files hold: rounding it again changes nothing
    trained = AutoModel.from_pretrained(tmp_path / "run/recovery/student")
    delivered = AutoModel.from_pretrained(export / "model", dtype=torch.float32)
    for name, one in trained.named_parameters():
        if name.startswith("pooler"):  # of which an embedder has none
            continue
        two = delivered.get_parameter(name)
        assert torch.allclose(one[: len(two)], two, atol=2e-3), name  # the delivery has fewer positions
    assert quantize_of(trained, "encoder.layer.0.attention.self.query.weight", "int4-32") < 1e-6
    assert AutoModel.from_pretrained(export / "model").config.hidden_size == 16
    card = (export / "made_up/README.md").read_text()
    assert "A text classifier" in card and str(summary["made_up"]["bytes"])[:2] in card
    assert 120 < len((tmp_path / "run/augment/made_up.jsonl").read_text().splitlines()) <= 160  # copies that differ
    accuracy = result["made_up"]["accuracy"]
    assert accuracy["min"] <= accuracy["median"] <= accuracy["max"] and accuracy["seeds"] == 2
    assert (tmp_path / "run/finetune/made_up/model/config.json").is_file()
    assert "made_up" in (tmp_path / "run/report.html").read_text()
    assert not any(run_stage(run, name) for name in stages_of(run.recipe) if name != "report")


def test_two_processes_run_every_stage(tiny_teacher, corpus_file, lines, tmp_path, monkeypatch):
    """`accelerate launch` on two CPU processes, started on nothing: they wait for each other between and within the
    stages, leave the files of one process, and train as one does that accumulates what they take of each batch."""
    data = recipe_of_tasks(tiny_teacher, corpus_file, lines, tmp_path)
    data |= {"dual": TRAINING | {"mode": "joint"}, "name": "two"}
    data["finetune"] |= {"grid": {"learning_rate": [1e-4, 1e-3]}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(data))
    launch("vocabshrink", "run", "two.yaml", cwd=tmp_path)
    trainings = [data["dual"], data["distill"], data["recovery"], data["finetune"]["teacher"]]
    for section in trainings + data["finetune"]["phases"]:
        section["gradient_accumulation"] = 2
    for module in (training, tasks):
        monkeypatch.setattr(module, "micro_batch", lambda settings, *_: settings.batch_size)
    prefetch = loop.prefetch
    monkeypatch.setattr(loop, "prefetch", lambda batcher, *rest: prefetch(Halves(batcher), *rest))
    one, two = run_all(data, tmp_path / "one").dir, RunDir(tmp_path / "artifacts/two")
    files = {path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two.path) for path in two.path.rglob("*") if path.is_file()}
    ours, theirs = ([row for row in run.metrics() if row["kind"] == "train"] for run in (two, one))
    assert [(row["stage"], row["step"]) for row in ours] == [(row["stage"], row["step"]) for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0.01)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    ours, theirs = (read_json(run.stage("finetune") / "summary.json")["made_up"] for run in (two, one))
    assert ours == theirs
