"""Turns an attempt's outcome into the number that it is trained on.

Whether it succeeded, which drives the search, is never changed here: shaping only sees it.
"""

import dataclasses
from typing import Literal, get_args

RewardKind = Literal["zero_one", "plus_minus", "open_agentrl"]
Counted = Literal["response", "model"]


def zero_one(success: bool, score: float | None = None) -> float:
    """1 for success, else 0, or the fraction of tests that a program passed."""
    return 1.0 if success else score or 0.0


def plus_minus(success: bool, score: float | None = None) -> float:
    """1 for success, else -1, or a program's fraction of tests spread over [-1, 1]."""
    return 2.0 * zero_one(success, score) - 1.0


def open_agentrl(success: bool, turns: int, score: float | None = None, constant_penalty: bool = False) -> float:
    """The reward of Open-AgentRL's code (recipe/demystify), which ELPO's training builds on.

    1 for success; for a program the fraction of tests it passed; else min(-0.6, -1 + 0.1 (turns - 2) / 2), which is 0.1
    for each answered call, of at most four. The paper of Open-AgentRL (2510.11701, eq. 8) also adds 0.1 per call to a
    success; its code does not.

    Args:
      success: Whether the attempt succeeded.
      turns: Messages as the recipe counts them (prompt, assistant turns and tool answers): 2 without a call and 2 more
        for each.
      score: Fraction of tests passed; None if no program was run, also because none was written.
      constant_penalty: Where the recipe's reward manager does not pass the number of turns on, it counts as 0: every
        failure then gets -1.1, as in ELPO's figure 4.
    """
    if success:
        return 1.0
    if score is not None:
        return score
    return min(-0.6, -1.0 + ((0 if constant_penalty else turns) - 2) / 2 * 0.1)


def overlong(tokens: int, max_tokens: int, buffer: int, factor: float = 1.0) -> float:
    """The soft overlong penalty of DAPO (2503.14476).

    0 up to `max_tokens - buffer` tokens, then linear to `-factor` at `max_tokens`, and no lower; always 0 if the buffer
    is 0.
    """
    excess = tokens - (max_tokens - buffer)
    return -factor * min(excess / buffer, 1.0) if buffer and excess > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Reward:
    """How attempts are rewarded.

    Attributes:
      kind: The function for the outcome.
      constant_penalty: See `open_agentrl`; for that kind only.
      overlong_buffer: Tokens before the longest response over which the penalty grows; 0 for no penalty.
      overlong_factor: The largest penalty.
      overlong_counts: "response" counts all its tokens, the tool's too, as the recipe does; "model" only sampled ones.

    Raises:
      ValueError: If a value makes no sense.
    """

    kind: RewardKind = "zero_one"
    constant_penalty: bool = False
    overlong_buffer: int = 0
    overlong_factor: float = 1.0
    overlong_counts: Counted = "response"

    def __post_init__(self):
        if self.kind not in get_args(RewardKind):
            raise ValueError(f"kind={self.kind!r}: it must be one of {', '.join(get_args(RewardKind))}")
        if self.overlong_counts not in get_args(Counted):
            raise ValueError(f"overlong_counts={self.overlong_counts!r}: it must be {' or '.join(get_args(Counted))}")
        if self.constant_penalty and self.kind != "open_agentrl":
            raise ValueError(f"constant_penalty is of open_agentrl, not of {self.kind}")
        if self.overlong_buffer < 0 or not 0 <= self.overlong_factor < float("inf"):
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} and overlong_factor={self.overlong_factor} must be 0 or more"
            )

    def shape(
        self,
        success: bool,
        score: float | None,
        turns: int,
        response_tokens: int,
        model_tokens: int,
        max_tokens: int,
    ) -> float:
        """The reward of one attempt.

        Args:
          success: Whether it succeeded.
          score: Fraction of tests passed, where a program was scored by it (`Graded.score`); else None.
          turns: Messages, see `open_agentrl`.
          response_tokens: Tokens after the prompt, the tool's and the template's included.
          model_tokens: Of these, the sampled ones.
          max_tokens: The longest response, in the tokens that are counted.

        Raises:
          ValueError: If the overlong buffer is longer than `max_tokens`.
        """
        if self.overlong_buffer > max_tokens:
            raise ValueError(f"overlong_buffer={self.overlong_buffer} is longer than a response ({max_tokens} tokens)")
        if self.kind == "open_agentrl":
            outcome = open_agentrl(success, turns, score, self.constant_penalty)
        else:
            outcome = (zero_one if self.kind == "zero_one" else plus_minus)(success, score)
        counted = response_tokens if self.overlong_counts == "response" else model_tokens
        return outcome + overlong(counted, max_tokens, self.overlong_buffer, self.overlong_factor)
