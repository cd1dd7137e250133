"""The ledger's world: accounts and bills in a real SQLite database, the four tools that act on it, and what a goal is.

The state of an attempt is an immutable value, the serialised database; a call opens it in memory, acts and serialises
it again (about 0.1 ms), so a branch can never see what its siblings did. `move` can be undone, `pay` and
`close` cannot: a payment that settles no bill is money gone, and a closed account forfeits what it holds.
"""

import contextlib
import dataclasses
import functools
import hashlib
import sqlite3
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from elpo_jax.tasks.base import Task
from elpo_jax.tools.base import Status, ToolResult

# fmt: off
NAMES = (
    "Ann", "Bob", "Cid", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon",
    "Kim", "Leo", "Max", "Ned", "Oli", "Pam", "Ray", "Sue", "Tom", "Uma",
)
# fmt: on
PAYEES = ("Rent", "Gas", "Water", "Phone", "Food", "Tax", "Bus", "Club", "Gym", "Car")
TRY_AGAIN = "try again"

_SCHEMA = """
CREATE TABLE accounts(name TEXT PRIMARY KEY, balance INTEGER CHECK(balance >= 0), open INTEGER) WITHOUT ROWID;
CREATE TABLE bills(account TEXT, payee TEXT, amount INTEGER, paid INTEGER, PRIMARY KEY(account, payee)) WITHOUT ROWID;
"""
_LARGEST_AMOUNT = 9999  # keeps every number far inside SQLite's integers
_local = threading.local()


class Bill(NamedTuple):
    """Something that `account`, and no other, has to pay in one payment. (account, payee) names it."""

    account: str
    payee: str
    amount: int


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What has to be true in the end: these bills paid, these accounts closed and every other account open."""

    bills: frozenset[Bill]
    close: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """What a database says. Closed accounts hold nothing.

    Attributes:
      balances: Money in each account.
      closed: Accounts that were closed.
      paid: The bills that were paid.
    """

    balances: Mapping[str, int]
    closed: frozenset[str]
    paid: frozenset[Bill]


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerState:
    """The world of one attempt.

    Attributes:
      image: The serialised SQLite database.
      key: Seeds the noise of the calls to come.
      calls: Calls that the tools have answered so far (malformed ones never reach a tool).
    """

    image: bytes
    key: int
    calls: int = 0

    def fork(self, key: int) -> "LedgerState":
        """The same database for another attempt, whose noise is drawn from `key`."""
        return dataclasses.replace(self, key=key)


def goal_of(task: Task) -> Goal:
    """The goal of a ledger task."""
    return Goal(frozenset(map(Bill._make, task.meta["bills"])), frozenset(task.meta["close"]))


def new_state(balances: Mapping[str, int], bills: Sequence[Bill], key: int) -> LedgerState:
    """A world with these accounts, all open, and these bills, all unpaid."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        database.execute("PRAGMA page_size=512")
        database.executescript(_SCHEMA)
        database.executemany("INSERT INTO accounts VALUES (?, ?, 1)", balances.items())
        database.executemany("INSERT INTO bills VALUES (?, ?, ?, 0)", bills)
        return LedgerState(database.serialize(), key)


def read_world(state: LedgerState) -> World:
    """Reads a state's database."""
    return _read_image(state.image)


@functools.lru_cache(maxsize=4096)
def _read_image(image: bytes) -> World:
    database = _open(image)
    accounts = database.execute("SELECT name, balance, open FROM accounts").fetchall()
    paid = database.execute("SELECT account, payee, amount FROM bills WHERE paid").fetchall()
    return World(
        balances=types.MappingProxyType({name: balance for name, balance, _ in accounts}),
        closed=frozenset(name for name, _, is_open in accounts if not is_open),
        paid=frozenset(map(Bill._make, paid)),
    )


def _open(image: bytes) -> sqlite3.Connection:
    """This thread's connection, holding the database of `image`; what it held before is gone."""
    if not hasattr(_local, "database"):
        # A statement kept from an earlier image would write the same rows to other bytes; without that cache, the next
        # image is a function of this one and the call.
        _local.database = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    _local.database.deserialize(image)
    return _local.database


def _balance(database: sqlite3.Connection, account: str) -> int | None:
    """Money in an open account; None if it is closed or there is none of that name."""
    # A model's string reaches SQLite only once it is known to be one of ours: it may not even be valid unicode.
    if account not in NAMES:
        return None
    row = database.execute("SELECT balance FROM accounts WHERE name = ? AND open", (account,)).fetchone()
    return None if row is None else row[0]


def _due(database: sqlite3.Connection, account: str) -> int:
    """What an account still has to pay."""
    query = "SELECT COALESCE(SUM(amount), 0) FROM bills WHERE account = ? AND NOT paid"
    return database.execute(query, (account,)).fetchone()[0]


def _add(database: sqlite3.Connection, account: str, amount: int) -> None:
    database.execute("UPDATE accounts SET balance = balance + ? WHERE name = ?", (amount, account))


def _done(text: str) -> ToolResult:
    return ToolResult(Status.OK, text)


def _refused(text: str, detail: str) -> ToolResult:
    return ToolResult(Status.ERROR, text, detail)


def _no_account() -> ToolResult:
    return _refused("no such account", "no_account")


def _query(database: sqlite3.Connection, arguments: Mapping[str, Any]) -> ToolResult:
    account = arguments["account"]
    balance = _balance(database, account)
    if balance is None:
        return _no_account()
    due = _due(database, account)
    spare = balance - due
    parts = [f"has {balance}"]
    parts += [f"due {due}"] if due else []
    parts += [f"short {-spare}"] if spare < 0 else [f"spare {spare}"] if spare else []
    return _done(", ".join(parts))


def _move(database: sqlite3.Connection, arguments: Mapping[str, Any]) -> ToolResult:
    source, target, amount = arguments["from"], arguments["to"], int(arguments["amount"])
    available, held = _balance(database, source), _balance(database, target)
    if available is None or held is None:
        return _no_account()
    if source == target:
        return _refused("same account", "same_account")
    if available < amount:
        return _refused(f"has {available}", "insufficient_funds")
    _add(database, source, -amount)
    _add(database, target, amount)
    short = _due(database, target) - held - amount
    return _done(f"moved, short {short}" if short > 0 else "moved")


def _pay(database: sqlite3.Connection, arguments: Mapping[str, Any]) -> ToolResult:
    account, payee, amount = arguments["from"], arguments["to"], int(arguments["amount"])
    available = _balance(database, account)
    if available is None:
        return _no_account()
    if payee not in PAYEES:
        return _refused("no such payee", "no_payee")
    if available < amount:
        return _refused(f"short {amount - available}", "insufficient_funds")
    _add(database, account, -amount)
    settle = "UPDATE bills SET paid = 1 WHERE account = ? AND payee = ? AND amount = ? AND NOT paid"
    settled = database.execute(settle, (account, payee, amount)).rowcount
    return _done("paid" if settled else "spent, no such bill")


def _close(database: sqlite3.Connection, arguments: Mapping[str, Any]) -> ToolResult:
    account = arguments["account"]
    balance = _balance(database, account)
    if balance is None:
        return _no_account()
    database.execute("UPDATE accounts SET balance = 0, open = 0 WHERE name = ?", (account,))
    return _done(f"closed, lost {balance}" if balance else "closed")


def _fails(noise: float, state: LedgerState) -> bool:
    """Whether this call fails at random: a function of the state, so a repeat is exact and a fork draws anew."""
    digest = hashlib.blake2b(f"{state.key}/{state.calls}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < noise * 2.0**64


def _parameters(**properties: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@dataclasses.dataclass(frozen=True)
class LedgerTool:
    """One of the ledger's tools (see `elpo_jax.tools.base.Tool`).

    Attributes:
      name: What the model writes.
      description: One sentence for the prompt.
      parameters: JSON schema of the arguments.
      act: Acts on an open database and answers.
      noise: Probability in [0, 1] that a call fails without effect and says "try again".
      in_process: The tool is quick and safe: it needs no worker process.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    act: Callable[[sqlite3.Connection, Mapping[str, Any]], ToolResult]
    noise: float = 0.0
    in_process: bool = True

    def run(self, arguments: Mapping[str, Any], state: LedgerState) -> tuple[ToolResult, LedgerState]:
        """Answers one call; `arguments` are valid under `parameters`, `state` stays as it is."""
        calls = state.calls + 1
        if self.noise and _fails(self.noise, state):
            return _refused(TRY_AGAIN, "noise"), dataclasses.replace(state, calls=calls)
        database = _open(state.image)
        result = self.act(database, arguments)
        return result, LedgerState(database.serialize(), state.key, calls)


def ledger_tools(noise: float = 0.0) -> tuple[LedgerTool, ...]:
    """The four tools: query, move, pay, close.

    Args:
      noise: Probability that a call fails at random, in [0, 1].

    Raises:
      ValueError: If `noise` is outside.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is a probability, so it must be in [0, 1]; got {noise}")
    text, amount = {"type": "string"}, {"type": "integer", "minimum": 1, "maximum": _LARGEST_AMOUNT}
    one, two = _parameters(account=text), _parameters(**{"from": text, "to": text, "amount": amount})
    return (
        LedgerTool("query", "Tells what an account has, owes and is short of.", one, _query, noise),
        LedgerTool("move", "Moves money between two accounts.", two, _move, noise),
        LedgerTool("pay", "Pays a bill from an account; money paid never comes back.", two, _pay, noise),
        LedgerTool("close", "Closes an account for good; what it holds is lost.", one, _close, noise),
    )
