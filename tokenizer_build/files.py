"""Files that appear whole or not at all, and readers that say in one sentence what is wrong with a file."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

from tokenizer_build.errors import InputError

LARGEST_RECORD = 256_000_000  # bytes of one JSONL or CSV line; the only thing that is read whole


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it if the block succeeds; InputError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; put it in its place if the block succeeds.

    The old folder is deleted only once the new one is in its place. Raises InputError when the disk is full.
    """
    folder = Path(folder)
    with naming_full_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            new, old = Path(place, "new"), Path(place, "old")
            new.mkdir()
            yield new
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except OSError:
                if old.exists():
                    os.replace(old, folder)
                raise


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Turn "no space left" while writing `path` into an InputError that says how many bytes are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(next(parent for parent in Path(path).absolute().parents if parent.is_dir())).free
        raise InputError(f"no space left to write {path}: {free:,} bytes are free: free some, run again") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically, with \\n line ends on every system."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # without it, a power cut may leave the new name on an empty file


def write_json(path: str | Path, value) -> None:
    """Write strict JSON atomically; see `plain` for what becomes of values that JSON cannot hold."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def plain(value):
    """`value` with NumPy and torch numbers as Python's, paths as str, NaN and infinity (which are not JSON) as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, PurePath) else value


def read_json(path: str | Path):
    """Read a JSON file. Raises InputError naming the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: run the stage that writes it") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not JSON ({error}): download it, or run its stage, again") from error


def read_jsonl(path: str | Path, opened: BinaryIO | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a JSONL file with one object per line, skipping empty lines.

    A file that is one array of objects gives them too, numbered from 1; it is read whole. `opened` is the file's
    content where `path` itself is compressed; one line is held in memory at a time. Raises InputError naming file and
    line for a missing file, bytes that are not UTF-8 and a line that is no object.
    """
    try:
        lines = enumerate(text_lines(path, opened), 1)
        for number, line in lines:
            if not line.isspace():
                row, why = None, ""
                array = number == 1 and line.lstrip().startswith("[")
                try:
                    row = json.loads(line + "".join(rest for _, rest in lines) if array else line.rstrip("\r\n"))
                except (ValueError, RecursionError) as error:  # the latter: nested too deeply
                    why = f" ({str(error).replace('line 1 ', '')})"
                for place, item in enumerate(row, 1) if array and isinstance(row, list) else [(number, row)]:
                    if not isinstance(item, dict):
                        raise InputError(f"{path}: row {place} is not a JSON object{why}: write one object per line")
                    yield place, item
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such file" if missing else f"cannot be read ({error.strerror or error})"
        raise InputError(f"{path}: {what}: correct its path") from None


def text_lines(path: str | Path, opened: BinaryIO | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file (see `read_jsonl`) with their ends, cut at \\n alone: JSON strings may hold U+2028."""
    offset = 0
    with opened or Path(path).open("rb") as file:
        while raw := file.readline(LARGEST_RECORD):
            if len(raw) >= LARGEST_RECORD:
                raise InputError(f"{path}: the line at byte {offset} is over {LARGEST_RECORD // 10**6} MB: split it")
            yield decode(raw, path, offset)
            offset += len(raw)


def decode(raw: bytes, path: str | Path, offset: int = 0) -> str:
    """Decode UTF-8 that starts at byte `offset` of the file `path` (of its content, where that is compressed).

    Raises InputError naming the byte that is NUL or not UTF-8, and for a Git LFS pointer in the file's place.
    """
    if not offset and raw.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: fetch it, as by `git lfs pull`")
    bad = raw.find(b"\0")  # in binary and UTF-16 files
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        what = f"{path}: not UTF-8 text at byte {offset + bad} (0x{raw[bad]:02x})"
        raise InputError(f"{what}: convert it, as by `iconv -f latin1 -t utf-8`, or leave it out if it is binary (NUL)")
    return text if offset else text.removeprefix("\ufeff")  # a byte order mark, which some editors write
