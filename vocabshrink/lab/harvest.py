"""Harvest a corpus that everybody has: the documentation inside the Python packages installed here.

Docstrings of modules, classes and functions are read from the source with `ast`: nothing is imported or run,
so harvesting an unknown package is safe. What packages have in C is missed; of the interpreter's own builtin modules
it is read too, because `sorted` and `list.sort` are there. Kept is
prose in paragraphs; doctests, code, tables, headings and repeated paragraphs are dropped by simple rules that
were tuned by reading samples. They lose some prose and keep some noise, which word counts and training
batches forgive.

The cost is parsing: about 10 MB of source a second and process with the garbage collector off (a syntax tree
holds no cycles worth collecting, and collecting took a third of the time). A file without a triple quote is
not parsed at all: almost a third of all files, and next to no documentation. Tests are skipped: their
docstrings say "Test that it works". The output is the same for any number of processes: files are sorted, and
duplicates are dropped in that order.
"""

import ast
import gc
import gzip
import importlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import chain, starmap
from pathlib import Path

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PROSE_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "attention", "hint", "seealso"}

ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`")
LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}")
LITERAL = re.compile(r"``?~?([^`]+)``?_{0,2}")
CITATION = re.compile(r" ?\[[\w#*]+\]_")
DIRECTIVE = re.compile(r"\.\. ?([\w:-]+)::")
HEADING = re.compile(r"([-=~^*+#_.\"'`])\1{2,}$")
ITEM = re.compile(r"([-*+•]|\(?\d{1,2}[.)]|#\.)\s+(?=\S)")
# How the three docstring styles begin the description of an argument.
FIELD = re.compile(r":(?:\w+ )?(?:[\w.,\[\]| ]+ )?\*{0,2}([\w\\*]+):\s+(?=\S)")  # ":param int size: text"
ARGUMENT = re.compile(r"[*`]{0,4}[A-Za-z_][\w.`]*(?:\s*\([^)]*\))?\s*:\s+\S")  # "size (int): text"
PARAMETER = re.compile(r"[*`]{0,4}\w[\w`]*(?:, [*`]{0,4}\w+)* : |[\w*`]+ \(.*\):?$")  # "size : int"
CODE = re.compile(
    r"[$%@#] ?\w|(import|return|yield|raise|assert|del) [\w.]+$|from [\w.]+ import |import \w+ as "
    r"|(def|class|for|while|if|with) .*:$|[\w.\[\]]+ *[-+*/|]?= |[\w.]+\(.*\)$|[\w.]+\($|[\])}]|<\w"
)
TABLE = re.compile(r"[+|]|[=-]{2,}\s+[=-]{2,}|.*\S(\s{3,}|\t)\S.*(\s{3,}|\t)\S|.*\S\s*\|\s*\S.*\|")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffd]")


def harvest(
    out: Path,
    *,
    processes: int = 1,
    roots: list[Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the documentation of the installed packages to `out`, one paragraph per JSON line.

    `out` ends with .jsonl or .jsonl.gz; its rows are {"text": str, "source": "module.qualified.name"}.
    `roots` are folders of importable packages: by default the running interpreter's standard library and
    site-packages. `progress` gets (files done, files in all). With `processes` > 1 the caller's main module
    must be importable, as always with spawned processes.

    Returns the numbers of files (`files`), of those that could not be parsed (`unreadable`), of paragraphs
    written, of duplicates dropped, and of white-space separated words. Raises InputError for a root that is
    no folder, for roots without documentation, for another file name and for a full disk.
    """
    out = Path(out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"cannot write {out}: give a name that ends with .jsonl or .jsonl.gz")
    files = list_files(installed_roots() if roots is None else [Path(root) for root in roots])
    counts = {"files": len(files), "unreadable": 0, "paragraphs": 0, "duplicates": 0, "words": 0}
    seen: set[bytes] = set()
    with replacing(out) as temporary, temporary.open("wb") as raw:
        # The header of a gzip file holds a name and a time unless told otherwise.
        file = gzip.GzipFile("", "wb", 6, raw, mtime=0) if out.suffix == ".gz" else raw
        compiled = [] if roots else [(name, text) for name, doc in compiled_docstrings() for text in paragraphs(doc)]
        for done, harvested in enumerate(chain([compiled], _read_all(files, processes))):
            if progress is not None and done:
                progress(done, len(files))
            if harvested is None:
                counts["unreadable"] += 1
                continue
            for source, text in harvested:
                digest = blake2b(text.lower().encode(), digest_size=12).digest()
                if digest in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(digest)
                counts["paragraphs"] += 1
                counts["words"] += text.count(" ") + 1
                row = json.dumps({"text": text, "source": source}, ensure_ascii=False)
                file.write(row.encode() + b"\n")
        if file is not raw:
            file.close()
        if not counts["paragraphs"]:
            raise InputError(f"no documentation in {len(files)} files: give folders of Python packages")
    return counts


def installed_roots() -> list[Path]:
    """The running interpreter's standard library and site-packages, without repetition."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def list_files(roots: list[Path]) -> list[tuple[str, Path]]:
    """(module name, path) of every Python file below the roots, sorted by name within a root.

    The names of folders inside a root decide what is skipped, never those of the root itself; hidden folders
    and folders that cannot be part of a module's name are skipped too. Links to folders are not followed.
    """
    files: dict[Path, str] = {}
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root} is not a folder: give the folder that holds the packages")
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [n for n in subfolders if n.isidentifier() and n not in SKIPPED_FOLDERS]
            parts = Path(folder).relative_to(root).parts
            for name in names:
                stem, dot, suffix = name.rpartition(".")
                if suffix == "py" and dot and stem.isidentifier() and not stem.startswith("test_"):
                    module = parts if stem == "__init__" and parts else (*parts, stem)
                    found.append((".".join(module), Path(folder, name)))
        for module, path in sorted(found):
            files.setdefault(path.resolve(), module)  # a root inside another one is read once
    return [(module, path) for path, module in files.items()]


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of what the standard library has in C: `sorted` and `list.sort` are nowhere else.

    Only modules built into the interpreter are imported, those of installed packages never.
    """
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        shown = "" if name == "builtins" else name.lstrip("_") + "."
        for key, member in sorted(vars(module).items()):
            # a module holds what it imported too; a builtin class or function says where it is at home
            if key.startswith("__") or getattr(member, "__module__", None) != name:
                continue
            parts = sorted(vars(member).items()) if isinstance(member, type) else []
            for part, value in [("", member), *(p for p in parts if not p[0].startswith("__"))]:
                if isinstance(doc := getattr(value, "__doc__", None), str) and callable(value):
                    yield f"{shown}{key}" + (f".{part}" if part else ""), doc


def _read_all(files: list[tuple[str, Path]], processes: int) -> Iterator[list[tuple[str, str]] | None]:
    """What `_read` says of each file, in the order of `files`."""
    if processes == 1:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield from starmap(_read, files)
        finally:
            if collecting:
                gc.enable()
        return
    # Spawned, not forked: the caller may have threads (torch starts some), and forking those can hang.
    with multiprocessing.get_context("spawn").Pool(processes, gc.disable) as pool:
        yield from pool.imap(_read_pair, files, chunksize=32)


def _read_pair(pair: tuple[str, Path]) -> list[tuple[str, str]] | None:
    return _read(*pair)


def _read(module: str, path: Path) -> list[tuple[str, str]] | None:
    """(source, paragraph) of every docstring of one file in order; None where it cannot be parsed."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
        return [(name, text) for name, doc in docstrings(tree, module) for text in paragraphs(doc)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # ValueError: NUL bytes, wrong encoding; the last two: nested too deep for the parser


def docstrings(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function and of all inside it, in source order."""
    if isinstance(tree, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        doc = ast.get_docstring(tree, clean=False)
        if doc:
            yield name, doc
    for field in ("body", "handlers", "orelse", "finalbody"):  # statements: no definition hides elsewhere
        children = getattr(tree, field, ())
        for node in children if isinstance(children, list) else ():
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings(node, f"{name}.{node.name}")
            else:
                yield from docstrings(node, name)


def paragraphs(docstring: str) -> Iterator[str]:
    """The prose of a docstring, one line per paragraph or list item, without reStructuredText's markup."""
    for block in _blocks(inspect.cleandoc(docstring).splitlines()):
        for lines in _split(block):
            text = _prose(lines)
            if text is not None:
                yield text


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of non-empty lines, without literal blocks, fenced code and directives without prose."""
    block: list[str] = []
    literal_indent = None  # lines deeper than this belong to a literal block
    fenced = False
    for line in [*lines, ""]:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith(("```", "~~~")):
            fenced = not fenced
            bare = ""
        if fenced:
            bare = ""
        if bare and literal_indent is not None:
            if indent > literal_indent:
                continue
            literal_indent = None
        if not bare:
            if block:
                yield block
                block = []
            continue
        directive = DIRECTIVE.match(bare)
        if directive and directive.group(1) not in PROSE_DIRECTIVES:
            literal_indent = indent
            continue
        if directive:
            line = " " * indent + bare[directive.end() :].strip()
            if not line.strip():
                continue
        block.append(line)
        if bare.endswith("::"):
            block[-1] = line.rstrip()[:-1]
            literal_indent = indent
            yield block
            block = []


def _split(block: list[str]) -> Iterator[list[str]]:
    """Split a block where a list item, a described argument or an outdented line begins."""
    if any(TABLE.match(line.strip()) for line in block):
        return
    doctest = next((i for i, line in enumerate(block) if line.lstrip().startswith(">>>")), len(block))
    block = block[:doctest]  # what follows up to the next empty line is the doctest's output
    paragraph: list[str] = []
    last_indent = 0
    for line in block:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if HEADING.match(bare):
            paragraph = []  # the line above an underline is a heading
            continue
        starts = bare.startswith(".. ") or any(p.match(bare) for p in (ITEM, FIELD, ARGUMENT, PARAMETER))
        below_parameter = (
            len(paragraph) == 1
            and indent > last_indent
            and (PARAMETER.match(paragraph[0]) or paragraph[0].endswith(":") or len(paragraph[0].split()) == 1)
        )
        if paragraph and (starts or below_parameter or indent < last_indent):
            yield paragraph
            paragraph = []
        paragraph.append(bare)
        last_indent = indent
    if paragraph:
        yield paragraph


def _prose(lines: list[str]) -> str | None:
    """One line of plain text, or None where the lines are no sentence: code, a typed name, numbers."""
    if sum(bool(CODE.match(line)) for line in lines) * 2 > len(lines) or PARAMETER.match(lines[0]):
        return None
    if lines[0].startswith(".."):
        return None  # a comment, a citation, a link target
    text = " ".join(lines)
    if field := FIELD.match(text):
        text = f"{field.group(1)}: {text[field.end() :]}"
    elif item := ITEM.match(text):
        text = text[item.end() :]
    if "`" in text:
        text = LITERAL.sub(r"\1", LINK.sub(r"\1", ROLE.sub(r"\1", text)))
    text = " ".join(CITATION.sub("", text).split())
    words = text.split(" ")
    plain = sum(word.strip(".,;:!?()'\"-").isalpha() for word in words)
    if plain < 4 or plain * 10 < len(words) * 6 or UNPRINTABLE.search(text):
        return None
    return text
