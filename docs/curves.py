"""Training curves of the released models: artifacts/NAME/curve.jsonl, and curve.svg drawn from it.

    python docs/curves.py                                   # draws every curve again
    python docs/curves.py NAME SAID=RUN:STAGE ...           # keeps those of runs, one behind another, and draws them

RUN is the folder of a run, or a metrics.jsonl, and SAID what its stage is called in the picture. A row of curve.jsonl
has the stage, the tokens of all stages so far in millions, and a loss (the mean of those since the last row) or the
measured figures.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
LINES, INK, GRID = ("#3b82f6", "#d1662a", "#3a9d5d"), "#7a828c", "#8b949e55"
POINTS = 40  # of the loss, in each stage


def keep(name: str, parts: list[str]) -> None:
    """Writes a model's curve.jsonl out of the runs' metrics."""
    rows, before = [], 0.0
    for part in parts:
        said, _, place = part.partition("=")
        run, _, stage = place.rpartition(":")
        path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
        found = [row for row in map(json.loads, path.read_text().splitlines()) if row["stage"] == stage]
        trained = [row for row in found if row["kind"] == "train" and row["loss"] is not None]
        for i in range(0, len(trained), size := -(-len(trained) // POINTS)):
            several = trained[i : i + size]
            loss = round(statistics.mean(row["loss"] for row in several), 5)
            rows.append({"stage": said, "mtokens": before + several[-1]["tokens"] / 1e6, "loss": loss})
        for row in found:
            if row["kind"] == "evaluation":
                figures = {key: round(value, 4) for key, value in row["metrics"].items() if value is not None}
                rows.append({"stage": said, "mtokens": before + row["tokens"] / 1e6, "figures": figures})
        before = max(row["mtokens"] for row in rows)
    lines = (json.dumps(row | {"mtokens": round(row["mtokens"], 3)}) for row in rows)
    (ARTIFACTS / name / "curve.jsonl").write_text("\n".join(lines) + "\n")


def draw(name: str) -> None:
    """curve.svg: measured figures of validation above, the loss below, over the tokens of all stages."""
    rows = [json.loads(line) for line in (ARTIFACTS / name / "curve.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "text.color": INK, "axes.labelcolor": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK, "legend.labelcolor": INK}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        measured = [(row["mtokens"], row["figures"]) for row in rows if "figures" in row]
        shown = sorted({key for _, figures in measured for key in figures if "validation" in key or "accuracy" in key})
        for key, colour in zip(shown, LINES, strict=False):
            points = [(tokens, figures[key]) for tokens, figures in measured if key in figures]
            above.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, label=key.replace("_", " "))
        above.legend(frameon=False, loc="lower right")
        for stage in stages:
            of_stage = [(row["mtokens"], row["loss"]) for row in rows if row["stage"] == stage and "loss" in row]
            below.plot(*zip(*of_stage, strict=True), color=LINES[0], linewidth=1.2)
            first, last = of_stage[0][0], max(row["mtokens"] for row in rows if row["stage"] == stage)
            above.annotate(stage, ((first + last) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", size=8)
            for axes in (above, below) if stage != stages[-1] else ():
                axes.axvline(last, color=INK, linewidth=0.7, linestyle=":")
        below.set(xlabel="million tokens", ylabel="loss")
        for axes in (above, below):
            axes.grid(color=GRID, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(ARTIFACTS / name / "curve.svg", transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    if len(sys.argv) > 2:
        keep(sys.argv[1], sys.argv[2:])
    for path in ARTIFACTS.glob("*/curve.jsonl"):
        draw(path.parent.name)


if __name__ == "__main__":
    main()
