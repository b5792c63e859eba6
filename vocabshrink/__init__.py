"""Compress a BERT-type encoder by giving it a much smaller vocabulary, and deliver it under a byte budget.

`vocabshrink.load(folder)` opens a delivered model and needs no torch; training lives in the other modules.
"""

from vocabshrink.runtime import load

__all__ = ["load"]
