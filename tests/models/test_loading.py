"""Models are strangers' folders: whatever is in there, weights are float32, no code runs, and errors are clear."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

import vocabshrink
from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.models import loading
from vocabshrink.models.loading import check_folder, load_config, load_model, resolve_model, weights_sha256
from vocabshrink.models.teacher import load_teacher

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "m")


def refusal(do, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        do(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder) -> list:
    """Cuts a folder's weights into two files with an index, as save_pretrained does for large models."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / INDEX).is_file()
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_float32_whatever_the_file_holds(dtype, tiny_teacher, folder):
    AutoModelForMaskedLM.from_pretrained(folder).to(dtype).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    teacher, whole = load_teacher(str(folder)), load_teacher(str(tiny_teacher))
    assert not teacher.backbone.training
    for found, exact in ((teacher.backbone, whole.backbone), (teacher.head, whole.head)):
        for name, value in found.named_parameters():
            assert torch.equal(value, exact.get_parameter(name).to(dtype).float()), name
            assert value.dtype == torch.float32


@pytest.mark.parametrize("model_type", ["stranger", "bert"])
def test_a_folders_code_never_runs_and_nobody_is_asked(model_type, folder, tmp_path, monkeypatch):
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    change_config(folder, model_type=model_type, auto_map=code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    if model_type == "stranger":
        for do in (check_folder, load_model):
            assert "cannot be loaded: ValueError" in refusal(do, folder)
    else:  # transformers has a class of its own for it
        assert type(load_teacher(str(folder)).backbone).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_opened(folder):
    """But the line that opens it is told, and works."""
    before = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors: convert the weights with save_pretrained" in refusal(check_folder, folder)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    for do in (check_folder, load_model):
        assert "unpickling pytorch_model.bin can run code, so it is not read" in refusal(do, folder)
    torch.save(before, folder / "pytorch_model.bin")
    exec(refusal(check_folder, folder).partition('python -c "')[2].rstrip('"'))
    after = load_file(folder / "model.safetensors")
    assert check_folder(folder).model_type == "bert" and all(torch.equal(after[name], before[name]) for name in before)


SPECIAL = {"albert": "[CLS],[SEP],<pad>,[MASK]", "xlm-roberta": ""}


@pytest.mark.parametrize("family, name", [("xlm-roberta", "sentencepiece.bpe.model"), ("albert", "spiece.model")])
def test_a_sentencepiece_model_becomes_tokenizer_json(family, name, folders, lines, tmp_path):
    import sentencepiece

    folder = tmp_path / family
    folder.mkdir()
    (folder / "config.json").write_bytes((folders[family] / "config.json").read_bytes())
    options = {"vocab_size": 150, "minloglevel": 2, "user_defined_symbols": SPECIAL[family]}
    trainer, prefix = sentencepiece.SentencePieceTrainer, tmp_path / "sp"
    trainer.train(sentence_iterator=iter(lines), model_prefix=str(prefix), **options)
    prefix.with_suffix(".model").rename(folder / name)
    loading.convert_tokenizer(folder)
    known = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
    text = lines[0].lower()
    assert load_tokenizer(folder).encode(text, add_special_tokens=False).tokens == known.encode(text, out_type=str)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"no model")
    with pytest.raises(InputError, match=f"{name}: cannot be loaded: .*: pip install sentencepiece protobuf, or put a"):
        loading.convert_tokenizer(folder)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_vocabulary_alone_becomes_tokenizer_json(family, folders, lines, tmp_path):
    """vocab.json with merges.txt, or vocab.txt."""
    folder, whole = shutil.copytree(folders[family], tmp_path / family), load_tokenizer(folders[family])
    (folder / "tokenizer.json").unlink()
    whole.model.save(str(folder))
    check_folder(folder)
    texts = [line.lower() for line in lines[:20]]
    found, expected = (t.encode_batch(texts, add_special_tokens=False) for t in (load_tokenizer(folder), whole))
    assert [encoding.tokens for encoding in found] == [encoding.tokens for encoding in expected]


@pytest.mark.parametrize(
    "text", ["", "[]", '"bert"', "{}", '{"model_type": []}', '{"model_type": "no-such-type"}', "\ud800"]
)
def test_what_is_no_config_is_refused(text, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert refusal(check_folder, folder).startswith(f"{folder}: cannot be loaded: ")
    assert refusal(load_model, folder).startswith(f"{folder}: cannot be loaded: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' expected int, got None"),
        ({"hidden_act": "nope"}, "'nope'"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"dtype": "float99"}, "float99"),
        ({"hidden_size": 64}, r"word_embeddings.weight the shape \(300, 64\), the weights have \(300, 32\)"),
        ({"intermediate_size": 65}, r"intermediate.dense.weight the shape \(65, 32\), the weights have \(64, 32\)"),
        (
            {"vocab_size": 301},
            r"the shape \(301, 32\), the weights have \(300, 32\): one of the two belongs to another model",
        ),
        ({"is_decoder": True}, "has a decoder: only encoders can be teachers"),
        ({"transformers_weights": "other.safetensors"}, "names other weights"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_any_weight_is_read(changes, words, folder):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=words):
        check_folder(folder)
    refusal(check_folder, folder)


@pytest.mark.parametrize("kept", [0, 4, 5000])
def test_a_truncated_file_is_refused(kept, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(check_folder, folder).startswith(f"{path}: cannot be loaded: SafetensorError")
    assert refusal(load_model, folder).startswith(f"{folder}: cannot be loaded: SafetensorError")


def test_weights_that_are_not_there_are_no_random_ones(folder):
    """transformers fills them up at random, with a warning; only the pooler and heads may be new."""
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if "pooler" not in n}, file, {"format": "pt"})
    check_folder(folder), load_model(folder)
    lost = [name for name in whole if "layer.1" in name]
    save_file({n: t for n, t in whole.items() if n not in lost}, file, {"format": "pt"})
    for do in (check_folder, load_model):
        assert "the weights lack encoder.layer.1." in (said := refusal(do, folder)) and f"{len(lost) - 1} more" in said


def test_weights_that_are_no_numbers_are_refused(folder):
    whole = load_file(file := folder / "model.safetensors")
    save_file(whole | {(name := min(whole)): whole[name] * float("nan")}, file, {"format": "pt"})
    assert "the weights are not finite: download them again" in refusal(load_model, folder)


def test_layers_without_number_are_refused_at_once(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    assert "config.json says 10000000 layers, the weights have" in refusal(check_folder, folder)


class TestShards:
    def test_are_loaded_and_hashed_in_order_of_name(self, tiny_teacher, folder):
        shards = shard(folder)
        assert len(shards) > 1
        right = hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
        (folder / "a_stray.safetensors").write_bytes(b"read by nobody")
        assert weights_sha256(folder) == right
        check_folder(folder, right)
        found, whole = load_teacher(str(folder)), load_teacher(str(tiny_teacher))
        for ours, theirs in ((found.backbone, whole.backbone), (found.head, whole.head)):
            assert all(torch.equal(v, theirs.get_parameter(n)) for n, v in ours.named_parameters())
        tensors = load_file(shards[-1])
        save_file({name: value + 1 for name, value in tensors.items()}, shards[-1], {"format": "pt"})
        with pytest.raises(InputError, match="not the same weights"):
            check_folder(folder, right)

    def test_outside_the_folder_or_missing_are_refused(self, folder):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = list(file.keys())
        outside = shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
        for target in (f"../{outside.name}", str(outside), "x"):
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, target)}))
            for do in (check_folder, weights_sha256, load_model):
                assert f"shard {target} is missing or outside the folder" in refusal(do, folder)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
    def test_without_a_proper_index_are_refused(self, text, folder):
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(text)
        assert f"{INDEX}: not an index of shards" in refusal(check_folder, folder)


def test_a_hub_model_can_be_pinned(tiny_teacher, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"]))
        if options["revision"] == "none":
            raise OSError("404: no such revision\nsee the documentation")
        return str(tiny_teacher)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/model", "abc123") == resolve_model("owner/model") == tiny_teacher
    assert asked == [("owner/model", "abc123"), ("owner/model", None)]
    assert "owner/model at none: neither a local folder" in refusal(resolve_model, "owner/model", "none")
    for key in ("model", "teacher.model"):
        with pytest.raises(InputError, match=f"^{key[:-5]}revision: .* is a local folder"):
            resolve_model(str(tiny_teacher), "abc123", key=key)


def test_config_of_every_family(folders):
    for family, folder in folders.items():
        assert check_folder(folder).model_type == load_config(folder).model_type == family


def test_transformers_is_asked_for_a_model_in_one_place():
    found = {}
    for path in Path(vocabshrink.__file__).parent.rglob("*.py"):
        for call in re.findall(r"([\w.]+)\.from_pretrained\(", path.read_text(encoding="utf-8")):
            found.setdefault(path.name, set()).add(call)
    assert found.pop("loading.py") == {"AutoConfig", "AutoTokenizer", "loader"}
    # a table's rows and static vectors: neither is a model of transformers
    assert set().union(*found.values()) <= {"nn.Embedding", "StaticModel", "M"}


def test_a_gpu_gives_each_family_the_attention_that_it_has(folders, monkeypatch):
    """MPNet and DeBERTa have none but eager, and transformers refuses to load them with another."""

    class WithGPU:
        cuda = SimpleNamespace(is_available=lambda: True)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(loading, "torch", WithGPU())
    found = {family: load_model(folder).config._attn_implementation for family, folder in folders.items()}
    assert found == dict.fromkeys(folders, "sdpa") | {"mpnet": "eager"}
