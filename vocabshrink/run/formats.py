"""Weight formats: how a delivery stores its weights. The only place that knows how a format's name is built.

A format is `fp32`, `fp16`, `int8` (one scale a row) or `int4-G` (one scale for every G values of a row), or one for
each class of tensor: {"embeddings": "int4-64", "attention": "int8", ...}. Positions (with token types and a factorised
table's projection) and heads are int8 unless told otherwise; biases, layer norms and scales are float16."""

from collections.abc import Mapping

from tokenizer_build.errors import InputError

LARGE_CLASSES = ("embeddings", "attention", "feed_forward")  # nearly all weights: each must be given a format
CLASSES = ("embeddings", "positions", "attention", "feed_forward", "head")
FLOATS = ("fp32", "fp16")  # without codes and scales
FORMATS = (*FLOATS, "int8", "int4-32", "int4-64", "int4-128")
Formats = str | Mapping[str, str]  # one for all matrices, or one for each class


def bits_and_group(format: str, columns: int) -> tuple[int, int]:
    """Bits and values per scale in a row of `columns`: "int4-64" -> (4, 64); "int8" -> (8, columns)."""
    kind, _, size = format.partition("-")
    return int(kind.removeprefix("int")), int(size or max(columns, 1))


def tensor_class(name: str) -> str:
    """The member of CLASSES that a parameter of a BERT belongs to; a tied decoder is the piece table."""
    if "word_embeddings" in name or "predictions.decoder" in name:
        return "embeddings"
    if "_embeddings" in name or "embeddings_project" in name:
        return "positions"
    if "attention" in name:
        return "attention"
    return "feed_forward" if "layer." in name else "head"


def formats_of(formats: Formats) -> dict[str, str]:
    """{class: format} for every class, from one name or from a dict that may leave out positions and head. Raises
    InputError for an unknown class or format and for a class without one."""
    spare = formats if formats in FLOATS else "int8"
    given = dict.fromkeys(LARGE_CLASSES, formats) if isinstance(formats, str) else formats
    full = dict.fromkeys(CLASSES) | {"positions": spare, "head": spare} | given
    for name, format in full.items():
        if name not in CLASSES or format not in FORMATS:
            known = f"give {', '.join(LARGE_CLASSES)} (and positions, head) one of {', '.join(FORMATS)}"
            raise InputError(f"weights of {name}: {format!r} is no format of a class of tensors: {known}")
    return full


def format_of(name: str, dimensions: int, formats: Mapping[str, str]) -> str:
    """The format of the parameter `name`; vectors are float16, or float32 where all matrices are."""
    if dimensions == 2:
        return formats[tensor_class(name)]
    return "fp32" if set(formats.values()) == {"fp32"} else "fp16"
