"""Sentence vectors from a transformers model: what training and the report measure a teacher or student by.

Texts are sorted by length, so that little is computed on padding, and the pass is in bfloat16, whose error is far below
the differences between models. A delivery is never measured this way but as users run it (`runtime.delivery`).
"""

from pathlib import Path

import numpy as np
import torch

from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.held_out import Embed
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import pool_sentence, run_backbone
from vocabshrink.models.student import first_position


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
