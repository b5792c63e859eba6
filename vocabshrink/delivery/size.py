"""What a BERT shape weighs: parameters by block and bytes of every delivery, before anything is trained.

Weights are counted exactly, from the same layout that `quantize` and `export` write: rows in groups, float16
scales and vectors, positions, types and heads at int8 unless told, no pooler in an embedder's graph. Measured once
and added: the graph's own bytes (nodes and names), the header of safetensors, and, where there is no tokenizer yet,
its file's bytes per piece. Predicted graphs are within 0.1 % of written ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

SAFETENSORS = ("fp32-safetensors", "fp16-safetensors")
GRAPHS = ("fp32", "int8", "int4-32", "int4-64", "int4-128")
FORMATS = SAFETENSORS + GRAPHS

# (per graph, per layer) bytes of nodes, names and shapes, measured on what `export` writes; by the format of the
# layers' matrices. A head's few hundred are left out.
GRAPH_OVERHEAD = {"fp32": (1_390, 2_035), "fp16": (1_560, 2_403), "int8": (2_060, 3_325), "int4": (2_060, 3_122)}
LOOKUP_OVERHEAD = 360  # of rows in 4 bits, which plain operators unpack
HEADER_BYTES_PER_TENSOR = 116  # of a safetensors file; a few less in compact.safetensors
# Tokenizer files, (at all, per piece): tokenizer.json without white space as `export` writes it, 13.4 bytes a
# piece at 5,000 English pieces and 13.6 at 6,500; in training folders indented, with a vocab.txt.
COMPACT_TOKENIZER = (1_300, 13.7)
TRAINING_TOKENIZER = (2_600, 28.0)
SMALL_FILES = 2_800  # config.json, tokenizer_config.json and a MANIFEST.json with quality figures


@dataclass(frozen=True)
class Shape:
    """A BERT encoder. `max_position_embeddings` is what the delivery keeps, not what the teacher has."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    task: str = "embedding"
    labels: int = 0  # of a classifier or tagger


Format = str | Mapping[str, str]  # of all matrices, or by class of tensor


def describe(format: Format) -> str:
    """A format in words: "int4-64" -> "int4 groups of 64"."""
    if not isinstance(format, str):
        return ", ".join(f"{name.replace('_', ' ')} in {describe(chosen)}" for name, chosen in format.items())
    return format.replace("int4-", "int4 groups of ").replace("int3-", "int3 groups of ").replace("-", " ")


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by block; "total" counts every layer and the pooler."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    blocks = {
        "pieces": shape.vocab_size * hidden,
        "positions": shape.max_position_embeddings * hidden,
        "types": shape.type_vocab_size * hidden,
        "embedding_layernorm": 2 * hidden,
        "per_layer": 4 * (hidden * hidden + hidden) + 2 * inner * hidden + inner + 5 * hidden,
        "pooler": hidden * hidden + hidden,
    }
    blocks["layers"] = blocks["per_layer"] * shape.num_hidden_layers
    blocks["total"] = sum(count for name, count in blocks.items() if name != "per_layer")
    return blocks


def delivery_bytes(shape: Shape, format: Format, tokenizer: str | Path | None = None) -> dict[str, int]:
    """Bytes by file, with "total": weights, tokenizer.json (measured where the file is given), small files.

    A graph format is what `export` writes; a safetensors format is a training folder, vocab.txt included.
    """
    first, per_piece = TRAINING_TOKENIZER if format in SAFETENSORS else COMPACT_TOKENIZER
    estimate = first + round(per_piece * shape.vocab_size)
    sizes = {
        "weights": weights_bytes(shape, format),
        "tokenizer": Path(tokenizer).stat().st_size if tokenizer is not None else estimate,
        "small_files": SMALL_FILES,
    }
    return {**sizes, "total": sum(sizes.values())}


def weights_bytes(shape: Shape, format: Format, compact: bool = False) -> int:
    """Bytes of the one file with the weights: the ONNX graph, model.safetensors, or (`compact`) compact.safetensors.

    format: a name, or {class: name} as `quantize.formats_of` gives.
    """
    layers = shape.num_hidden_layers
    tensors, vectors = _tensors(shape)
    if format in SAFETENSORS:
        width = 4 if format == "fp32-safetensors" else 2
        return parameters(shape)["total"] * width + HEADER_BYTES_PER_TENSOR * (7 + 16 * layers)
    if isinstance(format, str):
        if format.split("-")[0] not in (*GRAPH_OVERHEAD, "int3"):
            raise ValueError(f"format {format!r}: use one of {FORMATS}")
        spare = format if format in ("fp32", "fp16") else "int8"
        format = dict.fromkeys(("embeddings", "attention", "feed_forward"), format)
        format |= {"positions": spare, "head": spare}
    format = {"positions": "int8", "head": "int8"} | dict(format)
    total = sum(vectors) * (4 if set(format.values()) == {"fp32"} else 2)
    total += sum(_matrix_bytes(rows, columns, format[name], not compact) for name, rows, columns in tensors)
    if compact:
        scales = sum(format[name] not in ("fp32", "fp16") for name, _, _ in tensors)
        return total + HEADER_BYTES_PER_TENSOR * (len(tensors) + len(vectors) + scales)
    first, _ = GRAPH_OVERHEAD[format["attention"].split("-")[0]]
    each = [GRAPH_OVERHEAD[format[name].split("-")[0]][1] for name in ("attention", "feed_forward")]
    lookups = {"embeddings": 1, "positions": 2}  # types are a lookup too
    total += sum(LOOKUP_OVERHEAD * count for name, count in lookups.items() if format[name].startswith("int4"))
    return total + first + layers * sum(each) // 2


def largest_vocabulary(shape: Shape, budget_bytes: int, format: Format) -> int:
    """The most pieces whose delivery is at most `budget_bytes`; 0 where not even one fits."""
    low, high = 0, budget_bytes  # a piece takes more than one byte
    while low < high:
        middle = (low + high + 1) // 2
        if delivery_bytes(replace(shape, vocab_size=middle), format)["total"] <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def refusal(
    shape: Shape, budget_bytes: int, format: Format, *, recipe: str, tokenizer: str | Path | None = None
) -> str | None:
    """None where the delivery fits its budget, else one sentence that says by how much and what to change."""
    needed = delivery_bytes(shape, format, tokenizer)["total"]
    if needed <= budget_bytes:
        return None
    mends = []
    fewer = min(largest_vocabulary(shape, budget_bytes, format), shape.vocab_size - 1)
    if fewer:
        mends.append(f"vocabulary.size <= {fewer:,}")
    smaller = [other for other in GRAPHS if delivery_bytes(shape, other)["total"] <= budget_bytes]
    if smaller:
        mends.append(describe(smaller[0]))  # GRAPHS runs from the largest to the smallest
    if not mends:
        mends.append("fewer layers or a smaller hidden_size (no vocabulary and no format fits)")
    return (
        f"{recipe} needs {_megabytes(needed)} at {describe(format)}: over the budget of "
        f"{_megabytes(budget_bytes)} by {_megabytes(needed - budget_bytes)}; use {', or '.join(mends)}"
    )


def _tensors(shape: Shape) -> tuple[list[tuple[str, int, int]], list[int]]:
    """(class, rows, columns) of each matrix and the length of each vector that a delivery holds; a tied decoder is
    the piece table."""
    hidden, inner, pieces = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    matrices = [("embeddings", pieces, hidden)]
    matrices += [("positions", rows, hidden) for rows in (shape.max_position_embeddings, shape.type_vocab_size)]
    layer = [("attention", hidden, hidden)] * 4 + [("feed_forward", inner, hidden), ("feed_forward", hidden, inner)]
    heads = {
        "embedding": ([], []),
        "classification": ([(hidden, hidden), (shape.labels, hidden)], [hidden, shape.labels]),
        "tokens": ([(shape.labels, hidden)], [shape.labels]),
        "fill-mask": ([(hidden, hidden)], [hidden, hidden, hidden, pieces]),
    }
    matrices += layer * shape.num_hidden_layers + [("head", *size) for size in heads[shape.task][0]]
    per_layer = [rows for _, rows, _ in layer] + [hidden] * 4
    return matrices, [hidden] * 2 + per_layer * shape.num_hidden_layers + heads[shape.task][1]


def _matrix_bytes(rows: int, columns: int, format: str, padded: bool) -> int:
    """Codes and float16 scales; `padded`: the codes of a row fill its last group, as a graph's do."""
    if format in ("fp32", "fp16"):
        return rows * columns * int(format[2:]) // 8
    bits, _, size = format.removeprefix("int").partition("-")
    groups = -(-columns // int(size)) if size else 1
    filled = rows * groups * int(size) if padded and size else rows * columns
    return -(-filled * int(bits) // 8) + 2 * rows * groups


def _megabytes(count: int) -> str:
    """MB are 10^6 bytes; what would print as 0.00 MB is given in bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count:,} bytes"
