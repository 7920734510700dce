"""Text on images: a font for most alphabets, what it cannot write, and what is too long."""

import pathlib

from PIL import ImageFont

# DejaVu Sans: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic. Pillow's own font has
# no letters beyond ASCII. Free to distribute, see LICENSE_DEJAVU beside it.
_FONT = pathlib.Path(__file__).resolve().parent / "fonts" / "DejaVuSans.ttf"
_NO_CHARACTER = "\U0010ffff"  # no font has it: its glyph is that of every missing character
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of labels, of a size in pixels."""
    return ImageFont.truetype(str(_FONT), size)


def printable(text: str, font: ImageFont.FreeTypeFont, substitute: str | None = None) -> str:
    """The text in one line, if the font has all of its characters; otherwise the substitute.

    Args:
      substitute: None: the text with "?" for what the font lacks.
    """
    line = " ".join(text.split())
    missing = bytes(font.getmask(_NO_CHARACTER))
    lacking = {c for c in set(line) if not c.isspace() and _is_missing(c, font, missing)}
    if not lacking:
        return line
    if substitute is not None:
        return substitute
    return "".join("?" if c in lacking else c for c in line)


def _is_missing(character: str, font: ImageFont.FreeTypeFont, missing: bytes) -> bool:
    if not character.isprintable():  # control characters, and bytes that are no text (surrogates)
        return True
    return bytes(font.getmask(character)) == missing


def fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut in the middle where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2:
        kept -= 1
        first = -(-kept // 2)
        shorter = text[:first].rstrip() + _ELLIPSIS + text[len(text) - (kept - first) :].lstrip()
        if font.getlength(shorter) <= width:
            return shorter
    return text[:1] + _ELLIPSIS
