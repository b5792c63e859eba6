"""Search for the layer map, and with it for the losses' weights and the shape, under a cheap proxy.

Which teacher layer a student layer should learn from is found by a genetic algorithm (Jiao et al. 2020, arXiv
2012.06153): gene i is the teacher layer of student layer i, 0 for none. A candidate is trained a little on the corpus
and a little on a few tasks; the best map then serves the full distillation, and tasks that the search has not seen.
The paper's population and rates are not public; ours are the defaults of `Search`.

Any other setting can be a gene: a list of values of one key of the recipe. With objectives besides quality the result
is a Pareto front. Bytes are exact and cost nothing, so a candidate over the budget is never trained; latency is that of
an untrained model of the same shape, in onnxruntime, measured once a shape.

The algorithm is Optuna's NSGA-II, which with one objective is a genetic algorithm that keeps the best of parents and
children. Every trial stands in the study's storage when it ends, so a killed search goes on where it was, and several
processes or machines share one study. A candidate is a run like an ablation's, with shared stages (variants.py): no
genome is trained twice, and what a killed trial had finished is not lost either. One task is fine-tuned after the
other, and a candidate that stays behind the others is given up between them.
"""

import csv
import hashlib
import io
import json
import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnxruntime
import optuna
import yaml
from pydantic import Field, ValidationError, model_validator
from scipy.stats import norm, spearmanr
from sqlalchemy.exc import SQLAlchemyError
from transformers import BertModel

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json, write_text
from vocabshrink.data.metrics import headline
from vocabshrink.data.task_batches import encode_task
from vocabshrink.data.tasks import score
from vocabshrink.delivery.graph import KERNELS, build_graph
from vocabshrink.delivery.size import delivery_bytes, describe
from vocabshrink.lab.ablations import run_ablations, units_of
from vocabshrink.lab.bench import time_calls
from vocabshrink.lab.variants import (
    Variant,
    advance,
    base_values,
    change,
    claimed,
    make_variant,
    read_yaml,
    refuse_launcher,
    without_left_out,
)
from vocabshrink.models.loading import load_config, resolve_model
from vocabshrink.models.rounding import fake_quantize_
from vocabshrink.models.student import student_config
from vocabshrink.models.task_model import load_task_model
from vocabshrink.pages.tune import write_page
from vocabshrink.run.engine import say, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.formats import formats_of
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import Bytes, Number, Positive, Recipe, Section, Share, dump_recipe, explain
from vocabshrink.run.recipe_yaml import RecipeDumper, override_value, parse_yaml
from vocabshrink.run.stage import STAGES
from vocabshrink.stages.inputs import read_tasks, teacher_folder
from vocabshrink.stages.plan import delivered_shape, delivery_of, flops_per_piece, shapes
from vocabshrink.training.finetune import logits_of

NAMED_MAPS = ("uniform", "last", "skip", "first", "random")  # what the found map is compared with
Genes = dict[str, int]
Objective = Literal["quality", "bytes", "latency"]
LATENCY_PIECES = 32
ASKED = 10  # genomes asked of the sampler for each trial that is allowed, most of them known ones at the end


class MapGenes(Section):
    settings: Annotated[list[str], Field(min_length=1)] = ["distill.layer_map"]  # the keys that take the map
    # later layers learn from later layers: no map of the literature crosses, and the space is many times smaller
    ordered: bool = True


class GiveUp(Section):
    """When a candidate is given up between two tasks: under this share of those that came as far, once there are so
    many."""

    below: Share = 0.2
    after: Positive = 10


class Check(Section):
    """How well does the proxy rank: maps of all ranks, trained longer."""

    settings: dict[str, Any]  # over the recipe, in the place of the proxy's
    maps: Annotated[int, Number, Field(ge=8)] = 8


class Confirm(Section):
    """The found map beside the named ones, trained longer, on tasks that the search has not seen too."""

    settings: dict[str, Any] = {}  # over the recipe
    tasks: Annotated[list[str], Field(min_length=1)]  # unseen
    seeds: Annotated[list[Annotated[int, Number, Field(ge=0)]], Field(min_length=1)] = [1, 2, 3]


class Search(Section):
    """A search: a base recipe, which is the full run that the result is for, the proxy, and what may vary."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    title: str
    base: str  # a recipe's path, from this file's folder
    # what a candidate is judged by, the mean of: tasks of the recipe, fine-tuned on (their headline metric), and rated
    # pairs of evaluation.stsb, which the general student answers as it is (Spearman)
    tasks: Annotated[list[str], Field(min_length=1)]
    proxy: dict[str, Any] = {}  # section.key -> value over the recipe, of every candidate
    map: MapGenes | None = MapGenes()
    genes: dict[str, Annotated[list[Any], Field(min_length=2)]] = {}  # section.key -> its values; null leaves it out
    objectives: Annotated[list[Objective], Field(min_length=1)] = ["quality"]
    budget: Bytes | None = None  # of a candidate's delivery; None: delivery.budget
    trials: Positive = 48  # distinct genomes, the named maps among them
    population: Annotated[int, Number, Field(ge=2)] = 12
    crossover: Share = 0.9  # probability that a child has two parents
    swap: Share = 0.5  # probability, gene by gene, that the child has the second parent's
    mutation: Share | None = None  # probability, gene by gene, of a new value; None: 1 / genes
    seed: Annotated[int, Number, Field(ge=0)] = 0
    give_up: GiveUp | None = GiveUp()
    random_search: bool = False  # as many trials of random genomes, for comparison
    storage: str | None = None  # of the study, a database URL; None: a file in the search's folder
    check: Check | None = None
    confirm: Confirm | None = None

    @model_validator(mode="after")
    def consistent(self):
        if "quality" not in self.objectives:
            raise ValueError("objectives: quality is missing: the smallest model is no model")
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: one is written twice: write each once")
        if not (self.map or self.genes):
            raise ValueError("there is nothing to search for: add map or genes")
        if self.map and (fixed := set(self.map.settings) & set(self.genes)):
            raise ValueError(f"genes.{min(fixed)}: map.settings has it already: leave one of the two out")
        if self.confirm and (seen := set(self.confirm.tasks) & set(self.tasks)):
            raise ValueError(f"confirm.tasks: the search has seen {min(seen)}: name other tasks")
        if len(self.objectives) > 1 and (self.check or self.confirm):
            raise ValueError("check and confirm are of one best map: leave them out, or search for quality alone")
        return self


def read_search(path: Path) -> Search:
    """A search file. Raises InputError: a missing or malformed file, an unknown key, a wrong value."""
    data = read_yaml(path, "a search")
    if not isinstance(data, dict) or "base" not in data:
        raise InputError(f"{path}: a search is a mapping with name, title, base and tasks; a recipe goes to run")
    try:
        return Search.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error.errors()[0], Search)}") from None


# ------------------------------------------------------------------------------------------------ genes


@dataclass(frozen=True)
class Space:
    """What genomes there are and which settings each means.

    base: the recipe's plain values. teacher_layers: N; student_layers: the most that a candidate may have.
    """

    search: Search
    base: dict
    teacher_layers: int
    student_layers: int

    @property
    def sizes(self) -> dict[str, int]:
        """Gene -> how many values it has: `layer_1` .. of the map, and the keys of the recipe."""
        layers = range(1, self.student_layers + 1) if self.search.map else ()
        return {f"layer_{m}": self.teacher_layers + 1 for m in layers} | {
            k: len(v) for k, v in self.search.genes.items()
        }

    def changes(self, genes: Genes) -> dict[str, Any]:
        """{section.key: value} over the base recipe. Genes of layers that the student does not have say nothing."""
        changes = {key: values[genes[key]] for key, values in self.search.genes.items()}
        if self.search.map:
            found = [genes[f"layer_{m}"] for m in range(1, self.depth(changes) + 1)]
            if self.search.map.ordered:
                rising = iter(sorted(filter(None, found)))
                found = [n and next(rising) for n in found]
            pairs = [[m, n] for m, n in enumerate(found, 1) if n]
            changes |= dict.fromkeys(self.search.map.settings, pairs)
        return changes

    def depth(self, changes: dict[str, Any]) -> int:
        """The layers of the student with these settings."""
        section = {} | (self.base.get("student") or {})
        section |= changes.get("student") or {}
        return changes.get("student.num_hidden_layers") or section.get("num_hidden_layers") or self.teacher_layers

    def words(self, changes: dict[str, Any]) -> str:
        """The map, layer by layer, and the other genes' values on one line."""
        shown = []
        if self.search.map:
            pairs = dict(changes[self.search.map.settings[0]])
            shown.append(" ".join(str(pairs.get(m, 0)) for m in range(1, self.depth(changes) + 1)))
        for key in self.search.genes:
            value = changes[key]
            shown.append(f"{key.rpartition('.')[2]} {describe(value) if isinstance(value, dict) else value}")
        return "; ".join(shown)

    def named(self, name: str) -> Genes:
        """The genome of a named map; of other genes the base's value, or the first."""
        genes = {key: self._of_base(key, values) for key, values in self.search.genes.items()}
        depth = self.depth(self.changes(genes | {f"layer_{m}": 0 for m in range(1, self.student_layers + 1)}))
        pairs = dict(layer_pairs(name, depth, self.teacher_layers, seed=self.search.seed))
        return {f"layer_{m}": pairs.get(m, (0,))[-1] for m in range(1, self.student_layers + 1)} | genes

    def _of_base(self, key: str, values: list) -> int:
        found: Any = self.base
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return values.index(found) if found in values else 0


def space_of(search: Search, base: dict, recipe: Recipe) -> Space:
    """Raises InputError: a student deeper than its teacher, which no map is for."""
    _, teacher = shapes(recipe)
    space = Space(search, base, teacher.num_hidden_layers, 0)
    choices = [{}] + [{key: v} for key in ("student", "student.num_hidden_layers") for v in search.genes.get(key, [])]
    deepest = max(map(space.depth, choices))
    if search.map and deepest > teacher.num_hidden_layers:
        raise InputError(
            f"{search.name}: a student of {deepest} layers has more than its teacher's {teacher.num_hidden_layers}: "
            "leave such students out, or search without map"
        )
    return Space(search, base, teacher.num_hidden_layers, deepest)


def genome_of(changes: dict[str, Any]) -> str:
    """A candidate's name: twelve digits that tell its settings from all others'."""
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ candidates


def evaluation_of(variant: Variant) -> dict[str, float]:
    """Spearman on the rated pairs of evaluation.stsb of the general student, the last one that the run trains.

    Raises:
        InputError: the stage was made before evaluation.stsb had these pairs.
    """
    if not variant.recipe.evaluation.stsb:
        return {}
    stage = variant.dir.stage([name for name in variant.stages if STAGES[name].student][-1])
    found = read_json(stage / "summary.json").get("evaluation", {})
    if missing := set(variant.recipe.evaluation.stsb) - set(found):
        raise InputError(f"{stage}: it was made without evaluation.stsb.{min(missing)}: delete the folder")
    return {name: found[name] for name in variant.recipe.evaluation.stsb}


class GivenUp(Exception):
    """A candidate that will not be trained on; its text says why."""


class Candidates:
    """Trains candidates and measures them. Everything that it finds once stays in the search's folder."""

    def __init__(self, search: Search, base: dict, root: Path, origin: str):
        """Raises InputError: the proxy's settings, a task that the recipe lacks, or one gene's value is refused."""
        self.search, self.root, self.origin = search, root, origin
        self.base = json.loads(json.dumps(base))
        for key, value in search.proxy.items():
            change(self.base, key, value, f"{origin}: proxy.{key}")
        self.recipe = make_variant(self.base, {}, root, root, origin=f"{origin}: proxy", label="").recipe
        self.rated = set(self.recipe.evaluation.stsb)
        known = [*self.recipe.tasks, *self.rated]
        for task in [*search.tasks, *(search.confirm.tasks if search.confirm else [])]:
            if task not in known:
                raise InputError(
                    f"{origin}: there is no task {task} in the recipe: it has {', '.join(known) or 'none'}"
                )
        if self.recipe.finetune is None:
            raise InputError(f"{origin}: the recipe has no finetune section: candidates are judged by their tasks")
        if any(key.startswith("delivery.weights") for key in search.genes):
            self.base["finetune"]["save_models"] = True  # they are rounded before they are judged
        for key, values in search.genes.items():
            for value in values:
                self.variant({key: value}, search.tasks[0])
        for key in search.map.settings if search.map else []:
            self.variant({key: "uniform"}, search.tasks[0])
        self.space = space_of(search, without_left_out(self.base), self.recipe)

    def variant(self, changes: dict[str, Any], task: str) -> Variant:
        """The run of a candidate on one task, whose general student it shares with its runs on the others."""
        only: dict[str, Any] = {"finetune": None} if task in self.rated else {"tasks": {task: self.base["tasks"][task]}}
        genome, runs = genome_of(changes), self.root / "runs"
        options = {"origin": f"{self.origin}: genes {changes}", "label": f"{genome} {task}"}
        return make_variant(self.base, changes | only, runs / "candidates" / genome, runs / "stages", **options)

    def weigh(self, changes: dict[str, Any]) -> dict[str, float]:
        """Of the objectives, what is known before training: exact bytes, and the latency of the shape.

        Raises:
            GivenUp: over the budget; settings that contradict each other.
        """
        if self.search.map and not changes[self.search.map.settings[0]]:
            raise GivenUp("no student layer learns from any teacher layer")
        try:
            recipe = self.variant(changes, self.search.tasks[0]).recipe
        except InputError as error:
            raise GivenUp(str(error)) from None
        student, _ = shapes(recipe)
        delivery = delivery_of(recipe)
        weight = delivery_bytes(delivered_shape(recipe, student), delivery.weights)["total"]
        budget = self.search.budget or delivery.budget
        if weight > budget:
            raise GivenUp(f"{weight:,} bytes are over the budget of {budget:,}")
        known: dict[str, float] = {"bytes": weight}
        if "latency" in self.search.objectives:
            known["latency"] = self.latency(recipe)
        return known

    def quality(self, changes: dict[str, Any], task: str) -> float:
        """The headline of the task's metrics on validation, of the rounded model where the format is a gene."""
        variant = self.variant(changes, task)
        while not advance(variant):  # another process is at this stage
            time.sleep(1)
        if task in self.rated:
            return evaluation_of(variant)[task]
        if any(key.startswith("delivery.weights") for key in self.search.genes):
            return self.rounded(variant, task)
        return read_json(variant.dir.stage("finetune") / "summary.json")["average"]

    def rounded(self, variant: Variant, name: str) -> float:
        """The headline of a fine-tuned model whose weights are rounded as its delivery's would be."""
        kept = variant.dir.stage("finetune") / name / "rounded.json"
        if not kept.is_file():
            task, phase = read_tasks(variant.recipe)[name], variant.recipe.finetune.phases[-1]
            model = load_task_model(str((kept.parent / "model").absolute()), task, trained=True)
            fake_quantize_(model, delivery_of(variant.recipe).weights)
            with tempfile.TemporaryDirectory() as place:
                encoded = encode_task(task, teacher_folder(variant.recipe), variant.dir.stage("vocab"), Path(place))
                metrics = score(task, logits_of(model, encoded, "validation", phase), "validation")
            write_json(kept, metrics)
        return headline(read_json(kept))

    def latency(self, recipe: Recipe) -> float:
        """Milliseconds of a sentence of 32 pieces on one thread: the least of many, which other work disturbs least."""
        delivery, (student, _) = delivery_of(recipe), shapes(recipe)
        heads = recipe.student.num_attention_heads
        shape = json.dumps([vars(student), heads, delivery.weights, delivery.kernel], sort_keys=True)
        kept = self.root / "latency.json"
        known = read_json(kept) if kept.is_file() else {}
        if shape not in known:
            known[shape] = measure_latency(recipe, student.vocab_size)
            write_json(kept, known)
        return known[shape]


def measure_latency(recipe: Recipe, vocab_size: int) -> float:
    """See `Candidates.latency`; the weights are random."""
    teacher = load_config(resolve_model(recipe.teacher.model, recipe.teacher.revision))
    config, delivery = student_config(recipe.student, teacher, vocab_size), delivery_of(recipe)
    state = {name: value.numpy() for name, value in BertModel(config, add_pooling_layer=False).state_dict().items()}
    kernel = KERNELS[0] if delivery.kernel == "auto" else delivery.kernel
    graph = build_graph(state, config, task="embedding", formats=formats_of(delivery.weights), kernel=kernel)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, vocab_size, (1, LATENCY_PIECES))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return 1000 * min(time_calls(lambda: session.run(None, feed), seconds=1.0, least=30))


# ------------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Opened:
    """A search that is under way. base: the plain values of the full run; overrides: those of the recipe."""

    search: Search
    path: Path
    overrides: list[str]
    root: Path
    base: dict
    candidates: Candidates

    @property
    def space(self) -> Space:
        return self.candidates.space

    def full(self, changes: dict[str, Any]) -> Recipe:
        """The full run with these settings."""
        return make_variant(self.base, changes, self.root, self.root, origin=str(self.path), label="").recipe


def open_search(path: Path, overrides: list[str] | tuple[str, ...], root: Path) -> Opened:
    """Reads a search and its base recipe. overrides: of the recipe, or with `search.` before them of the search.

    Raises:
        InputError: see `read_search`, `base_values`, `Candidates`.
    """
    search = read_search(path)
    for override in (o for o in overrides if o.startswith("search.")):
        key, _, value = override.removeprefix("search.").partition("=")
        data = search.model_dump()
        override_value(data, key.split("."), parse_yaml(value, override), override)
        try:
            search = Search.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{override}: {explain(error.errors()[0], Search)}") from None
    others = [override for override in overrides if not override.startswith("search.")]
    base, own = base_values(path.parent / search.base, others), root / search.name
    return Opened(search, path, others, own, base, Candidates(search, base, own, str(path)))


def run_search(
    path: Path,
    overrides: list[str] | tuple[str, ...] = (),
    root: Path = Path("artifacts/search"),
    *,
    proxy_check: bool = False,
) -> dict:
    """Searches, checks the proxy where asked, confirms the result where the file says so; what is finished is skipped.

    Writes into `root`/NAME: study.db, best.yaml (or front/N.yaml), trials.csv, search.html, summary.json; and
    `root`/summary.json, which gathers all searches. Returns the search's summary.
    """
    refuse_launcher()
    opened = open_search(path, overrides, root)
    search = opened.search
    if proxy_check and not search.check:
        raise InputError(f"{path}: --proxy-check: there is no check section: add check with settings of longer runs")
    RunDir(opened.root).write_environment()
    rows = explore(opened, "genetic")
    if search.random_search:
        rows += explore(opened, "random")
    summary = summarise(opened, rows)
    write_results(opened, rows, summary)
    if search.confirm:
        summary["confirm"] = confirm(opened, summary["best"]["changes"])
        write_results(opened, rows, summary)
    kept = opened.root / "check.json"
    if proxy_check:
        write_json(kept, check_proxy(opened, rows))
    if kept.is_file():
        summary["proxy_check"] = read_json(kept)
    write_results(opened, rows, summary)
    every = {place.parent.name: read_json(place) for place in sorted(root.glob("*/summary.json"))}
    write_json(root / "summary.json", every)
    return summary


def explore(opened: Opened, kind: Literal["genetic", "random"]) -> list[dict]:
    """Runs a study to its number of trials, or goes on with it. Returns its trials as rows (`row_of`).

    Raises:
        InputError: the storage holds a study of another search under this name.
    """
    search, sizes = opened.search, opened.space.sizes
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats, there since 2021
    url = search.storage or f"sqlite:///{(opened.root / 'study.db').absolute()}"
    name = search.name if kind == "genetic" else f"{search.name}-random"
    study = open_study(opened, url, name)
    mark = study_mark(opened)
    if study.user_attrs.setdefault("mark", mark) != mark:
        raise InputError(
            f"{url}: study {name} is of other genes, tasks or proxy settings: give the search another name, or delete "
            f"{opened.root}"
        )
    study.set_user_attr("mark", mark)
    seed = search.seed + len(study.trials)  # a resumed study draws on, not the same again
    if kind == "random":
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=search.population,
            mutation_prob=search.mutation,
            crossover=optuna.samplers.nsgaii.UniformCrossover(swapping_prob=search.swap),
            crossover_prob=search.crossover,
            seed=seed,
        )
    if not study.trials:
        for named in NAMED_MAPS if search.map else ():
            study.enqueue_trial(opened.space.named(named), user_attrs={"name": named}, skip_if_exists=True)
    began = time.monotonic()
    finished_before = len(trained(study))

    def objective(trial: optuna.Trial) -> list[float]:
        genes = {gene: trial.suggest_int(gene, 0, size - 1) for gene, size in sizes.items()}
        return attempt(opened, study, trial, opened.space.changes(genes))

    def stop_when_enough(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        done = len(trained(study))
        if "scores" in trial.user_attrs and "again" not in trial.user_attrs:
            each = (time.monotonic() - began) / max(done - finished_before, 1)
            quality = statistics.fmean(trial.user_attrs["scores"].values())
            state = "" if trial.state == optuna.trial.TrialState.COMPLETE else "  given up"
            left = each * max(search.trials - done, 0) / 60
            words = opened.space.words(trial.user_attrs["changes"])
            say(f"{name} {done}/{search.trials}  {words}  quality {quality:.4f}{state}  {left:.1f} min left")
        if done >= search.trials or len(study.get_trials(deepcopy=False)) >= ASKED * search.trials:
            study.stop()

    if finished_before < search.trials and len(study.trials) < ASKED * search.trials:
        study.optimize(objective, callbacks=[stop_when_enough])
    return [
        row_of(kind, trial, opened.space) for trial in study.trials if trial.state.is_finished() and trial.user_attrs
    ]


def open_study(opened: Opened, url: str, name: str) -> optuna.Study:
    """The study, made by whoever comes first. Raises InputError: a storage that is none."""
    directions = ["maximize" if objective == "quality" else "minimize" for objective in opened.search.objectives]
    while True:
        with claimed(opened.root / "study") as mine:  # two processes would make the tables of one file twice
            if mine:
                try:
                    storage = optuna.storages.RDBStorage(
                        url,
                        heartbeat_interval=30,  # a trial whose process died is told by it, and tried again
                        grace_period=120,
                        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
                    )
                    return optuna.create_study(
                        study_name=name, storage=storage, directions=directions, load_if_exists=True
                    )
                except (ImportError, SQLAlchemyError) as error:
                    reason = str(error).splitlines()[0]
                    raise InputError(f"storage {url}: cannot be opened: {reason}") from None
        time.sleep(0.2)


def study_mark(opened: Opened) -> str:
    """What decides a genome's score, and so whether trials of two commands may be compared."""
    search, candidates = opened.search, opened.candidates
    chosen = search.model_dump(include={"tasks", "map", "genes", "objectives", "budget"})
    runs = [candidates.variant({}, task) for task in search.tasks]
    settings = [settings_of(run.recipe, run.stages[-1]) | {"rated": run.recipe.evaluation.stsb} for run in runs]
    return hashlib.sha256(json.dumps([chosen, settings], sort_keys=True).encode()).hexdigest()


def trained(study: optuna.Study) -> set[str]:
    """The genomes of finished trials that cost a training."""
    trials = study.get_trials(deepcopy=False)
    return {t.user_attrs["genome"] for t in trials if t.state.is_finished() and "scores" in t.user_attrs}


def attempt(opened: Opened, study: optuna.Study, trial: optuna.Trial, changes: dict[str, Any]) -> list[float]:
    """One candidate: its objectives, in the order of the search's.

    Raises:
        optuna.TrialPruned: over budget, contradictory, or given up after a task.
    """
    search, began = opened.search, time.monotonic()
    genome = genome_of(changes)
    trial.set_user_attr("genome", genome)
    trial.set_user_attr("changes", changes)
    for other in study.get_trials(deepcopy=False):
        if other.number == trial.number or other.user_attrs.get("genome") != genome or not other.state.is_finished():
            continue
        if "again" in other.user_attrs or other.state == optuna.trial.TrialState.FAIL:
            continue
        for key, value in (other.user_attrs | {"again": True}).items():
            if key != "name":
                trial.set_user_attr(key, value)
        if other.state == optuna.trial.TrialState.PRUNED:
            raise optuna.TrialPruned
        return other.values
    try:
        known = opened.candidates.weigh(changes)
    except GivenUp as error:
        trial.set_user_attr("refused", str(error))
        raise optuna.TrialPruned from None
    for objective, value in known.items():
        trial.set_user_attr(objective, value)
    scores: dict[str, float] = {}
    for task in search.tasks:
        scores[task] = opened.candidates.quality(changes, task)
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
        if "name" not in trial.user_attrs and len(scores) < len(search.tasks) and behind(search, study, known, scores):
            raise optuna.TrialPruned
    known["quality"] = statistics.fmean(scores.values())
    return [known[objective] for objective in search.objectives]


def behind(search: Search, study: optuna.Study, known: dict[str, float], scores: dict[str, float]) -> bool:
    """Whether a candidate with these first scores is to be given up (`GiveUp`), beside those as light and as fast."""
    if not search.give_up:
        return False
    reached = []
    for trial in study.get_trials(deepcopy=False):
        theirs = list(trial.user_attrs.get("scores", {}).values())
        comparable = all(trial.user_attrs.get(o, math.inf) <= known[o] for o in search.objectives if o != "quality")
        if trial.state.is_finished() and len(theirs) >= len(scores) and comparable:
            reached.append(statistics.fmean(theirs[: len(scores)]))
    if len(reached) < search.give_up.after:
        return False
    return statistics.fmean(scores.values()) < float(np.quantile(reached, search.give_up.below))


def row_of(kind: str, trial: optuna.trial.FrozenTrial, space: Space) -> dict:
    """One trial: kind, number, state (complete, given up, refused, failed), name (of a named map), genome, changes,
    words, layers (of the student), quality (None before all tasks are done), scores by task, bytes, latency, seconds,
    again (whether it was known)."""
    about = trial.user_attrs
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    pruned = trial.state == optuna.trial.TrialState.PRUNED
    state = "complete" if complete else "failed" if not pruned else "refused" if "refused" in about else "given up"
    keys = ("name", "genome", "changes", "scores", "bytes", "latency", "seconds", "refused")
    row = {"kind": kind, "number": trial.number, "state": state} | {key: about.get(key) for key in keys}
    quality = statistics.fmean(about["scores"].values()) if complete else None
    row |= {"quality": quality, "again": about.get("again", False)}
    if row["changes"] is None:  # its process died at once
        return row | {"words": "", "layers": None}
    return row | {"words": space.words(row["changes"]), "layers": space.depth(row["changes"])}


# ------------------------------------------------------------------------------------------------ results


def summarise(opened: Opened, rows: list[dict]) -> dict:
    """The search's result: "best" (or "front"), "named" maps, "random_search", trials, cost.

    Raises:
        InputError: no candidate was trained to its end.
    """
    search, candidates = opened.search, opened.candidates
    genetic = [row for row in rows if row["kind"] == "genetic"]
    complete = [row for row in genetic if row["state"] == "complete"]
    if not complete:
        reasons = {row["refused"] for row in genetic if row["refused"]} or {"all were given up"}
        raise InputError(f"{opened.path}: no candidate could be trained: {min(reasons)}")
    summary: dict[str, Any] = {"title": search.title, "objectives": search.objectives, "tasks": search.tasks}
    summary |= {"map_settings": search.map.settings if search.map else []}
    summary |= {"teacher_layers": opened.space.teacher_layers}
    if len(search.objectives) == 1:
        best = max(complete, key=lambda row: row["quality"])
        summary["best"] = in_short(best)
    else:
        summary["front"] = [in_short(row) for row in front(complete, search.objectives)]
    named = {}
    for name in NAMED_MAPS if search.map else ():
        changes = opened.space.changes(opened.space.named(name))
        try:
            weight = candidates.weigh(changes)
            scores = {task: candidates.quality(changes, task) for task in search.tasks}
        except GivenUp as error:
            named[name] = {"refused": str(error)}
            continue
        named[name] = weight | {"scores": scores, "quality": statistics.fmean(scores.values()), "changes": changes}
    summary["named"] = named
    drawn = [row for row in rows if row["kind"] == "random" and row["state"] == "complete"]
    if drawn:
        best = in_short(max(drawn, key=lambda row: row["quality"]))
        genomes = {row["genome"] for row in rows if row["kind"] == "random" and row["scores"]}
        summary["random_search"] = best | {"trials": len(genomes)}
    new = [row for row in genetic if row["scores"] and not row["again"]]
    states = [row["state"] for row in genetic]
    summary["trials"] = {state: states.count(state) for state in ("complete", "given up", "refused")}
    summary["trials"] |= {"trained": len({row["genome"] for row in new}), "asked": len(genetic)}
    return summary | {"cost": cost_of(opened, new, complete[0]["changes"])}


def in_short(row: dict) -> dict:
    keys = ("number", "genome", "changes", "words", "layers", "quality", "scores", "bytes", "latency", "name")
    return {key: row[key] for key in keys if row[key] is not None}


def front(rows: list[dict], objectives: list[Objective]) -> list[dict]:
    """The rows that no other beats in one objective without losing in another, each genome once, by quality."""
    sign = {objective: -1 if objective == "quality" else 1 for objective in objectives}
    points = {row["genome"]: [sign[o] * row[o] for o in objectives] for row in rows}

    def beaten(mine: list[float]) -> bool:
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)) for theirs in points.values()
        )

    kept = {row["genome"]: row for row in rows if not beaten(points[row["genome"]])}
    return sorted(kept.values(), key=lambda row: -row["quality"])


def cost_of(opened: Opened, rows: list[dict], changes: dict[str, Any]) -> dict:
    """Seconds of the search, and its share of the full distillation that it is for.

    The full run's seconds are not measured: its tokens and FLOPs are the recipe's, at the speed (FLOP/s) that a
    candidate's own distillation reached.
    """
    seconds = sum(row["seconds"] or 0 for row in rows)
    cost = {"search_seconds": round(seconds), "seconds_per_trial": round(seconds / max(len(rows), 1), 1)}
    full = opened.full({})
    variant = opened.candidates.variant(changes, opened.search.tasks[0])
    stage = variant.recipe.distill
    if not (full.distill and stage and variant.dir.is_done("distill")):
        return cost
    done = read_json(variant.dir.stage("distill") / "summary.json")
    length = done["tokens"] / done["steps"] / stage.batch_size
    student, teacher = (flops_per_piece(shape, round(length)) for shape in shapes(variant.recipe))
    # seconds are rounded to tenths, and a toy's are none
    speed = done["tokens"] * (3 * student + (0 if stage.record_teacher else teacher)) / max(done["seconds"], 0.1)
    tokens = full.distill.steps * full.distill.batch_size * length
    full_seconds = tokens * (3 * student + teacher) / speed
    return cost | {"full_tokens": round(tokens), "full_seconds": round(full_seconds), "ratio": seconds / full_seconds}


def longer_runs(opened: Opened, name: str, title: str, variants: dict[str, dict], **keys) -> dict[str, dict[int, dict]]:
    """Runs an ablation of these variants in the search's folder. Returns {label: {seed: {task: headline}}}."""
    path = opened.root / f"{name}.yaml"
    base = str((opened.path.parent / opened.search.base).absolute())
    content = {"name": name, "title": title, "base": base, "variants": variants} | keys
    write_text(path, yaml.dump(content, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True))
    run_ablations([path], opened.overrides, root=opened.root / "runs")
    found: dict[str, dict[int, dict]] = {}
    for unit in units_of(path, opened.overrides, opened.root / "runs"):
        done = read_json(unit.run.dir.stage("finetune") / "summary.json")
        scores = {
            task: headline({metric: value["median"] for metric, value in done[task].items()})
            for task in unit.run.recipe.tasks
        }
        scores |= evaluation_of(unit.run)
        found.setdefault(unit.variant, {})[unit.seed] = scores
    return found


def confirm(opened: Opened, best: dict[str, Any]) -> dict:
    """The found map beside the named ones, trained longer under several seeds.

    Returns: {"seen", "unseen": {label: {"values" (a mean over tasks for each seed), "median"}}, "against": {label:
    {"difference" (of medians, unseen), "clear" (no seed of the one in the other's range)}}, "tasks", "seeds",
    "by_task": {label: {seed: {task: score}}}}.
    """
    section, search, space = opened.search.confirm, opened.search, opened.space
    variants = {"found": best} | {name: space.changes(space.named(name)) for name in NAMED_MAPS}
    scores = longer_runs(
        opened,
        "confirm",
        "The found map beside the named ones, trained longer",
        variants,
        common={"tasks": tasks_of(opened, [*search.tasks, *section.tasks])} | section.settings,
        seeds=section.seeds,
        vary="run",
        baseline="uniform",
    )
    found: dict[str, Any] = {"tasks": section.tasks, "seeds": section.seeds, "by_task": scores}
    for split, tasks in (("seen", search.tasks), ("unseen", section.tasks)):
        found[split] = {}
        for label, by_seed in scores.items():
            values = [statistics.fmean(by_seed[seed][task] for task in tasks) for seed in section.seeds]
            found[split][label] = {"values": values, "median": statistics.median(values)}
    ours = found["unseen"]["found"]
    found["against"] = {
        label: {
            "difference": ours["median"] - theirs["median"],
            "clear": min(ours["values"]) > max(theirs["values"]) or max(ours["values"]) < min(theirs["values"]),
        }
        for label, theirs in found["unseen"].items()
        if label != "found"
    }
    return found


def check_proxy(opened: Opened, rows: list[dict]) -> dict:
    """Trains maps of all ranks longer.

    Returns: {"spearman", "interval" (of 95 %), "maps": [{"genome", "words", "proxy", "longer"}]}.

    Raises:
        InputError: fewer than eight maps were trained to their end.
    """
    search, section = opened.search, opened.search.check
    complete = {row["genome"]: row for row in rows if row["state"] == "complete"}
    ranked = sorted(complete.values(), key=lambda row: row["quality"])
    if len(ranked) < 8:
        raise InputError(
            f"{opened.path}: --proxy-check: only {len(ranked)} maps were trained to their end: raise trials"
        )
    places = np.linspace(0, len(ranked) - 1, min(section.maps, len(ranked))).round().astype(int)
    chosen = [ranked[place] for place in places]
    scores = longer_runs(
        opened,
        "check",
        "Maps of all ranks under the proxy, trained longer",
        {row["genome"]: row["changes"] for row in chosen},
        common={"tasks": tasks_of(opened, search.tasks)} | section.settings,
        seeds=[1],
    )
    maps = [
        {
            "genome": row["genome"],
            "words": row["words"],
            "proxy": row["quality"],
            "longer": statistics.fmean(scores[row["genome"]][1][task] for task in search.tasks),
        }
        for row in chosen
    ]
    rho, interval = rank_correlation([m["proxy"] for m in maps], [m["longer"] for m in maps])
    return {"spearman": rho, "interval": interval, "maps": maps}


def tasks_of(opened: Opened, names: list[str]) -> dict:
    """The tasks as the base recipe has them, not as the proxy cut them."""
    return {name: section for name, section in opened.base["tasks"].items() if name in names}


def rank_correlation(first: list[float], second: list[float]) -> tuple[float, list[float]]:
    """Spearman's rho and its 95 % interval: Fisher's z with variance (1 + rho² / 2) / (n - 3) (Bonett and Wright
    2000). Where one of the two is constant, nothing is ranked: 0, from -1 to 1."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0, [-1.0, 1.0]
    rho = float(spearmanr(first, second).statistic)
    if abs(rho) >= 1:
        return rho, [rho, rho]
    half = norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(first) - 3))
    return rho, [math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)]


def write_results(opened: Opened, rows: list[dict], summary: dict) -> None:
    """Writes the recipes, the table of trials, the page and, last, summary.json."""
    search, root = opened.search, opened.root
    results = [summary["best"]] if "best" in summary else summary["front"]
    for number, result in enumerate(results, 1):
        name = f"{search.name}_best" if "best" in summary else f"{search.name}_front_{number}"
        place = root / "best.yaml" if "best" in summary else root / "front" / f"{number:02}.yaml"
        write_text(place, dump_recipe(opened.full(result["changes"] | {"name": name})))
    table = io.StringIO()
    about = ["kind", "number", "state", "name", "words", "quality"]
    columns = [*about, *search.tasks, "bytes", "latency", "seconds", "genome"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | (row["scores"] or {}))
    write_text(root / "trials.csv", table.getvalue())
    write_page(rows, summary, root)
    write_json(root / "summary.json", summary)
