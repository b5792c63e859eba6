"""The one exception that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """Bad input from the user: one sentence that names the file, line or key, and the mend.

    Both command lines turn it into that sentence on stderr and exit code 2, without a traceback.
    """
