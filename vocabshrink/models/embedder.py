"""Sentence vectors from a transformers model, and the files that tell sentence-transformers how to make them.

Training and the report measure teacher and student by these vectors: texts are sorted by length, so that little is
computed on padding, and the pass is in bfloat16, whose error is far below the differences between models. A delivery is
measured as users run it (`runtime.delivery`).
"""

from pathlib import Path

import numpy as np
import torch

from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.held_out import Embed
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import first_position, pool_sentence, run_backbone

POOLINGS = ("mean", "cls")


def module_files(width: int, positions: int, pooling: str, normalize: bool) -> dict[str, list | dict]:
    """{file: JSON content} beside a model of `width` dimensions that reads `positions` pieces."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    modes = {"cls_token": pooling == "cls", "mean_tokens": pooling == "mean"}
    modes |= {"max_tokens": False, "mean_sqrt_len_tokens": False}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": width}
        | {f"pooling_mode_{mode}": chosen for mode, chosen in modes.items()},
    }


def torch_embedder(
    backbone, tokenizer_folder: Path, pooling: str, normalize: bool, *, max_length: int, batch_size: int = 64
) -> Embed:
    """Texts -> [n, D] float32 by a transformers model and the tokenizer of a folder.

    Texts are cut at `max_length` pieces, or at what the model has positions for where that is fewer.
    """
    config, tokenizer = backbone.config, load_tokenizer(tokenizer_folder)
    positions = getattr(config, "max_position_embeddings", None)
    longest = min(max_length, positions - first_position(config)) if positions else max_length
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding(pad_id=config.pad_token_id or 0)

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        device = next(backbone.parameters()).device
        order = np.argsort([len(text) for text in texts], kind="stable")
        vectors = []
        for start in range(0, len(texts), batch_size):
            encodings = tokenizer.encode_batch([texts[i] for i in order[start : start + batch_size]])
            ids = torch.tensor([e.ids for e in encodings], device=device)
            mask = torch.tensor([e.attention_mask for e in encodings], device=device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = run_backbone(backbone, Pieces(ids, mask, units=ids)).hidden[-1]
            vectors.append(pool_sentence(hidden, mask, pooling, normalize).cpu().numpy())
        return np.concatenate(vectors)[np.argsort(order)]

    return embed
