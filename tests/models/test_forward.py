"""The sentence embedder of a transformers model, and what a sentence-transformers folder says of itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tokenizer_build.errors import InputError
from tokenizer_build.files import write_json
from vocabshrink.data.batches import Pieces
from vocabshrink.models.forward import (
    MODES,
    ModuleSettings,
    load_dense,
    module_settings,
    pool_sentence,
    run_backbone,
    torch_embedder,
)
from vocabshrink.models.teacher import load_teacher


@pytest.mark.parametrize("family", ["bert", "roberta", "camembert", "mpnet"])
def test_texts_are_cut_where_the_positions_end(family, folders):
    """RoBERTa-like models begin to count behind the padding id: of 66 rows, 64 are positions."""
    folder = folders[family]
    rows = AutoConfig.from_pretrained(folder).max_position_embeddings
    assert rows == (64 if family == "bert" else 66)
    backbone = load_teacher(str(folder)).backbone
    texts = ["ka lo", "ka lo mi ne ru sa " * 40]
    found = torch_embedder(backbone, folder, ModuleSettings(), max_length=500)(texts)
    assert found.shape == (2, 32) and np.isfinite(found).all()
    assert np.array_equal(found, torch_embedder(backbone, folder, ModuleSettings(), max_length=64)(texts))
    assert not np.array_equal(found, torch_embedder(backbone, folder, ModuleSettings(), max_length=63)(texts))


@pytest.mark.parametrize("pooling", MODES)
def test_sentences_are_pooled_as_sentence_transformers_does(pooling):
    from sentence_transformers.sentence_transformer.modules import Pooling

    hidden = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    options = {"embedding_dimension": 5, "pooling_mode": MODES[pooling].removesuffix("_token")}
    options["pooling_mode"] = {"mean_tokens": "mean", "max_tokens": "max"}.get(MODES[pooling], options["pooling_mode"])
    theirs = Pooling(**options)({"token_embeddings": hidden.float(), "attention_mask": mask})["sentence_embedding"]
    for normalize in (False, True):
        pooled = pool_sentence(hidden, mask, pooling, normalize)
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, torch.nn.functional.normalize(theirs) if normalize else theirs)


def write_modules(folder, **changes) -> None:
    """A sentence-transformers folder's files, without the model's. changes: {file's stem: content}."""
    files = ModuleSettings(prompts={"query": "ask: ", "passage": ""}, default_prompt="query").files(32, 48)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, changes.get(name.partition(".")[0].replace("/config", ""), content))


@pytest.mark.parametrize("pooling", MODES)
def test_a_folder_says_how_it_pools(pooling, tiny_teacher, tmp_path):
    """Ours, with the keys that all versions of sentence-transformers read, and one that it saves itself."""
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "ask: ", "document": ""}
    expected = ModuleSettings(pooling, False, 48, prompts, "query")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_teacher / name).read_bytes())
    for name, content in expected.files(32, 48).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_json(tmp_path / name, content)
    assert module_settings(tmp_path) == expected
    SentenceTransformer(str(tmp_path), device="cpu").save_pretrained(str(tmp_path / "again"))
    found = module_settings(tmp_path / "again")
    assert (found.pooling, found.normalize, found.prompts, found.default_prompt) == (pooling, False, prompts, "query")
    assert module_settings(tmp_path, "cls", True).pooling == "cls" and module_settings(tmp_path, "cls", True).normalize
    assert load_teacher(tmp_path).modules == expected and load_teacher(tmp_path, found).modules == found
    assert module_settings(tiny_teacher) == ModuleSettings() == load_teacher(tiny_teacher).modules


def modules(*parts: str) -> list[dict]:
    """modules.json of PATH=KIND words."""
    split = [part.split("=") for part in parts]
    return [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in split]


def test_a_teacher_s_vectors_are_those_of_sentence_transformers(tiny_teacher, lines, tmp_path):
    """With two Dense modules, of other widths and activations, before a tokenizer that keeps the case."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    folder = shutil.copytree(tiny_teacher, tmp_path / "cased")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    torch.manual_seed(0)
    dense = [Dense(32, 24), Dense(24, 40, activation_function=torch.nn.Identity(), bias=False)]
    parts = [Transformer(str(folder)), Pooling(32), *dense, Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(tmp_path / "m"))
    write_json(tmp_path / "m/sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    texts = [*lines[:4], lines[4].upper()]
    expected = SentenceTransformer(str(tmp_path / "m"), device="cpu").encode([text.lower() for text in texts])
    teacher, said = load_teacher(str(tmp_path / "m")), module_settings(tmp_path / "m")
    found = torch_embedder(teacher.backbone, teacher.folder, said, max_length=said.max_seq_length)(texts)
    np.testing.assert_allclose(found, expected, atol=0.02)  # ours are in bfloat16
    assert np.abs(found[4] - found[0]).max() > 0.02


def test_dense_modules_that_do_not_fit_are_refused(tmp_path):
    write_modules(tmp_path, modules=modules("=Transformer", "1_Pooling=Pooling", "2_Dense=Dense"))
    (folder := tmp_path / "2_Dense").mkdir()
    form = {"in_features": 32, "out_features": 16, "bias": False, "activation_function": "torch.nn.Tanh"}
    save_file({"linear.weight": torch.zeros(16, 32)}, folder / "model.safetensors")
    for changes, width, words in (
        ({}, 48, "reads 32 dimensions and is given 48"),
        ({"activation_function": "x.Sine"}, 32, "Sine is unknown"),
        ({"out_features": 8}, 32, "2_Dense: cannot be loaded"),
    ):
        write_json(folder / "config.json", form | changes)
        with pytest.raises(InputError, match=words):
            load_dense(module_settings(tmp_path).dense, width)
    write_json(folder / "config.json", form | {"use_residual": True})
    with pytest.raises(InputError, match="a Dense module with a residual"):
        module_settings(tmp_path)


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            {"modules": modules("=Transformer", "1=WeightedLayerPooling", "2=Pooling")},
            "Transformer, WeightedLayerPooling",
        ),
        (
            {"modules": modules("0_Transformer=Transformer", "1_Pooling=Pooling")},
            "only a Transformer beside modules.json",
        ),
        ({"modules": modules("=StaticEmbedding")}, "its modules are StaticEmbedding"),
        ({"modules": [3]}, "of an unknown form"),
        ({"1_Pooling": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}}, "cls_token and max_tokens"),
        ({"1_Pooling": {"pooling_mode": ["cls", "mean"]}}, "pooling by cls and mean cannot be learnt: give teacher"),
        ({"1_Pooling": {"pooling_mode": "weightedmean"}}, "pooling by weightedmean"),
        ({"1_Pooling": {"pooling_mode": "mean", "include_prompt": False}}, "mean without the prompt"),
        ({"config_sentence_transformers": {"prompts": {}, "default_prompt_name": "ask"}}, "'ask' is not one of its"),
    ],
)
def test_what_cannot_be_learnt_of_a_folder_is_refused(tmp_path, changes, words):
    write_modules(tmp_path, **changes)
    with pytest.raises(InputError, match=words):
        module_settings(tmp_path)
    if "1_Pooling" in changes:  # the recipe's own word wins
        assert module_settings(tmp_path, "mean") == ModuleSettings(
            "mean", True, 48, json.loads('{"query": "ask: ", "passage": ""}'), "query"
        )


def test_the_mask_of_a_gpu_s_attention_changes_nothing(folders):
    """It is given as transformers would make it, since transformers asks the device first whether it is needed."""
    backbone = load_teacher(str(folders["bert"])).backbone
    backbone.set_attn_implementation("sdpa")
    ids, mask = torch.randint(5, 200, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    for lengths in ([7, 7, 7], [7, 3, 5]):
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
        found = run_backbone(backbone, Pieces(ids, mask, ids)).hidden[-1]
        expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(found[mask.bool()], expected[mask.bool()])
