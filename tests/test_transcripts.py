"""Recorded conversations become attempts: the same ids as the chat format writes, the same mask as a rollout has."""

import json

import numpy as np
import pytest
import tiny

from elpo_jax.config import ConfigError
from elpo_jax.overrides import override
from elpo_jax.tasks.rows import Conversation
from elpo_jax.text.chat import ChatFormat, Message
from elpo_jax.text.parser import call_text
from elpo_jax.text.tokenizer import ByteTokenizer
from elpo_jax.train.setup import build_environment, demonstration_rows, open_tools
from elpo_jax.trees.transcripts import OfferedTool, TranscriptError, system_of, transcript

TOOL = {
    "type": "function",
    "function": {"name": "code_interpreter", "description": "Runs code.", "parameters": {"type": "object"}},
}
QUESTION = {"role": "user", "content": "What is 2 + 2?"}
CALL = {
    "role": "assistant",
    "content": "I add.",
    "tool_calls": [{"type": "function", "function": {"name": "code_interpreter", "arguments": '{"code": "2 + 2"}'}}],
}
ANSWER = {"role": "tool", "content": "4"}
FINAL = {"role": "assistant", "content": "It is \\boxed{4}."}
INLINE = "I add.\n" + call_text("code_interpreter", {"code": "2 + 2"})


def conversation(*messages):
    return Conversation("row-1", messages, [TOOL], {})


def test_a_conversation_is_what_the_chat_format_writes_and_the_assistant_is_the_loss_mask():
    chat = ChatFormat(ByteTokenizer(), "schema")
    recorded = transcript(chat, conversation({"role": "system", "content": "Be brief."}, QUESTION, CALL, ANSWER, FINAL))
    call = "I add.\n" + call_text("code_interpreter", {"code": "2 + 2"})
    messages = [
        Message("user", "What is 2 + 2?"),
        Message("assistant", chat.turn(call)),
        Message("tool", "4"),
        Message("assistant", chat.turn(FINAL["content"])),
    ]
    tools = [OfferedTool("code_interpreter", TOOL)]
    assert recorded.ids().tolist() == chat.render(messages, tools).tolist()
    mask = recorded.step_ids()
    for number, text in ((1, call), (2, FINAL["content"])):
        assert recorded.ids()[mask == number].tolist() == chat.turn(text).tolist()
    assert recorded.steps[0].call.arguments == {"code": "2 + 2"} and recorded.steps[0].result.text == "4"
    assert np.count_nonzero(mask) == len(chat.turn(call)) + len(chat.turn(FINAL["content"]))


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ((CALL, ANSWER, FINAL), "does not begin with a question"),
        ((QUESTION,), "final turn"),
        ((QUESTION, CALL, ANSWER), "final turn"),
        ((QUESTION, CALL), "nothing answers"),
        ((QUESTION, FINAL, QUESTION, FINAL), "one answer each"),
        ((QUESTION, FINAL, ANSWER, FINAL), "none was called"),
        ((QUESTION, CALL | {"tool_calls": CALL["tool_calls"] * 2}, ANSWER, FINAL), "2 calls in a turn"),
        ((QUESTION, CALL | {"tool_calls": [{"name": "f", "arguments": "{"}]}, ANSWER, FINAL), "a JSON object"),
        ((QUESTION, CALL | {"tool_calls": [{"arguments": {}}]}, ANSWER, FINAL), "without a name"),
        ((QUESTION, FINAL | {"reasoning_content": "Hm."}), "reasoning_content, which would be dropped"),
        ((QUESTION | {"content": [{"type": "text", "text": "?"}]}, FINAL), "of role user whose content is no text"),
        ((QUESTION, CALL, ANSWER | {"content": 4}, FINAL), "of role tool whose content is no text"),
        ((QUESTION, FINAL | {"content": {"text": "4"}}), "of role assistant whose content is no text"),
        ((QUESTION, FINAL | {"content": INLINE}), "nothing answers"),
        ((QUESTION, CALL | {"content": INLINE}, ANSWER, FINAL), r"not read \(several_calls\)"),
        ((QUESTION, {"role": "assistant", "content": INLINE * 2}, ANSWER, FINAL), r"not read \(several_calls\)"),
        ((QUESTION, {"role": "assistant", "content": INLINE[:-9]}, ANSWER, FINAL), r"not read \(unclosed\)"),
    ],
)
def test_other_conversations_are_no_attempts(messages, why):
    with pytest.raises(TranscriptError, match=f"row-1.*{why}"):
        transcript(ChatFormat(ByteTokenizer()), conversation(*messages))
    assert system_of(conversation(*messages)) is None


@pytest.mark.parametrize(
    "calls",
    [
        {"a": 1},
        "f",
        ["f"],
        [None],
        [{"type": "function", "function": None}],
        [{"function": ["f"]}],
        [{"function": {"name": None, "arguments": {}}}],
        [{"function": {"name": "", "arguments": {}}}],
        [{"function": {"name": "f", "arguments": None}}],
        [{"function": {"name": "f", "arguments": "[1]"}}],
        [{"function": {"name": "f", "arguments": '{"x": NaN}'}}],
        [{"function": {"name": "f", "arguments": '{"x": 1e999}'}}],
        [{"function": {"name": "f", "arguments": "[" * 100_000}}],
        [{"function": {"name": "f", "arguments": {"x": float("inf")}}}],
        [{"function": {"name": "f", "arguments": {"x": "</tool_call>"}}}],
        [{"function": {"name": "f", "arguments": {"x": "y" * 70_000}}}],
    ],
    ids=lambda calls: str(calls)[:60],
)
def test_what_is_no_call_is_refused_by_the_rows_name(calls):
    chat = ChatFormat(ByteTokenizer())
    for rest in ((ANSWER, FINAL), ()):
        with pytest.raises(TranscriptError, match="row-1"):
            transcript(chat, conversation(QUESTION, CALL | {"tool_calls": calls}, *rest))


@pytest.mark.parametrize("tool", [None, "f", {}, {"type": "function", "function": None}, {"function": {"name": 1}}])
def test_what_is_no_schema_is_refused_by_the_rows_name(tool):
    with pytest.raises(TranscriptError, match="row-1 offers a tool without a name"):
        transcript(ChatFormat(ByteTokenizer()), Conversation("row-1", (QUESTION, FINAL), [tool], {}))


def test_a_call_in_the_text_is_a_call():
    chat = ChatFormat(ByteTokenizer())
    spelled = transcript(chat, conversation(QUESTION, {"role": "assistant", "content": INLINE}, ANSWER, FINAL))
    listed = transcript(chat, conversation(QUESTION, CALL, ANSWER, FINAL))
    assert spelled.ids().tolist() == listed.ids().tolist()
    assert spelled.steps[0].call == listed.steps[0].call and spelled.steps[0].text == listed.steps[0].text == INLINE


def test_an_empty_system_message_is_one():
    assert system_of(conversation({"role": "system", "content": ""}, QUESTION, FINAL)) == ""
    assert system_of(conversation({"role": "system", "content": "Be brief."}, QUESTION, FINAL)) == "Be brief."
    with pytest.raises(TranscriptError, match="row-1 has a message of role system whose content is no text"):
        system_of(conversation({"role": "system", "content": ["Be brief."]}, QUESTION, FINAL))


def test_a_run_learns_from_the_conversations_it_is_given(tmp_path):
    rows = [{"messages": [QUESTION, CALL, ANSWER, FINAL], "tools": [TOOL]}] * 3
    rows += [{"messages": [QUESTION, CALL, ANSWER], "tools": [TOOL]}]
    rows += [{"messages": [QUESTION | {"content": "x" * 9000}, FINAL], "tools": [TOOL]}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["tasks.families=ledger", "tasks.ledger.demonstrations=0", "sampler.context=1024", "tokenizer.kind=byte"]

    def rows_of(*changes):
        config = override(tiny.get_config(), [*small, *changes])
        with open_tools(config) as (stream, toolboxes, sandbox):
            environment = build_environment(config, ByteTokenizer(), stream, toolboxes, sandbox)
            return demonstration_rows(config, environment, stream)

    batch, failed, long = rows_of(f"sft.data={path}")
    assert (int((batch.positions == 0).sum()), failed, long) == (3, 1, 1)
    assert (batch.steps > 0).sum() == 3 * (
        transcript(ChatFormat(ByteTokenizer()), conversation(*rows[0]["messages"])).step_ids() > 0
    ).sum()
    with pytest.raises(ConfigError, match="nothing to learn from"):
        rows_of()
