"""TODO: training.task_training."""

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.rounding import refit
from vocabshrink.models.task_model import task_logits
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import Losses
from vocabshrink.training.losses import TASK
from vocabshrink.training.task import STEPS_OF_SCALES, TrainingTask, freeze_unread, hidden_projections, run_view
from vocabshrink.training.views import Forward, View

OF_LOGITS = TASK - {"labels"}  # losses that read the teacher's logits and nothing else of it


class TaskTraining(TrainingTask):
    """A task model on its own pieces and, where a loss reads it, a frozen fine-tuned teacher on the teacher's.

    `begin` opens each phase: models and projections stay, so that a later phase starts where the one before ended.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        *,
        teacher: nn.Module | None = None,
        logits: Tensor | None = None,
        directions: Tensor | None = None,
        pooling: str = "mean",
        normalize: bool = True,
    ):
        """logits [rows, C]: the teacher's on the training rows, by row number. directions: see `build_student`."""
        super().__init__()
        self.student, self.kind, self.pooling, self.normalize = model, kind, pooling, normalize
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.up, self.down = (
            (nn.Identity(), nn.Identity()) if teacher is None else hidden_projections(model, teacher, directions)
        )
        self.register_buffer("logits", logits, persistent=False)
        self.losses, self.pairs, self.live = {}, (), False

    def begin(self, losses: Losses, pairs: Pairs) -> None:
        """Opens a phase: its losses, its layer map, and what of the model they train.

        Raises:
            InputError: a loss needs a teacher's layers or logits and there are none.
        """
        self.losses, self.pairs = losses, pairs
        self.live = live_teacher(losses, stored=self.logits is not None)
        if self.live and self.teacher is None:
            first = next(name for name in losses if name != "labels")
            raise InputError(f"losses.{first} reads a fine-tuned teacher and there is none: add finetune.teacher")
        freeze_unread(self)
        body = {id(p) for name, p in self.student.base_model.named_parameters() if "pooler" not in name}
        for parameter in self.student.parameters():
            parameter.requires_grad_(id(parameter) in body or bool(TASK & set(losses)))

    def before_step(self, step: int) -> None:
        if step % STEPS_OF_SCALES == 0:
            refit(self.student)

    def view(self, batch: Batch) -> Forward:
        forward = Forward(batch, self.pairs, self.up, self.down, student=self.run(self.student, batch.student, batch))
        if self.live:
            with torch.no_grad():
                forward.teacher = self.run(self.teacher, batch.teacher, batch)
        if self.logits is not None and OF_LOGITS & set(self.losses):
            forward.teacher = forward.teacher or View(None, None)
            forward.teacher.logits = self.logits[batch.rows]
        return forward

    def run(self, model: nn.Module, side: Pieces, batch: Batch) -> View:
        view = run_view(model.base_model, side, batch.unit_mask.shape[1], self.pooling, self.normalize, self.losses)
        if TASK & set(self.losses):
            view.logits = task_logits(model, view.hidden[-1], self.kind)
        return view


def live_teacher(losses: Losses, *, stored: bool) -> bool:
    """Whether a phase with these losses runs the teacher; stored: its logits of the training rows are at hand."""
    return bool(set(losses) - TASK) or (bool(set(losses) & OF_LOGITS) and not stored)
