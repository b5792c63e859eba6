"""Several languages in one corpus: their shares of it, and the scripts that they are written in.

A script is the first word of a letter's Unicode name (LATIN, CYRILLIC, CJK): no package, no guess at a language."""

import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json

# {script: languages (ISO 639) of this one script}; of those that are not here, any script is taken.
LANGUAGES = read_json(Path(__file__).with_name("scripts.json"))
SAME = dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "HALFWIDTH", "BOPOMOFO"), "CJK")
SAME |= {"FULLWIDTH": "LATIN", "MODIFIER": ""}
LEAST_OWN = 0.25  # share of a language's words that are in its script; the rest may be names, code, quotations


def shares(sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
    """Each language's share where it is proportional to its size to the power alpha: 1 leaves sizes as they are, less
    gives small languages more (Conneau et al. 2020, arXiv 1911.02116, section 3.1, where alpha is 0.3)."""
    powers = {language: size**alpha if size else 0.0 for language, size in sizes.items()}
    return {language: power / sum(powers.values()) for language, power in powers.items()}


def factors(sizes: Mapping[str, int], wanted: Mapping[str, float]) -> dict[str, float]:
    """How often each language is taken for its wanted share: the one with most of it once, the others more often."""
    scales = {language: wanted[language] / size for language, size in sizes.items() if size}
    return {language: scale / min(scales.values()) for language, scale in scales.items()}


def balance(counts: Mapping[str, Counter[str]], alpha: float) -> Counter[str]:
    """The word counts of several languages as one, each scaled up to its share of `shares`."""
    sizes, found = {language: words.total() for language, words in counts.items()}, Counter()
    for language, factor in factors(sizes, shares(sizes, alpha)).items():
        found.update({word: round(count * factor) for word, count in counts[language].items()})
    return found


def script_of(word: str) -> str | None:
    """The script of a word's first letter; None for a word without one."""
    letter = next(filter(str.isalpha, word), None)
    script = unicodedata.name(letter, "").split(" ")[0] if letter else ""
    return SAME.get(script, script) or None


def scripts_of(counts: Mapping[str, int]) -> dict[str, float]:
    """{script: its share of the words that have letters}, the largest first."""
    found: Counter[str] = Counter()
    for word, count in counts.items():
        if script := script_of(word):
            found[script] += count
    return {script: count / found.total() for script, count in found.most_common()}


def check_script(language: str, counts: Mapping[str, int]) -> None:
    """Raises InputError where a language of `LANGUAGES` is hardly ever in its script."""
    found, known = scripts_of(counts), language.lower().replace("_", "-").split("-")[0]
    script = next((script for script, names in LANGUAGES.items() if known in names), None)
    if script and found and found.get(script, 0.0) < LEAST_OWN and "-" not in language:
        most, share = next(iter(found.items()))
        fault = f"{share:.0%} of its words are in {most} letters, and {language} is written in {script} ones"
        raise InputError(f"{fault}: correct the language or its files")
