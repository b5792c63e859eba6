"""The command line as its users meet it: bad input is one sentence on stderr, exit code 2, no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from test_pipeline import tiny_recipe

from vocabshrink.cli import main
from vocabshrink.lab import harvest
from vocabshrink.run.folder import RunDir


@pytest.fixture
def vocabshrink(in_process):
    return partial(in_process, main)


@pytest.fixture
def write_recipe(tiny_teacher, corpus_file, tmp_path):
    def write(mode="untrained", **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(tiny_teacher, corpus_file, mode, **changes)))
        return path

    return write


@pytest.fixture
def refused(vocabshrink):
    def run(*arguments, folder) -> str:
        done = vocabshrink(*arguments, folder=folder)
        assert done.returncode == 2, done.stderr + done.stdout
        sentence = done.stderr.strip().split("\n")[-1]
        assert "Traceback" not in done.stderr
        assert sentence.startswith("vocabshrink: "), sentence
        return sentence

    return run


def test_the_module_is_the_command(tmp_path):
    """In a process of its own, as the tests below in this one."""
    command = [sys.executable, "-m", "vocabshrink", "show", "absent.yaml"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "vocabshrink: absent.yaml: no such recipe: correct its path\n"


BAD_CORPUS = {
    "empty": (b"", "empty|no text"),
    "binary": (bytes(range(256)) * 50, "NUL|binary"),
    "latin1": ("caf\u00e9 ".encode("latin-1") * 50, "not UTF-8"),
    "nul": (b"some text\0 and more", "0x00"),
    "endless": (b"x" * 50_000_000, "white space"),
}


@pytest.mark.parametrize("kind", BAD_CORPUS)
def test_bad_corpus(kind, write_recipe, tmp_path, refused):
    import re

    content, expected = BAD_CORPUS[kind]
    corpus = tmp_path / "bad.txt"
    corpus.write_bytes(content)
    recipe = write_recipe(corpus={"sources": [str(corpus)], "processes": 1})
    sentence = refused("count", recipe, folder=tmp_path)
    assert re.search(expected, sentence), sentence
    assert not (tmp_path / "artifacts/untrained/count/DONE").exists()


def test_missing_column(write_recipe, tmp_path, refused):
    (tmp_path / "rows.jsonl").write_text('{"body": "some words here"}\n')
    sentence = refused("count", write_recipe(corpus={"sources": [str(tmp_path / "rows.jsonl")]}), folder=tmp_path)
    assert "text" in sentence and "body" in sentence


def test_misspelt_key_and_override(write_recipe, tmp_path, refused):
    assert "did you mean size?" in refused("show", write_recipe(vocabulary={"sise": 5}), folder=tmp_path)
    assert "did you mean size?" in refused("show", write_recipe(), "vocabulary.sise=5", folder=tmp_path)


def test_teacher_folders(write_recipe, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(
        "plan", write_recipe(teacher={"model": str(tmp_path / "empty")}), folder=tmp_path
    )
    assert "no such folder" in refused("plan", write_recipe(teacher={"model": "./nowhere"}), folder=tmp_path)


def test_over_budget_says_what_to_change(write_recipe, tmp_path, refused):
    recipe = write_recipe(delivery={"weights": "int8", "max_positions": 48, "budget": "40kB"})
    sentence = refused("run", recipe, folder=tmp_path)
    assert "over the budget" in sentence and "use" in sentence
    assert not (tmp_path / "artifacts").exists()


def test_vocabulary_smaller_than_the_alphabet(write_recipe, tmp_path, refused, vocabshrink):
    recipe = write_recipe(vocabulary={"size": 12})
    assert vocabshrink("count", recipe, folder=tmp_path).returncode == 0
    assert "12" in refused("vocab", recipe, folder=tmp_path)


def test_stage_before_its_needs(write_recipe, tmp_path, refused):
    assert "needs vocab first" in refused("encode", write_recipe(), folder=tmp_path)


def test_plan_and_list_print_their_tables(write_recipe, tmp_path, vocabshrink):
    planned = vocabshrink("plan", write_recipe("match"), folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    for word in ("parameters by block", "int4-64", "distill", "FLOPs"):
        assert word in planned.stdout
    listed = vocabshrink("list").stdout
    for word in ("fewest", "group_similarity", "uniform"):
        assert word in listed
    assert "[n,C]" in "".join(listed.split())  # rich took it for markup


def test_a_refused_stage_can_be_mended_in_the_recipe(write_recipe, tmp_path, refused, vocabshrink):
    refused("count", write_recipe(corpus={"sources": []}), folder=tmp_path)
    assert vocabshrink("count", write_recipe(), folder=tmp_path).returncode == 0


def test_a_short_loss_takes_an_override_of_its_argument(write_recipe, tmp_path, vocabshrink):
    shown = vocabshrink("show", write_recipe("match"), "distill.losses.group_similarity.start=2", folder=tmp_path)
    losses = yaml.safe_load(shown.stdout)["distill"]["losses"]
    assert losses["group_similarity"] == {"weight": 20.0, "start": 2.0}


def test_a_loss_that_a_stage_cannot_give_is_refused_before_anything_runs(write_recipe, tmp_path, refused):
    dual = {"mode": "match", "steps": 2, "learning_rate": 1e-3, "losses": {"teacher_masked_lm": 1}}
    assert "dual.losses.teacher_masked_lm" in refused("count", write_recipe(dual=dual), folder=tmp_path)


def test_a_delivery_that_nothing_could_check_is_refused_before_anything_runs(write_recipe, tmp_path, refused):
    sentence = refused("run", write_recipe(), "evaluation.sentences=5", folder=tmp_path)
    assert "evaluation.sentences: 5 are too few to check the delivery by: give at least 20" in sentence
    assert not list(tmp_path.rglob("counts.parquet"))


RELEASED = Path(__file__).resolve().parents[1] / "artifacts" / "mpnet-7mb"


def test_lines_are_embedded_without_torch():
    """A line in, a JSON object out, without a home folder and in ASCII too, which gets JSON's escapes."""
    program = "import sys; sys.modules['torch'] = None; from vocabshrink.cli import main; main()"
    command = [sys.executable, "-c", program, "embed", str(RELEASED)]
    texts = ["a small encoder", "ein Modell f\u00fcr alle \U0001f600"]
    bare = {name: value for name, value in os.environ.items() if name != "HOME"} | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input="\n".join(texts).encode(), capture_output=True, env=bare)
    rows = [json.loads(line) for line in done.stdout.decode("ascii").splitlines()]
    assert done.returncode == 0 and [row["text"] for row in rows] == texts, done.stderr
    (vector,) = (value for value in rows[0].values() if isinstance(value, list))
    assert len(vector) == 384 and sum(x * x for x in vector) == pytest.approx(1, abs=1e-3)
    refused = subprocess.run(
        [*command[:-2], "classify", str(RELEASED)], input="a text\n", capture_output=True, text=True
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "embedding" in refused.stderr


def test_a_folder_without_tasks_is_refused(tmp_path, refused):
    assert "has no task: name folders stsb" in refused("score", tmp_path, "--data", tmp_path, folder=tmp_path)


def test_files_of_a_language_beside_files_of_none_are_refused(tmp_path, refused):
    said = refused("compress", "model", "de=a.txt", "b.txt", "--out", "o", folder=tmp_path)
    assert "some are of a language and some of none: write LANGUAGE=FILE for all or none" in said


def test_a_second_run_in_one_folder_is_refused(write_recipe, tmp_path, refused):
    with RunDir(tmp_path / "artifacts" / "untrained").alone():
        assert f"process {os.getpid()} on " in refused("run", write_recipe(), folder=tmp_path)
    assert not list(tmp_path.rglob("recipe.y*ml"))[1:]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("vocabshrink.cli.CPUS", 1)
    monkeypatch.setattr(harvest, "list_files", lambda roots: [("harvest", Path(harvest.__file__))])
    assert "/proc/" in refused("harvest", "/proc/docs.jsonl", folder=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_command_and_its_workers(number, write_recipe, tmp_path):
    """While they count a corpus that takes them half a minute. A worker that is still starting would say on stderr that
    its parent is gone: they are at work when they have loaded the tokenizers."""
    (tmp_path / "long.txt").write_text("ka lo mi ka lo mi\n" * 4_000_000)
    corpus = {"sources": [str(tmp_path / "long.txt")], "processes": 2}
    command = [sys.executable, "-m", "vocabshrink", "count", write_recipe(corpus=corpus)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    children, workers = Path(f"/proc/{done.pid}/task/{done.pid}/children"), []
    while len(workers) < 2 and done.poll() is None:
        time.sleep(0.05)
        started = [int(pid) for pid in children.read_text().split()]
        workers = [pid for pid in started if "tokenizers" in Path(f"/proc/{pid}/maps").read_text()]
    done.send_signal(number)
    said = done.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert done.returncode == -number
    else:
        assert done.returncode == 128 + number and "Traceback" not in said
        assert f"vocabshrink: stopped ({number.name})" in said
    for _ in range(100):
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        if not left:
            break
        time.sleep(0.1)
    assert not left
