"""YAML as recipes are written in it: read strictly, overridden by `section.key=value`, dumped so that it reads back."""

import re
from pathlib import Path
from typing import Any

import yaml

from tokenizer_build.errors import InputError
from tokenizer_build.files import decode


class RecipeLoader(yaml.SafeLoader):
    """YAML without the traps of its version 1.1: only true and false are booleans, and no date is a date."""

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if not rule[0].endswith((":bool", ":timestamp"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        names = [str(key.value) for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if names[place] in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"{names[place]} is written twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Quotes what `RecipeLoader` would not read back as a string."""


BOOLEAN, NUMBER = re.compile("(true|false|True|False|TRUE|FALSE)$"), re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOLEAN, list("tfTF"))
for either in (RecipeLoader, RecipeDumper):
    either.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises InputError with the origin, the line and what is not YAML."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)  # of a control character
        where = f" at line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}: not YAML{where}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
        why = str(error).partition(";")[0]
        raise InputError(f"{origin}: cannot be read: {why}: write it shorter or flatter") from None


def dump_yaml(value: Any) -> str:
    """The YAML of a value, in its own order, which `parse_yaml` reads back."""
    return yaml.dump(value, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, kind: str, *needed: str) -> dict:
    """The mapping in a YAML file. kind: what it should be, as "a recipe"; needed: the keys that tell it from others.
    Raises InputError for a file that is missing, not UTF-8, not YAML, or not of its kind."""
    try:
        data = parse_yaml(decode(path.read_bytes(), path), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such {kind.partition(' ')[2]}: correct its path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error.strerror}") from None
    if not isinstance(data, dict) or not data.keys() >= set(needed):
        shape = f"with {', '.join(needed)}" if needed else "of sections (name, teacher, corpus, ...)"
        raise InputError(f"{path}: {kind} is a mapping {shape}")
    return data


def parse_override(override: str) -> tuple[str, Any]:
    """(key.subkey, value) of a command line's `key.subkey=value`; nothing behind the sign is null."""
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"{override}: write an override as key.subkey=value")
    return key, parse_yaml(value, f"{override:.100}") if value else None


def override_value(data: dict, keys: list[str], value: Any, origin: str) -> None:
    """Sets data[a][b][c] for keys a.b.c, making the sections on the way; a number is the position in a list."""
    node: Any = data
    for depth, key in enumerate(keys):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise InputError(f"{origin}: {key} is not a position in {'.'.join(keys[:depth])}: it has {len(node)}")
            key = int(key)
        elif not isinstance(node, dict):
            raise InputError(f"{origin}: {keys[depth - 1]} is a value, not a section")
        if depth == len(keys) - 1:
            node[key] = value
            return
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        if isinstance(node[key], int | float) and "losses" in keys[:depth]:
            node[key] = {"weight": node[key]}  # the short form of a loss
        node = node[key]
