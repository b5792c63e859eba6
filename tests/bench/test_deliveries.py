import io
import itertools
import json
import sys
import timeit
import types
from pathlib import Path

import bench.deliveries as module
import pytest
from bench.deliveries import bench, bench_tables, statistics_of, text_of, time_calls
from rich.console import Console
from test_delivery import write_delivery

from tokenizer_build.errors import InputError
from vocabshrink.cli import table_of


@pytest.fixture(scope="module")
def deliveries(tiny_teacher, tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("deliveries")
    tasks = ("embedding", "classification", "fill-mask")
    for task in tasks:
        (place / task / "export").mkdir(parents=True)
    return [write_delivery(place / task / "export" / "model", task, tiny_teacher) for task in tasks]


def test_everything_is_measured_once_and_written(deliveries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    out = tmp_path / "bench" / "delivery.json"
    report = bench(deliveries[:2], out=out, seconds=0.01, lengths=(8, 12), batches=(1, 3))
    assert json.loads(out.read_text()) == report
    assert "embedding: 1 thread, round 3 of 3" in capsys.readouterr().err
    assert list(report["systems"]) == ["embedding", "classification"] and report["machine"]["versions"]["onnxruntime"]
    for folder, system in zip(deliveries, report["systems"].values(), strict=False):  # each named by its run
        names = {"onnx/model.onnx", "tokenizer.json", "config.json", "MANIFEST.json"}
        assert system["files"] == {name: (folder / name).stat().st_size for name in sorted(names)} | system["files"]
        assert set(system["files"]) == names and system["bytes"] == sum(system["files"].values())
        assert 0 < system["gzip_bytes"] < system["bytes"]
        assert system["cold_start_seconds"] >= 0 and 20 < system["rss_mb"] < 400
        assert set(system["latency"]["1"]) == {"8x1", "8x3", "12x1", "12x3"}
        for cell in system["latency"]["1"].values():
            assert cell["p50_ms"] <= cell["p95_ms"] and cell["calls"] >= 15
    console = Console(width=140, record=True, file=io.StringIO())
    for table in bench_tables(report):
        console.print(table_of(*table))
    text = console.export_text()
    assert "12 pieces" in text and f"{report['systems']['embedding']['bytes']:,}" in text


def test_what_cannot_be_measured_is_refused(deliveries, tmp_path):
    for folders, words in (
        ([], "nothing to measure"),
        ([tmp_path], "no MANIFEST.json"),
        ([deliveries[2]], "is for the task 'fill-mask': leave it out"),
        ([deliveries[0], deliveries[0]], "one name"),
    ):
        with pytest.raises(InputError, match=words):
            bench(folders, out=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_peers_are_made_once(tmp_path, monkeypatch):
    """The teacher in two formats, and static vectors as wide as their budget allows."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(30_522)}}}))
    exported, widths = [], []

    def export_model(teacher, folder, settings):
        exported.append(settings.delivery.weights)
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")

    def distill(folder, *, pca_dims, quantize_to):
        widths.append((pca_dims, quantize_to))
        save = lambda place: (Path(place) / "model.safetensors").write_bytes(b"")  # noqa: E731
        return types.SimpleNamespace(save_pretrained=save)

    monkeypatch.setattr("vocabshrink.delivery.export.export_model", export_model)
    monkeypatch.setitem(sys.modules, "model2vec.distill", None)
    monkeypatch.setitem(sys.modules, "model2vec", types.ModuleType("model2vec"))
    place = tmp_path / "peers"
    assert [system.name for system in module.peers(teacher, place, static=False)] == ["teacher-fp32", "teacher-int8"]
    with pytest.raises(InputError, match=r"pip install 'model2vec\[distill\]>=0.10'"):
        module.peers(teacher, place, static=True)
    monkeypatch.setitem(sys.modules, "model2vec.distill", types.SimpleNamespace(distill=distill))
    for _ in range(2):
        systems = module.peers(teacher, place, static=True)
    assert exported == ["fp32", "int8"] and widths == [(208, "int8")]
    kinds = [(system.name, system.kind) for system in systems[1:]]
    assert kinds == [("teacher-int8", "delivery"), ("model2vec", "static")]
    assert module.STATIC_BUDGET >= 208 * 30_522 + 500_000
    assert {path.name for path in place.iterdir()} == {"teacher-fp32", "teacher-int8", "model2vec"}


def test_texts_have_the_length_that_is_asked_for(tiny_teacher):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json"))
    tokenizer.no_truncation()
    for length in (8, 64, 700):
        pieces = len(tokenizer.encode(text_of(length, tiny_teacher / "tokenizer.json")).ids)
        assert length <= pieces < length + 20  # the tiny vocabulary spells most words out


def test_times_are_those_of_the_calls(monkeypatch):
    ticks, calls = itertools.count(), []
    monkeypatch.setattr("timeit.default_timer", lambda: next(ticks))
    monkeypatch.setattr(timeit.Timer.__init__, "__defaults__", ("pass", "pass", timeit.default_timer, None))
    assert time_calls(lambda: calls.append(1), 7) == [1] * 7 and len(calls) == 9  # two to warm up
    assert time_calls(lambda: None, 0) == [1] * 5
    assert statistics_of([0.001] * 19 + [0.101], "16x10") == {
        "p50_ms": 1.0,
        "p95_ms": 6.0,
        "texts_per_second": 1666.7,
        "calls": 20,
    }
