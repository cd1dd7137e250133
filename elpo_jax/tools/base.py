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
    EMPTY = "empty"  # a tool's answer: it ran and had nothing to say. Of a program: `ok` with `null_output`
    ERROR = "error"  # the tool refused or the program raised
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    CRASH = "crash"  # a signal ended the program
    MALFORMED = "malformed"  # the call could not be parsed or its arguments do not fit the schema
    UNKNOWN_TOOL = "unknown_tool"
    SANDBOX_ERROR = "sandbox_error"  # our machinery broke: retried, never trained on, counted

    @property
    def is_fault(self) -> bool:
        """True where the call failed and the model is to blame (the `feedback` localizer's signal)."""
        return self not in (Status.OK, Status.SANDBOX_ERROR)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A well-formed call, as the parser read it from the model's tokens."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool's answer, and what is known of the program behind it.

    Tools that run no program leave the fields from `exc_type` on at their defaults; results are compared without the
    measurements, which differ from run to run.

    Attributes:
      status: How the call ended.
      text: What the model sees. The sandbox leaves it to the tool that asked.
      detail: The cause in a word: exception type, kind of parse error, "cpu" or "wall" of a time-out.
      null_output: True where a program ended well and printed nothing but white space.
      truncated: True where the output, or `text`, was cut.
      exc_type: Name of the exception that ended the program. It comes from the program's own process, which may lie.
      stdout: What it printed, at most `Limits.output_kb`, with U+FFFD for what is not UTF-8.
      stderr: Likewise, the traceback included.
      exit_code: As the program chose it; None where a signal ended it.
      signal: Number of the signal that ended it, except where a limit of ours did.
      cpu_s: CPU seconds, of all threads.
      wall_s: Seconds from its start to its end.
      max_rss: Largest resident set in bytes, the loaded packages included.
      out_bytes: Bytes that arrived on both streams.
      backend: Which isolation ran it.
      attempt: 1, or more where earlier attempts at this call failed through a fault of ours.
    """

    status: Status
    text: str = ""
    detail: str = ""
    null_output: bool = False
    truncated: bool = False
    exc_type: str = ""
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float = dataclasses.field(default=0.0, compare=False)
    wall_s: float = dataclasses.field(default=0.0, compare=False)
    max_rss: int = dataclasses.field(default=0, compare=False)
    out_bytes: int = 0
    backend: str = ""
    attempt: int = dataclasses.field(default=1, compare=False)


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
