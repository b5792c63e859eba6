"""Losses: pure functions of what one step saw, chosen and weighted by the recipe.

Every loss is `f(forward, **arguments) -> scalar`; its signature, of Literals, is its schema. It is zero at agreement,
padding never counts, and it is logged unweighted. Hidden states of teacher and student are compared word by word (mean
of a word's pieces), because their sequences differ in length when their vocabularies do.

Shapes: B sequences, T pieces, M words, D width (D_S student, D_T teacher), N masked pieces.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.batches import Batch, Pieces
from vocabshrink.layer_map import Pairs
from vocabshrink.teacher import pool_sentence, pool_words

Direction = Literal["up", "down"]


@dataclass
class View:
    """One model's pass over one side of the batch. hidden: all hidden states [B, T, D], embedding output first."""

    side: Pieces
    hidden: tuple[Tensor, ...]
    pooling: str
    normalize: bool
    word_count: int
    _words: dict[int, Tensor] = field(default_factory=dict, init=False)

    def words(self, layer: int) -> Tensor:
        """[B, M, D]"""
        if layer not in self._words:
            self._words[layer] = pool_words(self.hidden[layer], self.side.words, self.word_count)
        return self._words[layer]

    @cached_property
    def sentence(self) -> Tensor:
        """[B, D]"""
        return pool_sentence(self.hidden[-1], self.side.attention_mask, self.pooling, self.normalize)


@dataclass
class Forward:
    """What one step saw. A view that a stage does not run is None.

    student: the student on its pieces; in match mode, the teacher on mixed input takes its seat. teacher: what is
    learnt from: the teacher on its own pieces or, in joint training, on mixed ones. up [D_S -> D_T] and down [D_T ->
    D_S]: shared projections of hidden states. masked_lm: name -> function giving that model's masked-LM loss.
    parameters: direction -> function giving the parameter projection loss.
    """

    batch: Batch
    pairs: Pairs
    up: nn.Module
    down: nn.Module
    student: View | None = None
    teacher: View | None = None
    masked_lm: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    parameters: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def aligned(self, direction: Direction):
        """Pairs of word states [n, D] of each matched layer pair, the student's brought up or the teacher's down."""
        mask = self.batch.word_mask
        for m, n in self.pairs:
            student, teacher = self.student.words(m)[mask], self.teacher.words(n)[mask]
            yield (self.up(student), teacher) if direction == "up" else (student, self.down(teacher))


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


def mean_squares(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).float().pow(2).mean()


def one_minus_cosine(left: Tensor, right: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(left.float(), right.float(), dim=-1)).mean()


def hidden_mse(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean squared error of word states over the matched layers, after the shared projection (TinyBERT, eq. 8)."""
    return torch.stack([mean_squares(s, t) for s, t in forward.aligned(direction)]).mean()


def hidden_cosine(forward: Forward, direction: Direction = "up") -> Tensor:
    """One minus cosine of word states over the matched layers (DistilBERT's L_cos, on words)."""
    return torch.stack([one_minus_cosine(s, t) for s, t in forward.aligned(direction)]).mean()


def hidden_normalized(forward: Forward, direction: Direction = "up") -> Tensor:
    """Mean squared distance of L2-normalised word states (patient KD, Sun et al. 2019, eq. 7, on words)."""
    distances = [
        (F.normalize(s.float(), dim=-1) - F.normalize(t.float(), dim=-1)).pow(2).sum(-1).mean()
        for s, t in forward.aligned(direction)
    ]
    return torch.stack(distances).mean()


def embedding_mse(forward: Forward) -> Tensor:
    """Mean squared error of the embedding outputs, word by word (TinyBERT, eq. 9)."""
    mask = forward.batch.word_mask
    return mean_squares(forward.up(forward.student.words(0)[mask]), forward.teacher.words(0)[mask])


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


def student_masked_lm(forward: Forward) -> Tensor:
    """The student's masked-LM cross-entropy on its own vocabulary."""
    return forward.masked_lm["student"]()


def teacher_masked_lm(forward: Forward) -> Tensor:
    """The teacher's masked-LM cross-entropy on mixed input, one softmax per vocabulary (Zhao et al. 2019)."""
    return forward.masked_lm["teacher"]()


def parameters_down(forward: Forward) -> Tensor:
    """`MSE(U θ_t V, θ_s)` over matched parameters (Zhao et al. 2019, eq. 1)."""
    return forward.parameters["down"]()


def parameters_up(forward: Forward) -> Tensor:
    """`MSE(θ_t, U' θ_s V')` over matched parameters (Zhao et al. 2019, eq. 2)."""
    return forward.parameters["up"]()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "student_masked_lm": student_masked_lm,
    "teacher_masked_lm": teacher_masked_lm,
    "parameters_down": parameters_down,
    "parameters_up": parameters_up,
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
    "hidden_normalized": hidden_normalized,
    "embedding_mse": embedding_mse,
    "sentence_cosine": sentence_cosine,
    "group_similarity": group_similarity,
    "batch_similarity": batch_similarity,
}

# Losses that need masked words and a head; all others compare the student with the teacher.
MASKED_LM = {"student_masked_lm", "teacher_masked_lm"}


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
            values = get_args(known[argument].annotation)
            if value not in values:
                choices = " or ".join(map(str, values))
                raise InputError(f"{section}.losses.{name}.{argument}: {value!r} is not {choices}")
