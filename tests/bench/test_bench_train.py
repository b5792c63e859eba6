"""The guard over the stored ratios of training speed."""

import json
from pathlib import Path

import pytest
from bench import floors, train


def test_ratios_are_medians_over_rounds_of_what_was_measured():
    speeds = {"ours": [20.0, 30.0, 90.0], "plain": [10.0, 10.0, 10.0], "textbrewer": [None] * 3}
    assert train.ratios_of(speeds) == {
        "plain_loop_ratio": 3.0,
        "textbrewer_ratio": None,
        "vectors_ratio": None,
        "vectors_same_shape_ratio": None,
        "two_processes_ratio": None,
    }


def test_a_ratio_that_fell_by_a_fifth_is_refused(tmp_path):
    out = tmp_path / "train.json"
    rows = {"plain_loop_ratio": 4.0, "textbrewer_ratio": 3.0}
    train.store(out, "cpu", {"device": "d", "rows": rows}, accept=False)
    assert json.loads(out.read_text()) == {"cpu": {"device": "d", "rows": rows}, "gpu": None}
    fewer = {"plain_loop_ratio": 3.3, "textbrewer_ratio": None}
    train.store(out, "cpu", {"device": "d", "rows": fewer}, accept=False)  # less, not by a fifth
    kept = {"plain_loop_ratio": 3.3, "textbrewer_ratio": 3.0}  # what was not measured stays
    assert json.loads(out.read_text())["cpu"]["rows"] == kept
    fallen = {"device": "d", "rows": {"plain_loop_ratio": 2.0, "textbrewer_ratio": 3.0}}
    with pytest.raises(SystemExit, match="plain_loop_ratio fell from 3.30 to 2.00"):
        train.store(out, "cpu", fallen, accept=False)
    assert json.loads(out.read_text())["cpu"]["rows"] == kept
    train.store(out, "cpu", fallen, accept=True)
    assert json.loads(out.read_text())["cpu"] == fallen
    for speed in (1e6, 2e5):
        entry = {"device": "g", "rows": {"minilm": {"tokens_per_second": speed, "mfu": None}}}
        if speed == 1e6:
            train.store(out, "gpu", entry, accept=False)
        else:
            with pytest.raises(SystemExit, match="minilm.tokens_per_second fell"):
                train.store(out, "gpu", entry, accept=False)


def test_the_document_has_the_floors_of_today():
    assert floors.tables() in (Path(__file__).parents[2] / "docs/performance.md").read_text()
