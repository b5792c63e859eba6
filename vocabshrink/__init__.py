"""Compress a BERT-type encoder by giving it a much smaller vocabulary, and deliver it under a byte budget.

`vocabshrink.load(folder)` opens a delivered model and needs no torch; training lives in the other modules.
"""

__all__ = ["load"]


def __getattr__(name: str):
    """`load`, imported when it is asked for: `import vocabshrink` alone costs nothing."""
    if name != "load":
        raise AttributeError(f"module 'vocabshrink' has no attribute {name!r}")
    from vocabshrink.runtime.delivery import load

    return load
