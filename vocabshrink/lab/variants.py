"""Variants of a recipe: settings over its plain values, and runs that share the stages which they have in common.

Ablations and the search are many runs of one recipe. Each is an ordinary run whose stages stand in one folder, named by
the settings that decide them (`SharedRunDir`), so that a stage is made once, whoever asks for it first, and a run that
was made before is there already. The same command may run several times at once on one machine: a stage is one
process' alone while it is made. The lock is the kernel's and dies with its process.
"""

import copy
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer_build.errors import InputError
from vocabshrink.run.engine import Run, run_stage, say, settings_of
from vocabshrink.run.folder import SharedRunDir
from vocabshrink.run.recipe import Recipe, load_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import override_value, parse_yaml
from vocabshrink.run.stage import stages_of
from vocabshrink.stages.checks import check_all_losses

DELIVERY = {"export", "report"}  # of a run, which no table of variants reads


@dataclass(frozen=True)
class Variant:
    """One run among many. label: what the log calls it."""

    label: str
    recipe: Recipe
    dir: SharedRunDir

    @property
    def stages(self) -> list[str]:
        return [name for name in stages_of(self.recipe) if name not in DELIVERY]

    @property
    def done(self) -> bool:
        return self.dir.is_done("finetune")


def read_yaml(path: Path, kind: str) -> Any:
    """The value of a file that names a base recipe. kind: "an ablation", "a search".

    Raises:
        InputError: a missing or malformed file.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}: write it as UTF-8") from None


def base_values(path: Path, overrides: list[str] | tuple[str, ...]) -> dict:
    """The plain values of a recipe with the command line's settings, for `make_variant` to change.

    Raises:
        InputError: the recipe's own mistakes, in its own name; an override of what it does not have.
    """
    load_recipe(path)
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"{override}: write an override as key.subkey=value")
        change(data, key, parse_yaml(value, override) if value else None, f"{override} over {path}")
    return data


def make_variant(base: dict, changes: dict[str, Any], own: Path, shared: Path, *, origin: str, label: str) -> Variant:
    """The run of `base_values` with {section.key: value} changed, null leaving a key out.

    own: the run's folder. shared: that of all runs' stages. origin: of the changes, for refusals.

    Raises:
        InputError: naming the origin, before anything is trained.
    """
    data = copy.deepcopy(base)
    for key, value in changes.items():
        change(data, key, copy.deepcopy(value), f"{origin}: {key}")
    recipe = parse_recipe(without_left_out(data), origin)
    try:
        check_all_losses(recipe)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    return Variant(label, recipe, SharedRunDir(own, shared, lambda name: settings_of(recipe, name)))


LEFT_OUT = "\0left out"  # stands where null was written until all changes are made, so that positions in lists stay


def change(data: dict, key: str, value: Any, origin: str) -> None:
    """Sets section.key of a recipe's plain values; null leaves it out.

    Raises:
        InputError: the section is not there (what changes a section that a recipe lacks is rarely meant), or nothing
            to leave out.
    """
    keys = key.split(".")
    needed = keys if value is None else keys[:-1]
    if not holds(data, needed):
        raise InputError(f"{origin}: the base recipe has no {'.'.join(needed)}: correct the key, or add it there")
    override_value(data, keys, LEFT_OUT if value is None else value, origin)


def holds(data: Any, keys: list[str]) -> bool:
    """Whether data[a][b][c] stands there, null or not; a number is the position in a list."""
    for key in keys:
        if isinstance(data, dict) and key in data:
            data = data[key]
        elif isinstance(data, list) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
        else:
            return False
    return True


def without_left_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_left_out(item) for key, item in value.items() if item != LEFT_OUT}
    if isinstance(value, list):
        return [without_left_out(item) for item in value if item != LEFT_OUT]
    return value


def refuse_launcher() -> None:
    """Raises InputError: started by a launcher, whose processes would take different runs and wait for each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "many runs want one process each: start this command several times, each on its own GPU "
            "(CUDA_VISIBLE_DEVICES) or core, instead of by accelerate launch"
        )


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether the stage at `folder` is this process' alone; False where another one is at it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def advance(variant: Variant) -> bool:
    """Runs the variant's stages that are not done; False, with some perhaps done, if another process is at the next."""
    run = Run(variant.recipe, variant.dir)  # afresh: what it reads of text and tasks is freed with it
    for name in variant.stages:
        folder = variant.dir.stage(name)
        if not variant.dir.is_done(name):
            with claimed(folder) as mine:
                if not mine:
                    return False
                if not variant.dir.is_done(name):  # nor became so while this process came here
                    say(f"{variant.label}: {name}")
                    run_stage(run, name)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # optimizer states, larger than all that is kept
    return True
