"""tune.html: how a search went and what it found, in one page that opens offline; a view of summary.json and trials.

It shows every trial's quality in the order of training with the best so far, the front of quality against bytes or
latency, the named maps and the longer runs.
"""

import itertools
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenizer_build.files import read_json
from vocabshrink.pages.drawing import GRID, SERIES, svg_of
from vocabshrink.pages.page import write_page

UNITS = {"bytes": (1e-6, "MB"), "latency": (1, "ms, 32 pieces, one thread")}


def write_tune_page(rows: list[dict], summary: dict, root: Path) -> None:
    """rows: `tune.rows_of` all trials. summary: the search's, with what was confirmed so far."""
    results = [summary["best"]] if "best" in summary else summary["front"]
    figures = {"history": svg_of("history", lambda figure: history(figure.subplots(), rows), (7, 2.9))}
    complete = [row for row in rows if row["state"] == "complete"]
    for objective in summary["objectives"][1:] if "front" in summary else ():
        scale, unit = UNITS[objective]
        points = [[(scale * row[objective], row["quality"]) for row in some] for some in (complete, summary["front"])]
        figures[f"front-{objective}"] = scatter(f"front-{objective}", points, unit)
    if "confirm" in summary:
        figures["confirm"] = Markup((root / "runs/confirm/plot.svg").read_text(encoding="utf-8"))
    facts = {"environment": read_json(root / "environment.json"), "figures": figures}
    write_page(root / "tune.html", "tune", summary=summary, results=results, rows=rows, **facts)


def scatter(name: str, points: list[list[tuple]], across: str) -> Markup:
    """An SVG of points (x, share): those of the first list pale, those of the second in colour."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for some, colour in zip(points, (GRID, SERIES[0]), strict=True):
            axes.plot([x for x, _ in some], [100 * y for _, y in some], "o", color=colour, markersize=5)
        axes.set(xlabel=across, ylabel="quality × 100")
        plain(axes)

    return svg_of(name, draw)


def plain(axes: Axes) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.tick_params(length=0)


def history(axes: Axes, rows: list[dict]) -> None:
    """Quality of complete trials in the order of training, and the best so far."""
    found = [100 * row["quality"] for row in rows if row["state"] == "complete"]
    places, best = range(1, len(found) + 1), list(itertools.accumulate(found, max))
    axes.plot(places, found, "o", color=SERIES[0], markersize=3.5, alpha=0.6, markeredgewidth=0)
    axes.step(places, best, where="post", color=SERIES[0], linewidth=1.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="candidates trained to their end", ylabel="quality × 100")
    plain(axes)
