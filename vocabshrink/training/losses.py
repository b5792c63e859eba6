"""Losses: pure functions of what one step saw, chosen and weighted by the recipe.
Every loss is `f(forward, **arguments) -> scalar`, and its signature is the schema of its arguments. It is zero at
agreement, ignores padding, and is computed in float32: in bfloat16, similarities near 1 are 0.004 apart. Teacher and
student are compared by units (see batches.py), of which a step has a `View` each: a unit's hidden state is the mean
over its pieces, and so are its queries, keys and values. A score is a product, so its mean over the pieces of two units
is the product of two means. Only attention distributions are pooled as maps, [B, h, T, T] a layer, since their softmax
is over pieces. Where units are pieces, each loss is the papers' own. Shapes: B sequences, T pieces, U units, D width
(D_S student, D_T teacher), h heads, n units or pieces that count, V_S and V_T pieces of the vocabularies, C classes."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, ValidationError, create_model
from scipy.optimize import linprog
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Pieces
from vocabshrink.models.forward import Pass, pool_attention, pool_sentence, pool_units
from vocabshrink.models.teacher import MaskedLMHead
from vocabshrink.run.layer_map import Pairs, SoftPairs
from vocabshrink.run.recipe import TrainingSection, explain

Direction = Literal["up", "down"]
Units = Literal["all", "cls"]
Layers = tuple[int, ...]  # 1-based, 0 is the embedding output; of several layers the mean is taken
Kind = Literal["queries", "keys", "values"]
Distance = Callable[[Tensor, Tensor], Tensor]  # student, teacher -> scalar
Positive, Count = Annotated[float, Field(gt=0)], Annotated[int, Field(gt=0)]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # of the arguments that a recipe gives


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
    spread: one minus the mean cosine of the teachers' bank, 1 without one; what its losses measure differences by.
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
    spread: Tensor | float = 1.0
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


def mean(values: Tensor) -> Tensor:
    """The mean of all elements, zero where there are none, as in a batch without a masked word."""
    return values.sum() / max(values.numel(), 1)


def mean_squares(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).pow(2).mean()


def one_minus_cosine(left: Tensor, right: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(left, right, dim=-1)).mean()


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student) of softmax(logits / T), [..., C] twice -> [...] (Hinton et al. 2015, section 2)."""
    student, teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def kl_between_units(forward: Forward, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of rows of logits [B, h, U, U], mean over heads and units that count, of these alone."""
    counts = forward.batch.unit_mask
    # finite, since infinity minus infinity is not a number; the softmax makes it exactly zero
    lowest = torch.finfo(torch.float32).min / 2
    student, teacher = (logits.masked_fill(~counts[:, None, None], lowest) for logits in (student, teacher))
    return kl(student, teacher).mean(1).flatten().index_select(0, forward.batch.counted).mean()


def transport(costs: Tensor) -> Tensor:
    """The cheapest flow [M, N] between M and N layers of equal weight, by linear programming, for which a GPU waits."""
    rows, columns = costs.shape
    constraints = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    weights = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    prices = np.nan_to_num(costs.detach().double().cpu().numpy())  # the loop refuses a loss that is not finite
    flow = linprog(prices.ravel(), A_eq=constraints, b_eq=weights, method="highs").x
    return torch.as_tensor(flow, dtype=costs.dtype, device=costs.device).view(rows, columns)


def over_layers(forward: Forward, cost: Callable[[int, Layers], Tensor], *, attention: bool = False) -> Tensor:
    """The mean of cost(m, block) over the map's pairs; under the map `emd`, the cost of the cheapest transport
    (BERT-EMD, Li et al. 2020, section 3). attention: leaves out pairs with layer 0, which has none."""
    pairs = [(m, block) for m, block in forward.pairs if not attention or (m and all(block))]
    if not pairs:
        raise InputError("layer_map: every pair in it has layer 0, where there is no attention: add a pair of layers")
    costs = torch.stack([cost(m, block) for m, block in pairs])
    if not isinstance(forward.pairs, SoftPairs):
        return costs.mean()
    costs = costs.view(len({m for m, _ in pairs}), -1)
    return (transport(costs) * costs).sum()


def places_by_vocabulary(batch: Batch, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Which of the teacher's labels each vocabulary has [n_k], in the combined numbering (k follows k - 1)."""
    side = batch.mixed or batch.teacher
    labels = side.labels.flatten()[side.labelled]
    vocabulary = torch.bucketize(labels, torch.tensor(sizes, device=labels.device).cumsum(0), right=True)
    return tuple((vocabulary == k).nonzero().squeeze(1) for k in range(len(sizes)))


def masked_lm_loss(batch: Batch, view: View, head: MaskedLMHead, tables: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Cross-entropy at masked pieces, one softmax per vocabulary: the one that segmented the word predicts it (Zhao et
    al. 2019, section 3.2). The view's labels are in the combined numbering; tables [V_k, D_E]; biases [V_k]."""
    states, labels = head.transform(view.at(view.side.labelled)), view.side.labels.flatten()[view.side.labelled]
    places = batch.once("teacher_masked_lm", places_by_vocabulary, [len(table) for table in tables])
    total, first = states.sum() * 0.0, 0
    for table, bias, mine in zip(tables, biases, places, strict=True):
        logits = F.linear(states.index_select(0, mine), table, bias)
        total = total + F.cross_entropy(logits, labels[mine] - first, reduction="sum")
        first += len(table)
    return total / max(len(labels), 1)


def student_masked_lm(forward: Forward) -> Tensor:
    """The student's masked-LM cross-entropy on its own vocabulary."""
    side = forward.student.side
    logits, labels = forward.student.predict(forward.student.at(side.labelled)), side.labels.flatten()[side.labelled]
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def teacher_masked_lm(forward: Forward) -> Tensor:
    """The teacher's masked-LM cross-entropy on mixed input, one softmax per vocabulary (Zhao et al. 2019)."""
    return forward.given["teacher_masked_lm"]()


def places_to_match(batch: Batch, shared: Tensor) -> tuple[Tensor, ...]:
    """Where units that are the same one masked piece on both sides stand on the student's [n] and the teacher's [n];
    the pieces that both vocabularies have, by their ids [K] and [K]."""
    mine, my_units, my_counts = batch.student.masked(batch.unit_mask.shape[1])
    theirs, their_units, their_counts = batch.teacher.masked(batch.unit_mask.shape[1])
    alone = (my_counts == 1) & (their_counts == 1)
    # units rise along both sides, so the n-th chosen piece of one meets the n-th of the other
    my_chosen, their_chosen = alone[my_units], alone[their_units]
    same, columns = shared[mine[my_chosen]] == theirs[their_chosen], (shared >= 0).nonzero().squeeze(1)
    places = batch.student.labelled[my_chosen][same], batch.teacher.labelled[their_chosen][same]
    return *places, columns, shared[columns]


def masked_lm_match(forward: Forward, temperature: Positive = 1.0) -> Tensor:
    """T² KL(p_T || p_S) at masked pieces that both vocabularies write alike, over the pieces that both have
    (Kolesnikova et al. 2022, arXiv 2205.02340, "match"; with one vocabulary it is DistilBERT's L_ce)."""
    student, teacher = forward.student, forward.teacher
    mine, theirs, columns, their_columns = forward.batch.once("masked_lm_match", places_to_match, forward.shared)
    logits, target = student.predict(student.at(mine)), teacher.predict(teacher.at(theirs))
    return mean(kl(logits[:, columns], target[:, their_columns], temperature))


def places_to_reduce(batch: Batch, spelling: Tensor) -> tuple[Tensor, ...]:
    """Of the n words that the teacher has masked as one piece: where the student's m masked pieces stand [m], which
    word each is of [m], how many a word has [n], where the teacher's stand [n]; which teacher pieces are spelt [K]."""
    _, my_units, my_counts = batch.student.masked(batch.unit_mask.shape[1])
    _, their_units, their_counts = batch.teacher.masked(batch.unit_mask.shape[1])
    chosen = (their_counts == 1) & (my_counts > 0)
    mine, theirs = chosen[my_units], chosen[their_units]
    word, spelt = (chosen.cumsum(0) - 1)[my_units[mine]], (spelling[:, 0] >= 0).nonzero().squeeze(1)
    return batch.student.labelled[mine], word, my_counts[chosen], batch.teacher.labelled[theirs], spelt


def masked_lm_reduce(forward: Forward, temperature: Positive = 1.0) -> Tensor:
    """T² KL(p_T || p_S) over the teacher's pieces, at words that the teacher has masked as one piece. The student's
    score of a teacher piece is the mean of its log-probabilities of the pieces that spell it, averaged over the word's
    masked pieces; pieces without a spelling are left out (after Kolesnikova et al. 2022, arXiv 2205.02340)."""
    student, teacher = forward.student, forward.teacher
    mine, word, counts, theirs, spelt = forward.batch.once("masked_lm_reduce", places_to_reduce, forward.spelling)
    scores = F.log_softmax(student.predict(student.at(mine)), dim=-1)
    words = scores.new_zeros(len(counts), scores.shape[1]).index_add(0, word, scores) / counts.unsqueeze(1)
    # mean over each spelling: bags of rows of [V_S + 1, n], of which the last stands for no piece
    spelling, nothing = forward.spelling[spelt], words.shape[1]
    bags, by_piece = spelling.where(spelling >= 0, nothing), F.pad(words.T, (0, 0, 0, 1))
    reduced = F.embedding_bag(bags, by_piece, mode="mean", padding_idx=nothing).T
    return mean(kl(reduced, teacher.predict(teacher.at(theirs))[:, spelt], temperature))


def between_states(forward: Forward, distance: Distance, direction: Direction, units: Units = "all") -> Tensor:
    """The distance of unit states [n, D] over the matched layers, after the shared projection."""
    return over_layers(forward, lambda m, block: distance(*forward.aligned(m, block, direction, units)))


def hidden_mse(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean squared error of unit states over the matched layers, after the shared projection (TinyBERT, eq. 8)."""
    return between_states(forward, mean_squares, direction)


def hidden_mae(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean absolute error of unit states over the matched layers: `hidden_mse` less ruled by far states."""
    return between_states(forward, F.l1_loss, direction)


def hidden_huber(forward: Forward, direction: Direction = "up", delta: Positive = 1.0) -> Tensor:
    """Huber's loss of unit states over the matched layers: half the square up to delta, then linear (Huber 1964)."""
    return between_states(forward, partial(F.huber_loss, delta=delta), direction)


def hidden_cosine(forward: Forward, direction: Direction = "up") -> Tensor:
    """One minus cosine of unit states over the matched layers (DistilBERT's L_cos)."""
    return between_states(forward, one_minus_cosine, direction)


def hidden_normalized(forward: Forward, direction: Direction = "up", states: Units = "all") -> Tensor:
    """Mean squared distance of L2-normalised states (patient KD, Sun et al. 2019, eq. 7: of [CLS], `states` cls)."""
    unit = partial(F.normalize, dim=-1)
    return between_states(forward, lambda s, t: (unit(s) - unit(t)).pow(2).sum(-1).mean(), direction, states)


def hidden_contrastive(
    forward: Forward, direction: Direction = "up", temperature: Positive = 0.1, limit: Count = 1024
) -> Tensor:
    """KL of softmax(t · t_j / τ) and softmax(s · t_j / τ), s, t L2-normalised unit states, j over at most `limit`
    units. InfoNCE (van den Oord et al. 2018, eq. 4) with the teacher's own similarities as targets."""

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        every = -(-len(teacher) // limit)
        student, teacher = (F.normalize(states, dim=-1)[::every] for states in (student, teacher))
        return kl(student @ teacher.mT / temperature, teacher @ teacher.mT / temperature).mean()

    return between_states(forward, distance, direction)


def embedding_mse(forward: Forward) -> Tensor:
    """Mean squared error of the embedding outputs, unit by unit, after the projection up (TinyBERT, eq. 9)."""
    return mean_squares(*forward.aligned(0, (0,), "up"))


def between_maps(forward: Forward, read: Callable[[View, Layers], Tensor], distance: Distance) -> Tensor:
    """The distance of maps [B, h, U, U] over the matched layers: by head, or of means where numbers of heads differ."""

    def cost(m: int, block: Layers) -> Tensor:
        student, teacher = read(forward.student, (m,)), read(forward.teacher, block)
        if student.shape[1] != teacher.shape[1]:
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        return distance(student, teacher)

    return over_layers(forward, cost, attention=True)


def attention_scores(forward: Forward) -> Tensor:
    """Mean squared error of the scores Q K^T / sqrt(d) between units (TinyBERT, eq. 7). See `between_maps`."""

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).pow(2).mean(1).flatten().index_select(0, forward.batch.counted_pairs).mean()

    return between_maps(forward, View.scores, distance)


def attention_kl(forward: Forward) -> Tensor:
    """KL(A_T || A_S) of the attention distributions between units (MiniLM, section 3.1; of all: arXiv 2308.13958)."""
    distance = partial(kl_between_units, forward)
    return between_maps(forward, View.attention, lambda *maps: distance(*(m.clamp_min(1e-30).log() for m in maps)))


def relations_kl(forward: Forward, kind: Kind, heads: int | None) -> Tensor:
    """KL of softmax(X X^T / sqrt(d_r)) between units, [B, A_r, U, U], where X is split into A_r heads of width d_r."""
    read = partial(View.relations, kind=kind, heads=heads or forward.teacher.heads)
    return between_maps(forward, read, partial(kl_between_units, forward))


def query_relations(forward: Forward, heads: Count | None = None) -> Tensor:
    """KL of the relations between queries (MiniLMv2, Wang et al. 2021). heads: A_r, a divisor of both widths."""
    return relations_kl(forward, "queries", heads)


def key_relations(forward: Forward, heads: Count | None = None) -> Tensor:
    """KL of the relations between keys, softmax(K K^T / sqrt(d_r)) (MiniLMv2). heads: as in query_relations."""
    return relations_kl(forward, "keys", heads)


def value_relations(forward: Forward, heads: Count | None = None) -> Tensor:
    """KL of the relations between values (MiniLM, section 3.2; MiniLMv2). heads: as in query_relations."""
    return relations_kl(forward, "values", heads)


def over_prefixes(forward: Forward, cost: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The mean of cost(vectors [B, d], d) over the student's width and those at which its vectors may be cut
    (Matryoshka representation learning, Kusupati et al. 2022, equation 1, with equal weights)."""
    student = forward.student.sentence
    costs = [cost(student[:, :d], d) for d in forward.dimensions if d < student.shape[-1]]
    return sum(costs, cost(student, student.shape[-1])) / (1 + len(costs))


def sentence_cosine(forward: Forward) -> Tensor:
    """One minus cosine of the sentence embeddings, the student's brought up to the teacher's width unless stored, and
    then over the bank's spread: e5's cosines all lie between 0.7 and 1. See `over_prefixes`: a prefix is compared with
    the stored one's or, before it is brought up, filled with zeros."""
    teacher, whole = forward.teacher.sentence, forward.student.sentence.shape[-1]
    if forward.bank is not None:
        apart = over_prefixes(forward, lambda student, width: one_minus_cosine(student, teacher[:, :width]))
        return apart / forward.spread
    up = forward.up
    return over_prefixes(forward, lambda vectors, d: one_minus_cosine(up(F.pad(vectors, (0, whole - d))), teacher))


def bank_similarity(forward: Forward, temperature: Positive = 0.05, size: Count = 4096) -> Tensor:
    """KL of softmax(t · b_j / τ) and softmax(s · b'_j / τ) over `size` stored teacher vectors b_j [K, D], and b'_j
    [K, D_S], the same in the student's width: as good as a batch of K, for the price of a product (after Fang et al.
    2021, SEED, arXiv 2101.04731, eq. 3, with a fixed bank instead of a queue). τ is `temperature` times the bank's
    spread, so that one temperature serves teachers whose cosines are all alike and others."""
    theirs, ours = (vectors[:size] for vectors in forward.bank)
    temperature = temperature * forward.spread
    target = forward.batch.vectors @ theirs.mT / temperature

    def cost(student: Tensor, width: int) -> Tensor:
        bank = ours if width == ours.shape[1] else F.normalize(ours[:, :width], dim=-1)
        return kl(F.normalize(student, dim=-1) @ bank.mT / temperature, target).mean()

    return over_prefixes(forward, cost)


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two cosine-similarity matrices off the diagonal. [..., n, D_S], [..., n, D_T]."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    size, difference = student.shape[-2], student @ student.mT - teacher @ teacher.mT  # the diagonal is 1 - 1
    return difference.pow(2).sum((-1, -2)).mean() / max(size * (size - 1), 1)


def group_similarity(forward: Forward, size: Literal[2, 4] = 4) -> Tensor:
    """MSE of the similarities inside each group of near sentences: what keeps rare words apart (docs/log.md)."""
    sides = forward.student, forward.teacher
    return similarity_mse(*(side.sentence.unflatten(0, (-1, size)) for side in sides))


def batch_similarity(forward: Forward) -> Tensor:
    """MSE of the similarities over the whole batch. Needs no projection, whatever the widths."""
    return over_prefixes(forward, lambda student, _: similarity_mse(student, forward.teacher.sentence))


def labels(forward: Forward) -> Tensor:
    """Cross-entropy with a task's classes, [B, C] or [n, C] at labelled pieces; of scores, the mean squared error."""
    logits, targets = forward.student.task_logits, forward.batch.targets
    if targets is None:  # a task of tokens has its classes at pieces
        targets = forward.student.side.labels.flatten()[forward.student.side.labelled]
    if targets.is_floating_point():
        return mean_squares(logits.squeeze(-1), targets)
    return mean(F.cross_entropy(logits, targets, reduction="none"))


def soft_labels(forward: Forward, temperature: Positive = 1.0, divergence: Literal["kl", "ce"] = "kl") -> Tensor:
    """T² KL(p_T || p_S) of softmax(z / T), z [B, C] or [n, C] at labelled pieces (Hinton et al. 2015, eq. 1).
    divergence ce: T² times the cross-entropy (TinyBERT, eq. 10, with T = 1), larger by the teacher's entropy."""
    student, teacher = forward.student.task_logits, forward.teacher.task_logits
    found = kl(student, teacher, temperature)
    if divergence == "ce":
        distribution = torch.distributions.Categorical(logits=teacher / temperature, validate_args=False)
        found = found + temperature**2 * distribution.entropy()
    return mean(found)


def logits_mse(forward: Forward) -> Tensor:
    """Mean squared error of a task's logits, [B, C] or [n, C] at labelled pieces (Ba and Caruana 2014), or scores."""
    return mean((forward.student.task_logits - forward.teacher.task_logits).pow(2))


def parameters_down(forward: Forward) -> Tensor:
    """`MSE(U θ_t V, θ_s)` over matched parameters (Zhao et al. 2019, eq. 1)."""
    return forward.given["parameters_down"]()


def parameters_up(forward: Forward) -> Tensor:
    """`MSE(θ_t, U' θ_s V')` over matched parameters (Zhao et al. 2019, eq. 2)."""
    return forward.given["parameters_up"]()


@dataclass(frozen=True)
class Loss:
    """A loss, what it reads, and the places whose steps have that."""

    function: Callable[..., Tensor]
    # "hidden" (states of all layers), "queries", "keys", "values", "teacher" (its states), "sentence" (embeddings of
    # both, the teacher's perhaps a stored one), "teacher logits", "task logits", "masked words", "student head" and
    # "teacher head" (of masked LM), "both vocabularies" (which pieces they share), "up", "groups" (near sentences)
    reads: Set[str]
    stands_in: Set[str]  # the modes of dual training, "distill" (recovery too), "finetune", "task teacher"


COMPARED = frozenset({"joint", "match", "distill", "finetune"})  # where a student and a teacher see the same words
OF_HIDDEN = [hidden_mse, hidden_mae, hidden_huber, hidden_cosine, hidden_normalized, hidden_contrastive]
ACROSS = ["masked words", "student head", "teacher head", "both vocabularies", "teacher"]
LOSSES: dict[str, Loss] = {
    function.__name__: Loss(function, frozenset(reads), stands_in)
    for functions, reads, stands_in in (
        ([student_masked_lm], ["masked words", "student head"], {"joint", "distill"}),
        ([teacher_masked_lm], ["masked words", "teacher head"], {"joint", "two_stage"}),
        ([masked_lm_match, masked_lm_reduce], ACROSS, {"distill"}),
        ([parameters_down, parameters_up], [], {"joint"}),
        (OF_HIDDEN, ["hidden", "teacher"], COMPARED),
        ([embedding_mse], ["hidden", "teacher", "up"], COMPARED),
        ([attention_scores, attention_kl], ["queries", "keys", "teacher"], COMPARED),
        ([query_relations], ["queries", "teacher"], COMPARED),
        ([key_relations], ["keys", "teacher"], COMPARED),
        ([value_relations], ["values", "teacher"], COMPARED),
        ([sentence_cosine], ["teacher", "sentence", "up"], COMPARED),
        ([group_similarity], ["teacher", "sentence", "groups"], {"match", "distill"}),
        ([batch_similarity], ["teacher", "sentence"], COMPARED),
        ([bank_similarity], ["teacher", "sentence"], {"distill"}),
        ([labels], ["task logits"], {"finetune", "task teacher"}),
        ([soft_labels, logits_mse], ["task logits", "teacher logits"], {"finetune"}),
    )
    for function in functions
}
ATTENTION = ("queries", "keys", "values")
# what makes the lists of places that a loss reads, ahead of a step (`TrainingTask.ready`)
PLACES = {"teacher_masked_lm": places_by_vocabulary}
PLACES |= {"masked_lm_match": places_to_match, "masked_lm_reduce": places_to_reduce}


def readers(losses: Iterable[str], *parts: str) -> list[str]:
    """Those of the losses, in their order, that read any of these parts (see `Loss`)."""
    return [name for name in losses if LOSSES[name].reads & set(parts)]


def unanswered(losses: Iterable[str], *, stored: bool) -> list[str]:
    """The losses that stored sentence vectors, where there are any, do not serve: what they read must be computed."""
    return [name for name in losses if not (stored and "sentence" in LOSSES[name].reads)]


def check_losses(section: str, stage: TrainingSection, place: str) -> None:
    """Raises InputError, naming the key, for losses that a stage cannot compute. place: see `Loss`."""
    for name, chosen in stage.losses.items():
        key = f"{section}.losses.{name}"
        if name not in LOSSES:
            raise InputError(f"{key}: unknown loss: known losses are {', '.join(LOSSES)}")
        if place not in LOSSES[name].stands_in:
            choices = ", ".join(other for other, loss in LOSSES.items() if place in loss.stands_in)
            raise InputError(f"{key}: this stage cannot compute it: choose from {choices}")
        _, *known = inspect.signature(LOSSES[name].function).parameters.values()
        schema = create_model(name, __config__=STRICT, **{p.name: (p.annotation, p.default) for p in known})
        try:
            schema.model_validate(chosen.arguments)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(explain(first | {"loc": (*key.split("."), *first["loc"])}, schema)) from None
        if "masked words" in LOSSES[name].reads and not stage.mask:
            raise InputError(f"{key}: nothing is masked: set {section}.mask, 0.15 as in BERT")
        if "groups" in LOSSES[name].reads and stage.group_size == 1:
            raise InputError(f"{key} compares near sentences: set {section}.group_size to 4")
