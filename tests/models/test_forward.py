"""The sentence embedder of a transformers model."""

import numpy as np
import pytest
from transformers import AutoConfig

from vocabshrink.models.forward import torch_embedder
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
