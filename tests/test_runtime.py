import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import make_model
from transformers import AutoTokenizer, BertModel

from tokenizer_build.errors import InputError
from vocabshrink.export import export_embedder
from vocabshrink.runtime import build_index, load, search


@pytest.fixture(scope="module")
def model_folder(tiny_teacher, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("student"), tiny_teacher)


@pytest.fixture(scope="module")
def delivery(model_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "delivery"
    export_embedder(model_folder, out, weights="fp32", max_positions=24)
    return out


@pytest.fixture
def copy(delivery, tmp_path) -> Path:
    return Path(shutil.copytree(delivery, tmp_path / "copy"))


def test_embeds_as_torch_does_in_the_order_of_the_texts(delivery, model_folder, lines):
    texts = [*lines[:9], "", "ka", " ".join(lines[:20])]  # of all lengths; the last is cut
    embedder = load(delivery)
    ours = embedder.embed(texts, batch_size=5)
    assert ours.dtype == np.float32 and ours.shape == (12, embedder.dimension)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = BertModel.from_pretrained(model_folder).eval()
    for text, row in zip(texts, ours, strict=True):
        with torch.no_grad():
            fed = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
            theirs = torch.nn.functional.normalize(model(**fed).last_hidden_state.mean(1), dim=-1)[0]
        np.testing.assert_allclose(row, theirs.numpy(), atol=1e-5)
    assert embedder.embed([]).shape == (0, 96)


@pytest.mark.parametrize("texts,words", [("ka lo", "list of texts"), (["ka", 3], "text 1 is int")])
def test_embed_refuses_what_is_no_list_of_texts(delivery, texts, words):
    with pytest.raises(InputError, match=words):
        load(delivery).embed(texts)


def test_missing_and_altered_files_are_refused(copy, tmp_path):
    with pytest.raises(InputError, match="no MANIFEST.json"):
        load(tmp_path)
    tokenizer = copy / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    with pytest.raises(InputError, match="tokenizer.json was altered"):
        load(copy)
    tokenizer.unlink()
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        load(copy)
    tokenizer.write_text(text)
    load(copy)


def test_a_path_outside_the_folder_is_refused(copy):
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    outside = copy.parent / "model.onnx"
    (copy / manifest["graph"]).rename(outside)
    for name in ("../model.onnx", str(outside)):
        manifest["files"][name] = manifest["files"].pop(manifest["graph"])
        manifest["graph"] = name
        (copy / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="outside"):
            load(copy)


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "not JSON"),
        ("[]", "lacks"),
        ('{"graph": "g"}', "lacks"),
        ('{"graph": "g", "dimension": 4, "files": {}}', "no sha256 of g"),
    ],
)
def test_a_broken_manifest_is_refused(copy, content, words):
    (copy / "MANIFEST.json").write_text(content)
    with pytest.raises(InputError, match=words):
        load(copy)


def test_search_finds_the_passages_of_greatest_cosine(copy, lines):
    passages = [{"text": line, "source": f"line {i}"} for i, line in enumerate(lines[:40])]
    assert build_index(copy, passages[:3]) == 3
    assert build_index(copy, iter(passages)) == 40  # the earlier index is replaced
    assert np.load(copy / "index" / "vectors.npy").dtype == np.float16
    assert sorted(path.name for path in (copy / "index").iterdir()) == ["passages.jsonl", "vectors.npy"]
    found = search(copy, lines[7], top=3)
    assert found[0]["source"] == "line 7" and found[0]["score"] == pytest.approx(1, abs=1e-3)
    embedder = load(copy)
    scores = embedder.embed(lines[:40]) @ embedder.embed([lines[7]])[0]
    assert [hit["score"] for hit in found] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-3)
    assert len(search(copy, "ka", top=99)) == 40


def test_texts_may_hold_any_line_separator(copy):
    texts = ["ka\u2028lo\x85mi\nne", "ru sa"]
    build_index(copy, texts)
    assert {hit["text"] for hit in search(copy, "ka", top=2)} == set(texts)


def test_bad_passages_and_indexes_are_refused(copy):
    with pytest.raises(InputError, match="has no index"):
        search(copy, "ka")
    with pytest.raises(InputError, match="no passage"):
        build_index(copy, [])
    with pytest.raises(InputError, match="passage 1 is neither"):
        build_index(copy, ["ka", {"body": "lo"}])
    build_index(copy, ["ka", "lo"])
    with pytest.raises(InputError, match="top is 0"):
        search(copy, "ka", top=0)
    (copy / "index" / "passages.jsonl").write_text('{"text": "ka"}\n')
    with pytest.raises(InputError, match="build the index again"):
        search(copy, "ka")


def test_the_runtime_imports_no_torch(delivery):
    code = (
        "import sys\nfrom vocabshrink.runtime import load\nimport vocabshrink\n"
        "assert vocabshrink.load is load\n"
        "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        f"print(load({str(delivery)!r}).embed(['ka lo']).shape)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 96)", done.stderr
