"""Compress a BERT-type encoder by giving it a much smaller vocabulary, and deliver it under a byte budget.

`vocabshrink.load(folder)` opens a delivered model and `vocabshrink.Index(folder)` its passages; neither needs torch.
Training lives in the other modules.
"""

import importlib

HOMES = {"load": "vocabshrink.runtime.delivery", "Index": "vocabshrink.runtime.index"}
__all__ = list(HOMES)


def __getattr__(name: str):
    """What HOMES names, imported when it is asked for: `import vocabshrink` alone costs nothing."""
    if name not in HOMES:
        raise AttributeError(f"module 'vocabshrink' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
