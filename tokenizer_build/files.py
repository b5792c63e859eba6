"""Files that appear whole or not at all, and readers that say in one sentence what is wrong with a file."""

import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import BinaryIO

from tokenizer_build.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

LARGEST_RECORD = 256_000_000  # bytes of one JSONL or CSV line; the only thing that is read whole


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; sync the file or folder that the block makes there, and rename it to `path`
    if the block succeeds. See `naming_bad_disk`."""
    path = Path(path)
    with naming_bad_disk(path):
        fresh = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in fresh:
            sync(folder.parent)
        clean(path)
        new, old = (path.with_name(f".{path.name}.{role}.{os.getpid()}.tmp") for role in ("new", "old"))
        _remove(new, old)
        try:
            yield new
            for made in [*new.rglob("*"), new]:
                sync(made)
            if not (new.is_dir() and path.exists() and _exchanged(new, path)):
                if new.is_dir() and path.exists():
                    os.replace(path, old)
                os.replace(new, path)
            sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            _remove(new, old)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; put it in its place if the block succeeds."""
    with replacing(folder) as new:
        new.mkdir()
        yield new


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system, or the file system, cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def clean(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path`; where one had moved it aside, put it back."""
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"), reverse=True) if fcntl else ():
        try:
            os.kill(int(left.name.split(".")[-2]), 0)
        except (ProcessLookupError, OverflowError):
            if left.name.split(".")[-3] == "old" and not path.exists():
                os.replace(left, path)
            _remove(left)
        except (PermissionError, ValueError):  # another user's; none of ours
            pass


def _remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, so that no power cut leaves a new name on no content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(lock: str | Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether what the file `lock` stands for is this process's alone until the block ends; False where another holds
    it, unless this one waits. The file says who holds it; the lock is the kernel's and dies with its process."""
    lock = Path(lock)
    with naming_bad_disk(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(lock, wait)
    if descriptor is None:
        yield False
        return
    try:
        os.truncate(lock, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield True
    finally:
        lock.unlink(missing_ok=True)  # while it is held
        os.close(descriptor)


def _locked(lock: Path, wait: bool) -> int | None:
    """The descriptor of the file `lock`, locked; None where another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # of a file system without locks
            pass
        with suppress(FileNotFoundError):  # where its last holder has just removed it
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def stamp(path: Path) -> tuple:
    """(name, time of change, bytes) of a file, or of each of a folder: what was read of them holds while this does."""
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in entries if file.is_file())


def checksum(path: Path) -> int:
    """The CRC-32 of a file: it finds damage, not forgery, and reads 2 GB in a second."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


@contextmanager
def naming_bad_disk(path: str | Path) -> Iterator[None]:
    """Turn "no space left" and "may not be written" while writing `path` into an InputError of one sentence."""
    try:
        yield
    except Exception as error:  # of any kind: safetensors has an exception of its own, with the system's number in it
        number = getattr(error, "errno", None) or int((re.findall(r"\(os error (\d+)\)", str(error)) or ["0"])[0])
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(parent for parent in Path(path).absolute().parents if parent.is_dir())).free
            raise InputError(f"no space left to write {path}: {free:,} bytes are free: free some, run again") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise InputError(f"{path} cannot be written ({os.strerror(number)}): choose another place") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically, with \\n line ends on every system."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: str | Path, value) -> None:
    """Write strict JSON atomically; see `plain` for what becomes of values that JSON cannot hold."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, values: Iterable) -> None:
    """Write values as JSON, one a line, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def hash_of(value) -> str:
    """Sixteen digits that tell a value, as `plain` makes JSON of it, from all others."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


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


def parse_json(text: str | bytes):
    """The value of a JSON text. Raises ValueError for what is none, for one nested too deeply, and for half of a
    surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        value = json.loads(text)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path):
    """Read a JSON file. Raises InputError naming the file when it is missing or not JSON."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: run the stage that writes it") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not JSON ({error}): download it, or run its stage, again") from error


def read_values(path: str | Path) -> list:
    """What `write_jsonl` wrote, at once."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # JSON keeps U+2028, where str.splitlines cuts
    return json.loads(f"[{','.join(lines)}]")


def read_jsonl(path: str | Path, opened: BinaryIO | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a JSONL file with one object per line, or of one array of them (read whole,
    numbered from 1). `opened` is the file's content where `path` itself is compressed. Raises InputError naming file
    and line for bytes that are not UTF-8 and for a line that is no object."""
    lines = enumerate(text_lines(path, opened), 1)
    for number, line in lines:
        if line.isspace():
            continue
        row, why, array = None, "", number == 1 and line.lstrip().startswith("[")
        try:
            row = parse_json(line + "".join(rest for _, rest in lines) if array else line.rstrip("\r\n"))
        except ValueError as error:
            why = f" ({str(error).replace('line 1 ', '')})"
        for place, item in enumerate(row, 1) if array and isinstance(row, list) else [(number, row)]:
            if not isinstance(item, dict):
                raise InputError(f"{path}: row {place} is not a JSON object{why}: write one object per line")
            yield place, item


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
    """Decode UTF-8 that starts at byte `offset` of the content of the file `path`. Raises InputError naming the byte
    that is NUL or not UTF-8, and for a Git LFS pointer in the file's place."""
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
