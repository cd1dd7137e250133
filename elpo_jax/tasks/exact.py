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
LONGEST_READABLE = 4096  # characters; nothing reads longer ones
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
}
_NUMERALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {word: str(base) for base, word in enumerate(_NUMERALS, 2)} | {"sixteen": "16"}
_BASE = rf"base *([0-9]+|{'|'.join(_BASES)})"


def _subscript(found: re.Match[str]) -> str:
    """A numeral's base as it is written most."""
    base = found[found.lastindex].lower()  # the groups before it are braces
    return f"_{{{_BASES.get(base, base)}}}"


_SPELLINGS = (
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),  # math mode
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    # Commas that are typeset as belonging to a number go; bare ones may separate a list.
    (re.compile(r"(?<=[0-9])(?<!\b0)(?:\{,\}(?: ?\\!)?|, ?\\!|\\,) ?(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\! ?"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;: ]|\Z)|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\frac ?([0-9a-zA-Z]|\\pi)"), r"\\frac{\1}"),
    (re.compile(r"\\sqrt ?([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9a-zA-Z]|\\pi)"), r"\1{\2}"),
    (re.compile(rf"{_WRAPPER}\{{ ?base ?\}}", re.I), " base "),
    (
        re.compile(
            rf"_ ?(\{{ *)?(?:{_WRAPPER}(\{{ *))?(?:{_BASE}|({'|'.join(_BASES)}))(?![0-9a-z])(?(2) *\}})(?(1) *\}})",
            re.I,
        ),
        _subscript,
    ),
    (
        re.compile(
            rf"(?<=[0-9A-Z]) *(\( *)?(?:{_WRAPPER}(\{{[ (]*))?(?:in )?{_BASE}(?![0-9a-z])(?(2)[ )]*\}})(?(1) *\))", re.I
        ),
        _subscript,
    ),
    (re.compile(r"([\^_]) ?\{ ?([0-9a-zA-Z]|\\circ) ?\}"), r"\1\2"),
    (re.compile(rf"(?: ?,)? ?(?:{_WRAPPER}\{{ ?,? ?(?:and|or) ?\}}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])) ?"), ", "),
    (re.compile(r" +"), " "),
)
_NAMED = re.compile(
    r"(\\?[a-zA-Z]{1,12}(?:_[0-9a-zA-Z])?(?:\([a-z]\))?|\([a-z](?:, ?[a-z])+\)) ?(?:=|\\in(?![a-zA-Z])) ?(.+)"
)
_MATRIX = re.compile(r"\\begin\{([bp]?matrix)\}(.*)\\end\{\1\}")
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
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
    rf"(?: ?(?:(?P<mark>%|\^\\circ(?: ?(?:[CF]|{_WRAPPER}\{{ ?[CF] ?\}}))?)"
    rf"|{_WRAPPER}\{{(?P<wrapped>[^{{}}0-9^]*)(?:\^(?P<inner>[0-9]))?\}}"
    r"|(?<= )(?P<bare>[apAP]\.?[mM]\.?|[a-zA-Z]+(?: [a-zA-Z]+)?))(?: ?\^ ?(?P<power>[0-9]))?)?"
)
# What a unit in \text looks like; operators do not.
_UNIT = re.compile(r"[ (]*(?:[^\W\d_]+(?:[ .'/-]+[^\W\d_]+)*)?[ .,)]*")
_LETTERS = frozenset("mgshlLNJWV")  # single letters that are units
# Units with the ways to write them. Two of these are not the same; whether other words are is not known.
_UNITS = {
    spelling: unit
    for unit, spellings in {
        "%": "percent",
        "^\\circ": "degree,degrees",
        "^\\circ C": "degrees celsius,celsius",
        "^\\circ F": "degrees fahrenheit,fahrenheit",
        "in": "inch,inches",
        "ft": "foot,feet",
        "yd": "yds,yard,yards",
        "mi": "mile,miles",
        "mm": "millimeter,millimeters,millimetre,millimetres",
        "cm": "centimeter,centimeters,centimetre,centimetres",
        "m": "meter,meters,metre,metres",
        "km": "kilometer,kilometers,kilometre,kilometres",
        "mg": "milligram,milligrams",
        "g": "gm,gram,grams",
        "kg": "kilogram,kilograms",
        "oz": "ounce,ounces",
        "lb": "lbs,pound,pounds",
        "ml": "milliliter,milliliters,millilitre,millilitres",
        "l": "liter,liters,litre,litres",
        "s": "sec,secs,second,seconds",
        "min": "mins,minute,minutes",
        "h": "hr,hrs,hour,hours",
        "day": "days",
        "cent": "cents",
        "dollar": "dollars,usd",
        "am": "am",
        "pm": "pm",
    }.items()
    for spelling in (unit, *spellings.split(","))
}
_KNOWN = frozenset(_UNITS.values()) - {"^\\circ"}  # which may be of an angle or a temperature
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_SHORT_UNITS = frozenset(u for u in _UNITS if 1 < len(u) < 4 and u.isalpha()) | {"sq", "cu", "mph"}
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# What changes the number it follows in another way, or is no unit but a variable.
NOT_UNITS = re.compile(
    r"\b(half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?"
    r"|thousandths?|hundred|thousand|squared|cubed|root|power|factorial|choose|base|modulo|mod|plus|minus|times|over|per"
    r"|infinity|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega)\b"
)
_WORDS = re.compile(r"\(?([a-zA-Z][a-zA-Z .'-]*)\)?")
_ENDS = {"{": "}", "\\left": "\\right", "\\begin": "\\end"}
_VARIABLE = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_[0-9a-zA-Z])?")
_INDEX = re.compile(r"[0-9a-zA-Z)]_(?:[0-9a-zA-Z]|\{[^{}]*\})")


@dataclasses.dataclass(frozen=True)
class _Number:
    value: Fraction
    unit: str = ""
    power: str = ""
    base: int | None = None  # of the notation, where it is stated
    listed: "_Group | None" = dataclasses.field(default=None, compare=False)  # what its commas separate, if they do


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
    currency and units may be missing on one side; where both have one they must agree. 0.32 is right where the
    reference is 32%, but 32% is not where it is 0.32. The base of a numeral may be missing in the answer. `x =` or
    `x \in` before an answer may be missing on one side. Tuples, intervals and matrices are compared member by member,
    and their brackets must agree; the order in sets, and in lists without brackets, is of no importance. 70,110 is a
    number, and a list only where the other side is one.

    Args:
      answer: What was answered, without a box.
      reference: What is right.

    Returns:
      "different" only if that is certain without algebra: for numbers, for words, for groups with such members, and for
      kinds that are never the same (a set or list for a tuple, a ratio for a fraction, another base, unit or variable).
    """
    if len(answer) > LONGEST or len(reference) > LONGEST:
        return "equal" if answer.strip() == reference.strip() else "undecided"
    (name, given), (other, right) = _read(answer), _read(reference)
    found = _compare(given, right)
    if not name or not other or name == other:
        return found
    if name[0] == "(" or other[0] == "(":  # (y, x) = (2, 1)
        return "undecided"
    variables = _VARIABLE.fullmatch(name) and _VARIABLE.fullmatch(other) and name.lower() != other.lower()
    return found if found != "equal" else "different" if variables else "undecided"


def canonical_key(answer: str) -> str:
    """One string for the ways to write an answer that `compare` finds equal, but for units."""
    return _key(_read(answer)[1]) if len(answer) <= LONGEST else answer.strip()


def readable(answer: str) -> bool:
    r"""Whether a parser has a chance: not empty, not too long, and every {, \left and \begin has its end."""
    if not plain_latex(answer) or len(answer) > LONGEST_READABLE:
        return False
    opened = []
    for part in re.findall(r"\\(?:left|right|begin|end)(?![a-zA-Z])|\\.|[{}]", answer, re.DOTALL):
        if part in _ENDS:
            opened.append(_ENDS[part])
        elif part in _ENDS.values() and (not opened or opened.pop() != part):
            return False
    return not opened


def forget() -> None:
    """Forgets the answers that were read before, which are otherwise not read again."""
    _read.cache_clear()


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
    if isinstance(answer, _Number) and answer.listed and isinstance(reference, _Group):
        return _compare_groups(answer.listed, reference)
    if isinstance(reference, _Number) and reference.listed and isinstance(answer, _Group):
        return _compare_groups(answer, reference.listed)
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
    if answer.base not in (None, reference.base):
        return "different"
    if answer.value != reference.value:
        share = reference.unit == "%" and not answer.unit and 100 * answer.value == reference.value
        return "equal" if share else "different"
    if not answer.unit or not reference.unit:
        return "equal"
    if answer.power != reference.power:
        return "different"
    if answer.unit == reference.unit:
        return "equal"
    return "different" if answer.unit in _KNOWN and reference.unit in _KNOWN else "undecided"


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
    """Whether nothing about it is open; a number with commas in a group may be two."""
    if isinstance(answer, _Number):
        return answer.listed is None
    return isinstance(answer, _Group) and all(map(_exact, answer.members))


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
def _read(text: str) -> tuple[str, _Answer]:
    """The answer that a text of at most `LONGEST` characters states, after the name that it gives to it, or ""."""
    for before, after in _SYMBOLS.items():
        text = text.replace(before, after)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = text.strip(" ,;").removesuffix(".").rstrip()
    name, named = "", _NAMED.fullmatch(text)
    if named and "=" not in named[2]:
        name, text = named.groups()
    elif "=" in text:
        parts = [_NAMED.fullmatch(part.strip()) for part in _split(text, ",")]
        if len(parts) > 1 and parts[0] and len({part and part[1] for part in parts}) == 1:  # x = 1 or x = 2
            name, text = parts[0][1], ", ".join(part[2] for part in parts if part)
    return name.replace(" ", ""), _read_part(text, 0)


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
        parts = _split(text, ",")
        return dataclasses.replace(number, listed=_group(",", parts, depth)) if len(parts) > 1 else number
    parts = _members(text)
    if len(parts) > 1:
        return _group(",", parts, depth)
    matrix = _MATRIX.fullmatch(text)
    if matrix and "\\begin" not in matrix[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return _Group("matrix", tuple(_group("row", row.split("&"), depth) for row in rows))
    inner = _inside(text)
    if inner is not None:
        brackets, content = inner
        parts = _members(content)
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


def _members(text: str) -> list[str]:
    """What commas separate; only those with a space after them do in 1,000, 2,000."""
    parts, spaced = _split(text, ","), _split(text, ", ")
    return spaced if 1 < len(spaced) < len(parts) and all(map(_read_number, map(str.strip, spaced))) else parts


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
    said = found["wrapped"] or found["bare"] or ""
    if not _UNIT.fullmatch(said):
        return None
    words = said.replace(".", "").strip(" (),").split()
    scale = _SCALES.get(words[0].lower(), 1) if words else 1
    words = words[1:] if scale > 1 else words
    if not all(map(_is_bare_unit if found["bare"] else _is_unit, words)):
        return None
    power = found["power"] or found["inner"] or ""
    if not power and len(words) > 1 and words[0].lower() in _POWERS:
        power, words = _POWERS[words[0].lower()], words[1:]
    unit = " ".join(words).lower()
    if found["mark"]:
        kind = found["mark"].rstrip("} ")[-1]
        unit = kind if kind == "%" else "^\\circ" + (f" {kind}" if kind in "CF" else "")
    value, base = _value(found), found["base"] or found["bases"]
    if value is None or (power and not unit):
        return None
    return _Number(scale * value, _UNITS.get(unit, unit.removesuffix("s")), power, None if base is None else int(base))


def _is_unit(word: str) -> bool:
    return not NOT_UNITS.search(word.lower()) and all(
        len(part) > 1 or part in _LETTERS for part in re.split("[/-]", word)
    )


def _is_bare_unit(word: str) -> bool:
    """Whether a word that stands after a number, but not in text, is a unit and no product of variables."""
    word = word.lower()
    return _is_unit(word) and (word in _SHORT_UNITS or (len(word) >= 4 and bool(re.search("[aeiouy]", word))))


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
