"""Rollout trees as JSON: one tree is one object, for the dumps that people and the report read.

A leaf stores only the steps of its own; the shared prefix is read off its parent, so identity survives the round trip.
World states are not stored: a tree that was read can be inspected and trained on, but not continued. What only they
can tell, the exact first irrecoverable steps of families with an oracle, is therefore worked out on writing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from elpo_jax.tasks.base import Family, Task
from elpo_jax.tools.base import Status, ToolCall, ToolResult
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory
from elpo_jax.trees.tree import Leaf, Node, Probe, RolloutTree, SearchRecord

FORMAT = 1

_TASK_FIELDS = tuple(field.name for field in dataclasses.fields(Task))
_OUTCOME_FIELDS = ("success", "reward", "reason", "answer")  # of a trajectory, as they are


class TreeCredit(Protocol):
    """What `policy.credit.Credit` holds, seen from below."""

    value: np.ndarray  # float64 [nodes], like the next three
    branch: np.ndarray
    trajectory: np.ndarray
    advantage: np.ndarray
    first_failure: np.ndarray  # int32 [leaves]
    recovered: Sequence[Sequence[int]]


def tree_to_json(
    tree: RolloutTree,
    *,
    decode_token: Callable[[int], str],
    credit: TreeCredit | None = None,
    family: Family | None = None,
) -> dict[str, Any]:
    """A tree as JSON values.

    A leaf's "first_failure" is the step that credit uses; whether a search named it or it was assumed, the searches
    tell. Its "oracle" is the step that the family's oracle names: 0 if the attempt was solved, the last step if the
    goal was in reach until the final turn, null where there is no oracle (dumps of older versions lack the key).

    Args:
      tree: The tree.
      decode_token: The text of one token id, for people only: ids are what is read back.
      credit: The tree's credit; without it nodes have no numbers and leaves no critical steps.
      family: The task's family, if its oracle is to be asked; the steps then need their states.
    """
    names: dict[int, str] = {}

    def token(index: int) -> str:
        if index not in names:
            names[index] = decode_token(index)
        return names[index]

    nodes = tree.nodes()
    prompt = tree.leaves[0].trajectory.prompt.ids.tolist() if tree.leaves else []
    return {
        "format": FORMAT,
        "task": {name: getattr(tree.task, name) for name in _TASK_FIELDS} | {"meta": dict(tree.task.meta)},
        "prompt": {"ids": prompt, "text": "".join(map(token, prompt))},
        "leaves": [_leaf_to_json(tree, index, token, credit, family) for index in range(len(tree.leaves))],
        "searches": [_search_to_json(record) for record in tree.searches],
        "nodes": [_node_to_json(nodes, index, credit) for index in range(len(nodes))],
        "infrastructure_failures": tree.infrastructure_failures,
        "truncated": tree.truncated,
    }


def tree_from_json(data: Mapping[str, Any]) -> RolloutTree:
    """The tree that `tree_to_json` wrote, without world states. Keys that it did not write are ignored.

    Raises:
      ValueError: If the object is of another format, or is not a tree.
    """
    if data.get("format") != FORMAT:
        raise ValueError(f"the tree has format {data.get('format')!r}; this version reads format {FORMAT}")
    try:
        return _tree_from_json(data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the object is not a rollout tree of format {FORMAT}: {error!r}") from error


def _leaf_to_json(
    tree: RolloutTree, index: int, token: Callable[[int], str], credit: TreeCredit | None, family: Family | None
) -> dict[str, Any]:
    leaf = tree.leaves[index]
    own = tree.path(index)[leaf.anchor :]
    steps = leaf.trajectory.steps[leaf.anchor :]
    return {
        "parent": leaf.parent,
        "anchor": leaf.anchor,
        "finish": leaf.trajectory.finish.value,
        **{name: getattr(leaf.trajectory, name) for name in _OUTCOME_FIELDS},
        "first_failure": 0 if credit is None else int(credit.first_failure[index]),
        "recovered": [] if credit is None else [int(step) for step in credit.recovered[index]],
        "oracle": None if family is None else _oracle_step(tree.task, leaf.trajectory, family),
        "steps": [
            {"node": tree.nodes()[node].id} | _step_to_json(step, token) for node, step in zip(own, steps, strict=True)
        ],
    }


def _oracle_step(task: Task, trajectory: Trajectory, family: Family) -> int | None:
    states = [step.state for step in trajectory.steps if step.is_tool_call]
    step = family.first_irrecoverable(task, states)
    # Where the context had no room for the answer to the last call, that call was the final turn.
    return None if step is None else min(step, len(trajectory.steps))


def _step_to_json(step: Step, token: Callable[[int], str]) -> dict[str, Any]:
    turn, call, result = step.turn, step.call, step.result
    ids = turn.ids.tolist()
    return {
        "text": step.text,
        "ids": ids,
        "tokens": [token(index) for index in ids],
        "logprobs": None if turn.logprobs is None else turn.logprobs.tolist(),
        "entropies": None if turn.entropies is None else turn.entropies.tolist(),
        "call": None if call is None else {"name": call.name, "arguments": dict(call.arguments)},
        "result": None
        if result is None
        else {"status": result.status.value, "text": result.text, "detail": result.detail},
        "response_ids": None if step.response is None else step.response.ids.tolist(),
    }


def _search_to_json(record: SearchRecord) -> dict[str, Any]:
    return {
        "leaf": record.leaf,
        "localizer": record.localizer,
        "first_failure": record.first_failure,
        "verified": record.verified,
        "probes": [
            {"step": probe.step, "leaves": list(probe.leaves), "planned": probe.planned} for probe in record.probes
        ],
    }


def _node_to_json(nodes: Sequence[Node], index: int, credit: TreeCredit | None) -> dict[str, Any]:
    node = nodes[index]
    out = {
        "id": node.id,
        "step": node.step,
        "parent": None if node.parent is None else nodes[node.parent].id,
        "leaves": list(node.leaves),
    }
    if credit is not None:
        for name in ("value", "branch", "trajectory", "advantage"):
            out[name] = float(getattr(credit, name)[index])
    return out


def _tree_from_json(data: Mapping[str, Any]) -> RolloutTree:
    prompt = Segment(Author.ENVIRONMENT, np.array(data["prompt"]["ids"], np.int32))
    leaves: list[Leaf] = []
    for item in data["leaves"]:
        shared = () if item["parent"] is None else leaves[item["parent"]].trajectory.steps[: item["anchor"]]
        trajectory = Trajectory(
            prompt=prompt,
            steps=(*shared, *map(_step_from_json, item["steps"])),
            finish=Finish(item["finish"]),
            **{name: item[name] for name in _OUTCOME_FIELDS},
        )
        leaves.append(Leaf(trajectory, item["parent"], item["anchor"]))
    return RolloutTree(
        task=Task(**{name: data["task"][name] for name in _TASK_FIELDS}),
        leaves=tuple(leaves),
        searches=tuple(_search_from_json(item) for item in data["searches"]),
        infrastructure_failures=data["infrastructure_failures"],
        truncated=data["truncated"],
    )


def _step_from_json(item: Mapping[str, Any]) -> Step:
    logprobs, entropies = (
        None if item[name] is None else np.array(item[name], np.float32) for name in ("logprobs", "entropies")
    )
    call, result, response = item["call"], item["result"], item["response_ids"]
    return Step(
        turn=Segment(Author.MODEL, np.array(item["ids"], np.int32), logprobs, entropies),
        call=None if call is None else ToolCall(call["name"], call["arguments"]),
        result=None if result is None else ToolResult(Status(result["status"]), result["text"], result["detail"]),
        response=None if response is None else Segment(Author.ENVIRONMENT, np.array(response, np.int32)),
        text=item["text"],
    )


def _search_from_json(item: Mapping[str, Any]) -> SearchRecord:
    return SearchRecord(
        leaf=item["leaf"],
        localizer=item["localizer"],
        first_failure=item["first_failure"],
        verified=item["verified"],
        probes=tuple(Probe(probe["step"], tuple(probe["leaves"]), probe["planned"]) for probe in item["probes"]),
    )
