"""Losses: pure functions of what one step saw, chosen and weighted by the recipe.

Every loss is `f(forward, **arguments) -> scalar`; its signature is its schema: a choice of Literals, or a positive
number. It is zero at agreement, padding never counts, and it is logged unweighted.

Teacher and student are compared unit by unit (see batches.py), because their sequences differ in length when their
vocabularies do: a unit's hidden state is the mean over its pieces, and so are its queries, keys and values. Attention
scores are products, so that their mean over the pieces of two units is the product of two means, and no map between
pieces need be made. Only attention distributions are pooled as maps: their softmax is over pieces. Where both
vocabularies spell every word alike, units are pieces and each loss is the papers' own.

Shapes: B sequences, T pieces, U units, D width (D_S student, D_T teacher), h heads, n units or pieces of the batch that
count, V_S and V_T pieces in the vocabularies, C classes.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

from tokenizer_build.errors import InputError
from vocabshrink.run.layer_map import SoftPairs
from vocabshrink.training.views import Direction, Forward, Kind, Layers

# ------------------------------------------------------------------------------------------------ parts of losses


def mean(values: Tensor) -> Tensor:
    """The mean of all elements, zero where there are none: a batch without a masked word is worth nothing."""
    return values.sum() / max(values.numel(), 1)


def mean_squares(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).float().pow(2).mean()


def one_minus_cosine(left: Tensor, right: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(left.float(), right.float(), dim=-1)).mean()


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the softmaxes of logits / T over the last axis, [..., C] twice -> [...].

    It is times T², which keeps the gradients' size whatever T (Hinton et al. 2015, section 2).
    """
    student, teacher = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def kl_between_units(forward: Forward, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of rows of logits [B, h, U, U], mean over heads and units, others than which are left out
    of the rows too: a word that only one side can write has a share of attention there alone."""
    counts = forward.batch.unit_mask
    # a finite number, since infinity minus infinity is none; the softmax makes it exactly zero
    student, teacher = (
        logits.float().masked_fill(~counts[:, None, None], torch.finfo(torch.float32).min / 2)
        for logits in (student, teacher)
    )
    return kl(student, teacher).mean(1)[counts].mean()


def like_heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, h, U, U] head by head or, where one model has more heads than the other, their means over heads."""
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)


def transport(costs: Tensor) -> Tensor:
    """The cheapest flow [M, N] between M and N layers of equal weight, exactly, by linear programming."""
    rows, columns = costs.shape
    constraints = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    weights = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    prices = np.nan_to_num(costs.detach().double().cpu().numpy())  # a loss that is not finite is the loop's to refuse
    flow = linprog(prices.ravel(), A_eq=constraints, b_eq=weights, method="highs").x
    return torch.as_tensor(flow, dtype=costs.dtype, device=costs.device).view(rows, columns)


def over_layers(forward: Forward, cost: Callable[[int, Layers], Tensor], *, attention: bool = False) -> Tensor:
    """The mean of cost(m, block) over the map's pairs; under the map `emd`, the cost of the cheapest transport.

    BERT-EMD (Li et al. 2020, section 3) with weights of layers that stay uniform; no gradient goes through the flow.
    attention: leaves out pairs with layer 0, where there is none.

    Raises:
        InputError: no pair is left.
    """
    pairs = [(m, block) for m, block in forward.pairs if not attention or (m and all(block))]
    if not pairs:
        raise InputError("layer_map: every pair in it has layer 0, where there is no attention: add a pair of layers")
    costs = torch.stack([cost(m, block) for m, block in pairs])
    if not isinstance(forward.pairs, SoftPairs):
        return costs.mean()
    costs = costs.view(len({m for m, _ in pairs}), -1)
    return (transport(costs) * costs).sum()


# ------------------------------------------------------------------------------------------------ masked words


def masked_lm_loss(hidden: Tensor, labels: Tensor, head, tables: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Cross-entropy at masked pieces, one softmax per vocabulary (Zhao et al. 2019, section 3.2).

    hidden [B, T, D]; labels [B, T] in the combined numbering (vocabulary k follows k - 1), -100 where not masked;
    tables [V_k, D_E]; biases [V_k]. The table of the vocabulary that segmented the word predicts it.
    """
    where = labels >= 0
    states, labels = head.transform(hidden[where].float()), labels[where]
    total, first = states.sum() * 0.0, 0
    for table, bias in zip(tables, biases, strict=True):
        mine = (labels >= first) & (labels < first + len(table))
        logits = F.linear(states[mine], table, bias)
        total = total + F.cross_entropy(logits.float(), labels[mine] - first, reduction="sum")
        first += len(table)
    return total / max(len(labels), 1)


def student_masked_lm(forward: Forward) -> Tensor:
    """The student's masked-LM cross-entropy on its own vocabulary."""
    return forward.masked_lm["student"]()


def teacher_masked_lm(forward: Forward) -> Tensor:
    """The teacher's masked-LM cross-entropy on mixed input, one softmax per vocabulary (Zhao et al. 2019)."""
    return forward.masked_lm["teacher"]()


def masked_lm_match(forward: Forward, temperature: float = 1.0) -> Tensor:
    """T² KL(p_T || p_S) at masked pieces that both vocabularies write alike, over the pieces that both have.

    Student logits [n, V_S] and teacher logits [n, V_T] at units of one masked piece on each side and the same one; both
    softmaxes see only the shared pieces (Kolesnikova et al. 2022, arXiv 2205.02340, "match"; with one vocabulary it is
    DistilBERT's L_ce).
    """
    student, teacher = forward.student, forward.teacher
    (here, units, counts), (there, teacher_units, teacher_counts) = student.masked, teacher.masked
    alone = (counts == 1) & (teacher_counts == 1)
    mine, theirs = alone[units], alone[teacher_units]  # units rise along both sides, so that the n-th meets the n-th
    same = forward.shared[student.side.labels[here][mine]] == teacher.side.labels[there][theirs]
    columns = (forward.shared >= 0).nonzero().squeeze(1)
    logits = student.predict(student.hidden[-1][here][mine][same].float())
    target = teacher.predict(teacher.hidden[-1][there][theirs][same].float())
    return mean(kl(logits[:, columns], target[:, forward.shared[columns]], temperature))


def masked_lm_reduce(forward: Forward, temperature: float = 1.0) -> Tensor:
    """T² KL(p_T || p_S) over the teacher's pieces, at words that the teacher has masked as one piece.

    The student's score of a teacher piece is the mean of its log-probabilities of the pieces that spell it, averaged
    over the word's masked student pieces: [n, V_T] from [pieces, V_S]. Teacher pieces without a spelling are left out
    of both softmaxes (after Kolesnikova et al. 2022, arXiv 2205.02340, "reduce-map").
    """
    student, teacher = forward.student, forward.teacher
    (here, units, counts), (there, teacher_units, teacher_counts) = student.masked, teacher.masked
    chosen = (teacher_counts == 1) & (counts > 0)
    mine, theirs = chosen[units], chosen[teacher_units]
    scores = F.log_softmax(student.predict(student.hidden[-1][here][mine].float()).float(), dim=-1)
    row = (chosen.cumsum(0) - 1)[units[mine]]  # the word that each of the student's masked pieces belongs to
    words = scores.new_zeros(int(chosen.sum()), scores.shape[1]).index_add(0, row, scores)
    words = words / counts[chosen].unsqueeze(1)
    spelt = (forward.spelling[:, 0] >= 0).nonzero().squeeze(1)
    # mean over each spelling: bags of rows of [V_S + 1, n], of which the last stands for no piece
    spelling = forward.spelling[spelt]
    bags = spelling.where(spelling >= 0, words.shape[1])
    by_piece = F.pad(words.T, (0, 0, 0, 1))
    reduced = F.embedding_bag(bags, by_piece, mode="mean", padding_idx=words.shape[1]).T
    target = teacher.predict(teacher.hidden[-1][there][theirs].float())
    return mean(kl(reduced, target[:, spelt], temperature))


# ------------------------------------------------------------------------------------------------ hidden states


def hidden_mse(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean squared error of unit states over the matched layers, after the shared projection (TinyBERT, eq. 8)."""
    return over_layers(forward, lambda m, block: mean_squares(*forward.aligned(m, block, direction)))


def hidden_mae(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean absolute error of unit states over the matched layers: `hidden_mse` that far states do not rule."""
    return over_layers(forward, lambda m, block: F.l1_loss(*in_float(forward.aligned(m, block, direction))))


def hidden_huber(forward: Forward, direction: Direction = "up", delta: float = 1.0) -> Tensor:
    """Huber's loss of unit states over the matched layers: half the square up to delta, then linear (Huber 1964)."""

    def cost(m: int, block: Layers) -> Tensor:
        return F.huber_loss(*in_float(forward.aligned(m, block, direction)), delta=delta)

    return over_layers(forward, cost)


def hidden_cosine(forward: Forward, direction: Direction = "up") -> Tensor:
    """One minus cosine of unit states over the matched layers (DistilBERT's L_cos)."""
    return over_layers(forward, lambda m, block: one_minus_cosine(*forward.aligned(m, block, direction)))


def hidden_normalized(forward: Forward, direction: Direction = "up", states: Literal["all", "cls"] = "all") -> Tensor:
    """Mean squared distance of L2-normalised states (patient KD, Sun et al. 2019, eq. 7: of [CLS], `states` cls)."""

    def cost(m: int, block: Layers) -> Tensor:
        student, teacher = of_length_one(forward.aligned(m, block, direction, states))
        return (student - teacher).pow(2).sum(-1).mean()

    return over_layers(forward, cost)


def hidden_contrastive(
    forward: Forward, direction: Direction = "up", temperature: float = 0.1, limit: int = 1024
) -> Tensor:
    """KL of softmax(t · t_j / τ) and softmax(s · t_j / τ): a unit's state is told from those of the batch's others.

    InfoNCE (van den Oord et al. 2018, eq. 4) whose targets are the teacher's own similarities, so that near units are
    no errors and agreement is zero. s, t: L2-normalised states [n, D]; j over at most `limit` units, evenly spaced over
    the batch, because the cost is n².
    """

    def cost(m: int, block: Layers) -> Tensor:
        student, teacher = of_length_one(forward.aligned(m, block, direction))
        every = -(-len(teacher) // limit)
        student, teacher = student[::every], teacher[::every]
        return kl(student @ teacher.mT / temperature, teacher @ teacher.mT / temperature).mean()

    return over_layers(forward, cost)


def in_float(states: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [state.float() for state in states]


def of_length_one(states: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [F.normalize(state.float(), dim=-1) for state in states]


def embedding_mse(forward: Forward) -> Tensor:
    """Mean squared error of the embedding outputs, unit by unit, after the projection up (TinyBERT, eq. 9)."""
    return mean_squares(*forward.aligned(0, (0,), "up"))


# ------------------------------------------------------------------------------------------------ attention


def attention_scores(forward: Forward) -> Tensor:
    """Mean squared error of the scores Q K^T / sqrt(d) between units, [B, h, U, U] (TinyBERT, eq. 7).

    Head by head; where the models have different numbers of heads, the means over heads are compared.
    """
    counts = forward.batch.unit_mask
    both = counts.unsqueeze(1) & counts.unsqueeze(2)

    def cost(m: int, block: Layers) -> Tensor:
        student, teacher = like_heads(forward.student.scores((m,)), forward.teacher.scores(block))
        return (student - teacher).float().pow(2).mean(1)[both].mean()

    return over_layers(forward, cost, attention=True)


def attention_kl(forward: Forward) -> Tensor:
    """KL(A_T || A_S) of the attention distributions between units, [B, h, U, U], mean over heads and units.

    MiniLM (Wang et al. 2020, section 3.1), there of the last layer; arXiv 2308.13958 puts it in the place of TinyBERT's
    MSE. Head by head; where the models have different numbers of heads, the means over heads are compared.
    """

    def cost(m: int, block: Layers) -> Tensor:
        maps = like_heads(forward.student.attention((m,)), forward.teacher.attention(block))
        return kl_between_units(forward, *(probabilities.clamp_min(1e-30).log() for probabilities in maps))

    return over_layers(forward, cost, attention=True)


def relations_kl(forward: Forward, kind: Kind, heads: int | None) -> Tensor:
    """KL of softmax(X X^T / sqrt(d_r)) between units, [B, A_r, U, U], where X is split into A_r heads of width d_r."""
    heads = heads or forward.teacher.heads

    def cost(m: int, block: Layers) -> Tensor:
        student, teacher = forward.student.relations(kind, (m,), heads), forward.teacher.relations(kind, block, heads)
        return kl_between_units(forward, student, teacher)

    return over_layers(forward, cost, attention=True)


def query_relations(forward: Forward, heads: int | None = None) -> Tensor:
    """KL of the relations between queries, softmax(Q Q^T / sqrt(d_r)) (MiniLMv2, Wang et al. 2021).

    heads: A_r, which must divide both widths; the models' own numbers of heads do not matter. None: the teacher's.
    """
    return relations_kl(forward, "queries", heads)


def key_relations(forward: Forward, heads: int | None = None) -> Tensor:
    """KL of the relations between keys, softmax(K K^T / sqrt(d_r)) (MiniLMv2). heads: as in query_relations."""
    return relations_kl(forward, "keys", heads)


def value_relations(forward: Forward, heads: int | None = None) -> Tensor:
    """KL of the relations between values, softmax(V V^T / sqrt(d_r)) (MiniLM, section 3.2; MiniLMv2).

    heads: as in query_relations.
    """
    return relations_kl(forward, "values", heads)


# ------------------------------------------------------------------------------------------------ sentences


def sentence_cosine(forward: Forward) -> Tensor:
    """One minus cosine of the sentence embeddings, the student's brought up to the teacher's width."""
    return one_minus_cosine(forward.up(forward.student.sentence), forward.teacher.sentence)


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two cosine-similarity matrices off the diagonal. [..., n, D_S], [..., n, D_T]."""
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    size = student.shape[-2]
    difference = student @ student.mT - teacher @ teacher.mT  # the diagonal is 1 - 1
    return difference.pow(2).sum((-1, -2)).mean() / max(size * (size - 1), 1)


def group_similarity(forward: Forward, size: Literal[2, 4] = 4) -> Tensor:
    """MSE of the similarities inside each group of near sentences: what keeps rare words apart (docs/log.md)."""
    student, teacher = forward.student.sentence, forward.teacher.sentence
    return similarity_mse(student.unflatten(0, (-1, size)), teacher.unflatten(0, (-1, size)))


def batch_similarity(forward: Forward) -> Tensor:
    """MSE of the similarities over the whole batch. Needs no projection, whatever the widths."""
    return similarity_mse(forward.student.sentence, forward.teacher.sentence)


# ------------------------------------------------------------------------------------------------ tasks


def labels(forward: Forward) -> Tensor:
    """Cross-entropy with a task's classes, [B, C] or [n, C] at labelled pieces; of scores, the mean squared error.

    The one loss of a task that no teacher is asked for: what it is zero at is the truth.
    """
    logits, targets = forward.student.task_logits.float(), forward.targets
    if targets.is_floating_point():
        return mean_squares(logits.squeeze(-1), targets)
    return mean(F.cross_entropy(logits, targets, reduction="none"))


def soft_labels(forward: Forward, temperature: float = 1.0, divergence: Literal["kl", "ce"] = "kl") -> Tensor:
    """T² KL(p_T || p_S) of softmax(z / T), z [B, C] or [n, C] at labelled pieces (Hinton et al. 2015, eq. 1).

    divergence ce: T² times the cross-entropy (TinyBERT, eq. 10, with T = 1), which is more by the teacher's
    entropy: the same gradients, and not zero at agreement.

    Raises:
        InputError: a regression task, which has one output and no distribution.
    """
    student, teacher = forward.student.task_logits, forward.teacher.task_logits
    if student.shape[-1] == 1:
        raise InputError("losses.soft_labels: one output has no distribution: choose logits_mse for regression")
    found = kl(student, teacher, temperature)
    if divergence == "ce":
        found = found + temperature**2 * torch.distributions.Categorical(logits=teacher.float() / temperature).entropy()
    return mean(found)


def logits_mse(forward: Forward) -> Tensor:
    """Mean squared error of a task's logits, [B, C] or [n, C] at labelled pieces (Ba and Caruana 2014).

    For regression, where the one logit is the score.
    """
    return mean((forward.student.task_logits - forward.teacher.task_logits).float().pow(2))


# ------------------------------------------------------------------------------------------------ parameters


def parameters_down(forward: Forward) -> Tensor:
    """`MSE(U θ_t V, θ_s)` over matched parameters (Zhao et al. 2019, eq. 1)."""
    return forward.parameters["down"]()


def parameters_up(forward: Forward) -> Tensor:
    """`MSE(θ_t, U' θ_s V')` over matched parameters (Zhao et al. 2019, eq. 2)."""
    return forward.parameters["up"]()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "student_masked_lm": student_masked_lm,
    "teacher_masked_lm": teacher_masked_lm,
    "masked_lm_match": masked_lm_match,
    "masked_lm_reduce": masked_lm_reduce,
    "parameters_down": parameters_down,
    "parameters_up": parameters_up,
    "hidden_mse": hidden_mse,
    "hidden_mae": hidden_mae,
    "hidden_huber": hidden_huber,
    "hidden_cosine": hidden_cosine,
    "hidden_normalized": hidden_normalized,
    "hidden_contrastive": hidden_contrastive,
    "embedding_mse": embedding_mse,
    "attention_scores": attention_scores,
    "attention_kl": attention_kl,
    "query_relations": query_relations,
    "key_relations": key_relations,
    "value_relations": value_relations,
    "sentence_cosine": sentence_cosine,
    "group_similarity": group_similarity,
    "batch_similarity": batch_similarity,
    "labels": labels,
    "soft_labels": soft_labels,
    "logits_mse": logits_mse,
}

# Losses by what must be there for them; all others read the last hidden states of student and teacher.
HIDDEN = {"hidden_mse", "hidden_mae", "hidden_huber", "hidden_cosine", "hidden_normalized", "hidden_contrastive"}
LAYERWISE = HIDDEN | {"embedding_mse"}  # all hidden states
ATTENTION = {"attention_scores", "attention_kl", "query_relations", "key_relations", "value_relations"}
ACROSS_VOCABULARIES = {"masked_lm_match", "masked_lm_reduce"}  # masked words, and a head on either side
MASKED_LM = {"student_masked_lm", "teacher_masked_lm"} | ACROSS_VOCABULARIES  # masked words and a head
TASK = {"labels", "soft_labels", "logits_mse"}  # a task's logits


def check_losses(section: str, losses: dict, available: set[str]) -> None:
    """Refuses an unknown loss, one that the stage cannot give, and an argument or a value it does not take.

    Raises:
        InputError: naming the key.
    """
    for name, chosen in losses.items():
        if name not in LOSSES:
            raise InputError(f"{section}.losses.{name}: unknown loss: known losses are {', '.join(LOSSES)}")
        if name not in available:
            choices = ", ".join(sorted(available))
            raise InputError(f"{section}.losses.{name}: this stage cannot give it: choose from {choices}")
        known = dict(list(inspect.signature(LOSSES[name]).parameters.items())[1:])
        for argument, value in chosen.arguments.items():
            if argument not in known:
                takes = ", ".join(known) or "none"
                raise InputError(f"{section}.losses.{name}.{argument}: unknown argument: it takes {takes}")
            if wanted := unmet(known[argument].annotation, value):
                raise InputError(f"{section}.losses.{name}.{argument}: {value!r} is not {wanted}")


def unmet(annotation: Any, value: Any) -> str | None:
    """What an argument of this annotation must be and the value is not, or None."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return None if value in choices else " or ".join(map(str, choices))
    if value is None and type(None) in get_args(annotation):
        return None
    kinds, name = ((int, float), "a positive number") if annotation is float else ((int,), "a positive whole number")
    good = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf
    return None if good else name
