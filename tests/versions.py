"""The short tests with the oldest or the newest packages that pyproject.toml allows (`make versions`).

    python tests/versions.py oldest|newest [FOLDER]

Makes a virtual environment FOLDER/WHICH (build/versions) of exactly the lowest versions, or of the highest ones
found, whatever constraints.txt says, and runs SHORT in it. Exits with pytest's code.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("train", "report")  # beside the base
TESTED = ("torch", "transformers", "tokenizers", "accelerate", "onnxruntime", "numpy")
# From text to a delivery that answers: everything that touches a package whose interface has changed before.
SHORT = "tokenizer_build run models delivery runtime training/test_checkpoint.py"
SHORT += " training/test_loop.py data/test_batches.py stages/test_pipeline.py"


def requirements(which: str) -> list[str]:
    """What pip is to install: pyproject's own words, or each with its lower bound as the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(one for name in NEEDED for one in extras[name])]
    asked += [one for one in extras["dev"] if re.match("pytest|hypothesis|onnx-ir|sentence-tr|tensorboard", one)]
    return [re.sub(r">=([\w.]+).*", r"==\1", one) for one in asked] if which == "oldest" else asked


def main() -> int:
    which, place = sys.argv[1], Path(sys.argv[2] if sys.argv[2:] else ROOT / "build/versions").absolute() / sys.argv[1]
    python = place / "bin/python"
    if not python.is_file():
        venv.create(place, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", "--upgrade-strategy", "eager", *requirements(which)], check=True, cwd=ROOT)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)  # the tests ask for its version
    told = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {TESTED}), sep=', ')"
    subprocess.run([python, "-c", told], check=True)
    tests = [f"tests/{name}" for name in SHORT.split()]
    return subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
