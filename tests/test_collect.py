"""Trees that a real policy made with real tools: what was sampled is what is kept, and branches are true."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import get_config

from elpo_jax.config import Config
from elpo_jax.rollout.agent import Environment
from elpo_jax.rollout.collect import collect, sample
from elpo_jax.rollout.sampler import Completion, Sampler
from elpo_jax.text.chat import Message
from elpo_jax.text.parser import call_text
from elpo_jax.tools.base import InfrastructureError, Status, ToolCall
from elpo_jax.tools.toolbox import Request, ToolBox
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.mesh import make_mesh
from elpo_jax.train.setup import build_environment, build_tokenizer, open_tools
from elpo_jax.train.state import init_state
from elpo_jax.train.step import make_optimizer
from elpo_jax.trees.grow import SearchConfig
from elpo_jax.trees.serial import tree_from_json
from elpo_jax.trees.trajectory import Author, Finish, Segment


@dataclasses.dataclass(frozen=True)
class World:
    config: Config
    environment: Environment
    stream: object
    params: dict
    mesh: object

    def sampler(self, slots: int) -> Sampler:
        config = dataclasses.replace(self.config.sampler, slots=slots)
        sampler = Sampler(self.config.model, config, self.environment.chat.stop_ids, self.config.seed)
        sampler.load(self.params, version=1)
        return sampler


@pytest.fixture(scope="module")
def world(tiny_run):
    """The cold-started policy of the tiny run, with its tools."""
    config = get_config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with open_tools(config) as (stream, toolboxes):
        tokenizer = build_tokenizer(config, tiny_run, stream, toolboxes)
        environment = build_environment(config, tokenizer, stream, toolboxes)
        optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
        blank = init_state(config.model, optimizer, jax.random.key(0), mesh)
        state, _ = Checkpoints(tiny_run / "sft" / "checkpoints").restore(blank, mesh)
        yield World(config, environment, stream, state.params, mesh)


def grow(world, slots, budget=8):
    tasks = [world.stream.task("validation", n) for n in range(8)]
    search = SearchConfig(budget=budget, buffer=2)
    return collect(tasks, search, world.environment, world.sampler(slots), seed=0, step=3, temperature=1.0)


@pytest.fixture(scope="module")
def trees(world):
    return grow(world, slots=16)


def test_the_policy_uses_tools_and_the_trees_branch(trees):
    """Otherwise the other tests here would prove little."""
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    statuses = {s.result.status for leaf in leaves for s in leaf.trajectory.steps if s.result is not None}
    assert Status.OK in statuses and len(statuses) > 1
    assert any(leaf.parent is not None for leaf in leaves)


def test_every_tree_spends_exactly_its_budget(trees):
    assert [len(tree.leaves) for tree in trees] == [8] * len(trees)


def test_branches_share_their_prefix_by_identity(trees):
    for tree in trees:
        for leaf in tree.leaves:
            if leaf.parent is None:
                continue
            parent = tree.leaves[leaf.parent].trajectory
            assert all(a is b for a, b in zip(leaf.trajectory.steps, parent.steps[: leaf.anchor], strict=False))
            assert leaf.trajectory.prompt is parent.prompt
            prefix = np.concatenate([s.ids for s in parent.prefix(leaf.anchor)])
            np.testing.assert_array_equal(leaf.trajectory.ids()[: len(prefix)], prefix)
            assert len(leaf.trajectory.steps) > leaf.anchor


def test_sampled_ids_are_kept_and_the_environment_only_appends(world, trees):
    chat = world.environment.chat
    for tree in trees:
        tools = world.environment.families[tree.task.family].tools
        for leaf in tree.leaves:
            t = leaf.trajectory
            messages = [Message("user", tree.task.prompt)]
            for step in t.steps:
                assert step.turn.author is Author.MODEL and np.isfinite(step.turn.logprobs).all()
                assert (step.turn.logprobs <= 1e-6).all() and (step.turn.entropies >= -1e-6).all()
                assert np.isin(step.turn.ids[:-1], chat.stop_ids).sum() == 0, "nothing follows the end of a turn"
                messages.append(Message("assistant", step.turn.ids))
                if step.response is not None:
                    np.testing.assert_array_equal(step.response.ids, chat.response(step.result))
                    messages.append(Message("tool", step.result.text))
            if t.finish is not Finish.LENGTH:
                whole = chat.render(messages, tools)
                np.testing.assert_array_equal(whole[: len(t.ids())], t.ids())
            mask = t.step_ids() > 0
            np.testing.assert_array_equal(t.ids()[mask], np.concatenate([s.turn.ids for s in t.steps]))


def test_neither_slots_nor_neighbours_change_an_attempt(world, trees):
    """The same trees from a sampler with six slots, so with other batches, other forks and other prefills."""
    for a, b in zip(trees, grow(world, slots=6), strict=True):
        assert [(x.parent, x.anchor) for x in a.leaves] == [(x.parent, x.anchor) for x in b.leaves]
        for x, y in zip(a.leaves, b.leaves, strict=True):
            np.testing.assert_array_equal(x.trajectory.ids(), y.trajectory.ids())
            np.testing.assert_allclose(x.trajectory.logprobs(), y.trajectory.logprobs(), atol=2e-5)
            assert x.trajectory.success == y.trajectory.success


class Scripted:
    """Stands where the sampler does, and plays random well-formed ledger calls: a function of each request's stream."""

    def __init__(self, chat, tasks, context=2048, slots=16):
        self.chat, self.tasks, self.context, self.slots = chat, {task.uid: task for task in tasks}, context, slots
        self.tickets, self.pending, self.started = 0, [], []

    @property
    def free_slots(self):
        return self.slots - len(self.pending)

    def submit(self, request):
        self.tickets += 1
        self.pending.append((self.tickets, request))
        return self.tickets

    def release(self, ticket):
        pass

    def start_visit(self, temperature):
        self.started, self.pending = self.pending, []

    def finish_visit(self):
        return [Completion(ticket, self.turn(request), True) for ticket, request in self.started]

    def turn(self, request):
        rng = np.random.default_rng(request.stream)
        meta = self.tasks[request.stream[1]].meta
        names = rng.permutation(list(meta["balances"])).tolist()
        account, payee, amount = meta["bills"][rng.integers(len(meta["bills"]))]
        calls = [
            ("query", {"account": names[0]}),
            ("pay", {"from": account, "to": payee, "amount": amount}),
            ("move", {"from": names[0], "to": names[-1], "amount": 1}),
            ("close", {"account": names[0]}),
        ]
        choice = rng.integers(5)
        ids = self.chat.turn(call_text(*calls[choice]) if choice < 4 else "Done.")
        return Segment(Author.MODEL, ids, np.zeros(len(ids), np.float32), rng.random(len(ids)).astype(np.float32))


def test_every_call_met_the_world_that_the_steps_before_it_left(world):
    """Each ledger call is repeated alone, on the world after the step before it, which for a branch is its parent's."""
    ledger = world.environment.families["ledger"]
    tools = {tool.name: tool for tool in ledger.tools}
    tasks = [ledger.task("validation", i, difficulty=5) for i in range(12)]
    sampler = Scripted(world.environment.chat, tasks)
    search = SearchConfig(budget=12, buffer=2)
    branches = 0
    for tree in collect(tasks, search, world.environment, sampler, seed=0, step=0, temperature=1.0):
        opening = ledger.start(tree.task, key=0)
        for leaf in tree.leaves:
            steps = leaf.trajectory.steps
            for i in range(leaf.anchor, len(steps)):
                if steps[i].call is None:
                    continue
                before = steps[i - 1].state if i else opening
                # A branch draws its own noise, from its own key, on the shared world.
                own = dataclasses.replace(before, key=steps[i].state.key)
                result, after = tools[steps[i].call.name].run(steps[i].call.arguments, own)
                assert result == steps[i].result and after == steps[i].state
                branches += i == leaf.anchor > 0
            assert leaf.trajectory.success == ledger.grade(tree.task, "", steps[-1].state).success
    assert branches > 10, "branches made calls"


def test_attempts_lost_to_our_machinery_do_not_count(world):
    """The interpreter breaks at first: the attempts are played again and the budget is spent on real ones."""

    class Breaking:
        in_process = True

        def __init__(self, tool, failures):
            self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
            self.tool, self.failures = tool, failures

        def run(self, arguments, state):
            if self.failures:
                self.failures -= 1
                raise InfrastructureError("worker died")
            return self.tool.run(arguments, state)

    interpreter = world.environment.families["wordmath"].tools[0]
    tasks = [world.stream.family_task("wordmath", "validation", i) for i in range(4)]
    with ToolBox([Breaking(interpreter, 3)], retries=0) as toolbox:
        environment = dataclasses.replace(world.environment, toolboxes={"wordmath": toolbox})
        search = SearchConfig(budget=6, localizer="none")
        sampler = world.sampler(16)
        trees = collect(tasks, search, environment, sampler, seed=0, step=3, temperature=1.0)
        assert sum(tree.infrastructure_failures for tree in trees) == 3
        assert [len(tree.leaves) for tree in trees] == [6] * 4
    with ToolBox([Breaking(interpreter, 10**6)], retries=0) as toolbox:
        environment = dataclasses.replace(world.environment, toolboxes={"wordmath": toolbox})
        with pytest.raises(RuntimeError, match="tool failures of ours"):
            sample(tasks, 4, environment, world.sampler(16), seed=0, step=3, temperature=1.0)


def test_a_tool_of_another_family_is_unknown(world):
    """A word problem offers the interpreter alone; what a model writes about accounts there is its own mistake."""
    call = ToolCall("pay", {"from": "Bob", "to": "Gas", "amount": 1})
    result, _ = world.environment.toolboxes["wordmath"].submit(Request(call, None)).result()
    assert result.status is Status.UNKNOWN_TOOL


def test_a_prompt_that_does_not_fit_is_refused_by_name(world):
    task = world.stream.task("validation", 0)
    with pytest.raises(ValueError, match=rf"the prompt of {task.id} has \d+ tokens .* raise sampler.context"):
        world.environment.check(task, context=40)


def test_dumped_trees_can_be_read_again(tiny_run):
    files = sorted(pathlib.Path(tiny_run).glob("*/rollouts/*.jsonl"))
    assert len(files) == 4
    for file in files:
        for line in file.read_text().splitlines():
            data = json.loads(line)
            tree = tree_from_json(data)
            assert len(tree.leaves) == len(data["leaves"]) == 6
            assert [node.id for node in tree.nodes()] == [node["id"] for node in data["nodes"]]
