"""How near is a model to its teacher: rank agreement, neighbour overlap, and human-rated similarity.

Held-out sentences come from lines that no training batch has seen. Rank agreement is the Spearman correlation of two
models' cosine similarities over pairs: for each sentence three near pairs (see `near_groups`), where small vocabularies
fail, and one random pair. Everything goes through text, the path that a delivery's users take."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from scipy.stats import spearmanr
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer

from tokenizer_build.corpus import read_rows
from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Segments, gather_words, near_groups, rare_words
from vocabshrink.data.lexicon import UNSPACED, Lexicon, WordStream
from vocabshrink.data.tasks import Rows

Embed = Callable[[list[str]], np.ndarray]
LEAST_SENTENCES = 20  # below this many, agreement and neighbours mean nothing
LEAST_WORDS, MOST_WORDS = 4, 40  # of a held-out sentence
FEW = f"corpus: only {{}} sentences of {LEAST_WORDS} words or more, {{}} are needed: give more text or hold out more"


@dataclass(frozen=True)
class HeldOut:
    """texts [4 n]: sentence i and its three near ones at 4 i .. 4 i + 3. pairs [k, 2]: indices into texts. languages:
    {language: which of the n sentences are of it}, where there are at least LEAST_SENTENCES."""

    texts: list[str]
    pairs: np.ndarray
    languages: dict[str, np.ndarray] = field(default_factory=dict)

    def rank_agreement(self, student: np.ndarray, teacher: np.ndarray) -> float:
        """Spearman correlation of the two models' similarities over the pairs. Vectors are [4 n, D]."""
        return float(spearmanr(similarities(student, self.pairs), similarities(teacher, self.pairs)).statistic)

    def neighbour_overlap(self, student: np.ndarray, teacher: np.ndarray, top: int = 10) -> dict[str, float]:
        """{"neighbour_overlap": share of each sentence's `top` nearest other sentences that both models name}, and
        the same among the sentences of each language, as neighbour_overlap_LANGUAGE."""
        groups, found = {"": np.arange(len(student) // 4)}, {}
        groups |= {f"_{language}": chosen for language, chosen in self.languages.items()}
        for name, chosen in groups.items():
            neighbours = NearestNeighbors(n_neighbors=min(top, len(chosen) - 1), metric="cosine", algorithm="brute")
            both = [neighbours.fit(of[4 * chosen]).kneighbors(return_distance=False) for of in (student, teacher)]
            shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(*both, strict=True)]
            found[f"neighbour_overlap{name}"] = float(np.mean(shared))
        return found


def held_out_texts(
    stream: WordStream, lexicon: Lexicon, teacher: Tokenizer, segments: Segments, count: int, seed: int, languages: dict
) -> HeldOut:
    """Draws sentences of 4 to 40 words (or, where they are too few, the first words of longer ones too) and makes their
    near ones, as text that the teacher's tokenizer reads as it read the corpus. languages: {language: the numbers of
    its segments}, from each of which as many are drawn. Raises InputError if there are too few."""
    long = segments.lengths >= LEAST_WORDS
    if (fits := long & (segments.lengths <= MOST_WORDS)).sum() < LEAST_SENTENCES:
        fits, segments = long, replace(segments, lengths=np.minimum(segments.lengths, MOST_WORDS))
    if len(fitting := np.flatnonzero(fits)) < LEAST_SENTENCES:
        raise InputError(FEW.format(len(fitting), LEAST_SENTENCES))
    rng = np.random.default_rng((seed, 2))
    shuffled = rng.permutation(fitting)
    groups = [shuffled[np.isin(shuffled, numbers)] for numbers in languages.values()] or [shuffled]
    chosen = np.sort(np.concatenate([group[: -(-count // len(groups))] for group in groups])[:count])
    near = near_groups(gather_words(stream, segments, chosen), rare_words(lexicon), rng)
    bounds = np.searchsorted(near.numbers, np.arange(1, near.count))
    apart = behind_spaces(lexicon, teacher)
    texts = [text_of(lexicon, words, apart) for words in np.split(near.words, bounds)]
    base = 4 * np.arange(len(chosen))
    partners = np.concatenate([base + 1, base + 2, base + 3, rng.permutation(base)])
    own = {name: np.flatnonzero(np.isin(chosen, numbers)) for name, numbers in languages.items()}
    enough = {name: found for name, found in own.items() if len(found) >= LEAST_SENTENCES}
    return HeldOut(texts, np.stack([np.tile(base, 4), partners], 1), enough)


def behind_spaces(lexicon: Lexicon, teacher: Tokenizer) -> np.ndarray:
    """[W] bool: words before which the teacher read a space or, where its pieces do not tell, may have."""
    offsets, told = lexicon.teacher_offsets, lexicon.meta["teacher"]["family"] in ("byte-level", "metaspace")
    pieces = [teacher.id_to_token(number) or "" for number in range(1 + lexicon.teacher_ids.max(initial=0))]
    opens = np.array([p.startswith(("\u2581", "\u0120")) if told else not p.startswith("##") for p in pieces])
    return opens[np.append(lexicon.teacher_ids, 0)[offsets[:-1]]] | (np.diff(offsets) == 0)


def text_of(lexicon: Lexicon, words: np.ndarray, apart: np.ndarray) -> str:
    """Words as a sentence, with a space before those that are `apart`, and where letters would make one word of two."""
    text = ""
    for surface, spaced in zip(map(lexicon.words.__getitem__, words), apart[words], strict=True):
        letters = text[-1:].isalnum() and surface[:1].isalnum() and not UNSPACED.search(text[-1:] + surface[:1])
        apart_here = spaced and not surface.isspace() or letters
        text += " " * bool(text and apart_here) + surface
    return text


def similarities(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine similarity of each pair, [k]."""
    unit = normalize(vectors)
    return (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)


def similarities_of_rows(rows: Rows, embed: Embed) -> np.ndarray:
    """Cosine similarity of the model's vectors of each row's two sentences, [R]."""
    return similarities(embed(rows.first + rows.second), np.arange(2 * len(rows)).reshape(2, -1).T)


def spearman(rated: Rows, embed: Embed) -> float:
    """Spearman correlation of the model's similarities and the scores of human beings."""
    return float(spearmanr(similarities_of_rows(rated, embed), rated.targets).statistic)


def read_rated_pairs(path: str | Path) -> Rows:
    """Pairs with a human score: rows with sentence1, sentence2 and a finite label. Raises InputError for any other."""
    rows, fields = [], TypeAdapter(tuple[str, str, FiniteFloat])
    for place, row in read_rows(path):
        try:
            rows.append(fields.validate_python(tuple(map(row.get, ("sentence1", "sentence2", "label")))))
        except ValidationError:
            raise InputError(f"{place} needs sentence1, sentence2 and a numeric label") from None
    if len(rows) < 2:
        raise InputError(f"{path}: no rated pairs: give rows with sentence1, sentence2 and label")
    first, second, scores = map(list, zip(*rows, strict=True))
    return Rows(first, second, np.array(scores))
