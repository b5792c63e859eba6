"""The tables and plots of ablations, and the offline page of searches (`tune`): views of their summary.json."""

import itertools
from functools import partial
from operator import itemgetter
from pathlib import Path

from matplotlib.axes import Axes

from tokenizer_build.files import read_json
from vocabshrink.pages.figure import GRID, SERIES, svg_of
from vocabshrink.pages.page import ENVIRONMENT, write_page

TEACHER = "(teacher)"  # its label among the variants
# A row's key -> head, scale and format of its column
COSTS = {"tokens": ("tokens", 1e-6, "{:.2f} M"), "seconds_per_step": ("s/step", 1, "{:.3f}")}
COSTS["general_seconds_per_step"] = ("general s/step", 1, "{:.3f}")
AVERAGE = ("validation", "average", "average")  # named like a task's figures: split, task, metric
ROUNDED = ("rounded", "average", "average")  # of the models with weights rounded as finetune.rounded says

place_of = itemgetter("split", "task", "metric")
UNITS = {"bytes": (1e-6, "MB"), "latency": (1, "ms, 32 pieces, one thread")}
QUALITY = "quality × 100"


def columns_of(rows: list[dict]) -> dict[str, dict[str, str]]:
    """{head: {variant: cell}} of a table: every metric, the average, the difference, tokens and cost."""
    columns: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["split"] == "validation" or place_of(row) == ROUNDED:
            head = " ".join(dict.fromkeys(part for part in place_of(row) if part != "validation"))
            spread = f" ({100 * row['spread']:.1f})" if len(row["values"]) > 1 else ""
            columns.setdefault(head, {})[row["recipe"]] = f"{100 * row['median']:.1f}{spread}"
    averages = {row["recipe"]: row for row in rows if place_of(row) == AVERAGE}
    for label, row in averages.items():
        if "difference" in row:
            columns.setdefault("against baseline", {})[label] = f"{100 * row['difference']:+.1f}{'*' * row['clear']}"
    for name, (head, scale, form) in COSTS.items():
        columns[head] = {label: form.format(scale * r[name]) for label, r in averages.items() if r[name] is not None}
    return columns


def compared_with(rows: list[dict]) -> str:
    """The baseline, or each variant with its own."""
    found = {row["recipe"]: row["baseline"] for row in rows if "baseline" in row}
    if len(set(found.values())) < 2:
        return next(iter(found.values()), "")
    return f"its own baseline ({'; '.join(f'{label}: {other}' for label, other in found.items())})"


def markdown(rows: list[dict]) -> str:
    """The table: 100 times the median, and in brackets the largest less the smallest seed."""
    labels, baseline = dict.fromkeys(row["recipe"] for row in rows), compared_with(rows)
    of_seeds = {row["recipe"]: row["seeds"] for row in rows if row["recipe"] != TEACHER and place_of(row) == AVERAGE}
    seeds = max(of_seeds.values(), key=len, default=[])
    facts = {"seeds": seeds, "fewer": [label for label, own in of_seeds.items() if len(own) < len(seeds)]}
    template = ENVIRONMENT.get_template("table.md.jinja")
    return template.render(facts, columns=columns_of(rows), labels=labels, baseline=baseline)


def plot(rows: list[dict], name: str) -> str:
    """An SVG: each variant's average, a dot per seed and a line at the median; a common baseline's range as a band."""
    baseline = compared_with(rows)
    rows = [row for row in rows if place_of(row) == AVERAGE][::-1]

    def draw(axes: Axes) -> None:
        for height, row in enumerate(rows):
            values = [100 * value for value in row["values"]]
            if row["recipe"] == baseline:
                axes.axvspan(min(values), max(values), color=GRID, alpha=0.5, linewidth=0)
            axes.plot(values, [height] * len(values), "o", color=SERIES[0], markersize=4, alpha=0.7, markeredgewidth=0)
            axes.plot([100 * row["median"]] * 2, [height - 0.32, height + 0.32], color=SERIES[0], linewidth=2)
        axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="mean of the tasks' headline metrics × 100")
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")

    return svg_of(name, draw, (7, 0.6 + 0.3 * len(rows)), alone=True)


def write_tune_page(rows: list[dict], summary: dict, root: Path) -> None:
    """rows: `tune.rows_of` all trials, of which those trained to their end are drawn. summary: the search's."""
    complete = [row for row in rows if row["state"] == "complete"]

    def history(axes: Axes) -> None:  # in the order of training, and the best so far
        found, places = [100 * row["quality"] for row in complete], range(1, len(complete) + 1)
        axes.plot(places, found, "o", color=SERIES[0], markersize=3.5, alpha=0.6, markeredgewidth=0)
        axes.step(places, list(itertools.accumulate(found, max)), where="post", color=SERIES[0], linewidth=1.6)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="candidates trained to their end", ylabel=QUALITY)

    def by(objective: str, axes: Axes) -> None:  # the front in colour
        scale, unit = UNITS[objective]
        for some, colour in ((complete, GRID), (summary["front"], SERIES[0])):
            x, y = [scale * row[objective] for row in some], [100 * row["quality"] for row in some]
            axes.plot(x, y, "o", color=colour, markersize=5)
        axes.set(xlabel=unit, ylabel=QUALITY)

    figures = {"history": svg_of("history", history, (7, 2.9))}
    for objective in summary["objectives"][1:] if "front" in summary else ():
        figures[f"front-{objective}"] = svg_of(f"front-{objective}", partial(by, objective))
    facts = {"rows": rows, "figures": figures, "summary": summary, "environment": read_json(root / "environment.json")}
    write_page(root / "tune.html", "tune.html", **facts)
