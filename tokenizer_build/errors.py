"""The one exception that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """One sentence that names the file, line or key, and the remedy; the command lines print it and exit with 2."""
