"""Where each family of encoders keeps what BERT keeps, and which class a student of either shape is.
A family that is not in the table (DeBERTa, ModernBERT, NomicBERT) still teaches, but its layers start no student. A
student is a BERT or, with a factorised piece table (`student.embedding_size`), an ELECTRA: the same layers behind a
projection from the table's width, in a class that transformers and transformers.js know."""

from collections.abc import Iterator

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokenizer_build.errors import InputError

PARTS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
)
# model_type -> (where a layer stands, the names there of PARTS)
DISTIL = ("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
ALBERT = ("ffn", "ffn_output", "full_layer_layer_norm")
SHARED = "encoder.albert_layer_groups.0.albert_layers.0"  # one layer, used again and again
LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("encoder.layer.{}", PARTS)),
    "mpnet": ("encoder.layer.{}", (*(f"attention.attn.{name}" for name in "qkvo"), "attention.LayerNorm", *PARTS[5:])),
    "distilbert": ("transformer.layer.{}", (*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), *DISTIL)),
    "albert": (SHARED, (*(f"attention.{name}" for name in ("query", "key", "value", "dense", "LayerNorm")), *ALBERT)),
}
RELATIVE = ("mpnet",)  # adds learned biases to the scores Q K^T / sqrt(d); what lies outside LAYERS may rotate them too
FIRST_POSITION = ("roberta", "xlm-roberta", "camembert", "mpnet")  # count positions from behind the padding id


def first_position(config: PreTrainedConfig) -> int:
    """Row of the position table that the first piece takes."""
    return config.pad_token_id + 1 if config.model_type in FIRST_POSITION else 0


def positions_of(config: PreTrainedConfig) -> int | None:
    """Pieces that a model can read, special tokens included; None where nothing limits them."""
    most = getattr(config, "max_position_embeddings", None)
    return most - first_position(config) if most else None


def neurons_of(config: PreTrainedConfig) -> int | None:
    """Width of the feed-forward layers; None where there is no such number."""
    return getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None)


def table_width(config: PreTrainedConfig) -> int:
    """Columns of the piece table: ALBERT's and ELECTRA's may be narrower than the layers."""
    return getattr(config, "embedding_size", None) or config.hidden_size


def check_attention(config: PreTrainedConfig, *, scores: bool = False) -> None:
    """Raises InputError where the family's queries, keys and values (`scores`: and all else in them) are not known."""
    known = [family for family in LAYERS if not (scores and family in RELATIVE)]
    if config.model_type not in known or getattr(config, "inner_group_num", 1) != 1:  # ALBERT's layers in a layer
        remedy = f"choose losses of hidden states, or a model among {', '.join(known)}"
        raise InputError(f"{config.model_type}: how its attention is computed is not known: {remedy}")


def names_of_layer(config: PreTrainedConfig, number: int) -> dict[str, str]:
    """{BERT's name of a module: the family's} of a layer, 0-based."""
    place, names = LAYERS[config.model_type]
    ours = f"encoder.layer.{number}."
    return {ours + part: f"{place.format(number)}.{name}" for part, name in zip(PARTS, names, strict=True)}


def as_bert(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """A backbone's parameters under BERT's and ELECTRA's names; without layers where the family is none of LAYERS."""
    config, found, albert = backbone.config, dict(backbone.named_parameters()), "encoder.embedding_hidden_mapping_in"
    outside = [name for name in found if name.startswith(("embeddings", albert))]
    named = {name.replace(albert, "embeddings_project"): found[name] for name in outside}
    for number in range(config.num_hidden_layers) if config.model_type in LAYERS else ():
        for ours, theirs in names_of_layer(config, number).items():
            named |= {f"{ours}.{kind}": found[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return named


def layer_modules(backbone: nn.Module, part: str) -> Iterator[nn.Module]:
    """The module of each layer that does what `part`, one of PARTS, does in a BERT."""
    for number in range(backbone.config.num_hidden_layers):
        yield backbone.get_submodule(names_of_layer(backbone.config, number)[f"encoder.layer.{number}.{part}"])


def student_class(config: PreTrainedConfig, kind: str = "Model") -> type[PreTrainedModel]:
    """transformers' class of a student: BertModel, ElectraForMaskedLM ..."""
    return getattr(transformers, {"bert": "Bert", "electra": "Electra"}[config.model_type] + kind)


def new_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A random student without a pooler, in eval mode."""
    return student_class(config)(config, **without_pooler(config)).eval()


def without_pooler(config: PreTrainedConfig) -> dict:
    """What a student's class must be told to have no pooler: it serves next-sentence prediction alone."""
    return {"add_pooling_layer": False} if config.model_type == "bert" else {}
