"""Errors in what the user gave: one line, no traceback, exit status 2."""

import re

# Control characters, line ends and bytes that are not UTF-8 (surrogates). Others, such as the
# joiners of Persian words and of emoji, stay.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """The user's input is invalid.

    The message is one line: what must hold, what was given and, where it helps, a command that
    fixes it. The command line prints it and exits with status 2; programs may catch it as a
    ValueError.
    """


def printable(text: str) -> str:
    """A file's name as it can stand in a line of text: "a\\nb" for one that contains a line end."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a name that is not UTF-8, as os.fsdecode gives it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(character)[1:-1]
