r"""Asks math-verify whether two answers are the same. For workers (`math_worker.py`) only: there is no time limit here.

Both answers go in as the whole of a `\boxed{}` and nothing is looked for elsewhere in them, so a part of an answer can
not pass for it.
"""

import logging
import re

from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns where its own time limits are off

_BOX = (LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),)
_ROUNDING = 6  # decimals to which floats are compared, if the reference does not have more


def equivalent(answer: str, reference: str) -> bool | None:
    """Whether two LaTeX expressions are the same by math-verify's rules; None if one of them cannot be read."""
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
