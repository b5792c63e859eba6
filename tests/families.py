"""A tiny model of each family of teachers, with a tokenizer of its kind trained on the made-up text."""

import torch
from conftest import wordpiece_pieces
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForMaskedLM

from tokenizer_build.tokenizer import make_tokenizer

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
    # RoBERTa's own head is gelu whatever its config says. It tells no token types apart.
    "roberta": BODY
    | {
        "hidden_act": "relu",
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
    },
    "xlm-roberta": BODY | {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1},
    "camembert": BODY | {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1},
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


def make_families(lines, tmp_path_factory) -> dict:
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
