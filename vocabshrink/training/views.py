"""What the losses of one step see: each model's pass over its side of the batch, and what is pooled from it.
A `View` makes of one model's hidden states, queries, keys and values what can be compared across vocabularies: means
over units (batches.py), products of such means, sentence embeddings; each when a loss first asks for it, once, and in
float32. Distributions of attention alone cost maps between pieces, [B, h, T, T] a layer."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Pieces
from vocabshrink.models.forward import Pass, pool_attention, pool_sentence, pool_units
from vocabshrink.run.layer_map import Pairs

Direction = Literal["up", "down"]
Units = Literal["all", "cls"]
Layers = tuple[int, ...]  # 1-based, 0 is the embedding output; of several layers the mean is taken
Kind = Literal["queries", "keys", "values"]


def once(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps a method's results with the instance (functools.cache would keep the instance too), by their arguments."""

    def kept(self, *arguments) -> Tensor:
        key = method.__name__, *arguments
        if key not in self.made:
            self.made[key] = method(self, *arguments)
        return self.made[key]

    return kept


def mean_of(layers: Iterable[Tensor]) -> Tensor:
    layers = list(layers)
    return layers[0] if len(layers) == 1 else torch.stack(layers).mean(0)


def products(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """[B, U, D] twice, each split into heads of width d -> their products over sqrt(d), [B, heads, U, U]."""
    left, right = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (left, right))
    return left @ right.mT / math.sqrt(left.shape[-1])


@dataclass
class View:
    """One model's pass over one side of the batch. unit_count: U. logits: a task's where they were stored, [B, C], or
    [B, T, C] of a token task. predict: last hidden states -> the model's own logits, [n, D] -> [n, V], or a task's."""

    side: Pieces | None
    passed: Pass | None
    pooling: str = "mean"
    normalize: bool = False
    unit_count: int = 0
    heads: int = 1
    logits: Tensor | None = None
    predict: Callable[[Tensor], Tensor] | None = None
    made: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        return self.passed.hidden  # [B, T, D] each, in the dtype of the pass

    def detached(self) -> "View":
        """The same view without a gradient."""
        parts = (part and tuple(tensor.detach() for tensor in part) for part in vars(self.passed).values())
        return replace(self, passed=Pass(*parts))

    @once
    def _units(self, kind: str, layer: int) -> Tensor:
        """A layer's hidden states, queries, keys or values (fields of `Pass`), as means over units [B, U, D]."""
        states = getattr(self.passed, kind)[layer if kind == "hidden" else layer - 1]
        return pool_units(states, self.side.units, self.unit_count)

    @once
    def _products(self, left: Kind, right: Kind, heads: int, layer: int) -> Tensor:
        return products(self._units(left, layer), self._units(right, layer), heads)

    @once
    def _maps(self, layer: int) -> Tensor:
        queries, keys = (part[layer - 1].float() for part in (self.passed.queries, self.passed.keys))
        padding = self.side.attention_mask[:, None, None] == 0
        maps = products(queries, keys, self.heads).masked_fill(padding, -math.inf).softmax(-1)
        return pool_attention(maps, self.side.units, self.unit_count)

    def states(self, layers: Layers) -> Tensor:
        """Hidden states of units, [B, U, D]."""
        return mean_of(self._units("hidden", layer) for layer in layers)

    def scores(self, layers: Layers) -> Tensor:
        """Attention scores between units before the softmax, Q K^T / sqrt(d), [B, h, U, U]."""
        return mean_of(self._products("queries", "keys", self.heads, layer) for layer in layers)

    def relations(self, layers: Layers, kind: Kind, heads: int) -> Tensor:
        """X X^T / sqrt(D / heads) between units before the softmax, [B, heads, U, U]; X is `kind`, split anew."""
        width = getattr(self.passed, kind)[0].shape[-1]
        if width % heads:
            raise InputError(f"losses: {heads} relation heads do not divide a width of {width}: set heads of the loss")
        return mean_of(self._products(kind, kind, heads, layer) for layer in layers)

    def attention(self, layers: Layers) -> Tensor:
        """Attention distributions between units, [B, h, U, U]: a unit is attended to as much as all its pieces."""
        return mean_of(map(self._maps, layers))

    @cached_property
    def sentence(self) -> Tensor:
        return pool_sentence(self.hidden[-1], self.side.attention_mask, self.pooling, self.normalize)

    @cached_property
    def task_logits(self) -> Tensor:
        """A task's logits, [B, C], or [n, C] at the labelled pieces, which are as many on every side."""
        logits = self.predict(self.hidden[-1]) if self.logits is None else self.logits
        return (logits.flatten(0, 1).index_select(0, self.side.labelled) if logits.ndim == 3 else logits).float()

    def at(self, places: Tensor) -> Tensor:
        """Last hidden states in float32 at places of the flattened side, [n] -> [n, D]."""
        return self.hidden[-1].flatten(0, 1).index_select(0, places).float()


@dataclass
class Forward:
    """What one step saw. student: the student on its pieces; in match mode, the teacher on mixed input takes its seat.
    teacher: the target: the teacher on its own pieces or, in joint training, on mixed ones, without a gradient.
    up [D_S -> D_T] and down [D_T -> D_S]: shared projections of hidden states. shared [V_S]: the teacher's id of the
    same piece, or -1. spelling [V_T, K]: student pieces that spell a teacher piece, then -1. bank: stored sentence
    vectors of unit length, the teachers' [K, D] and the same in the student's width [K, D_S], where they are used.
    dimensions: widths below the student's at which its sentence vectors are to be good when cut.
    given: loss name -> function giving it, of losses that read more than views."""

    batch: Batch
    pairs: Pairs
    up: nn.Module
    down: nn.Module
    student: View | None = None
    teacher: View | None = None
    shared: Tensor | None = None
    spelling: Tensor | None = None
    bank: tuple[Tensor, Tensor] | None = None
    dimensions: tuple[int, ...] = ()
    given: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    made: dict = field(default_factory=dict, init=False, repr=False)

    @once
    def _states(self, side: str, layers: Layers, direction: Direction, units: Units) -> Tensor:
        found = getattr(self, side).states(layers)
        found = found[:, 0] if units == "cls" else found.flatten(0, 1).index_select(0, self.batch.counted)
        moved = {("student", "up"): self.up, ("teacher", "down"): self.down}.get((side, direction))
        return moved(found) if moved else found

    def aligned(self, m: int, block: Layers, direction: Direction, units: Units = "all") -> tuple[Tensor, Tensor]:
        """Both models' states of a pair of layers, one moved to the other's width: [n, D] each, or [B, D] of [CLS]."""
        return self._states("student", (m,), direction, units), self._states("teacher", block, direction, units)
