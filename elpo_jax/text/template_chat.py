"""The chat format of a published checkpoint: its own template and tokenizer, written as ids.

What the template writes becomes the ids that the tokenizer has for it, control tokens included; what users, tools and
schemas say is marked before rendering, so that it is encoded as plain text whatever it holds. The model's turns are the
ids that were sampled, and the environment's are what the template writes between the end of a turn and the beginning of
the next. Joined they equal the whole conversation as the template writes it, where the template is append-only.
"""

import datetime
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from elpo_jax.text.chat import Message, check_control, tool_schema
from elpo_jax.text.hub_tokenizer import PartsTokenizer, load_tokenizer
from elpo_jax.text.parser import Turn, llama_call_text, parse_llama_turn, parse_turn
from elpo_jax.text.template import TemplateError, Templates, load_templates, read_json
from elpo_jax.text.tokenizer import CALL_CLOSE, CALL_OPEN
from elpo_jax.tools.base import Tool, ToolResult

CallFormat = Literal["hermes", "llama"]

# A noncharacter; the letter after it says why it is there. Every one of a content's own is followed by _OWN.
_MARK = "\ufdd0"
_BREAK, _OWN, _TURN = f"{_MARK}x", f"{_MARK}m", f"{_MARK}t"
_THINK = ("<think>", "</think>")
_EOM = "<|eom_id|>"
_MARKED_CALL = re.compile(f"{re.escape(CALL_OPEN)}(.*?)(?:{re.escape(CALL_CLOSE)}|$)", re.DOTALL)
# For conversations that are rendered only to see how the template writes them.
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "Text."}}},
    },
}


class TemplateChat:
    """Writes conversations as ids the way a checkpoint was trained on them.

    Attributes:
      tokenizer: Makes the ids.
      call_format: How the model writes a call: "hermes", between tags, or "llama", the bare object.
      lists_tools: Whether the template tells the model of the tools.
      append_only: Whether later messages leave what the template wrote for earlier ones as it was. Where they do not,
        the ids that were sampled are kept all the same.
      why: One sentence that explains `append_only`.
      fingerprint: SHA-256, in hexadecimal, of all but the tokenizer that decides which ids a conversation has.

    Args:
      templates: The checkpoint's.
      tokenizer: The checkpoint's.
      eos_ids: Ids that end a turn besides the template's own (`generation_config.json`).
      system: Text of a system message; None for what the template does without one.
      call_format: See above; None to choose by the template.

    Raises:
      TemplateError: If the template refuses a conversation with a tool's answer, or has calls of another format, or
        ends no turn with a control token.
      ValueError: If text can become one of the tokenizer's control tokens, or the tokenizer lacks an id of `eos_ids`.
    """

    def __init__(
        self,
        templates: Templates,
        tokenizer: PartsTokenizer,
        eos_ids: Sequence[int] = (),
        system: str | None = None,
        call_format: CallFormat | None = None,
    ):
        check_control(tokenizer, ())
        self.tokenizer, self._templates, self._system = tokenizer, templates, system
        self.call_format: CallFormat = call_format or _call_format(templates)
        longest_first = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        tags = [text for text in (CALL_OPEN, CALL_CLOSE, *_THINK) if text in tokenizer.control]
        self._turn_tags = re.compile("|".join(map(re.escape, tags)) or "(?!)")
        # A control string is broken after its first character and before its last: a text that is broken wherever
        # those stand cannot hold one, nor the beginning or the end of one.
        first, last = ({text[end] for text in tokenizer.control} for end in (0, -1))
        self._breaks = {ord(c): f"{_BREAK * (c in last)}{c}{_BREAK * (c in first)}" for c in first | last}
        self._breaks[ord(_MARK)] = _OWN
        self._end = self._find_end()
        eom = [tokenizer.control[_EOM]] if self.call_format == "llama" and _EOM in tokenizer.control else []
        self._stop_ids = tuple(dict.fromkeys((self._end, *eom, *map(int, eos_ids))))
        if (largest := max(self._stop_ids)) >= tokenizer.vocab_size:
            raise ValueError(
                f"eos_token_id {largest} is none of the tokenizer's {tokenizer.vocab_size} ids: generation_config.json "
                "(or config.json) and the tokenizer are of different checkpoints"
            )
        self._header = self._find_header()
        opening = templates.render(self._opening("."), [_PROBE_TOOL], True)  # a date, where the template writes one
        self.lists_tools = "probe_tool" in opening
        sources = [(t.source, sorted(t.variables.items())) for t in (templates.default, templates.tool_use)]
        identity = (sources, opening, system, self.call_format, self._stop_ids)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._tail([{"role": "tool", "content": "."}])
        self.why = self._find_change()
        self.append_only = not self.why
        self.why = self.why or "Later messages leave what the template wrote for earlier ones as it was."

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn, first the template's own."""
        return self._stop_ids

    def prompt(self, user: str, tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], of the system message and the tools where there are any, the user's message, and the header.

        Raises:
          TemplateError: If the template refuses them.
        """
        return self.render([Message("user", user)], tools)

    def turn(self, text: str) -> np.ndarray:
        """Ids, int32 [n], of an assistant turn written as text, with the end-of-turn id.

        For demonstrations only. Calls are marked with `<tool_call>` and `</tool_call>`; these tags, and those of a
        think block, become control ids where the tokenizer has them. In the "llama" format a turn with a call becomes
        the call alone, for such models write nothing beside it.
        """
        if self.call_format == "llama":
            text = _as_llama(text)
        parts = _split(self._turn_tags, text, self.tokenizer.control)
        # The header's last text and the turn's first are one text to the tokenizer; where that joins their tokens the
        # turn's are what a model that was given the header can write.
        header = self.tokenizer.encode_parts([self._end, self._header])
        ids = self.tokenizer.encode_parts([self._end, self._header, *parts])
        if ids[: len(header)] != header:
            header = [self._end]
            ids = self.tokenizer.encode_parts([self._end, *parts])
        return np.array([*ids[len(header) :], self._end], np.int32)

    def response(self, result: ToolResult) -> np.ndarray:
        """Ids, int32 [n], of all that follows a turn's end: the tool's answer and the assistant's header."""
        return np.array(self._tail([{"role": "tool", "content": self._marked(result.text)}]), np.int32)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> np.ndarray:
        """Ids, int32 [n], of a whole conversation, the assistant's turns being the ids given.

        Args:
          messages: The first is the user's. Tool messages that follow each other answer several calls of one turn.
          tools: What the model can call.

        Returns:
          The ids, up to the end of the last turn or, if the last message is not the assistant's, to the point where its
          next turn begins.

        Raises:
          TemplateError: If the template refuses the conversation.
        """
        groups: list[list[dict[str, Any]]] = [[]]
        turns: list[list[int]] = []
        for message in messages:
            if message.role == "assistant":
                turns.append(message.content.tolist())
                groups.append([])
            else:
                groups[-1].append({"role": message.role, "content": self._marked(message.content)})
        schemas = [self._marked(json.loads(tool_schema(tool))) for tool in tools]
        opening = [*self._opening(None), *groups[0]]
        ids = self._ids(self._templates.render(opening, schemas, add_generation_prompt=True))
        for i, (turn, group) in enumerate(zip(turns, groups[1:], strict=True)):
            ids += turn
            if group:
                ids += self._tail(group)
            elif i + 1 < len(turns):
                raise ValueError("two assistant messages follow each other: put the environment's between them")
        return np.array(ids, np.int32)

    def parse(self, turn_ids: Sequence[int] | np.ndarray) -> Turn:
        """The turn as text, and the call or the error in it (`elpo_jax.text.parser`)."""
        if self.call_format == "llama":
            return parse_llama_turn(self.tokenizer, turn_ids, self._stop_ids)
        return parse_turn(self.tokenizer, turn_ids, self._stop_ids)

    def _opening(self, user: str | None) -> list[dict[str, Any]]:
        opening = [] if self._system is None else [{"role": "system", "content": self._marked(self._system)}]
        return opening if user is None else [*opening, {"role": "user", "content": user}]

    def _tail(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of what the template writes for messages that follow a turn, and of the header of the next turn."""
        calls = [message for message in messages if message["role"] == "tool"]
        for i, message in enumerate(calls):
            message.update(tool_call_id=_call_id(i), name="probe_tool")
        conversation = [*self._opening("."), _turn(_TURN, len(calls)), *messages]
        text = self._templates.render(conversation, [_PROBE_TOOL], add_generation_prompt=True)
        return self._ids(text, self._turn_end(text))

    def _turn_end(self, text: str) -> int:
        """Where the turn ends that holds the last `_TURN`."""
        start = text.rfind(_TURN)
        for control in self._control.finditer(text, max(start, 0)):
            if self.tokenizer.control[control[0]] in self._stop_ids:
                return control.end()
        raise TemplateError(f"{self._templates.tool_use.origin} does not write the turn before a tool's answer")

    def _find_end(self) -> int:
        text = self._templates.render([*self._opening("."), _turn(_TURN, 0)], [_PROBE_TOOL])
        start = text.rfind(_TURN)
        control = self._control.search(text, start) if start >= 0 else None
        if control is None:
            raise TemplateError(
                f"{self._templates.tool_use.origin} ends the assistant's turn with no token of the tokenizer's own: "
                "the template and the tokenizer are of different checkpoints"
            )
        return self.tokenizer.control[control[0]]

    def _find_header(self) -> str:
        """What stands between the last control token and the assistant's turn."""
        text = self._templates.render(self._opening("."), [_PROBE_TOOL], add_generation_prompt=True)
        return self._restored(self._control.split(text)[-1])

    def _find_change(self) -> str:
        """A sentence that says which message changes what was written before it; "" where none does."""
        for thought in ("<think>\nA thought.\n</think>\n\n", ""):
            conversation = [
                *self._opening("A question."),
                {**_turn(_TURN, 1), "content": f"{thought}Text.{_TURN}"},
                {"role": "tool", "content": "An answer.", "tool_call_id": _call_id(0), "name": "probe_tool"},
                {"role": "assistant", "content": f"{thought}An end.{_TURN}"},
                {"role": "user", "content": "A question."},
                {"role": "assistant", "content": f"{thought}An end.{_TURN}"},
            ]
            before = ""
            for n in range(len(conversation) - 4, len(conversation) + 1):
                role = conversation[n - 1]["role"]
                try:
                    text = self._templates.render(conversation[:n], [_PROBE_TOOL], role != "assistant")
                except TemplateError as error:
                    return f"The template refuses a conversation that goes on: {error}."
                if not text.startswith(before):
                    kind = "a turn with a think block" if thought else "a turn without a think block"
                    return f"After {kind}, a message of role {role} changes what the template wrote before it."
                before = text[: self._turn_end(text)] if role == "assistant" else text
        return ""

    def _marked(self, content: Any) -> Any:
        """A text, or every text in a schema, with control strings broken."""
        if isinstance(content, str):
            return content.translate(self._breaks)
        if isinstance(content, list):
            return [self._marked(child) for child in content]
        if isinstance(content, dict):
            return {self._marked(key): self._marked(child) for key, child in content.items()}
        return content

    def _restored(self, text: str) -> str:
        return text.replace(_BREAK, "").replace(_OWN, _MARK)

    def _ids(self, text: str, start: int = 0) -> list[int]:
        """Ids of what a template wrote; of what follows `start`, the end of a control token, if that is given."""
        parts = _split(self._control, text[start:], self.tokenizer.control)
        parts = [self._restored(part) if isinstance(part, str) else part for part in parts]
        return self.tokenizer.encode_parts([self._end, *parts])[1:] if start else self.tokenizer.encode_parts(parts)


def load_chat(
    folder: str | os.PathLike,
    tokenizer: PartsTokenizer | None = None,
    *,
    eos_ids: Sequence[int] | None = None,
    system: str | None = None,
    call_format: CallFormat | None = None,
    options: Mapping[str, Any] | None = None,
    now: Callable[[], datetime.datetime] | None = None,
) -> TemplateChat:
    """The chat format of a checkpoint folder.

    Args:
      folder: With the tokenizer, its template, and `generation_config.json` if there is one.
      tokenizer: The folder's, where it is loaded already.
      eos_ids: Ids that end a turn besides the template's own; None to read them from `generation_config.json` or
        `config.json`.
      system: Text of a system message, which can be ""; None for what the template does without one.
      call_format: None to choose by the template.
      options: Variables of the template's own, such as `enable_thinking`, and the `date_string` that some take.
      now: Gives the time to templates that write a date; None for the time of this call, so that prompts differ from
        day to day.

    Raises:
      FileNotFoundError: If the folder, or a tokenizer in it, is missing.
      TemplateError: If the template is missing, or raises, or writes calls of a format that is not read.
      ValueError: If a file is damaged, or text can become a control token.
    """
    folder = pathlib.Path(folder)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    today = datetime.datetime.now()
    templates = load_templates(folder, options, now or (lambda: today))
    return TemplateChat(
        templates, tokenizer, _eos_ids(folder) if eos_ids is None else eos_ids, system=system, call_format=call_format
    )


def _eos_ids(folder: pathlib.Path) -> list[int]:
    """As `elpo_jax.model.hf_config.read_eos_ids`, which this package may not import."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ValueError(f"eos_token_id in {path} is neither an id nor a list of ids: {value!r}")
        return ids
    return []


def _call_format(templates: Templates) -> CallFormat:
    source = templates.tool_use.source
    if CALL_OPEN in source and "<function=" not in source:
        return "hermes"
    if any(text in source for text in ("ipython", "<|start_header_id|>")):
        return "llama"
    if "tool_calls" in source:
        raise TemplateError(
            f"{templates.tool_use.origin} writes calls of a format that is not read: set tokenizer.call_format to "
            "hermes or llama for a model that was trained to write these"
        )
    return "hermes"


def _turn(content: str, calls: int) -> dict[str, Any]:
    """An assistant message with as many calls."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        function = {"name": "probe_tool", "arguments": {"x": _TURN}}
        message["tool_calls"] = [{"id": _call_id(i), "type": "function", "function": function} for i in range(calls)]
    return message


def _call_id(i: int) -> str:
    return f"probe{i:04}"  # some templates insist on nine letters and digits


def _split(pattern: re.Pattern[str], text: str, control: Mapping[str, int]) -> list[str | int]:
    """Texts and control ids in the order they stand in."""
    parts: list[str | int] = []
    position = 0
    for match in pattern.finditer(text):
        parts += [text[position : match.start()], control[match[0]]]
        position = match.end()
    return [*parts, text[position:]]


def _as_llama(text: str) -> str:
    """A turn's marked calls in Llama's form, without the text beside them; a turn without calls as it is."""
    calls = []
    for call in _MARKED_CALL.finditer(text):
        body = _llama_body(call[1].strip())
        # A demonstrated mistake stays one: a call that is not closed lacks its last brace.
        calls.append(body if call[0].endswith(CALL_CLOSE) else body[:-1])
    return "; ".join(calls) if calls else text


def _llama_body(body: str) -> str:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        call = None
    if isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict):
        return llama_call_text(call["name"], call["arguments"])
    return body.replace('"arguments"', '"parameters"', 1)
