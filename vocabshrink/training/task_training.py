"""The fine-tuning task: a student with a task's head learns from labels, a fine-tuned teacher, or its stored logits."""

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.task_model import task_logits
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import Losses
from vocabshrink.training.losses import readers
from vocabshrink.training.task import TrainingTask, freeze_unread, hidden_projections
from vocabshrink.training.views import Forward, View


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
        self.teacher, self.up, self.down = None, nn.Identity(), nn.Identity()
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False)
            self.up, self.down = hidden_projections(model, teacher, directions)
        self.register_buffer("logits", logits, persistent=False)
        self.losses, self.pairs, self.live = {}, (), False

    def begin(self, losses: Losses, pairs: Pairs) -> None:
        """Opens a phase: its losses, its layer map, and what of the model they train.

        Raises InputError: a loss needs a teacher's layers or logits and there are none.
        """
        self.losses, self.pairs = losses, pairs
        self.live = live_teacher(losses, stored=self.logits is not None)
        if self.live and self.teacher is None:
            first = readers(losses, "teacher", "teacher logits")[0]
            raise InputError(f"losses.{first} reads a fine-tuned teacher and there is none: add finetune.teacher")
        freeze_unread(self)
        body = {id(p) for name, p in self.student.base_model.named_parameters() if "pooler" not in name}
        head = bool(readers(losses, "task logits"))
        for parameter in self.student.parameters():
            parameter.requires_grad_(head or id(parameter) in body)

    def view(self, batch: Batch) -> Forward:
        student = self.view_of(self.student, batch.student, batch)
        forward = Forward(batch, self.pairs, self.up, self.down, student)
        if self.live:
            with torch.no_grad():
                forward.teacher = self.view_of(self.teacher, batch.teacher, batch)
        if self.logits is not None and readers(self.losses, "teacher logits"):
            forward.teacher = forward.teacher or View(None, None)
            forward.teacher.logits = self.logits[batch.rows]
        return forward

    def view_of(self, model: nn.Module, side: Pieces, batch: Batch) -> View:
        view = self.run(model.base_model, side, batch)
        view.predict = lambda states: task_logits(model, states, self.kind)
        return view


def live_teacher(losses: Losses, *, stored: bool) -> bool:
    """Whether a phase with these losses runs the teacher; stored: its logits of the training rows are at hand."""
    return bool(readers(losses, "teacher") or (readers(losses, "teacher logits") and not stored))
