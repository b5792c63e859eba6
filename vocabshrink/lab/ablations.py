"""Ablations: variants of one recipe, each run under several seeds, and the table that compares them.

An ablation file names a base recipe and, for every variant, the settings that differ. Every (variant, seed) is a run
that shares its stages with the others (variants.py): the vocabulary, the teacher's head or a general student that
variants have in common is made once, and so is a variant that stands in two files. What costs: every seed has its own
fine-tuning, and with `vary: run` its own student too.

Started several times at once, each command takes what no other is at, so that n commands keep n cores busy. Tables are
views of finished stages, written anew after each; a killed command loses no more than an unfinished stage's steps since
its last checkpoint.
"""

import re
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from pydantic import Field, ValidationError, model_validator

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json, write_text
from vocabshrink.lab.variants import Variant, advance, base_values, make_variant, read_yaml, refuse_launcher
from vocabshrink.pages.drawing import GRID, SERIES, svg_of
from vocabshrink.run.engine import say
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import Section, explain
from vocabshrink.run.recipe_yaml import parse_yaml
from vocabshrink.stages.plan import check_budget

GENERAL = ("dual", "distill")  # the stages that train a student before it sees a task
TEACHER = "(teacher)"  # its label among the variants
COSTS = ("seconds_per_step", "general_seconds_per_step")
Seeds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


class Ablation(Section):
    """One table: a base recipe, what all variants change in it, and what each changes."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    title: str
    base: str  # a recipe's path, from this file's folder
    seeds: Seeds = [1, 2, 3]
    vary: Literal["finetune", "run"] = "finetune"  # what a seed changes: fine-tuning, or the general stages too
    baseline: str | dict[str, str] | None = None  # the variant that all are compared with, or {variant: its own}
    common: dict[str, Any] = {}  # section.key -> value, of every variant
    variants: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]  # label -> {section.key: value}

    @model_validator(mode="after")
    def consistent(self):
        named = self.baseline if isinstance(self.baseline, dict) else {self.baseline: self.baseline}
        for label in (label for pair in named.items() for label in pair):
            if label is not None and label not in self.variants:
                raise ValueError(f"baseline: there is no variant {label}: write one of {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is written twice: every seed is a run of its own")
        folders = [slug(label) for label in self.variants]
        if twice := next((f for f in folders if folders.count(f) > 1 or not f), None):
            raise ValueError(f"variants: two labels share the folder {twice!r}: make them differ in their letters")
        return self

    def baseline_of(self, label: str) -> str | None:
        return self.baseline.get(label) if isinstance(self.baseline, dict) else self.baseline


@dataclass(frozen=True)
class Unit:
    """One variant under one seed."""

    ablation: Ablation
    variant: str
    seed: int
    run: Variant


def slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("_")


def read_ablation(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Ablation:
    """An ablation file, with `seeds=[...]` of the command line.

    Raises:
        InputError: a missing or malformed file, an unknown key, a wrong value.
    """
    data = read_yaml(path, "an ablation")
    if not isinstance(data, dict) or "variants" not in data:
        raise InputError(f"{path}: an ablation is a mapping with name, title, base and variants; a recipe goes to run")
    for override in overrides:
        data["seeds"] = parse_yaml(override.partition("=")[2], override)
    try:
        return Ablation.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error.errors()[0], Ablation)}") from None


def units_of(path: Path, overrides: list[str] | tuple[str, ...], root: Path) -> list[Unit]:
    """Every variant under every seed, seeds outermost, so that a table fills evenly.

    A setting is the base recipe's, then the command line's, then that of `common`, then the variant's: the command line
    scales all variants and cannot undo what makes them differ. null leaves a key out.

    Raises:
        InputError: naming the file and the variant, before anything is trained.
    """
    ablation = read_ablation(path, [o for o in overrides if o.startswith("seeds=")])
    base = base_values(path.parent / ablation.base, [o for o in overrides if not o.startswith("seeds=")])
    units = []
    for seed in ablation.seeds:
        for label, own in ablation.variants.items():
            origin, changes = f"{path}: variant {label}", ablation.common | own
            if not isinstance(changes.get("finetune", base.get("finetune")), dict):
                raise InputError(f"{origin}: it has no finetune section: variants are compared by their tasks")
            changes |= {"name": f"{ablation.name}-{slug(label)}", "finetune.seeds": [seed]}
            changes |= {"seed": seed} if ablation.vary == "run" else {}
            folder = root / ablation.name / slug(label) / f"seed-{seed}"
            title = f"{ablation.name}: {label}, seed {seed}"
            run = make_variant(base, changes, folder, root / "stages", origin=origin, label=title)
            units.append(Unit(ablation, label, seed, run))
    return units


def run_ablations(
    files: list[Path], overrides: list[str] | tuple[str, ...] = (), root: Path = Path("artifacts/ablations")
) -> dict:
    """Runs every variant of the files under every seed and writes the tables after each; finished ones are skipped.

    Returns: summary.json of `root`: {"rows": one per variant, task and metric (`rows_of`), "minutes": of all stages}.
    Raises InputError: a bad file before anything runs; else, after all that can run did, what stopped the others.
    """
    refuse_launcher()
    ablations = [units_of(Path(path), overrides, root) for path in files]
    names = [units[0].ablation.name for units in ablations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two of the files are named {twice}: give each ablation a name of its own")
    for unit in (unit for units in ablations for unit in units):
        try:
            check_budget(unit.run.recipe)
        except InputError as error:
            raise InputError(f"{unit.run.label}: {error}") from None
    RunDir(root).write_environment()
    waiting, failed = deque(unit for units in ablations for unit in units), {}
    held = 0  # units found to be another process' work since this one last did some
    while waiting:
        unit = waiting.popleft()
        try:
            finished = advance(unit.run)
        except InputError as error:
            failed[unit.run.label] = error
            say(f"{unit.run.label}: {error}")
            continue
        if finished:
            held = 0
            write_tables([units for units in ablations if units[0].ablation.name == unit.ablation.name], root)
            continue
        waiting.append(unit)
        held += 1
        if held >= len(waiting):
            time.sleep(2)
            held = 0
    summary = write_tables(ablations, root)
    if failed:
        label, error = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InputError(f"{label}{others}: {error}")
    return summary


# ------------------------------------------------------------------------------------------------ tables


AVERAGE = ("validation", "average", "average")  # as a task's figures are named: split, task, metric
ROUNDED = ("rounded", "average", "average")  # of the models whose weights are rounded as finetune.rounded says


def figures_of(unit: Unit) -> dict:
    """What a finished unit measured: {"measured": {(split, task, metric): value}, "tokens", and COSTS}; the cost of the
    general stages is None where the student went straight to its tasks."""
    summary = read_json(unit.run.dir.stage("finetune") / "summary.json")
    general = [read_json(unit.run.dir.stage(name) / "summary.json") for name in GENERAL if name in unit.run.stages]
    steps = sum(stage["steps"] for stage in general)
    measured = {
        (split, task, metric): value["median"]
        for split, found in (("validation", summary), ("test", summary["test"]), ("rounded", summary["rounded"]))
        for task in unit.run.recipe.tasks
        for metric, value in found.get(task, {}).items()
    }
    if summary["rounded"]:
        measured[ROUNDED] = summary["rounded"]["average"]
    return {
        "measured": measured | {AVERAGE: summary["average"]},
        "tokens": summary["tokens"] + sum(stage["tokens"] for stage in general),
        "seconds_per_step": summary["seconds_per_step"],
        "general_seconds_per_step": sum(stage["seconds"] for stage in general) / steps if steps else None,
    }


def rows_of(units: list[Unit]) -> list[dict]:
    """One row per variant, split, task and metric, and one (task "average") for the mean of the tasks' headlines.

    Each: ablation, recipe (the variant), split, task, metric, median, spread (largest less smallest), values and seeds
    (in order), tokens (of the student's own training, general and on tasks), seconds_per_step (of fine-tuning),
    general_seconds_per_step, average (the variant's median on validation); where it has a baseline also its name,
    difference (of medians) and clear (whether no seed of the one reaches into the other's range, where both have
    several). Variants without a finished seed have no row; the teacher fine-tuned on the same rows, where a variant has
    one, comes first as TEACHER.
    """
    ablation = units[0].ablation
    rows = teacher_rows(units)
    for label in ablation.variants:
        done = [unit for unit in units if unit.variant == label and unit.run.done]
        figures = [figures_of(unit) for unit in done]
        about = {"seeds": [unit.seed for unit in done]} | {
            name: median_of([f[name] for f in figures]) for name in ("tokens", *COSTS)
        }
        for place in figures[0]["measured"] if figures else ():
            rows.append(row_of(ablation, label, place, [f["measured"] for f in figures]) | about)
    known = {(row["recipe"], place_of(row)): row for row in rows}
    for row in rows:
        other = known.get((ablation.baseline_of(row["recipe"]), place_of(row)))
        if other and other is not row:
            row["baseline"] = other["recipe"]
            row["difference"] = row["median"] - other["median"]
            ours, theirs = row["values"], other["values"]
            apart = min(ours) > max(theirs) or max(ours) < min(theirs)
            row["clear"] = apart and min(len(ours), len(theirs)) > 1  # one seed has no spread
    return rows


def row_of(ablation: Ablation, label: str, place: tuple[str, str, str], measured: list[dict]) -> dict:
    split, task, metric = place
    values = [of_seed[place] for of_seed in measured]
    return {
        "ablation": ablation.name,
        "recipe": label,
        "split": split,
        "task": task,
        "metric": metric,
        "median": statistics.median(values),
        "spread": max(values) - min(values),
        "values": values,
        "average": statistics.median(of_seed[AVERAGE] for of_seed in measured),
    }


def place_of(row: dict) -> tuple[str, str, str]:
    return row["split"], row["task"], row["metric"]


def teacher_rows(units: list[Unit]) -> list[dict]:
    """As `rows_of`, of the fine-tuned teacher: one seed, validation alone, and no cost."""
    unit = next((u for u in units if "task_teacher" in u.run.stages and u.run.dir.is_done("task_teacher")), None)
    if unit is None:
        return []
    summary = read_json(unit.run.dir.stage("task_teacher") / "summary.json")
    measured = {("validation", t, m): v for t in unit.run.recipe.tasks for m, v in summary.get(t, {}).items()}
    measured[AVERAGE] = summary["average"]
    about = {"seeds": [0], "tokens": None} | dict.fromkeys(COSTS)
    return [row_of(unit.ablation, TEACHER, place, [measured]) | about for place in measured]


def median_of(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def write_tables(ablations: list[list[Unit]], root: Path) -> dict:
    """Writes each ablation's summary.json, table.md and plot.svg into its folder, and those of all into `root`.

    `root` gathers every ablation that has a summary there, so that files may be run one by one.
    """
    for units in ablations:
        ablation, folder = units[0].ablation, root / units[0].ablation.name
        rows = rows_of(units)
        stages = {unit.run.dir.stage(name) for unit in units for name in unit.run.stages if unit.run.dir.is_done(name)}
        minutes = {stage.name: read_json(stage / "summary.json").get("minutes", 0) for stage in sorted(stages)}
        write_text(folder / "table.md", markdown(rows))
        write_text(folder / "plot.svg", plot(rows, ablation.name))
        write_json(  # last: what has a summary is whole
            folder / "summary.json",
            {"title": ablation.title, "rows": rows, "minutes": minutes}
            | {"finished": sum(unit.run.done for unit in units), "runs": len(units)},
        )
    every = {path.parent.name: read_json(path) for path in sorted(root.glob("*/summary.json"))}
    shared = {stage: minutes for one in every.values() for stage, minutes in one["minutes"].items()}
    summary = {
        "rows": [row for one in every.values() for row in one["rows"]],
        "minutes": round(sum(shared.values()), 1),  # a stage that several ablations share counts once
        "finished": {name: f"{one['finished']} of {one['runs']}" for name, one in every.items()},
    }
    write_json(root / "summary.json", summary)
    tables = {name: (root / name / "table.md").read_text(encoding="utf-8") for name in every}
    parts = [f"## {one['title']}\n\n{tables[name]}" for name, one in every.items()]
    write_text(root / "tables.md", "\n".join(parts))
    write_page(every, summary, root)
    return summary


def cells_of(rows: list[dict]) -> tuple[list[str], dict[str, list[str]]]:
    """Column heads, and for each variant its cells: every metric, the average, the difference, tokens and cost."""
    rows = [row for row in rows if row["split"] == "validation" or place_of(row) == ROUNDED]
    measures = list(dict.fromkeys(place_of(row) for row in rows))
    compared = any("difference" in row for row in rows)
    heads = [heading(*measure) for measure in measures]
    heads += (["against baseline"] if compared else []) + ["tokens", "s/step", "general s/step"]
    cells: dict[str, list[str]] = {}
    for label in dict.fromkeys(row["recipe"] for row in rows):
        mine = {place_of(row): row for row in rows if row["recipe"] == label}
        average = mine[AVERAGE]
        cells[label] = [figure(mine.get(measure)) for measure in measures]
        if compared:
            mark = "*" if average.get("clear") else ""
            cells[label].append(f"{100 * average['difference']:+.1f}{mark}" if "difference" in average else "")
        cells[label].append("" if average["tokens"] is None else f"{average['tokens'] / 1e6:.2f} M")
        cells[label] += ["" if average[cost] is None else f"{average[cost]:.3f}" for cost in COSTS]
    return heads, cells


def heading(split: str, task: str, metric: str) -> str:
    name = task if task == metric else f"{task} {metric}"
    return name if split == "validation" else f"{split} {name}"


def figure(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['median']:.1f}" + (f" ({100 * row['spread']:.1f})" if len(row["values"]) > 1 else "")


def compared_with(rows: list[dict]) -> str:
    """The baseline, or each variant with its own."""
    found = {row["recipe"]: row["baseline"] for row in rows if "baseline" in row}
    if len(set(found.values())) < 2:
        return next(iter(found.values()), "")
    return f"its own baseline ({'; '.join(f'{label}: {other}' for label, other in found.items())})"


def markdown(rows: list[dict]) -> str:
    """The table for people: 100 times the median, and in brackets the largest less the smallest seed."""
    if not rows:
        return "No run has finished yet.\n"
    heads, cells = cells_of(rows)
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    lines += [f"| {label.replace('|', '/')} | " + " | ".join(row) + " |" for label, row in cells.items()]
    baseline = compared_with(rows)
    rows = [row for row in rows if row["recipe"] != TEACHER and place_of(row) == AVERAGE]
    seeds = max((row["seeds"] for row in rows), key=len, default=[])
    note = f"100 × median (largest − smallest) of seeds {', '.join(map(str, seeds))}"
    fewer = [row["recipe"] for row in rows if len(row["seeds"]) < len(seeds)]
    note += f"; fewer so far: {', '.join(fewer)}" if fewer else ""
    note += f"; against {baseline}, * where no seed of the one is in the other's range" if baseline else ""
    return "\n".join(lines) + f"\n\n{note}.\n"


def plot(rows: list[dict], name: str) -> str:
    """An SVG: each variant's average, a dot per seed and a line at the median; a common baseline's range as a band."""
    baseline = compared_with(rows)
    rows = [row for row in rows if place_of(row) == AVERAGE][::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for height, row in enumerate(rows):
            values = [100 * value for value in row["values"]]
            if row["recipe"] == baseline:
                axes.axvspan(min(values), max(values), color=GRID, alpha=0.5, linewidth=0)
            axes.plot(values, [height] * len(values), "o", color=SERIES[0], markersize=4, alpha=0.7, markeredgewidth=0)
            axes.plot([100 * row["median"]] * 2, [height - 0.32, height + 0.32], color=SERIES[0], linewidth=2)
        axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("mean of the tasks' headline metrics × 100")

    return svg_of(name, draw, (7, 0.6 + 0.3 * len(rows)), alone=True)


def write_page(every: dict[str, dict], summary: dict, root: Path) -> None:
    """index.html of `root`: every table and plot, offline, in one file."""
    parts = []
    for name, one in every.items():
        heads, cells = cells_of(one["rows"]) if one["rows"] else ([], {})
        drawn = root / name / "plot.svg"
        picture = Markup(drawn.read_text(encoding="utf-8")) if one["rows"] and drawn.is_file() else ""
        about = {"name": name, "baseline": compared_with(one["rows"])}
        parts.append(one | about | {"heads": heads, "cells": cells, "plot": picture})
    loader = jinja2.FileSystemLoader(Path(__file__).parents[1] / "pages/templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("ablations.html.jinja")
    environment = read_json(root / "environment.json")
    write_text(root / "index.html", page.render(ablations=parts, summary=summary, environment=environment))
