"""Harvested documentation: the prose of docstrings, in the same order whoever helps, and nothing executed."""

import ast
import inspect
import json
import sysconfig
from pathlib import Path

import pytest

from tokenizer_build.errors import InputError
from vocabshrink.lab.harvest import compiled_docstrings, docstrings, harvest, list_files, paragraphs


@pytest.fixture
def packages(tmp_path) -> Path:
    root = tmp_path / "packages"
    files = {
        "alpha/__init__.py": '"""Alpha adds two numbers together."""\nraise SystemExit("imported")\n',
        "alpha/core.py": '"""Core of the alpha package."""\ndef f():\n  "Alpha adds two numbers together."\n',
        "alpha/tests/test_core.py": '"""Tests of the alpha package are skipped."""\n',
        "alpha/test_more.py": '"""Tests beside the code are skipped too."""\n',
        "alpha/broken.py": '"""This file does not parse at all."""\ndef (:\n',
        "alpha/nul.py": '"""This file holds a NUL byte."""\n\0',
        "alpha/latin.py": "# -*- coding: latin-1 -*-\n" + '"""Das ist eine Datei für Müller."""\n',
        "alpha/wrong.py": '"""This Müller is not UTF-8 at all."""\n',
        "alpha/surrogate.py": '"""A lone surrogate \\ud800 cannot be written."""\n',
        "beta.py": "x = 1\n",
        "not-a-module/x.py": '"""Nobody can import this file."""\n',
        ".hidden/x.py": '"""Nobody should look at this file."""\n',
    }
    for index in range(40):
        files[f"many/m{index:02}.py"] = f'"""Number {index} of the many small modules."""\n'
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1" if name in ("alpha/latin.py", "alpha/wrong.py") else "utf-8"))
    return root


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_counts_and_order(packages, tmp_path):
    out = tmp_path / "docs.jsonl"
    counts = harvest(out, roots=[packages])
    found = [(row["source"], row["text"]) for row in rows(out)]
    assert found[:3] == [
        ("alpha", "Alpha adds two numbers together."),  # and not again for alpha.core.f
        ("alpha.core", "Core of the alpha package."),
        ("alpha.latin", "Das ist eine Datei für Müller."),
    ]
    assert found[3:] == [(f"many.m{i:02}", f"Number {i} of the many small modules.") for i in range(40)]
    assert counts == {"paragraphs": 43, "words": sum(len(text.split()) for _, text in found)}
    assert len(list_files([packages])) == 48


def test_every_process_count_gives_the_same_bytes(packages, tmp_path):
    alone, helped = tmp_path / "alone.jsonl", tmp_path / "helped.jsonl"
    assert harvest(alone, roots=[packages]) == harvest(helped, roots=[packages], processes=2)
    assert alone.read_bytes() == helped.read_bytes()


def test_a_root_inside_another_is_read_once(packages, tmp_path):
    once = list_files([packages])
    assert list_files([packages, packages / "alpha"]) == once
    inner = packages / "site-packages"
    (inner / "gamma").mkdir(parents=True)
    (inner / "gamma" / "__init__.py").write_text("")
    assert list_files([packages]) == once  # the standard library often holds site-packages
    assert list_files([packages, inner])[-1] == ("gamma", inner / "gamma" / "__init__.py")


def test_the_default_is_this_interpreter(packages, monkeypatch):
    asked = {"stdlib": sysconfig.get_path("stdlib"), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_path", asked.get)
    files = list_files()
    modules = dict(files)
    assert modules["inspect"] == Path(inspect.__file__) and "json.decoder" in modules and "json" in modules
    assert files[-1] == ("many.m39", packages / "many" / "m39.py")
    assert not any("test" in name.split(".") for name in modules)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="docs.txt: give a name that ends with .jsonl"):
        harvest(tmp_path / "docs.txt", roots=[tmp_path])
    with pytest.raises(InputError, match="no documentation in 0 files"):
        harvest(tmp_path / "docs.jsonl", roots=[tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_docstrings_equal_what_python_itself_attaches():
    """Reference: ast.walk with ast.get_docstring on a real module, whatever nesting it has."""
    tree = ast.parse(Path(inspect.__file__).read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    expected = sorted(doc for node in nodes if (doc := ast.get_docstring(node, clean=False)))
    found = dict(docstrings(tree, "inspect"))
    assert sorted(doc for _, doc in docstrings(tree, "inspect")) == expected and len(expected) > 50
    assert found["inspect.Signature.bind"] == inspect.Signature.bind.__doc__


def test_definitions_in_branches_and_functions_are_found():
    source = '''
if True:
    class A:
        def f(self):
            """F"""
            try:
                pass
            except E:
                async def g():
                    """G"""
            else:
                def h():
                    """H"""
'''
    assert list(docstrings(ast.parse(source), "m")) == [("m.A.f", "F"), ("m.A.f.g", "G"), ("m.A.f.h", "H")]


DOCSTRING_STYLES = {
    "wrapped lines and short ones": (
        """Sort a list by
        one or more keys.

        Too short.
        """,
        ["Sort a list by one or more keys."],
    ),
    "doctest and literal blocks": (
        """Return the middle of three values::

            middle(1, 2, 3) is a call in a literal block

            and so is this line of words

        The text goes on after the block.

        The prose before a doctest stays.
        >>> from here import nothing that is kept
        a line of printed output words

        .. code-block:: python

            this is not a sentence either

        .. note:: A note is prose like any other text.
        """,
        [
            "Return the middle of three values:",
            "The text goes on after the block.",
            "The prose before a doctest stays.",
            "A note is prose like any other text.",
        ],
    ),
    "fenced code": (
        """Use it as shown in the example.

        ```python
        words that look like a sentence

        are still inside of the fence
        ```

        And now we are outside again.
        """,
        ["Use it as shown in the example.", "And now we are outside again."],
    ),
    "numpydoc": (
        """
        Parameters
        ----------
        first, second : array_like of numbers or similar things
            The values that are compared,
            one after the other.
        key : callable
            Applied to each value before comparing.

        See Also
        --------
        other

        References
        ----------
        .. [1] Somebody, "A long title of a paper", Some Journal.
        """,
        ["The values that are compared, one after the other.", "Applied to each value before comparing."],
    ),
    "google": (
        """
        Args:
            size (int): The number of pieces
                in the new vocabulary.
            name (str): What the file is called.

        Returns:
            The path of the written file.
        Outdented words are another paragraph.
        """,
        [
            "size (int): The number of pieces in the new vocabulary.",
            "name (str): What the file is called.",
            "The path of the written file.",
            "Outdented words are another paragraph.",
        ],
    ),
    "sphinx": (
        """
        :param int size: The number of pieces
            in the new vocabulary.
        :return: The path of the written file.
        """,
        ["size: The number of pieces in the new vocabulary.", "return: The path of the written file."],
    ),
    "markup": (
        """Call :meth:`~pkg.Class.run` on ``value`` or `the page <https://x>`_ of :ref:`x <y>` once [3]_.""",
        ["Call pkg.Class.run on value or the page of x once."],
    ),
    "lists": (
        """
        - the first thing that can happen
        - the second thing, which is
          longer than one line
        1. a numbered thing that follows 2 * 3 others
        """,
        [
            "the first thing that can happen",
            "the second thing, which is longer than one line",
            "a numbered thing that follows 2 * 3 others",
        ],
    ),
    "tables and code": (
        """
        =====  =====
        name   what the column of words means
        =====  =====

        +-----+------+
        | one | two words in a cell of it |
        +-----+------+

        result = this is not a sentence
        other = but looks like one here

        0.1 0.2 0.3 and 0.4 0.5 0.6 are some of the 12 34 56 78
        """,
        [],
    ),
}


@pytest.mark.parametrize("name", DOCSTRING_STYLES)
def test_paragraphs_of(name):
    docstring, expected = DOCSTRING_STYLES[name]
    assert list(paragraphs(docstring)) == expected


def test_compiled_builtins_are_read_from_the_interpreter():
    docs = dict(compiled_docstrings())
    assert docs["sorted"] == sorted.__doc__ and docs["list.sort"] == list.sort.__doc__
    assert not [name for name in docs if name.startswith("builtins.") or name.endswith("__doc__")]
    assert list(compiled_docstrings()) == list(compiled_docstrings())
