"""Demonstrations: reference policies played with the real tools, in the shape of the agent loop's attempts."""

import dataclasses
import itertools

import numpy as np
import pytest

from elpo_jax.config import Config, ConfigError
from elpo_jax.overrides import override
from elpo_jax.tasks.base import Grade, Task
from elpo_jax.tasks.wordmath import REPAIRS, WordMath
from elpo_jax.text.chat import ChatFormat, Message
from elpo_jax.text.parser import call_text
from elpo_jax.text.tokenizer import ByteTokenizer
from elpo_jax.tools.base import InfrastructureError, Status, ToolResult
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.toolbox import ToolBox
from elpo_jax.train.setup import build_environment, demonstration_rows, open_tools
from elpo_jax.trees.demonstrate import demonstrate, demonstrations
from elpo_jax.trees.trajectory import Author, Finish

CHAT = ChatFormat(ByteTokenizer())


@pytest.fixture(scope="module")
def family():
    with CodeInterpreter(traceback="last_line") as interpreter:
        yield WordMath(interpreter)


@pytest.fixture(scope="module")
def toolbox(family):
    with ToolBox(family.tools, workers=2) as box:
        yield box


def play(family, toolbox, mistake_rate, count=300, seed=0):
    tasks = [family.task("train", i, 2 + i % 9) for i in range(count)]
    made = list(demonstrations({"wordmath": family}, tasks, toolbox, CHAT, seed=seed, mistake_rate=mistake_rate))
    return list(zip(tasks, made, strict=True))


def test_flawless_transcripts_of_every_difficulty_are_graded_correct(family, toolbox):
    for task, made in play(family, toolbox, 0.0):
        assert made.success and made.reason == "correct" and made.answer == task.answer, (task, made.steps[-1].text)
        assert made.finish is Finish.ANSWER and made.num_tool_steps == task.difficulty == len(made.steps) - 1
        assert [s.result.text.strip() for s in made.steps[:-1]] == [str(r) for r in task.meta["results"]]


def test_transcripts_with_mistakes_repair_them_and_are_graded_correct(family, toolbox):
    phrases = tuple(phrase for kind in REPAIRS.values() for phrase in kind)
    statuses, repaired, wrong_values = set(), 0, 0
    for task, made in play(family, toolbox, 0.5):
        assert made.success, (task, [s.text for s in made.steps])
        assert task.difficulty <= made.num_tool_steps <= task.max_steps
        slips = made.num_tool_steps - task.difficulty
        calls = made.steps[:-1]
        expected = iter(map(str, task.meta["results"]))
        due = next(expected)
        faults = 0
        for step, following in itertools.pairwise(made.steps):
            statuses.add(step.result.status)
            if step.result.status is Status.OK and step.result.text.strip() == due:
                due = next(expected, None)
                assert not following.text.startswith(phrases)
            else:  # a slip: noticed at once, in a few words
                faults += 1
                wrong_values += step.result.status is Status.OK
                assert following.text.startswith(phrases), (step.text, following.text)
                assert len(following.text.split("<tool_call>")[0].split()) <= 4
        assert due is None and faults == slips, [s.text for s in calls]
        repaired += slips > 0
    assert repaired > 230
    assert wrong_values > 100
    assert statuses == {Status.OK, Status.ERROR, Status.EMPTY, Status.MALFORMED}


def test_the_ids_are_those_of_the_whole_conversation(family, toolbox):
    for task, made in play(family, toolbox, 0.3, count=40):
        messages = [Message("user", task.prompt)]
        for step in made.steps:
            messages.append(Message("assistant", step.turn.ids))
            if step.result is not None:
                messages.append(Message("tool", step.result.text))
        assert made.ids().tolist() == CHAT.render(messages, family.tools).tolist()
        own = made.ids()[made.step_ids() > 0]
        assert own.tolist() == np.concatenate([s.turn.ids for s in made.steps]).tolist()
        assert {s.author for s in made.segments()[::2]} == {Author.ENVIRONMENT}
        assert {s.author for s in made.segments()[1::2]} == {Author.MODEL}
        assert all(s.logprobs is None for s in made.segments())
        assert all(s.turn.ids[-1] in CHAT.stop_ids for s in made.steps)


def test_one_at_a_time_equals_side_by_side(family, toolbox):
    together = play(family, toolbox, 0.4, count=12, seed=5)
    for task, made in reversed(together):
        rng = np.random.default_rng((5, task.uid))
        key = int(rng.integers(2**62))
        alone = demonstrate(family, task, toolbox, CHAT, rng, 0.4, key)
        assert alone.ids().tolist() == made.ids().tolist()
    other = play(family, toolbox, 0.4, count=12, seed=6)
    assert any(a.ids().tolist() != b.ids().tolist() for (_, a), (_, b) in zip(together, other, strict=True))


@dataclasses.dataclass(frozen=True)
class Counter:
    """A world: a number and the key it was made with."""

    value: int
    key: int

    def fork(self, key):
        return dataclasses.replace(self, key=key)


class Add:
    name = "add"
    description = "Adds to the number."
    parameters = {  # noqa: RUF012
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }

    def run(self, arguments, state):
        if arguments["n"] == 13:
            raise InfrastructureError("unlucky")
        state = dataclasses.replace(state, value=state.value + arguments["n"])
        return ToolResult(Status.OK, str(state.value)), state


class Counting:
    """A stateful family: count to the task's difficulty by calls that add `step`."""

    name = "counting"
    tools = (Add(),)

    def __init__(self, step=1):
        self.step = step

    def task(self, split, index, difficulty):
        return Task(f"counting/{split}/{index}", index, self.name, "Count.", "", difficulty, difficulty, {})

    def start(self, task, key):
        return Counter(0, key)

    def grade(self, task, final_text, state):
        return Grade(state.value == task.difficulty, 1.0, f"reached {state.value}", final_text)

    def demonstrate(self, task, rng, mistake_rate=0.0):
        value = 0
        while value != task.difficulty:
            result = yield call_text("add", {"n": self.step})
            value = int(result.text)
        yield f"Done with {value}."


@pytest.fixture(scope="module")
def counters():
    with ToolBox(Counting.tools, workers=1) as box:
        yield box


def test_the_world_is_threaded_and_kept_at_every_step(counters):
    family = Counting()
    made = demonstrate(family, family.task("train", 3, 4), counters, CHAT, np.random.default_rng(0), key=77)
    assert [s.state for s in made.steps] == [Counter(n, 77) for n in (1, 2, 3, 4, 4)]
    assert [s.call.arguments["n"] for s in made.steps[:-1]] == [1] * 4 and made.steps[-1].call is None
    assert (made.success, made.reason, made.answer) == (True, "reached 4", "Done with 4.")


def test_a_reference_policy_that_overruns_its_calls_is_stopped(counters):
    family = Counting(step=2)
    made = demonstrate(family, family.task("train", 0, 3), counters, CHAT, np.random.default_rng(0))
    assert made.finish is Finish.MAX_STEPS and not made.success and made.answer == ""
    assert made.num_tool_steps == 3 and made.steps[-1].result is None and made.steps[-1].state == Counter(6, 0)
    assert made.reason == "out of tool calls; reached 6"


def test_our_own_failure_is_not_turned_into_a_transcript(counters):
    family = Counting(step=13)
    with pytest.raises(InfrastructureError, match="counting/train/0"):
        demonstrate(family, family.task("train", 0, 3), counters, CHAT, np.random.default_rng(0))


def test_blocks_keep_the_order_of_the_tasks(counters):
    family = Counting()
    tasks = [family.task("train", i, 2 + i % 4) for i in range(10)]
    made = list(demonstrations({"counting": family}, tasks, counters, CHAT, seed=0, together=3))
    assert [m.num_tool_steps for m in made] == [t.difficulty for t in tasks]
    assert len({m.steps[0].state.key for m in made}) == 10, "every attempt has a world of its own"


def rows_with(noise, context=4096):
    """Demonstration rows of 60 ledger tasks, what was left out, and the transcripts that they were made of."""
    changes = [f"tasks.ledger.noise={noise}", f"sampler.context={context}", "tasks.ledger.demonstrations=60"]
    config = override(Config(), [*changes, "tasks.families=ledger", "tokenizer.kind=byte"])
    with open_tools(config) as (stream, toolboxes, sandbox):
        environment = build_environment(config, ByteTokenizer(), stream, toolboxes, sandbox)
        rows, failed, long = demonstration_rows(config, environment, stream)
        tasks = [stream.family_task("ledger", "train", i) for i in range(60)]
        tasks = [dataclasses.replace(task, max_steps=task.difficulty + config.sft.slack) for task in tasks]
        how = {"seed": config.seed, "mistake_rate": config.sft.mistake_rate}
        made = demonstrations(stream.families, tasks, toolboxes["ledger"], environment.chat, **how)
        return rows, failed, long, list(made)


def test_what_noise_made_fail_is_not_imitated():
    rows, failed, long, made = rows_with(noise=0.3)
    packed = {
        tuple(rows.tokens[row, start : rows.ends[row, start]].tolist())
        for row, start in np.argwhere(rows.positions == 0)
    }
    assert packed == {tuple(m.ids().tolist()) for m in made if m.success}
    assert failed == sum(not m.success for m in made) > 10 and long == 0


def test_what_was_left_out_is_counted_by_its_reason():
    _, failed, long, made = rows_with(noise=0.0, context=800)
    assert failed == 0 and long == sum(len(m.ids()) > 800 for m in made) > 0
    with pytest.raises(ConfigError, match=r"no demonstration of ledger .* more than sampler\.context=50"):
        rows_with(noise=0.0, context=50)
    with pytest.raises(ConfigError, match=r"no demonstration of ledger .* all 60 failed"):
        rows_with(noise=1.0)
