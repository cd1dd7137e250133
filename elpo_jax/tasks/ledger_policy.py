"""Scripted players of the ledger, for experiments that need attempts and continuations but no policy network.

They play with the real tools on the real database and see all of it, so that their skill is set by a number alone: how
often they blunder. A blunder is drawn from every kind that the situation allows, some of which can be repaired and some
not; which is which they leave to `ledger_oracle`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from elpo_jax.tasks.base import Task
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.ledger_oracle import plan, recoverable
from elpo_jax.tasks.ledger_world import NAMES, PAYEES, Goal, LedgerState, World, goal_of, read_world
from elpo_jax.tools.base import Status, ToolCall, ToolResult

# What a player does next: a call, a turn that no parser understands, or its final answer.
Action = ToolCall | Literal["malformed", "answer"]

_GIVE_UP = 0.4  # probability of the final answer, at each turn that finds nothing useful left to do


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt, or the continuation of one.

    Attributes:
      states: The world after each of its K calls.
      results: The answers to them.
      success: Whether it was graded a success.
    """

    states: tuple[LedgerState, ...]
    results: tuple[ToolResult, ...]
    success: bool


def act(family: Ledger, action: Action, state: LedgerState) -> tuple[ToolResult, LedgerState]:
    """Carries out an action that is not the final answer, as the agent loop would."""
    if action == "malformed":
        return ToolResult(Status.MALFORMED, "not JSON", "json"), state
    for tool in family.tools:
        if tool.name == action.name:
            return tool.run(action.arguments, state)
    return ToolResult(Status.UNKNOWN_TOOL, "no such tool", action.name), state


def blunders(goal: Goal, world: World) -> Mapping[str, list[Action]]:
    """Every mistake that a situation offers, by kind; kinds without one are left out.

    Made harmless by calls to spare: `malformed`, `unknown_tool`, `unknown_account`, `needless_query`, `too_early`
    (paying before the money is there), `misdirected` (a transfer nobody needs). Often the end: `wrong_amount`,
    `wrong_payee`, `wrong_account`, `twice` (the money is gone), `close_early` (a bill is due or money needed),
    `close_wrong` (the account must stay open), `answer` (the goal is not reached).
    """
    holders = {a: money for a, money in world.balances.items() if a not in world.closed}
    due = sorted(goal.bills - world.paid)
    stranger = next(name for name in NAMES if name not in world.balances)
    options: dict[str, list[Action]] = {
        "malformed": ["malformed"],
        "unknown_tool": [ToolCall("send", {"account": stranger})],
        "unknown_account": [ToolCall("query", {"account": stranger})],
        "needless_query": [ToolCall("query", {"account": a}) for a in holders],
        "too_early": [_pay(*bill) for bill in due if holders.get(bill.account, bill.amount) < bill.amount],
        "misdirected": [
            ToolCall("move", {"from": a, "to": b, "amount": money})
            for a, all_of_it in holders.items()
            for money in {all_of_it, (all_of_it + 1) // 2} - {0}
            for b in holders
            if a != b
        ],
        "wrong_amount": [
            _pay(account, payee, wrong)
            for account, payee, amount in due
            for wrong in (amount - 1, amount + 1, amount // 2)
            if 0 < wrong <= holders.get(account, 0)
        ],
        "wrong_payee": [
            _pay(bill.account, payee, bill.amount)
            for bill in due
            for payee in PAYEES
            if bill.amount <= holders.get(bill.account, 0) and payee not in {b.payee for b in goal.bills}
        ],
        "wrong_account": [
            _pay(a, bill.payee, bill.amount)
            for bill in due
            for a in holders
            if a != bill.account and bill.amount <= holders[a]
        ],
        "twice": [_pay(*bill) for bill in sorted(world.paid) if bill.amount <= holders.get(bill.account, 0)],
        "close_early": [_close(a) for a in holders if a in goal.close and (due or holders[a])],
        "close_wrong": [_close(a) for a in holders if a not in goal.close],
        "answer": ["answer"] if due or goal.close != world.closed else [],
    }
    return {kind: actions for kind, actions in options.items() if actions}


def stumble(family: Ledger, task: Task, rng: np.random.Generator, blunder_rate: float, key: int) -> Attempt:
    """Plays a whole attempt that follows a shortest plan but blunders now and then, and does not know when it is lost.

    Args:
      family: The ledger that made the task.
      task: What to attempt.
      rng: Draws the blunders.
      blunder_rate: Probability of a blunder at each turn.
      key: Seeds the world's noise.
    """
    goal, state = goal_of(task), family.start(task, key)

    def choose(state: LedgerState, calls_left: int) -> Action:
        world = read_world(state)
        if rng.random() < blunder_rate:
            options = blunders(goal, world)
            actions = options[rng.choice(list(options))]
            return actions[rng.integers(len(actions))]
        return _sensible(goal, world, rng)

    return _play(family, task, state, task.max_steps, choose)


def complete(
    family: Ledger, task: Task, state: LedgerState, calls_left: int, succeed: bool, rng: np.random.Generator
) -> Attempt:
    """Plays on from a state to the end.

    From a recoverable state the player either follows a shortest plan, or makes a mistake that the oracle confirms to
    be irrecoverable. From any other, and after such a mistake, it does what still can be done.

    Args:
      family: The ledger that made the task.
      task: What to attempt.
      state: The world to start from, already forked for this continuation.
      calls_left: Calls that remain.
      succeed: Whether to succeed if it is possible (noise can still prevent it) or to fail.
      rng: Draws which mistake, and when to give up.
    """
    goal = goal_of(task)

    def choose(state: LedgerState, calls_left: int) -> Action:
        if not succeed and recoverable(task, state, calls_left):
            return _fatal(family, task, state, calls_left, rng)
        return _sensible(goal, read_world(state), rng)

    return _play(family, task, state, calls_left, choose)


def _play(
    family: Ledger, task: Task, state: LedgerState, calls: int, choose: Callable[[LedgerState, int], Action]
) -> Attempt:
    """Plays what `choose` says of a state and the calls left, until it answers or the calls are used up."""
    states, results = [], []
    for calls_left in range(calls, 0, -1):
        if (action := choose(state, calls_left)) == "answer":
            break
        result, state = act(family, action, state)
        states.append(state)
        results.append(result)
    return Attempt(tuple(states), tuple(results), family.grade(task, "Done.", state).success)


def _sensible(goal: Goal, world: World, rng: np.random.Generator) -> Action:
    """The next call of a shortest plan; if there is none, a payment or closing that still works, a query or the end."""
    calls = plan(goal, world)
    if calls is not None:
        return calls[0] if calls else "answer"
    holders = {a: money for a, money in world.balances.items() if a not in world.closed}
    useful = [_pay(*bill) for bill in sorted(goal.bills - world.paid) if bill.amount <= holders.get(bill.account, 0)]
    useful += [_close(account) for account in sorted(goal.close - world.closed)]
    if useful:
        return useful[0]
    if not holders or rng.random() < _GIVE_UP:
        return "answer"
    return ToolCall("query", {"account": list(holders)[rng.integers(len(holders))]})


def _fatal(family: Ledger, task: Task, state: LedgerState, calls_left: int, rng: np.random.Generator) -> Action:
    """A mistake of a random kind after which the goal is out of reach.

    Where noise would swallow every such call, it is a query, which noise swallows instead.
    """
    options = blunders(goal_of(task), read_world(state))
    for kind in rng.permutation(list(options)):
        actions = options[kind]
        action = actions[rng.integers(len(actions))]
        if action == "answer" or not recoverable(task, act(family, action, state)[1], calls_left - 1):
            return action
    return options["needless_query"][0]


def _pay(account: str, payee: str, amount: int) -> ToolCall:
    return ToolCall("pay", {"from": account, "to": payee, "amount": amount})


def _close(account: str) -> ToolCall:
    return ToolCall("close", {"account": account})
