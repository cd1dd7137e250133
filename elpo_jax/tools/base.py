"""What a tool is, what it is asked, and what it answers.

A tool answers with data, not only text: every `ToolResult` carries a `Status` from a closed set, so that the localizers
can use failed, empty and timed-out calls as signal, and so that a failure of ours is never taken for the model's.
Tools that act on a world take the state of one attempt and return the next one; states are values, so a branch of a
rollout tree starts from the state after its anchor step and never shares a world with its siblings.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Protocol


class Status(enum.StrEnum):
    """How a tool call ended. The set is closed: every consumer handles every member."""

    OK = "ok"
    EMPTY = "empty"  # the tool ran and had nothing to say (null output)
    ERROR = "error"  # the tool refused or the program raised
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    MALFORMED = "malformed"  # the call could not be parsed or its arguments do not fit the schema
    UNKNOWN_TOOL = "unknown_tool"
    INFRASTRUCTURE = "infrastructure"  # ours, not the model's: retried, never trained on, counted

    @property
    def is_fault(self) -> bool:
        """True where the call failed and the model is to blame (the `feedback` localizer's signal)."""
        return self not in (Status.OK, Status.INFRASTRUCTURE)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A well-formed call, as the parser read it from the model's tokens."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool's answer. `text` is what the model sees; `detail` names the cause (exception type, parse error kind)."""

    status: Status
    text: str
    detail: str = ""


class State(Protocol):
    """The world of one attempt, as an immutable value."""

    def fork(self, key: int) -> "State":
        """The same world for another attempt, whose future randomness is drawn from `key`."""


class Tool(Protocol):
    """Something a model can call.

    Attributes:
      name: What the model writes in `"name"`.
      description: One sentence for the prompt.
      parameters: JSON schema of the arguments (an object schema, `additionalProperties` false).
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        """Answers one call.

        Args:
          arguments: Already valid under `parameters`.
          state: The attempt's world before the call; None for tools without one.

        Returns:
          The result, and the world after the call (the same object when nothing changed).

        Raises:
          InfrastructureError: If the tool itself broke. Any other exception is treated the same way.
        """


class InfrastructureError(RuntimeError):
    """The machinery behind a tool failed; the model is not to blame."""
