"""What README and the documents say exists: commands, targets, files, recipes, links; and their Python runs."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from vocabshrink.cli import app, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "artifacts/README.md", "recipes/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for text in TEXTS.values()
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
    }
)
# test_api.py runs api.md's
PYTHON = [
    code
    for page, text in TEXTS.items()
    if page != "docs/api.md"
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
]


def test_the_first_page_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_every_module_has_its_line():
    """In the section of its folder, and no line is of a module that is gone."""
    sections = re.split(r"^### `(.*?)/`", TEXTS["docs/how_it_works.md"], flags=re.M)[1:]
    named = {
        f"{folder}/{name}"
        for folder, text in zip(sections[::2], sections[1::2], strict=True)
        for name in re.findall(r"^\| `(\w+\.py)`", text, re.M)
    }
    modules = {
        str(path.relative_to(ROOT))
        for package in ("vocabshrink", "tokenizer_build")
        for path in (ROOT / package).rglob("*.py")
    }
    assert named == {name for name in modules if not name.endswith("__init__.py")}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    target = command.split()[1]
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(^|\| )vocabshrink ", c)])
def test_commands_parse(command, in_process):
    """Click reads every word, so an unknown command or option fails; nothing is run but `show`."""
    name, *arguments = re.sub(r"'([^']*)'|\"([^\"]*)\"", "quoted", command).split("vocabshrink ")[-1].split()
    commands = get_command(app).commands
    assert name in commands
    commands[name].make_context(name, [*arguments])
    if name == "show":
        done = in_process(main, name, *arguments, folder=ROOT)
        assert "steps: 1000" in done.stdout, done.stderr


@pytest.mark.parametrize("page", TEXTS)
def test_recipes_named_exist(page):
    named = set(re.findall(r"recipes/[\w./-]+\.yaml", TEXTS[page]))
    assert named or page not in ("README.md", "recipes/README.md")
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_files_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    files = [link.partition("#")[0] for link in links if not link.startswith("http")]
    assert not [file for file in files if not ((ROOT / page).parent / file).exists()]


@pytest.mark.parametrize("code", PYTHON)
def test_python_lines_run(code):
    """Where the packages that they show are installed."""
    if missing := [name for name in re.findall(r"^from (\w+)", code, re.M) if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(vectors.shape)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "(2, 384)", done.stderr
