"""Reads the tool call out of a model's turn, and writes one the same way.

A call is a JSON object between the control ids of `<tool_call>` and `</tool_call>`; the same characters spelled out as
text open nothing. A turn without either id is a final answer. Whatever else is wrong with a call becomes a typed error,
with a text for the model, in linear time and without ever raising.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from elpo_jax.text.tokenizer import CALL_CLOSE, CALL_OPEN, IM_END, Tokenizer
from elpo_jax.tools.base import Status, ToolCall, ToolResult

MAX_CALL_CHARS = 65_536
MAX_DEPTH = 32  # nesting of the arguments

# Kind of a malformed call (`ToolResult.detail`) to what the model is told. Small models read these: they are short.
ERRORS = {
    "unopened": "Error: </tool_call> without <tool_call>.",
    "unclosed": "Error: <tool_call> without </tool_call>.",
    "several_calls": "Error: make one tool call per turn.",
    "too_large": f"Error: the tool call is longer than {MAX_CALL_CHARS} characters.",
    "malformed_json": "Error: the tool call is not valid JSON.",
    "recursion": "Error: the tool call is nested too deeply.",
    "duplicate_key": "Error: the tool call has the same key twice.",
    "not_object": "Error: the tool call is not a JSON object.",
    "missing_name": 'Error: the tool call has no "name".',
    "missing_arguments": 'Error: the tool call has no "arguments".',
    "bad_arguments": 'Error: the "arguments" of the tool call are not a JSON object.',
}


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What a turn says.

    Attributes:
      text: The turn as text, without the end-of-turn token.
      call: The call, where there is a well-formed one.
      error: Status `malformed`, where there is an ill-formed one; `detail` is a key of `ERRORS`. Without a call and an
        error the turn is a final answer.
    """

    text: str
    call: ToolCall | None = None
    error: ToolResult | None = None


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a model writes it, tags included: for demonstrations.

    Raises:
      ValueError: If the arguments have no JSON form (NaN, infinity).
    """
    body = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False, allow_nan=False)
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


def parse_turn(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> Turn:
    """Reads one assistant turn.

    Exactly one `<tool_call>` followed by exactly one `</tool_call>` is a call, with any text before and after it.

    Args:
      tokenizer: Whose ids these are.
      ids: The turn's ids, with or without the end-of-turn id; any integers are fine.
    """
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if listed and listed[-1] == tokenizer.control[IM_END]:
        listed.pop()
    text = tokenizer.decode(listed)
    opens, closes = tokenizer.control[CALL_OPEN], tokenizer.control[CALL_CLOSE]
    tags = [i for i, token in enumerate(listed) if token in (opens, closes)]
    if not tags:
        return Turn(text)
    try:
        start, stop = _span([listed[i] == opens for i in tags], tags)
        return Turn(text, call=_parse_body(tokenizer.decode(listed[start:stop])))
    except _Malformed as malformed:
        return Turn(text, error=ToolResult(Status.MALFORMED, ERRORS[malformed.kind], malformed.kind))


class _Malformed(Exception):
    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def _span(is_open: list[bool], tags: list[int]) -> tuple[int, int]:
    """Where the body of the only call begins and ends."""
    if is_open == [True, False]:
        return tags[0] + 1, tags[1]
    if sum(is_open) > 1:
        raise _Malformed("several_calls")
    raise _Malformed("unclosed" if is_open[-1] else "unopened")


def _parse_body(body: str) -> ToolCall:
    if len(body) > MAX_CALL_CHARS:
        raise _Malformed("too_large")
    call = _load_json(body)
    if not isinstance(call, dict):
        raise _Malformed("not_object")
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise _Malformed("missing_name")
    if "arguments" not in call:
        raise _Malformed("missing_arguments")
    if not isinstance(arguments, dict):
        raise _Malformed("bad_arguments")
    return ToolCall(name, arguments)


def _load_json(body: str) -> Any:
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object)
        if "\\u" in body:
            # An escaped half of a surrogate pair is a string that no file, process or tokenizer takes.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _Malformed("recursion") from None
    except ValueError:  # bad JSON or Unicode, an integer of thousands of digits
        raise _Malformed("malformed_json") from None
    if _deeper(value, MAX_DEPTH):
        raise _Malformed("recursion")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # JSON does not say which one holds
        raise _Malformed("duplicate_key")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number outside the range of a float could not be written down as JSON again")
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether `value` nests deeper than `depth` containers. Level by level, so depth costs no stack."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            child
            for container in level
            if isinstance(container, dict | list)
            for child in (container.values() if isinstance(container, dict) else container)
        ]
    return bool(level)
