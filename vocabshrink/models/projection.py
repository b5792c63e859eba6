"""Shared projections between the student's width and the teacher's, and principal directions to start them from.

They belong to the training task, never to the student, and are dropped after training (Zhao et al. 2019, section 3.3).
"""

import torch
from torch import Tensor, nn

from tokenizer_build.errors import InputError
from vocabshrink.run.layer_map import Pairs, SoftPairs


def principal_directions(table: Tensor, width: int) -> Tensor:
    """The `width` orthonormal directions [D, width] that keep most of the rows' energy.

    The table is not centred: the map must be linear so that its transpose leads back.
    """
    _, vectors = torch.linalg.eigh(table.float().T @ table.float())  # eigenvalues rise
    return vectors[:, -width:].flip(1).contiguous()


def widen(student_width: int, teacher_width: int, directions: Tensor | None = None) -> nn.Module:
    """Affine map up from the student's width to the teacher's; the identity where they are equal."""
    if student_width == teacher_width:
        return nn.Identity()
    up = nn.Linear(student_width, teacher_width)
    nn.init.zeros_(up.bias)
    if directions is None:
        nn.init.xavier_uniform_(up.weight)
    else:
        up.weight.data.copy_(directions)
    return up


class ParameterProjection(nn.Module):
    """Shared projections of model parameters, one pair per shape of variable.

    `down: MSE(U θ_t V, θ_s)`, `up: MSE(θ_t, U' θ_s V')` (Zhao et al. 2019, equations 1 and 2): every variable of the
    same pair of shapes shares U and V; vectors use one matrix. Variables are matched by the layer map and by name;
    embedding tables are left out, since the vocabularies differ (positions and types are matched).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Pairs, direction: str):
        super().__init__()
        self.direction = direction
        self.matched = match_parameters(student, teacher, pairs)
        if not self.matched:
            raise InputError("losses: parameter projections need teacher and student of one architecture (BERT)")
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))

        for key, source, target in self.moves(student, teacher):
            if key not in self.left:
                self.left[key] = matrix(len(target), len(source))
                if source.ndim == 2:
                    self.right[key] = matrix(source.shape[1], target.shape[1])

    def moves(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """(name of the pair of shapes, variable to project, variable to meet) for all that is matched."""
        small, large = dict(student.named_parameters()), dict(teacher.named_parameters())
        sides = [(small[ours], large[theirs]) for ours, theirs in self.matched]
        if self.direction == "down":
            sides = [(theirs, ours) for ours, theirs in sides]
        return [("_to_".join("x".join(map(str, v.shape)) for v in side), *side) for side in sides]

    def forward(self, student: nn.Module, teacher: nn.Module) -> Tensor:
        """The mean over matched variables of the squared error after projection, a scalar."""
        total = torch.zeros((), device=next(iter(self.left.values())).device)
        for key, source, target in self.moves(student, teacher):
            moved = self.left[key] @ source
            if source.ndim == 2:
                moved = moved @ self.right[key]
            total = total + (moved - target).float().pow(2).mean()
        return total / len(self.matched)


def layer_and_tail(name: str) -> tuple[int | None, str]:
    """A BERT parameter's layer, 0-based, and its name there: (3, "output.dense.bias"); (None, name) outside layers."""
    if not name.startswith("encoder.layer."):
        return None, name
    number, _, tail = name.removeprefix("encoder.layer.").partition(".")
    return int(number), tail


def match_parameters(student: nn.Module, teacher: nn.Module, pairs: Pairs) -> list[tuple[str, str]]:
    """(student name, teacher name) of the variables of one role: layers by the map (1-based), the rest by name.

    Parameters have no mean that does anything, so of a block the last layer counts, whose output the block's is. Raises
    InputError for the map `emd`, which matches every layer with every other.
    """
    if isinstance(pairs, SoftPairs):
        raise InputError("layer_map: emd has no one teacher layer for parameter projections: choose another map")
    theirs = dict(teacher.named_parameters())
    layer_of = {m - 1: block[-1] - 1 for m, block in pairs if m > 0 and block[-1] > 0}
    matched = []
    for name, parameter in student.named_parameters():
        layer, tail = layer_and_tail(name)
        if "word_embeddings" in name or (layer is not None and layer not in layer_of):
            continue
        other = name if layer is None else f"encoder.layer.{layer_of[layer]}.{tail}"
        if other in theirs and theirs[other].ndim == parameter.ndim <= 2:
            matched.append((name, other))
    return matched
