"""`python -m vocabshrink`."""

from vocabshrink.cli import main

main()
