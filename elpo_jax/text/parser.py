"""Reads the tool call out of a model's turn, and writes one the same way.

A call is a JSON object between the control ids of `<tool_call>` and `</tool_call>`; the same characters spelled out as
text open nothing, except with a tokenizer that has no such ids. A turn without either is a final answer. Llama models
write the object alone. Whatever else is wrong with a call becomes a typed error, with a text for the model, in linear
time and without ever raising.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
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

# The same for calls whose arguments are called "parameters".
LLAMA_ERRORS = {kind: text.replace('"arguments"', '"parameters"') for kind, text in ERRORS.items()}
PYTHON_TAG = "<|python_tag|>"

_TAGS = re.compile(f"{re.escape(CALL_OPEN)}|{re.escape(CALL_CLOSE)}")
# What only a call begins with: other objects, and sets in mathematics, are answers.
_LLAMA_CALL = re.compile(r"""\{\s*(?:["'](?:name|parameters|type|function)["']|(?:name|parameters)\s*:)""")
_NEXT_LLAMA_CALL = re.compile(r"""\}[\s;,]*\{\s*["'](?:name|type)["']""")


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


def llama_call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as a Llama model writes it.

    Raises:
      ValueError: If the arguments have no JSON form (NaN, infinity).
    """
    return json.dumps({"name": name, "parameters": dict(arguments)}, ensure_ascii=False, allow_nan=False)


def parse_turn(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, stop_ids: Collection[int] | None = None) -> Turn:
    """Reads one assistant turn.

    Exactly one `<tool_call>` followed by exactly one `</tool_call>` is a call, with any text before and after it.

    Args:
      tokenizer: Whose ids these are. Where it has no ids for the tags, they are looked for in the text.
      ids: The turn's ids, with or without the end-of-turn id; any integers are fine.
      stop_ids: Ids that end a turn; by default that of `<|im_end|>`.
    """
    listed = _without_end(ids, (tokenizer.control[IM_END],) if stop_ids is None else stop_ids)
    text = tokenizer.decode(listed)
    if CALL_OPEN in tokenizer.control and CALL_CLOSE in tokenizer.control:
        opens, closes = tokenizer.control[CALL_OPEN], tokenizer.control[CALL_CLOSE]
        tags = [(token == opens, i, i + 1) for i, token in enumerate(listed) if token in (opens, closes)]
    else:
        tags = [(tag[0] == CALL_OPEN, tag.start(), tag.end()) for tag in _TAGS.finditer(text)]
        listed = text
    if not tags:
        return Turn(text)
    try:
        body = listed[_span(tags)]
        return Turn(text, call=_parse_body(body if isinstance(body, str) else tokenizer.decode(body)))
    except _Malformed as malformed:
        return Turn(text, error=ToolResult(Status.MALFORMED, ERRORS[malformed.kind], malformed.kind))


def parse_llama_turn(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, stop_ids: Collection[int]) -> Turn:
    """Reads one assistant turn of a Llama model.

    A turn that is one JSON object with "name" and "parameters" is a call. One that begins like such an object, or with
    `<|python_tag|>`, and is none, is a malformed call; any other turn is a final answer.

    Args:
      tokenizer: Whose ids these are.
      ids: The turn's ids, with or without the end-of-turn id; any integers are fine.
      stop_ids: Ids that end a turn.
    """
    listed = _without_end(ids, stop_ids)
    text = tokenizer.decode(listed)
    tag = tokenizer.control.get(PYTHON_TAG)
    tagged = tag is not None and listed[:1] == [tag]
    body = (tokenizer.decode(listed[1:]) if tagged else text).strip()
    if not tagged and not _LLAMA_CALL.match(body):
        return Turn(text)
    try:
        return Turn(text, call=_parse_body(body, "parameters"))
    except _Malformed as malformed:
        kind = malformed.kind
        if kind == "malformed_json" and _NEXT_LLAMA_CALL.search(body):
            kind = "several_calls"
        return Turn(text, error=ToolResult(Status.MALFORMED, LLAMA_ERRORS[kind], kind))


def _without_end(ids: Sequence[int] | np.ndarray, stop_ids: Collection[int]) -> list[int]:
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    return listed[:-1] if listed and listed[-1] in stop_ids else listed


class _Malformed(Exception):
    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def _span(tags: list[tuple[bool, int, int]]) -> slice:
    """Where the body of the only call stands; of each tag is given whether it opens, its start and its end."""
    is_open = [opens for opens, _, _ in tags]
    if is_open == [True, False]:
        return slice(tags[0][2], tags[1][1])
    if sum(is_open) > 1:
        raise _Malformed("several_calls")
    raise _Malformed("unclosed" if is_open[-1] else "unopened")


def _parse_body(body: str, arguments_key: str = "arguments") -> ToolCall:
    if len(body) > MAX_CALL_CHARS:
        raise _Malformed("too_large")
    call = _load_json(body)
    if not isinstance(call, dict):
        raise _Malformed("not_object")
    name, arguments = call.get("name"), call.get(arguments_key)
    if not isinstance(name, str) or not name:
        raise _Malformed("missing_name")
    if arguments_key not in call:
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
