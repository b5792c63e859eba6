"""The files beside a model's weights: its tokenizer, and what tells sentence-transformers how to make a vector."""

import shutil
from pathlib import Path

POOLINGS = ("mean", "cls")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies those of TOKENIZER_FILES that the folder `source` has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def module_files(width: int, positions: int, pooling: str, normalize: bool) -> dict[str, list | dict]:
    """{file: JSON content} beside a model of `width` dimensions that reads `positions` pieces."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
