"""TODO: runtime.lines."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TextIO

from tokenizer_build.errors import InputError
from vocabshrink.runtime.delivery import Delivery, check_text, load

LINES_AT_ONCE = 1_024  # of standard input: enough to sort by length, few enough that answers keep coming


def embed_lines(
    folder: str | Path, lines: Iterable[str | bytes], out: TextIO, *, batch_size: int = 32, threads: int = 1
) -> int:
    """Write {"text", "embedding"} to `out` as JSONL, one for each line, in order; the number of lines.

    `lines` may be an endless stream: it is read LINES_AT_ONCE at a time. Raises InputError with the line's number.
    """
    model = load(folder, threads)
    return _answer_lines(model, "embed", lines, out, batch_size)


def classify_lines(
    folder: str | Path, lines: Iterable[str | bytes], out: TextIO, *, batch_size: int = 32, threads: int = 1
) -> int:
    """As embed_lines, of a classifier {"text", "label", "scores": {label: score}}, of a tagger {"text", "words"}.

    A line with one tab is a pair of sentences where the model was trained on pairs or not: it is two segments.
    """
    model = load(folder, threads)
    return _answer_lines(model, "label_tokens" if model.task == "tokens" else "classify", lines, out, batch_size)


def _answer_lines(model: Delivery, method: str, lines: Iterable[str | bytes], out: TextIO, batch_size: int) -> int:
    lines, done = iter(lines), 0
    while block := list(islice(lines, LINES_AT_ONCE)):
        texts = [_line(done + place + 1, line) for place, line in enumerate(block)]
        if method == "embed":
            answers = [{"embedding": [float(f"{x:.7g}") for x in row]} for row in model.embed(texts, batch_size)]
        elif method == "label_tokens":
            answers = [{"words": words} for words in model.label_tokens(texts, batch_size)]
        else:
            pairs = [tuple(text.split("\t")) if text.count("\t") == 1 else text for text in texts]
            best, scores = model.classify(pairs, batch_size)
            answers = [
                {"label": label, "scores": dict(zip(model.labels, map(float, row), strict=True))}
                for label, row in zip(best, scores, strict=True)
            ]
        for text, answer in zip(texts, answers, strict=True):
            out.write(json.dumps({"text": text, **answer}, ensure_ascii=False) + "\n")
        out.flush()
        done += len(block)
    return done


def _line(number: int, line: str | bytes) -> str:
    if isinstance(line, bytes):
        try:
            line = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} is not UTF-8 (byte {error.start}): convert it first") from error
    line = line.rstrip("\r\n")
    check_text(f"line {number}", line)
    return line
