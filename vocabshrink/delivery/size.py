"""What a BERT shape weighs, before anything is trained: parameters by block, and the bytes of every delivery.
A graph is built on zeros by the code that writes the delivery: exact but for a few bytes, in tens of milliseconds."""

import copy
import json
from bisect import bisect_right

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from vocabshrink.delivery.graph import build_graph
from vocabshrink.models.families import student_class
from vocabshrink.run.formats import Formats, describe, formats_of
from vocabshrink.runtime.kinds import KINDS

GRAPH_FORMATS = ("fp32", "int8", "int4-32", "int4-64", "int4-128")  # of a whole graph, from the largest to the smallest
TOKENIZER = (1_300, 13.7)  # bytes of tokenizer.json, (at all, per piece), of 5,000 English pieces
SMALL_FILES = 2_800  # config.json, tokenizer_config.json and a MANIFEST.json with quality figures


def parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters by block; "total" counts every layer and, of a BERT, the pooler."""
    with torch.device("meta"):
        model = student_class(config)(config)
    blocks = {"pieces": "embeddings.word_embeddings", "positions": "embeddings.position_embeddings"}
    blocks |= {"types": "embeddings.token_type_embeddings", "embedding_layernorm": "embeddings.LayerNorm"}
    blocks |= {"embedding_projection": "embeddings_project", "per_layer": "encoder.layer.0", "pooler": "pooler"}
    blocks |= {"layers": "encoder", "total": ""}
    found = dict(model.named_modules())
    return {name: sum(p.numel() for p in found[place].parameters()) for name, place in blocks.items() if place in found}


def graph_bytes(config: PreTrainedConfig, formats: Formats, task: str = "embedding") -> int:
    """Bytes of the ONNX graph of this shape; a classifier or tagger has `config.num_labels` labels."""
    with torch.device("meta"):
        model = student_class(config, KINDS[task].architecture.removeprefix("Bert"))(config)
    prefix = f"{model.base_model_prefix}."
    shapes = {name.removeprefix(prefix): value.shape for name, value in model.state_dict().items()}
    state = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    return build_graph(state, config, task=task, formats=formats_of(formats)).ByteSize()


def delivery_bytes(
    config: PreTrainedConfig, formats: Formats, task: str = "embedding", tokenizer: int | None = None
) -> dict[str, int]:
    """Bytes by file, with "total": weights, tokenizer.json (estimated where its bytes are not given), small files."""
    pieces = tokenizer or TOKENIZER[0] + round(TOKENIZER[1] * config.vocab_size)
    sizes = {"weights": graph_bytes(config, formats, task), "tokenizer": pieces, "small_files": SMALL_FILES}
    return sizes | {"total": sum(sizes.values())}


def tokenizer_json(spec: dict, max_positions: int) -> str:
    """A delivery's tokenizer.json: without white space, which counts, cut to `max_positions` pieces, unpadded."""
    cut = {"direction": "Right", "max_length": max_positions, "strategy": "LongestFirst", "stride": 0}
    return json.dumps(spec | {"truncation": cut, "padding": None}, ensure_ascii=False, separators=(",", ":")) + "\n"


def tokenizer_bytes(tokenizer: Tokenizer, max_positions: int) -> int:
    """Bytes of `tokenizer_json`."""
    return len(tokenizer_json(json.loads(tokenizer.to_str()), max_positions).encode())


def refusal(
    config, budget_bytes: int, formats: Formats, *, recipe: str, task: str = "embedding", tokenizer: int | None = None
) -> str | None:
    """None where the delivery fits its budget, else one sentence that says by how much and what to change. tokenizer:
    bytes of its tokenizer.json, where that is given."""

    def total(pieces: int = config.vocab_size, formats: Formats = formats) -> int:
        smaller = copy.copy(config)
        smaller.vocab_size = pieces
        return delivery_bytes(smaller, formats, task, tokenizer if pieces == config.vocab_size else None)["total"]

    if (needed := total()) <= budget_bytes:
        return None
    fewer = bisect_right(range(1, config.vocab_size), budget_bytes, key=total)
    remedies = [f"vocabulary.size <= {fewer:,}"] * (fewer > 0)
    remedies += [describe(other) for other in GRAPH_FORMATS if total(formats=other) <= budget_bytes][:1]
    advice = ", or ".join(remedies) or "fewer layers or a smaller hidden_size (no vocabulary and no format fits)"
    over = f"over the budget of {_megabytes(budget_bytes)} by {_megabytes(needed - budget_bytes)}"
    return f"{recipe} needs {_megabytes(needed)} at {describe(formats)}: {over}; use {advice}"


def _megabytes(count: int) -> str:
    """MB are 10^6 bytes; what would print as 0.00 MB is given in bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count:,} bytes"
