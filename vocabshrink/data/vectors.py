"""Sentences drawn from a corpus and teachers' vectors of them, written once and read for as many epochs as wanted.

Vectors of several teachers are joined into one whose products are the weighted mean of the teachers' cosine
similarities. Sentences come from the text itself, not from the word stream, because every teacher has a tokenizer of
its own; lines that are held out give none. Vectors are float16 and memory-mapped, [N, D] a teacher."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tokenizer_build.corpus import read_lines, read_parallel
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, read_values, write_json, write_jsonl
from tokenizer_build.languages import factors, shares
from vocabshrink.data.held_out import Embed
from vocabshrink.run.engine import saying
from vocabshrink.run.recipe import CorpusSection, VectorsStage

BOUNDARY = re.compile(r"(?<=[.!?…][\"')\]”’])\s+|(?<=[.!?…])\s+|(?<=[。！？｡])")  # between two sentences of a line
CHARACTERS = (4, 600)  # of a sentence; longer ones are lists and tables
BLOCK = 4096  # sentences embedded before their vectors are on disk
SAMPLE = 8192  # stored vectors that the mean, the principal directions and the bank are taken from


@dataclass(frozen=True)
class Sentences:
    """Distinct sentences in random order, then translations. rows [N]: the vector that each learns: its own, or that of
    the sentence which it translates. times [N]: how often each comes in an epoch, by its language's share."""

    texts: list[str]
    rows: np.ndarray
    times: np.ndarray

    @property
    def own(self) -> list[str]:
        """Those that have a vector of their own, one to each row."""
        return self.texts[: 1 + int(self.rows.max())]

    def save(self, folder: Path) -> None:
        write_jsonl(folder / "sentences.jsonl", self.texts)
        save_file({"rows": self.rows, "times": self.times}, folder / "sentences.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Sentences":
        return cls(read_values(folder / "sentences.jsonl"), **load_file(folder / "sentences.safetensors"))


def draw_sentences(corpus: CorpusSection, section: VectorsStage, seed: int) -> Sentences:
    """Sentences (or lines) of the training lines, each source's or language's share drawn evenly, and all translations.
    Raises InputError for a corpus without any."""
    groups = list(corpus.languages.values()) or [[source] for source in corpus.sources]
    weights, drawn, sizes = section.shares or [1.0] * len(groups), [], {}
    numbers = iter(range(1, 2**63))  # of lines through all sources, as the word stream counts them
    for place, (sources, weight) in enumerate(zip(groups, weights, strict=True)):
        rng, kept, sizes[place] = random.Random(f"{seed} {place}"), [], 0
        # how many of a language stay, the sizes of all of them tell
        room = math.ceil(section.sentences * (1.0 if corpus.languages else weight / sum(weights)))
        lines = zip(read_lines(sources, corpus.column), numbers, strict=False)
        training = (line for line, number in lines if number % corpus.held_out_every)
        found = (text for line in training for text in sentences_of(line, whole=section.unit == "line"))
        for seen, sentence in enumerate(found, 1):
            sizes[place] = seen
            if seen <= room:
                kept.append(sentence)
            elif (at := rng.randrange(seen)) < room:  # Vitter's algorithm R: each has the same chance
                kept[at] = sentence
        if corpus.languages:
            rng.shuffle(kept)
        drawn.append(kept)
    portions = shares(sizes, corpus.alpha) if corpus.languages else dict.fromkeys(sizes, 1.0)
    group_of: dict[str, int] = {}
    for group, kept in enumerate(drawn):
        for sentence in kept[: math.ceil(section.sentences * portions[group])]:
            group_of.setdefault(sentence, group)
    if len(group_of) < 2:
        raise InputError("corpus: no sentence to take vectors of: check corpus.sources and corpus.column")
    texts = list(group_of)
    random.Random(seed).shuffle(texts)
    groups = [group_of[text] for text in texts[: section.sentences]]
    rows = {text: row for row, text in enumerate(texts[: section.sentences])}
    times = factors(Counter(groups), portions) if corpus.languages else dict.fromkeys(portions, 1.0)
    translations: list[tuple[str, int]] = []
    for first, *others in read_parallel(corpus.parallel) if corpus.parallel else ():
        translations += [(other, rows.setdefault(first, len(rows))) for other in others]
    texts = [*rows, *(text for text, _ in translations)]
    often = [times[group] for group in groups] + [1.0] * (len(texts) - len(groups))
    return Sentences(texts, np.array([*rows.values(), *(row for _, row in translations)]), np.array(often))


def sentences_of(line: str, *, whole: bool = False) -> Iterator[str]:
    """The sentences of a line (or, if `whole`, the line) that have letters and are neither too short nor too long."""
    least, most = CHARACTERS
    for part in [line] if whole else BOUNDARY.split(line):
        if least <= len(part := part.strip()) <= most and any(map(str.isalpha, part)):
            yield part


def behind_prompts(sentences: list[str], prompts: Iterable[tuple[str, float]]) -> list[str]:
    """The sentences, each behind one prompt or none. prompts: (what stands before, share of the sentences). They are
    spread evenly (Weyl's sequence of the golden ratio): any part of the sentences has about the same shares."""
    starts, shares = zip(*prompts, ("", 1.0), strict=True)
    bounds = np.cumsum(shares[:-1])
    places = np.arange(len(sentences)) * 0.6180339887498949 % 1
    return [starts[i] + text for i, text in zip(np.searchsorted(bounds, places, "right"), sentences, strict=True)]


def store_vectors(folder: Path, name: str, sentences: list[str], embed: Embed, what: str) -> None:
    """Writes `embed` of the sentences to folder/NAME.npy, [N, D] float16, going on where a killed run stopped. what:
    names them in what is said after each block."""
    path, state = folder / f"{name}.npy", folder / f"{name}.json"
    done = read_json(state)["done"] if state.is_file() else 0
    progress = saying(what, 1, len(sentences), done)
    while done < len(sentences):
        vectors = embed(sentences[done : done + BLOCK])
        mode, shape = "r+" if path.is_file() and done else "w+", (len(sentences), vectors.shape[1])
        file = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
        file[done : done + len(vectors)] = vectors
        file.flush()
        done += len(vectors)
        write_json(state, {"done": done})
        progress(len(vectors))


def stored_vectors(folder: Path, shares: dict[str, float], centered: set[str]) -> Callable[..., np.ndarray]:
    """Numbers of sentences (an array or a slice) -> several teachers' vectors as one, [n, D] float32 of unit length, D
    the sum of their widths; products are the weighted mean cosines. shares: {name of a teacher: its weight}. centered:
    the teachers whose mean is taken off, where their vectors share a direction that tells nothing."""
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in shares]
    samples = zip(shares, (array[:SAMPLE].astype(np.float32) for array in arrays), strict=True)
    means, total = [sample.mean(0) * (name in centered) for name, sample in samples], sum(shares.values())

    def rows(chosen: np.ndarray | slice) -> np.ndarray:
        parts = []
        for array, mean, share in zip(arrays, means, shares.values(), strict=True):
            vectors, scale = array[chosen].astype(np.float32) - mean, (share / total) ** 0.5
            parts.append(vectors * (scale / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)))
        return np.concatenate(parts, 1)

    return rows
