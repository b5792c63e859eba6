"""Ablations: variants of one recipe, each run under several seeds, and the table that compares them.

A variant is settings over a recipe's plain values, and a run whose stages stand in one folder of all runs', named by
what decides them (`SharedRunDir`), so that what variants have in common is made once. An ablation file names a base
recipe and the variants, each of which is run under every seed. Several copies of a command share the work: a stage
belongs to one process while it is made. Tables are views of finished stages, written anew after each run."""

import copy
import os
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, read_json, write_json, write_text
from vocabshrink.pages.experiments import AVERAGE, COSTS, ROUNDED, TEACHER, markdown, place_of, plot
from vocabshrink.run.engine import Run, run_stage, say, settings_of
from vocabshrink.run.folder import RunDir, SharedRunDir
from vocabshrink.run.recipe import Name, Recipe, Section, load_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import override_value, parse_override, read_yaml
from vocabshrink.run.stage import STAGES, stages_of
from vocabshrink.stages.checks import check_all_losses
from vocabshrink.stages.plan import check_budget

GENERAL = ("dual", "distill")  # the stages that train a student before it sees a task
LEFT_OUT = "\0left out"  # stands where null was written until all changes are made, so that positions in lists stay
Seeds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """One run among many. label: its name in the log. name: that of the ablation's variant."""

    label: str
    recipe: Recipe
    dir: SharedRunDir
    name: str = ""

    @property
    def stages(self) -> list[str]:
        return [name for name in stages_of(self.recipe) if name not in ("export", "report")]  # which no table reads

    def summary(self, stage: str) -> dict:
        """What a finished stage says of itself."""
        return read_json(self.dir.stage(stage) / "summary.json")


def base_values(path: Path, overrides: Sequence[str]) -> dict:
    """The plain values of a recipe with the command line's settings, for `make_variant`. Raises InputError."""
    load_recipe(path)  # for the recipe's own mistakes, under its own name
    data = read_yaml(path, "a recipe")
    for override in overrides:
        change(data, *parse_override(override), f"{override} over {path}")
    return data


def make_variant(base: dict, changes: dict[str, Any], own: Path, shared: Path, *, origin: str, label: str) -> Variant:
    """The run of `base_values` with {section.key: value} changed; null leaves a key out. own: the run's folder. shared:
    the folder of all runs' stages. Raises InputError, which names the origin of the changes."""
    data = copy.deepcopy(base)
    for key, value in changes.items():
        change(data, key, copy.deepcopy(value), f"{origin}: {key}")
    recipe = parse_recipe(without_left_out(data), origin)
    try:
        check_all_losses(recipe)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    # cached: asked for thousands of times, and a recipe does not change
    return Variant(label, recipe, SharedRunDir(own, shared, cache(partial(settings_of, recipe))))


def change(data: dict, key: str, value: Any, origin: str) -> None:
    """Sets section.key of a recipe's plain values; null leaves it out. Raises InputError for a section that is not
    there, since a change to one that the recipe lacks is rarely meant."""
    keys = key.split(".")
    needed = keys if value is None else keys[:-1]
    try:
        value_at(data, needed)
    except (LookupError, TypeError, ValueError):
        fault = f"{origin}: the base recipe has no {'.'.join(needed)}"
        raise InputError(f"{fault}: correct the key, or add it there") from None
    override_value(data, keys, LEFT_OUT if value is None else value, origin)


def value_at(data: Any, keys: list[str]) -> Any:
    """data[a][b] of keys a.b, positions in lists as digits. Raises LookupError, TypeError or ValueError without one."""
    for key in keys:
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def without_left_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_left_out(item) for key, item in value.items() if item != LEFT_OUT}
    return [without_left_out(item) for item in value if item != LEFT_OUT] if isinstance(value, list) else value


def refuse_launcher() -> None:
    """Raises InputError under a launcher, whose processes would take different runs and wait for each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "start this command several times, each on its own GPU (CUDA_VISIBLE_DEVICES) or core"
        raise InputError(f"many runs want one process each: {remedy}, instead of by accelerate launch")


def advance(variant: Variant, *, wait: bool = False) -> bool:
    """Runs the stages that are not done; False where another process is at the next and this may not `wait`."""
    for name in variant.stages:
        if not variant.dir.is_done(name):
            with claimed(f"{variant.dir.stage(name)}.lock", wait=wait) as mine:
                if not mine:
                    return False
                say(f"{variant.label}: {name}")
                run_stage(Run(variant.recipe, variant.dir), name)  # unless another process has just done it
    return True


class Ablation(Section):
    """One table: a base recipe, what all variants change in it, and what each changes."""

    name: Name
    title: str
    base: str  # a recipe's path, relative to this file's folder
    seeds: Seeds = [1, 2, 3]
    vary: Literal["finetune", "run"] = "finetune"  # what a seed changes: fine-tuning alone, or the general stages too
    baseline: str | dict[str, str] | None = None  # the variant that all are compared with, or {variant: its own}
    common: dict[str, Any] = {}  # section.key -> value, of every variant
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]  # label -> {section.key: value}

    @model_validator(mode="after")
    def consistent(self):
        named = self.baseline if isinstance(self.baseline, dict) else {self.baseline: self.baseline}
        for label in {*named, *named.values()} - {*self.variants, None}:
            raise ValueError(f"baseline: there is no variant {label}: write one of {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is written twice: every seed is a run of its own")
        folders = [slug(label) for label in self.variants]
        if twice := next((f for f in folders if folders.count(f) > 1 or not f), None):
            raise ValueError(f"variants: two labels share the folder {twice!r}: make them differ in their letters")
        return self

    def baseline_of(self, label: str) -> str | None:
        return self.baseline.get(label) if isinstance(self.baseline, dict) else self.baseline


def slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("_")


def read_ablation(path: Path, overrides: Sequence[str] = ()) -> Ablation:
    """An ablation file, with `seeds=[...]` of the command line. Raises InputError for a bad file or value."""
    data = read_yaml(path, "an ablation", "base", "variants")
    return parse_recipe(data | dict(map(parse_override, overrides)), str(path), Ablation)


def runs_of(path: Path, overrides: Sequence[str], root: Path) -> tuple[Ablation, list[Variant]]:
    """An ablation and its runs: every variant under every seed, seeds outermost, so that a table fills evenly. The
    command line's settings apply over the base recipe and under what makes variants differ. Raises InputError that
    names the file and the variant."""
    ablation = read_ablation(path, [o for o in overrides if o.startswith("seeds=")])
    base = base_values(path.parent / ablation.base, [o for o in overrides if not o.startswith("seeds=")])
    runs = []
    for seed in ablation.seeds:
        for label, own in ablation.variants.items():
            origin, changes = f"{path}: variant {label}", ablation.common | own
            if not isinstance(changes.get("finetune", base.get("finetune")), dict):
                raise InputError(f"{origin}: it has no finetune section: variants are compared by their tasks")
            changes |= {"name": f"{ablation.name}-{slug(label)}", "finetune.seeds": [seed]}
            changes |= {"seed": seed} if ablation.vary == "run" else {}
            folder, title = Path(ablation.name, slug(label), f"seed-{seed}"), f"{ablation.name}: {label}, seed {seed}"
            run = make_variant(base, changes, root / folder, root / "stages", origin=origin, label=title)
            runs.append(replace(run, name=label))
    return ablation, runs


def run_ablations(files: list[Path], overrides: Sequence[str] = (), root: Path = Path("artifacts/ablations")) -> dict:
    """Runs every variant of the files under every seed and writes the tables after each; finished ones are skipped.
    Returns summary.json of `root`: {"rows": those of `rows_of`, "finished": {name: "5 of 6"}}. Raises InputError for a
    bad file or a variant over its budget, before anything runs; for what stopped one, once all others have run."""
    refuse_launcher()
    ablations = {}
    for found in (runs_of(Path(path), overrides, root) for path in files):
        if ablations.setdefault(name := found[0].name, found) is not found:
            raise InputError(f"two of the files are named {name}: give each a name of its own")
    waiting, failed = [(name, run) for name, (_, runs) in ablations.items() for run in runs], []
    for _, run in waiting:
        check_budget(run.recipe)
    RunDir(root).write_environment()
    while waiting:
        held = []  # by other processes
        for name, run in waiting:
            try:
                if advance(run):
                    write_tables([ablations[name]], root)
                else:
                    held.append((name, run))
            except InputError as error:
                failed.append(f"{run.label}: {error}")
                say(failed[-1])
        if held == waiting:
            time.sleep(2)
        waiting = held
    summary = write_tables(ablations.values(), root)
    if failed:
        raise InputError(failed[0] + (f" (and {len(failed) - 1} runs more)" if len(failed) > 1 else ""))
    return summary


def figures_of(run: Variant) -> dict:
    """What a finished run measured: {"variant", "seed", "measured": {(split, task, metric): value}, and COSTS}; the
    cost of general stages is None where the student went straight to its tasks."""
    summary = run.summary("finetune")
    general = [run.summary(name) for name in GENERAL if name in run.stages]
    steps, seconds, tokens = (sum(stage[key] for stage in general) for key in ("steps", "seconds", "tokens"))
    measured: dict[tuple[str, str, str], float] = {}
    for split, found in (("validation", summary), ("test", summary["test"]), ("rounded", summary["rounded"])):
        for task in run.recipe.tasks:
            measured |= {(split, task, metric): one["median"] for metric, one in found.get(task, {}).items()}
    measured |= {("general", name, "spearman"): value for name, value in rated_of(run).items()}
    measured |= {ROUNDED: summary["rounded"]["average"]} if summary["rounded"] else {}
    costs = summary["tokens"] + tokens, summary["seconds_per_step"], seconds / steps if steps else None
    (seed,) = run.recipe.finetune.seeds
    figures = {"variant": run.name, "seed": seed, "measured": measured | {AVERAGE: summary["average"]}}
    return figures | dict(zip(COSTS, costs, strict=True))


def rated_of(run: Variant) -> dict[str, float]:
    """{name of evaluation.stsb: Spearman} of the last general student, without fine-tuning, where it was evaluated."""
    trained = [name for name in run.stages if STAGES[name].student]
    found = run.summary(trained[-1]).get("evaluation", {}) if trained else {}
    return {name: found[name] for name in run.recipe.evaluation.stsb if name in found}


def rows_of(ablation: Ablation, runs: list[Variant]) -> list[dict]:
    """One row per variant, split ("general": before its tasks), task and metric, and one for the mean of the tasks'
    headlines: median, spread (largest less smallest), values and seeds in order, COSTS, average (the variant's on
    validation); against a baseline also difference (of medians) and clear (both have several seeds, and their ranges do
    not overlap). The teacher fine-tuned on the same rows, where a variant has one, comes first as TEACHER."""
    figures, rows = [figures_of(run) for run in runs if run.dir.is_done("finetune")], []
    taught = [run for run in runs if "task_teacher" in run.stages and run.dir.is_done("task_teacher")]
    for run in taught[:1]:  # one seed, validation alone, no cost
        summary = run.summary("task_teacher")
        measured = {("validation", t, m): value for t in run.recipe.tasks for m, value in summary.get(t, {}).items()}
        measured |= {AVERAGE: summary["average"]}
        figures.append({"variant": TEACHER, "seed": 0, "measured": measured} | dict.fromkeys(COSTS))
    for label in (TEACHER, *ablation.variants):
        mine = [found for found in figures if found["variant"] == label]
        about: dict[str, Any] = {"seeds": [found["seed"] for found in mine]}
        for name in COSTS:
            known = [found[name] for found in mine if found[name] is not None]
            about[name] = statistics.median(known) if known else None
        about["average"] = statistics.median(found["measured"][AVERAGE] for found in mine) if mine else None
        for place in mine[0]["measured"] if mine else ():
            values = [found["measured"][place] for found in mine if place in found["measured"]]
            row = {"ablation": ablation.name, "recipe": label, "median": statistics.median(values), "values": values}
            row |= dict(zip(("split", "task", "metric"), place, strict=True)) | {"spread": max(values) - min(values)}
            rows.append(row | about)
    others = {(row["recipe"], place_of(row)): row for row in rows}
    for row in rows:
        other = others.get((ablation.baseline_of(row["recipe"]), place_of(row)))
        if other and other is not row:
            ours, theirs = row["values"], other["values"]
            apart = min(ours) > max(theirs) or max(ours) < min(theirs)
            row |= {"baseline": other["recipe"], "difference": row["median"] - other["median"]}
            row |= {"clear": apart and min(len(ours), len(theirs)) > 1}  # one seed has no spread
    return rows


def write_tables(ablations: Iterable[tuple[Ablation, list[Variant]]], root: Path) -> dict:
    """Writes each ablation's summary.json, table.md and plot.svg into its folder, and those of all that have a summary
    there into `root`, so that files may be run one by one."""
    for ablation, runs in ablations:
        folder, rows = root / ablation.name, rows_of(ablation, runs)
        write_text(folder / "table.md", markdown(rows))
        write_text(folder / "plot.svg", plot(rows, ablation.name))
        finished = sum(run.dir.is_done("finetune") for run in runs)
        about = {"title": ablation.title, "rows": rows, "runs": len(runs), "finished": finished}
        write_json(folder / "summary.json", about)  # last: what has a summary is whole
    every = {path.parent.name: read_json(path) for path in sorted(root.glob("*/summary.json"))}
    summary = {"rows": [row for one in every.values() for row in one["rows"]]}
    summary["finished"] = {name: f"{one['finished']} of {one['runs']}" for name, one in every.items()}
    write_json(root / "summary.json", summary)
    write_text(root / "tables.md", "\n".join(f"## {one['title']}\n\n{markdown(one['rows'])}" for one in every.values()))
    return summary
