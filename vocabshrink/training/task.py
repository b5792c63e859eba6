"""What the training loop asks of a task: named losses of a batch, their weights, and which parameters are embeddings.

A task is a module of models and of helpers (projections, heads) that are learned with them and never ship. Each kind
of training is one: distillation.py, dual_training.py, task_training.py.
"""

import inspect

import torch
from torch import Tensor, nn

from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import run_backbone
from vocabshrink.models.projection import widen
from vocabshrink.models.rounding import refit
from vocabshrink.models.teacher import Teacher
from vocabshrink.run.recipe import Losses
from vocabshrink.training.losses import ATTENTION, LOSSES, readers
from vocabshrink.training.views import Forward, View

STEPS_OF_SCALES = 50  # after which the scales of a rounded student are fitted to its weights again


class TrainingTask(nn.Module):
    """A module of models and helpers with the losses that a recipe chose. Subclasses give `view(batch) -> Forward`.

    Dropout is off on purpose (see student.py): a task stays in eval mode.
    """

    losses: Losses
    pooling, normalize = "mean", False  # of sentence embeddings

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name, each a scalar. The models run under the caller's autocast, the losses and all that
        is pooled for them in float32."""
        forward = self.view(batch)
        with torch.autocast(batch.unit_mask.device.type, enabled=False):
            return {name: LOSSES[name].function(forward, **chosen.arguments) for name, chosen in self.losses.items()}

    def view(self, batch: Batch) -> Forward:
        raise NotImplementedError

    def run(self, backbone: nn.Module, side: Pieces, batch: Batch, embeddings: Tensor | None = None) -> View:
        """One model's pass, keeping what the losses read: all layers, queries, keys and values, or the last states.

        embeddings [B, T, D_E]: instead of ids.
        """
        layers, qkv = bool(readers(self.losses, "hidden")), bool(readers(self.losses, *ATTENTION))
        passed = run_backbone(backbone, side, embeddings=embeddings, layers=layers, qkv=qkv)
        heads, units = backbone.config.num_attention_heads, batch.unit_mask.shape[1]
        return View(side, passed, self.pooling, self.normalize, units, heads)

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
        """What the task does to itself before an optimizer step, decided by the step's number alone, so that a resumed
        run does the same: the scales of a rounded student follow its weights."""
        if step % STEPS_OF_SCALES == 0:
            refit(self)

    def train(self, mode: bool = True):
        return super().train(False)


def hidden_projections(student: nn.Module, teacher: Teacher, directions: Tensor | None) -> tuple[nn.Module, nn.Module]:
    """Shared maps of hidden states, up to the teacher's width and down. The principal directions are the piece table's;
    ALBERT's table is narrower than its hidden states, and says nothing about them."""
    small, large = student.config.hidden_size, teacher.config.hidden_size
    if directions is not None and len(directions) != large:
        directions = None
    return widen(small, large, directions), widen(large, small, None if directions is None else directions.T)


def freeze_unread(task: TrainingTask) -> None:
    """Freezes projections that no chosen loss reads, so that no process waits for a gradient that never comes."""
    directions = {"up"} if readers(task.losses, "up") else set()
    for name, chosen in task.losses.items():
        if known := inspect.signature(LOSSES[name].function).parameters.get("direction"):
            directions.add(chosen.arguments.get("direction", known.default))
    task.up.requires_grad_("up" in directions)
    task.down.requires_grad_("down" in directions)
