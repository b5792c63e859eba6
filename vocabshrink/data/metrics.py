"""TODO: data.metrics."""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

# ---------------------------------------------------------------------------------------------- metrics


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(kind, first token, one past the last) of every span in BIO tags; an I- after another kind begins one (CoNLL)."""
    found, kind, start = set(), None, 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        inside = prefix in ("B", "I")
        begins = inside and (prefix == "B" or name != kind)
        if kind is not None and (begins or not inside):
            found.add((kind, start, index))
            kind = None
        if begins:
            kind, start = name, index
    return found


def slot_f1(targets: list[list[str]], predicted: list[list[str]]) -> float:
    """F1 of exactly found spans over all rows (Tjong Kim Sang and De Meulder 2003); 0 where there are none."""
    right = true = given = 0
    for tags, guessed in zip(targets, predicted, strict=True):
        wanted, found = spans(tags), spans(guessed)
        right, true, given = right + len(wanted & found), true + len(wanted), given + len(found)
    return 2 * right / max(true + given, 1)


def correlation(of: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """Correlation that is 0, not undefined, for a model that gives every row the same score."""

    def metric(targets: np.ndarray, predicted: np.ndarray) -> float:
        if np.ptp(targets) == 0 or np.ptp(predicted) == 0:
            return 0.0
        return float(of(targets, predicted).statistic)

    return metric


METRICS: dict[str, Callable] = {
    "accuracy": lambda targets, predicted: float(accuracy_score(targets, predicted)),
    "f1": lambda targets, predicted: float(f1_score(targets, predicted, pos_label=1, zero_division=0)),
    "f1_macro": lambda targets, predicted: float(f1_score(targets, predicted, average="macro", zero_division=0)),
    "matthews": lambda targets, predicted: float(matthews_corrcoef(targets, predicted)),
    "pearson": correlation(pearsonr),
    "spearman": correlation(spearmanr),
    "slot_f1": slot_f1,
}
FITTING = {
    "classification": ("accuracy", "f1", "f1_macro", "matthews"),
    "regression": ("pearson", "spearman"),
    "tokens": ("slot_f1", "accuracy", "f1_macro"),
}


def headline(metrics: dict[str, float]) -> float:
    """One figure for a task: the mean of its metrics, as GLUE averages them (Wang et al. 2018)."""
    return sum(metrics.values()) / len(metrics) if metrics else math.nan
