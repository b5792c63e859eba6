"""Shared projections between the student's width and the teacher's, and principal directions to start them from.

They belong to the training task, never to the student, and are dropped after training (Zhao et al. 2019, section 3.3).
"""

import torch
from torch import nn

from tokenizer_build.errors import InputError
from vocabshrink.run.layer_map import Pairs, SoftPairs


def principal_directions(table: torch.Tensor, width: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The `width` orthonormal directions [D, width] that keep most of the rows' energy, each row weighted.

    The table is not centred: the map must be linear so that its transpose leads back.
    """
    rows = table.float() if weights is None else table.float() * weights.float().sqrt().unsqueeze(1)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # eigenvalues rise
    return vectors[:, -width:].flip(1).contiguous()


def widen(student_width: int, teacher_width: int, directions: torch.Tensor | None = None) -> nn.Module:
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
        teacher_parameters, student_parameters = dict(teacher.named_parameters()), dict(student.named_parameters())
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for student_name, teacher_name in self.matched:
            small, large = student_parameters[student_name].shape, teacher_parameters[teacher_name].shape
            source, target = (large, small) if direction == "down" else (small, large)
            key = shape_key(source, target)
            if key not in self.left:
                self.left[key] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(target[0], source[0])))
                if len(source) == 2:
                    self.right[key] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(source[1], target[1])))

    def forward(self, student: nn.Module, teacher: nn.Module) -> torch.Tensor:
        """The mean over matched variables of the squared error after projection, a scalar."""
        teacher_parameters, student_parameters = dict(teacher.named_parameters()), dict(student.named_parameters())
        total = torch.zeros((), device=next(iter(self.left.values())).device)
        for student_name, teacher_name in self.matched:
            small, large = student_parameters[student_name], teacher_parameters[teacher_name]
            source, target = (large, small) if self.direction == "down" else (small, large)
            key = shape_key(source.shape, target.shape)
            moved = self.left[key] @ source
            if source.ndim == 2:
                moved = moved @ self.right[key]
            total = total + (moved - target).float().pow(2).mean()
        return total / len(self.matched)


def shape_key(source, target) -> str:
    return "x".join(map(str, source)) + "_to_" + "x".join(map(str, target))


def match_parameters(student: nn.Module, teacher: nn.Module, pairs: Pairs) -> list[tuple[str, str]]:
    """(student name, teacher name) of the variables of one role: layers by the map (1-based), the rest by name.

    Parameters have no mean that does anything, so of a block the last layer counts, whose output the block's is.

    Raises:
        InputError: the map `emd`, which matches every layer with every other.
    """
    if isinstance(pairs, SoftPairs):
        raise InputError("layer_map: emd has no one teacher layer for parameter projections: choose another map")
    teacher_names = {name: p for name, p in teacher.named_parameters()}
    layer_of = {m - 1: block[-1] - 1 for m, block in pairs if m > 0 and block[-1] > 0}
    matched = []
    for name, parameter in student.named_parameters():
        if "word_embeddings" in name:
            continue
        other = name
        if ".layer." in name:
            head, rest = name.split(".layer.", 1)
            number, tail = rest.split(".", 1)
            if int(number) not in layer_of:
                continue
            other = f"{head}.layer.{layer_of[int(number)]}.{tail}"
        if other in teacher_names and teacher_names[other].ndim == parameter.ndim and parameter.ndim <= 2:
            matched.append((name, other))
    return matched
