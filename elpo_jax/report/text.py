"""Untrusted text, made safe to look at: what a model or a tool wrote may steer a terminal or reorder a page."""

import unicodedata

_NAMES = {0: "NUL", 7: "BEL", 8: "BS", 9: "HT", 10: "LF", 11: "VT", 12: "FF", 13: "CR", 27: "ESC"}
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible formats (bidi marks too), surrogates, line separators


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every character that shows nothing, or moves others about, replaced by its name in angle quotes.

    An escape becomes "‹ESC›", a right-to-left override "‹U+202E›". The result holds no control character, so it cannot
    drive a terminal, and it can always be encoded as UTF-8.

    Args:
      text: Anything, also with lone surrogates.
      lines: Keep line feeds and tabs as they are (for text that is shown as a block).
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else _named(ord(c)) for c in text)


def _named(code: int) -> str:
    return f"\u2039{_NAMES.get(code, f'U+{code:04X}')}\u203a"
