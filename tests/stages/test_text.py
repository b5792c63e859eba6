"""From text to word ids: what the stages before training leave for the report."""

import itertools
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer

from tokenizer_build.count import read_counts
from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json
from tokenizer_build.tokenizer import SPECIAL_TOKENS, load_tokenizer, lowercases, make_tokenizer, save_tokenizer
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


def text_run(teacher, folder, **vocabulary) -> Run:
    """A run of the stages `count` and `vocab` on a few words of German and Hindi."""
    folder.mkdir(exist_ok=True)
    (folder / "corpus.txt").write_text("Über Zürich, über Ku'damm — हिन्दी में\n" * 20, encoding="utf-8")
    recipe = {
        "name": "text",
        "teacher": {"model": str(teacher)},
        "corpus": {"sources": [str(folder / "corpus.txt")], "processes": 1},
        "vocabulary": {"size": 160} | vocabulary,
    }
    run = Run(parse_recipe(recipe, "test"), RunDir(folder / "run"))
    for stage in ("count", "vocab"):
        run_stage(run, stage)
    return run


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_the_student_reads_case_and_accents_as_its_teacher_does(family, folders, tmp_path):
    """An uncased vocabulary takes the vowel signs from Hindi: under a cased teacher nothing asked for that."""
    run = text_run(folders[family], tmp_path)
    student, counts = load_tokenizer(run.dir.stage("vocab")), read_counts(run.dir.stage("count") / "counts.parquet")
    assert lowercases(student) == (family == "bert")
    assert ("Zürich" in counts, "zurich" in counts) == (family != "bert", family == "bert")
    if family != "bert":
        assert student.decode(student.encode("Zürich हिन्दी में").ids) == "Zürich हिन्दी में"
    assert lowercases(load_tokenizer(text_run(folders[family], tmp_path / "b", lowercase=True).dir.stage("vocab")))


def test_a_given_tokenizer_reaches_all_its_pieces(tiny_teacher, tmp_path):
    """Capitals, accents and added tokens were lost where normalizer and pre-tokenizer came from the recipe."""
    given, letters = tmp_path / "given", sorted(set("ZürichKudamm"))
    pieces = [*SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters), "Zürich"]
    save_tokenizer(make_tokenizer(pieces, lowercase=False), given)
    tokenizer = load_tokenizer(given)
    tokenizer.add_tokens([AddedToken("Ku'damm", normalized=False)])
    tokenizer.save(str(given / "tokenizer.json"))
    run = text_run(tiny_teacher, tmp_path, tokenizer=str(given))
    student = load_tokenizer(run.dir.stage("vocab"))
    assert student.encode("Zürich Ku'damm", add_special_tokens=False).tokens == ["Zürich", "Ku'damm"]
    assert read_json(run.dir.stage("vocab") / "summary.json")["pieces"] == len(pieces) + 1
    assert "Zürich" in read_counts(run.dir.stage("count") / "counts.parquet")


def test_words_counted_for_a_teacher_of_another_case_are_refused(tiny_teacher, folders, tmp_path):
    text_run(tiny_teacher, tmp_path)
    with pytest.raises(InputError, match=r"run/count: made by another recipe: case_of .*xlm-roberta"):
        text_run(folders["xlm-roberta"], tmp_path)
