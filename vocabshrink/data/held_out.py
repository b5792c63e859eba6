"""How near is a model to its teacher: rank agreement, neighbour overlap, and human-rated similarity.

Held-out sentences come from lines that no training batch has seen. Rank agreement is the Spearman correlation of two
models' cosine similarities over pairs, three near pairs for each sentence (a rare word swapped, words dropped, half or
rotation) and as many random pairs as sentences: near pairs are where small vocabularies fail. Everything goes through
text, so that a delivered ONNX graph is measured by the path its users take.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Segments, gather_words, near_groups, rare_words
from vocabshrink.data.lexicon import Lexicon, WordStream

Embed = Callable[[list[str]], np.ndarray]
LEAST_SENTENCES = 20  # of which agreement and neighbours mean anything


@dataclass(frozen=True)
class HeldOut:
    """texts [4 n]: sentence i and its three near ones at 4 i .. 4 i + 3. pairs [k, 2]: indices into texts."""

    texts: list[str]
    pairs: np.ndarray

    def rank_agreement(self, student: np.ndarray, teacher: np.ndarray) -> float:
        """Spearman correlation of the two models' similarities over the pairs. Vectors are [4 n, D]."""
        return float(spearmanr(similarities(student, self.pairs), similarities(teacher, self.pairs)).statistic)

    def neighbour_overlap(self, student: np.ndarray, teacher: np.ndarray, top: int = 10) -> float:
        """Share of each sentence's `top` nearest other sentences that both models name."""
        first, second = (nearest(vectors[::4], top) for vectors in (student, teacher))
        return float(np.mean([len(np.intersect1d(a, b)) / first.shape[1] for a, b in zip(first, second, strict=True)]))


def held_out_texts(stream: WordStream, lexicon: Lexicon, segments: Segments, count: int, seed: int) -> HeldOut:
    """Draws sentences of 4 to 40 words and makes their near ones. Raises InputError where there are too few."""
    fitting = np.flatnonzero((segments.lengths >= 4) & (segments.lengths <= 40))
    if len(fitting) < LEAST_SENTENCES:
        raise InputError(
            f"corpus: only {len(fitting)} held-out sentences of 4 to 40 words: give more text or a smaller "
            "corpus.held_out_every"
        )
    rng = np.random.default_rng((seed, 2))
    chosen = np.sort(rng.permutation(fitting)[:count])
    count = len(chosen)
    words, sequence = near_groups(gather_words(stream, segments, chosen), count, rare_words(lexicon), rng)
    bounds = np.searchsorted(sequence, np.arange(4 * count + 1))
    texts = [" ".join(lexicon.words[w] for w in words[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    base = 4 * np.arange(count)
    near = [np.stack([base, base + j], 1) for j in (1, 2, 3)]
    return HeldOut(texts, np.concatenate([*near, np.stack([base, rng.permutation(base)], 1)]))


def similarities(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine similarity of each pair, [k]."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)


def nearest(vectors: np.ndarray, top: int) -> np.ndarray:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    top = min(top, len(vectors) - 1)
    return np.argpartition(-scores, top - 1, axis=1)[:, :top]


@dataclass(frozen=True)
class RatedPairs:
    """Sentence pairs with human scores."""

    first: list[str]
    second: list[str]
    scores: np.ndarray

    def spearman(self, embed: Embed) -> float:
        vectors = embed(self.first + self.second)
        count = len(self.first)
        pairs = np.stack([np.arange(count), np.arange(count) + count], 1)
        return float(spearmanr(similarities(vectors, pairs), self.scores).statistic)


def read_rated_pairs(path: str | Path) -> RatedPairs:
    """Reads JSONL rows with sentence1, sentence2 and label. Raises InputError with file, row and mend."""
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such evaluation file: correct evaluation.stsb or leave it out") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}: write the pairs as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                first, second, score = row["sentence1"], row["sentence2"], float(row["label"])
            except (KeyError, TypeError, ValueError):  # of which a JSON error is one
                first = second = score = None
            if not (isinstance(first, str) and isinstance(second, str) and math.isfinite(score)):
                raise InputError(f"{path}: row {number} needs sentence1, sentence2 and a numeric label")
            rows.append((first, second, score))
    if len(rows) < 2:
        raise InputError(f"{path}: no rated pairs: give rows with sentence1, sentence2 and label")
    first, second, scores = zip(*rows, strict=True)
    return RatedPairs(list(first), list(second), np.array(scores))
