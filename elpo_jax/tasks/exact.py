r"""Compares two mathematical answers exactly, as far as that can be done without algebra.

An answer is read by pattern into numbers, tuples, intervals, sets, lists, matrices, ratios and text, after the ways to
typeset the same thing in LaTeX have been made one. There are three outcomes: equal, different, and undecided, which is
left to a computer algebra system. Nothing is evaluated, and the work is bounded for hostile text.
"""

import dataclasses
import functools
import re
from fractions import Fraction
from typing import Literal

Outcome = Literal["equal", "different", "undecided"]

LONGEST = 1000  # characters; longer answers are equal only as they stand
_DEEPEST = 6  # brackets within brackets
_MOST = 64  # members of a list or set

_WRAPPER = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf)|operatorname|mbox|hbox)\s*"
_WRAPPED = re.compile(_WRAPPER + r"\{([^{}]*)\}")
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": "\\times ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "°": "^\\circ ",
    "∪": "\\cup ",
    "∈": "\\in ",
    "±": "\\pm ",
    "²": "^2",
    "³": "^3",
    "\\lbrace": "\\{",
    "\\rbrace": "\\}",
    "\\infin": "\\infty",
    "\\%": "%",
    "\\$": "",
    "$": "",
    "{,}": ",",
}
_SPELLINGS = (
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),  # math mode
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<!\\)\\! ?"), ""),
    (re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\frac ?([0-9a-zA-Z]|\\pi)"), r"\\frac{\1}"),
    (re.compile(r"\\sqrt ?([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9a-zA-Z]|\\pi)"), r"\1{\2}"),
    (re.compile(r"([\^_]) ?\{ ?([0-9a-zA-Z]|\\circ) ?\}"), r"\1\2"),
    (re.compile(rf"(?: ?,)? ?(?:{_WRAPPER}\{{ ?(?:and|or) ?\}}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])) ?"), ","),
    (re.compile(r" +"), " "),
)
_NAMED = re.compile(
    r"(\\?[a-zA-Z]{1,12}(?:_[0-9a-zA-Z])?(?:\([a-z]\))?|\([a-z](?:, ?[a-z])+\)) ?(?:=|\\in(?![a-zA-Z])) ?(.+)"
)
_MATRIX = re.compile(r"\\begin\{([bp]?matrix)\}(.*)\\end\{\1\}")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_SIGNED = r"[+-]? ?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
# A number, and what may follow it without changing it: a percent sign, degrees, words in \text, or words that stand
# apart.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?"
    rf"(?:(?P<whole>{_DIGITS}|(?=\.[0-9]))(?P<point>\.[0-9]*)?"
    r"(?: ?/ ?(?P<below>[0-9]+)|_(?:(?P<base>[0-9])|\{(?P<bases>[0-9]+)\}))?"
    r"|(?:(?P<mixed>[0-9]+) ?)?"
    rf"(?:\\frac ?\{{ ?(?P<over>{_SIGNED}) ?\}} ?\{{ ?(?P<under>{_SIGNED}) ?\}}"
    r"|(?<=[0-9] )(?P<top>[0-9]+) ?/ ?(?P<bottom>[0-9]+)))"
    rf"(?: ?(?:(?P<mark>%|\^\\circ(?: ?[CF])?)|{_WRAPPER}\{{(?P<wrapped>[^{{}}0-9^]*)(?:\^(?P<inner>[0-9]))?\}}"
    r"|(?<= )(?P<bare>[a-zA-Z]+(?: [a-zA-Z]+)?))(?: ?\^ ?(?P<power>[0-9]))?)?"
)
_SHORT_UNITS = frozenset(
    ("cm", "mm", "km", "ft", "in", "mi", "kg", "mg", "lb", "lbs", "oz", "ml", "mph", "hr", "hrs", "min", "sec", "day")
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What changes the number it follows in another way, or is no unit but a variable.
_NOT_UNITS = re.compile(
    r"\b(half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?"
    r"|thousandths?|hundred|thousand|squared|cubed|root|power|factorial|choose|base|modulo|plus|minus|times|over|per"
    r"|infinity|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|[eijnxyz])\b"
)
_WORDS = re.compile(r"\(?([a-zA-Z][a-zA-Z .'-]*)\)?")
_INDEX = re.compile(r"[0-9a-zA-Z)]_(?:[0-9a-zA-Z]|\{[^{}]*\})")


@dataclasses.dataclass(frozen=True)
class _Number:
    value: Fraction
    unit: str = ""
    power: str = ""
    base: int | None = None  # of the notation, where it is stated


@dataclasses.dataclass(frozen=True)
class _Group:
    """Members in brackets: `kind` is the two brackets, "matrix", "row", ":" or, where the order is of no importance,
    "{}", "," (no brackets) or "cup"."""

    kind: str
    members: tuple["_Answer", ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ("{}", ",", "cup")


@dataclasses.dataclass(frozen=True)
class _Text:
    text: str
    words: str = ""  # if it is nothing but words
    wrapped: bool = False  # the words were in \text


_Answer = _Number | _Group | _Text


def compare(answer: str, reference: str) -> Outcome:
    r"""Whether two answers are the same.

    Numbers are compared as fractions, without a tolerance: 0.5 is 1/2, and 0.33 is not 1/3. A percent sign, degrees,
    currency and units may be missing on one side; where both have one they must agree. The base of a numeral may be
    missing in the answer. `x =` or `x \in` before an answer counts for nothing. Tuples, intervals and matrices are
    compared member by member, and their brackets must agree; the order in sets, and in lists without brackets, is of no
    importance.

    Args:
      answer: What was answered, without a box.
      reference: What is right.

    Returns:
      "different" only if that is certain without algebra: for numbers, for words, for groups with such members, and for
      kinds that are never the same (a set or list for a tuple, a ratio for a fraction, another base).
    """
    if len(answer) > LONGEST or len(reference) > LONGEST:
        return "equal" if answer.strip() == reference.strip() else "undecided"
    return _compare(_read(answer), _read(reference))


def canonical_key(answer: str) -> str:
    """One string for the ways to write an answer that `compare` finds equal, but for units."""
    return _key(_read(answer)) if len(answer) <= LONGEST else answer.strip()


def plain_latex(text: str) -> str:
    """An answer without math-mode signs and brackets' sizes, which could hide parts of it from a parser."""
    for before, after in _SPELLINGS[1:3]:
        text = before.sub(after, text)
    return text.replace("\\$", "").replace("$", "").strip()


def _compare(answer: _Answer, reference: _Answer) -> Outcome:
    if isinstance(answer, _Number) and isinstance(reference, _Number):
        return _compare_numbers(answer, reference)
    if isinstance(answer, _Group) and isinstance(reference, _Group):
        return _compare_groups(answer, reference)
    if isinstance(answer, _Text) and isinstance(reference, _Text):
        return _compare_texts(answer, reference)
    for one, other in ((answer, reference), (reference, answer)):
        if isinstance(one, _Group):
            if one.kind == ":":
                return "different"
            if isinstance(other, _Number) and len({_key(member) for member in one.members}) > 1 and _exact(one):
                return "different"
        if isinstance(one, _Number) and isinstance(other, _Text) and (other.wrapped or one.base is not None):
            return "different"
    return "undecided"


def _compare_numbers(answer: _Number, reference: _Number) -> Outcome:
    if answer.value != reference.value or answer.base not in (None, reference.base):
        return "different"
    if not answer.unit or not reference.unit:
        return "equal"
    if answer.power != reference.power:
        return "different"
    return "equal" if answer.unit == reference.unit else "undecided"


def _compare_groups(answer: _Group, reference: _Group) -> Outcome:
    if (answer.kind == ":") != (reference.kind == ":"):
        return "different"
    if (answer.kind == "matrix") != (reference.kind == "matrix"):
        return "undecided"
    if answer.ordered != reference.ordered:
        # (1, 2) may be meant as the list 1, 2; nothing else is the same.
        return "undecided" if reference.kind == "," or "cup" in (answer.kind, reference.kind) else "different"
    if answer.ordered:
        if answer.kind != reference.kind or len(answer.members) != len(reference.members):
            return "different"
        found = [_compare(a, b) for a, b in zip(answer.members, reference.members, strict=True)]
        return "different" if "different" in found else "undecided" if "undecided" in found else "equal"
    if "cup" in (answer.kind, reference.kind) and answer.kind != reference.kind:
        return "undecided"
    if max(len(answer.members), len(reference.members)) > _MOST:
        return "equal" if answer == reference else "undecided"
    table = [[_compare(a, b) for b in reference.members] for a in answer.members]
    if all("equal" in row for row in table) and all("equal" in column for column in zip(*table, strict=True)):
        return "equal"
    return "different" if answer.kind != "cup" and _exact(answer) and _exact(reference) else "undecided"


def _compare_texts(answer: _Text, reference: _Text) -> Outcome:
    if answer.words and reference.words and (answer.wrapped or reference.wrapped):
        return "equal" if answer.words == reference.words else "different"
    if answer.text == reference.text:
        return "equal"
    # A parser may drop the index of 1A_{16}, and with it the base.
    return "different" if sorted(_INDEX.findall(answer.text)) != sorted(_INDEX.findall(reference.text)) else "undecided"


def _exact(answer: _Answer) -> bool:
    return isinstance(answer, _Number) or (isinstance(answer, _Group) and all(map(_exact, answer.members)))


def _key(answer: _Answer) -> str:
    if isinstance(answer, _Number):
        return str(answer.value) if answer.base is None else f"{answer.value}_{answer.base}"
    if isinstance(answer, _Text):
        return answer.words if answer.wrapped or len(answer.words) > 3 else answer.text
    keys = [_key(member) for member in answer.members]
    if not answer.ordered:
        keys = sorted(set(keys))
    open_, close = {",": "{}", "cup": "{}", ":": "::", "row": "[]", "matrix": "[]"}.get(answer.kind, answer.kind)
    return open_ + ",".join(keys) + close


@functools.lru_cache(maxsize=8192)
def _read(text: str) -> _Answer:
    """The answer that a text of at most `LONGEST` characters states."""
    for before, after in _SYMBOLS.items():
        text = text.replace(before, after)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = text.strip(" ,;").removesuffix(".").rstrip()
    named = _NAMED.fullmatch(text)
    if named and "=" not in named[2]:
        text = named[2]
    elif "=" in text:
        parts = [_NAMED.fullmatch(part) for part in _split(text, ",")]
        if len(parts) > 1 and parts[0] and len({part and part[1] for part in parts}) == 1:  # x = 1 or x = 2
            text = ",".join(part[2] for part in parts if part)
    return _read_part(text, 0)


def _read_part(text: str, depth: int) -> _Answer:
    text = text.strip()
    if depth > _DEEPEST:
        return _Text(_squeezed(text))
    for separator, kind in (("\\cup", "cup"), (";", ",")):
        parts = _split(text, separator)
        if len(parts) > 1:
            return _group(kind, parts, depth)
    number = _read_number(text)  # before commas: 1,234
    if number is not None:
        return number
    parts = _split(text, ",")
    if len(parts) > 1:
        return _group(",", parts, depth)
    matrix = _MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return _Group("matrix", tuple(_group("row", row.split("&"), depth) for row in rows))
    inner = _inside(text)
    if inner is not None:
        brackets, content = inner
        parts = _split(content, ",")
        if brackets == "\\{\\}" or len(parts) > 1:
            return _group("{}" if "{" in brackets else brackets, parts, depth)
        if brackets in ("()", "{}"):
            return _read_part(content, depth + 1)
    parts = _split(text, ":")
    if len(parts) > 1:
        return _group(":", parts, depth)
    if text.count("\\pm") == 1:
        return _group(",", [text.replace("\\pm", "+"), text.replace("\\pm", "-")], depth)
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped and any(c.isdigit() for c in wrapped[1]):
        return _read_part(wrapped[1], depth + 1)
    words = _WORDS.fullmatch((wrapped[1] if wrapped else text).strip())
    if words:
        said = " ".join(words[1].split()).rstrip(".")
        return _Text(_squeezed(text), said if len(said) == 1 else said.lower(), wrapped is not None)
    return _Text(_squeezed(text))


def _group(kind: str, parts: list[str], depth: int) -> _Group:
    members = [_read_part(part, depth + 1) for part in parts if part.strip() or kind not in (",", "{}")]
    if kind in (",", "{}"):  # what 1 \pm 2 stands for
        flat = [m.members if isinstance(m, _Group) and m.kind == "," else (m,) for m in members]
        members = [member for several in flat for member in several]
    return _Group(kind, tuple(members))


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no bracket; one part where brackets do not balance."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif text.startswith("\\begin", i):
            depth += 1
        elif text.startswith("\\end", i):
            depth -= 1
        elif depth == 0 and text.startswith(separator, i):
            parts.append(text[begin:i])
            begin = i = i + len(separator)
            continue
        if depth < 0:
            return [text]
        i += 1
    return [*parts, text[begin:]] if depth == 0 else [text]


def _inside(text: str) -> tuple[str, str] | None:
    """The brackets around a text, and what is in them; None if it begins and ends otherwise."""
    for open_, close in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")):
        if text.startswith(open_) and text.endswith(close) and len(text) > len(open_) + len(close):
            content, depth = text[len(open_) : -len(close)], 0
            for c in content:
                depth += (c in "([{") - (c in ")]}")
                if depth < 0:
                    return None
            return None if depth else (open_ + close, content)
    return None


def _read_number(text: str) -> _Number | None:
    found = _NUMBER.fullmatch(text)
    if not found:
        return None
    first, *more = (found["wrapped"] or found["bare"] or "").lower().replace(".", " ").split() or [""]
    scale = _SCALES.get(first, 1)
    words = " ".join(more if scale > 1 else [first, *more])
    if _NOT_UNITS.search(words) or (found["bare"] and not _is_unit(words)):
        return None
    unit = found["mark"] or {"degrees": "^\\circ", "degree": "^\\circ", "percent": "%"}.get(words, words)
    value, base = _value(found), found["base"] or found["bases"]
    power = found["power"] or found["inner"] or ""
    if value is None or (power and not unit):
        return None
    return _Number(scale * value, unit.removesuffix("s"), power, None if base is None else int(base))


def _is_unit(words: str) -> bool:
    return all(word in _SHORT_UNITS or (len(word) >= 4 and re.search("[aeiouy]", word)) for word in words.split())


def _value(found: re.Match[str]) -> Fraction | None:
    """The number of a match of `_NUMBER`; None if it divides by zero."""
    whole = (found["whole"] or "0").replace(",", "").replace(" ", "")
    over, under = found["over"] or found["top"], found["under"] or found["bottom"]
    if over is not None and under is not None:
        above, below = (Fraction(part.replace(" ", "")) for part in (over, under))
        if not below:
            return None
        value = above / below
        if found["mixed"]:
            if not 0 < value < 1:
                return None
            value += int(found["mixed"])
    else:
        below = int(found["below"] or 1)
        if not below:
            return None
        value = Fraction(whole + (found["point"] or "").rstrip(".")) / below
    return -value if found["sign"] == "-" else value


def _squeezed(text: str) -> str:
    """Without the spaces that typesetting ignores; one between two digits stays."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", _WRAPPED.sub(r"\1", text))
