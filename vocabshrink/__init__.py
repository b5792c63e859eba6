"""Compress a BERT-type encoder by giving it a much smaller vocabulary, and deliver it under a byte budget.

`compress(model, texts, out=folder)` is the whole job. `load(folder)` opens a delivered model and `Index(folder)` its
passages; neither needs torch. The pieces of `compress` are functions too: see `vocabshrink.api`."""

import importlib

HOMES = {"load": "vocabshrink.runtime.delivery", "Index": "vocabshrink.runtime.index"}
API = ("compress", "plan", "learn_vocabulary", "start_student", "distill", "finetune", "export")
HOMES |= dict.fromkeys(API, "vocabshrink.api")
__all__ = list(HOMES)


def __getattr__(name: str):
    """What HOMES names, imported when it is asked for: `import vocabshrink` alone costs nothing."""
    if name not in HOMES:
        raise AttributeError(f"module 'vocabshrink' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
