"""Ablations: refusals that name the variant, stages made once, tables that are right after every finished run."""

import importlib
import json
import multiprocessing
import os
import re
import time

import pytest
import yaml

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, read_json
from vocabshrink.lab import ablations
from vocabshrink.lab.ablations import figures_of, read_ablation, rows_of, run_ablations, runs_of
from vocabshrink.pages.experiments import plot
from vocabshrink.run.folder import RunDir
from vocabshrink.run.stage import STAGES

TRAINING = {"steps": 4, "batch_size": 16, "max_length": 32, "learning_rate": 1e-3, "precision": "no", "threads": 1}
LAYERS = {"epochs": 1, "batch_size": 8, "max_length": 32, "learning_rate": 1e-3, "precision": "no", "threads": 1}
BASE = {
    "name": "base",
    "teacher": {"model": "teacher"},
    "corpus": {"sources": ["corpus.txt"], "held_out_every": 8, "processes": 1},
    "vocabulary": {"size": 160},
    "student": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
    "distill": TRAINING | {"losses": {"hidden_mse": 1, "attention_scores": 1}},
    "tasks": {
        "mood": {"train": "mood/train.jsonl", "validation": "mood/validation.jsonl"},
        "pairs": {"train": "pairs/train.jsonl", "validation": "pairs/validation.jsonl", "metrics": ["f1", "accuracy"]},
    },
    "finetune": {
        "phases": [LAYERS | {"losses": {"hidden_mse": 1}}, LAYERS | {"losses": {"soft_labels": 1}}],
        "teacher": LAYERS,
        "save_models": False,
    },
    "evaluation": {"sentences": 0},
    "delivery": None,
}
TWO = {
    "all": {},
    "labels only": {"finetune.phases.0": None, "finetune.phases.1.losses": {"labels": 1}, "distill": None},
}


def written(folder, base=BASE, /, name="two", **keys):
    """Path of an ablation file over a base recipe beside it."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")
    path = folder / f"{name}.yaml"
    data = {"name": name, "title": "Two variants", "base": "base.yaml", "variants": TWO} | keys
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def replace(monkeypatch, name, function):
    """Puts `function` in the place of a stage's own; returns that one."""
    place = importlib.import_module(f"vocabshrink.stages.{STAGES[name].module}")
    before = getattr(place, name)
    monkeypatch.setattr(place, name, function)
    return before


@pytest.fixture
def made(monkeypatch):
    """Stages that only count themselves: a list of (stage, its folder's name)."""
    made = []

    def stub(name):
        def stage(run):
            made.append((name, run.dir.stage(name).name))
            (run.dir.stage(name) / "checkpoints" / "last").mkdir(parents=True)
            if name == "finetune":
                return finetuned(run)
            if name == "task_teacher":
                return {"mood": {"accuracy": 0.95}, "pairs": {"f1": 0.9, "accuracy": 0.8}, "average": 0.9}
            return {"steps": 4, "tokens": 1000, "seconds": 2.0}

        return stage

    for name in STAGES:
        replace(monkeypatch, name, stub(name))
    monkeypatch.setattr(ablations, "plot", lambda *_: "<svg></svg>")  # most of the time of a stubbed run
    return made


def finetuned(run) -> dict:
    """A summary as the finetune stage writes it, which depends on the phases and on the seed."""
    (seed,) = run.recipe.finetune.seeds
    mood = 0.5 + 0.2 * len(run.recipe.finetune.phases) + 0.01 * seed

    def one(value):
        return {"median": value, "min": value, "max": value, "seeds": 1}

    return {
        "mood": {"accuracy": one(mood)},
        "pairs": {"f1": one(0.7), "accuracy": one(0.6)},
        "average": (mood + 0.65) / 2,
        "seconds_per_step": 0.25,
        "tokens": 500,
        "test": {"mood": {"accuracy": one(0.4)}},
        "rounded": {"mood": {"accuracy": one(mood - 0.1)}, "average": mood - 0.1}
        if run.recipe.finetune.rounded
        else {},
    }


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"baselin": "all"}, "two.yaml: unknown key baselin: did you mean baseline"),
        ({"baseline": "none"}, "baseline: there is no variant none: write one of all, labels only"),
        ({"baseline": {"all": "none"}}, "baseline: there is no variant none: write one of all, labels only"),
        ({"baseline": {"none": "all"}}, "baseline: there is no variant none: write one of all, labels only"),
        ({"seeds": [1, 1]}, "seeds: a seed is written twice"),
        ({"seeds": []}, "two.yaml: seeds: "),
        ({"vary": "teacher"}, "two.yaml: vary: "),
        ({"variants": {}}, "two.yaml: variants: "),
        ({"variants": {"a b": {}, "a+b": {}}}, "two labels share the folder 'a_b'"),
        ({"variants": {2000: {}}}, "two.yaml: variants.2000"),
        ({"variants": {"x": {"vocabulary.siez": 7}}}, "variant x: unknown key vocabulary.siez: did you mean size"),
        ({"variants": {"x": {"distill.losses.hiden": 1}}}, "two.yaml: variant x: distill.losses.hiden: unknown loss"),
        ({"variants": {"x": {"dual.p": 0.5}}}, "variant x: dual.p: the base recipe has no dual: correct the key"),
        ({"variants": {"x": {"distill.losses.labels": None}}}, "the base recipe has no distill.losses.labels"),
        ({"variants": {"x": {"finetune.phases.2.epochs": 1}}}, "the base recipe has no finetune.phases.2"),
        ({"variants": {"x": {"name.first": 1}}}, "variant x: name.first: name is a value, not a section"),
        ({"variants": {"x": {"finetune": None}}}, "variant x: it has no finetune section"),
        (
            {"common": {"finetune.teacher": None}},
            "variant all: finetune.phases.0.losses.hidden_mse needs a fine-tuned teacher",
        ),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such recipe: correct its path"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        runs_of(written(tmp_path, **keys), [], tmp_path / "root")


def test_what_is_no_ablation_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: no such ablation: correct its path"):
        read_ablation(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text at byte 0"):
        read_ablation(tmp_path / "bytes.yaml")
    written(tmp_path)
    with pytest.raises(InputError, match="base.yaml: an ablation is a mapping with base, variants"):
        read_ablation(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        ("distill.steps", "write an override as key.subkey=value"),
        ("dual.steps=3", "dual.steps=3 over .*base.yaml: the base recipe has no dual"),
        ("distill.setps=3", "variant all: unknown key distill.setps: did you mean steps"),
        ("seeds=[x]", "two.yaml: seeds.0"),
    ],
)
def test_bad_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        runs_of(written(tmp_path), [override], tmp_path / "root")


def recipes(runs) -> dict:
    return {run.name: run.recipe for run in runs}


def test_the_command_line_scales_and_the_variant_has_the_last_word(tmp_path):
    path = written(
        tmp_path,
        common={"distill.batch_size": 32, "distill.layer_map": "last"},
        variants={"plain": {}, "own": {"distill.layer_map": "first", "distill.steps": 9}, "none": {"distill": None}},
    )
    overrides = ["distill.steps=7", "distill.batch_size=64", "tasks.pairs=", "seeds=[5]"]
    _, runs = runs_of(path, overrides, tmp_path / "root")
    found = recipes(runs)
    assert [run.recipe.finetune.seeds for run in runs] == 3 * [[5]] and list(found) == ["plain", "own", "none"]
    assert (found["plain"].distill.steps, found["own"].distill.steps, found["none"].distill) == (7, 9, None)
    assert (found["plain"].distill.layer_map, found["own"].distill.layer_map) == ("last", "first")
    assert found["plain"].distill.batch_size == 32 and list(found["plain"].tasks) == ["mood"]
    assert found["own"].name == "two-own" and found["own"].delivery is None


def test_null_takes_out_a_loss_a_phase_or_a_section(tmp_path):
    found = recipes(runs_of(written(tmp_path), [], tmp_path / "root")[1])
    assert [list(phase.losses) for phase in found["labels only"].finetune.phases] == [["labels"]]
    changes = {"x": {"distill.losses.hidden_mse": None, "finetune.phases.1": None, "finetune.phases.0.epochs": 2}}
    found = recipes(runs_of(written(tmp_path, variants=changes), [], tmp_path / "root")[1])
    assert list(found["x"].distill.losses) == ["attention_scores"]
    assert [phase.epochs for phase in found["x"].finetune.phases] == [2]


def test_what_a_seed_changes(tmp_path):
    for vary, seeds_of_runs in (("finetune", {0}), ("run", {1, 2, 3})):
        _, runs = runs_of(written(tmp_path, vary=vary), [], tmp_path / "root")
        assert {run.recipe.seed for run in runs} == seeds_of_runs
        assert [run.recipe.finetune.seeds for run in runs] == [[1], [1], [2], [2], [3], [3]]
        general = {run.dir.stage("distill") for run in runs if run.name == "all"}
        assert len(general) == len(seeds_of_runs) and len({run.dir.stage("finetune") for run in runs}) == 6


def test_stages_in_common_are_made_once(tmp_path, made):
    first = written(tmp_path, seeds=[1, 2])
    second = written(tmp_path, name="three", seeds=[1, 2], variants=TWO | {"more": {"distill.steps": 5}})
    run_ablations([first, second], root=tmp_path / "root")
    count = {name: len([m for m in made if m[0] == name]) for name, _ in made}
    # distill with 4 and with 5 steps; finetune of three variants and two seeds; no export, no report
    assert count == {"count": 1, "vocab": 1, "encode": 1, "distill": 2, "task_teacher": 1, "finetune": 6}
    assert len(set(made)) == len(made)
    assert not list((tmp_path / "root").rglob("checkpoints"))
    before = len(made)
    again = run_ablations([first, second], root=tmp_path / "root")
    assert len(made) == before and again["finished"] == {"three": "6 of 6", "two": "4 of 4"}


def test_rows_say_median_spread_cost_and_difference(tmp_path, made):
    path = written(tmp_path, baseline="labels only")
    summary = run_ablations([path], root=tmp_path / "root")
    assert summary == read_json(tmp_path / "root" / "summary.json")
    rows = {(r["recipe"], r["split"], r["task"], r["metric"]): r for r in summary["rows"]}
    assert len(rows) == 2 * 5 + 4  # three metrics, an average and a test metric of each; the teacher's on validation
    mood = rows["all", "validation", "mood", "accuracy"]
    assert mood["values"] == pytest.approx([0.91, 0.92, 0.93]) and mood["seeds"] == [1, 2, 3]
    assert (mood["median"], mood["spread"]) == pytest.approx((0.92, 0.02))
    assert mood["average"] == rows["all", "validation", "average", "average"]["median"] == pytest.approx(0.785)
    assert (mood["tokens"], mood["seconds_per_step"], mood["general_seconds_per_step"]) == (1500, 0.25, 0.5)
    assert mood["ablation"] == "two" and mood["difference"] == pytest.approx(0.2) and mood["clear"]
    pairs = rows["all", "validation", "pairs", "f1"]
    assert pairs["difference"] == 0 and not pairs["clear"]
    alone = run_ablations([path], ["seeds=[1]"], root=tmp_path / "one")["rows"]
    assert {row["clear"] for row in alone if "difference" in row} == {False}
    plain = rows["labels only", "validation", "mood", "accuracy"]
    assert "difference" not in plain and plain["tokens"] == 500 and plain["general_seconds_per_step"] is None
    assert rows["all", "test", "mood", "accuracy"]["median"] == 0.4
    teacher = rows["(teacher)", "validation", "average", "average"]
    assert teacher["median"] == 0.9 and teacher["tokens"] is None and teacher["seconds_per_step"] is None


def test_a_launcher_is_refused(tmp_path, made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start this command several times"):
        run_ablations([written(tmp_path)], root=tmp_path / "root")
    assert not made


def test_what_is_over_its_budget_is_refused_before_anything_runs(tmp_path, made, tiny_teacher):
    changes = {"teacher.model": str(tiny_teacher), "delivery": {"budget": 1000}}
    path = written(tmp_path, variants=TWO | {"heavy": changes})
    with pytest.raises(InputError, match="two-heavy needs .* bytes at .*: over the budget"):
        run_ablations([path], root=tmp_path / "root")
    assert made == []


def test_rounded_models_have_rows_and_an_average_of_their_own(tmp_path, made):
    variants = TWO | {"rounded": {"finetune.rounded": "int8"}}
    summary = run_ablations([written(tmp_path, variants=variants)], root=tmp_path / "root")
    rounded = {(r["recipe"], r["task"]): r["median"] for r in summary["rows"] if r["split"] == "rounded"}
    assert rounded == pytest.approx({("rounded", "mood"): 0.82, ("rounded", "average"): 0.82})
    table = (tmp_path / "root" / "two" / "table.md").read_text(encoding="utf-8").splitlines()
    column = [cell.strip() for cell in table[0].split("|")].index("rounded average")
    cells = {row.split("|")[1].strip(): row.split("|")[column].strip() for row in table[2:6]}
    assert cells == {"(teacher)": "", "all": "", "labels only": "", "rounded": "82.0 (2.0)"}


def test_the_markdown_table(tmp_path, made):
    run_ablations([written(tmp_path, baseline="labels only")], root=tmp_path / "root")
    assert (tmp_path / "root" / "two" / "table.md").read_text(encoding="utf-8") == (
        "| | mood accuracy | pairs f1 | pairs accuracy | average | against baseline | tokens | s/step "
        "| general s/step |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|\n"
        "| (teacher) | 95.0 | 90.0 | 80.0 | 90.0 | +21.5 |  |  |  |\n"
        "| all | 92.0 (2.0) | 70.0 (0.0) | 60.0 (0.0) | 78.5 (1.0) | +10.0* | 0.00 M | 0.250 | 0.500 |\n"
        "| labels only | 72.0 (2.0) | 70.0 (0.0) | 60.0 (0.0) | 68.5 (1.0) |  | 0.00 M | 0.250 |  |\n"
        "\n"
        "100 × median (largest − smallest) of seeds 1, 2, 3; against labels only, * where no seed of the one is in the "
        "other's range.\n"
    )
    assert "## Two variants\n\n| | mood accuracy" in (tmp_path / "root" / "tables.md").read_text(encoding="utf-8")


def test_a_variant_may_have_a_baseline_of_its_own(tmp_path, made, monkeypatch):
    monkeypatch.setattr(ablations, "plot", plot)
    variants = TWO | {"more": {"distill.steps": 5}, "less": {"distill.steps": 3}}
    path = written(tmp_path, variants=variants, baseline={"all": "labels only", "more": "less"})
    rows = run_ablations([path], root=tmp_path / "root")["rows"]
    rows = [row for row in rows if "difference" in row and (row["split"], row["task"]) == ("validation", "mood")]
    found = {row["recipe"]: (row["baseline"], row["clear"]) for row in rows}
    assert found == {"all": ("labels only", True), "more": ("less", False)}
    table = (tmp_path / "root" / "two" / "table.md").read_text(encoding="utf-8")
    assert "; against its own baseline (all: labels only; more: less), * where" in table
    cells = {line.split("|")[1].strip(): line.split("|")[6].strip() for line in table.splitlines() if "|" in line}
    assert cells["(teacher)"] == cells["less"] == cells["labels only"] == "" and cells["all"] == "+10.0*"


def test_the_plot_stands_alone(tmp_path, made, monkeypatch):
    monkeypatch.setattr(ablations, "plot", plot)
    label = 'all < "most" & <script>'
    path = written(tmp_path, variants={label: {}, "other": {"distill": None}}, seeds=[1])
    run_ablations([path], root=tmp_path / "root")
    svg = (tmp_path / "root" / "two" / "plot.svg").read_text(encoding="utf-8")
    assert "<script" not in svg and "&lt;script&gt;" in svg
    assert not [url for url in re.findall(r'https?://[^"\s<]+', svg) if "www.w3.org" not in url]
    assert "var(--series-0, " in svg
    assert svg.startswith("<svg") and "#030303" not in svg and not re.findall(r'\bid="(?!f[0-9a-f]{8}-)', svg)


def test_a_variant_that_fails_does_not_stop_the_others(tmp_path, made, monkeypatch):
    def failing(run):
        if run.recipe.finetune.seeds == [2] and run.recipe.distill:
            raise InputError("the loss is nan")
        return function(run)

    function = replace(monkeypatch, "finetune", failing)
    path = written(tmp_path)
    with pytest.raises(InputError, match="two: all, seed 2: the loss is nan"):
        run_ablations([path], root=tmp_path / "root")
    summary = read_json(tmp_path / "root" / "summary.json")
    assert summary["finished"] == {"two": "5 of 6"}
    seeds = {row["recipe"]: row["seeds"] for row in summary["rows"]}
    assert seeds == {"(teacher)": [0], "all": [1, 3], "labels only": [1, 2, 3]}
    assert "fewer so far: all" in (tmp_path / "root" / "two" / "table.md").read_text(encoding="utf-8")
    replace(monkeypatch, "finetune", function)
    before = len(made)
    assert run_ablations([path], root=tmp_path / "root")["finished"] == {"two": "6 of 6"}
    assert [name for name, _ in made[before:]] == ["finetune"]


def test_tables_are_there_after_every_finished_run(tmp_path, made, monkeypatch):
    seen = []

    def stopping(run):
        path = tmp_path / "root" / "two" / "summary.json"
        seen.append(read_json(path)["finished"] if path.is_file() else 0)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return function(run)

    function = replace(monkeypatch, "finetune", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_ablations([written(tmp_path)], root=tmp_path / "root")
    assert seen == [0, 1, 2, 3]
    assert (tmp_path / "root" / "tables.md").is_file()


def test_files_run_one_by_one_share_one_summary(tmp_path, made):
    run_ablations([written(tmp_path, seeds=[1])], root=tmp_path / "root")
    summary = run_ablations([written(tmp_path, name="three", seeds=[1])], root=tmp_path / "root")
    assert {row["ablation"] for row in summary["rows"]} == {"two", "three"}
    with pytest.raises(InputError, match="two of the files are named two"):
        run_ablations([tmp_path / "two.yaml", tmp_path / "two.yaml"], root=tmp_path / "root")


def test_a_stage_belongs_to_one_process_at_a_time(tmp_path):
    lock = tmp_path / "stages" / "distill-1.lock"
    with claimed(lock) as mine, claimed(lock) as other:
        assert mine and not other and lock.read_text().startswith(f"process {os.getpid()} on ")
    assert not lock.exists()
    with claimed(lock) as mine:
        assert mine


def test_commands_side_by_side_share_the_work(tmp_path, made, monkeypatch):
    def logged(run):
        with (tmp_path / "log").open("a") as log:
            log.write(run.folder.name + "\n")
        time.sleep(0.02)
        return own[run.stage.name](run)

    own = {name: replace(monkeypatch, name, logged) for name in STAGES}
    path, fork = written(tmp_path), multiprocessing.get_context("fork")
    commands = [fork.Process(target=run_ablations, args=([path], (), tmp_path / "root")) for _ in range(2)]
    for command in commands:
        command.start()
    for command in commands:
        command.join(120)
    assert [command.exitcode for command in commands] == [0, 0]
    log = (tmp_path / "log").read_text().split()
    assert len(log) == len(set(log)) == 5 + 6  # every stage once, whoever made it
    assert read_json(tmp_path / "root" / "summary.json")["finished"] == {"two": "6 of 6"}


# ---------------------------------------------------------------------------------------- the real stages


def write_task(folder, rows) -> None:
    folder.mkdir(parents=True)
    for split, chosen in (("train", rows[: len(rows) * 2 // 3]), ("validation", rows[len(rows) * 2 // 3 :])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def test_a_tiny_table_end_to_end(tiny_teacher, corpus_file, lines, tmp_path):
    """Teacher, student, text and task are made up; stages, losses and tables are the real ones."""
    rows = [{"sentence1": line, "label": int("ka" in line.lower())} for line in lines[:120]]
    write_task(tmp_path / "mood", rows)
    base = BASE | {"teacher": {"model": str(tiny_teacher)}, "tasks": {"mood": BASE["tasks"]["mood"]}}
    base |= {"corpus": BASE["corpus"] | {"sources": [str(corpus_file)]}, "data": str(tmp_path)}
    path = written(tmp_path, base, baseline="labels only", seeds=[1])
    root = tmp_path / "root"
    summary = run_ablations([path], root=root)
    averages = {row["recipe"]: row["median"] for row in summary["rows"] if row["task"] == "average"}
    assert set(averages) == {"(teacher)", "all", "labels only"} and all(0 <= value <= 1 for value in averages.values())
    ablation, runs = runs_of(path, [], root)
    of_all, of_labels = map(figures_of, runs)
    assert of_all["tokens"] > of_labels["tokens"] > 0 and of_all["seconds_per_step"] > 0
    assert of_all["general_seconds_per_step"] > 0
    assert of_labels["general_seconds_per_step"] is None
    assert sorted(p.name.partition("-")[0] for p in (root / "stages").iterdir() if p.is_dir()) == sorted(
        ["count", "vocab", "encode", "distill", "task_teacher", "finetune", "finetune"]
    )
    assert not list(root.rglob("checkpoints")) and not list(root.rglob("*.tmp"))
    assert {row["stage"] for row in RunDir(root / "two" / "all" / "seed-1").metrics()} >= {"distill"}
    before = {p: p.stat().st_mtime_ns for p in (root / "stages").rglob("DONE")}
    assert run_ablations([path], root=root)["rows"] == summary["rows"] == rows_of(ablation, runs)
    assert before == {p: p.stat().st_mtime_ns for p in (root / "stages").rglob("DONE")}
