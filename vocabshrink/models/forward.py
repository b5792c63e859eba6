"""A pass through a backbone, and the pooling of what it gives: pieces into units, pieces into a sentence.

Losses of attention need each layer's queries, keys and values. They are read by hooks on the layers that compute them,
so that transformers' fast attention stays in use, which never shows its scores. This costs a table of where each family
has these layers, and leaves out families whose scores are more than Q K^T / sqrt(d).

Student and teacher cut words into different pieces. Whatever is compared between them is pooled into units (words)
first; the sums are float32 under autocast too.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.pieces import Pieces


@dataclass
class Pass:
    """What a backbone's pass gave. hidden: all hidden states [B, T, D], embedding output first, or the last one only.

    queries, keys, values: for each layer [B, T, D], all heads side by side, in the dtype of the pass (bfloat16 under
    autocast); index 0 is layer 1. None where not asked for.
    """

    hidden: tuple[Tensor, ...]
    queries: tuple[Tensor, ...] | None = None
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None


# Where each family keeps the layers that give queries, keys and values. Only families whose scores are Q K^T / sqrt(d)
# and nothing else: MPNet and DeBERTa add relative positions, ModernBERT rotates.
BERT_PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value")
PROJECTIONS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), BERT_PROJECTIONS) | {
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "albert": ("attention.query", "attention.key", "attention.value"),
}


def check_attention(config) -> tuple[str, ...]:
    """Where the family's layers compute queries, keys and values. Raises InputError where that is not known."""
    if config.model_type not in PROJECTIONS or getattr(config, "inner_group_num", 1) != 1:  # ALBERT's layers in a layer
        remedy = f"choose losses of hidden states, or a model among {', '.join(PROJECTIONS)}"
        raise InputError(f"{config.model_type}: no loss can read this family's attention: {remedy}")
    return PROJECTIONS[config.model_type]


def first_position(config) -> int:
    """Row of the first position: RoBERTa-like models begin to count behind the padding id."""
    return config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0


@contextmanager
def hooked(modules: Iterable[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """A list that fills with each module's output, or its first input, in the order in which they run."""
    found: list[Tensor] = []

    def keep(_, taken, given) -> None:
        found.append(taken[0] if inputs else given)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


CHUNKS = 4  # of a batch whose sequences differ much in length
# and that has so many positions: 32 short sentences take a quarter longer in four small passes than padded in one
LEAST_POSITIONS = 4096


def run_backbone(
    backbone: nn.Module, side: Pieces, *, embeddings: Tensor | None = None, layers: bool = False, qkv: bool = False
) -> Pass:
    """A pass over ids, or over embeddings [B, T, D_E] made outside: all hidden states (`layers`) or the last only.

    Token types are read by models that tell two types apart. A batch of near sentences has halves beside wholes: where
    a fifth or more of a large one would be padding, it is run in chunks of similar length, which a test holds equal to
    the plain pass. Raises InputError: see `check_attention`.
    """
    size, width = side.ids.shape
    places = check_attention(backbone.config) if qkv else ()
    named = list(backbone.named_modules())
    projections = [[module for name, module in named if name.endswith(f".{place}")] for place in places]
    tensors = {"input_ids": side.ids} if embeddings is None else {"inputs_embeds": embeddings}
    if side.token_types is not None and getattr(backbone.config, "type_vocab_size", 0) > 1:
        tensors["token_type_ids"] = side.token_types
    tensors["attention_mask"] = side.attention_mask

    def forward(rows, columns: int) -> Pass:
        inputs = {name: tensor[rows, :columns] for name, tensor in tensors.items()}
        with ExitStack() as stack:
            found = [stack.enter_context(hooked(modules)) for modules in projections]
            output = backbone(**inputs, output_hidden_states=layers)
        return Pass(output.hidden_states if layers else (output.last_hidden_state,), *map(tuple, found))

    lengths = side.attention_mask.sum(1)
    if size < 2 * CHUNKS or size * width < LEAST_POSITIONS or lengths.sum() > 0.8 * size * width:
        return forward(slice(None), width)
    order = lengths.argsort(stable=True)
    parts = [forward(rows, int(lengths[rows[-1]])) for rows in order.chunk(CHUNKS)]
    back = order.argsort()

    def join(states: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([F.pad(state, (0, 0, 0, width - state.shape[1])) for state in states])[back]

    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Pass(*(None if field[0] is None else tuple(map(join, zip(*field, strict=True))) for field in fields))


def pool_sentence(hidden: Tensor, attention_mask: Tensor, pooling: str, normalize: bool) -> Tensor:
    """[B, T, D], [B, T] -> sentence embedding [B, D] in float32."""
    hidden = hidden.float()
    if pooling == "cls":
        vector = hidden[:, 0]
    else:
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        vector = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
    return F.normalize(vector, dim=-1) if normalize else vector


def pool_units(hidden: Tensor, units: Tensor, count: int, *, total: bool = False) -> Tensor:
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


def pool_attention(maps: Tensor, units: Tensor, count: int, *, scores: bool = False) -> Tensor:
    """Attention between pieces as attention between units. maps [B, h, T, T], units [B, T] -> [B, h, U, U] float32.

    What a unit attends with is the mean over its pieces. What it attends to is, for distributions, the sum over the
    target's pieces, so that rows still sum to one; for `scores` (before the softmax) their mean.
    """
    heads = maps.shape[1]

    def pool(maps, total):  # [B, h, T, X] -> [B, h, X, U]
        pooled = pool_units(maps.transpose(1, 2).flatten(2), units, count, total=total)
        return pooled.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)

    return pool(pool(maps, False), not scores)
