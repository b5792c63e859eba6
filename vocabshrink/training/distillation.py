"""The distillation task: the student on its own vocabulary learns from a frozen teacher on the teacher's.

Also `TrainingTask`, what the loop asks of any task: `forward(batch) -> {name: unweighted loss}`, `weights(progress)`,
and `embedding_parameters()`. Learned helpers (projections, heads) belong to the task, and never ship.
"""

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.models.rounding import refit
from vocabshrink.models.teacher import MaskedLMHead, Teacher
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import DistillStage, Losses
from vocabshrink.training.losses import ACROSS_VOCABULARIES, LOSSES, MASKED_LM, TASK, masked_lm_loss
from vocabshrink.training.task import STEPS_OF_SCALES, TrainingTask, freeze_unread, hidden_projections, run_view
from vocabshrink.training.views import Forward

# What the stage can give: the others belong to dual training, which has mixed input, and to tasks.
LOSSES_OF_DISTILLATION = set(LOSSES) - TASK - {"teacher_masked_lm", "parameters_down", "parameters_up"}


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
        shared: Tensor | None = None,
        spelling: Tensor | None = None,
    ):
        """What the stage trains.

        Args:
            head: the student's, for masked-LM losses. directions: see `build_student`.
            shared: [V_S] the teacher's id of the same piece, or -1; for masked_lm_match.
            spelling: [V_T, K] the student's pieces that spell a teacher piece, then -1; for masked_lm_reduce.

        Raises:
            InputError: a masked-LM loss that lacks a head, or what it needs to know of the vocabularies.
        """
        super().__init__()
        self.losses, self.pairs = stage.losses, pairs
        self.student, self.head = student, head
        self.teacher = teacher.backbone.requires_grad_(False)
        self.teacher_head = None
        if ACROSS_VOCABULARIES & set(self.losses) and teacher.head is not None:
            self.teacher_head = teacher.head.requires_grad_(False)
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("spelling", spelling, persistent=False)
        self.pooling, self.normalize = teacher.pooling, teacher.normalize
        self.up, self.down = hidden_projections(student, teacher, directions)
        check_masked_lm(self, teacher)
        freeze_unread(self)

    def before_step(self, step: int) -> None:
        if step % STEPS_OF_SCALES == 0:
            refit(self.student)

    def view(self, batch: Batch) -> Forward:
        common = (batch.unit_mask.shape[1], self.pooling, self.normalize, self.losses)
        teacher = batch.recorded
        if teacher is None and reads_teacher(self.losses):
            with torch.no_grad():
                teacher = run_view(self.teacher, batch.teacher, *common)
        student = run_view(self.student, batch.student, *common)
        forward = Forward(
            batch,
            self.pairs,
            self.up,
            self.down,
            student=student,
            teacher=teacher,
            shared=self.shared,
            spelling=self.spelling,
        )
        if self.head is not None:
            table = self.student.get_input_embeddings().weight
            student.predict = lambda states: self.head(states, table)
            forward.masked_lm["student"] = lambda: masked_lm_loss(
                student.hidden[-1], batch.student.labels, self.head, [table], [self.head.bias]
            )
        if self.teacher_head is not None:
            teacher.predict = lambda states: self.teacher_head(states, self.teacher.get_input_embeddings().weight)
        return forward


def reads_teacher(losses: Losses) -> bool:
    """Whether any loss compares; masked words alone are what a student without a teacher trains on."""
    return bool(set(losses) - {"student_masked_lm"})


def check_masked_lm(task: Distillation, teacher: Teacher) -> None:
    """Refuses masked-LM losses without their heads, or without what the two vocabularies have in common."""
    known = {"masked_lm_match": task.shared, "masked_lm_reduce": task.spelling}
    for name in MASKED_LM & set(task.losses):
        if task.head is None:
            raise InputError(f"distill.losses.{name}: the student has no masked-LM head: give it one")
        if name not in known:
            continue
        if task.teacher_head is None:
            raise InputError(
                f"distill.losses.{name} needs a masked-LM head and {teacher.folder} has none: add a masked_lm_head "
                "section, or leave this loss out"
            )
        if known[name] is None or not bool((known[name] >= 0).any()):
            raise InputError(
                f"distill.losses.{name}: no piece is known to stand in both vocabularies: leave this loss out"
            )
