"""Several languages from counting to batches: each in its share, with figures of its own, or refused in a sentence."""

import random

import numpy as np
import pytest
from conftest import made_up_text

from tokenizer_build.count import read_counts
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.run.engine import Context, Run, run_stage, settings_of
from vocabshrink.run.folder import RunDir
from vocabshrink.run.recipe import dump_recipe, load_recipe, parse_recipe
from vocabshrink.run.stage import STAGES
from vocabshrink.stages import inputs
from vocabshrink.stages.checks import check_recipe
from vocabshrink.stages.training import make_batcher

GREEK = dict(zip("abcdefghijklmnopqrstuvwxyz", "αβκδεφγηιξκλμνοπθρστυωχζψς", strict=True))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[str]]:
    """English, and a tenth as much Greek with a few Latin words."""
    folder = tmp_path_factory.mktemp("texts")
    english = made_up_text(600, seed=1)
    greek = ["".join(GREEK.get(c, c) for c in line.lower()) for line in made_up_text(60, seed=2)]
    for name, lines in {"en": english, "el": [*greek, "mi lo"]}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {name: [str(folder / f"{name}.txt")] for name in ("en", "el")}


def recipe_of(teacher, languages, **sections):
    corpus = {"languages": languages, "alpha": 0.5, "processes": 1, "held_out_every": 2}
    whole = {"name": "two", "teacher": {"model": str(teacher)}, "corpus": corpus, "vocabulary": {"size": 320}}
    whole |= {"distill": {"steps": 2, "batch_size": 16, "max_length": 64, "losses": {"sentence_cosine": 1.0}}}
    return parse_recipe(whole | sections, "test")


@pytest.fixture(scope="module")
def run(folders, files, tmp_path_factory) -> Run:
    made = Run(recipe_of(folders["xlm-roberta"], files), RunDir(tmp_path_factory.mktemp("two") / "run"))
    for stage in ("count", "vocab", "encode"):
        run_stage(made, stage)
    return made


def test_the_vocabulary_is_of_balanced_counts_and_compared_by_language(run, capsys):
    counts = {name: read_counts(run.dir.stage("count") / f"languages/{name}.parquet") for name in ("en", "el")}
    counts["counts"] = read_counts(run.dir.stage("count") / "counts.parquet")
    sizes = {name: counts[name].total() for name in ("en", "el")}
    share = sum(count for word, count in counts["counts"].items() if word in counts["el"]) / counts["counts"].total()
    assert share > 2 * sizes["el"] / sum(sizes.values())
    assert read_json(run.dir.stage("count") / "summary.json")["words_by_language"] == sizes
    comparison = read_json(run.dir.stage("vocab") / "comparison.json")["languages"]
    student = load_tokenizer(run.dir.stage("vocab"))
    for name in ("en", "el"):
        row, words = comparison[name]["student"], counts[name]
        pieces = sum(count * len(student.encode(w, add_special_tokens=False).ids) for w, count in words.items())
        assert row["pieces_per_word"] == pytest.approx(pieces / words.total()) and row["unknown_rate"] == 0
        assert 0 < row["overlap_with_first"] <= 1 and comparison[name]["teacher"]["overlap_with_first"] == 1
    assert list(comparison["el"]["scripts"]) == ["GREEK", "LATIN"]


def test_held_out_sentences_and_batches_are_of_every_language(run):
    context = Context(**vars(run), stage=STAGES["distill"])
    held_out = inputs.read_held_out(context)
    assert held_out.languages.keys() == {"en", "el"}
    for name, greek in (("en", False), ("el", True)):
        texts = [held_out.texts[4 * i] for i in held_out.languages[name]]
        assert all(any("α" <= c <= "ω" for c in text) == greek for text in texts)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(held_out.texts), 8))
    found = held_out.neighbour_overlap(vectors, vectors)
    assert found == dict.fromkeys(("neighbour_overlap", "neighbour_overlap_en", "neighbour_overlap_el"), 1.0)
    stage, teacher = run.recipe.distill, inputs.read_teacher(context)

    class Alone:
        num_processes = 1

    batcher = make_batcher(context, stage, teacher, ("student",), Alone())
    languages = inputs.languages_of(context, batcher.stream, batcher.segments)
    words = {name: batcher.segments.lengths[numbers].sum() for name, numbers in languages.items()}
    assert words["el"] / sum(words.values()) == pytest.approx(10**0.5 / (10 + 10**0.5), abs=0.04)
    assert len(np.unique(batcher.segments.starts[languages["en"]])) == len(languages["en"])


def test_languages_read_back_and_decide_what_is_counted(files, tmp_path, folders):
    recipe = recipe_of(folders["xlm-roberta"], files)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.corpus.sources == files["en"] + files["el"]
    assert {"corpus.languages", "corpus.alpha"} <= settings_of(recipe, "count").keys()


REFUSED = [
    ({"languages": {"en": ["a"], "de": []}}, "corpus: languages.de has no file: name one, or leave the language out"),
    ({"languages": {"de": ["a"]}, "sources": ["b"]}, "corpus: sources: every file is of a language here"),
    ({"languages": {"de": ["a"]}, "alpha": 0.1}, "corpus.alpha: input should be greater than or equal to 0.3"),
    ({"sources": ["a"], "alpha": 0.5}, "corpus: alpha balances languages: add languages"),
    ({"sources": ["a"], "parallel": ["p.tsv"]}, "corpus.parallel: translations learn stored vectors: add vectors"),
]


@pytest.mark.parametrize("corpus, message", REFUSED)
def test_a_contradiction_is_refused_when_the_recipe_is_read(corpus, message):
    with pytest.raises(InputError, match=message):
        parse_recipe({"name": "r", "teacher": {"model": "m"}, "corpus": corpus}, "test")


def test_shares_of_sources_and_of_languages_contradict():
    values = {"name": "r", "teacher": {"model": "m"}, "corpus": {"languages": {"de": ["a"]}}}
    values |= {"vectors": {"shares": [1]}, "distill": {"steps": 1, "losses": {"sentence_cosine": 1}}}
    with pytest.raises(InputError, match="vectors.shares: corpus.alpha shares the sentences out to languages"):
        parse_recipe(values, "test")


def test_a_language_is_refused_by_its_first_lines(folders, files, tmp_path):
    teacher, empty = folders["xlm-roberta"], tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for languages, message in (
        ({"ru": files["en"]}, "corpus.languages.ru: 100% of its words are in LATIN letters, and ru is written in CYR"),
        ({"el": files["el"]}, "corpus.languages.el: .* cannot write .*% of its words: take a teacher that was trained"),
        ({"en": [str(empty)]}, "corpus.languages.en: there is no text in"),
        ({"en": [str(tmp_path / "none.txt")]}, "corpus.languages.en: .*none.txt: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            check_recipe(recipe_of(teacher, languages, delivery=None))


def test_a_rare_script_is_kept_or_left_out_and_said_either_way(folders, tmp_path, capsys):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["haus", "baum", "dorf"], k=8)) for _ in range(200_000 // 40)] + ["ж ж"] * 3
    (tmp_path / "de.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe = recipe_of(folders["xlm-roberta"], {"de": [str(tmp_path / "de.txt")]})
    made = Run(recipe, RunDir(tmp_path / "run"))
    for stage in ("count", "vocab"):
        run_stage(made, stage)
    assert "vocab: de: scripts of under 1% of its words: kept CYRILLIC; left out none" in capsys.readouterr().err
    assert "[UNK]" not in load_tokenizer(made.dir.stage("vocab")).encode("жж haus").tokens
