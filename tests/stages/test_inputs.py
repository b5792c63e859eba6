"""What several stages read."""

from conftest import with_prompts
from test_checks import STORED
from test_pipeline import tiny_recipe

from vocabshrink.run.recipe import parse_recipe
from vocabshrink.stages.inputs import first_texts, shared_modules


def test_a_student_has_the_prompts_that_it_was_trained_behind(tiny_teacher, corpus_file, tmp_path):
    teacher = with_prompts(tiny_teacher, tmp_path / "teacher")
    for vectors, default, alone in (
        (None, "query", None),
        ({"prompts": {"passage": 0.5}}, "query", None),
        ({}, None, "ka lo: "),
    ):
        sections = {"vectors": None if vectors is None else {"sentences": 9} | vectors, "distill": STORED}
        recipe = parse_recipe(tiny_recipe(teacher, corpus_file, "untrained") | sections, "test")
        said, prompt = shared_modules(recipe)
        assert (said.default_prompt, prompt) == (default, alone)
        assert set(said.prompts) == ({"query", "passage"} if default else set())


def test_lines_as_long_as_a_sentence_come_first(tiny_teacher, tmp_path):
    """A corpus of short commands alone has no sentence, and is read all the same."""
    (corpus := tmp_path / "commands.txt").write_text("lights on\nplay some jazz\nstop\n", encoding="utf-8")
    recipe = parse_recipe(tiny_recipe(tiny_teacher, corpus, "untrained"), "test")
    assert first_texts(recipe, 2) == ["lights on", "play some jazz"]
    corpus.write_text("lights on\nplay some jazz in the kitchen\nstop\nwhat is the weather like\n", encoding="utf-8")
    assert first_texts(recipe, 2) == ["play some jazz in the kitchen", "what is the weather like"]
