"""tune.html: how a search went and what it found, in one page that opens offline; a view of summary.json and trials."""

from functools import partial
from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes

from tokenizer_build.files import read_json
from vocabshrink.pages.drawing import GRID, SERIES, svg_of
from vocabshrink.pages.page import write_page

KINDS = {"genetic": "genetic search", "random": "random search"}
UNITS = {"bytes": (1e-6, "MB"), "latency": (1, "ms, 32 pieces, one thread")}
QUALITY = "quality × 100"


def write_tune_page(rows: list[dict], summary: dict, root: Path) -> None:
    """rows: `tune.row_of` of all trials. summary: the search's, with what was confirmed and checked so far."""
    figures = {"history": svg_of("history", partial(draw_history, rows), (7, 2.9))}
    for objective in summary["objectives"][1:] if "front" in summary else ():
        scale, unit = UNITS[objective]
        complete = [row for row in rows if row["state"] == "complete"]
        points = [[(scale * row[objective], row["quality"]) for row in some] for some in (complete, summary["front"])]
        figures[f"front-{objective}"] = svg_of(f"front-{objective}", partial(draw_points, points, unit, QUALITY))
    if "proxy_check" in summary:
        points = [[], [(100 * row["quality"], row["longer"]) for row in summary["proxy_check"]["maps"]]]
        heads = f"{QUALITY} under the proxy", "after the longer run"
        figures["check"] = svg_of("check", partial(draw_points, points, *heads))
    if "confirm" in summary:
        figures["confirm"] = Markup((root / "runs/confirm/plot.svg").read_text(encoding="utf-8"))
    results = [summary["best"]] if "best" in summary else summary["front"]
    environment = read_json(root / "environment.json")
    facts = {"summary": summary, "results": results, "rows": rows, "figures": figures, "environment": environment}
    write_page(root / "tune.html", "tune", **facts)


def draw_points(points: list[list[tuple]], across: str, up: str, axes: Axes) -> None:
    """Points (x, share): those of the first list pale, those of the second in colour."""
    for some, colour in zip(points, (GRID, SERIES[0]), strict=True):
        axes.plot([x for x, _ in some], [100 * y for _, y in some], "o", color=colour, markersize=5)
    axes.set(xlabel=across, ylabel=up)


def draw_history(rows: list[dict], axes: Axes) -> None:
    """Quality of complete trials in the order of training, and the best so far of each kind of search."""
    for colour, (kind, label) in zip(SERIES, KINDS.items(), strict=False):
        found = [100 * row["quality"] for row in rows if row["kind"] == kind and row["state"] == "complete"]
        if found:
            places, best = range(1, len(found) + 1), [max(found[: n + 1]) for n in range(len(found))]
            axes.plot(places, found, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
            axes.step(places, best, where="post", color=colour, linewidth=1.6, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="candidates trained to their end", ylabel=QUALITY)
    axes.legend(loc="lower right", fontsize=8)
