"""Languages have the shares that they should have, and the scripts that they say."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer_build.errors import InputError
from tokenizer_build.languages import balance, check_script, scripts_of, shares

COUNTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=8)


def test_shares_are_sizes_to_the_power_alpha():
    assert shares({"en": 900, "de": 100}, 1.0) == {"en": pytest.approx(0.9), "de": pytest.approx(0.1)}
    assert shares({"en": 900, "de": 100}, 0.5) == {"en": pytest.approx(0.75), "de": pytest.approx(0.25)}
    assert shares({"en": 7, "de": 0}, 0.3) == {"en": 1.0, "de": 0.0}


@given(COUNTS, COUNTS, st.floats(0.3, 1))
@settings(max_examples=60)
def test_balanced_counts_have_those_shares_and_lose_no_word(first, second, alpha):
    counts = {"first": Counter(first), "second": Counter({f"x{word}": count for word, count in second.items()})}
    found, sizes = balance(counts, alpha), {name: words.total() for name, words in counts.items()}
    assert found.keys() == first.keys() | {f"x{word}" for word in second}
    assert all(found[word] >= count for words in counts.values() for word, count in words.items())
    assert any(all(found[word] == count for word, count in words.items()) for words in counts.values())
    of_second = sum(count for word, count in found.items() if word.startswith("x"))
    rounding = (len(first) + len(second)) / 2 / found.total()
    assert of_second / found.total() == pytest.approx(shares(sizes, alpha)["second"], abs=rounding + 1e-9)


def test_a_word_in_two_languages_counts_for_both():
    assert balance({"de": Counter({"in": 4}), "en": Counter({"in": 4, "it": 12})}, 1.0) == {"in": 8, "it": 12}


def test_scripts_are_those_of_words_with_letters():
    counts = {"Haus": 6, "дом": 2, "日本": 1, "カナ": 1, "123": 50, "—": 9}
    assert scripts_of(counts) == {"LATIN": 0.6, "CYRILLIC": 0.2, "CJK": 0.2}


@pytest.mark.parametrize(
    "language, word, other",
    [("ru", "дом", "LATIN"), ("ja", "ひと", "LATIN"), ("th", "ไทย", "LATIN"), ("de_AT", "Haus", "GREEK")],
)
def test_a_language_in_another_script_is_refused(language, word, other):
    foreign = {"LATIN": "house", "GREEK": "σπίτι"}[other]
    check_script(language, {word: 30, foreign: 70})
    with pytest.raises(InputError, match=f"90% of its words are in {other} letters, and {language} is written in"):
        check_script(language, {word: 10, foreign: 90})


def test_a_language_of_several_scripts_or_none_that_is_known_is_taken():
    for language in ("sr", "tlh", "ru-Latn"):
        check_script(language, {"house": 9})
    check_script("ru", {"12": 3})  # no letters
