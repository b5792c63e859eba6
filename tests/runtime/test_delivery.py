import hashlib
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from tokenizer_build.errors import InputError
from tokenizer_build.files import claimed, replacing_folder
from vocabshrink.runtime.delivery import KINDS, load, name_of
from vocabshrink.runtime.index import Index, build_index
from vocabshrink.runtime.lines import answer_lines

LABELS = {"classification": ["bad", "good", "so so"], "tokens": ["O", "B-word"]}
RELEASED = Path(__file__).resolve().parents[2] / "artifacts" / "mpnet-7mb"
LONGEST = 24


def write_graph(path: Path, task: str, pieces: int, *, ids=TensorProto.INT64, out=TensorProto.FLOAT) -> np.ndarray:
    """A model of one matrix: rows of the pieces, for a text their mean. Returns the matrix [pieces, columns]."""
    columns = {"embedding": 8, "fill-mask": pieces}.get(task) or len(LABELS[task])
    table = np.random.default_rng(0).normal(size=(pieces, columns)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    if task in ("embedding", "classification"):
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["present"]),
            helper.make_node("Mul", ["rows", "present"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["present", "one"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], ["result"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["rows"], ["result"]))
    nodes.append(helper.make_node("Cast", ["result"], [KINDS[task].output], to=out))
    shape = ["batch", columns] if task in ("embedding", "classification") else ["batch", "sequence", columns]
    inputs = [
        helper.make_tensor_value_info(name, kind, ["batch", "sequence"])
        for name, kind in (("input_ids", ids), ("attention_mask", TensorProto.INT64))
    ]
    arrays = {"table": table, "last": np.array([-1]), "one": np.array([1])}
    weights = [numpy_helper.from_array(values, name) for name, values in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info(KINDS[task].output, out, shape)], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return table


def write_manifest(folder: Path, task: str, **changes) -> None:
    names = ["onnx/model.onnx", "tokenizer.json", "config.json"]
    contents = {name: (folder / name).read_bytes() for name in names}
    files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    manifest = {"graph": names[0], "task": task, "max_positions": LONGEST, "files": files}
    if task == "embedding":
        manifest["dimension"] = 8
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | changes))


def write_delivery(folder: Path, task: str, tokenizer_from: Path) -> Path:
    folder.mkdir()
    shutil.copy(tokenizer_from / "tokenizer.json", folder)
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    write_graph(folder / "onnx" / "model.onnx", task, pieces)
    labels = {str(i): label for i, label in enumerate(LABELS.get(task, []))}
    (folder / "config.json").write_text(json.dumps({"vocab_size": pieces, "id2label": labels}))
    write_manifest(folder, task)
    return folder


@pytest.fixture(scope="module")
def deliveries(tiny_teacher, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("deliveries")
    return {task: write_delivery(place / task, task, tiny_teacher) for task in KINDS}


@pytest.fixture
def copy(deliveries, tmp_path) -> Path:
    return Path(shutil.copytree(deliveries["embedding"], tmp_path / "copy"))


@pytest.fixture(scope="module")
def expected(deliveries):
    """The rows of a text's pieces, computed without the runtime: task, text or pair -> [pieces, columns]."""

    def rows(task: str, *text) -> np.ndarray:
        tokenizer = Tokenizer.from_file(str(deliveries[task] / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST)
        weights = onnx.load(deliveries[task] / "onnx" / "model.onnx").graph.initializer
        table = next(numpy_helper.to_array(tensor) for tensor in weights if tensor.name == "table")
        return table[tokenizer.encode(*text).ids]

    return rows


def test_embeds_in_the_order_of_the_texts(deliveries, expected, lines):
    texts = [*lines[:9], "ka", " ".join(lines[:20])]  # of all lengths; the last is cut
    model = load(deliveries["embedding"])
    ours = model.embed(texts, batch_size=4)
    assert ours.dtype == np.float32 and ours.shape == (11, model.dimension) and model.task == "embedding"
    for text, row in zip(texts, ours, strict=True):
        np.testing.assert_allclose(row, expected("embedding", text).mean(0), atol=1e-5)
    assert model.embed([]).shape == (0, 8)


PROMPTS = {"prompts": {"query": "ka ka ", "document": "lo "}, "default_prompt": None}


def test_prompts_stand_before_the_texts(copy, lines):
    write_manifest(copy, "embedding", **PROMPTS)
    model, plain = load(copy), load(copy).embed(["ka ka mi", "lo mi", "mi"])
    for asked, row in (("query", 0), ("document", 1), ("", 2), (None, 2), (("passage", "document"), 1), (("ask",), 2)):
        np.testing.assert_array_equal(model.embed(["mi"], prompt=asked)[0], plain[row])
    with pytest.raises(InputError, match="prompt 'ask' is unknown: this model's are query, document"):
        model.embed(["mi"], prompt="ask")
    out = io.StringIO()
    answer_lines("embed", copy, ["mi", ""], out, prompt="query")
    first, empty = map(json.loads, out.getvalue().splitlines())
    np.testing.assert_allclose(first["embedding"], plain[0], rtol=1e-6)
    assert first["text"] == "mi" and empty["embedding"] is None
    write_manifest(copy, "embedding", **PROMPTS | {"default_prompt": "query"})
    np.testing.assert_array_equal(load(copy).embed(["mi"])[0], plain[0])
    np.testing.assert_array_equal(load(copy).embed(["mi"], prompt="")[0], plain[2])
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="prompt 'query' is unknown: this model's are none"):
        load(copy).embed(["mi"], prompt="query")


def test_encode_is_embed_for_what_expects_sentence_transformers(copy, lines):
    write_manifest(copy, "embedding", **PROMPTS, dimensions=[8, 4])
    model = load(copy)
    texts, options = lines[:5], {"show_progress_bar": True, "device": "cpu", "hf_split": "test"}
    np.testing.assert_array_equal(model.encode(texts, **options), model.embed(texts))
    np.testing.assert_array_equal(model.encode(texts, "query"), model.embed(texts, prompt="query"))
    np.testing.assert_array_equal(model.encode(texts, prompt="lo "), model.embed(texts, prompt="document"))
    np.testing.assert_array_equal(model.encode(tuple(texts), truncate_dim=4), model.embed(texts, dimensions=4))
    assert np.linalg.norm(model.encode(texts, normalize_embeddings=True), axis=1) == pytest.approx(1, abs=1e-6)
    placed = ("query", None, 32, None, "sentence_embedding", "float32", True, False, None, True, 4)
    expected = model.encode(texts, prompt_name="query", normalize_embeddings=True, truncate_dim=4)
    np.testing.assert_array_equal(model.encode(texts, *placed), expected)
    assert model.encode(texts[0]).shape == (8,) and model.encode([]).shape == (0, 8)
    assert np.isfinite(model.encode(["", texts[0], " "])).all()
    for wrong in ({"convert_to_tensor": True}, {"precision": "int8"}, {"output_value": "token_embeddings"}):
        with pytest.raises(InputError, match=f"{min(wrong)}=.*: only .* is possible: leave it out"):
            model.encode(texts, **wrong)
    with pytest.raises(InputError, match="prompt 'ask' is unknown"):
        model.encode(texts, prompt_name="ask")


def test_the_first_dimensions_alone_have_unit_length_too(copy, lines):
    whole = load(copy).embed(lines[:5])
    write_manifest(copy, "embedding", dimensions=[8, 4, 2])
    for count in (8, 4):
        first = whole[:, :count]
        expected = first / np.linalg.norm(first, axis=1, keepdims=True)
        np.testing.assert_allclose(load(copy).embed(lines[:5], dimensions=count), expected, atol=1e-6)
    with pytest.raises(InputError, match="dimensions is 3: this model was trained for 8, 4, 2"):
        load(copy).embed(["ka"], dimensions=3)
    write_manifest(copy, "embedding", normalize=False, dimensions=[8, 4, 2])
    np.testing.assert_array_equal(load(copy).embed(lines[:5], dimensions=4), whole[:, :4])
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="dimensions is 4: this model was trained for 8, all of them"):
        load(copy).embed(["ka"], dimensions=4)


def test_an_index_asks_and_answers_with_the_models_prompts(copy, lines):
    plain = load(copy).embed([f"lo {line}" for line in lines[:9]]), load(copy).embed(["ka ka mi ne"])[0]
    build_index(copy, lines[:9])
    write_manifest(copy, "embedding", **PROMPTS)
    with pytest.raises(InputError, match="another model's: build the index again"):  # passages without the prompt
        Index(copy)
    build_index(copy, lines[:9])
    np.testing.assert_allclose(np.load(copy / "index" / "vectors.npy"), plain[0], atol=1e-2)
    hit = Index(copy).search("mi ne", top=1)[0]
    cosines = plain[0] @ plain[1] / np.linalg.norm(plain[0], axis=1) / np.linalg.norm(plain[1])
    assert hit["score"] == pytest.approx(cosines.max(), abs=1e-3)


def test_embeds_as_torch_does(tiny_teacher, tmp_path, lines):
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from vocabshrink.delivery.export import ExportSettings, export_model
    from vocabshrink.run.recipe import DeliverySection

    folder = tmp_path / "student"
    pieces = Tokenizer.from_file(str(tiny_teacher / "tokenizer.json")).get_vocab_size()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=pieces, initializer_range=0.1, **shape)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_teacher / name, folder)
    section = DeliverySection(weights="fp32", max_positions=24)
    export_model(folder, tmp_path / "delivery", ExportSettings("embedding", section))
    texts = [*lines[:5], " ".join(lines[:20])]
    ours = load(tmp_path / "delivery").embed(texts, batch_size=4)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text, row in zip(texts, ours, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=24)).last_hidden_state
        theirs = torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0]
        np.testing.assert_allclose(row, theirs.numpy(), atol=1e-5)


def test_classifies_texts_and_pairs(deliveries, expected, lines):
    model = load(deliveries["classification"], threads=2)
    texts = [lines[0], (lines[1], "ka lo"), *lines[2:8]]
    best, scores = model.classify(texts, batch_size=3)
    assert model.labels == LABELS["classification"] and scores.dtype == np.float32
    for text, label, row in zip(texts, best, scores, strict=True):
        logits = expected("classification", *([text] if isinstance(text, str) else text)).mean(0)
        np.testing.assert_allclose(row, np.exp(logits) / np.exp(logits).sum(), atol=1e-5)
        assert label == model.labels[logits.argmax()]
    assert model.classify([])[0] == [] and model.classify([])[1].shape == (0, 3)


def test_labels_words_by_their_first_pieces(deliveries, expected):
    model = load(deliveries["tokens"])
    text = "Kalo, zzqx mi"  # the comma is a piece of the first word, and zzqx is several pieces
    (ours,) = model.label_tokens([text])
    assert model.label_tokens([text.split(), "mi"])[0] == ours
    for words in (["ka", ""], ["ka", " "], ["ka", 3], []):
        with pytest.raises(InputError, match="text 0 (is empty|is int)"):
            model.label_tokens([words])
    assert [word["word"] for word in ours] == text.split()
    tokenizer = model.tokenizer
    first = [0]
    for word in text.split():
        first.append(first[-1] + len(tokenizer.encode(word, add_special_tokens=False).ids))
    rows = expected("tokens", text)[1:]
    for word, place in zip(ours, first, strict=False):
        assert word["label"] == LABELS["tokens"][rows[place].argmax()]
    (long,) = model.label_tokens(["mi " * 1000])
    assert len(long) == 1000 and all(word["score"] > 0 for word in long[: LONGEST - 2])
    assert long[LONGEST - 2 :] == [{"word": "mi", "label": "O", "score": 0.0}] * (1002 - LONGEST)  # beyond the cut


def test_one_label_for_each_word_whatever_the_words(deliveries):
    """Words without a piece or with a space inside take no other word's label: each has that of its own first piece."""
    model = load(deliveries["tokens"])
    words = ["Kalo", "\u200b", "ka lo", "\u00ad", "mi", "\ufe0f", "zzqx"]
    (found,) = model.label_tokens([words])
    assert [row["word"] for row in found] == words
    (seen,) = model.label_tokens([["Kalo", "ka", "lo", "mi", "zzqx"]])
    assert [found[i] | {"word": ""} for i in (0, 2, 4, 6)] == [seen[i] | {"word": ""} for i in (0, 1, 3, 4)]
    assert [(found[i]["label"], found[i]["score"]) for i in (1, 3, 5)] == [("O", 0.0)] * 3


def test_special_tokens_in_a_text_are_text(deliveries, expected):
    model = load(deliveries["embedding"])
    typed, spaced = model.embed(["ka [SEP] lo [PAD]", "ka [ SEP ] lo [ PAD ]"])
    np.testing.assert_array_equal(typed, spaced)
    mask = load(deliveries["fill-mask"])
    assert mask.tokenizer.encode("ka [MASK]").tokens.count("[MASK]") == 1


def test_fills_a_mask(deliveries, expected):
    model = load(deliveries["fill-mask"])
    (best, second), _ = model.fill_mask(["Ka [MASK] lo.", "ka ka ka [MASK]"], top=2)
    logits = expected("fill-mask", "Ka [MASK] lo.")[model.tokenizer.encode("Ka [MASK] lo.").tokens.index("[MASK]")]
    order = np.argsort(-logits)
    assert [model.tokenizer.token_to_id(hit["piece"]) for hit in (best, second)] == list(order[:2])
    assert best["score"] > second["score"] > 0
    for hit in (best, second):
        inner = hit["piece"].startswith("##")
        assert hit["text"] == (f"Ka{hit['piece'][2:]} lo." if inner else f"Ka {hit['piece']} lo.")
    for text in ("ka lo", "[MASK] [MASK]", "ka " * 50 + "[MASK]"):
        with pytest.raises(InputError, match=r"text 0 must have one \[MASK\] within its first 24 pieces"):
            model.fill_mask([text])


@pytest.mark.parametrize("task", KINDS)
def test_a_model_of_another_task_is_refused(deliveries, task):
    model = load(deliveries[task])
    for needed, kind in KINDS.items():
        if needed != task:
            words = f"{kind.method} needs a model of the task '{needed}': this one's is '{task}'"
            with pytest.raises(InputError, match=words):
                getattr(model, kind.method)(["ka"])


@pytest.mark.parametrize(
    "texts,words",
    [
        ("ka lo", "list of texts"),
        (["ka", 3], "text 1 is int"),
        ([b"ka"], "text 0 is bytes"),
        ([("ka", "lo")], "text 0 is tuple"),
        ([np.array([1, 2])], "text 0 is ndarray"),
        (["ka", ""], "text 1 is empty"),
        ([" \n"], "text 0 is empty"),
        (["ka \ud83d lo"], r"text 0 has a lone surrogate \('\\ud83d', character 3\)"),
    ],
)
def test_embed_refuses_what_is_no_list_of_texts(deliveries, texts, words):
    with pytest.raises(InputError, match=words):
        load(deliveries["embedding"]).embed(texts)


@pytest.mark.parametrize(
    "text",
    ["ka lo mi " * 200_000, "ka" * 1_000_000, " " * 1_000_000 + "ka lo", "ka\u2003" * 300_000, "ka,lo." * 200_000],
)
def test_a_text_of_a_megabyte_is_cut_as_any_other(deliveries, expected, text):
    model = load(deliveries["embedding"])
    started = time.process_time()
    (ours,) = model.embed([text])
    assert time.process_time() - started < 20
    np.testing.assert_allclose(ours, expected("embedding", text).mean(0), atol=1e-5)


def test_missing_altered_and_truncated_files_are_refused(copy, tmp_path):
    with pytest.raises(InputError, match="no MANIFEST.json"):
        load(tmp_path)
    tokenizer, graph = copy / "tokenizer.json", copy / "onnx" / "model.onnx"
    text, weights = tokenizer.read_text(), graph.read_bytes()
    tokenizer.write_text(text + " ")
    with pytest.raises(InputError, match="tokenizer.json .* is not the file of MANIFEST.json: it was altered"):
        load(copy)
    tokenizer.unlink()
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        load(copy)
    tokenizer.write_text(text)
    graph.write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"model.onnx \([\d,]+ bytes\) is not .*: it was altered, cut short"):
        load(copy)
    graph.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(InputError, match="model.onnx .* it was altered"):
        load(copy)
    graph.write_bytes(weights)
    load(copy)


def test_the_manifest_of_another_model_is_refused(copy, deliveries):
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    for facts in manifest["files"].values():
        facts |= {"sha256": "0" * 64, "bytes": 1}
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another model's"):
        load(copy)
    shutil.copy(deliveries["classification"] / "MANIFEST.json", copy)
    with pytest.raises(InputError, match="altered, cut short or is another model's"):
        load(copy)
    write_manifest(copy, "classification")
    (copy / "config.json").write_text("{}")
    write_manifest(copy, "classification")
    with pytest.raises(InputError, match="id2label"):
        load(copy)
    (copy / "config.json").write_text('{"id2label": {"0": "a"}}')
    write_manifest(copy, "classification")
    with pytest.raises(InputError, match="no output logits"):
        load(copy)
    write_manifest(copy, "embedding", dimension=9)
    with pytest.raises(InputError, match="8 columns where 9 are promised"):
        load(copy)
    write_manifest(copy, "embedding", prompts={"query": None})
    with pytest.raises(InputError, match="a prompt that is no text"):
        load(copy)
    (copy / "config.json").write_text('{"vocab_size": 10}')
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="pieces and the model 10"):
        load(copy)


@pytest.mark.parametrize(
    "kinds,words",
    [
        (
            {"ids": TensorProto.INT32},
            r"inputs are {'input_ids': 'tensor\(int32\)', .* not {'input_ids': 'tensor\(int64\)'",
        ),
        ({"out": TensorProto.FLOAT16}, r"no output sentence_embedding of tensor\(float\)"),
    ],
)
def test_a_graph_of_another_dtype_is_refused(copy, kinds, words):
    write_graph(copy / "onnx" / "model.onnx", "embedding", 300, **kinds)
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match=words):
        load(copy)


def test_files_that_are_no_graph_or_tokenizer_are_refused(copy):
    graph, tokenizer = copy / "onnx" / "model.onnx", copy / "tokenizer.json"
    weights = graph.read_bytes()
    graph.write_bytes(b"not a graph")
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="model.onnx cannot be read"):
        load(copy)
    graph.write_bytes(weights)
    tokenizer.write_text("{}")
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer that can be read"):
        load(copy)


def test_nothing_outside_the_folder_is_read(copy):
    outside = copy.parent / "model.onnx"
    (copy / "onnx" / "model.onnx").rename(outside)
    (copy / "onnx" / "model.onnx").symlink_to(outside)
    with pytest.raises(InputError, match="outside"):
        load(copy)
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    for name in ("../model.onnx", str(outside), "a/../../model.onnx", "a\0b"):
        for graph in (name, manifest["graph"]):  # also where it is not a file that is needed
            files = manifest["files"] | {name: manifest["files"]["onnx/model.onnx"]}
            (copy / "MANIFEST.json").write_text(json.dumps(manifest | {"files": files, "graph": graph}))
            with pytest.raises(InputError, match="outside"):
                load(copy)


def test_a_snapshot_of_the_hub_links_to_its_own_blobs(copy, deliveries):
    """huggingface_hub's cache: snapshots/REVISION holds links into blobs, and nothing else of the disk."""
    snapshot, blobs = copy.parent / "models--o--n" / "snapshots" / "abc", copy.parent / "models--o--n" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    copy.rename(snapshot)
    for number, path in enumerate([path for path in sorted(snapshot.rglob("*")) if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(Path(*[".."] * len(path.relative_to(snapshot.parents[1]).parts[:-1]), "blobs", str(number)))
    assert (load(snapshot).embed(["ka lo"]) == load(deliveries["embedding"]).embed(["ka lo"])).all()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(deliveries["embedding"] / "tokenizer.json")
    with pytest.raises(InputError, match="names 'tokenizer.json', which lies outside the folder"):
        load(snapshot)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../blobs/gone")
    with pytest.raises(InputError, match="tokenizer.json is missing: copy the whole folder again"):
        load(snapshot)


@pytest.mark.parametrize("place", ["../../secret", "beside"])
def test_weights_of_other_files_are_not_read(place, copy, monkeypatch):
    """A graph may name other files for its weights: none is of the manifest, wherever it lies."""
    (copy / "onnx" / place).write_bytes(bytes(300 * 8 * 4))
    monkeypatch.chdir(copy / "onnx")
    path = copy / "onnx" / "model.onnx"
    model = onnx.load(path)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", "0"), ("length", str(300 * 8 * 4))):
        table.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="model.onnx cannot be read"):
        load(copy)


WHOLE = {"task": "embedding", "graph": "onnx/model.onnx", "dimension": 8, "max_positions": LONGEST, "files": {}}


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "not a JSON object"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"graph": "g"}', "the task None is unknown"),
        (WHOLE | {"task": "poetry"}, "the task 'poetry' is unknown"),
        (WHOLE | {"task": ["embedding"]}, "the task .* is unknown"),
        (WHOLE | {"graph": 3}, "graph is 3: export the model again"),
        (WHOLE | {"files": []}, r"files is \[\]: export"),
        (WHOLE | {"dimension": None}, "dimension is None: export"),
        (WHOLE | {"max_positions": "24"}, "max_positions is '24': export"),
        (WHOLE | {"prompts": ["query"]}, "prompts is .*: export"),
        (WHOLE | {"graph": "g"}, "g is missing: copy"),
        (WHOLE, "model.onnx .* is not the file of MANIFEST.json"),
        (WHOLE | {"files": {"onnx/model.onnx": "x"}}, "model.onnx .* is not the file of MANIFEST.json"),
    ],
)
def test_a_broken_manifest_is_refused(copy, content, words):
    (copy / "MANIFEST.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words):
        load(copy)


def test_a_delivery_is_named_by_its_run(tmp_path):
    for folder in ("tiny", "tiny/export", "tiny/export/model", "tiny/model"):
        assert name_of(tmp_path / folder) == "tiny"
    assert name_of(tmp_path / "tiny" / "export" / "sst2") == "sst2"


def test_threads_and_batches_are_checked(copy):
    with pytest.raises(InputError, match="threads is 0"):
        load(copy, threads=0)
    with pytest.raises(InputError, match="batch_size is 0"):
        load(copy).embed(["ka"], batch_size=0)


def test_lines_become_rows_of_json(deliveries, lines):
    out = io.StringIO()
    stream = [(line + "\r\n").encode() for line in lines[:7]]
    assert answer_lines("embed", deliveries["embedding"], iter(stream), out, batch_size=3) == 7
    rows = [json.loads(row) for row in out.getvalue().splitlines()]
    assert [row["text"] for row in rows] == lines[:7]
    ours = load(deliveries["embedding"]).embed(lines[:7])
    np.testing.assert_allclose([row["embedding"] for row in rows], ours, rtol=1e-6)
    with pytest.raises(InputError, match="line 3 is not UTF-8"):  # the good lines before it are answered
        answer_lines("embed", deliveries["embedding"], [b"ka", b"lo", b"\xff", b"mi"], out := io.StringIO())
    assert [json.loads(row)["text"] for row in out.getvalue().splitlines()] == ["ka", "lo"]

    out = io.StringIO()
    assert answer_lines("classify", deliveries["classification"], [lines[0], lines[1]], out) == 2
    model = load(deliveries["classification"])
    best, scores = model.classify(lines[:2])
    rows = [json.loads(row) for row in out.getvalue().splitlines()]
    assert [row["label"] for row in rows] == best
    np.testing.assert_allclose([[row["scores"][label] for label in model.labels] for row in rows], scores, rtol=1e-6)

    out = io.StringIO()
    assert answer_lines("classify", deliveries["tokens"], ["ka lo"], out) == 1
    assert json.loads(out.getvalue())["words"] == load(deliveries["tokens"]).label_tokens(["ka lo"])[0]


@pytest.mark.parametrize("pairs", [True, False])
def test_a_tab_makes_a_pair_only_where_the_model_takes_pairs(deliveries, tmp_path, lines, pairs):
    folder = Path(shutil.copytree(deliveries["classification"], tmp_path / "copy"))
    line, out = f"{lines[1]}\t{lines[2]}", io.StringIO()
    write_manifest(folder, "classification", **({"pairs": True} if pairs else {}))  # released manifests do not say it
    answer_lines("classify", folder, [line, "a\tb\tc"], out)
    expected = load(folder).classify([(lines[1], lines[2]) if pairs else line, "a\tb\tc"])[1]
    rows = [list(json.loads(row)["scores"].values()) for row in out.getvalue().splitlines()]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    if pairs:
        with pytest.raises(InputError, match="line 2 is empty"):
            answer_lines("classify", folder, ["ka", "lo\t"], io.StringIO())


@pytest.mark.parametrize(
    "task,none", [("embedding", ["embedding"]), ("classification", ["label", "scores"]), ("tokens", ["words"])]
)
def test_an_empty_line_has_an_answer_that_says_so(deliveries, task, none):
    out, command = io.StringIO(), "embed" if task == "embedding" else "classify"
    assert answer_lines(command, deliveries[task], [b"ka\n", b"\n", b" \r\n", b"lo"], out) == 4
    rows = [json.loads(row) for row in out.getvalue().splitlines()]
    assert [row["text"] for row in rows] == ["ka", "", " ", "lo"]
    assert rows[1] == {"text": ""} | dict.fromkeys(none) and all(rows[0][name] for name in none)
    alone = io.StringIO()
    answer_lines(command, deliveries[task], ["lo"], alone)
    assert json.loads(alone.getvalue()) == rows[3]


@pytest.mark.parametrize("stream,words", [([b"ka\n", b"ka\xff\n"], "line 2 is not UTF-8"), (["\ud83d"], "line 1 has")])
def test_bad_lines_are_refused_by_number(deliveries, stream, words):
    with pytest.raises(InputError, match=words):
        answer_lines("embed", deliveries["embedding"], stream, io.StringIO())


def test_search_finds_the_passages_of_greatest_cosine(copy, lines, monkeypatch):
    passages = [{"text": line, "source": f"line {i}"} for i, line in enumerate(lines[:40])]
    assert build_index(copy, passages[:3]) == 3
    whole, told = np.load(copy / "index" / "vectors.npy"), []
    monkeypatch.setattr("vocabshrink.runtime.index.EMBEDDED_AT_ONCE", 16)
    assert build_index(copy, iter(passages), progress=told.append) == 40
    assert told == [16, 16, 8] and np.array_equal(np.load(copy / "index" / "vectors.npy")[:3], whole)
    assert np.load(copy / "index" / "vectors.npy").dtype == np.float16
    assert sorted(path.name for path in (copy / "index").iterdir()) == ["index.json", "passages.jsonl", "vectors.npy"]
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]
    found = Index(copy).search(lines[7], top=3)
    assert found[0]["source"] == "line 7" and found[0]["score"] == pytest.approx(1, abs=1e-3)
    model = load(copy)
    vectors = model.embed(lines[:40])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors[7]
    assert [hit["score"] for hit in found] == pytest.approx(sorted(scores, reverse=True)[:3], abs=1e-3)
    index = Index(copy)
    assert index.search(lines[7], top=3) == found and len(index.search("ka", top=99)) == 40


def test_texts_may_hold_any_line_separator(copy):
    texts = ["ka\u2028lo\x85mi\nne", "ru sa"]
    build_index(copy, texts)
    assert {hit["text"] for hit in Index(copy).search("ka", top=2)} == set(texts)


def test_bad_passages_and_indexes_are_refused(copy, deliveries):
    with pytest.raises(InputError, match="has no index"):
        Index(copy).search("ka")
    with pytest.raises(InputError, match="no passage"):
        build_index(copy, [])
    with pytest.raises(InputError, match="passage 1 is neither"):
        build_index(copy, ["ka", {"body": "lo"}])
    with pytest.raises(InputError, match="task 'embedding'"):
        build_index(deliveries["classification"], ["ka"])
    build_index(copy, ["ka", "lo"])
    with pytest.raises(InputError, match="top is 0"):
        Index(copy).search("ka", top=0)
    index = {path: path.read_bytes() for path in (copy / "index").iterdir()}
    (copy / "index" / "passages.jsonl").write_text('{"text": "ka"}\n{"text": "mi"}\n')  # as many, of another build
    with pytest.raises(InputError, match="build the index again"):
        Index(copy).search("ka")
    for path in index:
        path.unlink()
        with pytest.raises(InputError, match="build the index again"):
            Index(copy).search("ka")
        path.write_bytes(index[path])
    write_graph(copy / "onnx" / "model.onnx", "embedding", 301)  # another model beside the same index
    write_manifest(copy, "embedding")
    with pytest.raises(InputError, match="another model's: build the index again"):
        Index(copy).search("ka")


def test_an_index_that_cannot_be_finished_leaves_the_earlier_one(copy, monkeypatch):
    build_index(copy, ["ka", "lo"])

    def fail(*_):
        raise OSError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        with pytest.raises(OSError, match="no more"):
            build_index(copy, ["mi"])
    assert {hit["text"] for hit in Index(copy).search("ka")} == {"ka", "lo"}


def test_an_index_has_one_builder_at_a_time(copy, monkeypatch):
    held = []

    def replacing(folder):
        with claimed(copy / ".index.lock") as free:
            held.append(not free)
        return replacing_folder(folder)

    monkeypatch.setattr("vocabshrink.runtime.index.replacing_folder", replacing)
    monkeypatch.setenv("HOME", str(copy.parent))
    build_index("~/copy", ["ka"])
    assert held == [True] and [hit["text"] for hit in Index("~/copy").search("lo")] == ["ka"]


def test_the_runtime_needs_no_torch(deliveries):
    """In an interpreter where torch and the other packages of training cannot be imported."""
    absent = ["torch", "transformers", "onnx", "safetensors", "scipy", "pydantic", "yaml", "pyarrow", "sklearn"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "import vocabshrink\nassert 'numpy' not in sys.modules\n"
        "from vocabshrink import Index, load\nfrom vocabshrink.runtime import delivery, index, lines\n"
        "assert load is delivery.load and Index is index.Index\n"
        "assert not {'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        f"print(load({str(deliveries['embedding'])!r}).embed(['ka lo']).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 8)", done.stderr


SHIPPED = sorted(path.parent for path in RELEASED.parent.glob("*/MANIFEST.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_what_is_shipped_is_whole_under_seven_megabytes_and_answers_by_the_text_alone(folder):
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    model = load(folder)  # checks every sum
    on_disk = {path: (folder / path).stat().st_size for path in manifest["loaders"]["onnxruntime"]["files"]}
    assert sum(on_disk.values()) == manifest["delivery_bytes"] < 7_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{manifest['delivery_bytes']:,} bytes" in card
    texts = ["play a song", "Will it rain in Paris tomorrow, and how warm will it be by night?", "dull", "10 + 3!"]
    for feed in (texts, texts[::-1]):
        encodings = model._encode(feed)
        alone, together = (dict(model._run(encodings, batch_size)) for batch_size in (1, len(feed)))
        for i, row in alone.items():
            np.testing.assert_allclose(together[i][: len(row)], row, atol=2e-6)


def test_the_released_embedder_knows_what_is_alike():
    model = load(RELEASED)
    cat, dog, sort = model.embed(["A cat sleeps.", "The dog is asleep.", "Sort a list by two keys in Python."])
    assert cat @ dog > cat @ sort + 0.2
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)


def test_the_released_embedder_of_three_languages_puts_translations_beside_each_other():
    model = load(RELEASED.parent / "e5-en-de-fr-7mb")
    guitar = ["A man plays the guitar.", "Ein Mann spielt Gitarre.", "Un homme joue de la guitare."]
    file = ["The file was deleted.", "Die Datei wurde gelöscht.", "Le fichier a été supprimé."]
    similar = model.embed(guitar + file) @ model.embed(guitar + file).T
    assert min(similar[:3, :3].min(), similar[3:, 3:].min()) > similar[:3, 3:].max() + 0.1


def test_the_released_classifier_knows_praise_from_blame():
    model = load(RELEASED.parent / "sst2-7mb")
    labels, scores = model.classify(
        ["A gripping, funny and beautifully acted film.", "Dull, badly written and far too long.", "Not good at all."]
    )
    assert list(labels) == ["positive", "negative", "negative"] and scores.max(1).min() > 0.8


def test_the_released_tagger_finds_the_slots():
    (words,) = load(RELEASED.parent / "snips-slots-3mb").label_tokens(["will it rain in Paris tomorrow"])
    found = {word["word"].lower(): word["label"] for word in words}
    assert found["paris"] == "B-city" and found["tomorrow"] == "B-timeRange" and found["will"] == "O"
