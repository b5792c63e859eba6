"""What a BERT shape weighs: parameters by block and bytes of every delivery, before anything is trained.

Weights are counted exactly, from the same layout that `quantize` and `export` write: rows in groups, float16
scales and vectors, int8 position and type tables, no pooler in a graph. Measured once and added: the graph's
own bytes (nodes and names), the header of safetensors, and, where there is no tokenizer yet, its file's bytes
per piece. Predicted graphs are within 0.1 % of written ones.
"""

from dataclasses import dataclass, replace
from pathlib import Path

SAFETENSORS = ("fp32-safetensors", "fp16-safetensors")
GRAPHS = ("fp32", "int8", "int4-32", "int4-64", "int4-128")
FORMATS = SAFETENSORS + GRAPHS

# (per graph, per layer) bytes of nodes, names and shapes, measured on what `export` writes.
GRAPH_OVERHEAD = {"fp32": (1_380, 2_030), "int8": (1_890, 3_330), "int4": (1_920, 3_135)}
HEADER_BYTES_PER_TENSOR = 116  # of a safetensors file
# Tokenizer files, (at all, per piece): tokenizer.json without white space as `export` writes it, 13.4 bytes a
# piece at 5,000 English pieces and 13.6 at 6,500; in training folders indented, with a vocab.txt.
COMPACT_TOKENIZER = (1_300, 13.7)
TRAINING_TOKENIZER = (2_600, 28.0)
SMALL_FILES = 2_500  # config.json, tokenizer_config.json and a MANIFEST.json with quality figures


@dataclass(frozen=True)
class Shape:
    """A BERT encoder. `max_position_embeddings` is what the delivery keeps, not what the teacher has."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2


def format_name(weights: str, group_size: int | None = None) -> str:
    """The key of FORMATS for export's arguments: ("int4", 64) -> "int4-64"."""
    return f"int4-{group_size}" if weights == "int4" else weights


def describe(format: str) -> str:
    """A format in words: "int4-64" -> "int4 groups of 64"."""
    return format.replace("int4-", "int4 groups of ").replace("-", " ")


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by block; "total" counts every layer and the pooler."""
    hidden = shape.hidden_size
    blocks = {
        "pieces": shape.vocab_size * hidden,
        "positions": shape.max_position_embeddings * hidden,
        "types": shape.type_vocab_size * hidden,
        "embedding_layernorm": 2 * hidden,
        "per_layer": sum(rows * columns + rows for rows, columns in _matrices(shape)) + 4 * hidden,
        "pooler": hidden * hidden + hidden,
    }
    blocks["layers"] = blocks["per_layer"] * shape.num_hidden_layers
    blocks["total"] = sum(count for name, count in blocks.items() if name != "per_layer")
    return blocks


def delivery_bytes(shape: Shape, format: str, tokenizer: str | Path | None = None) -> dict[str, int]:
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


def weights_bytes(shape: Shape, format: str) -> int:
    """Bytes of the one file with the weights: the ONNX graph, or model.safetensors."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: use one of {FORMATS}")
    layers = shape.num_hidden_layers
    if format in SAFETENSORS:
        width = 4 if format == "fp32-safetensors" else 2
        return parameters(shape)["total"] * width + HEADER_BYTES_PER_TENSOR * (7 + 16 * layers)
    first, per_layer = GRAPH_OVERHEAD[format.split("-")[0]]
    overhead = first + per_layer * layers
    if format == "fp32":
        counts = parameters(shape)
        return (counts["total"] - counts["pooler"]) * 4 + overhead
    hidden = shape.hidden_size
    tables = sum(
        _matrix_bytes(rows, hidden, "int8", False) for rows in (shape.max_position_embeddings, shape.type_vocab_size)
    )
    tables += _matrix_bytes(shape.vocab_size, hidden, format, False)
    matrices = sum(_matrix_bytes(rows, columns, format, True) for rows, columns in _matrices(shape))
    vectors = sum(rows for rows, _ in _matrices(shape)) + 4 * hidden
    return tables + 2 * 2 * hidden + layers * (matrices + 2 * vectors) + overhead


def largest_vocabulary(shape: Shape, budget_bytes: int, format: str) -> int:
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
    shape: Shape, budget_bytes: int, format: str, *, recipe: str, tokenizer: str | Path | None = None
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


def _matrices(shape: Shape) -> list[tuple[int, int]]:
    """(rows, columns) of one layer's matrices; each has a bias of as many values as it has rows."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]


def _matrix_bytes(rows: int, columns: int, format: str, padded: bool) -> int:
    """Codes and float16 scales; `padded`: the codes of a matrix product fill their last group."""
    if format == "int8":
        return rows * columns + 2 * rows
    group_size = int(format.removeprefix("int4-"))
    groups = -(-columns // group_size)
    codes = rows * groups * group_size // 2 if padded else -(-rows * columns // 2)
    return codes + 2 * rows * groups


def _megabytes(count: int) -> str:
    """MB are 10^6 bytes; what would print as 0.00 MB is given in bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count:,} bytes"
