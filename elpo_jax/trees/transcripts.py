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
from elpo_jax.tools.base import Status, ToolCall, ToolResult
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory


class TranscriptError(ValueError):
    """A conversation is no transcript of an attempt; the message says why."""


@dataclasses.dataclass(frozen=True)
class OfferedTool:
    """A tool of a recorded conversation: known by its schema, and not there to be called."""

    name: str
    description: str
    parameters: Mapping[str, Any]


def system_of(conversation: Conversation) -> str:
    """The text of its system message; "" if it has none."""
    first = conversation.messages[0]
    return first.get("content") or "" if first["role"] == "system" else ""


def transcript(chat: Chat, conversation: Conversation) -> Trajectory:
    """The conversation as an attempt, marked as solved.

    Args:
      chat: Writes it; a system message has to be this chat's own (`TemplateChat`).
      conversation: A question, then assistant turns of which all but the last call one tool.

    Raises:
      TranscriptError: If it has another shape.
    """
    messages = list(conversation.messages)
    if messages[0]["role"] == "system":
        messages.pop(0)
    if not messages or messages[0]["role"] != "user":
        raise TranscriptError(f"{conversation.id} does not begin with a question")
    tools = [_offered(tool, conversation.id) for tool in conversation.tools]
    prompt = Segment(Author.ENVIRONMENT, chat.prompt(messages[0].get("content") or "", tools))
    steps = tuple(_steps(chat, messages[1:], conversation.id))
    return Trajectory(prompt, steps, Finish.ANSWER, success=True, reward=1.0, reason="recorded")


def _steps(chat: Chat, messages: Sequence[Mapping[str, Any]], name: str) -> Iterator[Step]:
    turns, answers = messages[::2], messages[1::2]
    roles = [message["role"] for message in messages]
    if roles != [("assistant", "tool")[i % 2] for i in range(len(roles))] or len(turns) != len(answers) + 1:
        raise TranscriptError(f"{name} is not one question, calls with one answer each, and a final turn")
    for turn, answer in zip(turns, answers, strict=False):
        call = _call(turn, name)
        if call is None:
            raise TranscriptError(f"{name} has a tool's answer where none was called")
        text = "\n".join(part for part in (turn.get("content") or "", call_text(call.name, call.arguments)) if part)
        result = ToolResult(Status.OK, answer.get("content") or "")
        response = Segment(Author.ENVIRONMENT, chat.response(result))
        yield Step(Segment(Author.MODEL, chat.turn(text)), call, result, response, text=text)
    if turns[-1].get("tool_calls"):
        raise TranscriptError(f"{name} ends with a call that nothing answers")
    text = turns[-1].get("content") or ""
    yield Step(Segment(Author.MODEL, chat.turn(text)), text=text)


def _call(turn: Mapping[str, Any], name: str) -> ToolCall | None:
    calls = turn.get("tool_calls") or []
    if not calls:
        return None
    if len(calls) > 1:
        raise TranscriptError(f"{name} has {len(calls)} calls in a turn")
    function = calls[0].get("function", calls[0])
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError
        return ToolCall(function["name"], dict(arguments))
    except (ValueError, KeyError):
        raise TranscriptError(f"{name} has a call without a name or without arguments as a JSON object") from None


def _offered(tool: Mapping[str, Any], name: str) -> OfferedTool:
    function = tool.get("function", tool)
    if not isinstance(function.get("name"), str):
        raise TranscriptError(f"{name} offers a tool without a name")
    return OfferedTool(function["name"], function.get("description", ""), function.get("parameters", {}))
