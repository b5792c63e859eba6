"""What the losses of one step see: each model's pass over its side of the batch, and what is pooled from it.

A `View` is one model on its own pieces, and makes of its hidden states, queries, keys and values what can be compared
across vocabularies: means over units (batches.py), products of such means, sentence embeddings; each when a loss first
asks for it, and once however many losses read it. Everything comes out in float32; only the passes themselves may be in
bfloat16. Distributions of attention alone cost maps between pieces, [B, h, T, T] a layer.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import Pass, pool_attention, pool_sentence, pool_units
from vocabshrink.run.layer_map import Pairs

Direction = Literal["up", "down"]
Units = Literal["all", "cls"]
Layers = tuple[int, ...]  # 1-based, 0 is the embedding output; of several layers the mean is taken
Kind = Literal["queries", "keys", "values"]


class Cache(dict):
    """Values that are made at most once."""

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        return self[key] if key in self else self.setdefault(key, make())


class Masked(NamedTuple):
    """The n masked pieces of a side: last hidden states [n, D], true pieces [n], their units numbered through the batch
    [n], and how many of them each unit has [B U]."""

    states: Tensor
    labels: Tensor
    units: Tensor
    counts: Tensor


@dataclass
class View:
    """One model's pass over one side of the batch.

    unit_count: U. heads: of the model's attention. logits: a task's where they were stored, [B, C], or [B, T, C] of a
    token task. predict: last hidden states -> the model's own logits: of pieces [n, D] -> [n, V], or a task's.
    """

    side: Pieces | None
    passed: Pass | None
    pooling: str = "mean"
    normalize: bool = False
    unit_count: int = 0
    heads: int = 1
    logits: Tensor | None = None
    predict: Callable[[Tensor], Tensor] | None = None
    _cache: Cache = field(default_factory=Cache, init=False, repr=False)

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        """[B, T, D] each, in the dtype of the pass."""
        return self.passed.hidden

    def detached(self) -> "View":
        """The same view as a target: no gradient goes back through it."""
        parts = (part and tuple(tensor.detach() for tensor in part) for part in vars(self.passed).values())
        return replace(self, passed=Pass(*parts))

    def _units(self, kind: str, layer: int) -> Tensor:
        """Hidden states, queries, keys or values (fields of `Pass`) of a layer, as means over units [B, U, D]."""
        index = layer if kind == "hidden" else layer - 1
        states = getattr(self.passed, kind)[index]
        return self._cache.once((kind, layer), lambda: pool_units(states, self.side.units, self.unit_count))

    def states(self, layers: Layers) -> Tensor:
        """Hidden states of units, [B, U, D]."""
        return mean_of([self._units("hidden", layer) for layer in layers])

    def _products(self, left: Kind, right: Kind, layers: Layers, heads: int) -> Tensor:
        def make(layer: int) -> Tensor:
            return products(self._units(left, layer), self._units(right, layer), heads)

        return mean_of([self._cache.once((left, right, heads, layer), partial(make, layer)) for layer in layers])

    def scores(self, layers: Layers) -> Tensor:
        """Attention scores between units before the softmax, Q K^T / sqrt(d), [B, h, U, U]."""
        return self._products("queries", "keys", layers, self.heads)

    def relations(self, layers: Layers, kind: Kind, heads: int) -> Tensor:
        """X X^T / sqrt(D / heads) between units before the softmax, [B, heads, U, U]; X is `kind`, split anew.

        Raises InputError if the heads do not divide the width.
        """
        width = getattr(self.passed, kind)[0].shape[-1]
        if width % heads:
            raise InputError(f"losses: {heads} relation heads do not divide a width of {width}: set heads of the loss")
        return self._products(kind, kind, layers, heads)

    def attention(self, layers: Layers) -> Tensor:
        """Attention distributions between units, [B, h, U, U]: a unit is attended to as much as all its pieces."""

        def make(layer: int) -> Tensor:
            queries, keys = (part[layer - 1].float() for part in (self.passed.queries, self.passed.keys))
            padding = self.side.attention_mask[:, None, None] == 0
            maps = products(queries, keys, self.heads).masked_fill(padding, -math.inf).softmax(-1)
            return pool_attention(maps, self.side.units, self.unit_count)

        return mean_of([self._cache.once(("attention", layer), partial(make, layer)) for layer in layers])

    @cached_property
    def sentence(self) -> Tensor:
        """[B, D]"""
        return pool_sentence(self.hidden[-1], self.side.attention_mask, self.pooling, self.normalize)

    @cached_property
    def task_logits(self) -> Tensor:
        """A task's logits, [B, C], or [n, C] at the labelled pieces, which are as many on every side."""
        logits = self.predict(self.hidden[-1]) if self.logits is None else self.logits
        return (logits[self.side.labels >= 0] if logits.ndim == 3 else logits).float()

    @cached_property
    def masked(self) -> Masked:
        where = self.side.labels >= 0
        first = torch.arange(len(where), device=where.device).unsqueeze(1) * self.unit_count
        units = (self.side.units + first)[where]
        counts = torch.bincount(units, minlength=len(where) * self.unit_count)
        return Masked(self.hidden[-1][where].float(), self.side.labels[where], units, counts)


@dataclass
class Forward:
    """What one step saw. A view that a stage does not run is None.

    student: the student on its pieces; in match mode, the teacher on mixed input takes its seat. teacher: the target:
    the teacher on its own pieces or, in joint training, on mixed ones; its view carries no gradient.
    up [D_S -> D_T] and down [D_T -> D_S]: shared projections of hidden states. shared [V_S]: the teacher's id of the
    same piece, or -1. spelling [V_T, K]: student pieces that spell a teacher piece, then -1. given: loss name ->
    function giving it, of losses that read more than views.
    """

    batch: Batch
    pairs: Pairs
    up: nn.Module
    down: nn.Module
    student: View | None = None
    teacher: View | None = None
    shared: Tensor | None = None
    spelling: Tensor | None = None
    given: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    _cache: Cache = field(default_factory=Cache, init=False, repr=False)

    def aligned(self, m: int, block: Layers, direction: Direction, units: Units = "all") -> tuple[Tensor, Tensor]:
        """States of a pair of layers in one width, the student's brought up or the teacher's down: [n, D] twice; of all
        units that count or, for `units` "cls", of [CLS] alone, [B, D]."""

        def of(side: str, layers: Layers, project: nn.Module) -> Tensor:
            def make() -> Tensor:
                found = getattr(self, side).states(layers)
                return project(found[:, 0] if units == "cls" else found[self.batch.unit_mask])

            return self._cache.once((side, layers, direction, units), make)

        left, right = (self.up, nn.Identity()) if direction == "up" else (nn.Identity(), self.down)
        return of("student", (m,), left), of("teacher", block, right)


def products(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """[B, U, D] twice, each split into heads of width d -> their products over sqrt(d), [B, heads, U, U]."""
    left, right = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (left, right))
    return left @ right.mT / math.sqrt(left.shape[-1])


def mean_of(layers: list[Tensor]) -> Tensor:
    return layers[0] if len(layers) == 1 else torch.stack(layers).mean(0)
