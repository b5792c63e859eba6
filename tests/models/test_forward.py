"""The sentence embedder of a transformers model."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from vocabshrink.data.pieces import Pieces
from vocabshrink.models.forward import run_backbone, torch_embedder
from vocabshrink.models.teacher import load_teacher


@pytest.mark.parametrize("family", ["bert", "roberta", "camembert", "mpnet"])
def test_texts_are_cut_where_the_positions_end(family, folders):
    """RoBERTa-like models begin to count behind the padding id: of 66 rows, 64 are positions."""
    folder = folders[family]
    rows = AutoConfig.from_pretrained(folder).max_position_embeddings
    assert rows == (64 if family == "bert" else 66)
    backbone = load_teacher(str(folder)).backbone
    texts = ["ka lo", "ka lo mi ne ru sa " * 40]
    found = torch_embedder(backbone, folder, "mean", True, max_length=500)(texts)
    assert found.shape == (2, 32) and np.isfinite(found).all()
    assert np.array_equal(found, torch_embedder(backbone, folder, "mean", True, max_length=64)(texts))
    assert not np.array_equal(found, torch_embedder(backbone, folder, "mean", True, max_length=63)(texts))


def test_the_mask_of_a_gpu_s_attention_changes_nothing(folders):
    """It is given as transformers would make it, since transformers asks the device first whether it is needed."""
    backbone = load_teacher(str(folders["bert"])).backbone
    backbone.set_attn_implementation("sdpa")
    ids, mask = torch.randint(5, 200, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    for lengths in ([7, 7, 7], [7, 3, 5]):
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
        found = run_backbone(backbone, Pieces(ids, mask, ids)).hidden[-1]
        expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(found[mask.bool()], expected[mask.bool()])
