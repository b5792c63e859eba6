"""Variants of a recipe: settings over its plain values, and runs that share the stages they have in common.

Each is an ordinary run whose stages stand in one folder, named by the settings that decide them (`SharedRunDir`), so
that a stage is made once. The same command may run several times at once: a stage belongs to one process while it is
made, by a lock of the kernel's, which dies with its process.
"""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, read_json
from vocabshrink.run.engine import Run, run_stage, say, settings_of
from vocabshrink.run.folder import SharedRunDir
from vocabshrink.run.recipe import Recipe, load_recipe, parse_recipe
from vocabshrink.run.recipe_yaml import override_value, parse_override, read_yaml
from vocabshrink.run.stage import stages_of
from vocabshrink.stages.checks import check_all_losses


@dataclass(frozen=True)
class Variant:
    """One run among many. label: its name in the log."""

    label: str
    recipe: Recipe
    dir: SharedRunDir

    @property
    def stages(self) -> list[str]:
        return [name for name in stages_of(self.recipe) if name not in ("export", "report")]  # which no table reads

    def summary(self, stage: str) -> dict:
        """What a finished stage says of itself."""
        return read_json(self.dir.stage(stage) / "summary.json")


def base_values(path: Path, overrides: list[str] | tuple[str, ...]) -> dict:
    """The plain values of a recipe with the command line's settings, for `make_variant`. Raises InputError."""
    load_recipe(path)  # for the recipe's own mistakes, under its own name
    data = read_yaml(path, "a recipe")
    for override in overrides:
        change(data, *parse_override(override), f"{override} over {path}")
    return data


def make_variant(base: dict, changes: dict[str, Any], own: Path, shared: Path, *, origin: str, label: str) -> Variant:
    """The run of `base_values` with {section.key: value} changed; null leaves a key out. own: the run's folder. shared:
    the folder of all runs' stages. Raises InputError, which names the origin of the changes."""
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
    """Sets section.key of a recipe's plain values; null leaves it out. Raises InputError for a section that is not
    there, since a change to one that the recipe lacks is rarely meant."""
    keys = key.split(".")
    needed = keys if value is None else keys[:-1]
    try:
        value_at(data, needed)
    except (LookupError, TypeError, ValueError):
        fault = f"the base recipe has no {'.'.join(needed)}"
        raise InputError(f"{origin}: {fault}: correct the key, or add it there") from None
    override_value(data, keys, LEFT_OUT if value is None else value, origin)


def value_at(data: Any, keys: list[str]) -> Any:
    """data[a][b] of keys a.b, positions in lists as digits. Raises LookupError, TypeError or ValueError without one."""
    for key in keys:
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def without_left_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_left_out(item) for key, item in value.items() if item != LEFT_OUT}
    return [without_left_out(item) for item in value if item != LEFT_OUT] if isinstance(value, list) else value


def refuse_launcher() -> None:
    """Raises InputError under a launcher, whose processes would take different runs and wait for each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "start this command several times, each on its own GPU (CUDA_VISIBLE_DEVICES) or core"
        raise InputError(f"many runs want one process each: {remedy}, instead of by accelerate launch")


def advance(variant: Variant, *, wait: bool = False) -> bool:
    """Runs the variant's stages that are not done. Returns False, with some perhaps done, where another process is at
    the next and this one does not `wait`."""
    run = Run(variant.recipe, variant.dir)  # made here, so that the text and tasks it reads are freed with it
    for name in variant.stages:
        if not variant.dir.is_done(name):
            with claimed(f"{variant.dir.stage(name)}.lock", wait=wait) as mine:
                if not mine:
                    return False
                say(f"{variant.label}: {name}")
                run_stage(run, name)  # unless another process has just done it
        # optimizer states, larger than all that is kept
        shutil.rmtree(variant.dir.stage(name) / "checkpoints", ignore_errors=True)
    return True
