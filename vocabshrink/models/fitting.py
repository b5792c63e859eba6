"""The closed form of distillation: before any training, least squares on the student's layers."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocabshrink.data.batches import Batch
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.families import layer_modules
from vocabshrink.models.forward import hooked, pool_units

OUTPUTS = ("attention.output", "output")  # where a layer adds to the residual stream, and normalises it
RIDGE = 1e-3  # of the mean square of what the matrix reads


@torch.no_grad()
def fit_layers(
    student: nn.Module, source: nn.Module, layers: dict[int, int], batches: list[Batch], directions: Tensor | None
) -> None:
    """Changes the output matrices of the student's layers, from the first on, so that its residual stream comes as near
    as a linear map can bring it to that of the layers which they were cut out of: what was kept makes up for the heads,
    neurons and layers that were not (least squares of reconstruction, one layer after the other on what the fitted ones
    before it give: He et al. 2017, arXiv 1707.06168, section 3). Units are compared, so vocabularies may differ.

    layers: {student's layer: source's}, 0-based, of a family in LAYERS. batches: with the source's pieces as `teacher`.
    directions [D, D_S]: from the source's width to the student's; None: of equal widths."""
    norms = dict.fromkeys(norm for part in OUTPUTS for norm in layer_modules(source, f"{part}.LayerNorm"))
    targets = []
    for batch in batches:
        found = read_by(norms, source, batch, batch.teacher)  # two a layer, also where all layers are one module
        wanted = {2 * other + place for other in layers.values() for place in range(2)}
        states = {number: found[number] if directions is None else found[number] @ directions for number in wanted}
        targets.append({number: state.half() for number, state in states.items()})
    for number, other in sorted(layers.items()):
        for place, part in enumerate(OUTPUTS):
            module = student.get_submodule(f"encoder.layer.{number}.{part}")
            squares = products = 0.0
            for batch, target in zip(batches, targets, strict=True):
                read, stream = read_by((module.dense, module.LayerNorm), student, batch, batch.student)
                read = F.pad(read, (0, 1), value=1.0)  # [n, F + 1]: the last is the bias's
                left = target[2 * other + place].float() - stream
                squares, products = squares + read.T @ read, products + read.T @ left
            squares = squares.double() + torch.eye(len(squares)) * RIDGE * squares.diagonal().mean()
            change = torch.linalg.solve(squares, products.double()).float()
            module.dense.weight += change[:-1].T
            module.dense.bias += change[-1]


def read_by(modules: Iterable[nn.Module], backbone: nn.Module, batch: Batch, side: Pieces) -> list[Tensor]:
    """What the modules read in a pass over one side, as means of the batch's units that count, [n, D] float32 each."""
    with hooked(modules, inputs=True) as found, torch.autocast(side.ids.device.type, torch.bfloat16):
        backbone(input_ids=side.ids, attention_mask=side.attention_mask)
    count = batch.unit_mask.shape[1]
    return [pool_units(state, side.units, count).flatten(0, 1)[batch.counted] for state in found]
