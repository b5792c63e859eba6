"""Files that appear whole or not at all, and are read with one sentence about what is wrong with them."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from tokenizer_build.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` if the block succeeds.

    Raises InputError, naming the file and the bytes free, when the disk is full.
    """
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
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; put it in its place if the block succeeds.

    What lay there goes only when the new one is in. Raises InputError when the disk is full.
    """
    folder = Path(folder)
    with naming_full_disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new, old = (
            Path(tempfile.mkdtemp(prefix=f".{folder.name}.{kind}.", dir=folder.parent)) for kind in ("new", "old")
        )
        try:
            yield new
            new.chmod(0o755)  # mkdtemp's is for its owner alone
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(new, folder)
            except OSError:
                if any(old.iterdir()):
                    os.replace(old, folder)
                raise
        finally:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" while writing `path` into an InputError that says how many bytes are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        message = f"no space left to write {path}: {free:,} bytes are free there; free some and run again"
        raise InputError(message) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, with \\n line ends everywhere."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file


def write_json(path: Path, value) -> None:
    """Write strict JSON atomically; numbers of NumPy and torch become plain, NaN and infinity null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path):
    """Read a JSON file. Raises InputError naming the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: run the stage that writes it") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not JSON ({error}); delete it and run its stage again") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line, object) of a JSONL file of one object a line; empty lines are passed over.

    Raises:
        InputError: naming file, line and mend: a missing file, bytes that are not UTF-8, a line that is no object.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: correct its path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}: write it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), 1):  # str.splitlines would cut at U+2028, which JSON allows
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is not a JSON object: write one object a line")
        yield number, row


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN is not JSON, and a browser or jq would refuse the whole file
    return str(value) if isinstance(value, PurePath) else value
