"""One HTML file that shows what a run did, built from whatever files the run folder holds.

It opens offline and from a mail attachment: curves are inline SVG, nothing is fetched and no script runs. Every figure
on it is in a JSON file beside it, and what is missing is left out. Learning rates are not drawn: the recipe sets them.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullFormatter

from tokenizer_build.files import read_json
from vocabshrink.pages.figure import SERIES, svg_of
from vocabshrink.pages.page import write_page
from vocabshrink.run.folder import RunDir, task_rows
from vocabshrink.run.stage import STAGES

SYSTEMS = ("teacher", "untrained", "trained", "delivered")
PLOTS = {"Losses, each part unweighted": ("train", "loss"), "Evaluation": ("evaluation", "metrics")}
POINTS = 300  # per curve, averaged: more cannot be seen at the width of a page


def write_report(run: RunDir) -> Path:
    """Write report.html into the run folder; its path. Raises InputError for a file that is not what its name says."""
    out, recipe = run.path / "report.html", run.path / "recipe.yaml"
    files = (run.path / "summary.json", run.path / "environment.json", run.stage("vocab") / "comparison.json")
    summary, environment, comparison = (read_json(file) if file.is_file() else {} for file in files)
    stages = {path.parent.name: read_json(path) for path in run.path.glob("*/summary.json")}
    rows = [row for row in run.metrics() if {"stage", "step", "kind"} <= row.keys()]
    facts = {"name": run.path.resolve().name, "tiles": headline_tiles(summary), "headline": per_system(summary)}
    facts |= {"systems": SYSTEMS, "tasks": task_rows(summary["tasks"]) if "tasks" in summary else []}
    facts["blocks"] = {key: value for key, value in summary.items() if key.endswith("_by_block")}
    facts["training"] = [training_panel(stage, rows) for stage in in_order(row["stage"] for row in rows)]
    by_language = comparison.pop("languages", {})
    facts |= {"examples": comparison.pop("examples", []), "vocabulary": comparison}
    facts["vocabulary"] |= {
        f"{side}, {language}": found[side] for language, found in by_language.items() for side in ("teacher", "student")
    }
    facts["details"] = {name: list(flatten(stages[name])) for name in in_order(stages)}
    facts["recipe"] = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    facts |= {"timings": stage_timings(run, rows, stages), "environment": list(flatten(environment))}
    write_page(out, "report.html", **facts, label=label, figure=figure, columns=columns)
    return out


def per_system(summary: dict) -> dict[str, dict]:
    """The entries of a run's summary that hold one figure per system, {"teacher": ..., "delivered": ..., ...}."""
    entries = {key: value for key, value in summary.items() if isinstance(value, dict) and set(SYSTEMS) & set(value)}
    return {key: value for key, value in entries.items() if not any(isinstance(item, dict) for item in value.values())}


def headline_tiles(summary: dict) -> list[tuple[str, str, str]]:
    """(figure, what it is, what it compares with) of the few figures that matter most."""
    tiles = []
    for key, systems in per_system(summary).items():
        teacher, untrained, _, delivered = map(systems.get, SYSTEMS)
        note = f"teacher {figure(key, teacher)}" if teacher is not None else ""
        if key == "bytes" and teacher and delivered:
            note = f"{teacher / delivered:.1f} times smaller than the teacher's {figure(key, teacher)}"
        elif untrained is not None:
            note = f"{figure(key, untrained)} before training"
        if delivered is not None:
            tiles.append((figure(key, delivered), label(key), note))
    minutes = summary.get("minutes")
    return tiles[:5] + ([(figure("minutes", minutes), "whole run", "")] if minutes is not None else [])


def training_panel(stage: str, rows: list[dict]) -> dict:
    """{"stage", "note", "plots": [{"title", "svg", "legend": {curve: its last value}}]} of one training stage."""
    frame = pd.json_normalize([row for row in rows if row["stage"] == stage])
    axis = "tokens" if "tokens" in frame and frame["tokens"].notna().all() else "step"  # where tokens were not logged
    plots = []
    for title, (kind, prefix) in PLOTS.items():
        curves = {}
        for name in (name for name in frame if name.startswith(prefix)):
            points = frame.loc[frame["kind"] == kind, [axis, name]].dropna()
            group = np.arange(len(points)) // max(1, math.ceil(len(points) / POINTS))
            if len(points):
                means = points.groupby(group).agg({axis: "last", name: "mean"})
                curves[name.partition(".")[2] or "total"] = means.to_numpy(float)
        if curves:
            drawn = max(map(len, curves.values())) > 1
            svg = svg_of(f"{stage}-{kind}", partial(draw, curves, axis, kind == "train")) if drawn else ""
            legend = {name: figure("", points[-1, 1]) for name, points in curves.items()}
            plots.append({"title": title, "svg": svg, "legend": legend})
    note = f"{frame['step'].max():,} steps"
    if "tokens_per_second" in frame:
        tokens, speed = frame["tokens"].max(), frame["tokens_per_second"].median()
        note += f", {tokens:,.0f} tokens, {speed:,.0f} tokens per second (median)"
    return {"stage": stage, "note": note, "plots": plots}


def draw(curves: dict[str, np.ndarray], axis: str, log: bool, axes: Axes) -> None:
    """curves: name -> [n, 2], what was read and the value."""
    for index, points in enumerate(curves.values()):
        mark = "o" if not log or len(points) == 1 else None
        axes.plot(*points.T, color=SERIES[index % len(SERIES)], linewidth=1.6, marker=mark, markersize=3)
    if log and all((points[:, 1] > 0).all() for points in curves.values()):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(axis)


def stage_timings(run: RunDir, rows: list[dict], stages: dict[str, dict]) -> list[tuple[str, float, bool]]:
    """(stage, minutes, whether it is done): by its summary, else by the seconds of its last metrics row."""
    minutes = {name: 0.0 for name in STAGES if run.stage(name).is_dir()}
    minutes |= {row["stage"]: row["seconds"] / 60 for row in rows if "seconds" in row}
    minutes |= {name: summary["minutes"] for name, summary in stages.items() if "minutes" in summary}
    return [(name, minutes[name], run.is_done(name)) for name in in_order(minutes)]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of stages in the order in which they run; without the report, which does not list its own making."""
    found = {*names} - {"report"}
    return sorted(found, key=[*STAGES, *sorted(found)].index)


def columns(rows: Iterable[dict], first: Iterable[str] = ()) -> list[str]:
    """The keys of all rows, in order of appearance, those in `first` leading."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [*(name for name in first if name in names), *(name for name in names if name not in first)]


def flatten(value: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, text) of every value inside nested dicts, without what is drawn as bars and long lists."""
    for key, item in value.items():
        if isinstance(item, dict) and not key.endswith("_by_block"):
            yield from flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list) and 0 < len(item) <= 12:
            yield prefix + key, ", ".join(map(str, item))
        elif not isinstance(item, dict | list | None):
            yield prefix + key, figure(key, item)


def label(key: str) -> str:
    """A key as a reader would write it; units stand beside the figures: `latency_ms` is "latency"."""
    return "size" if key == "bytes" else key.removesuffix("_ms").replace("_", " ")


def figure(key: str, value) -> str:
    """A value with the unit that its key names. MB is 10^6 bytes."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    if key == "minutes":
        return f"{60 * value:.1f} s" if value < 1 else f"{value:.1f} min" if value < 60 else f"{value / 60:.1f} h"
    if "bytes" in key:
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value:,} bytes"
    if key.endswith("_ms"):
        return f"{value:.2f} ms"
    if key.endswith(("coverage", "unknown_rate", "overlap_with_first")):
        return f"{100 * value:.2f} %"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"
