"""The tool `code_interpreter`: runs a Python program in the sandbox and words what came of it for a model."""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from elpo_jax.tools import reference as reference_recipe
from elpo_jax.tools.base import State, Status, ToolResult
from elpo_jax.tools.observation import LEAST_LIMIT, Encoder, Traceback, ended_itself, observation, repeatable
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.toolbox import UNAVAILABLE

NO_OUTPUT = "(no output)"


class CodeInterpreter:
    """See `elpo_jax.tools.base.Tool`; the only argument is `code`. Thread-safe, and without state between calls.

    What a program prints is the answer, and the value of a final expression is printed as in a notebook. What programs
    may do and use is the sandbox's affair (`elpo_jax.tools.sandbox`).

    Hash seed and random numbers are fixed there and object addresses are not shown, so a program repeats its answer
    unless it asks for what no two processes share: a clock, a process id, `id()`, or the system's randomness. An answer
    is remembered by the program's text (statuses ok, empty and error only, as the others could depend on the machine),
    so the many attempts at one prompt that write the same program run it once, and such a program too has one answer
    while it is remembered; but a repeated or resumed run may give it another.

    Statuses: `ok`; `empty` (nothing printed); `error` (`detail` names the exception type, or is "exit"); `timeout`
    (`detail` "cpu" or "wall"); `memory`; `output_limit` (the sandbox stopped it, and what it printed is shown in part);
    `crash` (`detail` names the signal); `malformed` (`detail` "empty_code": there is no program); `sandbox_error`. An
    answer that is longer than the limit of the text is cut in its middle and marked `truncated`, whatever its status.

    Args:
      sandbox: Runs the programs; its owner closes it. None makes one of its own, which `close` ends.
      limits: Of each program; None for the sandbox's.
      tokenizer: Counts the tokens of an answer; what it encodes it must decode to the same text.
      output_tokens: Longest answer, where there is a tokenizer.
      output_chars: Longest answer in characters, where there is none.
      traceback: "frames" shows of an error where in the program it arose, "last_line" only its type and message.
      remembered: Number of answers to remember; 0 runs every program.
      reference: Programs and answers are what the reference recipe makes of them (`elpo_jax.tools.reference`), whatever
        is said here of printing, of the text of answers and of `empty_code`, and by `tokenizer` to `traceback`.

    Raises:
      ValueError: If an argument makes no sense.
      SandboxUnavailable: If it makes a sandbox and no isolation works on this machine.
    """

    name = "code_interpreter"
    description = "Runs a Python program and returns what it prints, or the value of its last expression."
    parameters: Mapping[str, Any] = MappingProxyType(
        {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
            "additionalProperties": False,
        }
    )
    in_process = False

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        limits: Limits | None = None,
        tokenizer: Encoder | None = None,
        output_tokens: int = 512,
        output_chars: int = 1000,
        traceback: Traceback = "frames",
        remembered: int = 4096,
        reference: bool = False,
    ):
        _at_least(LEAST_LIMIT, output_tokens=output_tokens, output_chars=output_chars)
        _at_least(0, remembered=remembered)
        if traceback not in ("frames", "last_line"):
            raise ValueError(f'CodeInterpreter(traceback={traceback!r}): it must be "frames" or "last_line"')
        self._owned = Sandbox() if sandbox is None else None
        self._sandbox = sandbox or self._owned
        self._limits = limits or self._sandbox.limits
        self._tokenizer = tokenizer
        self._limit = output_chars if tokenizer is None else output_tokens
        self._traceback: Traceback = traceback
        self._reference = reference
        self._remembered = remembered
        self._answers: collections.OrderedDict[bytes, ToolResult] = collections.OrderedDict()
        self._lock = threading.Lock()
        if reference:
            self.description = reference_recipe.DESCRIPTION

    def __enter__(self) -> "CodeInterpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the sandbox, if the interpreter made it; later calls then raise `InfrastructureError`."""
        if self._owned is not None:
            self._owned.close()

    def limit_tokens(self, tokenizer: Encoder, tokens: int) -> None:
        """Limits the answers from now on to `tokens` of `tokenizer`, as the arguments of those names would have, and
        forgets those that were remembered. No call may be under way.

        Raises:
          ValueError: If `tokens` is below `LEAST_LIMIT`.
        """
        _at_least(LEAST_LIMIT, output_tokens=tokens)
        with self._lock:
            self._tokenizer, self._limit = tokenizer, tokens
            self._answers.clear()

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        """Runs a program.

        Raises:
          InfrastructureError: If the sandbox is closed.
        """
        code = arguments["code"]
        key = hashlib.blake2b(code.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        result = self._recall(key)
        if result is None:
            result = self._run_as_reference(code) if self._reference else self._run(code)
            self._remember(key, result)
        return result, state

    def _recall(self, key: bytes) -> ToolResult | None:
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def _remember(self, key: bytes, result: ToolResult) -> None:
        if self._remembered and ended_itself(result) and result.status is not Status.CRASH:
            with self._lock:
                self._answers[key] = result
                if len(self._answers) > self._remembered:
                    self._answers.popitem(last=False)

    def _run(self, code: str) -> ToolResult:
        if not code.strip():
            return ToolResult(Status.MALFORMED, "Error: the program is empty.", "empty_code")
        result = repeatable(self._sandbox.run(code, mode="notebook", limits=self._limits))
        ending = self._ending(result)
        text, truncated = observation(
            result.stdout,
            result.stderr,
            ending,
            limit=self._limit,
            tokenizer=self._tokenizer,
            traceback=self._traceback,
        )
        status = Status.EMPTY if result.status is Status.OK and not text else result.status
        return _answer(result, status, text or NO_OUTPUT, truncated)

    def _ending(self, result: ToolResult) -> str:
        """A line on how a program ended, where its own output does not tell."""
        limits = self._limits
        match result.status:
            case Status.TIMEOUT if result.detail == "cpu":
                return f"Error: the program ran longer than {limits.cpu_s:g} s (CPU time)"
            case Status.TIMEOUT:
                return f"Error: the program took longer than {limits.wall:g} s"
            case Status.MEMORY:
                return f"Error: the program needs more than {limits.memory_mb} MB"
            case Status.OUTPUT_LIMIT:
                return f"Error: the program printed more than {limits.output_kb} KiB"
            case Status.CRASH:
                return f"Error: the program ended itself (signal {result.detail})"
            case Status.ERROR if result.detail == "too_large":
                return f"Error: the program is longer than {limits.code_kb} KiB"
            case Status.ERROR if not ended_itself(result):
                return f"Error: the program is over a limit ({result.detail})"
            case Status.ERROR if result.exc_type:
                return "" if result.exc_type in result.stderr else result.exc_type
            case Status.ERROR:
                return f"Error: the program ended itself (exit {result.exit_code})"
            case Status.SANDBOX_ERROR:
                return UNAVAILABLE
        return ""

    def _run_as_reference(self, code: str) -> ToolResult:
        result = repeatable(self._sandbox.run(reference_recipe.wrapped(code), mode="script", limits=self._limits))
        text, truncated = reference_recipe.answer(result)
        status = Status.EMPTY if result.status is Status.OK and not text.strip() else result.status
        return _answer(result, status, text, truncated)


def _at_least(least: int, **values: int) -> None:
    for key, value in values.items():
        if value < least:
            raise ValueError(f"CodeInterpreter({key}={value}): it must be at least {least}")


def _answer(result: ToolResult, status: Status, text: str, truncated: bool) -> ToolResult:
    """The sandbox's result as the tool's, without the streams: trees and the memory of answers hold thousands."""
    truncated = truncated or result.truncated
    return dataclasses.replace(result, status=status, text=text, truncated=truncated, stdout="", stderr="")
