"""Files are whole or absent, a full disk is a sentence, and what cannot be read is named with the place."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer_build.errors import InputError
from tokenizer_build.files import (
    claimed,
    clean,
    naming_bad_disk,
    read_json,
    read_jsonl,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)


def test_json_is_strict_whatever_numbers_come_in(tmp_path):
    value = {
        "nan": float("nan"),
        "numpy": np.float32(0.5),
        "torch": torch.tensor(3),
        7: (np.int64(1), "é"),
        "inside": [np.float64("inf")],
        "path": Path("a/b"),
        "none": None,
        "yes": True,
    }
    write_json(tmp_path / "x.json", value)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=refuse) == {
        "nan": None,
        "numpy": 0.5,
        "torch": 3,
        "7": [1, "é"],
        "inside": [None],
        "path": "a/b",
        "none": None,
        "yes": True,
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("crash")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_reader_keeps_the_file_it_opened(tmp_path):
    write_text(tmp_path / "x.txt", "old")
    with (tmp_path / "x.txt").open() as reader:
        write_text(tmp_path / "x.txt", "new")
        assert reader.read() == "old"
    assert (tmp_path / "x.txt").read_text() == "new"


def test_a_full_disk_names_the_file_and_the_bytes_free(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"x\.json: [\d,]+ bytes are free"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file" / "x.txt", "")


def test_missing_and_broken_json_are_named(tmp_path):
    with pytest.raises(InputError, match="absent.json is missing"):
        read_json(tmp_path / "absent.json")
    for bad in (b"\xff{", b"[" * 100_000, b"9" * 5000):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(InputError, match="bad.json is not JSON"):
            read_json(tmp_path / "bad.json")


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    for name in ("old", "new"):
        with replacing_folder(folder) as new:
            assert list(new.iterdir()) == [] and new.parent == folder.parent
            (new / name).write_text(name)
            assert not folder.exists() or listing(folder) == ["old"]
    assert listing(tmp_path) == ["deep", "deep/model", "deep/model/new"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        (new / "half").write_text("half of the n")
        raise RuntimeError("crash")
    assert listing(tmp_path) == ["model", "model/old"]
    with pytest.raises(InputError, match=r"model: [\d,]+ bytes are free"), replacing_folder(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listing(tmp_path) == ["model", "model/old"]

    replace = os.replace

    def refuse_the_new(source, target):
        if ".new." in Path(source).name:
            raise PermissionError(13, "refused")
        replace(source, target)

    monkeypatch.setattr("tokenizer_build.files._exchanged", lambda *_: False)  # as on file systems that cannot
    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(InputError, match="model cannot be written .*: choose another place"), replacing_folder(folder):
        pass
    assert listing(tmp_path) == ["model", "model/old"] and (folder / "old").read_text() == "old"


def test_jsonl_rows_come_with_their_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\r\n\n  \n{"b": 1}', encoding="utf-8", newline="\n")
    assert list(read_jsonl(path)) == [(1, {"a": "x\u2028y"}), (4, {"b": 1})]
    path.write_bytes(b"")
    assert list(read_jsonl(str(path))) == []


def test_bad_jsonl_is_named_with_the_row(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = {
        b'{"b": 1': r"x\.jsonl: row 2 is not a JSON object \(.*column 8.*\): write one object per line",
        b"[1]": r"row 2 is not a JSON object: write",
        b"[" * 100_000: "row 2 is not a JSON object",
        b'{"half": "\\ud83d"}': r"row 2 is not a JSON object \(.*surrogates not allowed\)",
        b'{"n": ' + b"9" * 5000 + b"}": "row 2 is not a JSON object",
        b"\xff": r"x\.jsonl: not UTF-8 text at byte 9 \(0xff\)",
        b"\0": r"x\.jsonl: not UTF-8 text at byte 9 \(0x00\)",
    }
    for row, sentence in rows.items():
        path.write_bytes(b'{"a": 1}\n' + row + b"\n")
        read = read_jsonl(path)
        assert next(read) == (1, {"a": 1})
        with pytest.raises(InputError, match=sentence):
            next(read)


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """The names of what was synced, and the new names of what was renamed, in order."""
    found, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: found.append(Path(os.readlink(f"/proc/self/fd/{number}")).name) or fsync(number)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: found.append(f"to {Path(new).name}") or replace(old, new))
    return found


def test_content_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, events):
    write_text(tmp_path / "x.txt", "x")
    assert events == [f".x.txt.new.{os.getpid()}.tmp", "to x.txt", tmp_path.name]
    del events[:]
    with replacing_folder(tmp_path / "model") as new:
        (new / "inner").mkdir()
        (new / "inner" / "weights").write_text("w")
    assert sorted(events[:3]) == [f".model.new.{os.getpid()}.tmp", "inner", "weights"] and events[3:] == [
        "to model",
        tmp_path.name,
    ]


def hold(lock, ready):
    with claimed(lock) as mine:
        ready.send(mine)
        signal.pause()


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    lock, (ours, theirs) = tmp_path / ".lock", multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=hold, args=(lock, theirs))
    child.start()
    assert ours.recv() is True
    with claimed(lock) as mine:
        assert not mine and lock.read_text().startswith(f"process {child.pid} on ")
    (tmp_path / f".x.txt.{child.pid}.tmp").write_text("half")
    (tmp_path / f".model.{child.pid}.tmp").mkdir()
    write_text(tmp_path / "x.txt", "whole")
    assert (tmp_path / f".x.txt.{child.pid}.tmp").exists()  # while that process lives
    child.kill()
    child.join()
    assert lock.exists()
    with claimed(lock) as mine:
        assert mine
    write_text(tmp_path / "x.txt", "whole")
    with replacing_folder(tmp_path / "model"):
        pass
    assert listing(tmp_path) == ["model", "x.txt"]


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "x"), OSError(errno.EROFS, "x"), RuntimeError("I/O error (os error 13)")]
)
def test_a_folder_that_may_not_be_written_is_named(error, tmp_path):
    named = pytest.raises(InputError, match=r"out.json cannot be written \(.*\): choose another place")
    with named, naming_bad_disk(tmp_path / "out.json"):
        raise error


def test_a_folder_that_a_killed_process_had_moved_aside_comes_back(tmp_path):
    """Where names cannot be exchanged in one step, there is a moment in which the folder has neither."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for role in ("old", "new"):
        (tmp_path / f".last.{role}.{child.pid}.tmp").mkdir()
        (tmp_path / f".last.{role}.{child.pid}.tmp" / "which").write_text(role)
    clean(tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"] and (tmp_path / "last/which").read_text() == "old"
