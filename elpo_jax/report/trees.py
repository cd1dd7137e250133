"""Rollout dumps in, the trees that the page embeds out: which ones, and in what form.

The page works on prepared trees: text of a shared step is stored once, at its node; a leaf is a path of nodes; token
strings are numbers into one vocabulary of the page. Everything that is marked in the picture (critical steps, recovered
faults, outcomes of probes) is worked out here, where it is tested, and only drawn there.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_TREES = 60
MOST_BYTES = 16_000_000  # of all embedded trees as JSON; a page beyond that is slow to open
_DIGITS = 5  # of log-probabilities and entropies (float32 has seven)

Json = Mapping[str, Any]


class Vocabulary:
    """Numbers for pairs of token id and token string, in order of first use."""

    def __init__(self):
        self.entries: list[list[Any]] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def number(self, token: int, string: str) -> int:
        key = (token, string)
        if key not in self._numbers:
            self._numbers[key] = len(self.entries)
            self.entries.append([token, string])
        return self._numbers[key]


def embedded_trees(
    stages: Mapping[str, Path], most: int = MOST_TREES, most_bytes: int = MOST_BYTES
) -> tuple[dict[str, Any], list[str]]:
    """Reads, chooses and prepares trees.

    The first, the middle and the last dump of every stage are read. From each, and from each family in it, trees are
    taken in turn, those with both outcomes first, until `most` trees or `most_bytes` are reached.

    Args:
      stages: Folder of each stage, by name.
      most: Largest number of trees.
      most_bytes: Largest size of the prepared trees as JSON.

    Returns:
      {"trees", "vocabulary", "seen": trees in the dumps that were read, "dumps": dumps that there are}, and sentences
      on what could not be read.
    """
    groups: dict[tuple, list[tuple[str, Json]]] = defaultdict(list)
    problems = []
    dumps = seen = 0
    for stage, folder in stages.items():
        paths = sorted((folder / "rollouts").glob("step_*.jsonl"))
        dumps += len(paths)
        for path in first_middle_last(paths):
            trees, torn = read_dump(path)
            seen += len(trees)
            if torn:
                problems.append(
                    f"{stage}/rollouts/{path.name}: {torn} of its lines could not be read and are left out."
                )
            for tree in trees:
                groups[stage, path.name, _family(tree)].append((stage, tree))
    vocabulary, prepared, size = Vocabulary(), [], 0
    for stage, tree in in_turn([sorted(group, key=lambda item: _rank(item[1])) for group in groups.values()]):
        if len(prepared) == most:
            break
        try:
            ready = prepare(tree, stage, vocabulary)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"One tree of {stage} is not in the format of this version and is left out ({error!r}).")
            continue
        size += len(json.dumps(ready))
        if prepared and size > most_bytes:
            break
        prepared.append(ready)
    prepared.sort(key=lambda tree: (tree["stage"], tree["step"]))
    return {"trees": prepared, "vocabulary": vocabulary.entries, "seen": seen, "dumps": dumps}, problems


def read_dump(path: Path) -> tuple[list[Json], int]:
    """The trees of a dump, and the number of lines that are not JSON objects (a kill tears the last one)."""
    trees, torn = [], 0
    for line in path.read_bytes().splitlines():
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            tree = None
        if isinstance(tree, dict):
            trees.append(tree)
        else:
            torn += 1
    return trees, torn


def first_middle_last(items: Sequence[Any]) -> list[Any]:
    """At most three of the items, without repeats."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})] if items else []


def in_turn(groups: Iterable[Sequence[Any]]) -> Iterable[Any]:
    """The first of every group, then the second of every group, and so on."""
    groups = list(groups)
    for i in range(max(map(len, groups), default=0)):
        for group in groups:
            if i < len(group):
                yield group[i]


def outcome(leaves: Sequence[Json]) -> str:
    """ "solved", "failed" or "mixed"."""
    solved = {bool(leaf["success"]) for leaf in leaves}
    return "mixed" if len(solved) == 2 else "solved" if solved == {True} else "failed"


def prepare(tree: Json, stage: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """One tree as the page wants it.

    Args:
      tree: As `trees/serial.py` writes it.
      stage: Name of the stage it comes from.
      vocabulary: Gets the tree's tokens.

    Returns:
      {"stage", "step", "task", "prompt", "outcome", "leaves", "nodes", "searches", "lost": attempts lost to failures of
      the machinery}. Nodes are in the order of the dump; one has "parent", an index or -1, the content of its step,
      "status", the tool's or "answer" or "cut" (by the length limit), and "critical" / "recovered", the leaves of which
      the step is the first irrecoverable one / a repaired fault. A leaf has "path", its nodes from step 1 on.

    Raises:
      KeyError, IndexError, TypeError, ValueError: If the tree is not in that format.
    """
    index = {node["id"]: i for i, node in enumerate(tree["nodes"])}
    contents: dict[int, Json] = {}
    leaves: list[dict[str, Any]] = []
    for leaf in tree["leaves"]:
        own = [index[step["node"]] for step in leaf["steps"]]
        contents.update(zip(own, leaf["steps"], strict=True))
        shared = [] if leaf["parent"] is None else leaves[leaf["parent"]]["path"][: leaf["anchor"]]
        facts = ("parent", "anchor", "finish", "success", "reward", "reason", "first_failure", "recovered")
        leaves.append({**{name: leaf[name] for name in facts}, "answer": leaf.get("answer", ""), "path": shared + own})
    cut = {leaf["path"][-1] for leaf in leaves if leaf["finish"] == "length"}
    nodes = [_node(node, index, contents[i], vocabulary, i in cut) for i, node in enumerate(tree["nodes"])]
    for number, leaf in enumerate(leaves):
        if leaf["first_failure"]:
            _at(nodes, leaf, leaf["first_failure"])["critical"].append(number)
        for step in leaf["recovered"]:
            _at(nodes, leaf, step)["recovered"].append(number)
    task = tree["task"]
    return {
        "stage": stage,
        "step": tree["rl_step"],
        "task": {name: task.get(name) for name in ("id", "family", "prompt", "answer", "max_steps", "difficulty")},
        "prompt": tree["prompt"]["text"],
        "outcome": outcome(leaves),
        "leaves": leaves,
        "nodes": nodes,
        "searches": [_search(search, leaves) for search in tree["searches"]],
        "lost": tree.get("infrastructure_failures", 0),
    }


def _node(node: Json, index: Mapping[str, int], step: Json, vocabulary: Vocabulary, cut: bool) -> dict[str, Any]:
    call, result = step["call"], step["result"]
    numbers = ("value", "branch", "trajectory", "advantage")  # absent from a tree that was written without its credit
    tokens = [vocabulary.number(token, string) for token, string in zip(step["ids"], step["tokens"], strict=True)]
    return {
        "step": node["step"],
        "parent": -1 if node["parent"] is None else index[node["parent"]],
        "leaves": node["leaves"],
        **{name: node.get(name) for name in numbers},
        "status": result["status"] if result else "cut" if cut else "answer",
        "text": step["text"],
        "tokens": tokens,
        "logprobs": _rounded(step["logprobs"], len(tokens)),
        "entropies": _rounded(step["entropies"], len(tokens)),
        "call": call and {"name": call["name"], "arguments": _arguments(call["arguments"])},
        "result": result and {name: result[name] for name in ("status", "text", "detail")},
        "critical": [],
        "recovered": [],
    }


def _search(search: Json, leaves: Sequence[Json]) -> dict[str, Any]:
    """A search with the outcome of each probe: "at" is the node after which it started."""
    path = leaves[search["leaf"]]["path"]
    probes = []
    for probe in search["probes"]:
        solved = sum(bool(leaves[leaf]["success"]) for leaf in probe["leaves"])
        planned = probe.get("planned", len(probe["leaves"]))
        at = path[probe["step"] - 1]
        probes.append(
            {"step": probe["step"], "at": at, "leaves": probe["leaves"], "solved": solved, "planned": planned}
        )
    return {**{name: search[name] for name in ("leaf", "localizer", "first_failure", "verified")}, "probes": probes}


def _at(nodes: Sequence[dict[str, Any]], leaf: Json, step: int) -> dict[str, Any]:
    if not 1 <= step <= len(leaf["path"]):
        raise ValueError(f"step {step} of an attempt with {len(leaf['path'])} steps")
    return nodes[leaf["path"][step - 1]]


def _arguments(arguments: Json) -> list[list[str]]:
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in arguments.items()]


def _rounded(values: Sequence[float] | None, length: int) -> list[float | None]:
    """Rounded values; all None where the sampler recorded none."""
    if values is None:
        return [None] * length
    if len(values) != length:
        raise ValueError(f"{len(values)} values for {length} tokens")
    return [None if value is None else round(value, _DIGITS) for value in values]


def _family(tree: Json) -> str:
    task = tree.get("task")
    return str(task.get("family")) if isinstance(task, dict) else ""


def _rank(tree: Json) -> tuple[int, int]:
    """Sorts mixed trees first, among them those that a search looked into; then failed, then solved ones."""
    leaves = tree.get("leaves")
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) and "success" in leaf for leaf in leaves):
        return (3, 0)
    return (("mixed", "failed", "solved").index(outcome(leaves)), 0 if tree.get("searches") else 1)
