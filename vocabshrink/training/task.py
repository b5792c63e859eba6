"""What the training loop trains: tasks, each of which gives named losses of a batch.
A task is a module of models and of helpers (projections, heads) that are learned with them and never ship. Each model
reads its own segmentation of the same words, and only what the chosen losses read is computed.
In `DualTraining` the teacher itself learns the student's pieces (Zhao et al., arXiv 1909.11687, both versions), in the
modes of `run.recipe.DualStage`. Student pieces are embedded by the student's table and, where widths differ, an affine
map up; they enter the unchanged teacher beside its own pieces, as `inputs_embeds`, so its objective pulls them into its
space. In `match` only the new embeddings move, and the teacher on mixed input sits in the student's seat."""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Pieces
from vocabshrink.models.families import table_width
from vocabshrink.models.forward import ModuleSettings, run_backbone
from vocabshrink.models.projection import ParameterProjection, widen
from vocabshrink.models.teacher import Teacher, task_logits
from vocabshrink.run.layer_map import Pairs
from vocabshrink.run.recipe import Losses
from vocabshrink.training.losses import ATTENTION, LOSSES, PLACES, Forward, View, masked_lm_loss, readers, unanswered


class TrainingTask(nn.Module):
    """A module of models and helpers with the losses that a recipe chose. Subclasses give `view(batch) -> Forward`.
    Dropout is off on purpose (see student.py): a task stays in eval mode."""

    losses: Losses
    pairs: Pairs = ()
    pools = ModuleSettings()  # how sentence embeddings are pooled
    stored = False  # whether the teacher's sentence embeddings are stored ones
    needed: tuple = (("sentence", "student head", "task logits"),)  # see `reads_all`
    tables: dict[str, Any] = {}  # {loss: on the host, what its lists of places are made from besides the batch}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted losses by name, each a scalar. Models run under the caller's autocast, losses in float32."""
        forward = self.view(batch)
        with torch.autocast(batch.unit_mask.device.type, enabled=False):
            return {name: LOSSES[name].function(forward, **chosen.arguments) for name, chosen in self.losses.items()}

    def ready(self, batch: Batch) -> Batch:
        """The batch with the lists of places that its step reads: made here, on the host and ahead of it."""
        for name in self.tables.keys() & self.losses:
            batch.once(name, PLACES[name], self.tables[name])
        _ = batch.counted, "attention_scores" in self.losses and batch.counted_pairs
        for side in batch.sides.values():
            _ = side.lengths, side.labels is not None and side.labelled
        return batch

    @property
    def reads_all(self) -> bool:
        """Whether every trained parameter surely gets a gradient: some loss reads a part of each of `needed`."""
        return all(readers(self.losses, *parts) for parts in self.needed)

    def run(self, backbone: nn.Module, side: Pieces, batch: Batch, embeddings: Tensor | None = None) -> View:
        """One model's pass, keeping what the losses read. embeddings [B, T, D_E]: instead of ids."""
        layers, qkv = bool(readers(self.losses, "hidden")), bool(readers(self.losses, *ATTENTION))
        passed = run_backbone(backbone, side, embeddings=embeddings, layers=layers, qkv=qkv)
        heads, units = backbone.config.num_attention_heads, batch.unit_mask.shape[1]
        return View(side, passed, self.pools.pooling, self.pools.normalize, units, heads)

    def both(self, batch: Batch, student: nn.Module, teacher: nn.Module | None) -> Forward:
        """The student's pass over its side and, if given, the frozen teacher's over its own."""
        forward = Forward(batch, self.pairs, self.up, self.down, self.run(student, batch.student, batch))
        if teacher is not None:
            with torch.no_grad():
                forward.teacher = self.run(teacher, batch.teacher, batch)
        return forward

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each loss at this share of the run: linear from `start`, if given, to `weight`."""
        ends = {name: (chosen.start, chosen.weight) for name, chosen in self.losses.items()}
        return {n: end if start is None else start + (end - start) * progress for n, (start, end) in ends.items()}

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The piece embeddings, which take a learning rate of their own."""
        return list(self.student.get_input_embeddings().parameters())  # also where the weight is a rounded view of it

    def train(self, mode: bool = True):
        return super().train(False)

    def project_hidden(self, student: nn.Module, teacher: nn.Module, directions: Tensor | None) -> None:
        """Gives the task its shared maps of hidden states, up to the teacher's width and down."""
        small, large = student.config.hidden_size, teacher.config.hidden_size
        if directions is not None and len(directions) != large:  # ALBERT's, of a table narrower than its hidden states
            directions = None
        self.up = widen(small, large, directions)
        self.down = widen(large, small, None if directions is None else directions.T)

    def freeze_unread(self) -> None:
        """Freezes projections that no loss reads, so that no process waits for a gradient that never comes."""
        read = {"up"} if readers(unanswered(self.losses, stored=self.stored), "up") else set()
        for name, chosen in self.losses.items():
            if known := inspect.signature(LOSSES[name].function).parameters.get("direction"):
                read.add(chosen.arguments.get("direction", known.default))
        self.up.requires_grad_("up" in read)
        self.down.requires_grad_("down" in read)


class Distillation(TrainingTask):
    """Student and frozen teacher, each on its own segmentation of the same words."""

    dimensions: tuple[int, ...] = ()  # see `Forward`

    def __init__(self, stage, teacher, student, pairs, head=None, directions=None, shared=None, spelling=None, bank=()):
        """head: the student's, for masked-LM losses. directions: see `build_student`. shared, spelling: see `Forward`.
        bank: where sentence vectors are stored, some of them [K, D] and the map of `narrowing` [D, D_S]; the teacher
        then runs only for losses that read more. Raises InputError: vocabularies that such a loss finds too unlike."""
        super().__init__()
        self.losses, self.pairs, self.student, self.head = stage.losses, pairs, student, head
        self.stored = bool(bank)
        live = readers(unanswered(self.losses, stored=self.stored), "teacher")
        self.teacher = teacher.backbone.requires_grad_(False) if live else None
        across = readers(self.losses, "both vocabularies")
        self.teacher_head = teacher.head.requires_grad_(False) if across else None
        self.tables = {"masked_lm_match": shared, "masked_lm_reduce": spelling}
        buffers = {"shared": shared, "spelling": spelling}
        if bank:
            vectors, narrow = bank
            buffers |= {"bank": vectors, "narrow": narrow, "bank_narrow": F.normalize(vectors @ narrow, dim=-1)}
            buffers["spread"] = 1 - vectors.mean(0).square().sum()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)
        self.pools = teacher.modules
        self.project_hidden(student, teacher, directions)
        self.freeze_unread()
        for name in across:
            if not (self.tables[name] >= 0).any():
                raise InputError(f"losses.{name}: the vocabularies have no piece in common: leave this loss out")

    def view(self, batch: Batch) -> Forward:
        forward = self.both(batch, self.student, self.teacher)
        forward.dimensions = self.dimensions
        if self.stored:
            forward.teacher = forward.teacher or View(None, None)
            with torch.autocast(batch.vectors.device.type, enabled=False):
                forward.teacher.sentence = F.normalize(batch.vectors @ self.narrow, dim=-1)
            forward.bank, forward.spread = (self.bank, self.bank_narrow), self.spread
        forward.shared, forward.spelling = self.shared, self.spelling
        if self.head is not None:
            forward.student.predict = partial(self.head, table=self.student.get_input_embeddings().weight)
        if self.teacher_head is not None:
            forward.teacher.predict = partial(self.teacher_head, table=self.teacher.get_input_embeddings().weight)
        return forward


class TaskTraining(TrainingTask):
    """A task model on its own pieces and, where a loss reads it, a frozen fine-tuned teacher on the teacher's."""

    def __init__(self, model: nn.Module, kind: str, *, teacher=None, logits=None, directions=None, pools=None):
        """logits [rows, C]: the teacher's on the training rows, by row number. directions: see `build_student`."""
        super().__init__()
        self.student, self.kind, self.pools = model, kind, pools or self.pools
        self.teacher, self.up, self.down = None, nn.Identity(), nn.Identity()
        if teacher is not None:
            self.teacher = teacher.requires_grad_(False)
            self.project_hidden(model, teacher, directions)
        self.register_buffer("logits", logits, persistent=False)

    def begin(self, losses: Losses, pairs: Pairs) -> None:
        """Opens a phase, which starts where the one before ended: its losses, its layer map, and what they train."""
        self.losses, self.pairs = losses, pairs
        self.live = live_teacher(losses, stored=self.logits is not None)
        self.freeze_unread()
        body = {id(p) for name, p in self.student.base_model.named_parameters() if "pooler" not in name}
        head = bool(readers(losses, "task logits"))
        for parameter in self.student.parameters():
            parameter.requires_grad_(head or id(parameter) in body)

    def view(self, batch: Batch) -> Forward:
        forward = self.both(batch, self.student.base_model, self.teacher.base_model if self.live else None)
        for view, model in ((forward.student, self.student), (forward.teacher, self.teacher))[: 1 + self.live]:
            view.predict = partial(task_logits, model, kind=self.kind)
        if self.logits is not None and readers(self.losses, "teacher logits"):
            forward.teacher = forward.teacher or View(None, None)
            forward.teacher.logits = self.logits[batch.rows]
        return forward


def live_teacher(losses: Losses, *, stored: bool) -> bool:
    """Whether a phase with these losses runs the teacher; stored: its logits are at hand."""
    return bool(readers(losses, "teacher") or (readers(losses, "teacher logits") and not stored))


class MixedEmbedding(nn.Module):
    """Embeds combined ids [B, T] as [B, T, D_T]: below V_T by the teacher's table, else by the student's and a map."""

    def __init__(self, teacher_table: nn.Embedding, student_table: nn.Embedding, directions: Tensor | None):
        super().__init__()
        self.teacher_table, self.student_table = teacher_table, student_table
        self.up = widen(student_table.embedding_dim, teacher_table.embedding_dim, directions)

    def forward(self, ids: Tensor) -> Tensor:
        first = self.teacher_table.num_embeddings
        from_student = (ids >= first).unsqueeze(-1)
        student = self.up(self.student_table((ids - first).clamp_min(0)))
        return torch.where(from_student, student, self.teacher_table(ids.clamp_max(first - 1)))


class DualTraining(TrainingTask):
    """The teacher on mixed input and, in joint mode, the student beside it."""

    def __init__(self, stage, teacher, student, pairs, *, student_head=None, directions=None, table_directions=None):
        """student_head: for masked-LM losses in joint mode. directions, table_directions: see `student.Start`."""
        super().__init__()
        self.losses, self.pairs, self.mode = stage.losses, pairs, stage.mode
        self.teacher, self.student, self.pools = teacher.backbone, student, teacher.modules
        self.embedding = MixedEmbedding(teacher.table, student.get_input_embeddings(), table_directions)
        self.project_hidden(student, teacher, directions)
        if all(table_width(model.config) == model.config.hidden_size for model in (student, teacher)):
            self.up = self.embedding.up  # one map up of this width
        self.teacher_head, self.head = teacher.head, student_head
        self.student_bias = nn.Parameter(torch.zeros(student.config.vocab_size))  # of the teacher's second softmax
        ways = [way for way in ("down", "up") if f"parameters_{way}" in self.losses]
        self.projections = nn.ModuleDict({w: ParameterProjection(student, teacher.backbone, pairs, w) for w in ways})
        self.freeze_unread()
        for part in (self.up, self.down) if self.mode == "match" else ():  # both sides are the teacher
            part.requires_grad_(False)
        self.embedding.up.requires_grad_(True)
        # in match mode the teacher's own reading is the target and must stay
        reads_head = bool(readers(self.losses, "teacher head"))
        self.student_bias.requires_grad_(reads_head)
        for part in filter(None, (self.teacher, self.teacher_head)):
            part.requires_grad_(stage.train_teacher and reads_head)
        if self.head is not None:
            self.head.requires_grad_(bool(readers(self.losses, "student head")))
        self.needed = (*self.needed, ("teacher head",)) if self.mode == "joint" else ()
        self.tables = {"teacher_masked_lm": [teacher.table.num_embeddings, student.config.vocab_size]}
        if self.mode != "joint":
            self.student.requires_grad_(False).get_input_embeddings().requires_grad_(True)

    def view(self, batch: Batch) -> Forward:
        mixed = self.run(self.teacher, batch.mixed, batch, self.embedding(batch.mixed.ids))
        if self.mode == "match":
            with torch.no_grad():
                own = self.run(self.teacher, batch.teacher, batch)
            return Forward(batch, self.pairs, nn.Identity(), nn.Identity(), mixed, own)
        # only masked LM moves the teacher
        forward = Forward(batch, self.pairs, self.up, self.down, teacher=mixed.detached())
        if self.teacher_head is not None:
            forward.given["teacher_masked_lm"] = partial(self.masked_lm, batch, mixed)
        if self.mode == "joint":
            forward.student = self.run(self.student, batch.student, batch)
            forward.student.predict = partial(self.head, table=self.student.get_input_embeddings().weight)
        for direction, projection in self.projections.items():
            forward.given[f"parameters_{direction}"] = partial(projection, self.student, self.teacher)
        return forward

    def masked_lm(self, batch: Batch, mixed: View) -> Tensor:
        tables = [self.embedding.teacher_table.weight, self.embedding.up(self.embedding.student_table.weight)]
        return masked_lm_loss(batch, mixed, self.teacher_head, tables, [self.teacher_head.bias, self.student_bias])


class HeadTraining(TrainingTask):
    """Trains a masked-LM head on a teacher that has none, whose body stays as it is."""

    def __init__(self, teacher: Teacher, losses: Losses):
        super().__init__()
        self.losses, self.teacher, self.head = losses, teacher.backbone.requires_grad_(False), teacher.head
        self.needed, self.tables = (), {"teacher_masked_lm": [teacher.table.num_embeddings]}

    def embedding_parameters(self) -> list[nn.Parameter]:
        return []

    def view(self, batch: Batch) -> Forward:
        with torch.no_grad():
            view = self.run(self.teacher, batch.teacher, batch)
        table, forward = self.teacher.get_input_embeddings().weight, Forward(batch, (), nn.Identity(), nn.Identity())
        forward.given["teacher_masked_lm"] = partial(masked_lm_loss, batch, view, self.head, [table], [self.head.bias])
        return forward
