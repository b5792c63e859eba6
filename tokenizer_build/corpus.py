"""The corpus as a stream of lines, whatever files it lies in.

A line (in most corpora a paragraph) is the unit of everything downstream: counting, encoding, training.
Text, JSONL, CSV/TSV and parquet files are read in pieces of about a megabyte, so memory does not grow with
the corpus; gzip, bzip2 and xz go through the standard library, zstandard and lz4 through pyarrow. Folders
and globs are expanded and sorted, so the same files give the same stream on every machine.

Refused rather than guessed at: bytes that are not UTF-8, NUL bytes in text, JSONL and CSV files (binary
files and UTF-16), records without the column, and a run of more than LONGEST_LINE characters without white
space (base64, a minified program): it is no language, and a word of that length costs every later stage
memory. Longer lines that do have white space are cut there. Not done: guessing encodings, reading archives
of several files, JSON files that are one big array.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizer_build.errors import InputError

LONGEST_LINE = 1_000_000  # characters
LARGEST_RECORD = 256_000_000  # bytes of one JSONL or CSV line; the only thing read whole
CHUNK = 1 << 20  # bytes

TEXT = {".txt", ".text", ".md", ".rst"}
JSONL = {".jsonl", ".ndjson", ".json"}
TABLE = {".csv": ",", ".tsv": "\t"}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None, ".lz4": None}


def read_lines(sources: Sequence[str | Path], column: str = "text") -> Iterator[str]:
    """Yield the non-empty lines of all sources, in order, each at most LONGEST_LINE characters.

    A source is a file, a folder (every corpus file below it, sorted by path), a glob, or
    `datasets:NAME[:CONFIG]:SPLIT` for a hub data set, which is streamed. `column` names the field of JSONL,
    CSV, parquet and hub records that holds the text; newlines inside it separate lines. A file with an
    unknown suffix is read as text.

    Raises InputError, naming the file and the line or byte, for whatever the module docstring refuses, and
    when there is no text in any source.
    """
    empty = True
    for source in expand(sources):
        if source.startswith("datasets:"):
            documents = _hub_documents(source, column)
        else:
            documents = _file_documents(Path(source), column)
        for place, document in documents:
            for line in document.split("\n"):
                if line and not line.isspace():
                    empty = False
                    if len(line) <= LONGEST_LINE:
                        yield line
                    else:
                        yield from _cut(line, place)
    if empty:
        raise InputError(
            f"there is no text in {', '.join(map(str, sources)) or 'an empty list of sources'}: "
            "give at least one file with text in it"
        )


def read_blocks(
    sources: Sequence[str | Path], column: str = "text", characters: int = 4_000_000
) -> Iterator[list[str]]:
    """Group `read_lines` into lists of about `characters` characters: at least that many, but for the last.

    The blocks depend on the corpus only, never on who works on them.
    """
    block: list[str] = []
    size = 0
    for line in read_lines(sources, column):
        block.append(line)
        size += len(line)
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def expand(sources: Sequence[str | Path]) -> list[str]:
    """Files and hub names that the sources stand for; InputError for one that stands for nothing."""
    if isinstance(sources, str | Path):
        sources = [sources]
    out: list[str] = []
    for source in map(str, sources):
        path = Path(source)
        if source.startswith("datasets:") or path.is_file():
            out.append(source)
        elif path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and _format(p)[0] is not None)
            hidden = {p for p in below if any(part.startswith(".") for part in p.relative_to(path).parts)}
            found = [str(p) for p in below if p not in hidden]
            if not found:
                raise InputError(
                    f"the folder {source} holds no corpus file: files there must end in .txt, "
                    ".md, .rst, .jsonl, .csv, .tsv or .parquet, plain or compressed"
                )
            out += found
        else:
            found = sorted(p for p in glob.glob(source, recursive=True) if Path(p).is_file())
            if not found:
                raise InputError(
                    f"{source} does not exist: name a file, a folder, a glob that matches, or datasets:NAME:SPLIT"
                )
            out += found
    return out


def _format(path: Path) -> tuple[str | None, str]:
    """(suffix that tells the format or None, suffix that tells the compression or '')"""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    known = TEXT | JSONL | TABLE.keys() | {".parquet"}
    return (suffixes[-1] if suffixes and suffixes[-1] in known else None), compression


def _file_documents(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every document; a text file's documents are its lines, or megabytes of a long one."""
    suffix, compression = _format(path)
    try:
        if suffix == ".parquet":
            if compression:
                raise InputError(f"{path}: parquet compresses inside; decompress the file first")
            yield from _parquet_documents(path, column)
        elif suffix in JSONL:
            yield from _jsonl_documents(path, compression, column)
        elif suffix in TABLE:
            yield from _csv_documents(path, compression, column, TABLE[suffix])
        else:
            yield from _text_documents(path, compression)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} cannot be read ({error}): check the file, or write it again") from error


def _open(path: Path, compression: str):
    if not compression:
        return open(path, "rb")
    if opener := COMPRESSED[compression]:
        return opener(path, "rb")
    import pyarrow

    stream = pyarrow.input_stream(str(path), compression={".zst": "zstd", ".lz4": "lz4"}[compression])
    return io.BufferedReader(stream)  # which, unlike the stream, reads lines


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 of bytes that start at `offset` of the (decompressed) file and end at a line's end."""
    if (nul := raw.find(b"\0")) >= 0:
        raise InputError(
            f"{path} has a NUL byte at byte {offset + nul}: it is a binary or UTF-16 file; "
            "leave it out, or convert it to UTF-8 text"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} (0x{raw[error.start]:02x})"
        raise InputError(
            f"{path} is not UTF-8 at {place}: convert it, for example with `iconv -f latin1 -t utf-8`, or leave it out"
        ) from error
    return text if offset else text.removeprefix("\ufeff")  # some editors open a file with that mark


def _text_documents(path: Path, compression: str) -> Iterator[tuple[str, str]]:
    """Pieces of about CHUNK bytes that end at a line's end or, inside a very long line, at white space."""
    offset, rest = 0, b""
    with _open(path, compression) as file:
        while chunk := file.read(CHUNK):
            raw = rest + chunk
            end = raw.rfind(b"\n") + 1
            if not end and len(raw) > 4 * LONGEST_LINE:  # then the line has over LONGEST_LINE characters
                end = max(raw.rfind(white) for white in (b" ", b"\t", b"\r")) + 1
                if not end:
                    raise _no_white_space(f"{path}, byte {offset}")
            if end:
                yield f"{path}, after byte {offset}", _decode(raw[:end], path, offset)
            elif b"\0" in chunk:  # a binary file: say so before reading megabytes of it
                _decode(raw, path, offset)
            offset, rest = offset + end, raw[end:]
    if rest:
        yield f"{path}, after byte {offset}", _decode(rest, path, offset)


def _records(path: Path, compression: str) -> Iterator[str]:
    """The lines of a file of records, their ends kept; each must fit in memory."""
    offset = 0
    with _open(path, compression) as file:
        number = 0
        while raw := file.readline(LARGEST_RECORD):
            number += 1
            if len(raw) >= LARGEST_RECORD:
                raise InputError(f"{path}, line {number} is over {LARGEST_RECORD // 10**6} MB: split it")
            yield _decode(raw, path, offset)
            offset += len(raw)


def _jsonl_documents(path: Path, compression: str, column: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_records(path, compression), 1):
        if line.isspace():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place} is not JSON ({error.msg}, column {error.colno}): mend or remove it; "
                "every line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f'{place} is no JSON object: every line must be one, like {{"{column}": "..."}}')
        yield place, _text_of(record, column, place)


def _csv_documents(path: Path, compression: str, column: str, delimiter: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(LARGEST_RECORD)  # the standard library's own limit is 131,072 characters
    reader = csv.DictReader(_records(path, compression), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            yield place, _text_of(record, column, place)
    except csv.Error as error:
        place = f"{path}, line {reader.reader.line_num}"  # DictReader's own number lags behind on errors
        raise InputError(f"{place} is not CSV ({error}): mend or remove the line") from error


def _parquet_documents(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            if column not in kinds:
                raise _missing(str(path), column, kinds)
            kind = kinds[column].value_type if pyarrow.types.is_dictionary(kinds[column]) else kinds[column]
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise InputError(
                    f"{path}: the column {column!r} holds {kind}, not strings; the columns are {', '.join(kinds)}"
                )
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for document in batch.column(0).to_pylist():
                    row += 1
                    if document is not None:
                        yield f"{path}, row {row}", document
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is no readable parquet file ({error}): write it again, or leave it out") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: a text between rows {row + 1} and {row + 256} is not UTF-8: write the file again from UTF-8 text"
        ) from error


def _hub_documents(source: str, column: str) -> Iterator[tuple[str, str]]:
    parts = source.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"{source}: write datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT")
    name, split = parts[0], parts[-1]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"{source} needs the package datasets: pip install 'vocabshrink[train]'") from error
    try:
        for number, record in enumerate(load_dataset(name, *parts[1:-1], split=split, streaming=True)):
            yield f"{source}, record {number}", _text_of(record, column, source)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # not found, offline, no such configuration or split
        raise InputError(f"{source} cannot be read ({error}): check name, split and network") from error


def _text_of(record: dict, column: str, place: str) -> str:
    text = record.get(column, record)
    if text is record:
        raise _missing(place, column, record)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{place}: {column!r} holds {type(text).__name__}, not text: choose another column")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in set(text)):
        raise InputError(f"{place}: {column!r} holds half a surrogate pair, which is no character: remove it")
    return text


def _missing(place: str, column: str, columns) -> InputError:
    names = ", ".join(str(name) for name in columns)
    return InputError(f"{place} has no column {column!r}: choose one of {names}")


def _cut(line: str, place: str) -> Iterator[str]:
    """Cut a long line at the last ASCII white space (a word's end in every tokenizer) within LONGEST_LINE."""
    start = 0
    while len(line) - start > LONGEST_LINE:
        end = max(line.rfind(white, start, start + LONGEST_LINE) for white in " \t\r")
        if end <= start:
            raise _no_white_space(place)
        yield line[start:end]
        start = end + 1
    yield line[start:]


def _no_white_space(place: str) -> InputError:
    return InputError(
        f"{place}: more than {LONGEST_LINE} characters without white space; that is no text "
        "(base64? a minified program?): remove it or break it up"
    )
