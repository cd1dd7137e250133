"""Conversations that somebody recorded, as trajectories to imitate.

What the assistant wrote becomes the model's turns, in the form in which the chat format writes calls; all else is the
environment's. An attempt is one question and at most one call a turn, so conversations of another shape have none.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elpo_jax.tasks.rows import Conversation
from elpo_jax.text.chat import Chat
from elpo_jax.text.parser import call_text
from elpo_jax.text.template import TemplateError
from elpo_jax.tools.base import Status, ToolResult
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory


class TranscriptError(ValueError):
    """A conversation is no transcript of an attempt; the message says why."""


@dataclasses.dataclass(frozen=True)
class OfferedTool:
    """A tool of a recorded conversation: known by its schema, and not there to be called.

    Attributes:
      name: What calls name.
      schema: As recorded, so that prompts have it to the letter.
    """

    name: str
    schema: Mapping[str, Any]


def system_of(conversation: Conversation) -> str | None:
    """The text of its system message, which can be ""; None if it has none.

    Raises:
      TranscriptError: If it is no text.
    """
    first = conversation.messages[0]
    return _content(first, conversation.id) if first["role"] == "system" else None


def transcript(chat: Chat, conversation: Conversation) -> Trajectory:
    """The conversation as an attempt, marked as solved.

    Args:
      chat: Writes it; a system message has to be this chat's own (`TemplateChat`).
      conversation: A question, then assistant turns of which all but the last call one tool, by `tool_calls` or in the
        text.

    Raises:
      TranscriptError: If it has another shape, holds what is no text, no call or no schema, or is refused by the chat
        template; the message names the conversation.
    """
    name, messages = conversation.id, list(conversation.messages)
    if messages[0]["role"] == "system":
        messages.pop(0)
    if not messages or messages[0]["role"] != "user":
        raise TranscriptError(f"{name} does not begin with a question")
    tools = [_offered(tool, name) for tool in conversation.tools]
    try:
        prompt = Segment(Author.ENVIRONMENT, chat.prompt(_content(messages[0], name), tools))
        steps = tuple(_steps(chat, messages[1:], name))
    except TemplateError as error:
        raise TranscriptError(f"{name}: {error}") from None
    return Trajectory(prompt, steps, Finish.ANSWER, success=True, reward=1.0, reason="recorded")


def _steps(chat: Chat, messages: Sequence[Mapping[str, Any]], name: str) -> Iterator[Step]:
    turns, answers = messages[::2], messages[1::2]
    roles = [message["role"] for message in messages]
    if roles != [("assistant", "tool")[i % 2] for i in range(len(roles))] or len(turns) != len(answers) + 1:
        raise TranscriptError(f"{name} is not one question, calls with one answer each, and a final turn")
    for turn, answer in zip(turns, answers, strict=False):
        text = _text(turn, name)
        ids = chat.turn(text)
        parsed = chat.parse(ids)  # what a rollout would make of this turn
        if parsed.error is not None:
            raise TranscriptError(f"{name} has a call that is not read ({parsed.error.detail})")
        if parsed.call is None:
            raise TranscriptError(f"{name} has a tool's answer where none was called")
        result = ToolResult(Status.OK, _content(answer, name))
        response = Segment(Author.ENVIRONMENT, chat.response(result))
        yield Step(Segment(Author.MODEL, ids), parsed.call, result, response, text=text)
    text = _text(turns[-1], name)
    ids = chat.turn(text)
    parsed = chat.parse(ids)
    if parsed.call is not None or parsed.error is not None:
        raise TranscriptError(f"{name} ends with a call that nothing answers")
    yield Step(Segment(Author.MODEL, ids), text=text)


def _content(message: Mapping[str, Any], name: str) -> str:
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise TranscriptError(f"{name} has a message of role {message['role']} whose content is no text")
    return content or ""


def _text(turn: Mapping[str, Any], name: str) -> str:
    """A turn of the assistant with its call, as the chat formats take it."""
    if turn.get("reasoning_content"):
        raise TranscriptError(f"{name} has reasoning_content, which would be dropped: put it into the content")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise TranscriptError(f"{name} has tool_calls that are no list")
    if len(calls) > 1:
        raise TranscriptError(f"{name} has {len(calls)} calls in a turn")
    return "\n".join(part for part in (_content(turn, name), *(_written(call, name) for call in calls)) if part)


def _written(call: Any, name: str) -> str:
    """A call of `tool_calls` as text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    try:
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(function["name"], str) or not isinstance(arguments, Mapping):
            raise TypeError
        return call_text(function["name"], arguments)
    except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: bad JSON, or a number that JSON has not
        raise TranscriptError(f"{name} has a call without a name or without arguments as a JSON object") from None


def _offered(tool: Any, name: str) -> OfferedTool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TranscriptError(f"{name} offers a tool without a name")
    return OfferedTool(function["name"], tool)
