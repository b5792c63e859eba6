"""The teacher: any encoder with an embedding table that AutoModel loads, and a masked-LM head of one form.
The head of every family of the BERT line is dense, activation, layer norm, then the embedding table as decoder. So
`MaskedLMHead` serves them all, and gives the logits of either vocabulary, because the table is an argument."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vocabshrink.models.forward import ModuleSettings, module_settings
from vocabshrink.models.loading import check_folder, load_model, read_tensors, resolve_model, tensors_in


class MaskedLMHead(nn.Module):
    """Dense, activation, layer norm, then logits against an embedding table (Devlin et al. 2019, appendix)."""

    def __init__(self, hidden_size: int, embedding_size: int, vocab_size: int, eps=1e-12, activation: str = "gelu"):
        super().__init__()
        self.activation = ACT2FN[activation]
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """[n, hidden], [V, embedding] -> logits [n, V]"""
        return F.linear(self.transform(hidden), table, self.bias)

    def transform(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, embedding]"""
        return self.norm(self.activation(self.dense(hidden)))


@dataclass
class Teacher:
    """A loaded teacher; head is None where the checkpoint has none."""

    backbone: nn.Module
    head: MaskedLMHead | None
    folder: Path
    modules: ModuleSettings

    @property
    def config(self):
        return self.backbone.config

    @property
    def table(self) -> nn.Embedding:
        return self.backbone.get_input_embeddings()


def load_teacher(model: str | Path, modules: ModuleSettings | None = None) -> Teacher:
    """Backbone and head in eval mode. modules: its folder's unless given. Raises InputError: see `check_folder`."""
    check_folder(folder := resolve_model(str(model)))
    backbone = load_model(folder)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # next-sentence head: no one reads it, and it would be trained as dead weight
    return Teacher(backbone, load_head(folder, backbone), folder, modules or module_settings(folder))


# {`MaskedLMHead`'s name: the checkpoint's} in each family, BERT's first
HEAD_NAMES = [
    {"dense.weight": f"{dense}.weight", "dense.bias": f"{dense}.bias", "bias": bias}
    | {"norm.weight": f"{norm}.{scale}", "norm.bias": f"{norm}.{shift}"}
    for dense, norm, bias in (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),  # BERT
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),  # RoBERTa, XLM-R, MPNet
        ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),  # ALBERT
        ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),  # DistilBERT
        ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),  # ELECTRA
    )
    for scale, shift in (("weight", "bias"), ("gamma", "beta"))  # old checkpoints have the latter
]


def find_head(folder: Path) -> dict[str, str] | None:
    """{`MaskedLMHead`'s name: the checkpoint's} of the head in a folder's weights, or None."""
    tensors = tensors_in(folder).keys()
    return next((names for names in HEAD_NAMES if set(names.values()) <= tensors), None)


def head_names(config) -> dict[str, str]:
    """{`MaskedLMHead`'s name: the checkpoint's} of the head that a student's class has."""
    return HEAD_NAMES[{"bert": 0, "electra": 8}[config.model_type]]


def eps_and_activation(config) -> tuple[float, str]:
    """A family's layer norm epsilon (DistilBERT's is fixed) and activation, under whatever names."""
    names = ("hidden_act", "activation", "hidden_activation", "activation_function")
    activation = next((found for name in names if (found := getattr(config, name, None))), "gelu")
    return getattr(config, "layer_norm_eps", None) or getattr(config, "norm_eps", 1e-12), activation


def new_head(backbone: nn.Module) -> MaskedLMHead:
    """A random masked-LM head over a model's table."""
    config, table = backbone.config, backbone.get_input_embeddings()
    return MaskedLMHead(config.hidden_size, table.embedding_dim, table.num_embeddings, *eps_and_activation(config))


def load_head(folder: Path, backbone: nn.Module) -> MaskedLMHead | None:
    """The masked-LM head in a folder's weights, in float32, or None."""
    if (names := find_head(folder)) is None:
        return None
    head = new_head(backbone)
    head.load_state_dict(read_tensors(folder, names))
    if names["bias"] in ("lm_head.bias", "generator_lm_head.bias"):
        head.activation = ACT2FN["gelu"]  # RoBERTa's and ELECTRA's have it whatever the config says
    return head


def save_head(folder: Path, head: MaskedLMHead) -> None:
    """Writes a head under BERT's names, as `load_head` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {HEAD_NAMES[0][name]: value.cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
