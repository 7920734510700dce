"""Errors in what the user gave: one line, no traceback, exit status 2."""


class InputError(ValueError):
    """The user's input is invalid.

    The message is one line: what must hold, what was given and, where it helps, a command that
    fixes it. The command line prints it and exits with status 2; programs may catch it as a
    ValueError.
    """
