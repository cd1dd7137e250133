"""Untrusted text, made safe to look at: what a model or a tool wrote may steer a terminal or reorder a page."""

import unicodedata

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible formats (bidi marks too), surrogates, line separators


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every character that shows nothing, or moves others about, replaced by something to see.

    ASCII controls become their control pictures, so an escape shows as the symbol for ESC; all others of the kind show
    as their code point in angle quotes. The result holds no control character, so it cannot drive a terminal, and it
    can always be encoded as UTF-8.

    Args:
      text: Anything, also with lone surrogates.
      lines: Keep line feeds and tabs as they are (for text that is shown as a block).
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else _visible(ord(c)) for c in text)


def _visible(code: int) -> str:
    return _PICTURES.get(code, f"\u2039U+{code:04X}\u203a")
