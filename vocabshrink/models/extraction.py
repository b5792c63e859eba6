"""Extraction: a student cut out of the teacher's own layers (Chen et al. 2021, Extract-then-Distill).

Kept are some heads of every layer, some dimensions of every head (one choice for queries and keys, which meet in a
product, and one for values), some feed-forward neurons, and for the whole model one choice of hidden dimensions,
because the residual stream is one. With nothing cut the student is the teacher exactly, which a test holds. Where heads
are cut inside, a score is a sum of d_S products instead of d_T, divided by sqrt(d_S) instead of sqrt(d_T), so queries
are multiplied by sqrt(d_T / d_S) to keep its size.

What is kept is drawn at random or judged by one forward pass; gradients are not used. Spearman correlation on 300
pairs of STS-B before any training, all-MiniLM-L6-v2 cut by importance to width 192 and 96 with 12 heads: 0.868, 0.750;
unscaled 0.861, 0.717; the teacher 0.933; piece means in a random body 192 wide 0.60.
"""

import torch
from torch import Tensor
from transformers import BertConfig

from tokenizer_build.errors import InputError
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import hooked
from vocabshrink.models.loading import meta_model
from vocabshrink.models.teacher import Teacher

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
    """Judges from the configs alone whether a student can be cut out of a teacher, whose config is `theirs`.

    Raises InputError for a teacher with other layers than BERT's and for a shape that is not inside its own.
    """
    names = dict(meta_model(theirs).named_parameters())
    # ELECTRA's table may be narrower than its layers, so that no choice of dimensions fits both
    if "encoder.layer.0.attention.self.query.weight" not in names or "embeddings_project.weight" in names:
        other = f"a {theirs.model_type} teacher does not have BERT's layers"
        raise InputError(f"student.initialize {how}: {other}: choose teacher or random")
    shapes = [
        {name: getattr(shape, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
        | {"hidden_size / num_attention_heads": head_size(shape)}
        for shape in (config, theirs)
    ]
    for (name, small), large in zip(shapes[0].items(), shapes[1].values(), strict=True):
        if small > large:
            excess = f"student.{name} {small} is over the teacher's {large}"
            raise InputError(f"student.initialize {how}: {excess}: extraction only leaves out: choose at most that")


@torch.no_grad()
def scores_of(teacher: Teacher, how: str, batch: Pieces | None, seed: int) -> dict:
    """A number for everything that can be kept: random by `seed`, or its importance in one pass over `batch`.

    Importance is what a part adds to the output, averaged over real positions, as activations tell it without gradients
    (Muralidharan et al. 2024, Minitron, arXiv 2407.14679): a head by the norm of its share of the attention output; a
    value dimension and a feed-forward neuron by mean |activation| times the norm of its outgoing weights; a dimension
    of queries and keys by the product of their mean |activation|; a hidden dimension by its mean |value| over all
    hidden states.

    Returns: {"dims": [D], "layers": [{"heads": [h], "queries": [h, D / h], "values": [h, D / h], "neurons": [F]}]}.
    """
    config, layers = teacher.config, teacher.backbone.encoder.layer
    heads = config.num_attention_heads
    if how == "extract_random":
        generator, inside = torch.Generator().manual_seed(seed), (heads, head_size(config))
        shapes = {"heads": (heads,), "queries": inside, "values": inside, "neurons": (config.intermediate_size,)}
        dims = torch.rand(config.hidden_size, generator=generator)
        draws = [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in layers]
        return {"dims": dims, "layers": draws}
    ids, mask = batch.ids, batch.attention_mask

    def mean_size(state: Tensor) -> Tensor:  # [B, T, n] -> [n]
        return state[mask.bool()].float().abs().mean(0)

    with (
        hooked(layer.attention.self.query for layer in layers) as queries,
        hooked(layer.attention.self.key for layer in layers) as keys,
        hooked((layer.attention.output.dense for layer in layers), inputs=True) as contexts,
        hooked((layer.output.dense for layer in layers), inputs=True) as neurons,
    ):
        states = teacher.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    scores = []
    for layer, query, key, context, neuron in zip(layers, queries, keys, contexts, neurons, strict=True):
        outgoing = layer.attention.output.dense.weight.float().unflatten(1, (heads, -1))  # [D, h, d]
        parts = context[mask.bool()].float().unflatten(1, (heads, -1))  # [n, h, d]
        shares = [(parts[:, h] @ outgoing[:, h].T).norm(dim=-1).mean() for h in range(heads)]  # of [n, D]
        scores.append(
            {
                "heads": torch.stack(shares),
                "queries": (mean_size(query) * mean_size(key)).unflatten(0, (heads, -1)),
                "values": parts.abs().mean(0) * outgoing.norm(dim=0),
                "neurons": mean_size(neuron) * layer.output.dense.weight.float().norm(dim=0),
            }
        )
    return {"dims": torch.stack([mean_size(state) for state in states]).mean(0), "layers": scores}


def keep(scores: dict, config: BertConfig) -> dict:
    """The indices of the highest scores, as many as the student's shape has, in rising order.

    Returns: {"dims": [D_S], "layers": [{"queries": [D_S], "values": [D_S], "neurons": [F_S]}, ...], "scale": of the
    queries}, where queries and values are numbered through all heads, as rows of their matrices are.
    """

    def highest(values: Tensor, count: int) -> Tensor:
        return values.topk(count, dim=-1).indices.sort(dim=-1).values

    size, whole, layers = head_size(config), scores["layers"][0]["values"].shape[1], []
    for found in scores["layers"]:
        heads = highest(found["heads"], config.num_attention_heads)
        inside = {
            name: (heads.unsqueeze(1) * whole + highest(found[name][heads], size)).flatten()
            for name in ("queries", "values")
        }
        layers.append(inside | {"neurons": highest(found["neurons"], config.intermediate_size)})
    return {"dims": highest(scores["dims"], config.hidden_size), "layers": layers, "scale": (whole / size) ** 0.5}


def cut(kept: dict, layer: int | None, name: str, value: Tensor) -> Tensor:
    """What `kept` leaves of a variable [rows, columns] or [rows] of a layer (0-based), or of a table [n, D]."""
    choice = {"dims": kept["dims"]} | ({} if layer is None else kept["layers"][layer])
    rows, columns = CUTS.get(name.rpartition(".")[0], ("dims", "dims"))
    if name.startswith("embeddings.") and value.ndim == 2:
        return value[:, choice["dims"]]
    value = value[choice[rows]] if value.ndim == 1 else value[choice[rows]][:, choice[columns]]
    return value * kept["scale"] if name.startswith("attention.self.query") else value
