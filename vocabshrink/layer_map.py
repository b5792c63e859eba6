"""Which teacher layer does each student layer learn from.

A map is a tuple of (student layer, teacher layer) pairs, 1-based, where 0 is the embedding output, that is the index
into transformers' `hidden_states`. Every map below but `first` ends on (last student layer, last teacher layer): a
test says so, because a peer whose `all` map silently missed the last layer is why this module exists.
"""

from tokenizer_build.errors import InputError

Pairs = tuple[tuple[int, int], ...]


def uniform(student_layers: int, teacher_layers: int) -> Pairs:
    """TinyBERT's g(m) = m · N / M, rounded up when M does not divide N; the last meets the last."""
    return tuple((m, -(-m * teacher_layers // student_layers)) for m in range(1, student_layers + 1))


def last(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's top layers, in order (TinyBERT's "top")."""
    return tuple((m, m + teacher_layers - student_layers) for m in range(1, student_layers + 1))


def first(student_layers: int, teacher_layers: int) -> Pairs:
    """The teacher's bottom layers, in order."""
    return tuple((m, m) for m in range(1, student_layers + 1))


def last_only(student_layers: int, teacher_layers: int) -> Pairs:
    """Only the last layers."""
    return ((student_layers, teacher_layers),)


LAYER_MAPS = {"uniform": uniform, "last": last, "first": first, "last_only": last_only}


def layer_pairs(layer_map: str | list[tuple[int, int]], student_layers: int, teacher_layers: int) -> Pairs:
    """The pairs of a named or explicit map.

    Raises:
        InputError: an unknown name, no pairs, a layer that a model does not have, or a student deeper than its teacher.
    """
    if isinstance(layer_map, str):
        if layer_map not in LAYER_MAPS:
            raise InputError(f"layer_map: unknown map {layer_map}: known maps are {', '.join(LAYER_MAPS)}, or pairs")
        if student_layers > teacher_layers:
            raise InputError(
                f"layer_map: the student has {student_layers} layers and the teacher only {teacher_layers}: "
                "write explicit pairs or a shallower student"
            )
        return LAYER_MAPS[layer_map](student_layers, teacher_layers)
    pairs = tuple((int(m), int(n)) for m, n in layer_map)
    if not pairs:
        raise InputError("layer_map: there are no pairs in it: write at least one [student layer, teacher layer]")
    for m, n in pairs:
        if not (0 <= m <= student_layers and 0 <= n <= teacher_layers):
            raise InputError(
                f"layer_map: pair ({m}, {n}) is outside the student's {student_layers} and the teacher's "
                f"{teacher_layers} layers (0 is the embedding output)"
            )
    return pairs
