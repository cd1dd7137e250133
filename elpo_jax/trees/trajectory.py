"""Trajectories: append-only token segments, grouped into steps.

Token-in, token-out: a segment holds the ids that were sampled or sent, and nothing is ever decoded and encoded again.
The author of a segment is the loss mask. A branch shares its parent's prefix by identity: the very same `Segment` and
`Step` objects, so a shared step is one node of the tree by construction.
"""

import dataclasses
import enum

import numpy as np

from elpo_jax.tools.base import State, ToolCall, ToolResult


class Author(enum.StrEnum):
    MODEL = "model"
    ENVIRONMENT = "environment"


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens by one author.

    Attributes:
      author: Who wrote them; only the model's tokens are ever in the loss.
      ids: int32 [n].
      logprobs: float32 [n], of the sampled ids under the behaviour policy at the sampling temperature (nats); None for
        the environment and for demonstrations.
      entropies: float32 [n], of the full next-token distribution at temperature 1 (nats, paper eq. 3); None likewise.
    """

    author: Author
    ids: np.ndarray
    logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None

    def __post_init__(self):
        assert self.ids.ndim == 1 and self.ids.dtype == np.int32, (self.ids.shape, self.ids.dtype)
        for values in (self.logprobs, self.entropies):
            assert values is None or values.shape == self.ids.shape, (values.shape, self.ids.shape)

    def __len__(self) -> int:
        return len(self.ids)


class Finish(enum.StrEnum):
    """Why an attempt ended."""

    ANSWER = "answer"  # a turn without a tool call
    MAX_STEPS = "max_steps"  # the allowed tool calls are used up
    LENGTH = "length"  # a turn, or the context, hit its token limit
    INFRASTRUCTURE = "infrastructure"  # ours; the attempt is neither graded nor trained on


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One assistant turn and the tool's answer to it (paper section 3).

    Attributes:
      turn: The model's tokens, with the sampled end-of-turn token where there is one.
      call: The parsed call; None for a final answer, a cut turn, and a malformed call (see `result`).
      result: The tool's answer, or the parser's error (status `malformed`); None for the final turn.
      response: The environment's tokens that carry `result` and open the next turn; None where no turn follows.
      state: The world after this step, from which branches start; None for stateless tasks.
      text: The turn as text, for people, the parser and the grader only.
    """

    turn: Segment
    call: ToolCall | None = None
    result: ToolResult | None = None
    response: Segment | None = None
    state: State | None = None
    text: str = ""

    @property
    def is_tool_call(self) -> bool:
        """True where the turn was answered by a tool or by the parser's error."""
        return self.result is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """One attempt from the prompt to its end."""

    prompt: Segment
    steps: tuple[Step, ...]
    finish: Finish
    success: bool
    reward: float
    reason: str = ""
    answer: str = ""  # canonical form of what was answered, for majority votes

    @property
    def num_tool_steps(self) -> int:
        """K: the number of steps that a tool answered and from which an attempt can go on; always the first K."""
        return sum(step.response is not None for step in self.steps)

    def prefix(self, m: int) -> tuple[Segment, ...]:
        """Segments of the prompt and of steps 1..m, with the tool response of step m (paper section 4.1); m=0: prompt.

        Raises:
          ValueError: If step m is not followed by a tool response, so nothing can continue from it.
        """
        if m != 0 and not (0 < m <= len(self.steps) and self.steps[m - 1].response is not None):
            raise ValueError(f"no branch can start after step {m}: {self.num_tool_steps} steps were answered by a tool")
        return segments(self.prompt, self.steps[:m])

    def segments(self) -> tuple[Segment, ...]:
        return segments(self.prompt, self.steps)

    def ids(self) -> np.ndarray:
        """All tokens, int32 [T]."""
        return np.concatenate([segment.ids for segment in self.segments()])

    def step_ids(self) -> np.ndarray:
        """int32 [T]: the 1-based step of each model token, 0 for every environment token. Non-zero is the loss mask."""
        numbers = [np.zeros(len(self.prompt), np.int32)]
        for number, step in enumerate(self.steps, 1):
            numbers.append(np.full(len(step.turn), number, np.int32))
            if step.response is not None:
                numbers.append(np.zeros(len(step.response), np.int32))
        return np.concatenate(numbers)

    def logprobs(self) -> np.ndarray:
        """float32 [T]: behaviour log-probability of each model token, 0 elsewhere (and where none was recorded)."""
        return np.concatenate(
            [np.zeros(len(s), np.float32) if s.logprobs is None else s.logprobs for s in self.segments()]
        )

    def entropies(self) -> np.ndarray:
        """float32 [T]: entropy at each model token, 0 elsewhere."""
        return np.concatenate(
            [np.zeros(len(s), np.float32) if s.entropies is None else s.entropies for s in self.segments()]
        )


def segments(prompt: Segment, steps: tuple[Step, ...]) -> tuple[Segment, ...]:
    """The prompt's and the steps' segments in order."""
    out = [prompt]
    for step in steps:
        out.append(step.turn)
        if step.response is not None:
            out.append(step.response)
    return tuple(out)
