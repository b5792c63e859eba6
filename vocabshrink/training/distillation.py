"""The distillation task: the student on its own vocabulary learns from a frozen teacher on the teacher's.

Each model reads its own segmentation of the same words, and only what the chosen losses read is computed: masked words
alone, for instance, do not run the teacher.
"""

from functools import partial

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch
from vocabshrink.models.teacher import MaskedLMHead, Teacher
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import DistillStage
from vocabshrink.training.losses import masked_lm_loss, readers
from vocabshrink.training.task import TrainingTask, freeze_unread, hidden_projections
from vocabshrink.training.views import Forward


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
        """The models and projections of a stage.

        Args:
            head: the student's, for masked-LM losses. directions: see `build_student`.
            shared: [V_S] the teacher's id of the same piece, or -1; for masked_lm_match.
            spelling: [V_T, K] the student's pieces that spell a teacher piece, then -1; for masked_lm_reduce.

        Raises InputError: a masked-LM loss without its head, or between vocabularies that have nothing in common.
        """
        super().__init__()
        self.losses, self.pairs = stage.losses, pairs
        self.student, self.head = student, head
        self.teacher = teacher.backbone.requires_grad_(False)
        across = readers(self.losses, "both vocabularies")
        self.teacher_head = teacher.head.requires_grad_(False) if across and teacher.head is not None else None
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("spelling", spelling, persistent=False)
        self.pooling, self.normalize = teacher.pooling, teacher.normalize
        self.up, self.down = hidden_projections(student, teacher, directions)
        for name in readers(self.losses, "student head"):
            if head is None:
                raise InputError(f"losses.{name}: the student has no masked-LM head: give it one")
        for name in across:
            if self.teacher_head is None:
                raise InputError(
                    f"losses.{name} needs a masked-LM head and {teacher.folder} has none: add a masked_lm_head "
                    "section, or leave this loss out"
                )
            common = shared if name == "masked_lm_match" else spelling
            if common is None or not bool((common >= 0).any()):
                raise InputError(f"losses.{name}: the vocabularies have no piece in common: leave this loss out")
        freeze_unread(self)

    def view(self, batch: Batch) -> Forward:
        teacher = batch.recorded
        if teacher is None and readers(self.losses, "teacher"):
            with torch.no_grad():
                teacher = self.run(self.teacher, batch.teacher, batch)
        student = self.run(self.student, batch.student, batch)
        forward = Forward(batch, self.pairs, self.up, self.down, student, teacher)
        forward.shared, forward.spelling = self.shared, self.spelling
        if self.head is not None:
            table = self.student.get_input_embeddings().weight
            student.predict = lambda states: self.head(states, table)
            forward.masked_lm["student"] = partial(masked_lm_loss, student, self.head, [table], [self.head.bias])
        if self.teacher_head is not None:
            teacher.predict = lambda states: self.teacher_head(states, self.teacher.get_input_embeddings().weight)
        return forward
