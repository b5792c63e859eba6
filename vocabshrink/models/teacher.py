"""The teacher: any encoder with an embedding table that AutoModel loads, and a masked-LM head of one form.

The head of every family of the BERT line is dense, activation, layer norm, then the embedding table as decoder. So
one module, `MaskedLMHead`, serves them all: taken from the checkpoint where it has one, trained by the `masked_lm_head`
stage where it has none, and asked for the logits of either vocabulary, because the table is an argument.

Nothing in the teacher's code changes for mixed input: pieces of both vocabularies are embedded outside and enter as
`inputs_embeds`.
"""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from tokenizer_build.errors import InputError
from tokenizer_build.tokenizer import load_tokenizer

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class MaskedLMHead(nn.Module):
    """Dense, activation, layer norm, then logits against an embedding table (Devlin et al. 2019, appendix)."""

    def __init__(
        self, hidden_size: int, embedding_size: int, vocab_size: int, eps: float = 1e-12, activation: str = "gelu"
    ):
        super().__init__()
        self.activation = ACT2FN[activation]
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, embedding]"""
        return self.norm(self.activation(self.dense(hidden)))

    def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[n, hidden], [V, embedding] -> logits [n, V]"""
        return F.linear(self.transform(hidden), table, self.bias)


# Where each family keeps dense, norm and decoder bias in its checkpoint.
HEADS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),  # BERT
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),  # RoBERTa, XLM-R
    ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),  # ALBERT
    ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),  # DistilBERT
)


def eps_and_activation(config) -> tuple[float, str]:
    """A family's layer norm epsilon and activation. DistilBERT fixes the one and has its own name for the other."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
    return getattr(config, "layer_norm_eps", 1e-12), activation


@dataclass
class Teacher:
    """A loaded teacher. backbone gives hidden states; head is None where the checkpoint has none."""

    backbone: nn.Module
    head: MaskedLMHead | None
    folder: Path
    pooling: str
    normalize: bool

    @property
    def config(self):
        return self.backbone.config

    @property
    def table(self) -> nn.Embedding:
        return self.backbone.get_input_embeddings()


def resolve_model(model: str) -> Path:
    """The folder of a model: a local folder, `package:NAME/SUBFOLDER`, or a hub name (the only use of the network)."""
    if model.startswith("package:"):
        name, _, inner = model.removeprefix("package:").partition("/")
        try:
            spec = importlib.util.find_spec(name)
        except (ModuleNotFoundError, ValueError):  # of a dotted name's parent, or no name
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"teacher.model {model}: package {name} is not installed: pip install {name.replace('_', '-')}"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / inner
    else:
        folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~", "package:")) or model.count("/") > 1:
        raise InputError(f"teacher.model {model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"teacher.model {model}: neither a local folder nor to be had from the hub: {reason}"
        ) from None


def load_config(folder: Path):
    """A model folder's config. Raises InputError for a model that is no encoder."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder"
        raise InputError(f"{folder}: {config.model_type} is {kind}: only encoders can be teachers")
    return config


def parameter_names(config) -> set[str]:
    """The names of a model's parameters, from its config alone: nothing is allocated."""
    with torch.device("meta"):
        return {name for name, _ in AutoModel.from_config(config).named_parameters()}


def check_folder(folder: Path, sha256: str | None = None) -> None:
    """Refuses a teacher folder without weights or tokenizer, with another hash, or with sizes that disagree."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a model folder: config.json is missing")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{folder}: no model.safetensors: convert the weights with save_pretrained (pickles are not read)"
        )
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json: save the fast tokenizer there with save_pretrained")
    if sha256 and (found := weights_sha256(folder)) != sha256:
        raise InputError(f"{folder}: the weights' sha256 is {found}, teacher.sha256 is {sha256}: not the same weights")
    vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    pieces = load_tokenizer(folder).get_vocab_size()
    if vocab_size is not None and pieces > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {pieces} pieces, the model's table only {vocab_size} rows: "
            "tokenizer.json belongs to another model"
        )


def weights_sha256(folder: Path) -> str:
    """The hash of all weights: of model.safetensors, or of its shards' bytes one after the other, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def load_teacher(model: str, *, pooling: str = "mean", normalize: bool = True, sha256: str | None = None) -> Teacher:
    """Loads backbone and, where the checkpoint has one, masked-LM head; dropout is off from here on.

    Raises:
        InputError: see `check_folder`; a model without an embedding table of pieces.
    """
    folder = resolve_model(model)
    check_folder(folder, sha256)
    load_config(folder)
    backbone = load_model(AutoModel, folder)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # next-sentence head: no one reads it, and it would be trained as dead weight
    return Teacher(backbone.eval(), load_head(folder, backbone), folder, pooling, normalize)


def read_backbone(folder: Path) -> nn.Module:
    """A saved body, in float32 and eval mode."""
    return load_model(AutoModel, folder).eval()


def load_model(loader, folder: Path, **options):
    """`loader.from_pretrained` of a folder: in float32 whatever the file holds, from safetensors alone, running none of
    the folder's code and asking nobody. Every model of this project is loaded here.

    Raises:
        InputError: transformers cannot load it.
    """
    try:
        return loader.from_pretrained(
            folder,
            **{"dtype": torch.float32, "attn_implementation": attention_kind()} | options,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None


def attention_kind() -> str:
    """Of transformers' implementations, the one that trains fastest: measured, eager is 1.6x on a CPU in bf16."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def head_names(keys: set[str]) -> dict[str, str] | None:
    """{`MaskedLMHead`'s name: the checkpoint's} of the head among a checkpoint's tensors, or None."""
    for dense, norm, bias in HEADS:
        wanted = [f"{dense}.weight", f"{dense}.bias", f"{norm}.weight", f"{norm}.bias", bias]
        legacy = [
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for name in wanted
        ]
        for names in (wanted, legacy):
            if set(names) <= keys:
                return dict(zip(("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias"), names, strict=True))
    return None


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """{tensor: the safetensors file of the folder that holds it}"""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def has_head(folder: Path) -> bool:
    """Whether the checkpoint holds a masked-LM head of the one form."""
    return head_names(set(files_of_tensors(folder))) is not None


def load_head(folder: Path, backbone: nn.Module) -> MaskedLMHead | None:
    """The checkpoint's masked-LM head, in float32, or None."""
    files = files_of_tensors(folder)
    names = head_names(set(files))
    if names is None:
        return None
    tensors = {}
    for key, name in names.items():
        with safe_open(files[name], framework="pt") as file:
            tensors[key] = file.get_tensor(name).float()
    eps, activation = eps_and_activation(backbone.config)
    if names["bias"] == "lm_head.bias":
        activation = "gelu"  # RoBERTa's head has it whatever the config says
    table = backbone.get_input_embeddings().weight
    head = MaskedLMHead(tensors["dense.weight"].shape[1], table.shape[1], table.shape[0], eps, activation)
    head.load_state_dict(tensors)
    return head


def new_head(teacher: Teacher) -> MaskedLMHead:
    """A random masked-LM head over the teacher's table."""
    table, config = teacher.table, teacher.config
    return MaskedLMHead(config.hidden_size, table.embedding_dim, table.num_embeddings, *eps_and_activation(config))


def save_head(folder: Path, head: MaskedLMHead) -> None:
    """Writes a head under BERT's names, as `load_head` reads it."""
    dense, norm, bias = HEADS[0]
    names = {"dense": dense, "norm": norm, "bias": bias}
    tensors = {}
    for key, value in head.state_dict().items():
        part, _, kind = key.partition(".")
        tensors[f"{names[part]}.{kind}" if kind else names[part]] = value.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
