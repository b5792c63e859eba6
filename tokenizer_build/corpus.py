"""The corpus as a stream of lines, whatever files it lies in.

A line (in most corpora a paragraph) is the unit of everything downstream. Text, JSONL, CSV/TSV and parquet files are
streamed, so memory does not grow with the corpus. Folders and globs are sorted: the same stream on every machine.

Refused rather than guessed at: bytes that are not UTF-8, NUL bytes (binary files, UTF-16), records without the column,
and more than LONGEST_LINE characters without white space (base64, a minified program): that is no language, and a word
of that length costs every later stage memory. Longer lines that do have white space are cut there. Not done: guessing
encodings, archives of several files, JSON files that are one array.
"""

import csv
import glob
import io
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tokenizer_build.errors import InputError
from tokenizer_build.files import LARGEST_RECORD, decode, read_jsonl, text_lines

LONGEST_LINE = 1_000_000  # characters
CHUNK = 1 << 20  # bytes
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
TABLE = {".csv": ",", ".tsv": "\t"}
JSONL = {".jsonl", ".ndjson", ".json"}
KNOWN = {".txt", ".text", ".md", ".rst", ".parquet", *JSONL, *TABLE}  # what is read from a folder
NO_WHITE_SPACE = f"more than {LONGEST_LINE} characters without white space are no text: remove them or break them up"


def read_lines(sources: Sequence[str | Path], column: str = "text") -> Iterator[str]:
    """Yield the non-empty lines of all sources, in order, each at most LONGEST_LINE characters.

    A source is a file, a folder (every corpus file below it, sorted by path), a glob, or `datasets:NAME[:CONFIG]:SPLIT`
    for a hub data set, which is streamed. `column` names the field of JSONL, CSV, parquet and hub records that holds
    the text. A file with an unknown suffix is read as text. Raises InputError, naming the file and the row or byte, for
    whatever the module docstring refuses, and when there is no text in any source.
    """
    empty = True
    for source in expand(sources):
        for place, text in _texts(source, column):
            for line in text.split("\n"):
                if line and not line.isspace():
                    empty = False
                    yield from (line,) if len(line) <= LONGEST_LINE else _cut(line, place)
    if empty:
        raise InputError(
            f"there is no text in {', '.join(map(str, sources)) or 'an empty list'}: give a file with text"
        )


def read_blocks(sources: Sequence[str | Path], column: str = "text", length: int = 4_000_000) -> Iterator[list[str]]:
    """Group `read_lines` into lists of at least `length` characters, the last one excepted."""
    block, size = [], 0
    for line in read_lines(sources, column):
        block.append(line)
        size += len(line)
        if size >= length:
            yield block
            block, size = [], 0
    if block:
        yield block


def expand(sources: Sequence[str | Path]) -> list[str]:
    """The files and hub names that the sources stand for; InputError for a source that stands for nothing."""
    out: list[str] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        path, found = Path(source), [source]
        if path.is_dir():
            below = [p for p in path.rglob("*") if p.is_file() and _format(p)[0] in KNOWN]
            found = [p for p in sorted(below) if not any(part[0] == "." for part in p.relative_to(path).parts)]
        elif not path.is_file() and not str(source).startswith("datasets:"):
            found = sorted(p for p in glob.glob(str(source), recursive=True) if Path(p).is_file())
        if not found:
            what = f"{source} does not exist or holds no corpus file ({' '.join(sorted(KNOWN))}, plain or compressed)"
            raise InputError(f"{what}: name a file, a folder, a glob that matches, or datasets:NAME:SPLIT")
        out += map(str, found)
    return out


def _format(path: str | Path) -> tuple[str, str]:
    """(suffix that tells the format, suffix that tells the compression), either '' where there is none."""
    *_, last, end = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    return (last, end) if end in COMPRESSED else (end, "")


def _texts(source: str, column: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every record; a text file's records are megabytes of whole lines."""
    (suffix, compression), unit, number = _format(source), "row", 0
    try:
        if source.startswith("datasets:"):
            records = enumerate(_hub_records(source), 1)
        elif suffix == ".parquet" and not compression:  # which it has inside
            records = enumerate(_parquet_records(source, column), 1)
        elif suffix in JSONL:
            records = read_jsonl(source, _open(source, compression))
        elif suffix in TABLE:
            csv.field_size_limit(LARGEST_RECORD)  # the standard library's own limit is 131,072 characters
            lines = text_lines(source, _open(source, compression))
            records = enumerate(csv.DictReader(lines, delimiter=TABLE[suffix], strict=True), 2)  # row 1 is the header
        else:
            unit, records = "byte", _text_chunks(source, _open(source, compression), column)
        for number, record in records:
            place = f"{source}, {unit} {number}"
            if column not in record:
                raise InputError(f"{place} has no column {column!r}: choose one of {', '.join(map(str, record))}")
            text = "" if record[column] is None else record[column]
            try:
                str.encode(text)
            except (TypeError, UnicodeEncodeError):  # the latter: half a surrogate pair, which JSON can write
                raise InputError(
                    f"{place}: {ascii(text):.60} is no text: correct it or choose another column"
                ) from None
            yield place, text
    except (OSError, EOFError, csv.Error, lzma.LZMAError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        what = f"{source} cannot be read after {unit} {number} ({error})"
        raise InputError(f"{what}: check that it is there, whole and UTF-8") from error


def _open(path: str, compression: str):
    if compression == ".xz":
        return lzma.open(path)
    # pyarrow decompresses the others; the buffer, unlike its stream, reads lines
    return io.BufferedReader(pyarrow.input_stream(path, compression=COMPRESSED.get(compression)))


def _text_chunks(path: str, opened, column: str) -> Iterator[tuple[int, dict]]:
    """(offset, text) of about a megabyte each, ending where a line does or, inside a very long one, at white space."""
    offset, rest = 0, b""
    with opened as file:
        while raw := rest + file.read(CHUNK) + file.readline(4 * LONGEST_LINE):
            end = len(raw)
            if raw[-1:] != b"\n" and end > 4 * LONGEST_LINE:  # bytes: over LONGEST_LINE characters of one line
                end = max(map(raw.rfind, (b" ", b"\t", b"\r", b"\n"))) + 1
                if not end:
                    raise InputError(f"{path}, byte {offset}: {NO_WHITE_SPACE}")
            yield offset, {column: decode(raw[:end], path, offset)}
            offset, rest = offset + end, raw[end:]


def _parquet_records(path: str, column: str) -> Iterator[dict]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(batch_size=256, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _hub_records(source: str) -> Iterator[dict]:
    import datasets  # slow to import, and seldom needed

    _, *name, split = source.split(":")
    if len(name) not in (1, 2) or not all([*name, split]):
        raise InputError(f"{source}: write datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT")
    try:
        return iter(datasets.load_dataset(*name, split=split, streaming=True))
    except ValueError as error:  # no such configuration or split
        raise InputError(f"{source} cannot be read ({error}): check name, configuration and split") from error


def _cut(line: str, place: str) -> Iterator[str]:
    """Cut a long line at the last ASCII white space (a word's end in every tokenizer) within LONGEST_LINE."""
    start = 0
    while len(line) - start > LONGEST_LINE:
        end = max(line.rfind(white, start, start + LONGEST_LINE) for white in " \t\r")
        if end <= start:
            raise InputError(f"{place}: {NO_WHITE_SPACE}")
        yield line[start:end]
        start = end + 1
    yield line[start:]
