"""The latency that the headline table prints. The table itself is checked on whole runs in test_pipeline.py."""

from types import SimpleNamespace

import pytest

from vocabshrink.delivery import measure
from vocabshrink.delivery.measure import TIMED_SENTENCES, latency


def test_latency_is_the_median_of_single_sentences_after_warming_up(monkeypatch):
    calls, seconds = [], [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    def embed(texts):
        calls.append(texts)
        seconds[0] += 0.05 if len(calls) <= 3 else 0.002  # a slow start must not count

    figure = latency(embed, [f"sentence {i}" for i in range(1000)])
    assert figure == pytest.approx(2)
    assert len(calls) == TIMED_SENTENCES + 3
    assert all(len(texts) == 1 for texts in calls)
