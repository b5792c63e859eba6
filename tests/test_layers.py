"""Imports point down only, never in a circle, and what must run without torch never loads it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "facts": "recipe run_dir layer_map budget",
    "parts": "harvest lexicon batches teacher student projection quantize augment tasks checkpoint evaluation",
    "delivery": "__init__ drawing graph export delivery runtime report measure card bench web",
    "training": "losses dual_training distillation recorded classification finetune loop",
    "front": "cli stages plan variants ablations search search_page __main__",
}
MAY_IMPORT = {
    "facts": {"facts"},
    "parts": {"facts", "parts"},
    "delivery": {"facts", "parts", "delivery"},  # what is shipped knows nothing of how it was trained,
    "training": {"facts", "parts", "training"},  # and the other way round
    "front": set(LAYERS),
}
LAYER_OF = {f"vocabshrink.{name}": layer for layer, names in LAYERS.items() for name in names.split()}
WITHOUT_TORCH = {name for name, layer in LAYER_OF.items() if layer == "facts"} | {
    "vocabshrink.__init__",
    "vocabshrink.harvest",
    "vocabshrink.runtime",
    "vocabshrink.report",
    "vocabshrink.card",
    "vocabshrink.bench",
    "vocabshrink.web",
}


def sources() -> dict[str, str]:
    """Source of every module of both packages under its full name."""
    found = {}
    for package in ("tokenizer_build", "vocabshrink"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
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
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in modules else base for name in inside]
        else:
            continue
        for name in names:
            yield f"{name}.__init__" if f"{name}.__init__" in modules else name


def upward(files: dict[str, str]) -> list[str]:
    """One sentence per import that the layering forbids, wherever in the module it stands."""
    wrong = []
    for importer, source in files.items():
        for name in imports(source, importer, set(files), only_at_import=False):
            if importer.startswith("tokenizer_build."):
                if name.startswith("vocabshrink"):
                    wrong.append(f"{importer} imports {name}: tokenizer_build stands alone")
            elif name.startswith("vocabshrink.") and importer in LAYER_OF:
                layer = LAYER_OF.get(name, "unlisted")
                if layer not in MAY_IMPORT[LAYER_OF[importer]]:
                    wrong.append(f"{importer} ({LAYER_OF[importer]}) imports {name} ({layer})")
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


def test_every_module_is_in_a_layer():
    unlisted = [name for name in FILES if name.startswith("vocabshrink.") and name not in LAYER_OF]
    assert unlisted == [], f"add to LAYERS in {Path(__file__).name}: {unlisted}"


def test_imports_point_down_only():
    assert upward(FILES) == []


@pytest.mark.parametrize("module", FILES)
def test_no_module_imports_itself_in_a_circle(module):
    assert loads(FILES, module, module) is None


@pytest.mark.parametrize(
    "module", [name for name in FILES if name in WITHOUT_TORCH or name.startswith("tokenizer_build.")]
)
def test_torch_is_not_loaded_by(module):
    assert loads(FILES, module, "torch") is None


MADE_UP = {
    "vocabshrink.__init__": "",
    "vocabshrink.recipe": "import os\ndef f():\n    from .loop import train",
    "vocabshrink.runtime": "from vocabshrink import student, __version__",
    "vocabshrink.student": "import torch.nn as nn\nimport vocabshrink.export",
    "vocabshrink.export": "from . import losses\nfrom vocabshrink.student import build\nimport torchless",
    "vocabshrink.losses": "import vocabshrink.export as e\nfrom vocabshrink.recipe import Recipe",
    "vocabshrink.loop": "if TYPE_CHECKING:\n    import torch\nelse:\n    pass\ndef f():\n    import torch",
    "vocabshrink.cli": "from vocabshrink import stages, loop",
    "tokenizer_build.count": "import tokenizer_build.errors\nfrom vocabshrink.recipe import Recipe",
}


def test_the_checks_see_what_they_must():
    assert upward(MADE_UP) == [
        "vocabshrink.recipe (facts) imports vocabshrink.loop (training)",
        "vocabshrink.student (parts) imports vocabshrink.export (delivery)",
        "vocabshrink.export (delivery) imports vocabshrink.losses (training)",
        "vocabshrink.losses (training) imports vocabshrink.export (delivery)",
        "tokenizer_build.count imports vocabshrink.recipe: tokenizer_build stands alone",
    ]
    assert loads(MADE_UP, "vocabshrink.runtime", "torch") == ["vocabshrink.runtime", "vocabshrink.student", "torch.nn"]
    assert loads(MADE_UP, "vocabshrink.loop", "torch") is None
    circle = loads(MADE_UP, "vocabshrink.student", "vocabshrink.student")
    assert circle == ["vocabshrink.student", "vocabshrink.export", "vocabshrink.student"]
