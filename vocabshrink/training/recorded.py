"""What a teacher said of each batch, kept on disk, so that many students of the same text need it said once.

A batch is a function of its number, and a frozen teacher always answers it alike: runs that differ in the student, the
layer map or the weights of their losses, as a search's candidates do, can share the answers. Kept are the states of
units (batches.py), in float16, and the sentence embedding: 2 D bytes a unit and layer (0.75 KB for a width of 384; with
attention three times that, 28 KB a word for twelve layers). A teacher twelve times the student's size is then a file to
read: a step of a 4 x 192 student costs what it costs without a teacher.

Not kept is what losses read piece by piece: attention distributions and masked words.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing
from vocabshrink.data.batches import Batch, Batcher
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import Pass
from vocabshrink.training.distillation import Distillation
from vocabshrink.training.losses import ATTENTION, readers
from vocabshrink.training.views import View


def kinds_kept(losses: Iterable[str]) -> list[str]:
    """The kinds of states, fields of `Pass`, that are kept for these losses."""
    return [kind for kind in ("hidden", *ATTENTION) if readers(losses, kind)]


@dataclass(frozen=True)
class Kept:
    """One kind of a teacher's states in a file, [B, U, D] float32 by layer, read when a loss asks for it."""

    path: Path
    kind: str
    device: torch.device

    def __getitem__(self, layer: int) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(f"{self.kind}.{layer}").to(self.device).float()


class RecordingBatcher:
    """Batches of the student's side, with the teacher's `View` of units in `batch.recorded`.

    The teacher runs where a batch has no file yet. Files are whole or not there, so that several processes may fill one
    folder.
    """

    def __init__(self, batcher: Batcher, task: Distillation, folder: Path, precision: str):
        """folder: of this teacher, this text and these batches alone. precision: of the stage.

        Raises InputError: a loss that reads what is not kept.
        """
        if refused := readers(task.losses, "pieces"):
            raise InputError(
                f"losses.{refused[0]} reads the teacher piece by piece, and record_teacher keeps units: leave one of "
                "the two out"
            )
        self.batcher, self.task, self.folder, self.precision = batcher, task, folder, precision

    def batch(self, index: int) -> Batch:
        """The index-th batch, after the teacher has read it, now or before."""
        path, batch = self.folder / f"{index}.safetensors", self.batcher.batch(index)
        device = next(self.task.teacher.parameters()).device
        if not path.is_file():
            self._record(batch.to(device), path)
        units = batch.unit_mask.shape[1]
        row = torch.arange(units).expand(len(batch.unit_mask), units)
        side = Pieces(row, torch.ones_like(row), row).to(device)  # every unit is one piece
        kept = {kind: Kept(path, kind, device) for kind in kinds_kept(self.task.losses)}
        heads = self.task.teacher.config.num_attention_heads
        view = View(side, Pass(**{"hidden": ()} | kept), unit_count=units, heads=heads)
        with safe_open(path, framework="pt") as file:
            view.sentence = file.get_tensor("sentence").to(device)
        batch.teacher, batch.recorded = None, view
        return batch

    @torch.no_grad()
    def _record(self, batch: Batch, path: Path) -> None:
        # made in the thread that makes batches, which has no autocast of its own
        with torch.autocast(batch.unit_mask.device.type, torch.bfloat16, enabled=self.precision != "no"):
            view = self.task.run(self.task.teacher, batch.teacher, batch)
        tensors = {
            f"{kind}.{layer}": view.pooled(states).half().cpu()
            for kind in kinds_kept(self.task.losses)
            for layer, states in enumerate(getattr(view.passed, kind))
        }
        with replacing(path) as temporary:
            save_file(tensors | {"sentence": view.sentence.cpu()}, temporary)
