"""Trees that a real policy made with real tools: what was sampled is what is kept, and branches are true."""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np
import pytest
from tiny import get_config

from elpo_jax.config import Config
from elpo_jax.policy.batch import normalise, pack, policy_examples, stack
from elpo_jax.policy.credit import assign
from elpo_jax.policy.loss import make_loss
from elpo_jax.policy.recipes import elpo
from elpo_jax.rollout.agent import Environment
from elpo_jax.rollout.collect import collect, sample
from elpo_jax.rollout.sampler import Completion, Sampler
from elpo_jax.rollout.slots import SlotTable
from elpo_jax.tasks.rewards import Reward
from elpo_jax.text.chat import Message
from elpo_jax.text.parser import call_text
from elpo_jax.tools.base import InfrastructureError, Status, ToolCall
from elpo_jax.tools.sandbox import pool
from elpo_jax.tools.toolbox import Request, ToolBox
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.mesh import make_mesh
from elpo_jax.train.rl import dump, stop_if_truncated
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

    def sampler(self, slots: int, dtype: str = "float32", **shapes: int) -> Sampler:
        config = dataclasses.replace(self.config.sampler, slots=slots, **shapes)
        model = dataclasses.replace(self.config.model, dtype=dtype)
        sampler = Sampler(model, config, self.environment.chat.stop_ids, self.config.seed)
        sampler.load(self.params, version=1)
        return sampler


@pytest.fixture(scope="module")
def world(tiny_run):
    """The cold-started policy of the tiny run, with its tools."""
    config = get_config()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with open_tools(config) as (stream, toolboxes, sandbox):
        tokenizer = build_tokenizer(config, tiny_run, stream, toolboxes)
        environment = build_environment(config, tokenizer, stream, toolboxes, sandbox)
        optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
        blank = init_state(config.model, optimizer, jax.random.key(0), mesh)
        state, _ = Checkpoints(tiny_run / "sft" / "checkpoints").restore(blank, mesh)
        yield World(config, environment, stream, state.params, mesh)


def grow(world, sampler, temperature=1.0):
    tasks = [world.stream.task("validation", n) for n in range(8)]
    search = SearchConfig(budget=8, buffer=2)
    return collect(tasks, search, world.environment, sampler, seed=0, step=3, temperature=temperature)


@pytest.fixture(scope="module")
def recorded(world):
    """Eight trees, and by stream every prefix that the sampler was asked to continue and the turn that it sampled."""
    sampler = world.sampler(16)
    submit, finish_visit, streams, asked, sampled = sampler.submit, sampler.finish_visit, {}, {}, {}

    def recording_submit(request):
        ticket = submit(request)
        assert request.stream not in asked
        streams[ticket] = request.stream
        asked[request.stream] = np.concatenate([segment.ids for segment in request.prefix])
        return ticket

    def recording_finish():
        done = finish_visit()
        sampled.update({streams[c.ticket]: c.segment.ids.copy() for c in done})
        return done

    sampler.submit, sampler.finish_visit = recording_submit, recording_finish
    trees = grow(world, sampler)
    assert asked.keys() == sampled.keys()
    return trees, {stream: (asked[stream], sampled[stream]) for stream in asked}


@pytest.fixture(scope="module")
def trees(recorded):
    return recorded[0]


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


def test_the_sampler_was_asked_with_the_very_ids_that_are_kept(recorded):
    """Token-in, token-out: each turn was sampled after exactly the ids that stand before it, branches included."""
    trees, turns = recorded
    for tree in trees:
        for index, leaf in enumerate(tree.leaves):
            ids, steps = leaf.trajectory.ids(), leaf.trajectory.step_ids()
            for number in range(leaf.anchor + 1, len(leaf.trajectory.steps) + 1):
                prefix, turn = turns.pop((3, tree.task.uid, index, number))
                end = len(prefix) + len(turn)
                np.testing.assert_array_equal(ids[:end], np.concatenate([prefix, turn]))
                assert (steps[len(prefix) : end] == number).all() and np.sum(steps == number) == len(turn) > 0
    assert not turns, "nothing was sampled that is not in a tree"


def first_update(world, trees, temperature, dtype="float32"):
    """Metrics of the loss on the trees' packed batch, with the parameters that sampled them, per model token."""
    examples = [example for tree in trees for example in policy_examples(tree, assign(tree, elpo()))]
    length = world.config.sampler.context
    batch = stack(pack(normalise(examples, elpo(), length), length), 8)
    assert batch.leaves.max() > 1 and any(leaf.parent is not None for tree in trees for leaf in tree.leaves)
    scalars = elpo().scalars() | {"temperature": temperature}
    loss_fn = make_loss(dataclasses.replace(world.config.model, dtype=dtype))
    sums = jax.jit(lambda b: jax.lax.map(lambda micro: loss_fn(world.params, micro, scalars)[1], b))(batch)
    tokens = sums["tokens"].sum()
    return {name: float(x.max() if name.endswith("_max") else x.sum() / tokens) for name, x in sums.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_ratio_at_the_first_update_is_one(world, temperature):
    """The sampler's cached decoding and the trainer's packed pass agree on every token that a batch trains on."""
    trees = grow(world, world.sampler(16, group=8), temperature)
    metrics = first_update(world, trees, temperature)
    assert metrics["ratio_deviation_max"] < 1e-4 and metrics["mismatch_max"] < 1e-4
    assert first_update(world, trees, 0.8)["ratio_deviation_max"] > 1e-2  # the temperature is part of it


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_in_bfloat16_sampler_and_trainer_differ_by_less_than_its_rounding(world, lifted, temperature):
    """Mean difference of the log-probabilities below 0.0005 nats per token, when both compute in bfloat16.

    Rounding itself costs more than twice what they differ by, as a trainer in float32 shows.
    """
    trees = grow(world, world.sampler(16, "bfloat16", group=8), temperature)
    assert lifted
    metrics = first_update(world, trees, temperature, "bfloat16")
    assert metrics["mismatch_mean"] < 5e-4 and metrics["mismatch_max"] < 0.05
    assert first_update(world, trees, temperature, "float32")["mismatch_mean"] > 2 * metrics["mismatch_mean"]


@pytest.fixture
def lifted(monkeypatch):
    """The trunks that prefixes were lifted to, one entry each time."""
    trunks, original = [], SlotTable._lift
    monkeypatch.setattr(SlotTable, "_lift", lambda self, *args: trunks.append(args[0].index) or original(self, *args))
    return trunks


def test_neither_slots_nor_neighbours_change_an_attempt(world, trees, lifted):
    """The same trees from a sampler with six slots, so with other batches, forks and prefills, and with trunks."""
    grown = grow(world, world.sampler(6, group=2))
    assert lifted
    for a, b in zip(trees, grown, strict=True):
        assert [(x.parent, x.anchor) for x in a.leaves] == [(x.parent, x.anchor) for x in b.leaves]
        for x, y in zip(a.leaves, b.leaves, strict=True):
            np.testing.assert_array_equal(x.trajectory.ids(), y.trajectory.ids())
            np.testing.assert_allclose(x.trajectory.logprobs(), y.trajectory.logprobs(), atol=2e-5)
            assert x.trajectory.success == y.trajectory.success


def test_neither_the_visits_of_a_tool_nor_its_slowness_change_an_attempt(world, trees, lifted, monkeypatch):
    """Answers come later, so other turns share a batch; which visit takes an answer is fixed, however fast the tool.

    Nor does it matter whether attempts that wait keep their slots or are parked, and how much a visit prefills.
    """
    parked, original = [], SlotTable._park
    monkeypatch.setattr(SlotTable, "_park", lambda self, slot: parked.append(slot.index) or original(self, slot))
    slow = dataclasses.replace(world, environment=dataclasses.replace(world.environment, tool_visits=3))
    grown = grow(slow, world.sampler(10, group=5, parking=5, prefill_per_visit=64))
    assert parked and lifted
    for a, b in zip(trees, grown, strict=True):
        assert [(x.parent, x.anchor) for x in a.leaves] == [(x.parent, x.anchor) for x in b.leaves]
        for x, y in zip(a.leaves, b.leaves, strict=True):
            np.testing.assert_array_equal(x.trajectory.ids(), y.trajectory.ids())


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

    def start_visit(self, temperature, top_p):
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
    # A retry is the attempt that was lost, so the trees are those of an undisturbed run.
    calm = collect(tasks, search, world.environment, world.sampler(16), seed=0, step=3, temperature=1.0)
    for a, b in zip(trees, calm, strict=True):
        for x, y in zip(a.leaves, b.leaves, strict=True):
            np.testing.assert_array_equal(x.trajectory.ids(), y.trajectory.ids())
    with ToolBox([Breaking(interpreter, 10**6)], retries=0) as toolbox:
        environment = dataclasses.replace(world.environment, toolboxes={"wordmath": toolbox})
        with pytest.raises(RuntimeError, match="tool failures of ours"):
            sample(tasks, 4, environment, world.sampler(16), seed=0, step=3, temperature=1.0)


@contextlib.contextmanager
def fresh_tools(world, workers):
    """An environment with a sandbox of its own, whose interpreter remembers nothing: every call runs a program."""
    rollout = dataclasses.replace(world.config.rollout, interpreter_workers=workers, interpreter_packages=())
    config = dataclasses.replace(world.config, rollout=rollout)
    with open_tools(config) as (stream, toolboxes, sandbox):
        environment = build_environment(config, world.environment.chat.tokenizer, stream, toolboxes, sandbox)
        (interpreter,) = stream.families["wordmath"].tools
        interpreter._remembered = 0
        yield environment, sandbox


def grow_with_programs(world, environment):
    """Trees of word problems, whose calls run programs, and of the ledger, which this policy solves now and then."""
    tasks = [world.stream.family_task("wordmath", "validation", i) for i in range(16)]
    tasks += [world.stream.family_task("ledger", "validation", i) for i in range(4)]
    search = SearchConfig(budget=8, buffer=2, infrastructure_retries=8)
    return collect(tasks, search, environment, world.sampler(16), seed=0, step=5, temperature=0.8)


def content(tree, logprobs):
    """All that training sees of a tree."""
    leaves = []
    for leaf in tree.leaves:
        t = leaf.trajectory
        results = [s.result and (s.result.status, s.result.detail, s.result.text) for s in t.steps]
        measured = t.logprobs().tobytes() if logprobs else b""
        leaves.append((leaf.parent, leaf.anchor, t.ids().tolist(), results, t.finish, t.reward, t.success, measured))
    return leaves, [dataclasses.astuple(search) for search in tree.searches]


@pytest.fixture(scope="module")
def calm(world):
    """Trees that nothing disturbed; their programs end in several ways, and some attempts succeed."""
    with fresh_tools(world, workers=2) as (environment, sandbox):
        trees = grow_with_programs(world, environment)
        counters = sandbox.counters()
    assert counters.pop("calls") > 60 and not any(counters.values())
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    assert len({s.result.status for leaf in leaves for s in leaf.trajectory.steps if s.result is not None}) > 1
    assert {leaf.trajectory.success for leaf in leaves} == {True, False}
    assert any(leaf.parent is not None for leaf in leaves)
    return trees


def descendants(pid):
    """A process and all below it that there are now."""
    found, new = set(), [pid]
    while new:
        one = new.pop()
        found.add(one)
        for path in pathlib.Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                new += [int(child) for child in path.read_text().split()]
    return found


def test_workers_that_are_killed_change_no_tree(world, calm):
    """All processes of all workers, again and again, each time just after a call began."""
    with fresh_tools(world, workers=2) as (environment, sandbox):
        done, kills = threading.Event(), []

        def kill():
            last = 0
            while not done.wait(0.0005):
                calls = sandbox.counters()["calls"]
                if calls >= last + 8:
                    last = calls
                    with sandbox._lock:
                        pids = [worker.pid for worker in sandbox._live]
                    for pid in set().union(*map(descendants, pids)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            kills.append(pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            trees = grow_with_programs(world, environment)
        finally:
            done.set()
            killer.join()
        counters = sandbox.counters()
    assert len(kills) > 10 and counters["restarts"] >= 5, (kills, counters)
    assert counters["sandbox_errors"] == 0
    assert [tree.infrastructure_failures for tree in trees] == [0] * len(trees)
    assert [content(tree, True) for tree in trees] == [content(tree, True) for tree in calm]


def test_attempts_that_the_sandbox_lost_are_played_again_and_nothing_else_changes(world, calm):
    """Every seventh program fails as often as it is tried."""
    with fresh_tools(world, workers=1) as (environment, sandbox):
        attempt, programs, failures = sandbox._attempt, 0, 0

        def attempt_or_fail(*program):
            nonlocal programs, failures
            sandbox._breaker.clear()  # so many faults would make it pause, which other tests look at
            if not failures:
                programs += 1
                failures = 3 * (programs % 7 == 0)
            if failures:
                failures -= 1
                raise InfrastructureError("worker died")
            return attempt(*program)

        sandbox._attempt = attempt_or_fail
        trees = grow_with_programs(world, environment)
        counters = sandbox.counters()
    lost = counters["sandbox_errors"]
    assert lost == programs // 7 >= 10 and counters["retries"] == 2 * lost
    assert sum(tree.infrastructure_failures for tree in trees) == lost, "an attempt is lost to one call"
    steps = [step for tree in trees for leaf in tree.leaves for step in leaf.trajectory.steps]
    assert not any(s.result is not None and s.result.status is Status.SANDBOX_ERROR for s in steps)
    assert not any(tree.truncated for tree in trees)
    assert [content(tree, False) for tree in trees] == [content(tree, False) for tree in calm]


def test_a_sandbox_that_gave_up_ends_the_batch_instead_of_keeping_it_waiting(world, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.5)
    with fresh_tools(world, workers=2) as (environment, sandbox):
        attempt, programs = sandbox._attempt, itertools.count()

        def attempt_or_fail(*program):
            if next(programs) >= 30:
                raise InfrastructureError("no memory")
            return attempt(*program)

        sandbox._attempt, sandbox._probe = attempt_or_fail, lambda: False
        began = time.monotonic()
        trees = grow_with_programs(world, environment)
        assert time.monotonic() - began < 60
        assert any(tree.truncated for tree in trees) and all(len(tree.leaves) <= 8 for tree in trees)
        steps = [step for tree in trees for leaf in tree.leaves for step in leaf.trajectory.steps]
        assert not any(s.result is not None and s.result.status is Status.SANDBOX_ERROR for s in steps)
        with pytest.raises(InfrastructureError, match="--resume"):
            stop_if_truncated(trees)
        tasks = [world.stream.family_task("wordmath", "validation", i) for i in range(4)]
        with pytest.raises(InfrastructureError, match="no accuracy is reported"):
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
    assert len(files) == 2 * 3  # the first, every second and the last batch
    for file in files:
        for line in file.read_text().splitlines():
            data = json.loads(line)
            tree = tree_from_json(data)
            assert len(tree.leaves) == len(data["leaves"]) == 6
            assert [node.id for node in tree.nodes()] == [node["id"] for node in data["nodes"]]


def with_ledger(world, **methods):
    """The environment with some of the ledger family's methods replaced."""
    ledger = world.environment.families["ledger"]
    changed = copy.copy(ledger)
    changed.__class__ = type("Changed", (type(ledger),), methods)
    return dataclasses.replace(world.environment, families={"ledger": changed})


def test_attempts_are_rewarded_by_outcome_and_length(world):
    ledger = world.environment.families["ledger"]
    tasks = [ledger.task("validation", i, difficulty=4) for i in range(6)]
    reward = Reward(kind="open_agentrl", overlong_buffer=1200, overlong_factor=0.5)
    environment = dataclasses.replace(world.environment, reward=reward)
    sampler = Scripted(environment.chat, tasks)
    trees = collect(tasks, SearchConfig(budget=8, buffer=2), environment, sampler, seed=0, step=0, temperature=1.0)
    seen = set()
    for attempt in (leaf.trajectory for tree in trees for leaf in tree.leaves):
        length = len(attempt.ids()) - len(attempt.prompt)
        calls = sum(step.response is not None for step in attempt.steps)
        outcome = 1.0 if attempt.success else min(-0.6, -1 + 0.1 * calls)
        longest = sampler.context - len(attempt.prompt)
        penalty = 0.5 * max(0.0, min(1.0, (length - longest + 1200) / 1200))
        assert attempt.reward == pytest.approx(outcome - penalty)
        seen.add((attempt.success, calls))
    assert len(seen) > 3
    with pytest.raises(ValueError, match=r"reward\.overlong_buffer=1200 .* lower it"):
        environment.check(tasks[0], context=400)


def test_an_attempt_that_a_broken_grader_lost_is_played_again(world):
    """A fault of the grader's is ours, as one of a tool's is."""
    ledger = world.environment.families["ledger"]
    tasks = [ledger.task("validation", i, difficulty=3) for i in range(3)]
    faults = itertools.chain([True, False, True], itertools.repeat(False))

    def grade(self, *arguments):
        if next(faults):
            raise InfrastructureError("the worker did not start")
        return type(ledger).grade(self, *arguments)

    search = SearchConfig(budget=4, localizer="none")
    trees = collect(
        tasks,
        search,
        with_ledger(world, grade=grade),
        Scripted(world.environment.chat, tasks),
        seed=0,
        step=0,
        temperature=1.0,
    )
    assert sum(tree.infrastructure_failures for tree in trees) == 2
    assert [len(tree.leaves) for tree in trees] == [4] * 3


def test_trees_of_private_tasks_are_written_only_when_asked_for(world, tmp_path):
    ledger = world.environment.families["ledger"]
    tasks = [ledger.task("validation", i, difficulty=3) for i in range(2)]
    tasks[0] = dataclasses.replace(tasks[0], meta={**tasks[0].meta, "private": True})
    search = SearchConfig(budget=4, localizer="none")
    sampler = Scripted(world.environment.chat, tasks)
    trees = collect(tasks, search, world.environment, sampler, seed=0, step=0, temperature=1.0)
    for private, written in ((False, tasks[1:]), (True, tasks)):
        path, credits = tmp_path / f"{private}.jsonl", [assign(tree, elpo()) for tree in trees]
        dump(path, 1, elpo(), trees, credits, world.environment, private)
        assert [json.loads(line)["task"]["id"] for line in path.open()] == [task.id for task in written]
