"""Mistakes in what the user gave: one clear line, no traceback, exit status 2."""


class InputError(ValueError):
    """The user's input is wrong.

    The message is one line that names the value and says what would be right. The command line prints it and exits
    with status 2; programs catch it as a ValueError.
    """
