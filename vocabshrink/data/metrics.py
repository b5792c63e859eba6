"""The metrics of labelled tasks, as the papers count them, and which of them a task is judged by.

scikit-learn's and scipy's wherever they have the metric; of slot tagging only spans are counted here, as CoNLL does,
so that no further package is needed. Not done: strict IOBES schemes, confidence intervals.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tokenizer_build.errors import InputError


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first token, one past the last) of every span in BIO tags; an I- after another kind begins one (CoNLL)."""
    found, begun = set(), None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        inside = prefix in ("B", "I")
        if begun is not None and (not inside or prefix == "B" or kind != begun[0]):
            found.add((*begun, index))
            begun = None
        if inside and begun is None:
            begun = kind, index
    return found


def slot_f1(targets: list[list[str]], predicted: list[list[str]]) -> float:
    """F1 of exactly found spans over all rows (Tjong Kim Sang and De Meulder 2003); 0 where there are none."""
    right = total = 0
    for tags, guessed in zip(targets, predicted, strict=True):
        wanted, found = spans(tags), spans(guessed)
        right, total = right + len(wanted & found), total + len(wanted) + len(found)
    return 2 * right / max(total, 1)


def correlation(of: Callable, targets: np.ndarray, predicted: np.ndarray) -> float:
    """A correlation that is 0, not undefined, for a model that gives every row the same score."""
    return of(targets, predicted).statistic if np.ptp(targets) and np.ptp(predicted) else 0.0


METRICS: dict[str, Callable] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0),  # of the second label
    "f1_macro": partial(f1_score, average="macro", zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": partial(correlation, pearsonr),
    "spearman": partial(correlation, spearmanr),
    "slot_f1": slot_f1,
}
FITTING = {
    "classification": ("accuracy", "f1", "f1_macro", "matthews"),
    "regression": ("pearson", "spearman"),
    "tokens": ("slot_f1", "accuracy", "f1_macro"),
}


def choose_metrics(asked: list[str] | None, kind: str, labels: list[str], where: str) -> list[str]:
    """The metrics asked for, else the usual ones of the kind. Raises InputError for one that does not fit."""
    fitting = FITTING[kind]
    if not asked:
        spanned = any(label.startswith(("B-", "I-")) for label in labels)
        return list(fitting if kind == "regression" else fitting[:1] if kind != "tokens" or spanned else ["accuracy"])
    asked = asked if isinstance(asked, list) else [asked]
    for metric in asked:
        if metric not in fitting:
            raise InputError(f"{where} (or meta.json's): {metric!r} is no metric of {kind}: list {', '.join(fitting)}")
        if metric == "f1" and len(labels) != 2:
            raise InputError(f"{where}: f1 is of two labels and there are {len(labels)}: use f1_macro")
    return asked


def headline(metrics: dict[str, float]) -> float:
    """One figure for a task: the mean of its metrics, as GLUE averages them (Wang et al. 2018)."""
    return sum(metrics.values()) / len(metrics) if metrics else math.nan
