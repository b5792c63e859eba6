"""Draws docs/pareto.svg: bytes against STS-B test, as measured (artifacts/bench/score.json, and the teacher of the
released models as their manifests have it) and, in hollow rings, as others report it of models that were not run here.

The background is transparent and every colour is legible on white and on black, since README is shown on both.
"""

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
OURS, PEER, INK, GRID = "#3b82f6", "#d1662a", "#7a828c", "#8b949e55"
LABELS = {  # system: label, where it stands beside its point
    "mpnet-7mb": ("mpnet-7mb, 4 bits", (9, -2)),
    "mpnet-fast-7mb": ("mpnet-fast-7mb", (0, -25)),
    "mpnet-3mb": ("mpnet-3mb", (-9, -3)),
    "mpnet-1mb": ("mpnet-1mb", (9, -3)),
    "model2vec-mpnet": ("model2vec, static vectors", (9, -3)),
    "teacher-int8": ("all-MiniLM-L6-v2, int8", (9, -11)),
    "teacher-fp32": ("all-MiniLM-L6-v2, fp32", (9, -3)),
    "all-mpnet-base-v2": ("all-mpnet-base-v2, fp32", (0, 10)),
}
REPORTED = {  # label: MB, value, where the label stands; bytes are the weights' in the precision named
    "potion-base-2M, fp32": (7.6, 0.728, (9, -3)),
    "potion-base-4M, int8": (3.8, 0.743, (9, -3)),
    "potion-base-8M, int8": (7.6, 0.754, (9, -3)),
    "ogma-micro, int8": (2.3, 0.778, (9, -3)),
    "ogma-small, int8": (8.6, 0.855, (9, -3)),
    "zen-E 4 x 256, if 4 bits": (5.6, 0.835, (-9, -3)),
    "HPD-TinyBERT, if 4 bits": (7.2, 0.844, (-9, 2)),
}


def main() -> None:
    bench = DOCS.parent / "artifacts/bench"
    points = {
        row["model"]: (row["bytes"] / 1e6, row["value"])
        for row in json.loads((bench / "score.json").read_text())
        if row["task"] == "stsb"
    }
    manifest = json.loads((DOCS.parent / "artifacts/mpnet-7mb/MANIFEST.json").read_text())
    points["all-mpnet-base-v2"] = 438, manifest["quality"]["stsb_test"]["teacher"]
    style = {"svg.fonttype": "none", "svg.hashsalt": "pareto", "font.size": 10, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    with rc_context(style):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, (label, offset) in LABELS.items():
            point = points[name]
            ours = name.endswith("mb")
            axes.plot(*point, "o", color=OURS if ours else PEER, markersize=9 if ours else 7)
            beside = "left" if offset[0] > 0 else "right" if offset[0] else "center"
            shown = {"ha": beside, "color": OURS if ours else INK}
            weight = "bold" if ours else "normal"
            axes.annotate(label, point, offset, textcoords="offset points", weight=weight, **shown)
        for label, (megabytes, value, offset) in REPORTED.items():
            axes.plot(megabytes, value, "o", color=INK, markerfacecolor="none", markersize=6)
            beside = "left" if offset[0] > 0 else "right"
            axes.annotate(
                label, (megabytes, value), offset, textcoords="offset points", ha=beside, size=8, style="italic"
            )
        axes.set(xscale="log", xlim=(0.6, 1000), ylim=(0.64, 0.87))
        axes.set(xlabel="MB that the loader needs (log)", ylabel="STS-B test, Spearman")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 400], ["1", "2", "5", "10", "20", "50", "100", "400"])
        axes.set_yticks([0.65, 0.7, 0.75, 0.8, 0.85])
        axes.minorticks_off()
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(DOCS / "pareto.svg", transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
