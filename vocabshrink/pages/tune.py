"""search.html: how a search went and what it found, in one page that opens offline.

A view of summary.json and of the trials: the map (student layers against teacher layers), every trial's quality in the
order of training with the best so far, the front of quality against bytes or latency, the named maps, the longer runs
and the check of the proxy.
"""

from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from tokenizer_build.files import read_json, write_text
from vocabshrink.pages.drawing import GRID, INK, SERIES, svg_of

KINDS = {"genetic": "genetic search", "random": "random search"}


def write_page(rows: list[dict], summary: dict, root: Path) -> None:
    """rows: of all trials, `search.row_of`. summary: `search.summarise` and what was confirmed and checked since."""
    results = [summary["best"]] if "best" in summary else summary["front"]
    figures = {"history": history(rows)}
    if "best" in summary and summary["map_settings"]:
        best = summary["best"]
        pairs = best["changes"][summary["map_settings"][0]]
        figures["map"] = picture(pairs, best["layers"], summary["teacher_layers"])
    for objective in summary["objectives"]:
        if objective != "quality":
            figures[f"front-{objective}"] = front_picture(rows, summary["front"], objective)
    if "proxy_check" in summary:
        figures["check"] = check_picture(summary["proxy_check"]["maps"])
    if "confirm" in summary:
        figures["confirm"] = confirm_picture(summary["confirm"])
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("tune.html.jinja").render(
        summary=summary,
        results=results,
        rows=rows,
        figures=figures,
        kinds=KINDS,
        environment=read_json(root / "environment.json"),
    )
    write_text(root / "search.html", page)


def plain(axes, *, grid: str = "y") -> None:
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    axes.tick_params(length=0)


def history(rows: list[dict]) -> str:
    """Quality of complete trials in the order of training; a line at the best so far of each kind of search."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, kind in enumerate(KINDS):
            found = [
                row["quality"]
                for row in rows
                if row["kind"] == kind and row["state"] == "complete" and not row["again"]
            ]
            if not found:
                continue
            best = [max(found[: n + 1]) for n in range(len(found))]
            places = range(1, len(found) + 1)
            axes.plot(
                places, [100 * q for q in found], "o", color=SERIES[index], markersize=3.5, alpha=0.6, markeredgewidth=0
            )
            axes.step(
                places, [100 * q for q in best], where="post", color=SERIES[index], linewidth=1.6, label=KINDS[kind]
            )
        axes.set_xlabel("candidates trained to their end")
        axes.set_ylabel("quality × 100")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        plain(axes)

    return svg_of("history", draw, (7, 2.9))


def picture(pairs: list, depth: int, teacher: int) -> str:
    """Student layers below, teacher layers above, a line for each pair."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        where = [1 + (m - 1) * (teacher - 1) / max(depth - 1, 1) for m in range(1, depth + 1)]
        learning = dict(pairs)
        for m, n in learning.items():
            axes.plot([where[m - 1], n], [0, 1], color=SERIES[0], linewidth=1.8)
        taught = set(learning.values())
        for n in range(1, teacher + 1):
            axes.plot(n, 1, "o", color=SERIES[0] if n in taught else GRID, markersize=9)
            axes.text(n, 1.14, str(n), ha="center", va="bottom", fontsize=8)
        for m in range(1, depth + 1):
            axes.plot(where[m - 1], 0, "o", color=SERIES[0] if m in learning else GRID, markersize=9)
            axes.text(where[m - 1], -0.14, str(m), ha="center", va="top", fontsize=8)
        axes.text(0.3, 1, "teacher", ha="right", va="center", fontsize=8.5)
        axes.text(0.3, 0, "student", ha="right", va="center", fontsize=8.5)
        axes.set_xlim(-1.2, teacher + 0.5)
        axes.set_ylim(-0.5, 1.5)
        axes.axis("off")

    return svg_of("map", draw, (5.6, 1.8))


def front_picture(rows: list[dict], front: list[dict], objective: str) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        scale = 1e-6 if objective == "bytes" else 1
        done = [row for row in rows if row["state"] == "complete"]
        axes.plot(
            [scale * r[objective] for r in done], [100 * r["quality"] for r in done], "o", color=GRID, markersize=4
        )
        best = sorted(front, key=lambda row: row[objective])
        axes.plot(
            [scale * r[objective] for r in best], [100 * r["quality"] for r in best], "o", color=SERIES[0], markersize=5
        )
        axes.set_xlabel("MB" if objective == "bytes" else "ms, 32 pieces, one thread")
        axes.set_ylabel("quality × 100")
        plain(axes)

    return svg_of(f"front-{objective}", draw)


def check_picture(maps: list[dict]) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(
            [100 * m["proxy"] for m in maps], [100 * m["longer"] for m in maps], "o", color=SERIES[0], markersize=5
        )
        axes.set_xlabel("quality × 100 under the proxy")
        axes.set_ylabel("after the longer run")
        plain(axes)

    return svg_of("check", draw)


def confirm_picture(confirmed: dict) -> str:
    """On unseen tasks, a dot per seed and a line at the median."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        labels = list(confirmed["unseen"])[::-1]
        for height, label in enumerate(labels):
            found = confirmed["unseen"][label]
            colour = SERIES[0] if label == "found" else INK
            values = [100 * value for value in found["values"]]
            axes.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0)
            axes.plot([100 * found["median"]] * 2, [height - 0.3, height + 0.3], color=colour, linewidth=2)
        axes.set_yticks(range(len(labels)), labels)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("mean over unseen tasks × 100")
        plain(axes, grid="x")

    return svg_of("confirm", draw, (7, 0.7 + 0.3 * len(confirmed["unseen"])))
