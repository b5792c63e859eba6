"""Harvest a corpus that everybody has: the documentation inside the Python packages installed here.

Docstrings are read from the source with `ast`: nothing is imported or run, so harvesting an unknown package is safe. A
few coarse tests tell prose; they lose some and keep some noise, which word counts and training batches forgive. Parsing
takes a second for 8 MB of source. Files without a triple quote, almost a third of all, are skipped."""

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizer_build.count import map_in_order
from tokenizer_build.errors import InputError
from tokenizer_build.files import write_jsonl

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NOTE = r"\.\. ?(?:note|warning|tip|important|caution|attention|hint|seealso)::"  # the directives that hold prose
CODE = re.compile(  # fenced code; a doctest and its output; what is deeper than a directive or a line ending in "::"
    r"(?m)^ *(```|~~~)(?s:.*?)(?:\1.*|\Z)|^ *>>>.*(?:\n.*\S.*)*"
    rf"|^(?P<indent> *)(?!{NOTE})(?:\.\. ?[\w:-]+::.*|(?P<kept>.*:):$)(?:\n(?P=indent) +\S.*|\n *$)*"
)
NO_PROSE = re.compile(  # lines that are rules, references, tables, typed names ("size : int") or look like code
    rf"([-=~^*+#_.\"'`])\1{{2,}}$|(?!{NOTE})\.\. |[|+]|[$%@#] ?\w|\*{{0,2}}\w[\w, *]* : |\S+ *[-+*/|]?= "
    r"|from \S+ import |import \w|(?:def|class|for|while|if|with) .*:$|\S+\(.*\)$|\S*[({\[]$|.*\S(?:\s{3,}|\t)\S"
)
ITEM = rf"{NOTE}|[-*+•](?= )|\(?\d{{1,2}}[.)](?= )|#\."
FIELD = r":(?=\w[^:`]*: )(?:[^:`]* )?(?=[\w*\\]+: )"  # as in ":param int size: text"
START = re.compile(rf"{ITEM}|{FIELD}|[*`]{{0,4}}[\w.]+[*`]*(?: ?\([^)]*\))?: ")  # the last: "size (int): text"
MARKUP = re.compile(rf"^(?:{ITEM}|{FIELD})|(?::[\w:+-]+:)?(`+)[~!]?([^`]+?)(?:\s*<[^`<>]*>)?\1_{{0,2}}| ?\[[\w#*]+\]_")


def harvest(out: Path, *, processes: int = 1, roots: list[Path] | None = None) -> dict[str, int]:
    """Write the documentation of installed packages to `out` (.jsonl), one paragraph per row, none twice: {"text": str,
    "source": "module.qualified.name"}. roots: folders of packages; by default this interpreter's. Returns the numbers
    of `paragraphs` and `words`. Raises InputError for another name, and where there is no documentation."""
    if out.suffix != ".jsonl":
        raise InputError(f"cannot write {out}: give a name that ends with .jsonl")
    files, rows = list_files(roots), {}
    compiled = [] if roots else [(name, text) for name, doc in compiled_docstrings() for text in paragraphs(doc)]
    for source, text in chain(compiled, chain.from_iterable(map_in_order(_read, files, processes))):
        rows.setdefault(text.lower(), {"text": text, "source": source})
    if not rows:
        raise InputError(f"no documentation in {len(files)} files: give folders of Python packages")
    write_jsonl(out, rows.values())
    return {"paragraphs": len(rows), "words": sum(text.count(" ") + 1 for text in rows)}


def list_files(roots: list[Path] | None = None) -> list[tuple[str, Path]]:
    """(name, path) of every module below the roots (see `harvest`) except tests, sorted by name within a root."""
    files: dict[Path, str] = {}
    for root in roots or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]:
        found = []
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            test = parts[-1].startswith("test_") or not SKIPPED_FOLDERS.isdisjoint(parts[:-1])
            if not test and all(map(str.isidentifier, parts)):
                found.append((".".join(parts).removesuffix(".__init__"), path))
        for module, path in sorted(found):
            files.setdefault(path.resolve(), module)  # a root inside another one is read once
    return [(module, path) for path, module in files.items()]


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of what the interpreter has in C; only modules built into it are imported."""
    for name in sorted(sys.builtin_module_names):
        shown = "" if name == "builtins" else name.lstrip("_") + "."
        for key, member in sorted(vars(importlib.import_module(name)).items()):
            # a module holds what it imported too; a builtin class or function says where it is at home
            if not key.startswith("__") and getattr(member, "__module__", None) == name:
                members = {"": member, **(vars(member) if isinstance(member, type) else {})}
                for part, value in sorted(members.items()):
                    if not part.startswith("__") and callable(value) and isinstance(value.__doc__, str):
                        yield f"{shown}{key}.{part}".removesuffix("."), value.__doc__


def _read(file: tuple[str, Path]) -> list[tuple[str, str]]:
    """(source, paragraph) of every docstring of a module's file, in order; none if it cannot be parsed."""
    module, path = file
    try:
        source = path.read_bytes()
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
            tree = ast.parse(source if b'"""' in source or b"'''" in source else b"")
        return [(name, text) for name, doc in docstrings(tree, module) for text in paragraphs(doc)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # ValueError: NUL bytes, wrong encoding; the last two: nested too deep for the parser


def docstrings(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function and of all inside it, in source order."""
    if isinstance(tree, DEFINITIONS) and (doc := ast.get_docstring(tree, clean=False)):
        yield name, doc
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # no definition hides elsewhere
            yield from docstrings(node, f"{name}.{node.name}" if isinstance(node, DEFINITIONS) else name)


def paragraphs(docstring: str) -> Iterator[str]:
    """The prose of a docstring, one line per paragraph or list item, without most of reStructuredText's markup."""
    paragraph, depth = [], 0
    for line in [*CODE.sub(lambda code: (code["kept"] or "") + "\n", inspect.cleandoc(docstring)).splitlines(), ""]:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        skipped = not text or NO_PROSE.match(text)
        below_a_name = indent > depth and paragraph and " " not in paragraph[-1]
        if skipped or below_a_name or indent < depth or START.match(text):
            words = MARKUP.sub(r"\2", " ".join(paragraph)).split()
            plain = sum(word.strip(".,;:!?()'\"-").isalpha() for word in words)
            if plain >= 4 and plain >= 0.6 * len(words) and (prose := " ".join(words)).isprintable():
                yield prose
            paragraph = []
        if not skipped:
            paragraph.append(text)
            depth = indent
