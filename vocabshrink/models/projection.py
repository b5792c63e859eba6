"""Between the teacher's width and the student's: extraction, least squares, principal directions, shared projections.
Extraction cuts a student out of the teacher's own layers (Chen et al. 2021, Extract-then-Distill): some heads of every
layer, some dimensions of every head (one choice for queries and keys, which meet in a product, and one for values),
some feed-forward neurons, and one choice of hidden dimensions, because the residual stream is one. Where heads are cut
inside, queries are multiplied by sqrt(d_T / d_S): scores are sums of d_S products divided by sqrt(d_S). Spearman on 300
pairs of STS-B before training, all-MiniLM-L6-v2 cut by importance to width 192: 0.868, unscaled 0.861."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from tokenizer_build.errors import InputError
from vocabshrink.data.batches import Batch, Pieces
from vocabshrink.models.families import LAYERS, PARTS, as_bert, layer_modules, neurons_of, table_width
from vocabshrink.models.forward import hooked, pool_units
from vocabshrink.models.teacher import Teacher
from vocabshrink.run.layer_map import Pairs, SoftPairs

OUTPUTS = ("attention.output", "output")  # where a layer adds to the residual stream, and normalises it
RIDGE = 1e-3  # of the mean square of what the matrix reads


def principal_directions(table: Tensor, width: int) -> Tensor:
    """The `width` orthonormal directions [D, width] that keep most of the rows' energy about zero (not centred)."""
    _, vectors = torch.linalg.eigh(table.float().T @ table.float())  # eigenvalues rise
    return vectors[:, -width:].flip(1).contiguous()


def narrowing(teacher: Tensor, student: Tensor) -> Tensor:
    """The map [D, D_S] under which teacher vectors [N, D] keep their products best in the student's width, turned onto
    the student's own vectors [n, D_S] of the first n sentences: principal directions (or, in a wider student, D filled
    dimensions), then the rotation of least squares (orthogonal Procrustes, Schönemann 1966)."""
    width, whole = student.shape[1], teacher.shape[1]
    directions = principal_directions(teacher, width) if width < whole else torch.eye(whole, width)
    left, _, right = torch.linalg.svd((teacher[: len(student)] @ directions).T @ student.float())
    return directions @ (left @ right)


def widen(student_width: int, teacher_width: int, directions: Tensor | None = None) -> nn.Module:
    """Affine map up from the student's width to the teacher's; the identity where they are equal."""
    if student_width == teacher_width:
        return nn.Identity()
    up = nn.Linear(student_width, teacher_width)
    nn.init.zeros_(up.bias)
    nn.init.xavier_uniform_(up.weight) if directions is None else up.weight.data.copy_(directions)
    return up


class ParameterProjection(nn.Module):
    """Shared projections of model parameters, one pair per shape of variable; vectors use one matrix. They are dropped
    after training. `down: MSE(U θ_t V, θ_s)`, `up: MSE(θ_t, U' θ_s V')` (Zhao et al. 2019, equations 1 and 2)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Pairs, direction: str):
        super().__init__()
        self.direction, self.matched = direction, match_parameters(student, teacher, pairs)
        if not self.matched:
            raise InputError("losses: parameter projections need teacher and student of one architecture (BERT)")
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for key, source, target in self.moves(student, teacher):
            if key not in self.left:
                self.left[key] = nn.init.xavier_uniform_(torch.empty(len(target), len(source)))
                if source.ndim == 2:
                    self.right[key] = nn.init.xavier_uniform_(torch.empty(source.shape[1], target.shape[1]))

    def moves(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """(name of the pair of shapes, variable to project, variable to meet) for all that is matched."""
        small, large = dict(student.named_parameters()), as_bert(teacher)
        sides = [(small[ours], large[theirs]) for ours, theirs in self.matched]
        sides = [side[::-1] for side in sides] if self.direction == "down" else sides
        return [("_to_".join("x".join(map(str, v.shape)) for v in side), *side) for side in sides]

    def forward(self, student: nn.Module, teacher: nn.Module) -> Tensor:
        """The mean over matched variables of the squared error after projection, a scalar."""
        errors = []
        for key, source, target in self.moves(student, teacher):
            moved = self.left[key] @ source
            moved = moved @ self.right[key] if source.ndim == 2 else moved
            errors.append((moved - target).float().pow(2).mean())
        return sum(errors) / len(errors)


def layer_and_tail(name: str) -> tuple[int | None, str]:
    """A BERT parameter's layer, 0-based, and its name there: (3, "output.dense.bias"); (None, name) outside layers."""
    number, _, tail = name.removeprefix("encoder.layer.").partition(".")
    return (int(number), tail) if number.isdigit() else (None, name)


def match_parameters(student: nn.Module, teacher: nn.Module, pairs: Pairs) -> list[tuple[str, str]]:
    """(student name, teacher's name in `as_bert`) of the variables of one role: layers by the map (of a block the
    last), the rest by name, without piece tables. Raises InputError for the map `emd`."""
    if isinstance(pairs, SoftPairs):
        raise InputError("layer_map: emd has no one teacher layer for parameter projections: choose another map")
    theirs = as_bert(teacher)
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


CUTS = {  # variable -> which choice cuts its rows, and its columns
    "attention.self.query": ("queries", "dims"),
    "attention.self.key": ("queries", "dims"),
    "attention.self.value": ("values", "dims"),
    "attention.output.dense": ("dims", "values"),
    "intermediate.dense": ("neurons", "dims"),
    "output.dense": ("dims", "neurons"),
}


def head_size(config) -> int:
    return config.hidden_size // config.num_attention_heads


def check_extraction(how: str, config: BertConfig, theirs) -> None:
    """Raises InputError for a teacher (config `theirs`) with other layers than BERT's or smaller than the student."""
    # where the table is narrower than the layers, no choice of dimensions fits both
    if theirs.model_type not in LAYERS or theirs.model_type == "albert" or table_width(theirs) != theirs.hidden_size:
        other = f"student.initialize {how}: a {theirs.model_type} teacher does not have BERT's layers"
        raise InputError(f"{other}: choose teacher or random")
    sizes = {name: (getattr(config, name), getattr(theirs, name)) for name in ("hidden_size", "num_attention_heads")}
    sizes["intermediate_size"] = (config.intermediate_size, neurons_of(theirs))
    sizes["hidden_size / num_attention_heads"] = (head_size(config), head_size(theirs))
    for name, (small, large) in sizes.items():
        if small > large:
            excess = f"student.{name} {small} is over the teacher's {large}"
            raise InputError(f"student.initialize {how}: {excess}: extraction only leaves out: choose at most that")


@torch.no_grad()
def scores_of(teacher: Teacher, how: str, batch: Pieces | None, seed: int) -> dict:
    """A number for everything that can be kept: random by `seed`, or its importance in one pass over `batch`, as
    activations tell it (Muralidharan et al. 2024, Minitron, arXiv 2407.14679): of a head the norm of its share of the
    attention output; of a value dimension and a neuron mean |activation| times the norm of its outgoing weights; of a
    dimension of queries and keys the product of their mean |activation|; of a hidden dimension its mean |value|.
    Returns: {"dims": [D], "layers": [{"heads": [h], "queries": [h, D / h], "values": [h, D / h], "neurons": [F]}]}."""
    config, heads = teacher.config, teacher.config.num_attention_heads
    if how == "extract_random":
        generator, inside = torch.Generator().manual_seed(seed), (heads, head_size(config))
        shapes = {"heads": (heads,), "queries": inside, "values": inside, "neurons": (neurons_of(config),)}
        dims, layers = torch.rand(config.hidden_size, generator=generator), range(config.num_hidden_layers)
        draws = [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in layers]
        return {"dims": dims, "layers": draws}
    modules, mask = {part: list(layer_modules(teacher.backbone, part)) for part in PARTS}, batch.attention_mask

    def mean_size(state: Tensor) -> Tensor:  # [B, T, n] -> [n]
        return state[mask.bool()].float().abs().mean(0)

    with (
        hooked(modules["attention.self.query"]) as queries,
        hooked(modules["attention.self.key"]) as keys,
        hooked(modules["attention.output.dense"], inputs=True) as contexts,
        hooked(modules["output.dense"], inputs=True) as neurons,
    ):
        states = teacher.backbone(input_ids=batch.ids, attention_mask=mask, output_hidden_states=True).hidden_states
    scores, outputs = [], (modules["attention.output.dense"], modules["output.dense"])
    for *out, query, key, context, neuron in zip(*outputs, queries, keys, contexts, neurons, strict=True):
        outgoing = out[0].weight.float().unflatten(1, (heads, -1))  # [D, h, d]
        parts = context[mask.bool()].float().unflatten(1, (heads, -1))  # [n, h, d]
        shares = [(parts[:, h] @ outgoing[:, h].T).norm(dim=-1).mean() for h in range(heads)]  # of [n, D]
        layer = {"heads": torch.stack(shares), "values": parts.abs().mean(0) * outgoing.norm(dim=0)}
        layer["queries"] = (mean_size(query) * mean_size(key)).unflatten(0, (heads, -1))
        scores.append(layer | {"neurons": mean_size(neuron) * out[1].weight.float().norm(dim=0)})
    return {"dims": torch.stack([mean_size(state) for state in states]).mean(0), "layers": scores}


def keep(scores: dict, config: BertConfig) -> dict:
    """The indices of the highest scores, as many as the student's shape has, rising: {"dims": [D_S], "layers":
    [{"queries": [D_S], "values": [D_S], "neurons": [F_S]}], "scale": of the queries}; queries and values are rows."""

    def highest(values: Tensor, count: int) -> Tensor:
        return values.topk(count, dim=-1).indices.sort(dim=-1).values

    size, whole, layers = head_size(config), scores["layers"][0]["values"].shape[1], []
    for found in scores["layers"]:
        heads = highest(found["heads"], config.num_attention_heads)
        layer = {"neurons": highest(found["neurons"], config.intermediate_size)}
        for name in ("queries", "values"):
            layer[name] = (heads.unsqueeze(1) * whole + highest(found[name][heads], size)).flatten()
        layers.append(layer)
    return {"dims": highest(scores["dims"], config.hidden_size), "layers": layers, "scale": (whole / size) ** 0.5}


def cut(kept: dict, layer: int | None, name: str, value: Tensor) -> Tensor:
    """What `kept` leaves of a layer's variable [rows, columns] or [rows], or of a table [n, D]."""
    choice = {"dims": kept["dims"]} | ({} if layer is None else kept["layers"][layer])
    rows, columns = CUTS.get(name.rpartition(".")[0], ("dims", "dims"))
    if name.startswith("embeddings.") and value.ndim == 2:
        return value[:, choice["dims"]]
    value = value[choice[rows]] if value.ndim == 1 else value[choice[rows]][:, choice[columns]]
    return value * kept["scale"] if name.startswith("attention.self.query") else value


@torch.no_grad()
def fit_layers(
    student: nn.Module, source: nn.Module, layers: dict[int, int], batches: list[Batch], directions: Tensor | None
) -> None:
    """Changes the output matrices of the student's layers, from the first on, so that its residual stream comes as near
    as a linear map can bring it to that of the layers which they were cut out of (least squares of reconstruction, each
    layer on what the fitted ones before it give: He et al. 2017, arXiv 1707.06168, section 3), unit by unit.

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
