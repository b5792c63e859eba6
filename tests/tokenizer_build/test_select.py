"""The selection's bookkeeping against plain recounting, and its result against every possible choice."""

import itertools
import random

import pytest
from conftest import made_up_text

from tokenizer_build.count import count_block
from tokenizer_build.select import Segmentation, fewest_pieces


def cut(word, start, inner):
    """Greedy longest match, as plainly as it can be said."""
    pieces, begin = [], 0
    while begin < len(word):
        table = inner if begin else start
        end = next(end for end in range(len(word), begin, -1) if word[begin:end] in table)
        pieces.append(word[begin:end])
        begin = end
    return pieces


def total(words, names):
    start = {name for name in names if not name.startswith("##")}
    inner = {name[2:] for name in names if name.startswith("##")}
    return sum(count * len(cut(word, start, inner)) for word, count in words)


@pytest.fixture(scope="module")
def case():
    rng = random.Random(1)
    words = sorted(count_block(made_up_text(60)).items(), key=lambda item: (-item[1], item[0]))
    words = [(word, count) for word, count in words if word.isalpha()][:80]
    letters = sorted({c for word, _ in words for c in word})
    fixed = letters + [f"##{c}" for c in letters]
    parts = {
        ("" if i == 0 else "##") + word[i:j]
        for word, _ in words
        for i in range(len(word))
        for j in range(i + 2, len(word) + 1)
    }
    return words, fixed, rng.sample(sorted(parts), 120)


def alive(state):
    return [state.names[piece] for piece in state.alive]


def test_exact_costs_and_savings_are_the_differences_of_plain_counts(case):
    words, fixed, parts = case
    state = Segmentation(words, fixed + parts)
    state.cut(state.alive - set(range(len(fixed), len(fixed) + 60)))
    names = alive(state)
    before = total(words, names)
    costs, savings = state.exact_costs(), state.savings()
    assert any(costs) and any(savings.values())
    for piece, name in enumerate(state.names):
        if name in fixed:
            continue
        if piece in state.alive:
            assert costs[piece] == total(words, [other for other in names if other != name]) - before, name
        else:
            assert savings.get(piece, 0) == before - total(words, [*names, name]), name


def test_counts_stay_true_while_the_vocabulary_shrinks_and_grows(case):
    words, fixed, parts = case
    rng = random.Random(2)
    state = Segmentation(words, fixed + parts)
    for _ in range(10):
        free = sorted(piece for piece in state.alive if piece >= len(fixed))
        state.cut(state.alive - set(rng.sample(free, 10)))
        gone = [piece for piece in range(len(state.names)) if piece not in state.alive]
        state.cut(state.alive | set(rng.sample(gone, 4)))
        fresh = Segmentation(words, alive(state))
        fresh_counts = dict(zip(fresh.names, fresh.counts, strict=True))
        assert all(state.counts[piece] == fresh_counts.get(name, 0) for piece, name in enumerate(state.names))


def test_the_selection_is_close_to_the_best_there_is():
    words = [("aabb", 9), ("aab", 7), ("abab", 5), ("bbaa", 4), ("bab", 2), ("ba", 1)]
    fixed = ["a", "b", "##a", "##b"]
    parts = sorted(
        {("" if i == 0 else "##") + w[i:j] for w, _ in words for i in range(len(w)) for j in range(i + 2, len(w) + 1)}
    )
    for extra in range(1, 5):
        best = min(total(words, [*fixed, *chosen]) for chosen in itertools.combinations(parts, extra))
        found = fewest_pieces(words, parts, fixed, len(fixed) + extra)
        assert len(found) == len(fixed) + extra and set(fixed) <= set(found)
        assert best <= total(words, found) <= 1.05 * best


def test_pieces_that_no_word_uses_are_left_out():
    assert set(fewest_pieces([("ab", 3)], ["ab", "abc", "##zz"], ["a", "##b"], 100)) == {"ab", "a", "##b"}
