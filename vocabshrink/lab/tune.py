"""`vocabshrink tune`: a search for the layer map, and with it for loss weights, shape and bits, under a cheap proxy.

A genetic algorithm finds which teacher layer a student layer should learn from (Jiao et al. 2020, arXiv 2012.06153):
gene i is the teacher layer of student layer i, 0 for none. A candidate is a run like an ablation's, trained a little on
the corpus and on a few tasks. NSGA-II, storage, pruning and fronts are Optuna's: a killed search goes on, and several
processes share one study. Optuna prunes by one objective alone, so with several none is given up between tasks."""

import contextlib
import statistics
import timeit
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from pydantic import Field, model_validator
from sqlalchemy.exc import SQLAlchemyError
from transformers import PreTrainedConfig

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, hash_of, read_json, write_json, write_text
from vocabshrink.delivery.graph import KERNELS, build_graph
from vocabshrink.lab import ablations
from vocabshrink.models.families import new_encoder
from vocabshrink.pages.experiments import write_tune_page
from vocabshrink.run.engine import say
from vocabshrink.run.folder import RunDir
from vocabshrink.run.formats import formats_of
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import DeliverySection, Name, Number, Positive, Section, Share, dump_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import dump_yaml, override_value, parse_override, read_yaml
from vocabshrink.runtime.delivery import open_graph
from vocabshrink.stages.plan import check_budget, delivered_config, delivery_bytes, shapes

NAMED_MAPS = ("uniform", "last", "skip", "first", "random")  # what the found map is compared with
ASKED = 10  # genomes asked of the sampler for each trial that is allowed; towards the end most of them are known
Keys = Annotated[list[str], Field(min_length=1)]


class Confirm(Section):
    """The ablation of the found map and the named ones, trained longer, on tasks that the search has not seen."""

    settings: dict[str, Any] = {}  # over the recipe, in place of the proxy's
    tasks: Keys
    seeds: ablations.Seeds = [1, 2, 3]


class Tuning(Section):
    """A search: a base recipe, which is the full run that the result is for, the proxy, and what may vary."""

    name: Name
    title: str
    base: str  # a recipe's path, relative to this file's folder
    # a candidate's quality is their mean: of tasks after fine-tuning (headline), of rated pairs before it (Spearman)
    tasks: Keys
    proxy: dict[str, Any] = {}  # section.key -> value over the recipe, of every candidate
    map: list[str] = ["distill.layer_map"]  # the keys that take the map; none: it is not searched for
    # later layers learn from later layers: no map of the literature crosses, and the space is many times smaller
    ordered: bool = True
    genes: dict[str, Annotated[list[Any], Field(min_length=2)]] = {}  # section.key -> its values; null leaves it out
    objectives: Annotated[list[Literal["quality", "bytes", "latency"]], Field(min_length=1)] = ["quality"]
    sampler: Literal["genetic", "random"] = "genetic"  # random: for comparison
    trials: Positive = 48  # distinct genomes, the named maps among them
    population: Annotated[int, Number, Field(ge=2)] = 12
    seed: Annotated[int, Number, Field(ge=0)] = 0
    # between two tasks, the lowest share is given up, compared with a population or more that came to their end
    give_up: Share = 0.2
    storage: str | None = None  # a database URL for the study; None: a file in the search's folder
    confirm: Confirm | None = None

    @model_validator(mode="after")
    def consistent(self):
        seen = set(self.confirm.tasks) & set(self.tasks) if self.confirm else ()
        best_map = self.map and self.objectives == ["quality"]
        for wrong, message in (
            ("quality" not in self.objectives, "objectives: quality is missing: the smallest model is no model"),
            (len(set(self.objectives)) < len(self.objectives), "objectives: one is written twice: write each once"),
            (not (self.map or self.genes), "there is nothing to search for: add map or genes"),
            (set(self.map) & set(self.genes), f"genes: one of {self.map} is there too: leave it out of map or genes"),
            (seen, f"confirm.tasks: the search has seen {min(seen, default='')}: name other tasks"),
            (self.confirm and not best_map, "confirm: it compares the best map: search by map and for quality alone"),
        ):
            if wrong:
                raise ValueError(message)
        return self


class Tuner:
    """A search in its folder `root`/NAME: what genomes there are, which settings each means, and what each is worth.
    base: the plain values of the full run. recipe: the proxy's. sizes: {gene: how many values it has}; the value of
    `layer_1` .. is the teacher layer (0 for none), that of a key of the recipe the position in its list."""

    def __init__(self, path: Path, overrides: Sequence[str], root: Path):
        """Reads a search and its base recipe. overrides: of the recipe, or with `tune.` before them of the search.
        Raises InputError for a bad file, override or gene, an unknown task, a student deeper than its teacher."""
        data, own = read_yaml(path, "a search", "base", "tasks"), [o for o in overrides if o.startswith("tune.")]
        for override in own:
            key, value = parse_override(override.removeprefix("tune."))
            override_value(data, key.split("."), value, override)
        self.tuning = tuning = parse_recipe(data, " ".join([str(path), *own]), Tuning)
        self.path, self.root, self.overrides = path, root / tuning.name, [o for o in overrides if o not in own]
        self.base = ablations.base_values(path.parent / tuning.base, self.overrides)
        self.recipe = self.make(tuning.proxy, "proxy").recipe
        tasks = list(self.recipe.tasks) if self.recipe.finetune else []
        known, unseen = {*tasks, *self.recipe.evaluation.stsb}, tuning.confirm.tasks if tuning.confirm else ()
        for task in {*tuning.tasks} - known | {*unseen} - {*tasks}:
            raise InputError(f"{path}: the recipe fine-tunes {', '.join(tasks) or 'nothing'}: there is no task {task}")
        singles = [{key: value} for key, values in tuning.genes.items() for value in values]
        for changes in singles + [{key: "uniform"} for key in tuning.map]:
            self.variant(changes, tuning.tasks[0])
        self.teacher_layers = shapes(self.recipe)[1].num_hidden_layers
        deepest = max(map(self.depth, [{}, *singles])) if tuning.map else 0
        if deepest > self.teacher_layers:
            fault = f"a student of {deepest} layers has more than its teacher's {self.teacher_layers}"
            raise InputError(f"{path}: {fault}: leave such students out, or search without map")
        self.sizes = {f"layer_{m}": self.teacher_layers + 1 for m in range(1, deepest + 1)}
        self.sizes |= {key: len(values) for key, values in tuning.genes.items()}

    def make(self, changes: dict[str, Any], origin: str, label: str = "", own: str = "") -> ablations.Variant:
        """The full run with these settings. Raises InputError."""
        about = {"origin": f"{self.path}: {origin}", "label": label}
        return ablations.make_variant(self.base, changes, self.root / "runs" / own, self.root / "runs/stages", **about)

    def variant(self, changes: dict[str, Any], task: str) -> ablations.Variant:
        """A candidate's run on one task, which shares its general student with the runs on the others."""
        genome, origin = hash_of(changes), f"genes {changes}"
        keys = self.tuning.proxy | changes | {f"tasks.{name}": None for name in self.recipe.tasks if name != task}
        if task not in self.recipe.tasks:  # rated pairs
            keys["finetune"] = None
        elif any(key.startswith("delivery.weights") for key in self.tuning.genes):  # judged as it is delivered
            keys["finetune.rounded"] = self.make(keys, origin).recipe.delivery.weights
        return self.make(keys, origin, f"{genome} {task}", f"candidates/{genome}")

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
        maps = [dict(changes[key]) for key in self.tuning.map[:1]]
        shown = [" ".join(str(pairs.get(m, 0)) for m in range(1, self.depth(changes) + 1)) for pairs in maps]
        return "; ".join(shown + [f"{key.rpartition('.')[2]} {changes[key]}" for key in self.tuning.genes])

    def named(self) -> dict[str, dict[str, int]]:
        """{named map: its genome}, {} without map; of other genes the recipe's value, or the first."""
        genes = dict.fromkeys(self.sizes, 0)
        for key, values in self.tuning.genes.items():
            with contextlib.suppress(LookupError, TypeError, ValueError):  # the recipe has no such value
                genes[key] = values.index(ablations.value_at(self.base, key.split(".")))
        about = self.depth(self.changes(genes)), self.teacher_layers
        maps = {name: layer_pairs(name, *about, seed=self.tuning.seed) for name in NAMED_MAPS if self.tuning.map}
        return {name: genes | {f"layer_{m}": layers[-1] for m, layers in pairs} for name, pairs in maps.items()}

    def weigh(self, changes: dict[str, Any]) -> dict[str, float]:
        """The objectives known before training: exact bytes, and milliseconds if asked for, measured once a shape.
        Raises InputError for settings that contradict each other, an empty map, and a delivery over its budget."""
        recipe = self.variant(changes, self.tuning.tasks[0]).recipe
        check_budget(recipe)
        config, delivery = delivered_config(recipe, shapes(recipe)[0]), recipe.delivery or DeliverySection()
        known: dict[str, float] = {"bytes": delivery_bytes(config, delivery.weights)["total"]}
        if "latency" in self.tuning.objectives:
            kept = self.root / "latency.json"
            measured = read_json(kept) if kept.is_file() else {}
            shape = hash_of([config.to_diff_dict(), delivery.weights, delivery.kernel])
            known["latency"] = measured.get(shape) or measure_latency(config, delivery)
            write_json(kept, measured | {shape: known["latency"]})
        return known

    def quality(self, changes: dict[str, Any], task: str) -> float:
        """The headline of the task's metrics on validation, of the rounded model where the run rounds it."""
        variant = self.variant(changes, task)
        ablations.advance(variant, wait=True)
        if task not in self.recipe.tasks:
            return ablations.rated_of(variant)[task]
        summary = variant.summary("finetune")
        return (summary["rounded"] or summary)["average"]


def measure_latency(config: PreTrainedConfig, delivery: DeliverySection) -> float:
    """Milliseconds of a sentence of 32 pieces on one thread, random weights: the least of many calls."""
    state, formats = {k: v.numpy() for k, v in new_encoder(config).state_dict().items()}, formats_of(delivery.weights)
    graph = build_graph(state, config, task="embedding", formats=formats, kernel=KERNELS[delivery.kernel][0])
    session = open_graph(graph.SerializeToString())
    ids = np.ones((1, min(32, config.max_position_embeddings)), dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    return 1000 * min(timeit.repeat(lambda: session.run(None, feed), repeat=100, number=1))


def explore(tuner: Tuner) -> optuna.Study:
    """The study, run to its number of trials. Its name ends in a hash of what decides a genome's score, so that a
    changed search is another study in the same storage. Raises InputError for a storage that cannot be opened."""
    tuning, url = tuner.tuning, tuner.tuning.storage or f"sqlite:///{(tuner.root / 'study.db').absolute()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # about heartbeats, there since 2021
    runs = (tuner.variant({}, task) for task in tuning.tasks)
    decides = [run.dir.stage(run.stages[-1]).name for run in runs]  # each ends in the hash of its settings
    decides += [tuning.model_dump(include={"tasks", "map", "ordered", "genes", "objectives", "sampler"})]
    decides += [tuner.recipe.evaluation.stsb, (tuner.recipe.delivery or DeliverySection()).budget]
    pruner = optuna.pruners.PercentilePruner(100 * (1 - tuning.give_up), n_startup_trials=tuning.population)
    options = {"study_name": f"{tuning.name}-{hash_of(decides)}", "load_if_exists": True, "pruner": pruner}
    options["directions"] = ["maximize" if objective == "quality" else "minimize" for objective in tuning.objectives]
    retry = {"heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback()}  # of a trial whose process died
    with claimed(tuner.root / "study.lock", wait=True):  # two processes would make the tables of one file twice
        try:
            storage = RDBStorage(url, heartbeat_interval=30, grace_period=120, **retry)
            study = optuna.create_study(storage=storage, **options)
        except (ImportError, SQLAlchemyError) as error:
            raise InputError(f"storage {url}: cannot be opened: {str(error).splitlines()[0]}") from None
    while len(study.get_trials(deepcopy=False)) < ASKED * tuning.trials:
        if sum(bool(row["scores"]) for row in rows_of(study).values()) >= tuning.trials:
            break
        # SQLite would give one queued trial to two processes, so they ask one at a time
        with contextlib.ExitStack() as held, contextlib.ExitStack() as asking:
            asking.enter_context(claimed(tuner.root / "study.lock", wait=True))
            seed = tuning.seed + prepare(tuner, study)
            genetic = optuna.samplers.NSGAIISampler(population_size=tuning.population, seed=seed)
            study.sampler = genetic if tuning.sampler == "genetic" else optuna.samplers.RandomSampler(seed=seed)

            def one(trial, held=held, asking=asking):
                held.enter_context(claimed(tuner.root / f"trial-{trial.number}.lock"))
                asking.close()
                return attempt(tuner, study, trial)

            study.optimize(one, n_trials=1)
    return study


def prepare(tuner: Tuner, study: optuna.Study) -> int:
    """Calls trials whose process died failed, and puts the first named map that nobody has tried next. Returns how many
    trials there are without the failed: of which a draw is a function, so that a killed search draws the same."""
    # of a database that machines share, heartbeats tell who is at a trial; else the lock that the process holds
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if not tuner.tuning.storage else ():
        with claimed(tuner.root / f"trial-{trial.number}.lock") as dead:
            if dead and not study.trials[trial.number].state.is_finished():  # it may have ended since
                study.tell(trial.number, state=TrialState.FAIL)
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    tried = [trial.system_attrs.get("fixed_params") or trial.params for trial in trials]
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    for name, genes in tuner.named().items() if not waiting else ():
        if genes not in tried:
            study.enqueue_trial(genes, user_attrs={"name": name})
            break
    return len(trials) - waiting


def attempt(tuner: Tuner, study: optuna.Study, trial: optuna.Trial) -> list[float]:
    """One candidate's objectives, in the search's order. Raises optuna.TrialPruned where it is refused or given up."""
    tuning, name, scores = tuner.tuning, trial.user_attrs.get("name"), {}
    changes = tuner.changes({gene: trial.suggest_int(gene, 0, size - 1) for gene, size in tuner.sizes.items()})
    genome = hash_of(changes)
    if not (about := rows_of(study).get(genome)):
        about = {"state": "complete", "name": name, "words": tuner.words(changes), "quality": None, "bytes": None}
        about |= {"latency": None, "genome": genome, "scores": scores, "changes": changes, "refused": None}
        try:
            about |= tuner.weigh(changes)
        except InputError as error:
            about |= {"state": "refused", "refused": str(error)}
        for step, task in enumerate(() if about["refused"] else tuning.tasks, 1):
            scores[task] = tuner.quality(changes, task)
            say(f"{tuning.name} {trial.number}  {about['words']}  {task} {scores[task]:.4f}")
            if len(tuning.objectives) == 1 and step < len(tuning.tasks):
                trial.report(sum(scores.values()), step)  # no mean: of a trial's reports the pruner takes the best
                if not name and trial.should_prune():
                    about["state"] = "given up"
                    break
        if about["state"] == "complete":
            about["quality"] = statistics.fmean(scores.values())
        trial.set_user_attr("about", about)
    if about["state"] != "complete":
        raise optuna.TrialPruned
    return [about[objective] for objective in tuning.objectives]


def rows_of(study: optuna.Study) -> dict[str, dict]:
    """{genome: its first finished trial, as `attempt` noted it, with number and seconds}."""
    rows: dict[str, dict] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if about := trial.user_attrs.get("about"):  # none where the genome was known
            taken = {"number": trial.number, "seconds": round(trial.duration.total_seconds(), 1)}
            rows.setdefault(about["genome"], taken | about)
    return rows


def run_tuning(path: Path, overrides: Sequence[str] = (), root: Path = Path("artifacts/tune")) -> dict:
    """Searches; what is finished is skipped. Writes study.db, best.yaml (or front/N.yaml), confirm.yaml where the file
    asks for it, tune.html and summary.json into `root`/NAME, and `root`/summary.json of all searches. Returns the
    search's summary. Raises InputError as `Tuner` does, and where no candidate could be trained."""
    ablations.refuse_launcher()
    tuner = Tuner(path, overrides, root)
    RunDir(tuner.root).write_environment()
    study, tuning = explore(tuner), tuner.tuning
    rows, best = rows_of(study), {trial.number for trial in study.best_trials}  # which no other beats
    front = sorted((row for row in rows.values() if row["number"] in best), key=lambda row: -row["quality"])
    if not front:
        reasons = [row["refused"] for row in rows.values() if row["refused"]] or ["all were given up"]
        raise InputError(f"{path}: no candidate could be trained: {statistics.mode(reasons)}")
    summary = tuning.model_dump(include={"name", "title", "objectives", "tasks"})
    summary |= {"best": front[0]} if tuning.objectives == ["quality"] else {"front": front}
    named = ((name, hash_of(tuner.changes(genes))) for name, genes in tuner.named().items())
    summary["named"] = {name: rows[genome] for name, genome in named if genome in rows}
    states = [row["state"] for row in rows.values()]
    trials = {state: states.count(state) for state in ("complete", "given up", "refused")}
    seconds = round(sum(row["seconds"] for row in rows.values()))
    summary |= {"trials": trials | {"asked": len(study.trials)}, "seconds": seconds}
    write_results(tuner, list(rows.values()), summary)
    write_json(root / "summary.json", {p.parent.name: read_json(p) for p in sorted(root.glob("*/summary.json"))})
    return summary


def write_results(tuner: Tuner, rows: list[dict], summary: dict) -> None:
    """Writes the recipes, the page and, last, summary.json. confirm.yaml is an ablation file: the found map beside the
    named ones, trained longer under several seeds on unseen tasks."""
    tuning = tuner.tuning
    front = {f"front/{number:02}": row for number, row in enumerate(summary.get("front", []), 1)}
    for place, result in (front or {"best": summary["best"]}).items():
        changes = result["changes"] | {"name": f"{tuning.name}_{place.replace('/', '_')}"}
        write_text(tuner.root / f"{place}.yaml", dump_recipe(tuner.make(changes, place).recipe))
    if section := tuning.confirm:
        content = {"name": f"{tuning.name}_confirm", "title": "The found map beside the named ones", "vary": "run"}
        content |= {"base": str((tuner.path.parent / tuning.base).absolute()), "seeds": section.seeds}
        others = {f"tasks.{task}": None for task in tuner.base["tasks"] if task not in section.tasks}
        named = {name: tuner.changes(genes) for name, genes in tuner.named().items()}
        variants = {"found": summary["best"]["changes"]} | named
        content |= {"common": section.settings | others, "variants": variants, "baseline": "found"}
        write_text(tuner.root / "confirm.yaml", dump_yaml(content))
    write_tune_page(rows, summary, tuner.root)
    write_json(tuner.root / "summary.json", summary)
