"""What a BERT shape weighs, before anything is trained: parameters by block, and the bytes of every delivery.

A graph's bytes are those of the graph itself, built on zeros by the code that writes the delivery: exact but for a few
bytes, in tens of milliseconds. Where there is no tokenizer yet, its file is estimated from the number of pieces.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel

from vocabshrink.delivery.graph import build_graph
from vocabshrink.run.formats import Formats, describe, formats_of
from vocabshrink.runtime.kinds import KINDS

SAFETENSORS = {"fp32-safetensors": 4, "fp16-safetensors": 2}  # bytes of a value in a training folder's weights
GRAPH_FORMATS = ("fp32", "int8", "int4-32", "int4-64", "int4-128")  # of a whole graph, from the largest to the smallest
HEADER_BYTES = 116  # of a safetensors file, for each tensor
# Bytes of tokenizer.json, (at all, per piece). Delivered without white space: 13.4 a piece at 5,000 English pieces and
# 13.6 at 6,500. In training folders it is indented, with a vocab.txt.
COMPACT_TOKENIZER = (1_300, 13.7)
TRAINING_TOKENIZER = (2_600, 28.0)
SMALL_FILES = 2_800  # config.json, tokenizer_config.json and a MANIFEST.json with quality figures


def parameters(config: BertConfig) -> dict[str, int]:
    """Parameters by block; "total" counts every layer and the pooler."""
    with torch.device("meta"):
        model = BertModel(config)

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    tables = model.embeddings
    return {
        "pieces": count(tables.word_embeddings),
        "positions": count(tables.position_embeddings),
        "types": count(tables.token_type_embeddings),
        "embedding_layernorm": count(tables.LayerNorm),
        "per_layer": count(model.encoder.layer[0]),
        "pooler": count(model.pooler),
        "layers": count(model.encoder),
        "total": count(model),
    }


def graph_bytes(config: BertConfig, formats: Formats, task: str = "embedding") -> int:
    """Bytes of the ONNX graph of this shape; a classifier or tagger has `config.num_labels` labels."""
    with torch.device("meta"):
        model = getattr(transformers, KINDS[task].architecture)(config)
    shapes = {name.removeprefix("bert."): tuple(value.shape) for name, value in model.state_dict().items()}
    state = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    return build_graph(state, config, task=task, formats=formats_of(formats)).ByteSize()


def delivery_bytes(
    config: BertConfig, formats: Formats, task: str = "embedding", tokenizer: Path | None = None
) -> dict[str, int]:
    """Bytes by file, with "total": weights, tokenizer.json (measured where the file is given), small files.

    formats: of a graph, a name or {class: name}; or a key of SAFETENSORS: a training folder, vocab.txt included.
    config: its max_position_embeddings are the delivery's (`stages.plan.delivered_config`).
    """
    if plain := isinstance(formats, str) and formats in SAFETENSORS:
        tensors = 7 + 16 * config.num_hidden_layers
        weights = parameters(config)["total"] * SAFETENSORS[formats] + HEADER_BYTES * tensors
    else:
        weights = graph_bytes(config, formats, task)
    first, per_piece = TRAINING_TOKENIZER if plain else COMPACT_TOKENIZER
    estimate = first + round(per_piece * config.vocab_size)
    sizes = {
        "weights": weights,
        "tokenizer": tokenizer.stat().st_size if tokenizer else estimate,
        "small_files": SMALL_FILES,
    }
    return {**sizes, "total": sum(sizes.values())}


def refusal(
    config: BertConfig, budget_bytes: int, formats: Formats, *, recipe: str, task: str = "embedding"
) -> str | None:
    """None where the delivery fits its budget, else one sentence that says by how much and what to change."""

    def total(pieces: int = config.vocab_size, formats: Formats = formats) -> int:
        smaller = copy.copy(config)
        smaller.vocab_size = pieces
        return delivery_bytes(smaller, formats, task)["total"]

    needed = total()
    if needed <= budget_bytes:
        return None
    half = config.vocab_size // 2
    per_piece = (needed - total(half)) / (config.vocab_size - half)
    fewer = config.vocab_size - math.ceil((needed - budget_bytes) / per_piece)
    while fewer > 0 and total(fewer) > budget_bytes:  # lengths of lengths: a step or two
        fewer -= 1
    remedies = [f"vocabulary.size <= {fewer:,}"] if fewer > 0 else []
    if total(formats=GRAPH_FORMATS[-1]) <= budget_bytes:
        remedies += [next(describe(other) for other in GRAPH_FORMATS if total(formats=other) <= budget_bytes)]
    if not remedies:
        remedies = ["fewer layers or a smaller hidden_size (no vocabulary and no format fits)"]
    return (
        f"{recipe} needs {_megabytes(needed)} at {describe(formats)}: over the budget of "
        f"{_megabytes(budget_bytes)} by {_megabytes(needed - budget_bytes)}; use {', or '.join(remedies)}"
    )


def _megabytes(count: int) -> str:
    """MB are 10^6 bytes; what would print as 0.00 MB is given in bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count:,} bytes"
