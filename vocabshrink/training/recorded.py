"""What a teacher said of each batch, kept on disk, so that many students of the same text need it said once.

A batch is a function of its number, and a teacher that does not learn answers it alike each time: runs that differ in
the student, the layer map or the weights of their losses, as a search's candidates do, can share the answers. Kept are
the states of units (batches.py), float16, and the sentence embedding: what losses between units read, at 2 D bytes a
unit and layer (0.75 KB for a width of 384; with attention three times that, 28 KB a word for twelve layers). A teacher
twelve times the student's size is then a file to read: a step of a 4 x 192 student costs what it costs without one.

Not kept: what losses read piece by piece, that is attention distributions and masked words (`NOT_KEPT`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from tokenizer_build.files import replacing
from vocabshrink.data.batches import Batch, Batcher
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import Pass
from vocabshrink.run.recipe import DistillStage
from vocabshrink.training.losses import ACROSS_VOCABULARIES, LAYERWISE
from vocabshrink.training.task import run_view
from vocabshrink.training.views import View

NOT_KEPT = {"attention_kl"} | ACROSS_VOCABULARIES
# kind of states -> the losses that read it
READ_BY = {
    "hidden": LAYERWISE,
    "queries": {"attention_scores", "query_relations"},
    "keys": {"attention_scores", "key_relations"},
    "values": {"value_relations"},
}


def kinds_kept(losses: Iterable[str]) -> list[str]:
    """The kinds of states that are kept for these losses."""
    return [kind for kind, readers in READ_BY.items() if readers & set(losses)]


@dataclass(frozen=True)
class Kept(Sequence):
    """One kind of a teacher's states in a file, [B, U, D] float32 by layer, read when a loss asks for it."""

    path: Path
    kind: str
    layers: int
    device: torch.device

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, layer: int) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(f"{self.kind}.{range(self.layers)[layer]}").to(self.device).float()


class RecordingBatcher:
    """Batches of the student's side, with the teacher's `View` of units in `batch.recorded`.

    The teacher runs where a batch has no file yet. Files are whole or not there, so that several processes may fill one
    folder.
    """

    def __init__(
        self,
        batcher: Batcher,
        teacher: nn.Module,
        folder: Path,
        stage: DistillStage,
        *,
        pooling: str,
        normalize: bool,
        device: torch.device,
    ):
        """teacher: the backbone, frozen, on `device`. folder: of this teacher, this text and these batches alone.

        Raises:
            InputError: a loss that reads what is not kept.
        """
        if refused := NOT_KEPT & set(stage.losses):
            raise InputError(
                f"distill.losses.{min(refused)} reads the teacher piece by piece, and record_teacher keeps units: "
                "leave one of the two out"
            )
        self.batcher, self.teacher, self.folder, self.stage = batcher, teacher.eval(), folder, stage
        self.pooling, self.normalize, self.device = pooling, normalize, device
        self.heads, layers = teacher.config.num_attention_heads, teacher.config.num_hidden_layers
        self.kinds = {kind: layers + (kind == "hidden") for kind in kinds_kept(stage.losses)}

    def batch(self, index: int) -> Batch:
        """The index-th batch, after the teacher has read it, now or before."""
        path, batch = self.folder / f"{index}.safetensors", self.batcher.batch(index)
        if not path.is_file():
            self._record(batch.to(self.device), path)
        units = batch.unit_mask.shape[1]
        row = torch.arange(units).expand(len(batch.unit_mask), units)
        side = Pieces(row, torch.ones_like(row), row)  # every unit one piece
        kept = {kind: Kept(path, kind, count, self.device) for kind, count in self.kinds.items()}
        states = Pass(**{"hidden": ()} | kept)
        view = View(side.to(self.device), states, self.pooling, self.normalize, units, self.heads)
        with safe_open(path, framework="pt") as file:
            view.sentence = file.get_tensor("sentence").to(self.device)
        batch.teacher, batch.recorded = None, view
        return batch

    @torch.no_grad()
    def _record(self, batch: Batch, path: Path) -> None:
        # made in the thread that makes batches, which has no autocast of its own
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.precision != "no"):
            common = (batch.unit_mask.shape[1], self.pooling, self.normalize, self.stage.losses)
            view = run_view(self.teacher, batch.teacher, *common)
            tensors = {
                f"{kind}.{layer}": view.pooled(getattr(view.passed, kind)[layer]).half().cpu()
                for kind, count in self.kinds.items()
                for layer in range(count)
            }
            tensors["sentence"] = view.sentence.cpu()
        with replacing(path) as temporary:
            save_file(tensors, temporary)
