import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoTokenizer, BertConfig, BertModel

import vocabshrink.export as export
from tokenizer_build.errors import InputError
from vocabshrink.export import Graph, awkward_inputs, export_embedder, torch_embedding
from vocabshrink.quantize import dequantize, quantize_int4, quantize_int8

FORMATS = [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 32), ("fp32", 32)]


def make_model(folder: Path, tokenizer_from: Path, **changes) -> Path:
    """A model folder: two layers, 96 wide (no multiple of 64 or 128), weights large enough to matter."""
    pieces = len(json.loads((tokenizer_from / "tokenizer.json").read_text())["model"]["vocab"])
    shape = {
        "vocab_size": pieces,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 200,
        "max_position_embeddings": 48,
        "initializer_range": 0.08,
    }
    torch.manual_seed(0)
    model = BertModel(BertConfig(**(shape | changes)))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases of zero and layer norms of one would hide a lost vector
            torch.nn.init.normal_(parameter, 1.0 if "LayerNorm.weight" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model_folder(tiny_teacher, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("student"), tiny_teacher)


def run_graph(graph: Graph, output: str, feed: dict[str, np.ndarray]) -> np.ndarray:
    kinds = {np.dtype(np.int64): TensorProto.INT64, np.dtype(np.float32): TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, kinds[x.dtype], x.shape) for name, x in feed.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    proto = helper.make_graph(graph.nodes, "test", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], feed)[0]


@pytest.mark.parametrize("columns", [64, 96, 200])
@pytest.mark.parametrize("weights,group_size", FORMATS)
def test_linear_and_gather_compute_with_the_codes_of_quantize(weights, group_size, columns):
    draw = np.random.default_rng(1)
    table = draw.normal(size=(30, columns)).astype(np.float32)
    bias = draw.normal(size=30).astype(np.float32)
    hidden = draw.normal(size=(2, 3, columns)).astype(np.float32)
    kept = {
        "fp32": lambda: table,
        "int8": lambda: dequantize(quantize_int8(table)),
        "int4": lambda: dequantize(quantize_int4(table, group_size)),
    }[weights]()

    graph = Graph(weights, group_size)
    product = run_graph(graph, graph.linear("dense", table, bias, "x"), {"x": hidden})
    expected = hidden @ kept.T + bias
    exact = weights == "fp32"  # else the activations are rounded to 8 bits
    assert np.abs(product - expected).max() < (1e-4 if exact else 0.03 * np.abs(expected).max())

    graph = Graph(weights, group_size)
    ids = np.array([[0, 29, 7]])
    rows = run_graph(graph, graph.gather("word_embeddings", table, "ids"), {"ids": ids})
    np.testing.assert_allclose(rows, kept[ids], rtol=1e-3)  # float16's rounding


@pytest.mark.parametrize("weights,group_size", FORMATS)
@pytest.mark.parametrize("pooling,normalize", [("mean", True), ("cls", False)])
def test_the_file_computes_what_torch_computes(model_folder, tmp_path, weights, group_size, pooling, normalize):
    out = tmp_path / "delivery"
    manifest = export_embedder(
        model_folder,
        out,
        weights=weights,
        group_size=group_size,
        max_positions=32,
        pooling=pooling,
        normalize=normalize,
    )
    session = onnxruntime.InferenceSession(out / manifest["graph"], providers=["CPUExecutionProvider"])
    model = BertModel.from_pretrained(model_folder).eval()
    least = {"fp32": 0.999999, "int8": 0.99, "int4": 0.95}[weights]
    for feed in awkward_inputs(300, 32):
        ours, states = session.run(["sentence_embedding", "last_hidden_state"], feed)
        theirs = torch_embedding(model, feed, pooling, normalize)
        assert ours.dtype == np.float32 and ours.shape == theirs.shape == (len(states), 96)
        assert states.shape == (*feed["input_ids"].shape, 96)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        assert ((ours * theirs).sum(1) / lengths).min() > least
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=0.05)
        if weights == "fp32":
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_awkward_inputs_are_awkward():
    padded, single, longest = awkward_inputs(300, 32)
    assert 0 in padded["attention_mask"] and padded["token_type_ids"].any() and padded["input_ids"].any()
    assert single["input_ids"].shape == (1, 1) and longest["input_ids"].shape == (1, 32)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations_and_a_single_type(tiny_teacher, tmp_path, activation):
    folder = make_model(tmp_path / "model", tiny_teacher, hidden_act=activation, type_vocab_size=1)
    manifest = export_embedder(folder, tmp_path / "out", weights="fp32", max_positions=48)
    assert manifest["check"]["fp32"] > 0.999999


def test_every_file_is_there_listed_and_counted(model_folder, tmp_path):
    out = tmp_path / "new" / "delivery"
    extra = {"recipe": "demo", "quality": {"stsb": 0.78}, "teacher": "sha256:abc"}
    returned = export_embedder(model_folder, out, weights="int8", max_positions=32, manifest=extra)
    manifest = json.loads((out / "MANIFEST.json").read_text())
    assert manifest == returned and extra.items() <= manifest.items()
    paths = [path for path in out.rglob("*") if path.is_file()]
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in paths}
    assert files.keys() == manifest["files"].keys() | {"MANIFEST.json"}
    names = ("onnx/model_quantized.onnx", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert files.keys() == {*names, "MANIFEST.json"}
    assert manifest["delivery_bytes"] == sum(files.values())
    assert all(manifest["files"][name]["bytes"] == files[name] for name in manifest["files"])
    assert list(out.parent.iterdir()) == [out]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "bert" and config["max_position_embeddings"] == 32
    onnx.checker.check_model(onnx.load(out / manifest["graph"]))


def test_the_tokenizer_is_the_students_cut_to_max_positions(model_folder, tmp_path):
    export_embedder(model_folder, tmp_path / "out", weights="fp32", max_positions=8)
    original = AutoTokenizer.from_pretrained(model_folder)
    delivered = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "kalo mine, rusa to vi we zu bra cli dro"
    assert delivered.model_max_length == 8
    assert delivered(text)["input_ids"] == original(text)["input_ids"]
    assert len(delivered(text, truncation=True)["input_ids"]) == 8


def test_the_same_model_gives_the_same_bytes(model_folder, tmp_path):
    runs = [export_embedder(model_folder, tmp_path / to, weights="int4", max_positions=32) for to in "ab"]
    assert runs[0]["files"] == runs[1]["files"]


def test_over_budget_is_refused_by_file_and_the_earlier_delivery_stays(model_folder, tmp_path):
    out = tmp_path / "out"
    manifest = export_embedder(model_folder, out, weights="int8", max_positions=32)
    budget = manifest["delivery_bytes"]
    export_embedder(model_folder, out, weights="int8", max_positions=32, budget_bytes=budget)
    words = r"over the budget .*model_quantized.onnx [\d,]+.*smaller vocabulary.size"
    with pytest.raises(InputError, match=words):
        export_embedder(model_folder, out, weights="int8", max_positions=32, budget_bytes=budget - 1)
    assert json.loads((out / "MANIFEST.json").read_text()) == manifest
    assert list(tmp_path.iterdir()) == [out]


def test_a_graph_that_computes_something_else_is_refused(model_folder, tmp_path, monkeypatch):
    pack = export.pack_nibbles
    monkeypatch.setattr(export, "pack_nibbles", lambda codes: pack(codes[::-1]))
    with pytest.raises(InputError, match="cosine .* with torch on the same weights"):
        export_embedder(model_folder, tmp_path / "out", weights="int4", group_size=32, max_positions=32)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_in_one_sentence(model_folder, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    for changes, words in (
        ({"weights": "int3"}, "weights 'int3'"),
        ({"group_size": 48}, "group_size 48"),
        ({"max_positions": 49}, "max_positions 49"),
        ({"pooling": "max"}, "pooling 'max'"),
    ):
        with pytest.raises(InputError, match=words):
            export_embedder(model_folder, out, **({"weights": "int4", "max_positions": 32} | changes))
    with pytest.raises(InputError, match="config.json"):
        export_embedder(tmp_path, out, weights="fp32", max_positions=32)
    other = make_model(tmp_path / "other", tiny_teacher, vocab_size=299)
    with pytest.raises(InputError, match="300 pieces in tokenizer.json and 299"):
        export_embedder(other, out, weights="fp32", max_positions=32)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no earlier delivery"):
        export_embedder(model_folder, out, weights="fp32", max_positions=32)
    assert (out / "thesis.txt").read_text() == "mine"
