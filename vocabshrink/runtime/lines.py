"""Lines of text in, lines of JSON out: what `vocabshrink embed` and `vocabshrink classify` do with a stream."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TextIO

from tokenizer_build.errors import InputError
from vocabshrink.runtime.delivery import Text, check_text, load

LINES_AT_ONCE = 1_024  # of standard input: enough to sort by length, few enough that answers keep coming
ANSWERS = {"embed": ["embedding"], "classify": ["label", "scores"], "label_tokens": ["words"]}


def answer_lines(
    command: str, folder: str | Path, lines: Iterable[str | bytes], out: TextIO, *, threads: int = 1, **options
) -> int:
    """Write an answer to `out` as JSONL for each line of what may be an endless stream, in order; the number of lines.
    "embed" writes {"text", "embedding"}; "classify" a classifier's {"text", "label", "scores": {label: score}} or a
    tagger's {"text", "words"}; all of them are null for an empty line. A line with exactly one tab is a pair where the
    model was trained on pairs. options: of `Delivery`'s method. Raises InputError with the number of a line
    that cannot be read, after the answers to those before it."""
    model, lines, done = load(folder, threads), iter(lines), 0
    method = "label_tokens" if command == "classify" and model.task == "tokens" else command
    pairs = method == "classify" and model.manifest.get("pairs", False)
    while block := list(islice(lines, LINES_AT_ONCE)):
        rows, bad = [], None
        try:
            for number, line in enumerate(block, done + 1):
                rows.append(_read(number, line, pairs))
        except InputError as error:
            bad = error  # said when the lines before it are answered
        found = getattr(model, method)([asked for _, asked in rows if asked], **options)
        if method == "embed":
            answers = ([[float(f"{x:.7g}") for x in row]] for row in found)
        elif method == "label_tokens":
            answers = ([words] for words in found)
        else:
            scores = (dict(zip(model.labels, map(float, row), strict=True)) for row in found[1])
            answers = zip(found[0], scores, strict=True)
        for text, asked in rows:
            answer = zip(ANSWERS[method], next(answers), strict=True) if asked else dict.fromkeys(ANSWERS[method])
            out.write(json.dumps({"text": text, **dict(answer)}, ensure_ascii=False) + "\n")
        out.flush()
        if bad:
            raise bad
        done += len(block)
    return done


def _read(number: int, line: str | bytes, pairs: bool) -> tuple[str, Text | None]:
    """The line as text, and what the model is asked: the text, a pair, or None where the line is empty."""
    try:
        text = (line if isinstance(line, str) else line.decode("utf-8")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"line {number} is not UTF-8 (byte {error.start}): convert it first") from error
    parts = tuple(text.split("\t")) if pairs and text.count("\t") == 1 else (text,)
    for part in parts if text.strip() else ():
        check_text(f"line {number}", part)
    return text, (parts if len(parts) == 2 else text) if text.strip() else None
