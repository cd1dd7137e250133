r"""Asks math-verify whether two answers are the same. For workers (`math_worker.py`) only: there is no time limit here.

Both answers go in as the whole of a `\boxed{}` and nothing is looked for elsewhere in them, so a part of an answer can
not pass for it.
"""

import logging
import re

from math_verify import LatexExtractionConfig, parse, verify

from elpo_jax.tasks.exact import NOT_UNITS

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns where its own time limits are off

_BOX = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)
_ROUNDING = 6  # decimals to which floats are compared, if the reference does not have more
_UPRIGHT = re.compile(r"\\(?:text|mathrm|mathit|mathbf)\s*\{ *([ei]) *\}")
_TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]*|operatorname|mbox|hbox)\s*\{([^{}]*)\}|\\[a-zA-Z]+|([a-zA-Z])")


def _changing_words(text: str) -> list[str]:
    return sorted(word for found in _TEXT.finditer(text) for word in NOT_UNITS.findall((found[1] or "").lower()))


def _told_apart(*texts: str) -> list[str]:
    """The texts with the imaginary unit bare, and with an index at capitals of which one has the small letter too."""
    texts = tuple(_UPRIGHT.sub(r" \1 ", text) for text in texts)
    used = [{found[2] for found in _TEXT.finditer(text) if found[2]} for text in texts]
    both = {letter for letters in used for letter in letters if letter.isupper() and letter.lower() in letters}
    return [_TEXT.sub(lambda found: f"{found[2]}_{{0}}" if found[2] in both else found[0], text) for text in texts]


def equivalent(answer: str, reference: str) -> bool | None:
    """Whether two LaTeX expressions are the same by math-verify's rules; None if one of them cannot be read.

    Two of those rules would make different answers the same, and are kept from it: words in text after a number are
    dropped as a unit, whatever they say, and capitals are read as small letters, so that R - r is nothing.
    """
    if _changing_words(answer) != _changing_words(reference):
        return None
    reference, answer = _told_apart(reference, answer)
    gold, given = (
        parse(
            f"\\boxed{{{text}}}",
            extraction_config=_BOX,
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
        for text in (reference, answer)
    )
    if not gold or not given:
        return None
    rounding = max([_ROUNDING, *map(len, re.findall(r"\.([0-9]+)", reference))])
    return bool(verify(gold, given, float_rounding=rounding, timeout_seconds=None, raise_on_error=True))
