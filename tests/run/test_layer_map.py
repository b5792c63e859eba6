"""Layer maps keep their promises about the last layers, and pairs are refused where a model has no such layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer_build.errors import InputError
from vocabshrink.run.layer_map import LAYER_MAPS, SoftPairs, layer_pairs

DEPTHS = st.integers(1, 48).flatmap(lambda teacher: st.tuples(st.integers(1, teacher), st.just(teacher)))


HARD = sorted(set(LAYER_MAPS) - {"emd"})  # one block for a student layer
ENDS = {  # what each map promises about the last student layer, of M, and the teacher's last, N
    "uniform": "last learns from last",
    "last": "last learns from last",
    "last_only": "last learns from last",
    "block_mean": "last learns from last",
    "emd": "last learns from last",
    "first": "last learns",
    "random": "last learns",
    "skip": "last is left out",
}


@pytest.mark.parametrize("name", LAYER_MAPS)
@given(depths=DEPTHS)
def test_promise_about_the_last_layers(name, depths):
    student, teacher = depths
    if name == "skip" and student == 1:
        return  # refused below
    pairs = layer_pairs(name, student, teacher)
    if ENDS[name] == "last is left out":
        assert pairs[-1][0] == student - 1 and all(block[-1] < teacher for _, block in pairs)
    else:
        assert pairs[-1][0] == student
        assert (ENDS[name] == "last learns") or pairs[-1][1][-1] == teacher


@pytest.mark.parametrize("name", HARD)
@given(depths=DEPTHS)
def test_pairs_are_layers_that_rise(name, depths):
    student, teacher = depths
    if name == "skip" and student == 1:
        return
    pairs = layer_pairs(name, student, teacher)
    assert not isinstance(pairs, SoftPairs)
    layers = [n for _, block in pairs for n in block]
    assert layers == sorted(set(layers)) and layers[0] >= 1 and layers[-1] <= teacher
    if name == "block_mean":
        assert layers == list(range(1, teacher + 1))  # nothing is left out
    else:
        assert all(len(block) == 1 for _, block in pairs)
    learning = {"last_only": [student], "skip": list(range(1, student))}.get(name, list(range(1, student + 1)))
    assert [m for m, _ in pairs] == learning
    if student == teacher:
        assert pairs == tuple((m, (m,)) for m in learning)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", ((1, (3,)), (2, (6,)), (3, (9,)), (4, (12,)))),  # TinyBERT-4: g(m) = 3 m
        ("last", ((1, (9,)), (2, (10,)), (3, (11,)), (4, (12,)))),
        ("first", ((1, (1,)), (2, (2,)), (3, (3,)), (4, (4,)))),
        ("last_only", ((4, (12,)),)),
        ("skip", ((1, (3,)), (2, (6,)), (3, (9,)))),
        ("block_mean", ((1, (1, 2, 3)), (2, (4, 5, 6)), (3, (7, 8, 9)), (4, (10, 11, 12)))),
    ],
)
def test_four_of_twelve(name, expected):
    assert layer_pairs(name, 4, 12) == expected


def test_skip_is_that_of_patient_kd():
    assert [block for _, block in layer_pairs("skip", 6, 12)] == [(2,), (4,), (6,), (8,), (10,)]
    with pytest.raises(InputError, match="skip gives a student layer no teacher layer, or no pair at all"):
        layer_pairs("skip", 1, 12)


def test_random_is_drawn_by_the_seed():
    drawn = [layer_pairs("random", 4, 12, seed=seed) for seed in range(20)]
    assert len(set(drawn)) > 10 and layer_pairs("random", 4, 12, seed=3) == drawn[3]
    assert {block[0] for pairs in drawn for _, block in pairs} == set(range(1, 13))


def test_emd_is_every_pair():
    pairs = layer_pairs("emd", 2, 3)
    assert isinstance(pairs, SoftPairs)
    assert pairs == ((1, (1,)), (1, (2,)), (1, (3,)), (2, (1,)), (2, (2,)), (2, (3,)))


def test_uniform_rounds_up():
    assert layer_pairs("uniform", 4, 6) == ((1, (2,)), (2, (3,)), (3, (5,)), (4, (6,)))
    assert layer_pairs("block_mean", 4, 6) == ((1, (1, 2)), (2, (3,)), (3, (4, 5)), (4, (6,)))


def test_explicit_pairs_are_kept_as_they_are():
    assert layer_pairs([(0, 0), (2, 4), (1, 4)], 2, 4) == ((0, (0,)), (2, (4,)), (1, (4,)))
    assert layer_pairs([[3, 1]], 3, 1) == ((3, (1,)),)  # the way to a student deeper than its teacher
    assert layer_pairs([[1, [1, 2]], [2, 4]], 2, 4) == ((1, (1, 2)), (2, (4,)))


@pytest.mark.parametrize("pair", [(3, 1), (1, 5), (-1, 1), (1, -1), (1, [2, 5])])
def test_layers_that_are_not_there(pair):
    with pytest.raises(InputError, match="outside the student's 2 and the teacher's 4 layers"):
        layer_pairs([(1, 1), pair], 2, 4)


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
def test_a_deeper_student_is_refused(name):
    with pytest.raises(InputError, match="the student has 5 layers and the teacher only 4: .*explicit pairs"):
        layer_pairs(name, 5, 4)


def test_empty_maps_are_refused():
    with pytest.raises(InputError, match="no pair at all"):
        layer_pairs([], 2, 4)
    with pytest.raises(InputError, match="gives a student layer no teacher layer"):
        layer_pairs([[1, []]], 2, 4)
