"""What several stages read."""

from test_pipeline import tiny_recipe

from vocabshrink.run.recipe import parse_recipe
from vocabshrink.stages.inputs import first_texts


def test_lines_as_long_as_a_sentence_come_first(tiny_teacher, tmp_path):
    """A corpus of short commands alone has no sentence, and is read all the same."""
    (corpus := tmp_path / "commands.txt").write_text("lights on\nplay some jazz\nstop\n", encoding="utf-8")
    recipe = parse_recipe(tiny_recipe(tiny_teacher, corpus, "untrained"), "test")
    assert first_texts(recipe, 2) == ["lights on", "play some jazz"]
    corpus.write_text("lights on\nplay some jazz in the kitchen\nstop\nwhat is the weather like\n", encoding="utf-8")
    assert first_texts(recipe, 2) == ["play some jazz in the kitchen", "what is the weather like"]
