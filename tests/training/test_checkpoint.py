"""A checkpoint comes back bit for bit, survives a crash at any moment, and is refused where it does not fit."""

import errno
import json
from random import Random

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import Regression

from tokenizer_build import files
from tokenizer_build.errors import InputError
from vocabshrink.run.recipe import TrainingSection
from vocabshrink.training import loop as module
from vocabshrink.training.loop import (
    OPTIMIZERS,
    load_checkpoint,
    parameter_groups,
    read_meta,
    save_checkpoint,
    trained_state,
)


def trained(optimizer: str = "adamw", steps: int = 3, seed: int = 0):
    """A task and its optimizer after a few steps."""
    task = Regression()
    settings = TrainingSection(steps=9, learning_rate=0.1)
    optimizer = OPTIMIZERS[optimizer](parameter_groups(task, settings))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in trained_state(task):
            task.get_parameter(parameter).grad = torch.randn(task.get_parameter(parameter).shape, generator=generator)
        optimizer.step()
    return task, optimizer


def same_state(first: dict, second: dict) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        torch.equal(a, second[k]) and a.dtype == second[k].dtype if torch.is_tensor(a) else a == second[k]
        for k, a in first.items()
    )


def assert_same(first, second) -> None:
    (task, optimizer), (other_task, other_optimizer) = first, second
    assert same_state(task.state_dict(), other_task.state_dict())
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys() and ours
    for index, state in ours.items():
        assert same_state(state, theirs[index])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_round_trip_is_exact(optimizer, tmp_path):
    saved = trained(optimizer)
    expected_random = torch.get_rng_state()
    save_checkpoint(tmp_path / "a" / "last", *saved, {"step": 3, "fingerprint": "f"})
    drawn = torch.rand(3)
    fresh = trained(optimizer, steps=0, seed=1)
    meta = read_meta(tmp_path / "a" / "last")
    assert (meta["step"], meta["fingerprint"]) == (3, "f")
    torch.manual_seed(99)
    load_checkpoint(tmp_path / "a" / "last", *fresh, meta)
    assert_same(saved, fresh)
    assert torch.equal(torch.get_rng_state(), expected_random) and torch.equal(torch.rand(3), drawn)
    # and the next step is the same step
    for task, optimizer in (saved, fresh):
        torch.manual_seed(5)
        for parameter in trained_state(task):
            task.get_parameter(parameter).grad = torch.randn(task.get_parameter(parameter).shape)
        optimizer.step()
    assert_same(saved, fresh)


def test_only_what_is_trained_is_written_and_nothing_pickled(tmp_path):
    task, optimizer = trained()
    save_checkpoint(tmp_path / "last", task, optimizer, {"step": 3})
    assert {p.name for p in (tmp_path / "last").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "meta.json",
        "sums.json",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    names = module.load_file(tmp_path / "last" / "model.safetensors").keys()
    assert names == {n for n, p in task.named_parameters() if not n.startswith("frozen")}


def test_shared_parameters_are_written_once(tmp_path):
    task, _ = trained(steps=0)
    task.again = task.first
    optimizer = torch.optim.AdamW(parameter_groups(task, TrainingSection(steps=1)))
    save_checkpoint(tmp_path / "last", task, optimizer, {"step": 0})
    before = task.first.weight.clone()
    task.first.weight.data.zero_()
    load_checkpoint(tmp_path / "last", task, optimizer, read_meta(tmp_path / "last"))
    assert torch.equal(task.again.weight, before)


class Crash(BaseException):
    """The process is gone: nothing catches it."""


def test_a_crash_loses_nothing(tmp_path, monkeypatch):
    """How the one folder takes the other's place is tested in test_files.py."""
    folder, old, new = tmp_path / "last", trained(steps=1), trained(steps=2)
    save_checkpoint(folder, *old, {"step": 1})

    def crash(*arguments):
        raise Crash

    monkeypatch.setattr(files, "_exchanged", crash)
    with pytest.raises(Crash):
        save_checkpoint(folder, *new, {"step": 2})
    monkeypatch.undo()
    meta, fresh = read_meta(folder), trained(steps=0)
    assert meta["step"] == 1
    load_checkpoint(folder, *fresh, meta)
    assert_same(old, fresh)
    save_checkpoint(folder, *new, {"step": 2})
    assert read_meta(folder)["step"] == 2 and [p.name for p in tmp_path.iterdir()] == ["last"]


def test_no_checkpoint_is_none(tmp_path):
    assert read_meta(tmp_path / "last") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "random.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_a_damaged_file_is_refused(file, damage, tmp_path):
    folder = tmp_path / "last"
    saved = trained()
    save_checkpoint(folder, *saved, {"step": 3})
    data = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(data[: len(data) // 2] if damage == "cut" else b"\xff" * 100)
    task, optimizer = trained(steps=0)
    before = {n: t.clone() for n, t in task.state_dict().items()}
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(folder, task, optimizer, read_meta(folder))
    assert same_state(before, task.state_dict())


@pytest.mark.parametrize("text", [None, "", "{", "\xff", "[1]", "{}", "[" * 99999])
def test_a_damaged_meta_is_refused(text, tmp_path):
    folder = tmp_path / "last"
    save_checkpoint(folder, *trained(), {"step": 3})
    (folder / "meta.json").unlink()
    if text is not None:
        (folder / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="damaged checkpoint"):
        read_meta(folder)


def test_no_changed_byte_goes_unnoticed(tmp_path):
    """Nor does a digit of the meta, after which training would go on from another step, or of the sums themselves."""
    folder = tmp_path / "last"
    save_checkpoint(folder, *trained(), {"step": 3, "fingerprint": "f"})
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    random = Random(0)
    for path, content in whole.items():
        for place in [content.index(b": 3") + 2] if path.name == "meta.json" else random.sample(range(len(content)), 8):
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << random.randrange(3)]) + content[place + 1 :]
            )
            fresh = trained(steps=0)
            before = {n: t.clone() for n, t in fresh[0].state_dict().items()}
            with pytest.raises(InputError, match="damaged checkpoint"):
                load_checkpoint(folder, *fresh, read_meta(folder))
            assert same_state(before, fresh[0].state_dict())
        path.write_bytes(content)
    load_checkpoint(folder, *trained(steps=0), read_meta(folder))


def test_other_shapes_are_refused(tmp_path):
    folder = tmp_path / "last"
    save_checkpoint(folder, *trained(), {"step": 3})
    task, _ = trained(steps=0)
    task.second = torch.nn.Linear(16, 4)
    optimizer = torch.optim.AdamW(parameter_groups(task, TrainingSection(steps=1)))
    with pytest.raises(InputError, match="shapes differ"):
        load_checkpoint(folder, task, optimizer, read_meta(folder))
    task, optimizer = trained(steps=0)
    task.first.requires_grad_(False)
    with pytest.raises(InputError, match="shapes differ"):
        load_checkpoint(folder, task, optimizer, read_meta(folder))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_full_disk_keeps_the_checkpoint_before(error, at, tmp_path, monkeypatch):
    folder = tmp_path / "last"
    old = trained(steps=1)
    save_checkpoint(folder, *old, {"step": 1})
    real, calls = module.save_file, []

    def save_file(tensors, path):
        calls.append(path)
        if len(calls) > at:
            raise error
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(InputError, match="no space left to write .*last: [0-9,]+ bytes are free"):
        save_checkpoint(folder, *trained(steps=2), {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    meta = read_meta(folder)
    assert meta["step"] == 1
    fresh = trained(steps=0)
    load_checkpoint(folder, *fresh, meta)
    assert_same(old, fresh)


def test_another_error_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def save_file(tensors, path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(InputError, match=r"last cannot be written \(Permission denied\): choose another place"):
        save_checkpoint(tmp_path / "last", *trained(), {"step": 1})


def test_meta_is_plain_json(tmp_path):
    save_checkpoint(tmp_path / "last", *trained("lamb"), {"step": 3, "tokens": 7})
    meta = json.loads((tmp_path / "last" / "meta.json").read_text())
    assert meta.keys() == {"step", "tokens", "scaler"} and (meta["step"], meta["tokens"]) == (3, 7)
