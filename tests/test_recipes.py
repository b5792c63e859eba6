"""Every shipped recipe loads: found by rglob, so that none can be forgotten."""

from pathlib import Path

import pytest

from tokenizer_build.errors import InputError
from vocabshrink.dual_training import LOSSES_OF_MODE
from vocabshrink.losses import LOSSES, check_losses
from vocabshrink.recipe import dump_recipe, load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(path for pattern in ("*.yaml", "*.yml") for path in FOLDER.rglob(pattern))


def test_recipes_are_found():
    assert {"demo", "minilm_7mb"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
class TestRecipe:
    def test_loads_and_dumps_to_itself(self, path, tmp_path):
        recipe = load_recipe(path)
        (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / "dumped.yaml") == recipe

    def test_is_named_like_its_file(self, path):
        assert load_recipe(path).name == path.stem

    def test_refuses_an_unknown_key(self, path):
        with pytest.raises(InputError, match="unknown key vocabulary.siez: did you mean size"):
            load_recipe(path, ["vocabulary.siez=7"])

    def test_takes_an_override(self, path):
        assert load_recipe(path, ["delivery.budget=5MB", "seed=7"]).delivery.budget == 5_000_000

    def test_asks_only_for_losses_that_its_stages_give(self, path):
        recipe = load_recipe(path)
        if recipe.dual:
            check_losses("dual", recipe.dual.losses, LOSSES_OF_MODE[recipe.dual.mode])
        if recipe.distill:
            check_losses("distill", recipe.distill.losses, set(LOSSES))
            assert not {"teacher_masked_lm", "parameters_down", "parameters_up"} & set(recipe.distill.losses)
