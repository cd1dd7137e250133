"""Runs tool calls: finds the tool, checks the arguments, waits for slow tools on a pool of threads.

Nothing that a model writes makes a `ToolBox` raise: a call that does not fit is answered with an error for the model,
and a tool that breaks is tried again and then answered with status `sandbox_error`, for the caller to discard.
"""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jsonschema

from elpo_jax.tools.base import InfrastructureError, State, Status, Tool, ToolCall, ToolResult

Answer = tuple[ToolResult, State | None]

UNAVAILABLE = "Error: the tool is not available"  # no model sees it: the attempt is discarded

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One call and the world it acts on.

    Attributes:
      call: As the parser read it.
      state: The attempt's world before the call; None where the tool has none.
    """

    call: ToolCall
    state: State | None = None


class ToolBox:
    """The tools that a model can call.

    A tool with a true attribute `in_process` is run by the thread that asks, which suits tools that compute for some
    microseconds; any other is taken to wait for a process and gets a thread. The box ends its own threads, not the
    processes of the tools.

    Args:
      tools: With different names.
      workers: Threads, so calls that wait at once; as many as the tools have processes.
      retries: Further attempts at a call whose tool raised. A `sandbox_error` that a tool returns is final, for what is
        behind that tool has tried again already.

    Raises:
      ValueError: If two tools share a name, a schema is not a valid JSON schema, or a number makes no sense.
    """

    def __init__(self, tools: Sequence[Tool], workers: int = 2, retries: int = 2):
        if workers < 1 or retries < 0:
            raise ValueError(f"ToolBox(workers={workers}, retries={retries}): at least 1 and 0 are needed")
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            raise ValueError(f"two tools share a name: {', '.join(tool.name for tool in tools)}")
        self._validators = {tool.name: _validator(tool) for tool in tools}
        self._retries = retries
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="tool")

    def __enter__(self) -> "ToolBox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the calls under way, drops those that have not begun, and ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, request: Request) -> "Future[Answer]":
        """Starts a call.

        Returns:
          A future of the result and the world after the call; it never holds an exception, unless the box is closed.

        Raises:
          RuntimeError: If the box is closed.
        """
        refusal = self._refusal(request.call)
        if refusal is not None:
            return _done((refusal, request.state))
        tool = self._tools[request.call.name]
        if getattr(tool, "in_process", False):
            return _done(self._attempt(tool, request))
        return self._pool.submit(self._attempt, tool, request)

    def run_many(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers calls, as many at once as there are workers.

        Returns:
          For each request, in order, the result and the world after the call: the same object as before where the call
          changed nothing or failed.
        """
        return [future.result() for future in [self.submit(request) for request in requests]]

    def _refusal(self, call: ToolCall) -> ToolResult | None:
        """An error for the model if no tool can take the call."""
        if call.name not in self._tools:
            text = f"Error: there is no tool {_shown(call.name)}. Tools: {', '.join(self._tools)}"
            return ToolResult(Status.UNKNOWN_TOOL, text, "name")
        error = next(self._validators[call.name].iter_errors(dict(call.arguments)), None)
        if error is None:
            return None
        expected = ", ".join(self._tools[call.name].parameters.get("properties", {}))
        text = f"Error: {_complaint(error)}. {call.name} takes: {expected or 'nothing'}"
        return ToolResult(Status.MALFORMED, text, "arguments")

    def _attempt(self, tool: Tool, request: Request) -> Answer:
        for _ in range(1 + self._retries):
            try:
                result, state = tool.run(request.call.arguments, request.state)
                if not isinstance(result, ToolResult):
                    raise TypeError(f"it answered with a {type(result).__name__}")
            except Exception as error:
                cause = _cause(error)
                unexpected = not isinstance(error, InfrastructureError)
                _log.warning("the tool %s broke: %s", tool.name, cause, exc_info=unexpected)
            else:
                return result, request.state if result.status is Status.SANDBOX_ERROR else state
        return ToolResult(Status.SANDBOX_ERROR, UNAVAILABLE, cause), request.state


def _validator(tool: Tool) -> jsonschema.protocols.Validator:
    schema = _plain(tool.parameters)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the parameters of the tool {tool.name} are no valid JSON schema: {error.message}") from None
    return jsonschema.Draft202012Validator(schema)


def _plain(value: Any) -> Any:
    """Nested mappings and sequences, read-only ones among them, as the dicts and lists that jsonschema knows."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _complaint(error: jsonschema.ValidationError) -> str:
    """What is wrong, in few words and naming the argument. jsonschema's own message repeats the whole value."""
    field = ".".join(str(part) for part in error.absolute_path)
    known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"{_shown(missing)} is missing"
    if error.validator == "additionalProperties":
        unknown = next(key for key in error.instance if key not in known)
        return f"{_shown(unknown)} is not an argument"
    if error.validator == "type":
        return f"{_shown(field)} must be of type {error.validator_value}"
    return f"{_shown(field)} does not fit {error.validator} {error.validator_value}"


def _shown(name: str) -> str:
    """A name the model wrote, quoted and cut: it may be anything."""
    return repr(name if len(name) <= 40 else name[:40] + "...")


def _cause(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of the exception's own __str__
        return type(error).__name__


def _done(answer: Answer) -> "Future[Answer]":
    future: Future[Answer] = Future()
    future.set_result(answer)
    return future
