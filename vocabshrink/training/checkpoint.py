"""Checkpoints: everything a run needs to go on as if nothing had happened, in safetensors and JSON.

The schedule and the position in the data are functions of the step, so they are not kept. A checkpoint is written
beside the one before, which steps aside as `.before` until the new one has its name: whenever the process is killed,
`read_meta` finds a whole one. The names are fixed, not random as in `replacing_folder`, so that it can.
"""

import errno
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tokenizer_build.errors import InputError


def trained_state(task: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the parameters with a gradient, shared ones once, and the scales of roundings."""
    parameters = dict(task.named_parameters())
    trained = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
    return trained | {name: tensor for name, tensor in task.state_dict().items() if name.endswith(".scales")}


def save_checkpoint(folder: Path, task: nn.Module, optimizer, meta: dict, scaler=None) -> None:
    """Writes folder anew. meta: JSON. Raises InputError if the disk is full; the checkpoint before is untouched."""
    temporary, before = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".before")
    states = optimizer.state_dict()["state"]
    files = {
        "model": trained_state(task),
        "optimizer": {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()},
        "random": {"cpu": torch.get_rng_state()},
    }
    if torch.cuda.is_available():
        files["random"]["cuda"] = torch.cuda.get_rng_state()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(cpu, temporary / f"{name}.safetensors")
        text = json.dumps(meta | {"scaler": scaler.state_dict() if scaler else None}, indent=2)
        (temporary / "meta.json").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise InputError(f"{folder}: the disk is full: free some space and run again to resume") from None
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    temporary.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def read_meta(folder: Path) -> dict | None:
    """The newest whole checkpoint's meta, or None. Finishes a rename that a crash cut off."""
    before = folder.with_name(folder.name + ".before")
    if not folder.exists() and before.exists():
        before.rename(folder)
    if not folder.exists():
        return None
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{folder}: not a whole checkpoint: delete the folder to train this stage anew") from None


def load_checkpoint(folder: Path, task: nn.Module, optimizer, meta: dict, scaler=None) -> None:
    """Puts a checkpoint back, in place. Raises InputError if files are damaged or belong to other shapes."""
    try:
        saved, state, random = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer", "random"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged checkpoint ({error}): delete the folder to train anew") from None
    current = trained_state(task)
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in current.items()}:
        raise InputError(f"{folder}: of another recipe (shapes differ): delete it, or give the run another name")
    for name, tensor in current.items():
        tensor.copy_(saved[name])
    full = optimizer.state_dict() | {"state": {}}
    for key, value in state.items():
        index, name = key.split(".", 1)
        full["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(full)
    if scaler and meta["scaler"]:
        scaler.load_state_dict(meta["scaler"])
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
