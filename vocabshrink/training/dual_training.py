"""Dual training: the teacher itself learns the student's pieces (Zhao et al., arXiv 1909.11687, both versions).

Each word of the teacher's input is segmented with the student's vocabulary with probability p, else with the
teacher's. Student pieces are embedded by the student's table and, where widths differ, an affine map up; they enter the
unchanged teacher beside its own pieces, as `inputs_embeds`, so its own objective pulls them into its space.

Modes: `joint` (version 1: the student trains alongside, with parameter projections), `two_stage` (version 2: the
teacher alone; distillation follows), and `match` for teachers without a masked-LM head: mixed input must give, unit by
unit, what the teacher gives on its own segmentation, and only the new embeddings move. There the teacher on mixed input
takes the student's seat, so every loss between student and teacher can be used.
"""

from functools import partial

import torch
from torch import Tensor, nn

from vocabshrink.data.batches import Batch
from vocabshrink.models.projection import ParameterProjection, widen
from vocabshrink.models.teacher import MaskedLMHead, Teacher
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import DualStage, Losses
from vocabshrink.training.losses import masked_lm_loss, readers
from vocabshrink.training.task import TrainingTask
from vocabshrink.training.views import Forward


class MixedEmbedding(nn.Module):
    """Embeds combined ids [B, T] as [B, T, D_T]: below V_T by the teacher's table, from V_T on by the student's and the
    affine map up."""

    def __init__(self, teacher_table: nn.Embedding, student_table: nn.Embedding, directions: Tensor | None):
        super().__init__()
        self.teacher_table, self.student_table = teacher_table, student_table
        self.up = widen(student_table.embedding_dim, teacher_table.embedding_dim, directions)

    def tables(self) -> list[Tensor]:
        """Both in the teacher's width, [V_T, D_T] and [V_S, D_T]."""
        return [self.teacher_table.weight, self.up(self.student_table.weight)]

    def forward(self, ids: Tensor) -> Tensor:
        first = self.teacher_table.num_embeddings
        from_student = (ids >= first).unsqueeze(-1)
        student = self.up(self.student_table((ids - first).clamp_min(0)))
        return torch.where(from_student, student, self.teacher_table(ids.clamp_max(first - 1)))


class DualTraining(TrainingTask):
    """The teacher on mixed input and, in joint mode, the student beside it."""

    def __init__(
        self,
        stage: DualStage,
        teacher: Teacher,
        student: nn.Module,
        pairs: Pairs,
        *,
        student_head: MaskedLMHead | None = None,
        directions: Tensor | None = None,
    ):
        super().__init__()
        self.losses, self.pairs, self.mode = stage.losses, pairs, stage.mode
        self.teacher, self.student = teacher.backbone, student
        self.pooling, self.normalize = teacher.pooling, teacher.normalize
        self.embedding = MixedEmbedding(teacher.table, student.get_input_embeddings(), directions)
        self.project_hidden(student, teacher, directions)
        if teacher.table.embedding_dim == teacher.config.hidden_size:
            self.up = self.embedding.up  # one map up of this width
        self.teacher_head, self.head = teacher.head, student_head
        self.student_bias = nn.Parameter(torch.zeros(student.config.vocab_size))  # of the teacher's second softmax
        self.projections = nn.ModuleDict()
        for direction in ("down", "up"):
            if f"parameters_{direction}" in self.losses:
                self.projections[direction] = ParameterProjection(student, teacher.backbone, pairs, direction)
        self.freeze_unread()
        if self.mode == "match":  # both sides are the teacher, in its own width
            self.up.requires_grad_(False)
            self.down.requires_grad_(False)
        self.embedding.up.requires_grad_(True)
        # only masked LM moves the teacher; in match mode its own reading is the target and must stay
        reads_head = bool(readers(self.losses, "teacher head"))
        self.student_bias.requires_grad_(reads_head)
        for part in filter(None, (self.teacher, self.teacher_head)):
            part.requires_grad_(stage.train_teacher and reads_head)
        if self.head is not None:
            self.head.requires_grad_(bool(readers(self.losses, "student head")))
        if self.mode != "joint":
            self.student.requires_grad_(False)
            self.student.get_input_embeddings().requires_grad_(True)

    def view(self, batch: Batch) -> Forward:
        forward = Forward(batch, self.pairs, self.up, self.down)
        mixed = self.run(self.teacher, batch.mixed, batch, self.embedding(batch.mixed.ids))
        if self.mode == "match":
            forward.up = forward.down = nn.Identity()
            forward.student = mixed
            with torch.no_grad():
                forward.teacher = self.run(self.teacher, batch.teacher, batch)
            return forward
        # the student learns from the teacher, not the teacher from the student: only masked LM moves the teacher
        forward.teacher = mixed.detached()
        if self.teacher_head is not None:
            tables, biases = self.embedding.tables, [self.teacher_head.bias, self.student_bias]
            forward.given["teacher_masked_lm"] = lambda: masked_lm_loss(mixed, self.teacher_head, tables(), biases)
        if self.mode == "joint":
            table = self.student.get_input_embeddings().weight
            forward.student = self.run(self.student, batch.student, batch)
            forward.student.predict = lambda states: self.head(states, table)
        for direction, projection in self.projections.items():
            forward.given[f"parameters_{direction}"] = partial(projection, self.student, self.teacher)
        return forward


class HeadTraining(TrainingTask):
    """Trains a masked-LM head on a teacher that has none. The body stays as it is: its embeddings are the target."""

    def __init__(self, teacher: Teacher, losses: Losses):
        super().__init__()
        self.losses, self.teacher, self.head = losses, teacher.backbone.requires_grad_(False), teacher.head

    def embedding_parameters(self) -> list[nn.Parameter]:
        return []

    def view(self, batch: Batch) -> Forward:
        with torch.no_grad():
            view = self.run(self.teacher, batch.teacher, batch)
        table, forward = self.teacher.get_input_embeddings().weight, Forward(batch, (), nn.Identity(), nn.Identity())
        forward.given["teacher_masked_lm"] = partial(masked_lm_loss, view, self.head, [table], [self.head.bias])
        return forward
