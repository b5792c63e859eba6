"""The tables and plots of ablations, views of the rows in their summary.json: Markdown, SVG and one offline page."""

from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from tokenizer_build.files import read_json
from vocabshrink.pages.drawing import GRID, SERIES, svg_of
from vocabshrink.pages.page import write_page

TEACHER = "(teacher)"  # its label among the variants
COSTS = ("seconds_per_step", "general_seconds_per_step")
AVERAGE = ("validation", "average", "average")  # named like a task's figures: split, task, metric
ROUNDED = ("rounded", "average", "average")  # of the models with weights rounded as finetune.rounded says


def place_of(row: dict) -> tuple[str, str, str]:
    return row["split"], row["task"], row["metric"]


def cells_of(rows: list[dict]) -> tuple[list[str], dict[str, list[str]]]:
    """Column heads, and each variant's cells: every metric, the average, the difference, tokens and cost."""
    rows = [row for row in rows if row["split"] == "validation" or place_of(row) == ROUNDED]
    measures = list(dict.fromkeys(place_of(row) for row in rows))
    compared = any("difference" in row for row in rows)
    heads = []
    for split, task, metric in measures:
        name = task if task == metric else f"{task} {metric}"
        heads.append(name if split == "validation" else f"{split} {name}")
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
    """The table: 100 times the median, and in brackets the largest less the smallest seed."""
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


def write_index(every: dict[str, dict], minutes: float, root: Path) -> None:
    """index.html of `root`: every table and plot, offline, in one file. every: {name: its summary.json}."""
    parts = []
    for name, one in every.items():
        heads, cells = cells_of(one["rows"])
        drawn = root / name / "plot.svg"
        picture = Markup(drawn.read_text(encoding="utf-8")) if cells and drawn.is_file() else ""
        about = {"name": name, "baseline": compared_with(one["rows"]), "heads": heads, "cells": cells, "plot": picture}
        parts.append(one | about)
    environment = read_json(root / "environment.json")
    write_page(root / "index.html", "ablations", ablations=parts, minutes=minutes, environment=environment)
