"""The chat format: ChatML with Hermes-style tool calls, as Qwen models use it, written as ids.

An attempt is `prompt`, then alternately a turn of the model and `response`; the pieces are only ever appended, and
joined they equal what `render` makes of the whole conversation. Whatever users, tools and schemas say is encoded
as plain text and holds no control id, whatever the tokenizer, so these are placed by this module and by the model
alone. The newline after a turn's `<|im_end|>` belongs to the environment, which writes it with the next message.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from elpo_jax.text.parser import Turn, parse_turn
from elpo_jax.text.tokenizer import (
    CALL_CLOSE,
    CALL_OPEN,
    CONTROL,
    IM_END,
    IM_START,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    Tokenizer,
)
from elpo_jax.tools.base import Tool, ToolResult

Role = Literal["user", "assistant", "tool"]

_CALL_TAGS = re.compile(f"({re.escape(CALL_OPEN)}|{re.escape(CALL_CLOSE)})")


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """One message of a conversation.

    Attributes:
      role: Who speaks. Tools speak through a user message.
      content: The text; for the assistant the ids of the turn as sampled, with `<|im_end|>` where it was reached.
    """

    role: Role
    content: str | np.ndarray


class Chat(Protocol):
    """How conversations are written as ids: `ChatFormat`, or `elpo_jax.text.template_chat.TemplateChat`.

    Attributes:
      tokenizer: Makes the ids.
      fingerprint: SHA-256, in hexadecimal, of all else that decides which ids a conversation has.
    """

    tokenizer: Tokenizer
    fingerprint: str

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn, first the one that `turn` writes."""

    def prompt(self, user: str, tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], up to where the model's first turn begins."""

    def turn(self, text: str) -> np.ndarray:
        """Ids, int32 [n], of an assistant turn written as text, with the end-of-turn id."""

    def response(self, result: ToolResult) -> np.ndarray:
        """Ids, int32 [n], of all that follows a turn's end-of-turn id, up to where the next turn begins."""

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], of a whole conversation."""

    def parse(self, turn_ids: Sequence[int] | np.ndarray) -> Turn:
        """The turn as text, and the call or the error in it."""


@dataclasses.dataclass(frozen=True)
class _Control:
    """A control token's place in a message, to be told from text that merely looks like it."""

    text: str


class ChatFormat:
    """Writes conversations as ids with one tokenizer.

    Args:
      tokenizer: Makes the ids.
      tool_listing: "names": the system message names the tools in one line, for models that learn them in training;
        "schema": it holds their JSON schemas and says how to call them.

    Raises:
      ValueError: If `tool_listing` is neither, or the tokenizer cannot tell control tokens from text (`check_control`).
    """

    def __init__(self, tokenizer: Tokenizer, tool_listing: Literal["names", "schema"] = "names"):
        if tool_listing not in ("names", "schema"):
            raise ValueError(f'tool_listing must be "names" or "schema", not {tool_listing!r}')
        check_control(tokenizer)
        self.tokenizer = tokenizer
        self._control = frozenset(tokenizer.control.values())
        self.tool_listing = tool_listing
        self.fingerprint = hashlib.sha256(repr((tool_listing, self._system(()))).encode()).hexdigest()
        self._response_before = self._ids("\n", *_header("user"), _Control(RESPONSE_OPEN))
        self._response_after = self._ids(_Control(RESPONSE_CLOSE), _Control(IM_END), "\n", *_header("assistant"))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn."""
        return (self.tokenizer.control[IM_END],)

    def prompt(self, user: str, tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], of the system message that lists `tools`, the user's message and the assistant's header."""
        return self.render([Message("user", user)], tools)

    def turn(self, text: str) -> np.ndarray:
        """Ids, int32 [n], of an assistant turn written as text, with the end-of-turn id.

        For demonstrations only: `<tool_call>` and `</tool_call>` in the text become control ids, wherever they stand.
        """
        parts = [_Control(part) if i % 2 else part for i, part in enumerate(_CALL_TAGS.split(text))]
        return _array(self._ids(*parts, _Control(IM_END)))

    def response(self, result: ToolResult) -> np.ndarray:
        """Ids, int32 [n], of all that follows a turn's `<|im_end|>`: the tool's answer and the assistant's header."""
        body = self._text(f"\n{result.text}\n")
        return _array(self._response_before + body + self._response_after)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], of a whole conversation.

        Args:
          messages: The first is the user's; a system message that lists the tools is put before it.
          tools: What the model can call.

        Returns:
          The ids, up to the end of the last turn or, if the last message is not the assistant's, to the point where its
          next turn begins.
        """
        ids = self._ids(*_header("system"), *self._system(tools), _Control(IM_END))
        for message in messages:
            ids += self._ids("\n") + self._message(message)
        if messages[-1].role != "assistant":
            ids += self._ids("\n", *_header("assistant"))
        return _array(ids)

    def parse(self, turn_ids: Sequence[int] | np.ndarray) -> Turn:
        """The turn as text, and the call or the error in it (`elpo_jax.text.parser.parse_turn`)."""
        return parse_turn(self.tokenizer, turn_ids)

    def _message(self, message: Message) -> list[int]:
        """A message's ids, without the newline after it."""
        if message.role == "assistant":
            return self._ids(*_header("assistant")) + message.content.tolist()
        if message.role == "tool":
            wrapped = (_Control(RESPONSE_OPEN), f"\n{message.content}\n", _Control(RESPONSE_CLOSE))
            return self._ids(*_header("user"), *wrapped, _Control(IM_END))
        return self._ids(*_header(message.role), message.content, _Control(IM_END))

    def _system(self, tools: Sequence[Tool]) -> list[str | _Control]:
        """The system message, in which the tags of a call are the control tokens that the model is to write."""
        if self.tool_listing == "names":
            return [f"Tools: {', '.join(tool.name for tool in tools) or 'none'}"]
        schemas = "\n".join(tool_schema(tool) for tool in tools)
        return [
            "You are a helpful assistant.\n\n# Tools\n\n"
            "You may call one function per turn to help with the user's request.\n\n"
            f"The functions, as JSON inside <tools></tools> tags:\n<tools>\n{schemas}\n</tools>\n\n"
            "To call one, write a JSON object with its name and arguments inside ",
            _Control(CALL_OPEN),
            _Control(CALL_CLOSE),
            " tags:\n",
            _Control(CALL_OPEN),
            '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
            _Control(CALL_CLOSE),
        ]

    def _ids(self, *parts: str | _Control) -> list[int]:
        """Ids of text and control tokens; adjoining texts are encoded as one."""
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            ids += self._text(text)
            ids.append(self.tokenizer.control[part.text])
            text = ""
        return ids + self._text(text)

    def _text(self, text: str) -> list[int]:
        """Ids of text. A control id among them, of which `check_control` knew nothing, is left out."""
        ids = self.tokenizer.encode(text)
        return ids if self._control.isdisjoint(ids) else [i for i in ids if i not in self._control]


def check_control(tokenizer: Tokenizer, needed: Sequence[str] = CONTROL) -> None:
    """Makes sure that text cannot become a control token, as far as trying shows.

    Tried are the control strings: alone, in company, within each other, put together from two texts, and in spellings
    that normalisation turns into them. A tokenizer with more special tokens than `CONTROL` names them in `control`.

    Args:
      tokenizer: What is tried.
      needed: Control tokens that it must have.

    Raises:
      ValueError: If a control token has no id of its own, or text is encoded to such an id.
    """
    ids = [tokenizer.control.get(text, -1) for text in needed]
    if len(set(ids)) < len(ids) or not all(0 <= i < tokenizer.vocab_size for i in ids):
        raise ValueError(f"each control token of the tokenizer {tokenizer.name} needs an id: {dict(tokenizer.control)}")
    control = {i: text for text, i in tokenizer.control.items()}
    for text in _spellings(tuple(control.values())):
        made = next((i for i in tokenizer.encode(text) if i in control), None)
        if made is not None:
            raise ValueError(
                f"the tokenizer {tokenizer.name} reads {text!r} as the control token {control[made]}, so a tool could "
                "speak for the model: encode text without special tokens"
            )


def _spellings(control: Sequence[str]) -> Iterator[str]:
    yield "".join(control)
    for text in control:
        yield from (text, text + text, f" {text} ", f"a{text}b", f"\n{text}\n", text.upper(), f"<0x00>{text}")
        yield text[:4] + text + text[4:]
        for nothing in ("\0", "\u00ad", "\u200b", "\u2060", "\ufeff", "\ufe0f", "\ud800"):
            yield text[:3] + nothing + text[3:]
        # Full width, of which NFKC makes ASCII.
        yield "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text)
        yield "".join(f"<0x{byte:02X}>" for byte in text.encode())


def tool_schema(tool: Tool) -> str:
    """A tool as one line of JSON, in the layout of function-calling models; as it is where the tool has a `schema`."""
    if (schema := getattr(tool, "schema", None)) is not None:
        return json.dumps(schema, ensure_ascii=False)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False, default=dict)


def _header(role: str) -> tuple[_Control, str]:
    return _Control(IM_START), f"{role}\n"


def _array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)
