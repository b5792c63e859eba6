"""`vocabshrink tune`: a search for the layer map, and with it for loss weights, shape and bits, under a cheap proxy.

Which teacher layer a student layer should learn from is found by a genetic algorithm (Jiao et al. 2020, arXiv
2012.06153): gene i is the teacher layer of student layer i, 0 for none. A candidate is trained a little on the corpus
and on a few tasks; the best map then serves the full distillation. The paper's population and rates are not public;
ours are the defaults of `Tuning`. Any setting can be a gene. With objectives besides quality the result is a Pareto
front: bytes are exact, so a candidate over its budget is never trained; latency is that of random weights.

The algorithm (NSGA-II), its storage, pruning and fronts are Optuna's: a killed search goes on from the storage, and
several processes share one study. A candidate is a run like an ablation's, with shared stages (variants.py), so no
genome is trained twice. Formats of weights cost a fine-tuning each, because a model is judged as it is delivered. With
several objectives no candidate is given up between its tasks: Optuna prunes by one objective alone.
"""

import hashlib
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnxruntime
import optuna
import pandas as pd
import yaml
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field, model_validator
from scipy.stats import norm, spearmanr
from sqlalchemy.exc import SQLAlchemyError
from transformers import BertConfig, BertModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json, write_text
from vocabshrink.delivery.graph import KERNELS, build_graph
from vocabshrink.delivery.size import delivery_bytes
from vocabshrink.lab.ablations import Seeds, rated_of, run_ablations
from vocabshrink.lab.bench import time_calls
from vocabshrink.lab.variants import Variant, advance, base_values, claimed, make_variant, refuse_launcher, value_at
from vocabshrink.pages.experiments import AVERAGE, TEACHER, place_of, write_tune_page
from vocabshrink.run.engine import say, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.formats import formats_of
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DeliverySection, Number, Positive, Section, Share, dump_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import RecipeDumper, override_value, parse_override, read_yaml
from vocabshrink.stages.plan import check_budget, delivered_config, flops_per_piece, shapes

NAMED_MAPS = ("uniform", "last", "skip", "first", "random")  # what the found map is compared with
LATENCY_PIECES = 32
ASKED = 10  # genomes asked of the sampler for each trial that is allowed; towards the end most of them are known
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
COLUMNS = ("kind", "number", "state", "name", "words", "quality", "bytes", "latency", "seconds", "genome")
COLUMNS += ("scores", "changes", "refused")  # of a trial, see `row_of`
Keys = Annotated[list[str], Field(min_length=1)]


class Check(Section):
    """How well the proxy ranks: maps of all ranks, trained longer."""

    settings: dict[str, Any]  # over the recipe, in place of the proxy's
    maps: Annotated[int, Number, Field(ge=8)] = 8


class Confirm(Section):
    """The found map beside the named ones, trained longer, on tasks that the search has not seen."""

    settings: dict[str, Any] = {}  # over the recipe, in place of the proxy's
    tasks: Keys
    seeds: Seeds = [1, 2, 3]


class Tuning(Section):
    """A search: a base recipe, which is the full run that the result is for, the proxy, and what may vary."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    title: str
    base: str  # a recipe's path, relative to this file's folder
    # a candidate's quality is the mean over: tasks of the recipe, after fine-tuning (headline metric), and rated pairs
    # of evaluation.stsb, which the general student answers as it is (Spearman)
    tasks: Keys
    proxy: dict[str, Any] = {}  # section.key -> value over the recipe, of every candidate
    map: list[str] = ["distill.layer_map"]  # the keys that take the map; none: it is not searched for
    # later layers learn from later layers: no map of the literature crosses, and the space is many times smaller
    ordered: bool = True
    genes: dict[str, Annotated[list[Any], Field(min_length=2)]] = {}  # section.key -> its values; null leaves it out
    objectives: Annotated[list[Literal["quality", "bytes", "latency"]], Field(min_length=1)] = ["quality"]
    trials: Positive = 48  # distinct genomes, the named maps among them
    population: Annotated[int, Number, Field(ge=2)] = 12
    crossover: Share = 0.9  # probability that a child has two parents
    swap: Share = 0.5  # probability, gene by gene, that the child has the second parent's
    mutation: Share | None = None  # probability, gene by gene, of a new value; None: 1 / genes
    seed: Annotated[int, Number, Field(ge=0)] = 0
    # between two tasks, the lowest share is given up, compared with a population or more that came to their end
    give_up: Share = 0.2
    random_search: bool = False  # as many trials of random genomes, for comparison
    storage: str | None = None  # a database URL for the study; None: a file in the search's folder
    check: Check | None = None
    confirm: Confirm | None = None

    @model_validator(mode="after")
    def consistent(self):
        twice = set(self.map) & set(self.genes)
        seen = set(self.confirm.tasks) & set(self.tasks) if self.confirm else ()
        for wrong, message in (
            ("quality" not in self.objectives, "objectives: quality is missing: the smallest model is no model"),
            (len(set(self.objectives)) < len(self.objectives), "objectives: one is written twice: write each once"),
            (not (self.map or self.genes), "there is nothing to search for: add map or genes"),
            (twice, f"genes.{min(twice, default='')}: map has it already: leave one of the two out"),
            (seen, f"confirm.tasks: the search has seen {min(seen, default='')}: name other tasks"),
            ((self.check or self.confirm) and self.objectives != ["quality"], ONE_BEST),
            (self.confirm and not self.map, "confirm: it compares maps: add map, or leave confirm out"),
        ):
            if wrong:
                raise ValueError(message)
        return self


ONE_BEST = "check and confirm are for one best map: leave them out, or search for quality alone"


class Tuner:
    """A search in its folder `root`/NAME: what genomes there are, which settings each means, and what each is worth.

    base: the plain values of the full run. recipe: the proxy's. Genes are positions: of `layer_1` .. the teacher layer,
    0 for none; of a key of the recipe the position in its list of values.
    """

    def __init__(self, path: Path, overrides: list[str] | tuple[str, ...], root: Path):
        """Reads a search and its base recipe. overrides: of the recipe, or with `tune.` before them of the search.

        Raises:
            InputError: a missing or malformed file, an unknown key, a wrong value, a task that the recipe lacks, a
                gene's value that is refused, a student deeper than its teacher, which no map is for.
        """
        data, own = read_yaml(path, "a search", "base", "tasks"), [o for o in overrides if o.startswith("tune.")]
        for override in own:
            key, value = parse_override(override.removeprefix("tune."))
            override_value(data, key.split("."), value, override)
        self.path, self.tuning = path, parse_recipe(data, " ".join([str(path), *own]), Tuning)
        self.root, self.overrides = root / self.tuning.name, [o for o in overrides if o not in own]
        self.base = base_values(path.parent / self.tuning.base, self.overrides)
        self.recipe = self.make(self.tuning.proxy, "proxy").recipe
        unseen = self.tuning.confirm.tasks if self.tuning.confirm else []
        known = [*self.recipe.tasks, *self.recipe.evaluation.stsb]
        for task in {*self.tuning.tasks, *unseen} - {*known} | {*unseen} - {*self.recipe.tasks}:
            raise InputError(f"{path}: there is no task {task} in the recipe: it has {', '.join(known) or 'none'}")
        if self.recipe.finetune is None:
            raise InputError(f"{path}: the recipe has no finetune section: candidates are judged by their tasks")
        singles = [{key: value} for key, values in self.tuning.genes.items() for value in values]
        for changes in singles + [{key: "uniform"} for key in self.tuning.map]:
            self.variant(changes, self.tuning.tasks[0])
        self.teacher_layers = shapes(self.recipe)[1].num_hidden_layers
        self.deepest = max(map(self.depth, [{}, *singles]))
        if self.tuning.map and self.deepest > self.teacher_layers:
            raise InputError(
                f"{path}: a student of {self.deepest} layers has more than its teacher's {self.teacher_layers}: "
                "leave such students out, or search without map"
            )

    def make(self, changes: dict[str, Any], origin: str, label: str = "", own: str = "") -> Variant:
        """The full run with these settings. Raises InputError."""
        runs, origin = self.root / "runs", f"{self.path}: {origin}"
        return make_variant(self.base, changes, runs / own, runs / "stages", origin=origin, label=label)

    def variant(self, changes: dict[str, Any], task: str) -> Variant:
        """A candidate's run on one task, which shares its general student with the runs on the others."""
        genome, keys = genome_of(changes), self.tuning.proxy | changes
        about = (f"genes {changes}", f"{genome} {task}", f"candidates/{genome}")
        if task not in self.recipe.tasks:  # rated pairs
            return self.make(keys | {"finetune": None}, *about)
        keys |= {f"tasks.{other}": None for other in self.recipe.tasks if other != task}
        found = self.make(keys, *about)
        if any(key.startswith("delivery.weights") for key in self.tuning.genes):
            return self.make(keys | {"finetune.rounded": found.recipe.delivery.weights}, *about)
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """{gene: how many values it has}."""
        layers = range(1, self.deepest + 1) if self.tuning.map else ()
        keys = {key: len(values) for key, values in self.tuning.genes.items()}
        return {f"layer_{m}": self.teacher_layers + 1 for m in layers} | keys

    def changes(self, genes: dict[str, int]) -> dict[str, Any]:
        """{section.key: value} over the recipe. Genes of layers that the student does not have say nothing."""
        changes = {key: values[genes[key]] for key, values in self.tuning.genes.items()}
        found = [genes.get(f"layer_{m}", 0) for m in range(1, self.depth(changes) + 1)]
        if self.tuning.ordered:
            rising = iter(sorted(filter(None, found)))
            found = [n and next(rising) for n in found]
        return changes | dict.fromkeys(self.tuning.map, [[m, n] for m, n in enumerate(found, 1) if n])

    def depth(self, changes: dict[str, Any]) -> int:
        """The layers of the student with these settings."""
        section = changes.get("student", vars(self.recipe.student)) or {}
        return changes.get("student.num_hidden_layers") or section.get("num_hidden_layers") or self.teacher_layers

    def words(self, changes: dict[str, Any]) -> str:
        """The map, layer by layer, and the other genes' values on one line."""
        shown = [f"{key.rpartition('.')[2]} {changes[key]}" for key in self.tuning.genes]
        for key in self.tuning.map[:1]:
            pairs = dict(changes[key])
            shown.insert(0, " ".join(str(pairs.get(m, 0)) for m in range(1, self.depth(changes) + 1)))
        return "; ".join(shown)

    def named(self, name: str) -> dict[str, int]:
        """The genome of a named map; of other genes the recipe's value, or the first."""
        genes = {}
        for key, values in self.tuning.genes.items():
            try:
                genes[key] = values.index(value_at(self.base, key.split(".")))
            except (LookupError, TypeError, ValueError):
                genes[key] = 0
        pairs = dict(layer_pairs(name, self.depth(self.changes(genes)), self.teacher_layers, seed=self.tuning.seed))
        return genes | {f"layer_{m}": pairs.get(m, (0,))[-1] for m in range(1, self.deepest + 1)}

    def weigh(self, changes: dict[str, Any]) -> dict[str, float]:
        """The objectives known before training: exact bytes, and milliseconds if asked for, measured once a shape.

        Raises:
            InputError: settings that contradict each other; a delivery over its budget.
        """
        if self.tuning.map and not changes[self.tuning.map[0]]:
            raise InputError("no student layer learns from any teacher layer")
        recipe = self.variant(changes, self.tuning.tasks[0]).recipe
        check_budget(recipe)
        config, delivery = delivered_config(recipe, shapes(recipe)[0]), recipe.delivery or DeliverySection()
        known: dict[str, float] = {"bytes": delivery_bytes(config, delivery.weights)["total"]}
        if "latency" not in self.tuning.objectives:
            return known
        kept = self.root / "latency.json"
        measured = read_json(kept) if kept.is_file() else {}
        shape = json.dumps([config.to_diff_dict(), delivery.weights, delivery.kernel], sort_keys=True)
        if shape not in measured:
            measured[shape] = measure_latency(config, delivery)
            write_json(kept, measured)
        return known | {"latency": measured[shape]}

    def quality(self, changes: dict[str, Any], task: str) -> float:
        """The headline of the task's metrics on validation, of the rounded model where the run rounds it."""
        variant = self.variant(changes, task)
        advance(variant, wait=True)
        if task not in self.recipe.tasks:
            return rated_of(variant)[task]
        summary = variant.summary("finetune")
        return (summary["rounded"] or summary)["average"]


def genome_of(changes: dict[str, Any]) -> str:
    """A candidate's name: twelve digits that tell its settings from all others'."""
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]


def measure_latency(config: BertConfig, delivery: DeliverySection) -> float:
    """Milliseconds of a sentence of 32 pieces on one thread with random weights: the least of many calls, which other
    work disturbs least."""
    state = {name: value.numpy() for name, value in BertModel(config, add_pooling_layer=False).state_dict().items()}
    kernel = KERNELS[0] if delivery.kernel == "auto" else delivery.kernel
    graph = build_graph(state, config, task="embedding", formats=formats_of(delivery.weights), kernel=kernel)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids = np.ones((1, min(LATENCY_PIECES, config.max_position_embeddings)), dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    return 1000 * min(time_calls(lambda: session.run(None, feed), seconds=1.0, least=30))


# ------------------------------------------------------------------------------------------------ the search


def run_tuning(
    path: Path, overrides: list[str] | tuple[str, ...] = (), root: Path = Path("artifacts/tune"), *, proxy_check=False
) -> dict:
    """Searches, confirms the result where the file says so, checks the proxy where asked; what is finished is skipped.

    Writes into `root`/NAME: study.db, best.yaml (or front/N.yaml), trials.csv, tune.html, summary.json; and
    `root`/summary.json, which gathers all searches. Returns the search's summary. Raises InputError: see `Tuner`.
    """
    refuse_launcher()
    tuner = Tuner(path, overrides, root)
    if proxy_check and not tuner.tuning.check:
        raise InputError(f"{path}: --proxy-check: there is no check section: add check with settings of longer runs")
    RunDir(tuner.root).write_environment()
    studies = {kind: explore(tuner, kind) for kind in ("genetic", "random")[: 1 + tuner.tuning.random_search]}
    rows = [row_of(kind, trial) for kind, study in studies.items() for trial in distinct(study)]
    summary = summarise(tuner, studies, rows)
    write_results(tuner, rows, summary)
    if tuner.tuning.confirm:
        summary["confirm"] = confirm(tuner, summary["best"]["changes"])
    kept = tuner.root / "check.json"
    if proxy_check:
        write_json(kept, check_proxy(tuner, rows))
    if kept.is_file():
        summary["proxy_check"] = read_json(kept)
    write_results(tuner, rows, summary)
    write_json(root / "summary.json", {p.parent.name: read_json(p) for p in sorted(root.glob("*/summary.json"))})
    return summary


def explore(tuner: Tuner, kind: str) -> optuna.Study:
    """Runs the "genetic" or "random" study to its number of trials, or goes on with it.

    Raises:
        InputError: a storage that cannot be opened, or holds a study of another search under this name.
    """
    tuning, sizes = tuner.tuning, tuner.sizes
    study = open_study(tuner, tuning.name if kind == "genetic" else f"{tuning.name}-random")
    seed = tuning.seed + len(study.trials)  # a resumed study draws on, not the same again
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
    if kind == "genetic":
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=tuning.population,
            mutation_prob=tuning.mutation,
            crossover=optuna.samplers.nsgaii.UniformCrossover(swapping_prob=tuning.swap),
            crossover_prob=tuning.crossover,
            seed=seed,
        )

    def trained() -> int:
        return sum("scores" in trial.user_attrs["about"] for trial in distinct(study))

    def after_each(study: optuna.Study, trial: FrozenTrial) -> None:
        done = trained()
        if "scores" in trial.user_attrs.get("about", {}):
            row = row_of(kind, trial)
            say(f"{study.study_name} {done}/{tuning.trials}  {row['words']}  {row['state']}  {row['scores']}")
        if done >= tuning.trials or trial.number + 1 >= ASKED * tuning.trials:
            study.stop()

    def objective(trial: optuna.Trial) -> list[float]:
        genes = {gene: trial.suggest_int(gene, 0, size - 1) for gene, size in sizes.items()}
        return attempt(tuner, study, trial, tuner.changes(genes))

    if trained() < tuning.trials and len(study.trials) < ASKED * tuning.trials:
        study.optimize(objective, callbacks=[after_each])
    return study


def open_study(tuner: Tuner, name: str) -> optuna.Study:
    """The study, made and given the named maps by whoever comes first. Raises InputError: see `explore`."""
    tuning, url = tuner.tuning, tuner.tuning.storage or f"sqlite:///{(tuner.root / 'study.db').absolute()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # about heartbeats, there since 2021
    pruner = optuna.pruners.PercentilePruner(100 * (1 - tuning.give_up), n_startup_trials=tuning.population)
    directions = ["maximize" if objective == "quality" else "minimize" for objective in tuning.objectives]
    # what decides a genome's score, and so whether trials of two commands may be compared
    runs = [tuner.variant({}, task).recipe for task in tuning.tasks]
    mark: Any = [settings_of(run, "finetune" if run.finetune else "distill") for run in runs]
    mark += [tuning.model_dump(include={"tasks", "map", "ordered", "genes", "objectives"}), runs[0].evaluation.stsb]
    mark = hashlib.sha256(json.dumps([*mark, (runs[0].delivery or DeliverySection()).budget]).encode()).hexdigest()
    with claimed(tuner.root / "study", wait=True):  # two processes would make the tables of one file twice
        try:
            storage = optuna.storages.RDBStorage(
                url,
                heartbeat_interval=30,  # shows a trial whose process died, which is then tried again
                grace_period=120,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            study = optuna.create_study(
                study_name=name, storage=storage, load_if_exists=True, directions=directions, pruner=pruner
            )
        except (ImportError, SQLAlchemyError) as error:
            raise InputError(f"storage {url}: cannot be opened: {str(error).splitlines()[0]}") from None
        if study.user_attrs.get("mark", mark) != mark:
            raise InputError(
                f"{url}: study {name} is of other genes, tasks or proxy settings: give the search another name, or "
                f"delete {tuner.root}"
            )
        study.set_user_attr("mark", mark)
        for named in NAMED_MAPS if tuning.map else ():
            study.enqueue_trial(tuner.named(named), user_attrs={"name": named}, skip_if_exists=True)
    return study


def distinct(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials, each genome's first alone."""
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=FINISHED):
        if "genome" in trial.user_attrs.get("about", {}):
            found.setdefault(trial.user_attrs["about"]["genome"], trial)
    return list(found.values())


def attempt(tuner: Tuner, study: optuna.Study, trial: optuna.Trial, changes: dict[str, Any]) -> list[float]:
    """One candidate: its objectives, in the order of the search's.

    Raises:
        optuna.TrialPruned: refused before training (over its budget, contradictory), or given up after a task.
    """
    tuning, began = tuner.tuning, time.monotonic()
    about: dict[str, Any] = {"genome": genome_of(changes), "changes": changes, "words": tuner.words(changes)}
    for known in (t for t in distinct(study) if t.user_attrs["about"]["genome"] == about["genome"]):
        trial.set_user_attr("about", {})
        if known.state == TrialState.PRUNED:
            raise optuna.TrialPruned
        return known.values
    try:
        about |= tuner.weigh(changes)
    except InputError as error:
        about["refused"] = str(error)
    trial.set_user_attr("about", about)  # one attribute, since each is a write to the disk
    if "refused" in about:
        raise optuna.TrialPruned
    about["scores"] = {}
    for step, task in enumerate(tuning.tasks, 1):
        about["scores"][task] = tuner.quality(changes, task)
        trial.set_user_attr("about", about | {"seconds": round(time.monotonic() - began, 1)})
        if len(tuning.objectives) == 1 and step < len(tuning.tasks):
            # their sum, not their mean: of a trial's reports the pruner takes the best
            trial.report(sum(about["scores"].values()), step)
            if "name" not in trial.user_attrs and trial.should_prune():
                raise optuna.TrialPruned
    about["quality"] = statistics.fmean(about["scores"].values())
    return [about[objective] for objective in tuning.objectives]


# ------------------------------------------------------------------------------------------------ results


def row_of(kind: str, trial: FrozenTrial) -> dict:
    """One trial: COLUMNS. state: complete, given up, refused; name: of a named map; quality: None before all tasks are
    done; scores: by task; refused: why."""
    about = dict.fromkeys(COLUMNS) | trial.user_attrs["about"] | {"kind": kind, "number": trial.number}
    about["name"] = trial.user_attrs.get("name")
    if trial.state == TrialState.COMPLETE:
        return about | {"state": "complete", "quality": statistics.fmean(about["scores"].values())}
    return about | {"state": "refused" if about["refused"] else "given up"}


def front_of(kind: str, study: optuna.Study) -> list[dict]:
    """The candidates that no other beats in one objective without losing in another, by quality."""
    best = {trial.number for trial in study.best_trials}
    rows = [row_of(kind, trial) for trial in distinct(study) if trial.number in best]
    return sorted(rows, key=lambda row: -row["quality"])


def summarise(tuner: Tuner, studies: dict[str, optuna.Study], rows: list[dict]) -> dict:
    """The search's result: "best" (or "front"), "named" maps, "random_search", trials, cost.

    Raises:
        InputError: no candidate was trained to its end.
    """
    tuning, genetic = tuner.tuning, {row["genome"]: row for row in rows if row["kind"] == "genetic"}
    fronts = {kind: front_of(kind, study) for kind, study in studies.items()}
    if not fronts["genetic"]:
        reasons = [row["refused"] for row in genetic.values() if row["refused"]] or ["all were given up"]
        raise InputError(f"{tuner.path}: no candidate could be trained: {statistics.mode(reasons)}")
    summary = {"title": tuning.title, "objectives": tuning.objectives, "tasks": tuning.tasks}
    summary |= {"map_settings": tuning.map, "teacher_layers": tuner.teacher_layers}
    one = tuning.objectives == ["quality"]
    summary |= {"best": fronts["genetic"][0]} if one else {"front": fronts["genetic"]}
    named = {name: genome_of(tuner.changes(tuner.named(name))) for name in (NAMED_MAPS if tuning.map else ())}
    summary["named"] = {name: genetic[genome] for name, genome in named.items() if genome in genetic}
    trained = {kind: [row for row in rows if row["kind"] == kind and row["scores"]] for kind in studies}
    if fronts.get("random"):
        summary["random_search"] = fronts["random"][0] | {"trials": len(trained["random"])}
    states = [row["state"] for row in genetic.values()]
    summary["trials"] = {state: states.count(state) for state in ("complete", "given up", "refused")}
    summary["trials"] |= {"trained": len(trained["genetic"]), "asked": len(studies["genetic"].get_trials())}
    return summary | {"cost": cost_of(tuner, trained["genetic"], fronts["genetic"][0]["changes"])}


def cost_of(tuner: Tuner, rows: list[dict], changes: dict[str, Any]) -> dict:
    """Seconds of the search, and their share of the full distillation that it is for: the recipe's tokens and FLOPs at
    the speed (FLOP/s) that a candidate's own distillation reached."""
    seconds = sum(row["seconds"] for row in rows)
    cost = {"search_seconds": round(seconds), "seconds_per_trial": round(seconds / max(len(rows), 1), 1)}
    full, variant = tuner.make({}, "base").recipe.distill, tuner.variant(changes, tuner.tuning.tasks[0])
    if not (full and variant.dir.is_done("distill")):
        return cost
    done, stage = variant.summary("distill"), variant.recipe.distill
    length = done["tokens"] / done["steps"] / stage.batch_size
    student, teacher = (flops_per_piece(config, round(length)) for config in shapes(variant.recipe))
    work = done["tokens"] * (3 * student + (0 if stage.record_teacher else teacher))
    tokens = full.steps * full.batch_size * length
    whole = tokens * (3 * student + teacher) / work * max(done["seconds"], 0.1)  # rounded to tenths: a toy's are none
    return cost | {"full_tokens": round(tokens), "full_seconds": round(whole), "ratio": seconds / whole}


def longer_runs(tuner: Tuner, tasks: list[str], settings: dict[str, Any], **keys) -> list[dict]:
    """Runs an ablation of the full run with these settings on these tasks. keys: the file's others.

    Returns its rows, see `ablations.rows_of`.
    """
    path, base = tuner.root / f"{keys['name']}.yaml", tuner.path.parent / tuner.tuning.base
    others = {f"tasks.{name}": None for name in tuner.base["tasks"] if name not in tasks}
    content = keys | {"base": str(base.absolute()), "vary": "run", "common": settings | others}
    write_text(path, yaml.dump(content, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True))
    rows = run_ablations([path], tuner.overrides, root=tuner.root / "runs")["rows"]
    return [row for row in rows if row["ablation"] == keys["name"] and row["recipe"] != TEACHER]


def confirm(tuner: Tuner, best: dict[str, Any]) -> dict:
    """The found map beside the named ones, trained longer under several seeds on unseen tasks: {"tasks", "seeds",
    "rows": of their averages, compared with the found map}."""
    section = tuner.tuning.confirm
    variants = {"found": best} | {name: tuner.changes(tuner.named(name)) for name in NAMED_MAPS}
    keys = {"name": "confirm", "title": "The found map beside the named ones", "baseline": "found"}
    rows = longer_runs(tuner, section.tasks, section.settings, **keys, seeds=section.seeds, variants=variants)
    rows = [row for row in rows if place_of(row) == AVERAGE]
    return {"tasks": section.tasks, "seeds": section.seeds, "rows": rows}


def check_proxy(tuner: Tuner, rows: list[dict]) -> dict:
    """Trains maps of all ranks longer: {"spearman", "interval" (of 95 %), "maps": [{"genome", "words", "quality"
    (under the proxy), "longer"}]}. Raises InputError: fewer than eight maps were trained to their end."""
    section, tasks = tuner.tuning.check, tuner.tuning.tasks
    ranked = sorted((row for row in rows if row["state"] == "complete"), key=lambda row: row["quality"])
    ranked = list({row["genome"]: row for row in ranked}.values())
    if len(ranked) < 8:
        raise InputError(f"{tuner.path}: --proxy-check: only {len(ranked)} maps were trained to the end: raise trials")
    chosen = [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, min(section.maps, len(ranked)))]
    keys = {"name": "check", "title": "Maps of all ranks under the proxy", "seeds": [1]}
    variants = {row["genome"]: row["changes"] for row in chosen}
    found = pd.DataFrame(longer_runs(tuner, tasks, section.settings, **keys, variants=variants))
    found = found[found["split"].isin(["validation", "general"]) & found["task"].isin(tasks)]
    longer = found.groupby(["recipe", "task"])["median"].mean().groupby("recipe").mean()  # of metrics, then of tasks
    maps = [{key: row[key] for key in ("genome", "words", "quality")} for row in chosen]
    maps = [row | {"longer": float(longer[row["genome"]])} for row in maps]
    rho, interval = rank_correlation([row["quality"] for row in maps], [row["longer"] for row in maps])
    return {"spearman": rho, "interval": interval, "maps": maps}


def rank_correlation(first: list[float], second: list[float]) -> tuple[float, list[float]]:
    """Spearman's rho and its 95 % interval: Fisher's z with variance (1 + rho² / 2) / (n - 3) (Bonett and Wright
    2000). Where one of the two is constant, nothing is ranked: 0, from -1 to 1."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0, [-1.0, 1.0]
    rho = float(np.clip(spearmanr(first, second).statistic, -1, 1))
    half = norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(first) - 3))
    with np.errstate(divide="ignore"):  # all agree: rho is 1, its z infinite
        return rho, [float(np.tanh(np.arctanh(rho) + side * half)) for side in (-1, 1)]


def write_results(tuner: Tuner, rows: list[dict], summary: dict) -> None:
    """Writes the recipes, the table of trials, the page and, last, summary.json."""
    name, root = tuner.tuning.name, tuner.root
    results = {"best": summary["best"]} if "best" in summary else {}
    results |= {f"front/{number:02}": row for number, row in enumerate(summary.get("front", []), 1)}
    for place, result in results.items():
        changes = result["changes"] | {"name": f"{name}_{place.replace('/', '_')}"}
        write_text(root / f"{place}.yaml", dump_recipe(tuner.make(changes, place).recipe))
    table = pd.DataFrame([row | (row["scores"] or {}) for row in rows]).drop(columns=["scores", "changes"])
    write_text(root / "trials.csv", table.to_csv(index=False))
    write_tune_page(rows, summary, root)
    write_json(root / "summary.json", summary)
