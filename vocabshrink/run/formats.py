"""Weight formats: how a delivery stores its weights. The only place that knows how a format's name is built.

A format is a name: `fp32`, `fp16`, `int8` (one scale a row), `int4-G` or `int3-G` (one scale for every G values of a
row). Formats can be mixed by class of tensor: {"embeddings": "int4-64", "attention": "int3-128", ...}. Positions (with
token types) and heads are int8 unless told otherwise, which costs all-MiniLM's 128 positions 25 KB. Biases, layer norms
and scales are float16.

No ONNX kernel reads 3 bits: int3 exists in packed weights alone.
"""

from collections.abc import Mapping

from tokenizer_build.errors import InputError

LARGE_CLASSES = ("embeddings", "attention", "feed_forward")  # nearly all weights: each must be given a format
CLASSES = ("embeddings", "positions", "attention", "feed_forward", "head")
GROUP_SIZES = (32, 64, 128)
FORMATS = ("fp32", "fp16", "int8", *(f"int{bits}-{size}" for bits in (4, 3) for size in GROUP_SIZES))
Formats = str | Mapping[str, str]  # one for all matrices, or one for each class


def kind_of(format: str) -> str:
    """A format's name without its group size: "int4-64" -> "int4"."""
    return format.partition("-")[0]


def bits_of(format: str) -> int:
    """Bits of one stored value, scales not counted: "int4-64" -> 4, "fp16" -> 16."""
    return int(kind_of(format).lstrip("fpint"))


def is_float(format: str) -> bool:
    """Whether values are stored as floating-point numbers, without codes and scales."""
    return format in ("fp32", "fp16")


def describe(format: Formats) -> str:
    """A format, or one for each class, in words: "int4-64" -> "int4 groups of 64"."""
    if not isinstance(format, str):
        return ", ".join(f"{name.replace('_', ' ')} in {describe(chosen)}" for name, chosen in format.items())
    kind, _, size = format.partition("-")
    return f"{kind} groups of {size}" if size.isdigit() else format.replace("-", " ")


def bits_and_group(format: str, columns: int) -> tuple[int, int]:
    """Bits and values per scale in a row of `columns`: "int4-64" -> (4, 64); "int8" -> (8, columns)."""
    return bits_of(format), int(format.partition("-")[2] or max(columns, 1))


def tensor_class(name: str) -> str:
    """The member of CLASSES that a parameter of a BERT belongs to; a tied decoder is the piece table."""
    if "word_embeddings" in name or "predictions.decoder" in name:
        return "embeddings"
    if "_embeddings" in name:
        return "positions"
    if "attention" in name:
        return "attention"
    return "feed_forward" if "layer." in name else "head"


def formats_of(formats: Formats) -> dict[str, str]:
    """{class: format} for every class, from one name or from a dict that may leave out positions and head.

    Raises InputError for an unknown class or format and for a class without one.
    """
    given = dict.fromkeys(LARGE_CLASSES, formats) if isinstance(formats, str) else dict(formats)
    spare = formats if isinstance(formats, str) and is_float(formats) else "int8"
    full = {"positions": spare, "head": spare} | given
    for name in CLASSES:
        if full.get(name) not in FORMATS:
            raise InputError(f"weights of {name}: {full.get(name)!r} is no format: use one of {FORMATS}")
    if unknown := full.keys() - set(CLASSES):
        raise InputError(f"weights: {sorted(unknown)} are no classes of tensors: use {CLASSES}")
    return {name: full[name] for name in CLASSES}


def format_of(name: str, dimensions: int, formats: Mapping[str, str]) -> str:
    """The format of the parameter `name`; vectors are float16, or float32 where all matrices are."""
    if dimensions == 2:
        return formats[tensor_class(name)]
    return "fp32" if set(formats.values()) == {"fp32"} else "fp16"
