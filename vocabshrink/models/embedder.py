"""TODO: models.embedder."""

from pathlib import Path

import numpy as np
import torch

from tokenizer_build.tokenizer import load_tokenizer
from vocabshrink.data.held_out import Embed
from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import pool_sentence, run_backbone


def torch_embedder(
    backbone, tokenizer_folder: Path, pooling: str, normalize: bool, *, max_length: int, batch_size: int = 64
) -> Embed:
    """Texts -> [n, D] float32 by a transformers model and the tokenizer of a folder.

    Texts are cut at `max_length` pieces, or at the model's positions where it has fewer.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.enable_truncation(min(max_length, getattr(backbone.config, "max_position_embeddings", max_length)))
    tokenizer.enable_padding(pad_id=backbone.config.pad_token_id or 0)

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        device = next(backbone.parameters()).device
        order = np.argsort([len(text) for text in texts], kind="stable")
        out = None
        for start in range(0, len(texts), batch_size):
            index = order[start : start + batch_size]
            encodings = tokenizer.encode_batch([texts[i] for i in index])
            ids = torch.tensor([e.ids for e in encodings], device=device)
            mask = torch.tensor([e.attention_mask for e in encodings], device=device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = run_backbone(backbone, Pieces(ids, mask, units=ids)).hidden[-1]
            vectors = pool_sentence(hidden, mask, pooling, normalize).cpu().numpy()
            if out is None:
                out = np.empty((len(texts), vectors.shape[1]), np.float32)
            out[index] = vectors
        return out

    return embed
