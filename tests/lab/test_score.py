import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.metrics import ndcg_score
from test_delivery import write_delivery, write_manifest
from tokenizers import Tokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from vocabshrink.cli import main
from vocabshrink.lab.score import backbone_embedder, measure, measures_of, score_models, static_embedder, write_cards
from vocabshrink.models.forward import ModuleSettings


def at_angle(texts: list[str], prompts=()) -> np.ndarray:
    """The vector of a text is the direction that it names."""
    return np.array([[np.cos(float(text)), np.sin(float(text))] for text in texts])


@pytest.fixture
def data(tmp_path, lines) -> Path:
    """A task of each kind, of the tiny teacher's language."""
    place = tmp_path / "tasks"
    rated = [{"sentence1": a, "sentence2": b, "label": i / 9} for i, (a, b) in enumerate(zip(lines, lines[9:19]))]  # noqa: B905
    paired = [{"sentence1": lines[i], "sentence2": lines[i // 2], "label": i % 2} for i in range(20)]
    single = [{"sentence1": line, "label": i % 3} for i, line in enumerate(lines[:60])]
    for name, rows in (("stsb", rated), ("qnli", paired), ("mrpc", paired), ("mine", single), ("unknown", single)):
        write_rows(place / name / "test.jsonl", rows)
    write_rows(place / "mine" / "train.jsonl", single)
    write_json(place / "mine" / "meta.json", {"measures": ["accuracy", "v_measure"]})
    return place


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows_at(path: Path, rows: list[tuple]) -> None:
    """Rows of (label, sentence) or (label, sentence1, sentence2)."""
    write_rows(path, [dict(zip(("label", "sentence1", "sentence2"), row, strict=False)) for row in rows])


def static_folder(folder: Path, tokenizer_from: Path, **more) -> Path:
    """A model2vec folder of random vectors."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_from / "tokenizer.json").read_bytes())
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    table = np.random.default_rng(1).normal(size=(pieces, 6)).astype(np.float16)
    save_file({"embeddings": table, **more}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "model2vec", "normalize": True})
    return folder


def test_models_of_every_kind_are_in_one_table(data, tiny_teacher, tmp_path):
    delivery = write_delivery(tmp_path / "tiny", "embedding", tiny_teacher)
    write_manifest(delivery, "embedding", delivery_bytes=1234)
    static = static_folder(tmp_path / "static", tiny_teacher)
    report = score_models([str(delivery), str(static), str(tiny_teacher)], data, rows=40)
    assert {row["model"] for row in report} == {"tiny", "static", tiny_teacher.name} and len(report) == 15
    assert [(row["task"], row["metric"]) for row in report[:5]] == [
        ("mine", "accuracy"),
        ("mine", "v_measure"),
        ("mrpc", "average_precision"),
        ("qnli", "ndcg@10"),
        ("stsb", "spearman"),
    ]
    assert all(-1 <= row["value"] <= 1 and row["rows"] == 40 for row in report)
    sizes = {row["model"]: row["bytes"] for row in report}
    files = ("model.safetensors", "config.json", "tokenizer.json")
    assert sizes["static"] == sum((static / name).stat().st_size for name in files)
    again = score_models([str(delivery), str(static), str(tiny_teacher)], data, rows=40)
    assert again == report


def test_the_command_prints_and_writes_the_table(data, tiny_teacher, tmp_path, in_process):
    delivery = write_delivery(tmp_path / "tiny", "embedding", tiny_teacher)
    write_manifest(delivery, "embedding", delivery_bytes=1234)
    arguments = ["score", delivery, "--data", data, "--rows", "20", "--threads", "1", "--out", tmp_path / "score.json"]
    done = in_process(main, *arguments)
    assert done.returncode == 0, done.stderr
    for words in ("at most 20 rows", "mrpc average_precision", "tiny", "1,234"):
        assert words in done.stdout
    (row,) = (row for row in json.loads((tmp_path / "score.json").read_text()) if row["task"] == "stsb")
    assert row == {
        "model": "tiny",
        "bytes": 1234,
        "task": "stsb",
        "metric": "spearman",
        "value": row["value"],
        "rows": 20,
    }


def test_cards_carry_the_last_figures_alone(tmp_path):
    row = {"task": "stsb", "metric": "spearman", "rows": 10}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("# mine\n\nA model.\n")
    for value in (0.5, 0.75):
        write_cards(
            [tmp_path / "mine", tmp_path / "none"],
            [row | {"model": name, "value": value} for name in ("mine", "other")],
        )
    text = (tmp_path / "mine/README.md").read_text()
    assert text.startswith("# mine\n\nA model.\n\n## Scores\n") and text.count("| stsb | spearman | 0.7500 |") == 1
    assert "0.5" not in text and "other" not in text


def test_figures_are_those_of_hand_made_tasks(tmp_path):
    write_rows_at(tmp_path / "test.jsonl", [(5 - angle, "0", str(angle)) for angle in (0.1, 0.5, 1.0, 2.5)])
    assert measure(at_angle, tmp_path, ["spearman"]) == {"spearman": pytest.approx(1)}
    write_rows_at(tmp_path / "test.jsonl", [(1, "0", "0.1"), (0, "0", "0.5"), (1, "0", "1.0"), (0, "0", "2")])
    assert measure(at_angle, tmp_path, ["average_precision"])["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    write_rows_at(
        tmp_path / "train.jsonl", [("near" if i < 50 else "far", str(i / 50 + (i >= 50))) for i in range(100)]
    )
    write_rows_at(tmp_path / "test.jsonl", [("near", "0.2"), ("far", "2.4"), ("near", "2.3")])
    found = measure(at_angle, tmp_path, ["accuracy", "v_measure"])
    assert found == {"accuracy": pytest.approx(2 / 3), "v_measure": pytest.approx(1)}
    write_rows_at(tmp_path / "test.jsonl", [("near", str(i / 99)) for i in range(50)] + [("far", "0.1")] * 50)
    few = measure(at_angle, tmp_path, ["accuracy"], limit=40)["accuracy"]  # a sample of both labels, not the first rows
    assert 0 < few < 1


def test_ndcg_is_sklearns(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(i % 3 and 1, f"{a:.3f}", f"{b:.1f}") for i, (a, b) in enumerate(rng.uniform(0, 3, size=(30, 2)))]
    write_rows_at(tmp_path / "test.jsonl", rows)
    sentences = list(dict.fromkeys(row[2] for row in rows))
    asked = [row for row in rows if row[0] == 0]
    scores = at_angle([row[1] for row in asked]) @ at_angle(sentences).T
    relevant = np.array([[sentence == row[2] for sentence in sentences] for row in asked])
    expected = ndcg_score(relevant, scores, k=10)
    assert measure(at_angle, tmp_path, ["ndcg@10"])["ndcg@10"] == pytest.approx(expected)
    alike = measure(lambda texts, prompts: np.ones((len(texts), 2)), tmp_path, ["ndcg@10"])
    assert alike == {"ndcg@10": 0}  # among equals the question's own sentence is the last


def test_retrieval_asks_with_the_models_prompts(tiny_teacher, tmp_path, lines):
    folder, asked = tmp_path / "m", []
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((tiny_teacher / name).read_bytes())
    for name, content in ModuleSettings(prompts={"query": "ka ", "passage": "lo "}).files(32, 48).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    embed, plain = backbone_embedder(folder), backbone_embedder(tiny_teacher)
    for prompts, before in ((("query",), "ka "), (("passage", "document"), "lo "), ((), "")):
        np.testing.assert_array_equal(embed(lines[:3], prompts), plain([before + line for line in lines[:3]], ()))
    rows = [{"sentence1": "ka", "sentence2": "lo mi", "label": i} for i in (0, 1)]
    write_rows(tmp_path / "test.jsonl", rows)

    def listening(texts, prompts):
        asked.append(prompts)
        return plain(texts, prompts)

    measure(listening, tmp_path, ["ndcg@10"])
    assert asked == [("passage", "document"), ("query",)]


@pytest.mark.parametrize("more", [{}, {"weights": np.linspace(0, 1, 300)}])
def test_static_vectors_are_the_means_of_known_pieces(tiny_teacher, tmp_path, more):
    folder = static_folder(tmp_path / "static", tiny_teacher, **more)
    tokenizer, embed = Tokenizer.from_file(str(folder / "tokenizer.json")), static_embedder(folder)
    ids = tokenizer.encode("ka lo mi", add_special_tokens=False).ids
    table = np.random.default_rng(1).normal(size=(tokenizer.get_vocab_size(), 6)).astype(np.float16).astype(np.float32)
    rows = table[ids] * (more["weights"][ids, None] if more else 1)
    np.testing.assert_allclose(embed(["ka lo mi", "ka 東 lo mi", "東"], ())[:2], [rows.mean(0)] * 2, atol=1e-6)
    assert not embed(["東"], ()).any()
    static = pytest.importorskip("model2vec").StaticModel.from_pretrained(str(folder))
    theirs = static.encode(["ka lo mi", "ka"])
    ours = embed(["ka lo mi", "ka"], ())
    np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=1, keepdims=True), theirs, atol=2e-3)


def test_what_cannot_be_scored_is_refused(data, tiny_teacher, tmp_path):
    with pytest.raises(InputError, match='has no task: name folders stsb, .*, or list "measures"'):
        score_models([str(tiny_teacher)], tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        score_models(["./nowhere"], data)
    write_json(data / "mine" / "meta.json", {"measures": ["f2"]})
    with pytest.raises(InputError, match="measures has 'f2': list some of spearman, ndcg@10"):
        measures_of(data / "mine")
    with pytest.raises(InputError, match="neither test.jsonl nor"):
        measure(None, tmp_path, ["accuracy"])
    write_rows_at(tmp_path / "train.jsonl", [(0, "a"), (1, "b")])
    for content, words in (("{", "row 1 is not a JSON object"), ("", "no rows"), ('{"label": 1}', "sentence1")):
        (tmp_path / "test.jsonl").write_text(content)
        with pytest.raises(InputError, match=f"test.jsonl: .*{words}"):
            measure(None, tmp_path, ["accuracy"])
    write_rows_at(tmp_path / "test.jsonl", [("same", "a", "b")])
    with pytest.raises(InputError, match="row 1: label 'same' is no score: write a finite number"):
        measure(None, tmp_path, ["spearman"])
    write_rows_at(tmp_path / "test.jsonl", [(1, "a"), (0, "b")])
    for metric in ("spearman", "ndcg@10", "average_precision"):
        with pytest.raises(InputError, match=f"row 1 has no sentence2, and {metric} is of pairs"):
            measure(None, tmp_path, [metric])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(InputError, match="train.jsonl: no such file"):
        measure(None, tmp_path, ["accuracy"])
    classifier = write_delivery(tmp_path / "classifier", "classification", tiny_teacher)
    write_json(data / "mine" / "meta.json", {})
    with pytest.raises(InputError, match="embed needs a model of the task 'embedding'"):
        score_models([str(tiny_teacher), str(classifier)], data)
