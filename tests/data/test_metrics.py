"""Metrics are the papers' and checked by hand; those that do not fit a task are refused."""

from typing import get_args

import pytest

from tokenizer_build.errors import InputError
from vocabshrink.data.tasks import METRICS, choose_metrics, slot_f1, spans
from vocabshrink.run.recipe import TaskSection


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], set()),
        (["O", "O"], set()),
        (["B-x", "I-x", "O"], {("x", 0, 2)}),
        (["B-x", "B-x"], {("x", 0, 1), ("x", 1, 2)}),
        (["I-x", "I-x", "I-y"], {("x", 0, 2), ("y", 2, 3)}),  # a span may begin with I- where none is open
        (["B-x", "O", "I-x"], {("x", 0, 1), ("x", 2, 3)}),
        (["B-x", "I-y", "I-y", "B-y"], {("x", 0, 1), ("y", 1, 3), ("y", 3, 4)}),
        (["B-a-b", "I-a-b"], {("a-b", 0, 2)}),
        (["B", "I", "O", "I"], {("", 0, 2), ("", 3, 4)}),
        (["B-x", "NOUN", "I-x"], {("x", 0, 1), ("x", 2, 3)}),
        (["I-x", "B-x", "I-x", "O", "I-y"], {("x", 0, 1), ("x", 1, 3), ("y", 4, 5)}),  # IOB1
        (["S-x", "B-x", "I-x", "E-x", "S-x"], {("x", 0, 1), ("x", 1, 4), ("x", 4, 5)}),  # BIOES
        (["U-x", "B-x", "L-x", "B-y", "I-y", "L-y"], {("x", 0, 1), ("x", 1, 3), ("y", 3, 6)}),  # BILOU
        (["B-x", "M-x", "E-x", "E-x", "I-x"], {("x", 0, 3), ("x", 3, 4), ("x", 4, 5)}),  # BMES, and what breaks it
    ],
)
def test_spans(tags, expected):
    assert spans(tags) == expected


def test_slot_f1_by_hand():
    truth = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    guess = [["B-x", "I-x", "B-z", "B-y"], ["B-x", "I-x"]]  # 2 of 3 found, 2 of 4 right
    assert slot_f1(truth, guess) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert slot_f1(truth, truth) == 1 and slot_f1([["O"]], [["O"]]) == 0
    assert slot_f1([["B-x", "O"]], [["B-x", "I-x"]]) == 0  # a longer span is another one


def test_choice_of_metrics():
    assert choose_metrics(None, "classification", ["a", "b"], "") == ["accuracy"]
    assert choose_metrics(None, "regression", [], "") == ["pearson", "spearman"]
    assert choose_metrics(None, "tokens", ["O", "B-x"], "") == ["slot_f1"]
    assert choose_metrics(None, "tokens", ["N", "V"], "") == ["accuracy"]
    for labels in (
        ["I-x", "O"],
        ["B-x", "E-x", "I-x", "O", "S-x"],
        ["B-x", "I-x", "L-x", "U-x"],
        ["B-x", "M-x", "E-x"],
    ):
        assert choose_metrics(None, "tokens", labels, "") == ["slot_f1"]
    assert choose_metrics(None, "tokens", ["B", "I", "O"], "") == ["slot_f1"]
    assert choose_metrics(None, "tokens", ["E-mail", "O", "S-bahn"], "") == ["accuracy"]
    assert choose_metrics(["f1", "accuracy"], "classification", ["a", "b"], "") == ["f1", "accuracy"]
    assert choose_metrics("f1_macro", "classification", ["a", "b"], "") == ["f1_macro"]  # one, as meta.json may have it
    listed = TaskSection.model_fields["metrics"].annotation
    assert {metric for fitting in METRICS.values() for metric in fitting} == set(
        get_args(get_args(get_args(listed)[0])[0])
    )


def test_labels_of_no_scheme_are_refused():
    for labels in (["B-x", "O", "PER"], ["B-x", "E-x", "L-x"], ["I-x", "X-x"]):
        with pytest.raises(InputError, match=r"B-x|I-x.* are tags of no scheme .*: name it.metrics: \[accuracy\]"):
            choose_metrics(None, "tokens", labels, "it.metrics")
        assert choose_metrics(["accuracy"], "tokens", labels, "it.metrics") == ["accuracy"]
    with pytest.raises(InputError, match="'slot_f1' is no metric of tokens of 2 labels: list accuracy, f1_macro"):
        choose_metrics(["slot_f1"], "tokens", ["N", "V"], "it.metrics")


@pytest.mark.parametrize("asked", [5, "accuracy", {"bleu": 1}, ["accuracy", 5]])
def test_metrics_that_do_not_fit_are_refused(asked):
    """Also what is no list of names, as a meta.json may have it."""
    with pytest.raises(InputError, match=r"it.metrics .* is no metric of regression: list pearson, spearman"):
        choose_metrics(asked, "regression", [], "it.metrics")
