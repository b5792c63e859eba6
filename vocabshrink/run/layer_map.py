"""Which teacher layers does each student layer learn from.

A map is a tuple of pairs (student layer, block of teacher layers), indices into transformers' `hidden_states`, where 0
is the embedding output; of a block of several layers the mean is the target. What each promises about the last layers
is tested, because a peer's `all` map silently missed the last: `uniform`, `last`, `block_mean` and `last_only` end on
(last student layer, last teacher layer); `first` and `random` on the last student layer; `skip` leaves both out."""

from random import Random

from tokenizer_build.errors import InputError

Pairs = tuple[tuple[int, tuple[int, ...]], ...]


class SoftPairs(tuple):
    """Every pair of layers, student layer by student layer, for losses to weigh: what the map `emd` gives."""


LAYER_MAPS = {
    "uniform": "TinyBERT's g(m) = m · N / M, rounded up when M does not divide N; the last meets the last.",
    "last": "The teacher's top layers, in order (TinyBERT's \"top\").",
    "first": "The teacher's bottom layers, in order (TinyBERT's \"bottom\").",
    "last_only": "Only the last layers (MiniLM).",
    "skip": "Every k-th layer and no last one: the prediction speaks for it (patient KD's PKD-skip, {2, 4, 6, 8, 10}).",
    "random": "As many teacher layers as the student has, drawn without replacement (arXiv 2308.13958's random).",
    "block_mean": "The teacher cut into as many blocks as the student has layers, each up to its layer of `uniform`.",
    "emd": "All pairs, which each loss weighs at each step as the cheapest transport (BERT-EMD, Li et al. 2020).",
}


def named_pairs(name: str, student_layers: int, teacher_layers: int, seed: int) -> Pairs:
    """The pairs of one of LAYER_MAPS."""
    layers = range(1, student_layers + 1)
    even = [-(-m * teacher_layers // student_layers) for m in layers]
    chosen = {
        "uniform": even,
        "last": [m + teacher_layers - student_layers for m in layers],
        "first": layers,
        "skip": even[:-1],
        "random": sorted(Random(seed).sample(range(1, teacher_layers + 1), student_layers)),
    }
    if name in chosen:
        return tuple((m, (n,)) for m, n in enumerate(chosen[name], 1))
    if name == "last_only":
        return ((student_layers, (teacher_layers,)),)
    if name == "emd":
        return SoftPairs((m, (n,)) for m in layers for n in range(1, teacher_layers + 1))
    return tuple((m, tuple(range(begin + 1, end + 1))) for m, begin, end in zip(layers, [0, *even], even, strict=False))


def layer_pairs(layer_map: str | list, student_layers: int, teacher_layers: int, *, seed: int = 0) -> Pairs:
    """The pairs of a named map or of an explicit one: [[m, n], ...] or, for a block's mean, [[m, [n1, n2]], ...].
    Raises InputError: no pairs, a layer that a model lacks, a student deeper than its teacher."""
    if isinstance(layer_map, str):
        if student_layers > teacher_layers:
            what = f"the student has {student_layers} layers and the teacher only {teacher_layers}"
            raise InputError(f"layer_map: {what}: write explicit pairs or a shallower student")
        pairs = named_pairs(layer_map, student_layers, teacher_layers, seed)
    else:
        pairs = tuple((int(m), tuple(map(int, n)) if isinstance(n, list | tuple) else (int(n),)) for m, n in layer_map)
    if not pairs or not all(block for _, block in pairs):
        raise InputError(f"layer_map: {layer_map} gives a student layer no teacher layer, or no pair at all: name one")
    for m, n in ((m, n) for m, block in pairs for n in block):
        if not (0 <= m <= student_layers and 0 <= n <= teacher_layers):
            layers = f"the student's {student_layers} and the teacher's {teacher_layers} layers"
            raise InputError(f"layer_map: pair ({m}, {n}) is outside {layers} (0 is the embedding output)")
    return pairs
