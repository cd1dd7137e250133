"""Draws the stories of the wordmath family: first the arithmetic and its numbers, then the words.

A story follows one quantity through moves. Each move is one to three operations on the running value, and every
operation will take one tool call. All results are whole numbers from 2 to 9,999 and all divisions are exact.
"""

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Sequence

from elpo_jax.tasks import phrases

SMALLEST, LARGEST = 2, 9_999
HARD_FROM = 4  # operations

# What is counted: the theme's things, containers of them, goods that were bought, dollars, or people on a vehicle.
THINGS = frozenset({"things"})
OBJECTS = frozenset({"things", "packs", "goods"})
MONEY = frozenset({"money"})
PEOPLE = frozenset({"people"})
OWNED = OBJECTS | MONEY
ANY = OWNED | PEOPLE
TOLD = THINGS | MONEY | PEOPLE  # what a story can begin with

Operand = int | str  # a literal, or "#k" for the result of operation k (1-based)
Operation = tuple[str, Operand, Operand]  # operator of "+-*" or "//", left, right


@dataclasses.dataclass(frozen=True)
class Move:
    """A kind of event, or a kind of question that takes arithmetic.

    Attributes:
      arithmetic: Operations separated by "; ". Operands: x the running value, t the result just before, s the value at
        the start, a and b the numbers drawn, or a constant that a unit implies (12 in a dozen, 7 days in a week).
      units: What can be counted when it happens.
      weight: How often it is drawn.
      a: Range of its first number.
      b: Range of its second number.
      counts: What is counted afterwards; None for the same as before.
      swaps: The story goes on about the other person.
      compares: Speaks of both people, so only before the story has gone on to the other.
      hard: Refers back, goes backwards or takes several operations at once: not in stories below `HARD_FROM`.
    """

    arithmetic: str
    units: frozenset[str]
    weight: float = 1.0
    a: Sequence[int] = range(2, 100)
    b: Sequence[int] = range(2, 13)
    counts: str | None = None
    swaps: bool = False
    compares: bool = False
    hard: bool = False

    def operations(self) -> tuple[tuple[str, str, str], ...]:
        """(operator, left, right) of each operation, as written."""
        words = [operation.split() for operation in self.arithmetic.split("; ") if operation]
        return tuple((operator, left, right) for left, operator, right in words)


_FEW = range(2, 13)
_DOZENS = range(2, 9)
_HOURS = range(2, 7)

STARTS = {
    "start": Move("", TOLD, 3.0, a=range(5, 100)),
    "start_groups": Move("a * b", TOLD, 2.0, a=_FEW),
    "start_sum": Move("a + b", TOLD, 1.0, b=range(2, 100)),
    "start_dozen": Move("a * 12", THINGS, 0.7, a=_DOZENS),
    "start_weeks": Move("a * 7; b * t", THINGS | MONEY, 0.7, a=_HOURS),
}

MOVES = {
    "add": Move("x + a", ANY, 4.0),
    "add_own": Move("x + a", THINGS, 2.0),
    "sub": Move("x - a", ANY, 6.0),
    "add_groups": Move("a * b; x + t", TOLD, 1.5, a=_FEW),
    "sub_groups": Move("a * b; x - t", TOLD, 1.5, a=_FEW),
    "add_dozen": Move("a * 12; x + t", THINGS | PEOPLE, 0.7, a=_DOZENS),
    "sub_dozen": Move("a * 12; x - t", THINGS | PEOPLE, 0.7, a=_DOZENS),
    "add_weeks": Move("a * 7; b * t; x + t", THINGS | MONEY, 0.7, a=_HOURS, hard=True),
    "sub_weeks": Move("a * 7; b * t; x - t", THINGS | MONEY, 0.7, a=_HOURS, hard=True),
    "double": Move("x * 2", ANY, 1.0),
    "triple": Move("x * 3", ANY, 0.7),
    "times": Move("x * a", OWNED, 1.2, a=range(4, 13)),
    "other_times": Move("x * a", OWNED, 1.0, a=_FEW, swaps=True, compares=True),
    "other_more": Move("x + a", OWNED, 0.7, swaps=True, compares=True),
    "other_fewer": Move("x - a", OWNED, 0.7, swaps=True, compares=True),
    "half": Move("x // 2", ANY, 2.5),
    "share": Move("x // a", OWNED, 4.0, a=range(3, 13)),
    "pack": Move("x // a", THINGS, 5.0, a=_FEW, counts="packs"),
    "sell": Move("x * a", OBJECTS, 1.2, a=_FEW, counts="money"),
    "spend": Move("x // a", MONEY, 5.0, a=_FEW, counts="goods"),
    "again": Move("x + s", TOLD, 0.7, hard=True),
    "drop": Move("x - s", THINGS | MONEY, 0.7, hard=True),
}

QUESTIONS = {
    "ask_pack": Move("x // a", THINGS | PEOPLE, 5.0, a=_FEW),
    "ask_each": Move("x // a", OWNED, 5.0, a=_FEW),
    "ask_cost": Move("x * a", OBJECTS | PEOPLE, 1.0, a=_FEW),
    "ask_weight": Move("x * a", THINGS, 0.7, a=_FEW),
    "ask_dozen": Move("x // 12", THINGS, 4.0),
    "ask_days": Move("x // a", THINGS, 3.0, a=_FEW),
    "ask_weeks": Move("x // a; t // 7", THINGS, 9.0, a=_FEW, hard=True),
    "ask_need": Move("a - x", OWNED, 1.5, hard=True),
    "ask_gain": Move("x - s", TOLD, 0.7, hard=True),
    "ask_both_times": Move("x * a; x + t", THINGS | MONEY, 0.7, a=_FEW, compares=True, hard=True),
    "ask_both_more": Move("x + a; x + t", THINGS | MONEY, 0.5, compares=True, hard=True),
    "ask_both_fewer": Move("x - a; x + t", THINGS | MONEY, 0.5, compares=True, hard=True),
    "ask_cents": Move("x * 100", MONEY, 0.7),
    "ask_buy": Move("x * 100; t // a", MONEY, 1.5, a=(5, 10, 20, 25, 50)),
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """A move with its numbers (None where it has none) and what was counted before it."""

    move: str
    unit: str
    a: int | None
    b: int | None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A story before it is put into words.

    Attributes:
      facts: In the order in which they happen.
      chain: The arithmetic; its last result is the answer.
      results: Of each operation.
      idle: Numbers of the facts that no answer needs.
      date: A day of May that no answer needs, or None.
    """

    facts: tuple[Fact, ...]
    chain: tuple[Operation, ...]
    results: tuple[int, ...]
    idle: tuple[int, ...]
    date: int | None

    def numbers(self) -> list[int]:
        """Every number that is written in digits, in ascending order."""
        drawn = [n for fact in self.facts for n in (fact.a, fact.b) if n is not None]
        return sorted([*drawn, *self.idle, *([] if self.date is None else [self.date])])


@dataclasses.dataclass
class _Draft:
    """A plot under construction: x and s are the running and the first value, each with how operations refer to it."""

    unit: str
    hard: bool
    facts: list[Fact] = dataclasses.field(default_factory=list)
    chain: list[Operation] = dataclasses.field(default_factory=list)
    results: list[int] = dataclasses.field(default_factory=list)
    x: tuple[int, Operand] = (0, 0)
    s: tuple[int, Operand] = (0, 0)
    recalls: bool = False  # "at first" still means one clear number of what is counted
    swapped: bool = False  # the story is about the other person

    def append(self, name: str, rng: random.Random) -> bool:
        """Draws the move's numbers; False, and no change, if a result would be out of range or not whole."""
        move = _ALL[name]
        a = rng.choice(move.a) if "a" in _DRAWN[name] else None
        b = rng.choice(move.b) if "b" in _DRAWN[name] else None
        values: dict[str, tuple[int, Operand]] = {"x": self.x, "s": self.s, "a": (a, a), "b": (b, b)}
        chain: list[Operation] = []
        results: list[int] = []
        for operator, left, right in _OPERATIONS[name]:
            u, u_operand = values.get(left) or (int(left), int(left))
            v, v_operand = values.get(right) or (int(right), int(right))
            if operator == "//" and u % v:
                return False
            result = {"+": u + v, "-": u - v, "*": u * v, "//": u // v}[operator]
            if not SMALLEST <= result <= LARGEST:
                return False
            chain.append((operator, u_operand, v_operand))
            results.append(result)
            values["t"] = (result, f"#{len(self.chain) + len(chain)}")
        self.chain += chain
        self.results += results
        self.facts.append(Fact(name, self.unit, a, b))
        self.x = values["t"] if chain else values["a"]
        self.unit = move.counts or self.unit
        self.swapped |= move.swaps
        self.recalls &= not move.swaps and move.counts is None
        return True


_ALL = STARTS | MOVES | QUESTIONS
_OPERATIONS = {name: move.operations() for name, move in _ALL.items()}
_DRAWN = {  # the numbers that a move draws; a bare start is its own number
    name: {operand for operation in operations for operand in operation[1:]} & {"a", "b"} if operations else {"a"}
    for name, operations in _OPERATIONS.items()
}
_ASKED = {1: 0.5, 2: 0.25}  # how often the operations that are left go into the question
_CLEAR_STARTS = frozenset({"start", "start_groups", "start_dozen"})
_DECREASES = frozenset({"sub", "sub_groups", "sub_dozen", "sub_weeks", "half", "drop"})


def draw_plot(rng: random.Random, difficulty: int) -> Plot:
    """A story of exactly `difficulty` >= 2 operations."""
    draft = _Draft(rng.choices(("things", "money", "people"), (6, 2, 1))[0], difficulty >= HARD_FROM)
    _advance(draft, "start", 0, difficulty - 1, rng)
    draft.s, draft.recalls = draft.x, draft.facts[0].move in _CLEAR_STARTS
    while (left := difficulty - len(draft.chain)) > 0:
        asked = rng.random() < _ASKED.get(left, 0.0) and _advance(draft, "question", left, left, rng)
        if not asked and not _advance(draft, "move", 1, left, rng):
            draft.append("add", rng) or draft.append("sub", rng)
    many = rng.choices((0, 1, 2), (11, 8, 1) if difficulty < 5 else (6, 9, 5))[0]
    idle = tuple(rng.randrange(2, 100) for _ in range(many))
    date = rng.randrange(2, 32) if rng.random() < 0.15 else None
    return Plot(tuple(draft.facts), tuple(draft.chain), tuple(draft.results), idle, date)


def _advance(draft: _Draft, kind: str, fewest: int, most: int, rng: random.Random) -> bool:
    """Appends a move of `fewest` to `most` operations; False if a few draws found none whose results are in range."""
    names, weights = _candidates(kind, draft.unit, fewest, min(most, 3), draft.recalls, not draft.swapped, draft.hard)
    last = draft.facts[-1].move if draft.facts else ""
    drawn = (rng.choices(names, cum_weights=weights)[0] for _ in range(12 if names else 0))
    return any(name != last and draft.append(name, rng) for name in drawn)


@functools.cache
def _candidates(
    kind: str, unit: str, fewest: int, most: int, recalls: bool, compares: bool, hard: bool
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names of the moves that are possible now, and their cumulative weights."""
    names = tuple(
        name
        for name, move in {"start": STARTS, "move": MOVES, "question": QUESTIONS}[kind].items()
        if unit in move.units
        and fewest <= len(_OPERATIONS[name]) <= most
        and (recalls or not any("s" in operation for operation in _OPERATIONS[name]))
        and (compares or not move.compares)
        and (hard or not move.hard)
    )
    return names, tuple(itertools.accumulate(_ALL[name].weight for name in names))


@dataclasses.dataclass
class _Cast:
    """The words of one story; what changes while it is told is the person, what is counted, and who was named."""

    person: str
    other: str
    woman: bool
    theme: phrases.Theme
    nouns: tuple[str, str]
    vehicle: str
    named: bool = False  # whether a pronoun can stand for the person already
    swapped: bool = False

    def words(self, fact_unit: str, rng: random.Random) -> dict[str, str]:
        """What the placeholders of one clause stand for."""
        thing = rng.choice([pair for pair in phrases.ITEMS if pair != self.nouns])
        holders = {"things": self.theme.containers, "people": phrases.VANS}.get(fact_unit, phrases.BOXES)
        container = rng.choice(holders)
        pronoun = self.named and rng.random() < 0.8
        return {
            "p": ("she" if self.woman else "he") if pronoun else self.person,
            "him": "her" if self.woman else "him",
            "his": "her" if self.woman else "his",
            "O": self.other,
            "N": self.nouns[0],
            "s": self.nouns[1],
            "did": self.theme.verb,
            "C": container[0],
            "c": container[1],
            "V": self.vehicle,
            "I": thing[0],
            "i": thing[1],
        }

    def after(self, move: Move, phrase: str, words: dict[str, str]) -> None:
        """Follows the story over a clause."""
        self.named |= "{p}" in phrase
        if move.swaps:
            self.person, self.other, self.woman = self.other, self.person, not self.woman
            self.named, self.swapped = False, True
        if move.counts is not None:
            self.nouns = {
                "packs": (words["C"], words["c"]),
                "goods": (words["I"], words["i"]),
                "money": ("dollars", "dollar"),
            }[move.counts]


_POINTS_BACK = re.compile(r"\b(that|it|them|another)\b")


@dataclasses.dataclass(frozen=True)
class _Clause:
    """A clause of a story, without capital and full stop.

    Attributes:
      text: Its words.
      movable: Whether a date or "just before that" can open it, so that it can change places with its like.
      anchored: Whether it names what is counted, so that an idle fact before it cannot be taken for its subject.
    """

    text: str
    movable: bool = False
    anchored: bool = False


def tell(plot: Plot, rng: random.Random) -> str:
    """The prompt: the plot in words, idle facts among them, the question last."""
    cast = _draw_cast(plot.facts[0].unit, rng)
    clauses = [_clause(fact, number, cast, rng) for number, fact in enumerate(plot.facts)]
    last = plot.facts[-1]
    if last.move not in QUESTIONS:
        unit = _ALL[last.move].counts or last.unit
        kind = "ask_left" if last.move in _DECREASES and rng.random() < 0.6 else "ask"
        choices = [p for p in _phrases(kind, unit, cast.theme) if "{p}" in p or not cast.swapped]
        clauses.append(_Clause(rng.choice(choices).format_map(cast.words(unit, rng)), anchored=True))
    if len(plot.chain) >= 5 and rng.random() < 0.3:
        _tell_out_of_order(clauses, rng)
    if plot.date is not None:
        _date(clauses, plot.date, rng)
    idles = rng.sample(phrases.IDLE_PEOPLE if last.unit == "people" else phrases.IDLE, k=len(plot.idle))
    for idle, number in zip(idles, plot.idle, strict=True):
        opens = "{V}" not in idle  # a story cannot begin with the vehicle that its first fact introduces
        places = [i for i, clause in enumerate(clauses) if (clause.anchored if i else opens)] or [len(clauses) - 1]
        words = {"a": number, "A": cast.person, "O": cast.other, "V": cast.vehicle, "pets": rng.choice(phrases.PETS)}
        clauses.insert(rng.choice(places), _Clause(idle.format_map(words)))
    return " ".join(_sentence(clause.text) for clause in clauses)


def _draw_cast(unit: str, rng: random.Random) -> _Cast:
    woman = rng.random() < 0.5
    names = rng.choice(phrases.WOMEN), rng.choice(phrases.MEN)  # so that every pronoun is clear
    person, other = names if woman else names[::-1]
    theme = rng.choice(phrases.THEMES)
    nouns = {"money": ("dollars", "dollar"), "people": ("people", "person")}.get(unit) or rng.choice(theme.nouns)
    return _Cast(person, other, woman, theme, nouns, rng.choice(phrases.VEHICLES))


def _phrases(move: str, unit: str, theme: phrases.Theme) -> tuple[str, ...]:
    common = {"money": phrases.MONEY, "people": phrases.PEOPLE}.get(unit, phrases.THINGS)[move]
    return common + theme.phrases.get(move, ()) if unit == "things" else common


def _clause(fact: Fact, number: int, cast: _Cast, rng: random.Random) -> _Clause:
    phrase = rng.choice(_phrases(fact.move, fact.unit, cast.theme))
    words = cast.words(fact.unit, rng)
    move = _ALL[fact.move]
    plain = fact.move in MOVES and not move.swaps and move.counts is None
    movable = number > 0 and plain and phrase.startswith(("{p} ", "{O} ", "{a} "))
    anchored = ("{N}" in phrase or cast.nouns[0] in phrase) and not _POINTS_BACK.search(phrase)
    cast.after(move, phrase, words)
    return _Clause(phrase.format_map({**words, "a": fact.a, "b": fact.b}), movable, anchored)


def _tell_out_of_order(clauses: list[_Clause], rng: random.Random) -> None:
    """Tells one fact after the fact that followed it, where two neighbours allow it."""
    places = [i for i in range(len(clauses) - 1) if clauses[i].movable and clauses[i + 1].movable]
    if places:
        i = rng.choice(places)
        earlier, later = clauses[i : i + 2]
        clauses[i : i + 2] = [_Clause(later.text, anchored=later.anchored), _Clause(phrases.BEFORE + earlier.text)]


def _date(clauses: list[_Clause], day: int, rng: random.Random) -> None:
    """Dates a fact, or the whole story where none takes a date."""
    places = [i for i, clause in enumerate(clauses) if clause.movable]
    if places:
        i = rng.choice(places)
        clauses[i] = _Clause(phrases.IDLE_DATE.format(a=day) + clauses[i].text, anchored=clauses[i].anchored)
    else:
        clauses.insert(0, _Clause(phrases.IDLE_DAY.format(a=day)))


def _sentence(clause: str) -> str:
    return clause[0].upper() + clause[1:] + ("" if clause[-1] in ".?" else ".")
