"""The search: genes, the genetic algorithm on a known landscape, killing and sharing, the real stages."""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import time
from functools import partial
from types import SimpleNamespace

import optuna
import pytest
import yaml
from test_ablations import BASE, TRAINING, write_task
from transformers import BertConfig

from tokenizer_build.errors import InputError
from tokenizer_build.files import hash_of, read_json, write_json
from vocabshrink.lab import tune
from vocabshrink.lab.ablations import Variant, runs_of
from vocabshrink.lab.tune import NAMED_MAPS, Tuner, explore, measure_latency, rows_of, run_tuning
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import DeliverySection, load_recipe

SMALL = {"name": "small", "title": "A small search", "base": "base.yaml", "tasks": ["mood", "pairs"], "trials": 8}
GENE = {"distill.steps": [1, 2]}
SMALL |= {"population": 4, "give_up": 0}


@pytest.fixture
def written(tmp_path, tiny_teacher):
    """A function that writes a search file beside its base recipe and gives its path."""

    def write(base=None, /, **keys):
        base = BASE | {"teacher": {"model": str(tiny_teacher)}} | (base or {})
        base["finetune"] = {"phases": [BASE["finetune"]["phases"][0] | {"losses": {"labels": 1}}], "save_models": False}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL | keys, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def landscape(monkeypatch):
    """Candidates judged by a function of their settings in the place of training; a list of what was judged."""
    judged = []

    def use(function):
        def quality(self, changes, task):
            judged.append((hash_of(changes), task))
            return function(changes, task)

        monkeypatch.setattr(Tuner, "quality", quality)
        return judged

    return use


@pytest.fixture
def in_memory(monkeypatch):
    """Studies in memory: {URL: storage}. A file's many small writes to the disk are most of the time of a search."""
    storages = {}

    def open_storage(url, **_):
        return storages.setdefault(url, optuna.storages.InMemoryStorage())

    monkeypatch.setattr(tune, "RDBStorage", open_storage)
    return storages


def explored(path, root):
    """The trials of a search as rows without their times, and how many genomes were asked for."""
    study = explore(Tuner(path, [], root))
    return [row | {"seconds": 0} for row in rows_of(study).values()], len(study.trials)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"trails": 3}, "small.yaml: unknown key trails: did you mean trials"),
        ({"tasks": ["moods"]}, "the recipe fine-tunes mood, pairs: there is no task moods"),
        ({"objectives": ["bytes"]}, "objectives: quality is missing"),
        ({"objectives": ["quality", "quality"]}, "objectives: one is written twice"),
        ({"sampler": "tpe"}, "small.yaml: sampler: "),
        ({"map": []}, "there is nothing to search for: add map or genes"),
        ({"genes": {"distill.layer_map": ["last", "first"]}}, "genes: one of ['distill.layer_map'] is there too"),
        ({"genes": {"distill.stpes": [1, 2]}}, "unknown key distill.stpes: did you mean steps"),
        ({"genes": {"dual.p": [0.1, 1]}}, "dual.p: the base recipe has no dual"),
        ({"genes": {"student.hidden_size": [16, "wide"]}}, "student.hidden_size"),
        ({"genes": {"student.num_hidden_layers": [2, 6]}}, "a student of 6 layers has more than its teacher's 4"),
        ({"map": ["distill.layer_maps"]}, "unknown key distill.layer_maps: did you mean layer_map"),
        ({"proxy": {"distill.stepz": 1}}, "small.yaml: proxy: unknown key distill.stepz"),
        ({"proxy": {"dual.steps": 1}}, "small.yaml: proxy: dual.steps: the base recipe has no dual"),
        ({"proxy": {"finetune": None}}, "the recipe fine-tunes nothing: there is no task "),
        ({"confirm": {"tasks": ["mood"]}}, "confirm.tasks: the search has seen mood"),
        ({"confirm": {"tasks": ["moods"]}}, "there is no task moods"),
        (
            {"confirm": {"tasks": ["pairs"]}, "tasks": ["mood"], "map": [], "genes": GENE},
            "confirm: it compares the best map",
        ),
        ({"objectives": ["quality", "bytes"], "confirm": {"tasks": ["x"]}}, "confirm: it compares the best map"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such recipe: correct its path"),
    ],
)
def test_bad_files_are_refused_by_name(written, tmp_path, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Tuner(written(**keys), [], tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_launcher_is_refused(written, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start this command several times"):
        run_tuning(written(), root=tmp_path / "root")


def test_what_is_no_search_is_refused(written, tmp_path):
    with pytest.raises(InputError, match="absent.yaml: no such search: correct its path"):
        Tuner(tmp_path / "absent.yaml", [], tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text at byte 0"):
        Tuner(tmp_path / "bytes.yaml", [], tmp_path)
    path = written()
    with pytest.raises(InputError, match="base.yaml: a search is a mapping with base, tasks"):
        Tuner(path.with_name("base.yaml"), [], tmp_path)
    with pytest.raises(InputError, match="small.yaml tune.trials=0: trials: "):
        Tuner(path, ["tune.trials=0"], tmp_path)
    with pytest.raises(InputError, match="tune.trails=1: unknown key trails"):
        Tuner(path, ["tune.trails=1"], tmp_path)
    assert Tuner(path, ["tune.trials=3", "distill.steps=9"], tmp_path).tuning.trials == 3


# ------------------------------------------------------------------------------------------------ genes


def test_genes_are_settings(written, tmp_path):
    genes = {"distill.losses.hidden_mse": [1, 10, None], "student.hidden_size": [8, 16]}
    space = Tuner(written(genes=genes, map=["distill.layer_map", "student.layer_map"]), [], tmp_path)
    assert space.sizes == {"layer_1": 5, "layer_2": 5, "distill.losses.hidden_mse": 3, "student.hidden_size": 2}
    changes = space.changes({"layer_1": 3, "layer_2": 1, "distill.losses.hidden_mse": 2, "student.hidden_size": 1})
    pairs = [[1, 1], [2, 3]]  # in order
    assert changes == {
        "distill.losses.hidden_mse": None,
        "student.hidden_size": 16,
        "distill.layer_map": pairs,
        "student.layer_map": pairs,
    }
    assert space.words(changes) == "1 3; hidden_mse None; hidden_size 16"


def test_crossing_maps_are_kept_where_order_is_not_asked(written, tmp_path):
    space = Tuner(written(ordered=False), [], tmp_path)
    assert space.changes({"layer_1": 4, "layer_2": 1}) == {"distill.layer_map": [[1, 4], [2, 1]]}
    assert space.changes({"layer_1": 0, "layer_2": 2}) == {"distill.layer_map": [[2, 2]]}


def test_genes_of_absent_layers_are_silent(written, tmp_path):
    space = Tuner(written(genes={"student.num_hidden_layers": [2, 4]}), [], tmp_path)
    genes = {"layer_1": 1, "layer_2": 2, "layer_3": 3, "layer_4": 4}
    shallow, again, deep = (
        space.changes(genes | {"student.num_hidden_layers": n, "layer_4": last}) for n, last in ((0, 4), (0, 1), (1, 4))
    )
    assert shallow == again and shallow["distill.layer_map"] == [[1, 1], [2, 2]]
    assert deep["distill.layer_map"] == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_named_maps_are_genomes(written, tmp_path):
    space = Tuner(written(genes={"distill.losses.hidden_mse": [5, 1]}), [], tmp_path)
    maps = {name: space.changes(genes) for name, genes in space.named().items()}
    assert tuple(maps) == NAMED_MAPS
    assert maps["uniform"]["distill.layer_map"] == [[1, 2], [2, 4]]
    assert maps["last"]["distill.layer_map"] == [[1, 3], [2, 4]]
    assert maps["first"]["distill.layer_map"] == [[1, 1], [2, 2]]
    assert maps["skip"]["distill.layer_map"] == [[1, 2]]
    assert {changes["distill.losses.hidden_mse"] for changes in maps.values()} == {1}  # the base's


# ------------------------------------------------------------------------------------------------ the algorithm

BEST = (2, 5, 9, 12)  # of a landscape with a slope, a ridge and a trap: all-zero genes are a local optimum


def height(genes) -> float:
    far = sum(abs(gene - best) for gene, best in zip(genes, BEST, strict=True))
    trap = 0.55 - 0.05 * sum(genes)
    return max(1 - far / 30 + 0.1 * sum(map(int.__eq__, genes, BEST)), trap)


def reference(seed: int, trials: int, population: int, crossover=0.9, swap=0.5) -> float:
    """The genetic algorithm in plain Python: binary tournaments, uniform crossover, a new value for each gene with
    probability 1 / genes, and of parents and children the best go on. Returns the best height of `trials` genomes."""
    rng, known = random.Random(seed), {}

    def judged(genes):
        if len(known) < trials:
            known.setdefault(genes, height(genes))
        return known.get(genes, -1.0)

    def parent(alive):
        return max(rng.sample(alive, 2), key=judged)

    alive = [tuple(rng.randint(0, 12) for _ in BEST) for _ in range(population)]
    while len(known) < trials:
        children = []
        for _ in range(population):
            first, second = parent(alive), parent(alive)
            crossed = rng.random() < crossover
            child = [b if crossed and rng.random() < swap else a for a, b in zip(first, second, strict=True)]
            children.append(tuple(rng.randint(0, 12) if rng.random() < 1 / len(BEST) else gene for gene in child))
        alive = sorted({*alive, *children}, key=judged, reverse=True)[:population]
        alive += [tuple(rng.randint(0, 12) for _ in BEST) for _ in range(population - len(alive))]
    return max(known.values())


@pytest.fixture
def mountains(written, landscape, in_memory, monkeypatch):
    """A search over that landscape: four student layers, twelve of the teacher, unordered."""
    monkeypatch.setattr(Tuner, "weigh", lambda self, changes: {"bytes": 1.0})
    twelve = SimpleNamespace(num_hidden_layers=12)
    monkeypatch.setattr(tune, "shapes", lambda recipe: (None, twelve))
    monkeypatch.setattr(tune, "NAMED_MAPS", ())

    def judge(changes, task):
        pairs = dict(changes["distill.layer_map"])
        return height([pairs.get(m, 0) for m in (1, 2, 3, 4)])

    judged = landscape(judge)
    base = {"student": BASE["student"] | {"num_hidden_layers": 4}}
    return partial(written, base, ordered=False, tasks=["mood"], population=10, trials=80), judged


def test_the_search_climbs_as_the_reference_does(mountains, tmp_path):
    write, judged = mountains
    found = {"genetic": [], "random": []}
    for seed in range(3):
        for kind, best in found.items():
            rows, _ = explored(write(seed=seed, name=f"{kind}{seed}", sampler=kind), tmp_path / "root")
            assert len({row["genome"] for row in rows}) == 80
            best.append(max(row["quality"] for row in rows))
    expected = [reference(seed, trials=80, population=10) for seed in range(20)]
    assert height(BEST) == pytest.approx(1.4)
    assert statistics.fmean(found["genetic"]) > statistics.fmean(found["random"]) + 0.05
    assert statistics.fmean(found["genetic"]) > statistics.fmean(expected) - 2 * statistics.stdev(expected)


def test_a_seed_decides_the_search(mountains, tmp_path):
    write, _ = mountains
    first, again, other = (
        [row["genome"] for row in explored(write(seed=seed, trials=30), tmp_path / place)[0]]
        for place, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_no_genome_is_paid_for_twice_and_the_best_survives(mountains, in_memory, tmp_path):
    write, judged = mountains
    rows, asked = explored(write(trials=60), tmp_path / "root")
    assert len(rows) == len({row["genome"] for row in rows}) == len(judged) == 60 < asked
    (storage,) = in_memory.values()
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    assert study.best_value == max(row["quality"] for row in rows)  # and of the known ones none has another value
    assert {trial.values[0] for trial in study.trials} == {row["quality"] for row in rows}
    assert explored(write(trials=60), tmp_path / "root") == (rows, asked) and len(judged) == 60
    more, _ = explored(write(trials=70), tmp_path / "root")
    assert more[: len(rows)] == rows and len({row["genome"] for row in more}) == 70


def test_a_changed_search_is_another_study_in_the_same_storage(mountains, in_memory, tmp_path):
    write, judged = mountains
    first, _ = explored(write(trials=3), tmp_path / "root")
    same, _ = explored(write(trials=4, population=4), tmp_path / "root")  # not what a score depends on
    assert same[:3] == first and len(judged) == 4
    other, _ = explored(write(trials=3, proxy={"distill.steps": 2}), tmp_path / "root")
    assert len(judged) == 4 + len(other) == 7
    (storage,) = in_memory.values()
    names = optuna.get_all_study_names(storage)
    assert len(names) == 2 and all(name.startswith("small-") for name in names)


def test_a_storage_that_cannot_be_opened_is_refused(written, tmp_path):
    with pytest.raises(InputError, match="storage nosuch://x: cannot be opened"):
        explored(written(storage="nosuch://x"), tmp_path / "root")


# ------------------------------------------------------------------------------------------------ killing, sharing


def kept_quality(log, left, self, changes, task):
    """A training whose result stays on the disk, as a finished stage does; its end is written to `log`. Where the count
    of those that are left comes to 0, the process dies."""
    kept = self.root / "made" / f"{hash_of(changes)}-{task}.json"
    if not kept.is_file():
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(kept, sum(n for _, n in changes["distill.layer_map"]) / 100)
        with log.open("a") as file:
            file.write(f"{kept.name}\n")
    return read_json(kept)


def searching(path, root, log, dies_at=-1):
    left = itertools.count(dies_at, -1)
    Tuner.quality = lambda *arguments: kept_quality(log, left, *arguments)
    rows, _ = explored(path, root)
    write_json(root / f"rows-{os.getpid()}.json", [row["genome"] for row in rows])


def test_killed_again_and_again_no_finished_trial_is_lost(written, tmp_path, monkeypatch):
    monkeypatch.setattr(Tuner, "quality", Tuner.quality)  # restored after the children
    path, root, log = written(trials=12, ordered=False, population=4), tmp_path / "root", tmp_path / "log"
    fork, finished, url = multiprocessing.get_context("fork"), {}, f"sqlite:///{root / 'small' / 'study.db'}"
    whole = tmp_path / "whole"
    searching(path, whole, tmp_path / "whole.log")
    for dies_at in (0, 3, 4, 5, -1):
        child = fork.Process(target=searching, args=(path, root, log, dies_at))
        child.start()
        child.join(120)
        assert child.exitcode == (0 if dies_at < 0 else -signal.SIGKILL)
        trials = optuna.load_study(study_name=None, storage=url).trials
        now = {t.number: t.values for t in trials if t.state == optuna.trial.TrialState.COMPLETE}
        assert finished.items() <= now.items() and len(now) > len(finished) - (dies_at == 0)
        finished = now
    made = log.read_text().split()
    assert len(made) == len(set(made)) and len({name.partition("-")[0] for name in made}) >= 12
    (unbroken,) = whole.glob("rows-*.json")
    assert read_json(root / f"rows-{child.pid}.json") == read_json(unbroken)  # the same candidates in the same order
    assert not list(root.rglob("trial-*.lock"))


def test_processes_share_a_study(written, tmp_path, monkeypatch):
    """Slowed down between looking at a queued trial and taking it, where SQLite locks nothing."""
    monkeypatch.setattr(Tuner, "quality", Tuner.quality)
    check = optuna.storages.RDBStorage.check_trial_is_updatable

    def slow(storage, trial, state):
        check(storage, trial, state)
        time.sleep(0.3 * (state == optuna.trial.TrialState.WAITING))

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", slow)
    path, root, log = written(trials=12, ordered=False), tmp_path / "root", tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    root.mkdir()
    children = [fork.Process(target=searching, args=(path, root, log)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == 4 * [0]
    found = {genome for child in children for genome in read_json(root / f"rows-{child.pid}.json")}
    assert 12 <= len(found) <= 15  # the last ones of the others were under way


# ------------------------------------------------------------------------------------------------ giving up, budgets


def test_what_stays_behind_is_given_up_after_its_first_task(written, landscape, in_memory, tmp_path):
    def judge(changes, task):
        return sum(n for _, n in changes["distill.layer_map"]) / 10

    judged = landscape(judge)
    path = written(give_up=0.5, population=6, trials=16, ordered=False)
    rows, _ = explored(path, tmp_path / "root")
    up = [row for row in rows if row["state"] == "given up"]
    assert up and all(row["quality"] is None and len(row["scores"]) == 1 and not row["name"] for row in up)
    assert len(judged) == 2 * sum(bool(row["scores"]) for row in rows) - len(up)
    best = max(row["quality"] for row in rows if row["state"] == "complete")
    assert all(row["scores"]["mood"] < best for row in up)


def test_with_several_objectives_none_is_given_up(written, landscape, in_memory, tmp_path):
    landscape(lambda changes, task: sum(n for _, n in changes["distill.layer_map"]) / 10)
    path = written(give_up=1, population=2, trials=12, objectives=["quality", "bytes"])
    assert "given up" not in {row["state"] for row in explored(path, tmp_path / "root")[0]}


def test_over_the_budget_nothing_is_trained(written, landscape, in_memory, tmp_path):
    judged = landscape(lambda changes, task: changes["vocabulary.size"] / 1000)
    genes = {"vocabulary.size": [100, 160, 900]}
    base = {"delivery": {"budget": 45_000, "weights": "int8"}}
    path = written(base, map=[], genes=genes, objectives=["quality", "bytes"])
    summary = run_tuning(path, [], tmp_path / "root")
    rows = {json.dumps(r["changes"]): r for r in explored(path, tmp_path / "root")[0]}
    assert rows['{"vocabulary.size": 900}']["state"] == "refused"
    assert "over the budget of 45,000 by" in rows['{"vocabulary.size": 900}']["refused"]
    assert len(judged) == len(set(judged)) == 4 or {g for g, _ in judged} == {
        hash_of({"vocabulary.size": size}) for size in (100, 160)
    }
    assert [r["changes"]["vocabulary.size"] for r in summary["front"]] == [160, 100]  # neither beats the other
    assert {p.name for p in (tmp_path / "root" / "small" / "front").iterdir()} == {"01.yaml", "02.yaml"}


def test_no_trainable_candidate_is_one_sentence(written, landscape, in_memory, tmp_path):
    landscape(lambda changes, task: 0.5)
    with pytest.raises(InputError, match="no candidate could be trained: .* over the budget of 1,000"):
        run_tuning(written({"delivery": {"budget": 1000}}, trials=2), [], tmp_path / "root")


def test_the_front_is_what_nothing_beats(written, landscape, in_memory, tmp_path, monkeypatch):
    found = [(0.9, 100), (0.8, 50), (0.8, 60), (0.7, 50), (0.95, 100), (0.1, 5)]
    landscape(lambda changes, task: found[changes["distill.steps"]][0])
    monkeypatch.setattr(Tuner, "variant", lambda self, changes, task: Variant("", self.recipe, RunDir(tmp_path)))
    monkeypatch.setattr(Tuner, "weigh", lambda self, changes: {"bytes": found[changes["distill.steps"]][1]})
    path = written(map=[], genes={"distill.steps": list(range(6))}, objectives=["quality", "bytes"], trials=6)
    monkeypatch.setattr(tune, "write_results", lambda *_: None)
    summary = run_tuning(path, [], tmp_path / "root")
    assert summary["trials"]["complete"] == 6 < summary["trials"]["asked"]  # known genomes are in the front too
    assert [(row["quality"], row["bytes"]) for row in summary["front"]] == [(0.95, 100), (0.8, 50), (0.1, 5)]


# ------------------------------------------------------------------------------------------------ the real stages


@pytest.fixture
def real(written, tiny_teacher, corpus_file, lines, tmp_path):
    """A function that writes a search whose base trains in a second: two tasks, four steps on text."""
    for name, word in (("mood", "ka"), ("pairs", "lo")):
        rows = [{"sentence1": line, "label": int(word in line.lower())} for line in lines[:90]]
        write_task(tmp_path / name, rows)
    base = {"corpus": BASE["corpus"] | {"sources": [str(corpus_file)]}, "data": str(tmp_path)}
    tasks = {name: {k: v for k, v in BASE["tasks"][name].items() if k != "metrics"} for name in ("mood", "pairs")}
    base |= {"tasks": tasks, "distill": TRAINING | {"steps": 8, "losses": {"hidden_mse": 1}}}
    return partial(written, base)


def test_a_tiny_search_end_to_end(real, in_memory, tmp_path, monkeypatch):
    """Every file, no stage twice; the best map is a recipe, and its confirmation an ablation file."""
    monkeypatch.setattr(tune, "NAMED_MAPS", maps := ("uniform", "first"))
    confirm = {"settings": {"distill.steps": 6}, "tasks": ["pairs"], "seeds": [1, 2]}
    path = real(tasks=["mood"], proxy={"distill.steps": 2}, confirm=confirm, trials=4)
    summary = run_tuning(path, [], tmp_path / "root")
    root = tmp_path / "root" / "small"
    assert read_json(tmp_path / "root" / "summary.json") == {"small": read_json(root / "summary.json")}
    assert summary["trials"]["complete"] == 4 <= summary["trials"]["asked"]
    assert set(summary["named"]) == set(maps)
    assert summary["best"]["quality"] >= max(row["quality"] for row in summary["named"].values())
    ablation, runs = runs_of(root / "confirm.yaml", [], tmp_path / "ablations")
    found = [(run.name, *run.recipe.finetune.seeds) for run in runs]
    assert found == [(v, n) for n in (1, 2) for v in ("found", *maps)]
    assert ablation.baseline == "found" and runs[0].recipe.distill.steps == 6
    assert {*runs[0].recipe.tasks} == {"pairs"}
    best = load_recipe(root / "best.yaml")
    assert [list(pair) for pair in best.distill.layer_map] == summary["best"]["changes"]["distill.layer_map"]
    assert best.distill.steps == 8  # the full run, not the proxy
    page = (root / "tune.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and not re.findall(r'(?:src|href)="(?!#)', page) and "<script" not in page
    assert "4 candidates trained" in page and summary["best"]["words"] in page
    assert page.partition("All candidates")[2].count("<tr>") == 1 + 4
    before = {p: p.stat().st_mtime_ns for p in (root / "runs" / "stages").rglob("DONE")}
    assert run_tuning(path, [], tmp_path / "root")["best"] == summary["best"]
    assert before == {p: p.stat().st_mtime_ns for p in (root / "runs" / "stages").rglob("DONE")}


def test_shape_bits_and_rated_pairs_together(real, in_memory, lines, tmp_path, monkeypatch):
    """Joint mode: the rounded model is judged, latency is measured once a shape, rated pairs need no fine-tuning."""
    monkeypatch.setattr("timeit.repeat", lambda call, **_: [0.002, len(call()) / 1000])
    rated = [
        {"sentence1": a, "sentence2": b, "label": i % 5}
        for i, (a, b) in enumerate(zip(lines[:59], lines[1:60], strict=True))
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated), encoding="utf-8")
    path = real(
        tasks=["near", "mood"],
        map=[],
        proxy={
            "distill.steps": 2,
            "delivery": {"budget": 100_000},
            "evaluation": {"sentences": 0, "stsb": {"near": "rated.jsonl"}},
        },
        genes={"delivery.weights": ["int8", "int4-32"], "student.num_hidden_layers": [1, 2]},
        objectives=["quality", "bytes", "latency"],
        trials=4,
    )
    summary = run_tuning(path, [], tmp_path / "root")
    root = tmp_path / "root" / "small"
    latencies = read_json(root / "latency.json")
    assert len(latencies) == 4 and all(value > 0 for value in latencies.values())
    finetuned = [read_json(p) for p in (root / "runs" / "stages").glob("finetune-*/summary.json")]
    assert finetuned and all(summary["rounded"]["average"] >= 0 for summary in finetuned)
    assert all({"near", "mood"} == set(r["scores"]) and r["latency"] > 0 for r in summary["front"])
    page = (root / "tune.html").read_text(encoding="utf-8")
    assert "The front" in page and page.count("<svg") == 3


def test_latency_is_the_least_of_many_calls(monkeypatch):
    def timed(call, repeat, number):
        assert (1, 16) in [output.shape for output in call()] and repeat > 10 and number == 1
        return [0.003, 0.002, 0.004]

    monkeypatch.setattr("timeit.repeat", timed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    assert measure_latency(BertConfig(vocab_size=200, **shape), DeliverySection()) == 2
