"""Errors in what the user gave: one line, no traceback, exit status 2."""

import re
from typing import Any

# Control characters, line ends and bytes that are not UTF-8 (surrogates). Others, such as the
# joiners of Persian words and of emoji, stay.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """The user's input is invalid.

    The message is one line: what must hold, what was given and, where it helps, a command that
    fixes it. The command line prints it and exits with status 2; programs may catch it as a
    ValueError.
    """

    def __init__(self, message: str, **options: Any):
        """Makes the error.

        Args:
          message: for a program. It spells an option of those below as `keyword` does.
          **options: the options in the message, with the values that it gives them.
        """
        super().__init__(message)
        self.options = options

    def for_command_line(self) -> str:
        """The message, with options spelled as on the command line."""
        text = str(self)
        for name, value in self.options.items():
            text = text.replace(keyword(name, value), _flag(name, value))
        return text


def keyword(name: str, value: Any) -> str:
    """An option in Python: scales=(1, 2, 3)."""
    return f"{name}={value}"


def _flag(name: str, value: Any) -> str:
    """An option on the command line: --scales=1,2,3."""
    if value is True:
        return f"--{name}"
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return f"--{name}={text}"


def printable(text: str) -> str:
    """A file's name as it can stand in a line of text: "a\\nb" for one that contains a line end."""
    return _UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # of a name that is not UTF-8, as os.fsdecode gives it
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(character)[1:-1]
