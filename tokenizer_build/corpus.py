"""The corpus as a stream of lines, whatever files it lies in.

A line (in most corpora a paragraph) is the unit of everything downstream. Files are streamed (a JSON file that is one
array is read whole); folders and globs are sorted. Refused rather than guessed at: bytes that are not UTF-8, NUL bytes
(binary files, UTF-16), records without the column, rows with other numbers of cells than their header, and more than
LONGEST_LINE ASCII characters without white space (base64, a minified program), which no language has. Other long lines
are cut. Not done: guessing encodings, archives, cells of TSV that span lines."""

import csv
import glob
import io
import lzma
import os
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tokenizer_build.errors import InputError
from tokenizer_build.files import LARGEST_RECORD, decode, read_jsonl, text_lines

LONGEST_LINE = 1_000_000  # characters
CHUNK = 1 << 20  # bytes
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
TABLE = {".csv", ".tsv"}
JSONL = {".jsonl", ".ndjson", ".json"}
RECORDS = {".parquet", *JSONL, *TABLE}  # what has rows with fields
KNOWN = {".txt", ".text", ".md", ".rst", *RECORDS}  # what is read from a folder


def read_lines(sources: Sequence[str | Path], column: str = "text") -> Iterator[str]:
    """Yield the non-empty lines of all sources, in order, each at most LONGEST_LINE characters. A source is a file (of
    text, where its suffix is unknown), a folder (every corpus file below it), a glob, or `datasets:NAME[:CONFIG]:SPLIT`
    for a hub data set. `column` names the field of records that holds the text. Raises InputError, naming the file and
    the row or byte, for what the module refuses, and where there is no text at all."""
    empty = True
    for source in expand(sources):
        for place, text in _texts(source, column):
            for line in text.split("\n"):
                if line and not line.isspace():
                    empty = False
                    while len(line) > LONGEST_LINE:
                        end = _break(line[:LONGEST_LINE], place)
                        yield line[:end]
                        line = line[end:]
                    yield line
    if empty:
        named = ", ".join(map(str, sources)) or "an empty list"
        raise InputError(f"there is no text in {named}: give a file with text")


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
    for source in map(os.path.expanduser, [sources] if isinstance(sources, str | Path) else sources):
        path, found = Path(source), [source]
        if path.is_dir():
            below = [p for p in path.rglob("*") if p.is_file() and _format(p)[0] in KNOWN]
            found = [p for p in sorted(below) if not any(part[0] == "." for part in p.relative_to(path).parts)]
        elif not path.is_file() and not str(source).startswith("datasets:"):
            found = sorted(p for p in glob.glob(str(source), recursive=True) if Path(p).is_file())
        if not found:
            what = f"{source}: no such file, and no folder or glob with files of text ({' '.join(sorted(KNOWN))})"
            raise InputError(f"{what}: correct its path, or write datasets:NAME:SPLIT")
        out += map(str, found)
    return out


def _format(path: str | Path) -> tuple[str, str]:
    """(suffix that tells the format, suffix that tells the compression), either '' where there is none."""
    *_, last, end = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    return (last, end) if end in COMPRESSED else (end, "")


def read_rows(source: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (place for messages, record) of each row of a source of records; InputError for what is none."""
    for file in expand([source]):
        if not file.startswith("datasets:") and _format(file)[0] not in RECORDS:
            raise InputError(f"{file}: not one of {' '.join(sorted(RECORDS))}: write the rows in one of these formats")
        yield from _records(file, None)


def read_parallel(sources: Sequence[str | Path]) -> Iterator[list[str]]:
    """Each line's sentences, of TSV files without header; InputError naming the file and line without a translation."""
    for source in expand(sources):
        for number, line in enumerate(text_lines(source, _open(source, _format(source)[1])), 1):
            cells = [text for cell in _tsv_cells(line.rstrip("\r\n")) if (text := cell.strip())]
            if len(cells) > 1:
                yield cells
            elif cells:
                raise InputError(f"{source}: line {number} has no translation: write SENTENCE tab TRANSLATION")


def check_sources(sources: Sequence[str | Path], column: str = "text") -> None:
    """Raise InputError for a source that is not there, and for a file whose first record `read_lines` would refuse."""
    for source in expand(sources):
        if not source.startswith("datasets:"):  # a name on the hub is asked for when it is read
            next(_texts(source, column), None)


def _texts(source: str, column: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every record; a text file's records are megabytes of whole lines."""
    for place, record in _records(source, column):
        if column not in record:
            raise InputError(f"{place} has no column {column!r}: choose one of {', '.join(map(str, record))}")
        text = "" if record[column] is None else record[column]
        if not isinstance(text, str):
            raise InputError(f"{place}: {ascii(text):.60} is no text: correct it or choose another column")
        yield place, text


def _records(source: str, column: str | None) -> Iterator[tuple[str, dict]]:
    """(place, record) of a file; a text file's are megabytes of whole lines under `column`. None: all of parquet's."""
    (suffix, compression), unit, number = _format(source), "row", 0
    try:
        if source.startswith("datasets:"):
            records = enumerate(_hub_records(source), 1)
        elif suffix == ".parquet" and not compression:  # which it has inside
            records = enumerate(_parquet_records(source, column), 1)
        elif suffix in JSONL:
            records = read_jsonl(source, _open(source, compression))
        elif suffix in TABLE:
            records = _table(source, text_lines(source, _open(source, compression)), suffix)
        else:
            unit, records = "byte", _text_chunks(source, _open(source, compression), column)
        for number, record in records:
            yield f"{source}: {unit} {number}", record
    except (OSError, EOFError, csv.Error, lzma.LZMAError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        remedy = "double the quotes inside quotes" if isinstance(error, csv.Error) else "check that it is whole"
        raise InputError(f"{source} cannot be read after {unit} {number} ({error}): {remedy}") from error


def _open(path: str, compression: str):
    if compression == ".xz":
        return lzma.open(path)
    return io.BufferedReader(pyarrow.input_stream(path, compression=COMPRESSED.get(compression)))  # which reads lines


def _text_chunks(path: str, opened, column: str) -> Iterator[tuple[int, dict]]:
    """(offset, text) of about a megabyte each, ending where a line does or, inside a very long one, at white space."""
    offset, rest = 0, b""
    with opened as file:
        while raw := rest + file.read(CHUNK) + file.readline(4 * LONGEST_LINE):
            end = len(raw)
            if raw[-1:] != b"\n" and end > 4 * LONGEST_LINE:  # bytes: over LONGEST_LINE characters of one line
                text = raw.decode("utf-8", "ignore")
                end = len(text[: _break(text, f"{path}: byte {offset}")].encode())
            yield offset, {column: decode(raw[:end], path, offset)}
            offset, rest = offset + end, raw[end:]


def _table(path: str, lines: Iterator[str], suffix: str) -> Iterator[tuple[int, dict]]:
    """(row number, record) of a CSV or TSV file; row 1 is the header. A CSV file's delimiter is the likeliest of its
    header. A TSV file's lines are its rows, whatever quotes they hold: most writers of TSV leave those as they are."""
    if suffix == ".tsv":
        rows = (_tsv_cells(line.rstrip("\r\n")) if line.strip() else [] for line in lines)
    else:
        csv.field_size_limit(LARGEST_RECORD)  # the standard library's own limit is 131,072 characters
        first = next(lines, "")
        rows = csv.reader(chain([first], lines), delimiter=max(",;\t|", key=first.count), strict=True)
    numbered = ((number, cells) for number, cells in enumerate(rows, 1) if cells)
    _, header = next(numbered, (0, []))
    if len(set(header)) < len(header):
        raise InputError(f"{path}: the header names a column twice: {', '.join(header)}: rename one")
    for number, cells in numbered:
        if len(cells) != len(header):
            raise InputError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}: quote delimiters")
        yield number, dict(zip(header, cells, strict=True))


def _tsv_cells(line: str) -> list[str]:
    """The cells of a line: as CSV has them, or split at tabs where quotes do not enclose whole cells."""
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return line.split("\t")


def _parquet_records(path: str, column: str | None) -> Iterator[dict]:
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


def _break(text: str, place: str) -> int:
    """Where to cut a text: behind its last ASCII white space, or between two of its last characters where their script
    may write none; not before a combining mark."""
    if end := max(map(text.rfind, " \t\r\n")) + 1:
        return end
    for end in range(len(text) - 1, max(0, len(text) - 300), -1):
        if not text[end - 1].isascii() and unicodedata.category(text[end])[0] != "M":
            return end
    raise InputError(f"{place}: over {LONGEST_LINE} characters without white space are no text: remove them")
