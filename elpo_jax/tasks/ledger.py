"""`ledger`: pay bills and close accounts in a stateful world where some mistakes can be repaired and some cannot.

A goal is a few bills, each to be paid by one account in one payment, and a few accounts to be closed; all others stay
open and the calls are limited. Some accounts are short of money, which only a query (or a refused payment) tells, and
the account that is to lend it may itself be one to close, so a plan that follows the sentences in order can forfeit it.
Beyond what is due there is little money, so a payment in vain is as a rule the end; `ledger_oracle` knows exactly.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elpo_jax.tasks import ledger_oracle
from elpo_jax.tasks.base import SPLITS, Demonstrator, Grade, Split, Task
from elpo_jax.tasks.ledger_world import (
    NAMES,
    PAYEES,
    TRY_AGAIN,
    Bill,
    Goal,
    LedgerState,
    World,
    goal_of,
    ledger_tools,
    new_state,
    read_world,
)
from elpo_jax.text.parser import call_text
from elpo_jax.tools.base import ToolCall, ToolResult


class _Clause(NamedTuple):
    """A kind of requirement: the calls it takes, its bills, the accounts that lend for it, and how many a goal has."""

    calls: int
    bills: int
    lenders: int
    most: int


# Calls as the reference policy plays: query the short account, and each lender that will not do alone; move; pay.
_CLOSE = _Clause(calls=1, bills=0, lenders=0, most=2)
_CLAUSES = (
    _CLOSE,
    _Clause(calls=1, bills=1, lenders=0, most=2),
    _Clause(calls=2, bills=2, lenders=0, most=1),
    _Clause(calls=3, bills=1, lenders=1, most=2),
    _Clause(calls=4, bills=2, lenders=1, most=1),
    _Clause(calls=5, bills=1, lenders=2, most=1),
)
_DIFFICULTIES = range(2, 11)
_AMOUNTS = (2, 15)
_BILL_PHRASES = (
    "{account} pays {bills}",
    "Pay {bills} from {account}",
    "From {account} pay {bills}",
    "{account} owes {bills}",
)
_LENDER_PHRASES = (
    " with help from {lenders}.",
    " with money from {lenders}.",
    ". {account} may borrow from {lenders}.",
    ". If {account} is short, take it from {lenders}.",
)
_CLOSE_PHRASES = ("Close {account}.", "In the end close {account}.", "{account} must be closed.")
_NO_TOOLS = ("send", "transfer", "check", "shut")


class Ledger:
    """The family (see `elpo_jax.tasks.base.Family`).

    A task's `difficulty` is the number of calls that the reference policy makes without mistakes, queries included; an
    attempt may make `slack` more. Its `meta` holds `balances`, `bills` ([account, payee, amount] in the order of
    mention), `close`, and `lenders` (for each short account, those that the prompt names).
    """

    name = "ledger"
    checker = "goal against the final database"

    def __init__(self, seed: int = 0, slack: int = 2, noise: float = 0.0):
        """
        Args:
          seed: Non-negative seed of the generator; the splits are disjoint whatever it is.
          slack: Calls beyond `difficulty` that an attempt may make.
          noise: Probability in [0, 1] that a tool call fails at random, drawn from the state's key.

        Raises:
          ValueError: If a value is out of range.
        """
        if seed < 0 or slack < 0:
            raise ValueError(f"seed and slack must not be negative; got seed={seed}, slack={slack}")
        self.seed, self.slack, self.noise = seed, slack, noise
        self.tools = ledger_tools(noise)

    def size(self, split: Split) -> None:
        """None: endless."""
        return None

    def task(self, split: Split, index: int, difficulty: int) -> Task:
        """Task number `index` of a split; ValueError for an unknown split, index < 0, or difficulty not in 2..10."""
        if split not in SPLITS or index < 0 or difficulty not in _DIFFICULTIES:
            raise ValueError(
                f"no ledger task {split}/{index} of difficulty {difficulty}: the split is one of {', '.join(SPLITS)}, "
                f"the index at least 0 and the difficulty in {_DIFFICULTIES[0]}..{_DIFFICULTIES[-1]}"
            )
        for attempt in itertools.count():
            rng = np.random.default_rng((self.seed, SPLITS.index(split), index, difficulty, attempt))
            problem = _problem(rng, difficulty)
            if _split_of(problem) == split:
                break
        name = f"ledger/{split}/{index}/{difficulty}"
        bills = frozenset(map(Bill._make, problem["bills"]))
        return Task(
            id=name,
            uid=_hash(name) % 2**31,
            family=self.name,
            prompt=_prompt(problem, rng),
            answer=_outcome(bills, frozenset(problem["close"])),
            max_steps=difficulty + self.slack,
            difficulty=difficulty,
            meta=problem,
        )

    def start(self, task: Task, key: int) -> LedgerState:
        """The world before the first call."""
        return new_state(task.meta["balances"], [Bill._make(bill) for bill in task.meta["bills"]], key)

    def grade(self, task: Task, final_text: str, state: LedgerState) -> Grade:
        """Success if the goal holds in the database of the last state; the final text does not matter."""
        world = read_world(state)
        gap = _gap(goal_of(task), world)
        outcome = _outcome(world.paid, world.closed)
        return Grade(not gap, float(not gap), f"goal not reached: {gap}" if gap else "correct", outcome)

    def demonstrate(self, task: Task, rng: np.random.Generator, mistake_rate: float = 0.0) -> Demonstrator:
        """The reference policy, which reads nothing but the prompt's facts and the tools' answers.

        Without noise it always succeeds within `task.max_steps`, for its slips fit into the slack: a malformed call, an
        unknown account or tool, a payment before the money is there, a transfer that is too small, one to the wrong
        account that is taken back, and a query that tells nothing of use. With noise it repeats what failed.

        Args:
          task: What to do.
          rng: Draws the slips.
          mistake_rate: Probability of a slip before each call, while the slack lasts.
        """
        play = _flawless(task.meta)
        call, spare = next(play), task.max_steps - task.difficulty
        while call is not None:
            slip = _Slip((), call)
            if rng.random() < mistake_rate:
                slip = _draw_slip(call, task.meta, rng, spare)
            spare -= slip.cost
            for text in slip.turns:
                result = yield from _insist(text)
            if slip.then is not None:
                result = yield from _insist(_turn(slip.then))
            try:
                call = play.send(result)
            except StopIteration:
                call = None
        yield "Done."

    def demonstrable(self, split: Split) -> Iterator[int]:
        """All of them."""
        return itertools.count()

    def first_irrecoverable(self, task: Task, states: Sequence[LedgerState]) -> int:
        """What `ledger_oracle` says; with noise, as if no further call happened to fail."""
        return ledger_oracle.first_irrecoverable(task, states) or 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _composition(rng: np.random.Generator, difficulty: int) -> list[_Clause]:
    """A random list of clauses, at least one with a bill, that takes `difficulty` calls."""
    while True:
        chosen: list[_Clause] = []
        left = difficulty
        while left:
            fitting = [c for c in _CLAUSES if c.calls <= left and chosen.count(c) < c.most]
            if not fitting:
                break
            chosen.append(fitting[rng.integers(len(fitting))])
            left -= chosen[-1].calls
        if not left and any(clause.bills for clause in chosen):
            return chosen


def _problem(rng: np.random.Generator, difficulty: int) -> dict[str, Any]:
    """Draws the `meta` of a task. Every flawless play succeeds in it, with only a little money to spare."""
    clauses = _composition(rng, difficulty)
    names, payees = iter(rng.permutation(NAMES).tolist()), iter(rng.permutation(PAYEES).tolist())
    balances: dict[str, int] = {}
    bills: list[list[Any]] = []
    short: dict[str, int] = {}  # what each short account lacks
    lenders: dict[str, list[str]] = {}
    for clause in clauses:
        if not clause.bills:
            continue
        account = next(names)
        amounts = rng.integers(_AMOUNTS[0], _AMOUNTS[1] + 1, size=clause.bills).tolist()
        bills += [[account, next(payees), amount] for amount in amounts]
        balances[account] = sum(amounts) + _little(rng)
        if clause.lenders:
            short[account] = int(rng.integers(clause.lenders, sum(amounts) + 1))
            balances[account] = sum(amounts) - short[account]
            lenders[account] = [""] * clause.lenders
    willing = [account for account in balances if account not in short]  # accounts that may lend to several others
    for account, slots in lenders.items():
        missing = short[account]
        if len(slots) == 2:  # the first will not do alone and gives all it has, so it lends to nobody else
            slots[0] = next(names)
            balances[slots[0]] = int(rng.integers(1, missing))
            missing -= balances[slots[0]]
        old = bool(willing) and rng.random() < 0.3
        slots[-1] = willing[rng.integers(len(willing))] if old else next(names)
        balances[slots[-1]] = balances.get(slots[-1], _little(rng)) + missing
        willing += [] if old else [slots[-1]]
    close = _closers(rng, clauses.count(_CLOSE), balances, names)
    return {"balances": balances, "bills": bills, "close": close, "lenders": lenders}


def _little(rng: np.random.Generator) -> int:
    """Money to spare: mostly none."""
    return int(rng.choice((0, 0, 1, 2)))


def _closers(rng: np.random.Generator, count: int, balances: dict[str, int], names: Iterator[str]) -> list[str]:
    """Draws accounts to close: ones that pay or lend, which must do so first, or new ones (added to `balances`)."""
    close: list[str] = []
    for _ in range(count):
        known = [account for account in balances if account not in close]
        close.append(known[rng.integers(len(known))] if known and rng.random() < 0.6 else next(names))
        balances.setdefault(close[-1], _little(rng))
    return close


def _split_of(problem: Mapping[str, Any]) -> Split:
    """The split that a problem belongs to: a hash of what its prompt tells, so no prompt can occur in two splits."""
    told = [sorted(problem["bills"]), sorted(problem["close"]), sorted(problem["lenders"].items())]
    bucket = _hash(json.dumps(told)) % 10
    return "test" if bucket == 9 else "validation" if bucket == 8 else "train"


def _prompt(problem: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Words a problem: one or two sentences per account that pays, and one per closing anywhere between them."""

    def draw(phrases: tuple[str, ...], **parts: str) -> str:
        return phrases[rng.integers(len(phrases))].format(**parts)

    sentences = []
    for account, bills in itertools.groupby(problem["bills"], key=lambda bill: bill[0]):
        listed = " and ".join(f"{amount} to {payee}" for _, payee, amount in bills)
        names = " and ".join(problem["lenders"].get(account, ()))
        ending = draw(_LENDER_PHRASES, account=account, lenders=names) if names else "."
        sentences.append(draw(_BILL_PHRASES, account=account, bills=listed) + ending)
    # Closings keep their order among themselves, for that is the order in which the reference policy makes them.
    places = sorted(rng.integers(len(sentences) + 1, size=len(problem["close"])).tolist())
    for shift, (place, account) in enumerate(zip(places, problem["close"], strict=True)):
        sentences.insert(place + shift, draw(_CLOSE_PHRASES, account=account))
    return " ".join(sentences)


def _outcome(paid: frozenset[Bill], closed: frozenset[str]) -> str:
    """What was reached, in canonical form."""
    parts = [f"{account} paid {amount} to {payee}" for account, payee, amount in sorted(paid)]
    return "; ".join(parts + [f"{account} closed" for account in sorted(closed)])


def _gap(goal: Goal, world: World) -> str:
    """The first thing that keeps a world from the goal; "" if it is reached."""
    gaps = [f"{bill.account} has not paid {bill.payee}" for bill in sorted(goal.bills - world.paid)]
    gaps += [f"{account} is still open" for account in sorted(goal.close - world.closed)]
    gaps += [f"{account} was closed" for account in sorted(world.closed - goal.close)]
    return gaps[0] if gaps else ""


def _flawless(meta: Mapping[str, Any]) -> Generator[ToolCall, ToolResult, None]:
    """The reference policy's calls: account by account as mentioned, then the closings."""
    for account, bills in itertools.groupby(meta["bills"], key=lambda bill: bill[0]):
        lenders = meta["lenders"].get(account, ())
        if lenders:
            short = _number("short", (yield ToolCall("query", {"account": account})))
            for lender in lenders[:-1]:
                spare = _number("spare", (yield ToolCall("query", {"account": lender})))
                short = _number("short", (yield ToolCall("move", {"from": lender, "to": account, "amount": spare})))
            yield ToolCall("move", {"from": lenders[-1], "to": account, "amount": short})
        for _, payee, amount in bills:
            yield ToolCall("pay", {"from": account, "to": payee, "amount": amount})
    for account in meta["close"]:
        yield ToolCall("close", {"account": account})


def _number(word: str, result: ToolResult) -> int:
    """The number after a word of a tool's answer."""
    return int(re.search(rf"\b{word} (\d+)", result.text)[1])


def _turn(call: ToolCall) -> str:
    return call_text(call.name, call.arguments)


def _insist(text: str) -> Generator[str, ToolResult, ToolResult]:
    """Repeats a turn for as long as noise swallows it."""
    while (result := (yield text)).text == TRY_AGAIN:
        pass
    return result


class _Slip(NamedTuple):
    """A mistake: turns to play, and the call that then follows (None: the last turn's answer told as much)."""

    turns: tuple[str, ...]
    then: ToolCall | None

    @property
    def cost(self) -> int:
        """Calls beyond the one that was due."""
        return len(self.turns) + (self.then is not None) - 1


def _draw_slip(call: ToolCall, meta: Mapping[str, Any], rng: np.random.Generator, affordable: int) -> _Slip:
    """A mistake that may come before `call` and costs no more than `affordable` calls; no mistake if there is none."""
    text = _turn(call)
    subject = "account" if "account" in call.arguments else "from"
    stranger = rng.choice([name for name in NAMES if name not in meta["balances"]]).item()
    broken = (text.replace("}}", "}"), text.replace('"name"', "name"), text.removesuffix("\n</tool_call>"))
    slips = [
        _Slip((broken[rng.integers(len(broken))],), call),
        _Slip((_turn(ToolCall(call.name, {**call.arguments, subject: stranger})),), call),
        _Slip((_turn(ToolCall(rng.choice(_NO_TOOLS).item(), call.arguments)),), call),
    ]
    others = [a for a in meta["balances"] if a not in meta["close"] and a not in call.arguments.values()]
    if others:
        other = others[rng.integers(len(others))]
        slips.append(_Slip((_turn(ToolCall("query", {"account": other})),), call))
    if call.name == "query":
        bills = [bill for bill in meta["bills"] if bill[0] == call.arguments["account"]]
        if len(bills) == 1 and call.arguments["account"] in meta["lenders"]:
            _, payee, amount = bills[0]
            early = ToolCall("pay", {"from": call.arguments["account"], "to": payee, "amount": amount})
            slips.append(_Slip((_turn(early),), None))  # the refusal says "short n", as the query would have
    if call.name == "move":
        source, target, amount = call.arguments["from"], call.arguments["to"], call.arguments["amount"]
        if source == meta["lenders"][target][-1] and amount > 1:
            part = int(rng.integers(1, amount))
            rest = ToolCall("move", {**call.arguments, "amount": amount - part})
            slips.append(_Slip((_turn(ToolCall("move", {**call.arguments, "amount": part})),), rest))
        if others:
            there = ToolCall("move", {**call.arguments, "to": other})
            back = ToolCall("move", {**call.arguments, "from": other, "to": source})
            slips.append(_Slip((_turn(there), _turn(back)), call))
    fitting = [slip for slip in slips if slip.cost <= affordable]
    return fitting[rng.integers(len(fitting))] if fitting else _Slip((), call)
