"""Imports point to the left only, never in a circle, and what must run without torch never loads it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A folder imports from itself and from those to its left; the modules of vocabshrink itself, the front, stand last.
ORDER = ["tokenizer_build", "runtime", "run", "pages", "data", "models", "training", "delivery", "stages", "lab"]
APART = {("run", "runtime"), ("delivery", "training")}  # neighbours that know nothing of each other
WITHOUT_TORCH = {"tokenizer_build", "runtime", "run", "pages"}


def folder_of(module: str) -> str:
    """The folder of a module's full name; "" for the front."""
    parts = module.split(".")
    return parts[0] if parts[0] != "vocabshrink" else parts[1] if len(parts) > 2 else ""


def sources() -> dict[str, str]:
    """{full name: source} of every module of both packages."""
    paths = [path for package in ("tokenizer_build", "vocabshrink") for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def imports(source: str, importer: str, modules: set[str], *, only_at_import: bool) -> Iterator[str]:
    """Full names that a module imports; a name that is one of `modules` is given as that module."""
    tree = ast.parse(source)
    for node in at_import(tree) if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*importer.split(".")[: -node.level], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        else:
            continue
        for name in names:
            yield f"{name}.__init__" if f"{name}.__init__" in modules else name


def upward(files: dict[str, str]) -> list[str]:
    """One sentence per import that the order forbids, wherever in the module it stands."""
    wrong = []
    for importer, source in files.items():
        here = folder_of(importer)
        for name in imports(source, importer, set(files), only_at_import=False):
            if not here or name.split(".")[0] not in ("vocabshrink", "tokenizer_build"):
                continue
            there = folder_of(name)
            allowed = there in ORDER and ORDER.index(there) <= ORDER.index(here)
            if not allowed or tuple(sorted((here, there))) in APART:
                wrong.append(f"{importer} ({here}) imports {name} ({there or 'front'})")
    return wrong


def loads(files: dict[str, str], module: str, wanted: str) -> list[str] | None:
    """The chain of imports by which importing `module` loads `wanted` directly or through our own modules."""
    chains, seen = [[module]], {module}
    while chains:
        chain = chains.pop(0)
        for name in imports(files[chain[-1]], chain[-1], set(files), only_at_import=True):
            if name.split(".")[0] == wanted or name == wanted:
                return [*chain, name]
            if name in files and name not in seen:
                seen.add(name)
                chains.append([*chain, name])
    return None


FILES = sources()
FRONT = {"vocabshrink.__init__", "vocabshrink.__main__", "vocabshrink.api", "vocabshrink.cli"}


def test_every_folder_is_in_the_order():
    assert {folder_of(name) for name in FILES} <= {*ORDER, ""}
    assert {name for name in FILES if not folder_of(name)} <= FRONT


def test_imports_point_to_the_left_only():
    assert upward(FILES) == []


@pytest.mark.parametrize("module", FILES)
def test_no_module_imports_itself_in_a_circle(module):
    assert loads(FILES, module, module) is None


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in FILES
        if folder_of(name) in WITHOUT_TORCH or name in FRONT and name != "vocabshrink.api"  # which trains
    ],
)
def test_torch_is_not_loaded_by(module):
    assert loads(FILES, module, "torch") is None
    if folder_of(module) in ("", "runtime"):  # the base install has neither
        assert loads(FILES, module, "pydantic") is None and loads(FILES, module, "yaml") is None


MADE_UP = {
    "vocabshrink.__init__": "",
    "vocabshrink.run.recipe": "import os\ndef f():\n    from ..training.loop import train",
    "vocabshrink.runtime.index": "from vocabshrink.models import student\nfrom vocabshrink import __version__",
    "vocabshrink.models.student": "import torch.nn as nn\nimport vocabshrink.delivery.export",
    "vocabshrink.delivery.export": "from ..training import losses\nfrom vocabshrink.models.student import build",
    "vocabshrink.training.losses": "import vocabshrink.delivery.export as e\nfrom vocabshrink.run.recipe import Recipe",
    "vocabshrink.training.loop": "if TYPE_CHECKING:\n    import torch\nelse:\n    pass\ndef f():\n    import torch",
    "vocabshrink.cli": "from vocabshrink.stages import text",
    "tokenizer_build.count": "import tokenizer_build.errors\nfrom vocabshrink.run.recipe import Recipe",
}


def test_the_checks_see_what_they_must():
    assert upward(MADE_UP) == [
        "vocabshrink.run.recipe (run) imports vocabshrink.training.loop (training)",
        "vocabshrink.runtime.index (runtime) imports vocabshrink.models.student (models)",
        "vocabshrink.runtime.index (runtime) imports vocabshrink.__init__ (front)",
        "vocabshrink.models.student (models) imports vocabshrink.delivery.export (delivery)",
        "vocabshrink.delivery.export (delivery) imports vocabshrink.training.losses (training)",
        "vocabshrink.training.losses (training) imports vocabshrink.delivery.export (delivery)",
        "tokenizer_build.count (tokenizer_build) imports vocabshrink.run.recipe (run)",
    ]
    chain = loads(MADE_UP, "vocabshrink.runtime.index", "torch")
    assert chain == ["vocabshrink.runtime.index", "vocabshrink.models.student", "torch.nn"]
    assert loads(MADE_UP, "vocabshrink.training.loop", "torch") is None
    circle = loads(MADE_UP, "vocabshrink.models.student", "vocabshrink.models.student")
    assert circle == ["vocabshrink.models.student", "vocabshrink.delivery.export", "vocabshrink.models.student"]
