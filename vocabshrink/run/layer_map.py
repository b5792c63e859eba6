"""Which teacher layers does each student layer learn from.

A map is a tuple of pairs (student layer, block of teacher layers), indices into transformers' `hidden_states`, where 0
is the embedding output; of a block of several layers the mean is the target. What each promises about the last layers
is tested, because a peer's `all` map silently missed the last: `uniform`, `last`, `block_mean` and `last_only` end on
(last student layer, last teacher layer); `first` and `random` on the last student layer; `skip` leaves both out.
"""

from random import Random

from tokenizer_build.errors import InputError

Pairs = tuple[tuple[int, tuple[int, ...]], ...]


class SoftPairs(tuple):
    """Every pair of layers, student layer by student layer, for losses to weigh: what the map `emd` gives."""


def uniform(student_layers: int, teacher_layers: int) -> Pairs:
    """TinyBERT's g(m) = m · N / M, rounded up when M does not divide N; the last meets the last."""
    return tuple((m, (-(-m * teacher_layers // student_layers),)) for m in range(1, student_layers + 1))


def last(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's top layers, in order (TinyBERT's "top")."""
    return tuple((m, (m + teacher_layers - student_layers,)) for m in range(1, student_layers + 1))


def first(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's bottom layers, in order (TinyBERT's "bottom")."""
    return tuple((m, (m,)) for m in range(1, student_layers + 1))


def last_only(student_layers: int, teacher_layers: int) -> Pairs:
    """Only the last layers (MiniLM)."""
    return ((student_layers, (teacher_layers,)),)


def skip(student_layers: int, teacher_layers: int) -> Pairs:
    """Every k-th layer and no last one: the prediction speaks for it (patient KD's PKD-skip, {2, 4, 6, 8, 10})."""
    return uniform(student_layers, teacher_layers)[:-1]


def block_mean(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher cut into as many blocks as the student has layers, each up to its layer of `uniform`."""
    ends = [0] + [block[-1] for _, block in uniform(student_layers, teacher_layers)]
    return tuple((m, tuple(range(ends[m - 1] + 1, ends[m] + 1))) for m in range(1, student_layers + 1))


def random(student_layers: int, teacher_layers: int, seed: int) -> Pairs:
    """As many teacher layers as the student has, drawn without replacement, in order (arXiv 2308.13958's random)."""
    drawn = Random(seed).sample(range(1, teacher_layers + 1), student_layers)
    return tuple((m, (n,)) for m, n in enumerate(sorted(drawn), 1))


def emd(student_layers: int, teacher_layers: int) -> Pairs:
    """All pairs, whose weights each loss finds at each step as the cheapest transport (BERT-EMD, Li et al. 2020)."""
    return SoftPairs((m, (n,)) for m in range(1, student_layers + 1) for n in range(1, teacher_layers + 1))


LAYER_MAPS = {f.__name__: f for f in (uniform, last, first, last_only, skip, random, block_mean, emd)}


def layer_pairs(layer_map: str | list, student_layers: int, teacher_layers: int, *, seed: int = 0) -> Pairs:
    """The pairs of a named map or of an explicit one: [[m, n], ...] or, for a block's mean, [[m, [n1, n2]], ...].

    seed: of the map `random`. Raises InputError: an unknown name, no pairs, a layer that a model does not have, or a
    student deeper than its teacher.
    """
    if isinstance(layer_map, str):
        if layer_map not in LAYER_MAPS:
            raise InputError(f"layer_map: unknown map {layer_map}: known maps are {', '.join(LAYER_MAPS)}, or pairs")
        if student_layers > teacher_layers:
            what = f"the student has {student_layers} layers and the teacher only {teacher_layers}"
            raise InputError(f"layer_map: {what}: write explicit pairs or a shallower student")
        options = {"seed": seed} if layer_map == "random" else {}
        pairs = LAYER_MAPS[layer_map](student_layers, teacher_layers, **options)
    else:
        pairs = tuple((int(m), tuple(map(int, n)) if isinstance(n, list | tuple) else (int(n),)) for m, n in layer_map)
    if not pairs or not all(block for _, block in pairs):
        raise InputError(f"layer_map: {layer_map} gives a student layer no teacher layer, or no pair at all: name one")
    for m, n in ((m, n) for m, block in pairs for n in block):
        if not (0 <= m <= student_layers and 0 <= n <= teacher_layers):
            layers = f"the student's {student_layers} and the teacher's {teacher_layers} layers"
            raise InputError(f"layer_map: pair ({m}, {n}) is outside {layers} (0 is the embedding output)")
    return pairs
