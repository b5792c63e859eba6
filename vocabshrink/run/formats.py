"""TODO: run.formats."""

from collections.abc import Mapping

from tokenizer_build.errors import InputError

CLASSES = ("embeddings", "positions", "attention", "feed_forward", "head")
GROUP_SIZES = (32, 64, 128)
FORMATS = ("fp32", "fp16", "int8", *(f"int{bits}-{size}" for bits in (4, 3) for size in GROUP_SIZES))
Formats = str | Mapping[str, str]


def tensor_class(name: str) -> str:
    """The class of CLASSES that a parameter of BERT belongs to; a tied decoder is the piece table."""
    if "word_embeddings" in name or "predictions.decoder" in name:
        return "embeddings"
    if "_embeddings" in name:
        return "positions"
    if "attention" in name:
        return "attention"
    return "feed_forward" if "layer." in name else "head"


def formats_of(formats: Formats) -> dict[str, str]:
    """{class: format} for every class: of one name, positions and head at least int8, or of a dict that may lack these.

    Raises InputError for an unknown class or format and for a class that is missing.
    """
    given = dict.fromkeys(CLASSES[:1] + CLASSES[2:4], formats) if isinstance(formats, str) else dict(formats)
    spare = formats if formats in ("fp32", "fp16") else "int8"
    full = {"positions": spare, "head": spare} | given
    for name in CLASSES:
        if full.get(name) not in FORMATS:
            raise InputError(f"weights of {name}: {full.get(name)!r} is no format: use one of {FORMATS}")
    if unknown := full.keys() - set(CLASSES):
        raise InputError(f"weights: {sorted(unknown)} are no classes of tensors: use {CLASSES}")
    return {name: full[name] for name in CLASSES}


def format_of(name: str, dimensions: int, formats: Mapping[str, str]) -> str:
    """The format that a delivery keeps the parameter `name` in."""
    if dimensions == 2:
        return formats[tensor_class(name)]
    return "fp32" if set(formats.values()) == {"fp32"} else "fp16"


def bits_and_group(format: str, columns: int) -> tuple[int, int]:
    """("int4-64", ...) -> (4, 64); ("int8", columns) -> (8, columns)."""
    bits, _, size = format.removeprefix("int").partition("-")
    return int(bits), int(size or max(columns, 1))
