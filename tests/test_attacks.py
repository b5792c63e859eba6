"""Few of the attacks of `make torture`: the right answer, or one sentence; killed runs end as unbroken ones."""

import pytest
from attacks import FUZZED, Target, cut_power, fuzz, kill_runs

TRIES = {"recipes": 60, "tasks": 150, "corpora": 200, "manifests": 80, "deliveries": 80, "teachers": 40}


@pytest.fixture(scope="module")
def target(tiny_teacher, lines, tmp_path_factory) -> Target:
    return Target(tmp_path_factory.mktemp("attacks") / "target", tiny_teacher, lines[:200])


@pytest.mark.parametrize("what", FUZZED)
def test_damage_gives_the_right_answer_or_one_sentence(what, target):
    told = []
    assert fuzz(target, what, TRIES[what], told=told.append) == [TRIES[what], 0, 0], told


def test_killed_runs_end_as_unbroken_ones(target):
    told = []
    found = kill_runs(target, 2, dual=False, told=told.append)
    assert sum(tried for tried, _ in found.values()) == sum(equal for _, equal in found.values()) == 2, told


def test_a_power_cut_leaves_what_a_run_goes_on_from(target):
    told = []
    moments, tried, equal = cut_power(target, 4, dual=False, told=told.append)
    assert moments > 100 and tried == equal == 4, told
