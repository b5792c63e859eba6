"""What the README says exists: commands, targets, files, recipes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]


def test_every_module_has_its_line():
    named = set(re.findall(r"`(\w+\.py)`", README))
    modules = {p.name for package in ("vocabshrink", "tokenizer_build") for p in (ROOT / package).glob("*.py")} - {
        "__init__.py"
    }
    assert modules == named | ({"__main__.py"} & modules), modules ^ named


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    target = command.split()[1]
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("vocabshrink ")])
def test_commands_parse(command):
    """Every command and option is known; what needs the teacher or an artifact is only asked for its help."""
    arguments = command.split()[1:]
    if arguments[0] == "show":
        done = subprocess.run(
            [sys.executable, "-m", "vocabshrink", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert "steps: 1000" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "vocabshrink", arguments[0], "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_recipes_named_exist():
    named = set(re.findall(r"recipes/[\w./-]+\.yaml", README))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_released_model_answers():
    """README's Python lines, run as they stand."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(vectors.shape)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "(2, 384)", done.stderr
