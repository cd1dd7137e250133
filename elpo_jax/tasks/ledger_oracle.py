"""The exact oracle of the ledger: what can still be reached, from any state, with the calls that are left.

The fewest calls that reach the goal have a closed form but for the transfers, which are a small grouping problem solved
exactly. One call lowers that number by at most one, so the slack (calls left minus fewest calls) never grows: a prefix
that is lost stays lost, with or without noise, and every failed attempt has one first irrecoverable step.
Recoverability is a fact about the world, not about what the player knows: nobody has to spend a call on asking.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from elpo_jax.tasks.base import Task
from elpo_jax.tasks.ledger_world import Goal, LedgerState, World, goal_of, read_world
from elpo_jax.tools.base import ToolCall


class _Group(NamedTuple):
    """Short accounts that are covered together, and the accounts that cover them, as indices."""

    short: tuple[int, ...]
    donors: tuple[int, ...]


def min_calls(goal: Goal, world: World) -> int | None:
    """The fewest calls that reach the goal; None if no number of calls does.

    It is (unpaid bills) + (accounts left to close) + (fewest transfers after which every account can pay its bills).
    Payments change an account's money and its dues alike, so the order of calls does not matter as long as closings
    come last; money spent or forfeited in vain never helps.
    """
    unpaid = goal.bills - world.paid
    if world.closed - goal.close or any(bill.account in world.closed for bill in unpaid):
        return None
    spare = _spare(goal, world)
    short = tuple(sorted((-s for s in spare.values() if s < 0), reverse=True))
    donors = tuple(sorted((s for s in spare.values() if s > 0), reverse=True))
    groups = _fewest_transfers(short, donors)
    if groups is None:
        return None
    transfers = sum(len(group.short) + len(group.donors) - 1 for group in groups)
    return len(unpaid) + len(goal.close - world.closed) + transfers


def plan(goal: Goal, world: World) -> list[ToolCall] | None:
    """Calls that reach the goal, as few as possible: transfers, payments, closings. None if it cannot be reached."""
    if min_calls(goal, world) is None:
        return None
    spare = _spare(goal, world)
    short = sorted((a for a, s in spare.items() if s < 0), key=spare.__getitem__)
    donors = sorted((a for a, s in spare.items() if s > 0), key=spare.__getitem__, reverse=True)
    groups = _fewest_transfers(tuple(-spare[a] for a in short), tuple(spare[a] for a in donors))
    calls = []
    for group in groups:
        calls += _transfers(
            {short[i]: -spare[short[i]] for i in group.short}, {donors[i]: spare[donors[i]] for i in group.donors}
        )
    for account, payee, amount in sorted(goal.bills - world.paid):
        calls.append(ToolCall("pay", {"from": account, "to": payee, "amount": amount}))
    calls += [ToolCall("close", {"account": account}) for account in sorted(goal.close - world.closed)]
    return calls


def recoverable(task: Task, state: LedgerState, calls_left: int) -> bool:
    """Whether the goal can still be reached. With noise: whether it can if no further call happens to fail."""
    fewest = min_calls(goal_of(task), read_world(state))
    return fewest is not None and fewest <= calls_left


def first_irrecoverable(task: Task, states: Sequence[LedgerState]) -> int | None:
    """The exact first irrecoverable step of an attempt.

    Args:
      task: What was attempted.
      states: The world after each of the K steps that were answered by a tool or by the parser's error, in order.

    Returns:
      The smallest m in 1..K after which the goal is out of reach; K + 1 if there is none but the attempt ended without
      the goal (a final answer too early, or a cut turn); None if it ended with the goal reached.
    """
    goal = goal_of(task)
    if states and min_calls(goal, read_world(states[-1])) == 0:
        return None
    for step, state in enumerate(states, 1):
        if not recoverable(task, state, task.max_steps - step):
            return step
    return len(states) + 1


def _spare(goal: Goal, world: World) -> dict[str, int]:
    """Money beyond what is due, of every open account; negative where it is short."""
    spare = {account: balance for account, balance in world.balances.items() if account not in world.closed}
    for bill in goal.bills - world.paid:
        spare[bill.account] -= bill.amount
    return spare


def _transfers(short: dict[str, int], donors: dict[str, int]) -> list[ToolCall]:
    """Covers `short` from `donors`, whose sum suffices, in at most |short| + |donors| - 1 moves (each settles one)."""
    calls = []
    while short:
        source, target = next(iter(donors)), next(iter(short))
        amount = min(donors[source], short[target])
        calls.append(ToolCall("move", {"from": source, "to": target, "amount": amount}))
        donors[source] -= amount
        short[target] -= amount
        donors = {account: left for account, left in donors.items() if left}
        short = {account: left for account, left in short.items() if left}
    return calls


@functools.lru_cache(maxsize=65536)
def _fewest_transfers(short: tuple[int, ...], donors: tuple[int, ...]) -> tuple[_Group, ...] | None:
    """Groups with the fewest transfers that cover every shortage; None if there is too little money.

    Seen as a graph, any set of transfers falls into components. One that covers |S| short accounts with the help of |D|
    others is connected, so it has at least |S| + |D| - 1 transfers, and its donors hold at least what is short; that
    many suffice. Hence: partition the shortages into groups, give each group donors of its own, and minimise the sum of
    |S| + |D| - 1 over groups. Exact, by recursion over bitmasks.

    Args:
      short: What each short account lacks, > 0.
      donors: What each of the other accounts can spare, > 0.
    """
    lacking, giving = _subset_sums(short), _subset_sums(donors)

    @functools.cache
    def solve(left: int, free: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Fewest transfers, and the groups as pairs of masks, for the shortages `left` and the donors `free`."""
        if not left:
            return 0, ()
        if giving[free] < lacking[left]:
            return math.inf, ()
        best = (math.inf, ())
        lowest = left & -left
        for others in _submasks(left ^ lowest):
            group = lowest | others
            for given in _submasks(free):
                if giving[given] < lacking[group]:
                    continue
                cost, rest = solve(left ^ group, free ^ given)
                cost += group.bit_count() + given.bit_count() - 1
                if cost < best[0]:
                    best = cost, ((group, given), *rest)
        return best

    cost, groups = solve(len(lacking) - 1, len(giving) - 1)
    return None if cost == math.inf else tuple(_Group(_members(group), _members(given)) for group, given in groups)


def _subset_sums(values: Sequence[int]) -> list[int]:
    """The sum of every subset, by bitmask."""
    sums = [0]
    for value in values:
        sums += [value + s for s in sums]
    return sums


def _submasks(mask: int):
    """Every subset of a bitmask, the mask itself first and 0 last."""
    subset = mask
    while subset:
        yield subset
        subset = (subset - 1) & mask
    yield 0


def _members(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)
