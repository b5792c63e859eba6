"""One HTML file that shows what a run did, built from whatever files the run folder holds.

The page opens offline and from a mail attachment: curves are inlined as SVG, styles are in the page, nothing
is fetched and no script runs. A piece that is missing is left out, so the same function serves a run that has
just counted words and one that was delivered. Curves take their colours from the page's CSS, bars are plain
HTML: both follow the reader's light or dark setting. The page is a view: every figure in it is in a JSON file
beside it. Long curves are averaged to a few hundred points, which keeps the page small and readable.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizer_build.files import read_json, write_text
from vocabshrink.run.folder import RunDir, task_rows
from vocabshrink.run.stage import STAGES as ALL_STAGES

try:
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from vocabshrink.pages.drawing import GRID, SERIES, svg_of
except ImportError as error:
    raise ImportError("the report needs matplotlib and jinja2: pip install 'vocabshrink[report]'") from error

STAGES = [name for name in ALL_STAGES if name != "report"]  # a page does not list its own making
SYSTEMS = ("teacher", "untrained", "trained", "delivered")
POINTS = 300  # per curve; more is not seen at the width of a page


@dataclass
class Curve:
    """Values against tokens (or steps) in training order."""

    name: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


def write_report(run: RunDir) -> Path:
    """Write report.html into the run folder and return its path.

    Reads recipe.yaml, environment.json, summary.json, metrics.jsonl, vocab/comparison.json and each stage's
    summary.json, as far as they exist. Raises InputError for a file that is not what its name says.
    """
    summary = _optional_json(run.path / "summary.json")
    rows = run.metrics()
    panels = [training_panel(stage, rows) for stage in _in_order({row.get("stage", "") for row in rows})]
    stages = stage_summaries(run)
    comparison = _optional_json(run.stage("vocab") / "comparison.json")
    recipe = run.path / "recipe.yaml"
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("report.html.jinja").render(
        name=run.path.resolve().name,
        tiles=headline_tiles(summary),
        headline=headline_table(summary),
        tasks=task_rows(summary["tasks"]) if "tasks" in summary else [],
        blocks=size_bars({"run": summary, **stages}),
        training=[panel for panel in panels if panel["plots"]],
        vocabulary=vocabulary_table(comparison),
        examples=segmentation_examples(comparison),
        timings=stage_timings(run, rows, stages),
        details={name: list(_flat(value)) for name, value in stages.items()},
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        environment=list(_flat(_optional_json(run.path / "environment.json"))),
        read=_read,
    )
    write_text(run.path / "report.html", page)
    return run.path / "report.html"


def stage_summaries(run: RunDir) -> dict[str, dict]:
    """summary.json of every stage that has one, in the order in which stages run, but the report's own."""
    found = {path.parent.name: _optional_json(path) for path in run.path.glob("*/summary.json")}
    found.pop("report", None)
    return {name: found[name] for name in _in_order(found)}


def headline_table(summary: dict) -> dict | None:
    """The summary's entries with a figure per system: {"columns": [...], "rows": [(name, [text])]}."""
    entries = {key: value for key, value in summary.items() if _is_per_system(value)}
    if not entries:
        return None
    names = list(dict.fromkeys(name for value in entries.values() for name in value))
    columns = [name for name in SYSTEMS if name in names] + [name for name in names if name not in SYSTEMS]
    rows = [(_read(key), [_figure(key, value.get(n)) for n in columns]) for key, value in entries.items()]
    return {"columns": columns, "rows": rows}


def headline_tiles(summary: dict) -> list[tuple[str, str, str]]:
    """(figure, what it is, compared with what) of the few figures that matter most."""
    tiles = []
    for key, value in summary.items():
        if not _is_per_system(value) or not _is_number(value.get("delivered")):
            continue
        delivered, teacher, untrained = (value.get(name) for name in ("delivered", "teacher", "untrained"))
        note = ""
        if key == "bytes" and _is_number(teacher) and delivered > 0:
            note = f"{teacher / delivered:.1f} times smaller than the teacher's {_figure(key, teacher)}"
        elif _is_number(untrained):
            note = f"{_figure(key, untrained)} before training"
        elif _is_number(teacher):
            note = f"teacher {_figure(key, teacher)}"
        tiles.append((_figure(key, delivered), _read(key), note))
    tiles = tiles[:5]
    if _is_number(summary.get("minutes")):
        tiles.append((f"{summary['minutes']:.1f} min", "whole run", ""))
    return tiles


def size_bars(summaries: dict[str, dict]) -> list[dict]:
    """Bars for every `*_by_block` entry: {"encoder": n, ...}, or that per system, {"teacher": {...}, ...}."""
    charts, seen = [], []
    for owner, summary in summaries.items():
        for key, value in summary.items():
            if not key.endswith("_by_block") or not isinstance(value, dict) or not value or value in seen:
                continue  # the run's summary repeats a stage's figures
            seen.append(value)
            systems = value if all(isinstance(item, dict) for item in value.values()) else {"": value}
            systems = {
                name: {block: n for block, n in parts.items() if _is_number(n) and n >= 0}
                for name, parts in systems.items()
                if isinstance(parts, dict)
            }
            longest = max((sum(parts.values()) for parts in systems.values()), default=0)
            if not longest:
                continue
            unit = key.removesuffix("_by_block")
            blocks = list(dict.fromkeys(block for parts in systems.values() for block in parts))
            charts.append(
                {
                    "title": f"{_read(unit)} by block",
                    "owner": owner,
                    "blocks": blocks,
                    "bars": [
                        {
                            "name": name,
                            "total": _figure(unit, sum(parts.values())),
                            "parts": [
                                (block, blocks.index(block) % len(SERIES), 100 * n / longest, _figure(unit, n))
                                for block, n in parts.items()
                            ],
                        }
                        for name, parts in systems.items()
                    ],
                }
            )
    return charts


def training_panel(stage: str, rows: list[dict]) -> dict:
    """The plots of one training stage: loss parts, evaluation, learning rate, speed; each where logged."""
    rows = [row for row in rows if row.get("stage") == stage]
    axis = "tokens" if all(_is_number(row.get("tokens")) for row in rows) else "step"
    train = [row for row in rows if row.get("kind", "train") == "train"]
    evaluation = [row for row in rows if row.get("kind") == "evaluation"]
    losses = [_curve("total", axis, train, ["loss"])]
    losses += [_curve(name, axis, train, ["losses", name]) for name in _keys(train, "losses")]
    metrics = [_curve(name, axis, evaluation, ["metrics", name]) for name in _keys(evaluation, "metrics")]
    rate = [_curve("learning rate", axis, train, ["lr"])]
    speed = [_curve("tokens per second", axis, train, ["tokens_per_second"])]
    plots = []
    for title, curves, log, marks in [
        ("Losses, each part unweighted", losses, True, False),
        ("Evaluation", metrics, False, True),
        ("Learning rate", rate, False, False),
        ("Tokens per second", speed, False, False),
    ]:
        curves = [curve for curve in curves if curve.x]
        if curves:
            svg = _svg(f"{stage}-{len(plots)}", curves, axis, log=log, marks=marks)
            legend = [(c.name, i % len(SERIES), _figure("", c.y[-1])) for i, c in enumerate(curves)]
            plots.append({"title": title, "svg": svg, "legend": legend})
    return {"stage": stage, "plots": plots}


def vocabulary_table(comparison: dict) -> dict | None:
    """The tokenizers that vocab/comparison.json compares: {"columns": [...], "rows": [(name, [text])]}."""
    entries = {name: value for name, value in comparison.items() if isinstance(value, dict)}
    columns = list(dict.fromkeys(k for value in entries.values() for k, n in value.items() if _is_number(n)))
    if not columns:
        return None
    rows = [(name, [_figure(key, value.get(key)) for key in columns]) for name, value in entries.items()]
    return {"columns": [_read(column) for column in columns], "rows": rows}


def segmentation_examples(comparison: dict) -> dict | None:
    """`examples` of vocab/comparison.json, [{"word": w, "teacher": [pieces], "student": [pieces]}, ...]."""
    examples = comparison.get("examples")
    examples = [row for row in examples if isinstance(row, dict)] if isinstance(examples, list) else []
    columns = list(dict.fromkeys(key for row in examples for key in row if key != "word"))
    if not columns:
        return None
    rows = []
    for row in examples:
        pieces = [row.get(column) or [] for column in columns]
        rows.append((row.get("word", ""), [p.split() if isinstance(p, str) else p for p in pieces]))
    return {"columns": columns, "rows": rows}


def stage_timings(run: RunDir, rows: list[dict], stages: dict[str, dict]) -> list[dict]:
    """How long each stage took and whether it is done.

    The time is what its summary says under `minutes` (all of it) or `seconds` (training alone), else its last
    metrics row's.
    """
    seconds = {}
    for row in rows:
        if _is_number(row.get("seconds")) and isinstance(row.get("stage"), str):
            seconds[row["stage"]] = row["seconds"]
    for name, summary in stages.items():
        for key, factor in (("seconds", 1), ("minutes", 60)):
            if _is_number(summary.get(key)):
                seconds[name] = summary[key] * factor
    names = _in_order({*stages, *seconds, *(n for n in STAGES if run.stage(n).is_dir())})
    longest = max(seconds.values(), default=0) or 1
    return [
        {
            "name": name,
            "done": run.is_done(name),
            "text": _duration(seconds.get(name)),
            "percent": 100 * seconds.get(name, 0) / longest,
        }
        for name in names
    ]


def _curve(name: str, axis: str, rows: list[dict], keys: list[str]) -> Curve:
    """The rows that have a finite value under the nested `keys`, averaged to at most POINTS points."""
    points = []
    for row in rows:
        value = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if _is_number(row.get(axis)) and _is_number(value):
            points.append((row[axis], value))
    run = math.ceil(len(points) / POINTS) or 1
    curve = Curve(name)
    for start in range(0, len(points), run):
        chunk = points[start : start + run]
        curve.x.append(chunk[-1][0])
        curve.y.append(sum(y for _, y in chunk) / len(chunk))
    return curve


def _svg(name: str, curves: list[Curve], axis: str, *, log: bool, marks: bool) -> Markup:
    log = log and all(y > 0 for curve in curves for y in curve.y)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, curve in enumerate(curves):
            mark = "o" if marks or len(curve.x) == 1 else None
            colour = SERIES[index % len(SERIES)]
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.6, marker=mark, markersize=3)
        if log:
            axes.set_yscale("log")
        elif not marks:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))  # a rate or a speed: its noise is not the story
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}" if value < 1e5 else _count(value))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel(axis)

    return svg_of(name, draw)


def _optional_json(path: Path) -> dict:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(map(str, names), key=lambda n: (STAGES.index(n) if n in STAGES else len(STAGES), n))


def _keys(rows: list[dict], name: str) -> list[str]:
    found = [row[name] for row in rows if isinstance(row.get(name), dict)]
    return list(dict.fromkeys(key for value in found for key in value))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_per_system(value) -> bool:
    return (
        isinstance(value, dict)
        and not value.keys().isdisjoint(SYSTEMS)
        and not any(isinstance(item, (dict, list)) for item in value.values())
    )


def _flat(value: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, text) of every single value inside nested dicts; bar charts and long lists left out."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            if not name.endswith("_by_block"):
                yield from _flat(item, name + ".")
        elif isinstance(item, list):
            if 0 < len(item) <= 12:
                yield name, ", ".join(map(str, item))
        elif item is not None:
            yield name, _figure(name, item) if _is_number(item) else str(item)


def _read(key: str) -> str:
    """A key as a reader would write it: `latency_ms` is "latency", its unit stands beside the figures."""
    return "size" if key == "bytes" else key.removesuffix("_ms").replace("_", " ")


def _figure(key: str, value) -> str:
    """A value with the unit that its key names. MB is 10^6 bytes."""
    if value is None:
        return ""
    if not _is_number(value):
        return str(value)
    if key.split(".")[-1].startswith("bytes") or key.endswith("_bytes"):
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value:,} bytes"
    if key.endswith("_ms"):
        return f"{value:.2f} ms"
    if key.endswith(("coverage", "_rate", "overlap_with_first")) and 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.6g} {unit}"
    return f"{value:.6g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{minutes // 60} h {minutes % 60:02} min"
