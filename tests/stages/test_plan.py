"""The plan's arithmetic, and its refusal of a budget that cannot be met."""

import json

import pytest
from rich.console import Console
from transformers import BertConfig

from tokenizer_build.errors import InputError
from vocabshrink.cli import table_of
from vocabshrink.models.loading import load_config
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import parse_recipe
from vocabshrink.stages import plan
from vocabshrink.stages.plan import delivery_bytes, parameters


def make_recipe(teacher, **sections):
    corpus, vocabulary = {"sources": ["a.txt"]}, {"size": 200}
    data = {"name": "small", "teacher": {"model": str(teacher)}, "corpus": corpus, "vocabulary": vocabulary}
    return parse_recipe(data | sections, "here")


def shape(pieces: int, hidden: int, layers: int, inner: int, positions: int, types: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=pieces,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
    )


def sizes_of(config: BertConfig) -> tuple[int, ...]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
    return tuple(getattr(config, name) for name in (*names, "type_vocab_size"))


STAGE = {"steps": 10, "batch_size": 8, "max_length": 32}


class TestShapes:
    def test_the_students_gaps_are_the_teachers(self, tiny_teacher):
        student, teacher = plan.shapes(make_recipe(tiny_teacher, student={"num_hidden_layers": 2, "hidden_size": 16}))
        assert sizes_of(teacher) == (300, 32, 4, 64, 64, 2)
        assert sizes_of(student) == (200, 16, 2, 64, 64, 2)

    def test_the_teachers_own_vocabulary_has_its_size(self, tiny_teacher):
        student, _ = plan.shapes(make_recipe(tiny_teacher, vocabulary={"tokenizer": "teacher"}))
        assert student.vocab_size == 300

    def test_the_delivery_keeps_fewer_positions(self, tiny_teacher):
        for positions, expected in ((40, 40), (500, 64)):
            recipe = make_recipe(tiny_teacher, delivery={"max_positions": positions})
            assert plan.delivered_config(recipe, plan.shapes(recipe)[0]).max_position_embeddings == expected

    @pytest.mark.parametrize(("family", "types"), [("distilbert", 1), ("roberta", 1), ("albert", 2), ("mpnet", 1)])
    def test_of_every_family(self, family, types, folders):
        recipe = make_recipe(folders[family], student={"num_hidden_layers": 1})
        student, teacher = plan.shapes(recipe)
        assert sizes_of(student) == (200, 32, 1, 64, 64, types)
        size = load_config(folders[family]).vocab_size
        assert sizes_of(teacher) == (size, 32, teacher.num_hidden_layers, 64, 64, types)
        plan.check_budget(recipe)

    @pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
    def test_a_config_without_a_size_is_refused(self, tiny_teacher, tmp_path, key):
        for file in tiny_teacher.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        del config[key]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            InputError,
            match="config.json gives embeddings.word_embeddings.weight the shape .* belongs to another model",
        ):
            plan.shapes(make_recipe(tmp_path))


class TestBudget:
    def test_what_fits_passes(self, tiny_teacher):
        plan.check_budget(make_recipe(tiny_teacher))

    def test_what_does_not_fit_is_told_by_how_much_and_what_to_do(self, tiny_teacher):
        recipe = make_recipe(tiny_teacher, delivery={"weights": "fp32", "budget": "100kB"})
        needed = delivery_bytes(shape(200, 32, 4, 64, 64, 2), "fp32")["total"]
        assert needed > 100_000
        with pytest.raises(InputError) as caught:
            plan.check_budget(recipe)
        sentence = str(caught.value)
        assert f"small needs {needed / 1e6:.2f} MB at fp32: over the budget of 0.10 MB by" in sentence
        assert "; use " in sentence and "\n" not in sentence

    def test_the_heads_of_tasks_count(self, tiny_teacher):
        """Pooler and classifier: what the embedder's budget holds, the classifier's does not."""
        edge = delivery_bytes(shape(200, 32, 4, 64, 64, 2), "int4-128")["total"]
        files = {"train": "mood/train.jsonl", "validation": "mood/validation.jsonl"}
        sections = {"tasks": {"mood": files}, "finetune": {}, "delivery": {"budget": edge}}
        with pytest.raises(InputError, match="small with its head for mood needs"):
            plan.check_budget(make_recipe(tiny_teacher, **sections))
        plan.check_budget(make_recipe(tiny_teacher, **sections | {"finetune": {"save_models": False}}))

    def test_positions_of_the_delivery_count(self, tiny_teacher):
        """At the edge: 64 positions do not fit where 8 do."""
        edge = delivery_bytes(shape(200, 32, 4, 64, 8, 2), "int4-128")["total"]
        plan.check_budget(make_recipe(tiny_teacher, delivery={"max_positions": 8, "budget": edge}))
        for delivery in ({"max_positions": 8, "budget": edge - 1}, {"max_positions": 64, "budget": edge}):
            with pytest.raises(InputError, match="over the budget"):
                plan.check_budget(make_recipe(tiny_teacher, delivery=delivery))


class TestFlops:
    def test_by_hand(self):
        """One layer of width 4 and inner width 8 has 4 (16 + 4) + 32 + 8 + 32 + 4 + 4 * 4 = 172 variables."""
        config = shape(10, 4, 1, 8, 16)
        assert parameters(config)["layers"] == 172
        assert plan.flops_per_piece(config, 5) == 2 * 172 + 4 * 5 * 4  # scores and their sums: 2 * 5 * 4 each
        assert plan.flops_per_piece(shape(10, 4, 3, 8, 16), 5) == 3 * plan.flops_per_piece(config, 5)
        # tables cost nothing
        assert plan.flops_per_piece(shape(9999, 4, 1, 8, 512), 5) == plan.flops_per_piece(config, 5)

    def test_stages(self, tiny_teacher, tmp_path):
        recipe = make_recipe(
            tiny_teacher,
            masked_lm_head=STAGE,
            dual=STAGE | {"mode": "two_stage"},
            distill=STAGE | {"losses": {"hidden_mse": 1}},
            student={"num_hidden_layers": 2},
        )
        student, teacher = plan.shapes(recipe)
        costs = plan.stage_costs(recipe)
        assert [name for name, _, _ in costs] == ["masked_lm_head", "dual", "distill"]
        of_teacher, of_student = (plan.flops_per_piece(shape, 16) for shape in (teacher, student))
        for cost, passes in zip(costs, [of_teacher, 3 * of_teacher, of_teacher + 3 * of_student], strict=True):
            assert cost[1] == 10 * 8 * 16  # half of max_length is guessed to be text
            assert cost[2] == cost[1] * passes


def test_tables_name_every_block_format_and_stage(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "matrix_speed", lambda: 1e9)
    recipe = make_recipe(tiny_teacher, distill=STAGE | {"losses": {"hidden_mse": 1}})
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in plan.plan_tables(recipe, RunDir(tmp_path / "run")):
        console.print(table_of(*table))
    text = console.export_text()
    assert "int4 groups of 128 (chosen)" in text and "1,280 (guess)" in text
    assert f"{parameters(plan.shapes(recipe)[1])['total']:,}" in text
