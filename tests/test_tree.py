"""Nodes and paths of a tree, what it refuses, and its life as JSON."""

import dataclasses
import json
import re

import numpy as np
import pytest
from factories import PROMPT, make_step, make_task, make_trajectory, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tools.base import Status, ToolCall
from elpo_jax.trees.serial import tree_from_json, tree_to_json
from elpo_jax.trees.trajectory import Finish, Step, Trajectory
from elpo_jax.trees.tree import Leaf, Probe, RolloutTree, SearchRecord

SMALL = [(None, 0, 2, False), (None, 0, 0, True), (0, 1, 3, True), (0, 2, 2, False), (2, 3, 3, False)]


@st.composite
def trees(draw):
    """Random trees, several levels deep, with random tool statuses."""
    shape = []
    for index in range(draw(st.integers(1, 9))):
        statuses = draw(st.lists(st.sampled_from(list(Status)[:-1]), max_size=5))
        parents = [i for i in range(index) if len(shape[i][2])]
        parent = draw(st.none() | st.sampled_from(parents)) if parents else None
        anchor = 0
        if parent is not None:
            anchor = draw(st.integers(1, len(shape[parent][2])))
            statuses = [*shape[parent][2][:anchor], *statuses]
        shape.append((parent, anchor, statuses, draw(st.booleans())))
    return make_tree(shape, failure=draw(st.sampled_from([0.0, -1.1])))


def test_nodes_by_hand():
    tree = make_tree(SMALL)
    nodes = tree.nodes()
    assert [node.id for node in nodes] == ["s1:0", "s2:0", "s3:0", "s1:1", "s2:2", "s3:2", "s4:2", "s3:3", "s4:4"]
    assert [node.parent for node in nodes] == [None, 0, 1, None, 0, 4, 5, 1, 5]
    assert [node.children for node in nodes] == [(1, 4), (2, 7), (), (), (5,), (6, 8), (), (), ()]
    assert [node.leaves for node in nodes] == [(0, 2, 3, 4), (0, 3), (0,), (1,), (2, 4), (2, 4), (2,), (3,), (4,)]
    assert [tree.path(i) for i in range(5)] == [(0, 1, 2), (3,), (0, 4, 5, 6), (0, 1, 7), (0, 4, 5, 8)]
    assert tree.roots == (0, 1)


@settings(max_examples=50, deadline=None)
@given(trees())
def test_a_node_is_one_step_object(tree):
    nodes = tree.nodes()
    owner = {}
    for index, leaf in enumerate(tree.leaves):
        path = tree.path(index)
        assert len(path) == len(leaf.trajectory.steps)
        for number, (node, step) in enumerate(zip(path, leaf.trajectory.steps, strict=True), 1):
            assert owner.setdefault(node, step) is step
            assert nodes[node].step == number and index in nodes[node].leaves
            assert nodes[node].id == f"s{number}:{nodes[node].leaves[0]}"
            assert nodes[node].parent == (path[number - 2] if number > 1 else None)
    assert len({id(step) for step in owner.values()}) == len(nodes) == len({node.id for node in nodes})
    assert sum(len(node.leaves) for node in nodes) == sum(len(leaf.trajectory.steps) for leaf in tree.leaves)
    for index, node in enumerate(nodes):
        assert all(nodes[child].parent == index for child in node.children)
        assert list(node.leaves) == sorted(node.leaves)


def same_segment(a, b):
    if a is None or b is None:
        return a is b
    pairs = ((a.ids, b.ids), (a.logprobs, b.logprobs), (a.entropies, b.entropies))
    return a.author == b.author and all(
        (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs
    )


@settings(max_examples=50, deadline=None)
@given(trees())
def test_json_round_trip(tree):
    search = SearchRecord(0, "binary", 1, False, (Probe(1, (0,), 3),))
    tree = RolloutTree(tree.task, tree.leaves, (search,), 4, True)
    credit = assign(tree, elpo())
    data = json.loads(json.dumps(tree_to_json(tree, decode_token=chr, credit=credit)))
    back = tree_from_json(data)
    assert back.task == tree.task and back.searches == tree.searches and back.nodes() == tree.nodes()
    assert (back.infrastructure_failures, back.truncated) == (4, True)
    steps = 0
    for old, new in zip(tree.leaves, back.leaves, strict=True):
        assert (old.parent, old.anchor) == (new.parent, new.anchor)
        for name in ("finish", "success", "reward", "reason", "answer"):
            assert getattr(old.trajectory, name) == getattr(new.trajectory, name)
        assert same_segment(old.trajectory.prompt, new.trajectory.prompt)
        for a, b in zip(old.trajectory.steps, new.trajectory.steps, strict=True):
            assert same_segment(a.turn, b.turn) and same_segment(a.response, b.response)
            assert (a.call, a.result, a.text) == (b.call, b.result, b.text)
            steps += 1
    assert steps
    again = assign(back, elpo())
    assert np.array_equal(again.advantage, credit.advantage)
    assert np.array_equal(again.first_failure, credit.first_failure) and again.recovered == credit.recovered


def test_json_holds_shared_steps_once_and_the_credit():
    tree = make_tree(SMALL)
    credit = assign(tree, elpo())
    data = tree_to_json(tree, decode_token=lambda i: f"<{i}>", credit=credit)
    assert [[step["node"] for step in leaf["steps"]] for leaf in data["leaves"]] == [
        ["s1:0", "s2:0", "s3:0"],
        ["s1:1"],
        ["s2:2", "s3:2", "s4:2"],
        ["s3:3"],
        ["s4:4"],
    ]
    step = data["leaves"][0]["steps"][0]
    assert step["tokens"] == [f"<{i}>" for i in step["ids"]]
    assert step["result"] == {"status": "ok", "text": "saw 0", "detail": "cause"}
    assert data["prompt"] == {"ids": [1, 2, 3], "text": "<1><2><3>"}
    assert [leaf["first_failure"] for leaf in data["leaves"]] == credit.first_failure.tolist()
    assert [node["advantage"] for node in data["nodes"]] == credit.advantage.tolist()
    assert [node["parent"] for node in data["nodes"]][:5] == [None, "s1:0", "s2:0", None, "s1:0"]
    plain = tree_to_json(tree, decode_token=str)
    assert "advantage" not in plain["nodes"][0] and plain["leaves"][0]["first_failure"] == 0


class Oracle:
    """A family whose attempts are in reach of their goal until the final turn."""

    def __init__(self):
        self.asked = []

    def first_irrecoverable(self, task, states):
        self.asked.append(states)
        return 0 if task.meta["n"] == len(states) else len(states) + 1


def test_the_oracle_is_asked_with_the_worlds_after_the_calls():
    tree = make_tree([(None, 0, 1, True), (None, 0, 2, False), (1, 1, 3, False)])
    steps = [dataclasses.replace(step, state=f"world {i}") for i, step in enumerate(tree.leaves[1].trajectory.steps)]
    # Its last call was answered, but the context had no room for the answer: there is no step after it to blame.
    full = dataclasses.replace(steps[1], response=None)
    attempt = dataclasses.replace(tree.leaves[1].trajectory, steps=(steps[0], full), finish=Finish.LENGTH)
    branch = dataclasses.replace(tree.leaves[2].trajectory, steps=(steps[0], *tree.leaves[2].trajectory.steps[1:]))
    tree = dataclasses.replace(tree, leaves=(tree.leaves[0], Leaf(attempt), Leaf(branch, 1, 1)))
    oracle = Oracle()
    data = tree_to_json(tree, decode_token=str, family=oracle)
    assert oracle.asked == [[None], ["world 0", "world 1"], ["world 0", None, None]]
    assert [leaf["oracle"] for leaf in data["leaves"]] == [0, 2, 4]
    assert [leaf["oracle"] for leaf in tree_to_json(tree, decode_token=str)["leaves"]] == [None, None, None]
    for leaf in data["leaves"]:
        del leaf["oracle"]  # as in dumps of older versions
    assert len(tree_from_json(data).leaves) == 3


def test_the_ledgers_oracle_is_in_its_dumps():
    ledger = Ledger()
    task = ledger.task("train", 0, 3)
    tools = {tool.name: tool for tool in ledger.tools}
    flawless = []
    player = ledger.demonstrate(task, np.random.default_rng(0))
    state, turn = ledger.start(task, 0), next(player)
    while "tool_call" in turn:
        written = json.loads(re.search(r"\{.*\}", turn)[0])
        flawless.append(ToolCall(written["name"], written["arguments"]))
        result, state = tools[flawless[-1].name].run(flawless[-1].arguments, state)
        turn = player.send(result)
    payer = task.meta["bills"][0][0]
    fatal = ToolCall("close", {"account": payer})  # before its bill is paid

    def leaf(calls):
        state, steps = ledger.start(task, 0), []
        for call in calls:
            result, state = tools[call.name].run(call.arguments, state)
            blank = make_step(Status.OK)
            steps.append(Step(blank.turn, call, result, blank.response, state, "call"))
        final = Step(make_step(None).turn, state=state, text="Done.")
        success = ledger.grade(task, "Done.", state).success
        return Leaf(Trajectory(PROMPT, (*steps, final), Finish.ANSWER, success, float(success)))

    plays = [flawless, [], [fatal], [ToolCall("query", {"account": payer}), fatal, *flawless], flawless[:-1]]
    tree = RolloutTree(task, tuple(map(leaf, plays)))
    dumped = tree_to_json(tree, decode_token=str, family=ledger)["leaves"]
    assert [leaf["oracle"] for leaf in dumped] == [0, 1, 1, 2, len(flawless)]


def test_an_empty_tree_survives():
    tree = RolloutTree(make_task(), (), (), 9, True)
    back = tree_from_json(json.loads(json.dumps(tree_to_json(tree, decode_token=str, credit=assign(tree, elpo())))))
    assert back.leaves == () and back.nodes() == () and back.infrastructure_failures == 9


def test_what_is_not_a_tree_is_refused():
    data = tree_to_json(make_tree(SMALL), decode_token=str)
    with pytest.raises(ValueError, match="format 2; this version reads format 1"):
        tree_from_json(data | {"format": 2})
    with pytest.raises(ValueError, match="not a rollout tree of format 1"):
        tree_from_json({"format": 1, "prompt": {"ids": [1]}})


def test_demonstrations_have_no_logprobs_and_still_survive():
    turn = make_step(None).turn
    bare = type(turn)(turn.author, turn.ids)
    step = type(make_step(None))(bare, text="x")
    tree = RolloutTree(make_task(), (Leaf(Trajectory(PROMPT, (step,), Finish.ANSWER, True, 1.0)),))
    back = tree_from_json(tree_to_json(tree, decode_token=str)).leaves[0].trajectory.steps[0].turn
    assert back.logprobs is None and back.entropies is None and np.array_equal(back.ids, turn.ids)


def test_impossible_leaves_are_refused():
    root = make_trajectory(2)
    twin = make_trajectory(2)
    branch = make_trajectory(2, parent=root, anchor=1)
    other_prompt = Trajectory(make_step(Status.OK).response, branch.steps, Finish.ANSWER, False, 0.0)
    cases = [
        ([Leaf(Trajectory(PROMPT, (), Finish.LENGTH, False, 0.0))], "leaf 0 has 0 steps, so it adds none"),
        ([Leaf(root, None, 1)], "leaf 0 has no parent but anchor 1"),
        ([Leaf(root), Leaf(branch, 1, 1)], "leaf 1 continues leaf 1; a parent is an earlier leaf"),
        ([Leaf(root), Leaf(branch, 0, 0)], "branches after step 0 of leaf 0, which has 3 steps"),
        ([Leaf(root), Leaf(make_trajectory(3), 0, 3)], "branches after step 3 of leaf 0, which has 3 steps"),
        ([Leaf(twin), Leaf(branch, 0, 1)], "leaf 1 does not share its first 1 steps with leaf 0"),
        ([Leaf(root), Leaf(other_prompt, 0, 1)], "leaf 1 does not share its first 1 steps"),
    ]
    for leaves, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            RolloutTree(make_task(), tuple(leaves))
    for record in (SearchRecord(1, "binary", 1, True), SearchRecord(0, "binary", 1, True, (Probe(1, (4,), 1),))):
        with pytest.raises(ValueError, match="names leaves that a tree of 1 does not have"):
            RolloutTree(make_task(), (Leaf(root),), (record,))
    with pytest.raises(ValueError, match="names step 4 of 3"):
        RolloutTree(make_task(), (Leaf(root),), (SearchRecord(0, "binary", 4, True),))
