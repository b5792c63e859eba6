"""Layer maps reach the last layers, and explicit pairs are refused where a model has no such layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer_build.errors import InputError
from vocabshrink.layer_map import LAYER_MAPS, layer_pairs

DEPTHS = st.integers(1, 48).flatmap(lambda teacher: st.tuples(st.integers(1, teacher), st.just(teacher)))


@pytest.mark.parametrize("name", sorted(set(LAYER_MAPS) - {"first"}))
@given(depths=DEPTHS)
def test_last_layer_learns_from_last(name, depths):
    student, teacher = depths
    assert layer_pairs(name, student, teacher)[-1] == (student, teacher)


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
@given(depths=DEPTHS)
def test_pairs_are_layers_that_rise(name, depths):
    student, teacher = depths
    pairs = layer_pairs(name, student, teacher)
    assert all(1 <= m <= student and 1 <= n <= teacher for m, n in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in zip(pairs, pairs[1:], strict=False))
    if name != "last_only":
        assert [m for m, _ in pairs] == list(range(1, student + 1))
    if student == teacher and name != "last_only":
        assert pairs == tuple((m, m) for m in range(1, teacher + 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", ((1, 3), (2, 6), (3, 9), (4, 12))),  # TinyBERT-4: g(m) = 3 m
        ("last", ((1, 9), (2, 10), (3, 11), (4, 12))),
        ("first", ((1, 1), (2, 2), (3, 3), (4, 4))),
        ("last_only", ((4, 12),)),
    ],
)
def test_four_of_twelve(name, expected):
    assert layer_pairs(name, 4, 12) == expected


def test_uniform_rounds_up():
    assert layer_pairs("uniform", 4, 6) == ((1, 2), (2, 3), (3, 5), (4, 6))


def test_explicit_pairs_are_kept_as_they_are():
    assert layer_pairs([(0, 0), (2, 4), (1, 4)], 2, 4) == ((0, 0), (2, 4), (1, 4))
    assert layer_pairs([[3, 1]], 3, 1) == ((3, 1),)  # the way to a student deeper than its teacher


@pytest.mark.parametrize("pair", [(3, 1), (1, 5), (-1, 1), (1, -1)])
def test_layers_that_are_not_there(pair):
    with pytest.raises(InputError, match="outside the student's 2 and the teacher's 4 layers"):
        layer_pairs([(1, 1), pair], 2, 4)


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
def test_a_deeper_student_is_refused(name):
    with pytest.raises(InputError, match="the student has 5 layers and the teacher only 4: .*explicit pairs"):
        layer_pairs(name, 5, 4)


def test_unknown_and_empty_maps_are_refused():
    with pytest.raises(InputError, match="unknown map unifrom: known maps are uniform, last, first, last_only"):
        layer_pairs("unifrom", 2, 4)
    with pytest.raises(InputError, match="no pairs"):
        layer_pairs([], 2, 4)
