"""The Makefile hands values on as data: neither make nor a shell runs or changes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = """#!{python}
import json, sys
print(json.dumps(sys.argv[1:]))
"""
NASTY = ["$(shell touch ran)", "'$(touch ran)'", "`touch ran`", 'say "hi" there', "costs $5; touch ran", "a#b \\ * ~ %"]


@pytest.fixture
def make(tmp_path):
    """Runs a target in a copy where `python` prints its arguments."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("demo", "dev"):
        (tmp_path / ".venv" / f"{name}.installed").touch()
    (bin / "python").write_text(STUB.format(python=sys.executable))
    (bin / "python").chmod(0o755)

    def run(*arguments: str, **environment: str) -> list[str]:
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        command = ["make", "-s", f"PYTHON={sys.executable}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "ran").exists()
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_values_are_data(make):
    for query, artifact in zip(NASTY[::2], NASTY[1::2], strict=True):
        found = make("ask", f"QUERY={query}", f"ARTIFACT={artifact}")
        assert found == ["-m", "vocabshrink", "search", artifact, query]
    everything = " ".join(NASTY)
    assert make("plan", f"SET={everything}", RECIPE=everything)[2:] == ["plan", everything, *everything.split()]
    made = make("reproduce", f"MODEL={NASTY[1]}", f"DATA={NASTY[3]}", "SET=seed=1")
    assert made == ["recipes/reproduce.py", NASTY[1], NASTY[3], "seed=1"]
