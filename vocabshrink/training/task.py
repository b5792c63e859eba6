"""TODO: training.task."""

import inspect

from torch import Tensor, nn

from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.projection import widen
from vocabshrink.models.teacher import Teacher
from vocabshrink.run.recipe import Losses
from vocabshrink.training.losses import ATTENTION, LAYERWISE, LOSSES
from vocabshrink.training.views import Forward, View


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
        return list(self.student.get_input_embeddings().parameters())  # also where the weight is a rounded view of it

    def before_step(self, step: int) -> None:
        """What the task does to itself before an optimizer step, by the step's number alone, so that a resumed run
        does the same."""

    def train(self, mode: bool = True):
        """Stays in eval mode: dropout is off on purpose (see student.py)."""
        return super().train(False)


def run_view(
    backbone: nn.Module,
    side: Pieces,
    unit_count: int,
    pooling: str,
    normalize: bool,
    losses: Losses,
    *,
    embeddings: Tensor | None = None,
) -> View:
    """One model's pass, keeping what the losses read: all layers, queries, keys and values, or the last states alone.

    embeddings [B, T, D_E]: instead of ids.
    """
    layers, qkv = (bool(kind & set(losses)) for kind in (LAYERWISE, ATTENTION))
    passed = run_backbone(backbone, side, embeddings=embeddings, layers=layers, qkv=qkv)
    return View(side, passed, pooling, normalize, unit_count, backbone.config.num_attention_heads)


STEPS_OF_SCALES = 50  # after which the scales of a rounded student are fitted to its weights again


def hidden_projections(student: nn.Module, teacher: Teacher, directions: Tensor | None) -> tuple[nn.Module, nn.Module]:
    """Shared maps of hidden states, up to the teacher's width and down. The principal directions are the piece table's;
    ALBERT's table is narrower than its hidden states, and says nothing about them."""
    small, large = student.config.hidden_size, teacher.config.hidden_size
    if directions is not None and len(directions) != large:
        directions = None
    return widen(small, large, directions), widen(large, small, None if directions is None else directions.T)


def freeze_unread(task: TrainingTask) -> None:
    """Freezes helpers that no chosen loss reads, so that no process waits for a gradient that never comes."""
    names, directions = set(task.losses), set()
    for name, chosen in task.losses.items():
        if known := inspect.signature(LOSSES[name]).parameters.get("direction"):
            directions.add(chosen.arguments.get("direction", known.default))
    task.up.requires_grad_(bool(names & {"embedding_mse", "sentence_cosine"}) or "up" in directions)
    task.down.requires_grad_("down" in directions)
