"""What cannot work is refused before any stage runs."""

import pytest
import yaml

from tokenizer_build.errors import InputError
from vocabshrink.cli import app
from vocabshrink.run.recipe import parse_recipe
from vocabshrink.stages.checks import check_recipe


def recipe_of(teacher, corpus, how: str) -> dict:
    return {
        "name": "small",
        "teacher": {"model": str(teacher)},
        "corpus": {"sources": [str(corpus)], "processes": 1},
        "vocabulary": {"size": 160},
        "student": {"initialize": how},
    }


@pytest.mark.parametrize("how", ["extract_random", "extract_importance"])
def test_extraction_from_other_layers_than_berts_leaves_no_stage_folder(
    how, folders, corpus_file, tmp_path, monkeypatch
):
    data = recipe_of(folders["mpnet"], corpus_file, how)
    words = f"^student.initialize {how}: a mpnet teacher does not have BERT's layers: choose teacher or random$"
    with pytest.raises(InputError, match=words):
        check_recipe(parse_recipe(data, "here"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=words):
        app(["run", "recipe.yaml"], standalone_mode=False)
    assert not list(tmp_path.glob("artifacts/*/*"))


@pytest.mark.parametrize("family", ["bert", "roberta", "camembert"])
def test_extraction_from_berts_layers_passes(family, folders, corpus_file):
    check_recipe(parse_recipe(recipe_of(folders[family], corpus_file, "extract_importance"), "here"))
