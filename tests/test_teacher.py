"""Every family of teacher gives what transformers gives: hidden states, masked-LM logits, pooled words."""

import json
import shutil

import pytest
import torch
from conftest import SPECIAL_TOKENS, wordpiece_pieces
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import make_tokenizer
from vocabshrink.batches import Pieces
from vocabshrink.dual_training import MixedEmbedding
from vocabshrink.teacher import (
    check_folder,
    file_sha256,
    load_teacher,
    pool_sentence,
    pool_words,
    resolve_model,
    run_backbone,
)

BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SHAPES = {
    # An activation of its own for BERT: a head that takes gelu for granted would not show with gelu.
    "bert": BODY | {"hidden_act": "relu"},
    # RoBERTa's own head is gelu whatever its config says.
    "roberta": BODY | {"hidden_act": "relu", "pad_token_id": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 66},
    "xlm-roberta": BODY | {"pad_token_id": 1, "max_position_embeddings": 66},
    "albert": BODY | {"embedding_size": 16, "pad_token_id": 0},  # its activation is gelu_new
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "mpnet": BODY | {"pad_token_id": 1, "max_position_embeddings": 66},
}


def train_tokenizer(family: str, lines) -> Tokenizer:
    if family in ("bert", "distilbert", "mpnet"):
        return make_tokenizer(wordpiece_pieces(lines, 300))
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if family == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=250, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def perturb(model) -> None:
    """Zero biases and unit norms would hide a variable that is not read."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def folders(lines, tmp_path_factory):
    torch.manual_seed(0)
    found = {}
    for family, shape in SHAPES.items():
        folder = found[family] = tmp_path_factory.mktemp(family)
        tokenizer = train_tokenizer(family, lines)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = AutoConfig.for_model(family, vocab_size=tokenizer.get_vocab_size() + 3, **shape)
        model = AutoModelForMaskedLM.from_config(config)
        perturb(model)
        model.save_pretrained(folder)
    return found


def random_side(vocab_size: int, lengths, seed: int = 0, pad: int = 0) -> Pieces:
    """Sequences of random pieces that are no special token, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, vocab_size, mask.shape, generator=generator)
    return Pieces(torch.where(mask.bool(), ids, pad), mask, torch.full_like(ids, -1))


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_head_and_hidden_states_are_those_of_transformers(family, folders):
    teacher = load_teacher(str(folders[family]))
    reference = AutoModelForMaskedLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    side = random_side(teacher.table.num_embeddings, [20, 13, 2], pad=teacher.config.pad_token_id)
    expected = reference(input_ids=side.ids, attention_mask=side.attention_mask, output_hidden_states=True)
    hidden = run_backbone(teacher.backbone, side, layers=True)
    real = side.attention_mask.bool()
    assert len(hidden) == 3
    for ours, theirs in zip(hidden, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    logits = teacher.head(hidden[-1], teacher.table.weight)
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    (last,) = run_backbone(teacher.backbone, side)
    torch.testing.assert_close(last, hidden[-1])
    assert not teacher.backbone.training and getattr(teacher.backbone, "pooler", None) is None


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_mixed_embedding_without_student_pieces_is_the_plain_input(family, folders):
    teacher = load_teacher(str(folders[family]))
    embedding = MixedEmbedding(teacher.table, torch.nn.Embedding(7, 8), None)
    side = random_side(teacher.table.num_embeddings, [20, 13, 2], pad=teacher.config.pad_token_id)
    (plain,) = run_backbone(teacher.backbone, side)
    (mixed,) = run_backbone(teacher.backbone, side, embeddings=embedding(side.ids))
    real = side.attention_mask.bool()
    torch.testing.assert_close(mixed[real], plain[real], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_mixed_embedding_takes_each_piece_from_its_table():
    teacher, student = torch.nn.Embedding(10, 6), torch.nn.Embedding(4, 3)
    embedding = MixedEmbedding(teacher, student, torch.randn(6, 3))
    embedding.up.bias.normal_()
    out = embedding(torch.tensor([[0, 9, 10, 13]]))
    up = student.weight @ embedding.up.weight.T + embedding.up.bias
    expected = torch.stack([teacher.weight[0], teacher.weight[9], up[0], up[3]])
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(embedding.student_rows(), up)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("embedded", [False, True])
@torch.no_grad()
def test_chunks_are_the_plain_pass(family, embedded, folders):
    teacher = load_teacher(str(folders[family]))
    lengths = [30, 4, 5, 29, 6, 4, 3, 30, 11, 2]
    side = random_side(teacher.table.num_embeddings, lengths, pad=teacher.config.pad_token_id)
    widths = []
    teacher.backbone.register_forward_hook(lambda module, inputs, output: widths.append(output[0].shape[1]))
    embeddings = teacher.table(side.ids) if embedded else None
    chunked = run_backbone(teacher.backbone, side, embeddings=embeddings, layers=True)
    assert widths == [4, 6, 30, 30]  # three of ten rows each, by length
    inputs = {"inputs_embeds": embeddings} if embedded else {"input_ids": side.ids}
    plain = teacher.backbone(**inputs, attention_mask=side.attention_mask, output_hidden_states=True)
    real = side.attention_mask.bool()
    for ours, theirs in zip(chunked, plain.hidden_states, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_pool_words_is_a_mean_for_each_word():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 9, 5, generator=generator)
    words = torch.tensor(
        [[-1, 0, 0, 1, 2, 2, 2, -1, -1], [-1, 0, 2, 2, -1, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1, -1, -1, -1]]
    )
    pooled = pool_words(hidden, words, 4)
    assert pooled.shape == (3, 4, 5)
    for row in range(3):
        for word in range(4):
            mine = [hidden[row, column] for column in range(9) if words[row, column] == word]
            expected = torch.stack(mine).mean(0) if mine else torch.zeros(5)
            torch.testing.assert_close(pooled[row, word], expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pool_sentence(pooling, normalize):
    hidden = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    pooled = pool_sentence(hidden, mask, pooling, normalize)
    assert pooled.dtype == torch.float32
    for row, length in ((0, 4), (1, 6)):
        rows = hidden[row].float()
        expected = rows[0] if pooling == "cls" else sum(rows[i] for i in range(length)) / length
        torch.testing.assert_close(pooled[row], expected / expected.norm() if normalize else expected)


def test_a_checkpoint_without_head_has_none(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "m")
    AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "m")
    assert load_teacher(str(tmp_path / "m")).head is None


def test_old_names_of_layer_norm_are_read(folders, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(folders["bert"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    head, expected = load_teacher(str(folder)).head, load_teacher(str(folders["bert"])).head
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_folder_without_its_parts_is_refused(tiny_teacher, tmp_path):
    for missing, message in (
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer.json"),
    ):
        folder = shutil.copytree(tiny_teacher, tmp_path / missing.split(".")[0])
        (folder / missing).unlink()
        with pytest.raises(InputError, match=message):
            load_teacher(str(folder))
    check_folder(tiny_teacher)


def test_a_tokenizer_larger_than_the_table_is_refused(tiny_teacher, lines, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "m")
    # as many as there are rows, then one more
    for size in (300, 301):
        pieces = SPECIAL_TOKENS + [f"w{number}" for number in range(size - len(SPECIAL_TOKENS))]
        make_tokenizer(pieces).save(str(folder / "tokenizer.json"))
        if size == 300:
            check_folder(folder)
    with pytest.raises(InputError, match="301 pieces, the model's table only 300 rows"):
        check_folder(folder)


def test_the_hash_of_the_weights_is_checked(tiny_teacher):
    right = file_sha256(tiny_teacher / "model.safetensors")
    assert load_teacher(str(tiny_teacher), sha256=right).head is not None
    with pytest.raises(InputError, match="not the same weights"):
        load_teacher(str(tiny_teacher), sha256="0" * 64)


def test_models_that_are_not_there_are_refused(tmp_path, monkeypatch):
    for name in ("package:no_such_package_here/model", "package:no.such/model", "package:/model"):
        with pytest.raises(InputError, match="is not installed"):
            resolve_model(name)
    for name in ("package:json/no_such_folder", str(tmp_path / "none"), "./none", "~/no/folder", "a/b/c"):
        with pytest.raises(InputError, match="no such folder"):
            resolve_model(name)
    with pytest.raises(InputError, match="neither a local folder nor to be had from the hub"):
        resolve_model("no-such-owner/no-such-model")
    import transformers

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"
    assert resolve_model("package:transformers/models").parent.samefile(transformers.__path__[0])


def test_an_encoder_decoder_is_refused(lines, tmp_path):
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    make_tokenizer(wordpiece_pieces(lines, 300)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="only encoders can be teachers"):
        load_teacher(str(tmp_path))


def test_an_unknown_architecture_is_refused(tiny_teacher, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_teacher(str(folder))
