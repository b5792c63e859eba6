"""Harvest a corpus that everybody has: the documentation inside the Python packages installed here.

Docstrings are read from the source with `ast`: nothing is imported or run, so harvesting an unknown package is safe.
What packages have in C is missed, but for the interpreter's own modules: `sorted` and `list.sort` are there. A
paragraph is kept where it looks like prose by a few coarse tests; they lose some prose and keep some noise, which word
counts and training batches forgive. Tests are skipped: their docstrings say "Test that it works".

The cost is parsing: about 10 MB of source per second and process with the garbage collector off (a syntax tree holds no
cycles worth collecting, and collecting took a third of the time). A file without a triple quote is not parsed at all:
almost a third of all files, and next to no documentation.
"""

import ast
import gc
import gzip
import importlib
import inspect
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizer_build.count import map_in_order
from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FILES_PER_TASK = 32
NOTE = r"\.\. ?(?:note|warning|tip|important|caution|attention|hint|seealso)::"  # the directives that hold prose
CODE = re.compile(  # fenced code; a doctest and its output; what is deeper than a directive or a line ending in "::"
    r"^ *(```|~~~)(?s:.*?)(?:\1.*|\Z)|^ *>>>.*(?:\n.*\S.*)*"
    rf"|^(?P<indent> *)(?!{NOTE})(?:\.\. ?[\w:-]+::.*|(?P<kept>.*:):$)(?:\n(?P=indent) +\S.*|\n *$)*",
    re.MULTILINE,
)
# Lines without prose: rules, references, tables, typed names ("size : int") and what looks like code.
NO_PROSE = re.compile(
    rf"([-=~^*+#_.\"'`])\1{{2,}}$|(?!{NOTE})\.\. |[|+]|[$%@#] ?\w|\*{{0,2}}\w[\w, *]* : |\S+ *[-+*/|]?= "
    r"|from \S+ import |import \w|(?:def|class|for|while|if|with) .*:$|\S+\(.*\)$|\S*[({\[]$|.*\S(?:\s{3,}|\t)\S"
)
ITEM = rf"{NOTE}|[-*+•](?= )|\(?\d{{1,2}}[.)](?= )|#\."
FIELD = r":(?=\w[^:`]*: )(?:[^:`]* )?(?=[\w*\\]+: )"  # as in ":param int size: text"
START = re.compile(rf"{ITEM}|{FIELD}|[*`]{{0,4}}[\w.]+[*`]*(?: ?\([^)]*\))?: ")  # the last: "size (int): text"
MARKUP = re.compile(rf"^(?:{ITEM}|{FIELD})|(?::[\w:+-]+:)?(`+)[~!]?([^`]+?)(?:\s*<[^`<>]*>)?\1_{{0,2}}| ?\[[\w#*]+\]_")


def harvest(out: Path, *, processes: int = 1, roots: list[Path] | None = None) -> dict[str, int]:
    """Write the documentation of the installed packages to `out`, one paragraph per JSON line.

    `out` ends with .jsonl or .jsonl.gz; its rows are {"text": str, "source": "module.qualified.name"}. `roots` are
    folders of importable packages: by default the running interpreter's standard library and site-packages. The output
    is the same for any number of processes. Returns how many `files`, how many of them `unreadable`, `paragraphs`,
    `duplicates` dropped and `words`. Raises InputError for a root that is no folder, no documentation, a full disk.
    """
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"cannot write {out}: give a name that ends with .jsonl or .jsonl.gz")
    files = list_files(roots)
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    compiled = [] if roots else [(name, text) for name, doc in compiled_docstrings() for text in paragraphs(doc)]
    counts = {"files": len(files), "unreadable": 0, "paragraphs": 0, "duplicates": 0, "words": 0}
    seen: set[str] = set()
    with replacing(out) as temporary, temporary.open("wb") as raw:
        # a gzip header holds a name and a time unless told otherwise
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) if out.suffix == ".gz" else raw as file:
            for found, unreadable in chain([(compiled, 0)], map_in_order(_read, tasks, processes)):
                counts["unreadable"] += unreadable
                counts["duplicates"] += len(found)
                for source, text in found:
                    if text.lower() not in seen:
                        seen.add(text.lower())
                        counts["words"] += text.count(" ") + 1
                        file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n")
        counts |= {"paragraphs": len(seen), "duplicates": counts["duplicates"] - len(seen)}
        if not seen:
            raise InputError(f"no documentation in {len(files)} files: give folders of Python packages")
    return counts


def list_files(roots: list[Path] | None = None) -> list[tuple[str, Path]]:
    """(module name, path) of every Python file below the roots (see `harvest`), sorted by name within a root.

    Skipped are tests, hidden folders and others that cannot be part of a module's name, by the names inside the root.
    """
    files: dict[Path, str] = {}
    for root in roots or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder: give the folder that holds the packages")
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
        shown = None if name == "builtins" else name.lstrip("_")
        for key, member in sorted(vars(importlib.import_module(name)).items()):
            # a module holds what it imported too; a builtin class or function says where it is at home
            if not key.startswith("__") and getattr(member, "__module__", None) == name:
                members = {"": member, **(vars(member) if isinstance(member, type) else {})}
                for part, value in sorted(members.items()):
                    if not part.startswith("__") and callable(value) and isinstance(value.__doc__, str):
                        yield ".".join(filter(None, (shown, key, part))), value.__doc__


def _read(files: list[tuple[str, Path]]) -> tuple[list[tuple[str, str]], int]:
    """(source, paragraph) of every docstring of the files, in order, and how many files could not be parsed."""
    found, unreadable, collecting = [], 0, gc.isenabled()
    gc.disable()
    for module, path in files:
        try:
            source = path.read_bytes()
            if b'"""' in source or b"'''" in source:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's code
                    tree = ast.parse(source)
                found += [(name, text) for name, doc in docstrings(tree, module) for text in paragraphs(doc)]
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            unreadable += 1  # ValueError: NUL bytes, wrong encoding; the last two: nested too deep for the parser
    if collecting:
        gc.enable()
    return found, unreadable


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
        text = line.strip()
        indent = len(line) - len(line.lstrip())
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
