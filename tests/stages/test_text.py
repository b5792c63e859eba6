"""From text to word ids: what the stages before training leave for the report."""

import itertools
import shutil

from tokenizers import Tokenizer

from tokenizer_build.files import read_json
from vocabshrink.run.engine import Run, run_stage
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import parse_recipe


def test_examples_hold_no_padding(tiny_teacher, tmp_path):
    """all-MiniLM-L6-v2's tokenizer.json pads every text to 128 pieces: a page showed 128 [PAD] behind each word."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(teacher / "tokenizer.json"))
    words = ["".join(letters) for letters in itertools.islice(itertools.permutations("kalominerusa", 6), 600)]
    (tmp_path / "corpus.txt").write_text(" ".join(words * 2))
    recipe = {
        "name": "padded",
        "teacher": {"model": str(teacher)},
        "corpus": {"sources": [str(tmp_path / "corpus.txt")], "processes": 1},
        "vocabulary": {"size": 160},
    }
    run = Run(parse_recipe(recipe, "test"), RunDir(tmp_path / "run"))
    for stage in ("count", "vocab"):
        run_stage(run, stage)
    examples = read_json(tmp_path / "run" / "vocab" / "comparison.json")["examples"]
    assert examples
    for row in examples:
        assert "[PAD]" not in row["teacher"] + row["student"], row
