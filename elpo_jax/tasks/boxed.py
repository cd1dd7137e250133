r"""Reads the final `\boxed{}` answer of a text and compares it with a reference as an exact number.

Nothing is ever evaluated: a number is read by pattern into a fraction, so 0.5, 1/2 and \frac{1}{2} are equal and 0.1 is
not approximately anything. Units around the number are tolerated; a second number is not.
"""

import re
from fractions import Fraction

from elpo_jax.tasks.base import Grade

_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\[{}]|(?P<open>\{)|(?P<close>\})")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?:[a-z]\s*=\s*)?"  # x = 57
    r"(?P<sign>[+-]?)\s*\$?\s*"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))"
    r"(?:\.(?P<decimals>[0-9]*)|\s*/\s*(?P<below>[0-9]+))?"
    r"\s*(?P<unit>[a-z]+(?: [a-z]+)?)?\s*\.?",
    re.IGNORECASE,
)
# Words that change the number they follow, so that reading them as a unit would read another number.
_NOT_UNITS = re.compile(
    r"\b(hundred|thousand|million|trillion|billion|half|halves|thirds?|quarters?|squared|cubed"
    r"|and|or|to|plus|minus|times|over|per|e)\b",
    re.IGNORECASE,
)
_LONGEST = 80  # characters of a box that can be a number; bounds the work on hostile text


def last_boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{...}` whose braces balance, without outer spaces; None if there is none."""
    opened: list[int | None] = []  # where the contents of each open box begin; None for another open brace
    begin, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace["box"]:
            opened.append(brace.end())
        elif brace["open"]:
            opened.append(None)
        elif brace["close"] and opened:
            closed = opened.pop()
            if closed is not None and closed > begin:
                begin, end = closed, brace.start()
    return None if begin < 0 else text[begin:end].strip()


def read_number(text: str) -> Fraction | None:
    r"""The one number that `text` states, exactly; None if it states none or more than one.

    Understands signs, decimals, `a/b` and `\frac{a}{b}`, thousands commas, `$` and up to two words of unit after the
    number (in or out of `\text{}`).
    """
    if len(text) > _LONGEST:
        return None
    for _ in range(2):  # \text{\text{..}} does occur; deeper nesting is not a number
        text = _WRAPPED.sub(r" \1 ", text)
    text = _FRACTION.sub(r" \1/\2 ", text)
    for latex, plain in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\ ", " "), ("\\$", "$"), ("~", " "), ("−", "-")):
        text = text.replace(latex, plain)
    text = " ".join(text.split()).strip("$ ")
    found = _NUMBER.fullmatch(text)
    if found is None or _NOT_UNITS.search(found["unit"] or ""):
        return None
    whole, decimals, below = found["whole"].replace(",", "") or "0", found["decimals"] or "", found["below"] or "1"
    if int(below) == 0:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals) * int(below))
    return -value if found["sign"] == "-" else value


def canonical(text: str) -> str:
    """One string for all ways to write the same answer: the reduced fraction, or the text without spaces and case."""
    number = read_number(text)
    return str(number) if number is not None else "".join(text.split()).lower()


def grade_boxed(text: str, reference: str) -> Grade:
    r"""Grades the last `\boxed{}` of `text` against `reference`; success is worth 1, everything else 0."""
    box = last_boxed(text)
    if not box:
        return Grade(False, 0.0, "no answer")
    answer = canonical(box)
    if answer == canonical(reference):
        return Grade(True, 1.0, "correct", answer)
    return Grade(False, 0.0, f"wrong answer: got {box if len(box) <= 40 else box[:40] + '...'}", answer)
