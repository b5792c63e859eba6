"""Lines of text in, lines of JSON out: what `vocabshrink embed` and `vocabshrink classify` do with a stream."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TextIO

from tokenizer_build.errors import InputError
from vocabshrink.runtime.delivery import Delivery, Text, check_text, load

LINES_AT_ONCE = 1_024  # of standard input: enough to sort by length, few enough that answers keep coming
NO_ANSWER = {"embed": ["embedding"], "classify": ["label", "scores"], "label_tokens": ["words"]}  # to an empty line


def embed_lines(
    folder: str | Path, lines: Iterable[str | bytes], out: TextIO, *, batch_size: int = 32, threads: int = 1
) -> int:
    """Write {"text", "embedding"} to `out` as JSONL, one for each line, in order; the number of lines.

    `lines` may be an endless stream: it is read LINES_AT_ONCE at a time. An empty line's embedding is null.
    Raises InputError with the line's number.
    """
    return _answer_lines(load(folder, threads), "embed", lines, out, batch_size)


def classify_lines(
    folder: str | Path, lines: Iterable[str | bytes], out: TextIO, *, batch_size: int = 32, threads: int = 1
) -> int:
    """As embed_lines: a classifier's {"text", "label", "scores": {label: score}}, a tagger's {"text", "words"}.

    Where the manifest says that the model was trained on pairs, a line with exactly one tab is read as a pair.
    """
    model = load(folder, threads)
    return _answer_lines(model, "label_tokens" if model.task == "tokens" else "classify", lines, out, batch_size)


def _answer_lines(model: Delivery, method: str, lines: Iterable[str | bytes], out: TextIO, batch_size: int) -> int:
    lines, done = iter(lines), 0
    pairs = method == "classify" and model.manifest.get("pairs", False)
    while block := list(islice(lines, LINES_AT_ONCE)):
        texts = [_line(number, line) for number, line in enumerate(block, done + 1)]
        asked = [_asked(number, text, pairs) for number, text in enumerate(texts, done + 1) if text.strip()]
        answers = iter(_answers(model, method, asked, batch_size))
        for text in texts:
            answer = next(answers) if text.strip() else dict.fromkeys(NO_ANSWER[method])
            out.write(json.dumps({"text": text, **answer}, ensure_ascii=False) + "\n")
        out.flush()
        done += len(block)
    return done


def _answers(model: Delivery, method: str, texts: list[Text], batch_size: int) -> list[dict]:
    if method == "embed":
        return [{"embedding": [float(f"{x:.7g}") for x in row]} for row in model.embed(texts, batch_size)]
    if method == "label_tokens":
        return [{"words": words} for words in model.label_tokens(texts, batch_size)]
    return [
        {"label": label, "scores": dict(zip(model.labels, map(float, row), strict=True))}
        for label, row in zip(*model.classify(texts, batch_size), strict=True)
    ]


def _line(number: int, line: str | bytes) -> str:
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"line {number} is not UTF-8 (byte {error.start}): convert it first") from error
    return text.rstrip("\r\n")


def _asked(number: int, text: str, pairs: bool) -> Text:
    parts = tuple(text.split("\t")) if pairs and text.count("\t") == 1 else (text,)
    for part in parts:
        check_text(f"line {number}", part)
    return parts if len(parts) == 2 else text
