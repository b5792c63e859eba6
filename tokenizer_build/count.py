"""Word counts of a corpus of any size: exactly the words that `make_normalizer` + BertPreTokenizer see.

The text is split at ASCII white space, and only a block's distinct chunks further: ASCII ones by a regular expression,
all others by `tokenizers` itself. That is exact because both steps of a BERT tokenizer, and Unicode's normal forms, act
on each character or combining sequence alone. (`str.split()` would also split at \\x1c-\\x1f and \\x85, which
BertNormalizer deletes.)

Memory: two blocks per process and the counts. Once there are more than `maximum` distinct words (10 M, about 1.5 GB),
the rarest are dropped until half is left (lossy counting, Manku & Motwani 2002); frequent words stay exact."""

import os
import re
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import pyarrow
import pyarrow.parquet
from tokenizers.pre_tokenizers import BertPreTokenizer

from tokenizer_build.corpus import read_blocks
from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing
from tokenizer_build.tokenizer import FORMS, make_normalizer

ASCII_WORDS = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
ASCII_CONTROL = dict.fromkeys([*range(0x20), 0x7F])
SPLIT = BertPreTokenizer()
NORMALIZERS = {(case, form): make_normalizer(case, form) for case in (True, False) for form in (None, *FORMS)}
MOST_WORDS = 10_000_000  # distinct ones
COLUMNS = pyarrow.schema({"word": pyarrow.string(), "count": pyarrow.int64()})


def count_words(
    sources: Sequence[str | Path],
    *,
    column: str = "text",
    lowercase: bool = True,
    form: str | None = None,
    processes: int = 1,
    maximum: int = MOST_WORDS,
    progress: Callable[[int], None] = lambda words: None,
) -> Counter[str]:
    """Count the words of `sources` (see `corpus.read_lines`), alike on any number of processes. form: see
    `make_normalizer`. maximum: distinct words that are kept. progress: called with the words of each block counted."""
    counts: Counter[str] = Counter()
    blocks = read_blocks(sources, column)
    for words in map_in_order(partial(count_block, lowercase=lowercase, form=form), blocks, processes):
        fold(counts, words, maximum)
        progress(sum(words.values()))
    return counts


def map_in_order(function: Callable, items: Iterable, processes: int) -> Iterator:
    """Yield `function(item)` of every item, in order, computed by `processes` processes (1: by this one). They are
    spawned (so a script needs its `if __name__ == "__main__":`), since forking a process that has threads can hang."""
    if processes <= 1:
        yield from map(function, items)
        return
    waiting: deque = deque()
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a worker process was killed, perhaps for want of memory: run again, on fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it does, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def count_block(lines: Iterable[str], lowercase: bool = True, form: str | None = None) -> dict[str, int]:
    """Count the words of some lines, in the order in which they first occur."""
    text = " ".join(lines).replace("\n", " ").replace("\t", " ").replace("\r", " ")
    words: dict[str, int] = {}
    for chunk, count in Counter(text.split(" ")).items():
        for word in split_chunk(chunk, lowercase, form):
            words[word] = words.get(word, 0) + count
    return words


def split_chunk(chunk: str, lowercase: bool = True, form: str | None = None) -> Sequence[str]:
    """The words of a chunk that holds no space, tab, newline or carriage return."""
    if not chunk.isascii():
        return _split_unicode(chunk, lowercase, form)
    chunk = chunk.lower() if lowercase else chunk
    if chunk.isalnum():
        return (chunk,)
    return ASCII_WORDS.findall(chunk if chunk.isprintable() else chunk.translate(ASCII_CONTROL))


@lru_cache(maxsize=1 << 17)
def _split_unicode(chunk: str, lowercase: bool, form: str | None) -> tuple[str, ...]:
    return tuple(word for word, _ in SPLIT.pre_tokenize_str(NORMALIZERS[lowercase, form].normalize_str(chunk)))


def fold(counts: Counter[str], words: Mapping[str, int], maximum: int) -> None:
    """Add a block's words to the counts; beyond `maximum` words keep the most frequent half of it."""
    counts.update(words)
    threshold = 0
    while len(counts) > (maximum // 2 if threshold else maximum):
        threshold += 1
        for word in [word for word, count in counts.items() if count == threshold]:
            del counts[word]


def write_counts(counts: Mapping[str, int], path: str | Path) -> None:
    """Write the counts as parquet with the columns `word` and `count`, most frequent first, ties by word."""
    words = sorted(counts, key=lambda word: (-counts[word], word))
    table = pyarrow.table({"word": words, "count": [counts[word] for word in words]}, schema=COLUMNS)
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def read_counts(*paths: str | Path) -> Counter[str]:
    """The sum of what `write_counts` wrote; of one file, most frequent first. Raises InputError for any other file."""
    counts: Counter[str] = Counter()
    for path in paths:
        try:
            words = pyarrow.parquet.read_table(path).select(COLUMNS.names).to_pydict()
        except (OSError, KeyError, pyarrow.ArrowException):
            raise InputError(f"{path} holds no word counts or is missing: run `tokenizer_build count`") from None
        fold(counts, dict(zip(*words.values(), strict=True)), MOST_WORDS)
    return counts
