"""The distillation task: the student on its own vocabulary learns from a frozen teacher on the teacher's.

Also `TrainingTask`, what the loop asks of any task: `forward(batch) -> {name: unweighted loss}`, `weights(progress)`,
and `embedding_parameters()`. Learned helpers (projections, heads) belong to the task, and never ship.
"""

import torch
from torch import Tensor, nn

from vocabshrink.batches import Batch
from vocabshrink.layer_map import Pairs
from vocabshrink.losses import LOSSES, Forward, View, masked_lm_loss
from vocabshrink.projection import widen
from vocabshrink.recipe import DistillStage, Losses
from vocabshrink.teacher import MaskedLMHead, Teacher, run_backbone


class TrainingTask(nn.Module):
    """A module of models and helpers with the losses that a recipe chose. Subclasses give `view(batch) -> Forward`."""

    losses: Losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name, each a scalar."""
        forward = self.view(batch)
        return {name: LOSSES[name](forward, **chosen.arguments) for name, chosen in self.losses.items()}

    def view(self, batch: Batch) -> Forward:
        raise NotImplementedError

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each loss at this share of the run: linear from `start`, if given, to `weight`."""
        return {
            name: chosen.weight if chosen.start is None else chosen.start + (chosen.weight - chosen.start) * progress
            for name, chosen in self.losses.items()
        }

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The piece embeddings, which take a learning rate of their own."""
        return [self.student.get_input_embeddings().weight]

    def train(self, mode: bool = True):
        """Stays in eval mode: dropout is off on purpose (see student.py)."""
        return super().train(False)


LAYERWISE = {"hidden_mse", "hidden_cosine", "hidden_normalized", "embedding_mse"}


def run_view(backbone, side, word_count: int, pooling: str, normalize: bool, *, embeddings=None, layers: bool) -> View:
    """One model's pass. Without `layers` only the last hidden states are kept, as the view's only ones."""
    return View(
        side, run_backbone(backbone, side, embeddings=embeddings, layers=layers), pooling, normalize, word_count
    )


class Distillation(TrainingTask):
    """Student and frozen teacher, each on its own segmentation of the same words."""

    def __init__(
        self,
        stage: DistillStage,
        teacher: Teacher,
        student: nn.Module,
        pairs: Pairs,
        *,
        head: MaskedLMHead | None = None,
        directions: Tensor | None = None,
    ):
        super().__init__()
        self.losses, self.pairs, self.layers = stage.losses, pairs, bool(LAYERWISE & set(stage.losses))
        self.student, self.head = student, head
        self.teacher = teacher.backbone.requires_grad_(False)
        self.pooling, self.normalize = teacher.pooling, teacher.normalize
        self.up, self.down = hidden_projections(student, teacher, directions)
        freeze_unread(self)

    def view(self, batch: Batch) -> Forward:
        count = batch.word_mask.shape[1]
        with torch.no_grad():
            teacher = run_view(self.teacher, batch.teacher, count, self.pooling, self.normalize, layers=self.layers)
        student = run_view(self.student, batch.student, count, self.pooling, self.normalize, layers=self.layers)
        forward = Forward(batch, self.pairs, self.up, self.down, student=student, teacher=teacher)
        if self.head is not None:
            table = self.student.get_input_embeddings().weight
            forward.masked_lm["student"] = lambda: masked_lm_loss(
                student.hidden[-1], batch.student.labels, self.head, [table], [self.head.bias]
            )
        return forward


def hidden_projections(student: nn.Module, teacher: Teacher, directions: Tensor | None) -> tuple[nn.Module, nn.Module]:
    """Shared maps of hidden states, up to the teacher's width and down. The principal directions are the piece table's;
    ALBERT's table is narrower than its hidden states, and says nothing about them."""
    small, large = student.config.hidden_size, teacher.config.hidden_size
    if directions is not None and len(directions) != large:
        directions = None
    return widen(small, large, directions), widen(large, small, None if directions is None else directions.T)


def freeze_unread(task: TrainingTask) -> None:
    """Freezes helpers that no chosen loss reads, so that no process waits for a gradient that never comes."""
    names = set(task.losses)
    directions = {task.losses[name].arguments.get("direction", "up") for name in names & LAYERWISE - {"embedding_mse"}}
    task.up.requires_grad_(bool(names & {"embedding_mse", "sentence_cosine"}) or "up" in directions)
    task.down.requires_grad_("down" in directions)
