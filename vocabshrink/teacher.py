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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from tokenizer_build.errors import InputError
from vocabshrink.batches import Pieces

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
    if sha256 and (found := file_sha256(weights[0])) != sha256:
        raise InputError(
            f"{weights[0]}: sha256 is {found}, the recipe's teacher.sha256 is {sha256}: not the same weights"
        )
    vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    if vocab_size is not None and pieces > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {pieces} pieces, the model's table only {vocab_size} rows: "
            "tokenizer.json belongs to another model"
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_teacher(model: str, *, pooling: str = "mean", normalize: bool = True, sha256: str | None = None) -> Teacher:
    """Loads backbone and, where the checkpoint has one, masked-LM head; dropout is off from here on.

    Raises:
        InputError: see `check_folder`; a model without an embedding table of pieces.
    """
    folder = resolve_model(model)
    check_folder(folder, sha256)
    try:
        config = AutoConfig.from_pretrained(folder)
        backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention_kind())
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    if config.is_encoder_decoder:
        raise InputError(f"{folder}: {config.model_type} is an encoder-decoder: only encoders can be teachers")
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # next-sentence head: no one reads it, and it would be trained as dead weight
    return Teacher(backbone.eval(), load_head(folder, backbone), folder, pooling, normalize)


def attention_kind() -> str:
    """Of transformers' implementations, the one that trains fastest: measured, eager is 1.6x on a CPU in bf16."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def load_head(folder: Path, backbone: nn.Module) -> MaskedLMHead | None:
    """The checkpoint's masked-LM head, or None."""
    tensors = {}
    eps, activation = eps_and_activation(backbone.config)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for dense, norm, bias in HEADS:
                wanted = [f"{dense}.weight", f"{dense}.bias", f"{norm}.weight", f"{norm}.bias", bias]
                legacy = [
                    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                    for name in wanted
                ]
                for names in (wanted, legacy):
                    if set(names) <= set(file.keys()):
                        keys = ["dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias"]
                        tensors = {key: file.get_tensor(name).float() for key, name in zip(keys, names, strict=True)}
                        if dense == "lm_head.dense":
                            activation = "gelu"  # RoBERTa's head has it whatever the config says
    if not tensors:
        return None
    table = backbone.get_input_embeddings().weight
    head = MaskedLMHead(tensors["dense.weight"].shape[1], table.shape[1], table.shape[0], eps, activation)
    head.load_state_dict(tensors)
    return head


@dataclass
class Pass:
    """What a backbone's pass gave. hidden: all hidden states [B, T, D], embedding output first, or the last one only.

    queries, keys, values: for each layer [B, T, D], all heads side by side, in the dtype of the pass (bfloat16 under
    autocast); index 0 is layer 1. None where not asked for.
    """

    hidden: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...] | None = None
    keys: tuple[torch.Tensor, ...] | None = None
    values: tuple[torch.Tensor, ...] | None = None


BERT_PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
# Where each family keeps the layers that give queries, keys and values. Only families whose scores are Q K^T / sqrt(d)
# and nothing else: MPNet and DeBERTa add relative positions, ModernBERT rotates.
PROJECTIONS = {
    "bert": BERT_PROJECTIONS,
    "roberta": BERT_PROJECTIONS,
    "xlm-roberta": BERT_PROJECTIONS,
    "camembert": BERT_PROJECTIONS,
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "albert": ("attention.query", "attention.key", "attention.value"),
}


@contextmanager
def captured(backbone: nn.Module) -> Iterator[tuple[list[torch.Tensor], ...]]:
    """Lists that fill with each layer's queries, keys and values while the backbone runs: sdpa stays in use."""
    family = backbone.config.model_type
    if family not in PROJECTIONS or getattr(backbone.config, "inner_group_num", 1) != 1:  # ALBERT's layers in a layer
        raise InputError(
            f"{family}: where its attention is computed is not known, so that no loss can read it: choose losses of "
            f"hidden states, or a model among {', '.join(PROJECTIONS)}"
        )
    found = ([], [], [])
    handles = [
        module.register_forward_hook(lambda module, inputs, output, into=into: into.append(output))
        for name, module in backbone.named_modules()
        for into, place in zip(found, PROJECTIONS[family], strict=True)
        if name.endswith("." + place)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


CHUNKS = 4  # of a batch whose sequences differ much in length
# and that has so many positions: 32 short sentences take a quarter longer in four small passes than padded in one
LEAST_POSITIONS = 4096


def run_backbone(
    backbone: nn.Module,
    side: Pieces,
    *,
    embeddings: torch.Tensor | None = None,
    layers: bool = False,
    qkv: bool = False,
) -> Pass:
    """A pass over ids, or over embeddings [B, T, D_E] made outside: all hidden states (`layers`) or the last only.

    Token types are read by models that tell two types apart. A batch of near sentences has halves beside wholes: where
    a fifth or more of a large one would be padding, it is run in chunks of similar length, which a test holds equal to
    the plain pass.

    Raises:
        InputError: `qkv` of an architecture whose attention is not known.
    """
    lengths = side.attention_mask.sum(1)
    size, width = side.ids.shape
    typed = side.token_types is not None and getattr(backbone.config, "type_vocab_size", 0) > 1

    def forward(rows, columns: int) -> Pass:
        inputs = (
            {"input_ids": side.ids[rows, :columns]}
            if embeddings is None
            else {"inputs_embeds": embeddings[rows, :columns]}
        )
        if typed:
            inputs["token_type_ids"] = side.token_types[rows, :columns]
        with captured(backbone) if qkv else nullcontext(()) as found:
            output = backbone(**inputs, attention_mask=side.attention_mask[rows, :columns], output_hidden_states=layers)
        return Pass(output.hidden_states if layers else (output.last_hidden_state,), *map(tuple, found))

    if size < 2 * CHUNKS or size * width < LEAST_POSITIONS or lengths.sum() > 0.8 * size * width:
        return forward(slice(None), width)
    order = lengths.argsort(stable=True)
    parts = [forward(rows, int(lengths[rows[-1]])) for rows in order.chunk(CHUNKS)]
    back = order.argsort()

    def join(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([F.pad(state, (0, 0, 0, width - state.shape[1])) for state in states])[back]

    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Pass(*(None if field[0] is None else tuple(map(join, zip(*field, strict=True))) for field in fields))


def pool_sentence(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str, normalize: bool) -> torch.Tensor:
    """[B, T, D], [B, T] -> sentence embedding [B, D] in float32."""
    hidden = hidden.float()
    if pooling == "cls":
        vector = hidden[:, 0]
    else:
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        vector = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
    return F.normalize(vector, dim=-1) if normalize else vector


def pool_units(hidden: torch.Tensor, units: torch.Tensor, count: int, *, total: bool = False) -> torch.Tensor:
    """Mean (`total`: sum) of each unit's pieces; zero where it has none.

    hidden [B, T, D], units [B, T] (-1 at padding), count U -> [B, U, D] float32.
    """
    size, _, width = hidden.shape
    slot = torch.where(units >= 0, units, count) + torch.arange(size, device=units.device).unsqueeze(1) * (count + 1)
    pooled = torch.zeros(size * (count + 1), width, device=hidden.device)
    pooled = pooled.index_add(0, slot.flatten(), hidden.float().flatten(0, 1))
    if not total:
        pooled = pooled / torch.bincount(slot.flatten(), minlength=len(pooled)).clamp_min(1).unsqueeze(1)
    return pooled.view(size, count + 1, width)[:, :count]


def pool_attention(maps: torch.Tensor, units: torch.Tensor, count: int, *, scores: bool = False) -> torch.Tensor:
    """Attention between pieces as attention between units. maps [B, h, T, T], units [B, T] -> [B, h, U, U] float32.

    What a unit attends with is the mean over its pieces. What it attends to is, for distributions, the sum over the
    target's pieces, so that rows still sum to one; for `scores` (before the softmax) their mean.
    """
    heads = maps.shape[1]

    def pool(maps, total):  # [B, h, T, X] -> [B, h, X, U]
        pooled = pool_units(maps.transpose(1, 2).flatten(2), units, count, total=total)
        return pooled.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)

    return pool(pool(maps, False), not scores)
