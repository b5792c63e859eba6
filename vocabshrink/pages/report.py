"""One HTML file that shows what a run did, built from whatever files the run folder holds.

It opens offline and from a mail attachment: curves are inline SVG, nothing is fetched and no script runs. Every figure
on it is in a JSON file beside it, and what is missing is left out. Learning rates are not drawn: recipes set them."""

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
    out = run.path / "report.html"
    files = (run.path / "summary.json", run.stage("vocab") / "comparison.json")
    summary, comparison = (read_json(file) if file.is_file() else {} for file in files)
    rows = [row for row in run.metrics() if {"stage", "step", "kind"} <= row.keys()]
    facts = {"name": run.path.resolve().name, "minutes": summary.get("minutes"), "headline": per_system(summary)}
    facts |= {"systems": SYSTEMS, "tasks": task_rows(summary["tasks"]) if "tasks" in summary else []}
    facts["blocks"] = {key: value for key, value in summary.items() if key.endswith("_by_block")}
    trained = columns([{row["stage"]: None for row in rows}], first=STAGES)
    facts["training"] = [training_panel(stage, rows) for stage in trained]
    facts |= {"examples": comparison.pop("examples", []), "vocabulary": comparison}
    for language, found in comparison.pop("languages", {}).items():
        comparison |= {f"{side}, {language}": found[side] for side in ("teacher", "student")}
    shown = {name: run.path / name for name in ("recipe.yaml", "environment.json")}
    shown |= {f"{name}/summary.json": run.stage(name) / "summary.json" for name in STAGES if name != "report"}
    facts["files"] = {n: p.read_text(encoding="utf-8", errors="replace") for n, p in shown.items() if p.is_file()}
    write_page(out, "report.html", **facts, columns=columns)
    return out


def per_system(summary: dict) -> dict[str, dict]:
    """The entries of a run's summary that hold one figure per system, {"teacher": ..., "delivered": ..., ...}."""
    entries = {key: value for key, value in summary.items() if isinstance(value, dict) and set(SYSTEMS) & set(value)}
    return {key: value for key, value in entries.items() if not any(isinstance(item, dict) for item in value.values())}


def training_panel(stage: str, rows: list[dict]) -> dict:
    """{"stage", "note", "plots": [{"title", "svg", "legend": {curve: its last value}}]} of one training stage."""
    frame = pd.json_normalize([row for row in rows if row["stage"] == stage])
    plots = []
    for title, (kind, prefix) in PLOTS.items():
        curves = {}
        for name in (name for name in frame if name.startswith(prefix)):
            points = frame.loc[frame["kind"] == kind, ["tokens", name]].dropna()
            group = np.arange(len(points)) // max(1, math.ceil(len(points) / POINTS))
            if len(points):
                means = points.groupby(group).agg({"tokens": "last", name: "mean"})
                curves[name.partition(".")[2] or "total"] = means.to_numpy(float)
        if curves:
            drawn = max(map(len, curves.values())) > 1
            svg = svg_of(f"{stage}-{kind}", partial(draw, curves, kind == "train")) if drawn else ""
            legend = {name: points[-1, 1] for name, points in curves.items()}
            plots.append({"title": title, "svg": svg, "legend": legend})
    tokens, speed = frame["tokens"].max(), frame["tokens_per_second"].median()
    note = f"{frame['step'].max():,} steps, {tokens:,.0f} tokens, {speed:,.0f} tokens per second (median)"
    return {"stage": stage, "note": note, "plots": plots}


def draw(curves: dict[str, np.ndarray], log: bool, axes: Axes) -> None:
    """curves: name -> [n, 2], the tokens that were read and the value."""
    for index, points in enumerate(curves.values()):
        mark = "o" if not log or len(points) == 1 else None
        axes.plot(*points.T, color=SERIES[index % len(SERIES)], linewidth=1.6, marker=mark, markersize=3)
    if log and all((points[:, 1] > 0).all() for points in curves.values()):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")


def columns(rows: Iterable[dict], first: Iterable[str] = ()) -> list[str]:
    """The keys of all rows, in order of appearance, those in `first` leading."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [*(name for name in first if name in names), *(name for name in names if name not in first)]
