"""The run folder: a stage is done or not, and a full disk is a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenizer_build.errors import InputError
from tokenizer_build.files import read_json, write_text
from vocabshrink.run.folder import RunDir, SharedRunDir


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_a_stage_is_done_only_after_finish(run):
    run.start("vocab")
    folder = run.stage("vocab")
    assert folder == run.stage("vocab") and folder.is_dir() and not run.is_done("vocab")
    run.finish("vocab", {"size": 5000})
    assert run.is_done("vocab")
    assert read_json(folder / "summary.json") == {"size": 5000}


def test_done_is_written_after_the_summary(run, monkeypatch):
    run.start("vocab")
    monkeypatch.setattr("vocabshrink.run.folder.files.write_json", lambda path, value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.finish("vocab", {})
    assert not run.is_done("vocab")


def test_starting_again_keeps_only_the_checkpoints_of_an_unfinished_attempt(run):
    run.start("distill")
    folder = run.stage("distill")
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "half.safetensors").write_text("half")
    (folder / "note.txt").write_text("left over")
    run.append_metrics({"stage": "distill", "step": 5})
    run.start("distill")
    assert [p.name for p in folder.iterdir()] == ["checkpoints"]
    assert (folder / "checkpoints" / "step-5").is_dir()
    assert run.metrics() == [{"stage": "distill", "step": 5}]  # the caller truncates to the step it resumes

    run.finish("distill", {})
    run.start("distill")  # a finished stage is done again from nothing
    assert list(folder.iterdir()) == [] and run.metrics() == []


def test_a_crash_while_emptying_leaves_no_stage_that_looks_done(run, monkeypatch):
    run.start("vocab")
    (run.stage("vocab") / "model").mkdir()
    run.finish("vocab", {})
    monkeypatch.setattr("shutil.rmtree", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.start("vocab")
    assert not run.is_done("vocab")


def test_a_run_belongs_to_one_process(run):
    taken = pytest.raises(InputError, match=r"run: process \d+ on .* is at work on this run: wait for it, or choose")
    with run.alone(), taken, RunDir(run.path).alone():
        pass
    with run.alone():
        pass
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b"wordz"), lambda p: p.unlink(), lambda p: p.write_bytes(b"")]
)
def test_a_finished_stage_is_verified_file_by_file(damage, run, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.add(Path(os.readlink(f"/proc/self/fd/{n}")).name) or fsync(n))
    run.start("encode")
    folder = run.stage("encode")
    (folder / "inner").mkdir()
    (folder / "inner" / "words.bin").write_bytes(b"words")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "large").write_bytes(b"not read back")
    run.finish("encode", {})
    assert {"words.bin", "inner", "encode"} <= synced and "large" not in synced
    assert not (folder / "checkpoints").exists()
    run.verify("encode")
    (folder / "more").write_text("what is added hinders nobody")
    run.verify("encode")
    damage(folder / "inner" / "words.bin")
    with pytest.raises(InputError, match="inner/words.bin is damaged, altered or missing since stage encode wrote it"):
        run.verify("encode")


def test_starting_does_not_follow_links_out_of_the_folder(run, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    run.start("encode")
    (run.stage("encode") / "link").symlink_to(precious)
    run.start("encode")
    assert (precious / "file").read_text() == "mine"


def test_a_shared_stage_stands_under_the_settings_that_decide_it(tmp_path):
    def sharing(name, steps, tokens=1.0):
        settings = {"vocab": {"size": 5}, "distill": {"steps": steps, "losses": {"b": tokens, "a": None}}}
        return SharedRunDir(tmp_path / name, tmp_path / "stages", lambda stage: {stage: settings[stage]})

    one, same, other = sharing("one", 3), sharing("same", 3), sharing("other", 4)
    one.start("distill")
    folder = one.stage("distill")
    assert folder.parent == tmp_path / "stages" and folder.name.startswith("distill-")
    one.finish("distill", {"steps": 3})
    assert same.is_done("distill") and same.stage("distill") == folder and not other.is_done("distill")
    assert one.stage("vocab") == other.stage("vocab") != one.stage("distill")
    for run in (one, other):
        run.append_metrics({"stage": "distill", "step": 1})  # each run keeps the rows of what it made itself
    other.start("distill")
    assert len(one.metrics()) == 1 and other.metrics() == [] and one.is_done("distill")
    reordered = SharedRunDir(one.path, one.shared, lambda stage: {stage: {"losses": {"a": None, "b": 1.0}, "steps": 3}})
    assert reordered.stage("distill") == folder  # the order in which settings are written decides nothing


def test_metrics_truncation_touches_one_stage_and_heals_a_cut_last_line(run):
    for stage, step in [("dual", 10), ("distill", 0), ("distill", 5), ("distill", 10)]:
        run.append_metrics({"stage": stage, "step": step, "losses": {"similarity": 0.5}})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "distill", "st')
    assert len(run.metrics()) == 4
    run.truncate_metrics("distill", 5)
    assert [(r["stage"], r["step"]) for r in run.metrics()] == [("dual", 10), ("distill", 0), ("distill", 5)]
    run.append_metrics({"stage": "distill", "step": 6})
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").open()] == [10, 0, 5, 6]


def test_a_broken_metrics_line_in_the_middle_is_named(run):
    write_text(run.path / "metrics.jsonl", '{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl: row 2 is not a JSON object"):
        run.metrics()
    write_text(run.path / "metrics.jsonl", '{"step": 1}\ncomplete but not json\n')
    with pytest.raises(InputError, match="metrics.jsonl: row 2 is not a JSON object"):
        run.metrics()
    write_text(run.path / "metrics.jsonl", "[1]\n")
    with pytest.raises(InputError, match="row 1 is not a JSON object"):
        run.metrics()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
def test_a_really_full_device_while_appending_metrics(run):
    run.path.mkdir()
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="metrics.jsonl"):
        run.append_metrics({"step": 1})


def test_environment_says_what_ran_and_not_who_or_where(run):
    run.write_environment()
    environment = read_json(run.path / "environment.json")
    assert torch.__version__.startswith(environment["versions"]["torch"])  # which may lack the +cu128 of its wheel
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment["git_commit"] == (commit or None)
    assert environment["cpu_count"] >= 1 and environment["cpu"]
    strings = [v for v in [*environment.values(), *environment["versions"].values()] if isinstance(v, str)]
    assert not [value for value in strings if value.startswith(("/", "C:"))]


def test_environment_does_not_load_torch(tmp_path):
    code = (
        "import sys; from vocabshrink.run.folder import Path, RunDir; RunDir(Path(sys.argv[1])).write_environment(); "
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=root)
    assert read_json(tmp_path / "environment.json")["gpus"] == []
