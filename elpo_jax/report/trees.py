"""Rollout dumps in, the trees that the page embeds out: which ones, and in what form.

The page works on prepared trees: text of a shared step is stored once, at its node; a leaf is a path of nodes; token
strings are numbers into one vocabulary of the page. Everything that is marked in the picture (critical steps and how
they are known, recovered faults, outcomes of probes) is worked out here, where it is tested, and only drawn there.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_TREES = 60
MOST_BYTES = 16_000_000  # of all embedded trees as JSON; a page beyond that is slow to open
UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # of a tree in another format
_DIGITS = 5  # of log-probabilities and entropies (float32 has seven)
_FINAL = {"max_steps": "no_calls", "length": "cut"}  # status of a turn that nothing answered, by the attempt's finish

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Dump:
    """One rollouts/step_NNNNNN.jsonl: the trees of one batch."""

    stage: str
    step: int
    trees: list[Json]


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


def read_dumps(stages: Mapping[str, Path]) -> tuple[list[Dump], int, list[str]]:
    """Reads the first, the middle and the last dump of every stage.

    Args:
      stages: Folder of each stage, by name.

    Returns:
      The dumps, how many others there are, and sentences on what could not be read.
    """
    dumps, others, problems = [], 0, []
    for stage, folder in stages.items():
        paths = sorted(p for p in (folder / "rollouts").glob("step_*.jsonl") if _step(p).isdecimal())
        chosen = first_middle_last(paths)
        others += len(paths) - len(chosen)
        for path in chosen:
            trees, torn = read_dump(path)
            dumps.append(Dump(stage, int(_step(path)), trees))
            if torn:
                problems.append(
                    f"{stage}/rollouts/{path.name}: {torn} of its lines could not be read and are left out."
                )
    return dumps, others, problems


def embedded_trees(
    dumps: Sequence[Dump], most: int = MOST_TREES, most_bytes: int = MOST_BYTES
) -> tuple[dict[str, Any], list[str]]:
    """Chooses and prepares trees.

    From each dump, and from each family in it, trees are taken in turn, those with both outcomes first, until `most`
    trees or `most_bytes` are reached.

    Args:
      dumps: What to choose from.
      most: Largest number of trees.
      most_bytes: Largest size of the prepared trees as JSON.

    Returns:
      {"trees", "vocabulary"}, and sentences on what could not be read.
    """
    groups: dict[tuple, list[tuple[str, Json]]] = defaultdict(list)
    for dump in dumps:
        for tree in dump.trees:
            groups[dump.stage, dump.step, _family(tree)].append((dump.stage, tree))
    vocabulary, prepared, problems, size = Vocabulary(), [], [], 0
    for stage, tree in in_turn([sorted(group, key=lambda item: _rank(item[1])) for group in groups.values()]):
        if len(prepared) == most:
            break
        try:
            ready = prepare(tree, stage, vocabulary)
        except UNREADABLE as error:
            problems.append(f"One tree of {stage} is not in the format of this version and is left out ({error!r}).")
            continue
        size += len(json.dumps(ready))
        if prepared and size > most_bytes:
            break
        prepared.append(ready)
    prepared.sort(key=lambda tree: (tree["stage"], tree["step"]))
    return {"trees": prepared, "vocabulary": vocabulary.entries}, problems


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


def read_leaves(tree: Json) -> list[dict[str, Any]]:
    """The leaves of a tree, with all facts on them but their steps.

    Returns:
      What the dump says of each leaf, and "path", the indices of its nodes from step 1 on; "oracle", the exact first
      irrecoverable step: 0 of a solved attempt, None where no oracle was asked; "evidence", how `first_failure` is
      known: "verified" or "unverified" if a search named that step of that leaf, or of one that shares it, "assumed" if
      none did and it is only where the tree stops having successes, None without a step.

    Raises:
      KeyError, IndexError, TypeError, ValueError: If the tree is not in that format.
    """
    index = {node["id"]: i for i, node in enumerate(tree["nodes"])}
    leaves: list[dict[str, Any]] = []
    for leaf in tree["leaves"]:
        shared = [] if leaf["parent"] is None else leaves[leaf["parent"]]["path"][: leaf["anchor"]]
        facts = ("parent", "anchor", "finish", "success", "reward", "reason", "first_failure", "recovered")
        path = shared + [index[step["node"]] for step in leaf["steps"]]
        others = {"answer": leaf.get("answer", ""), "oracle": leaf.get("oracle"), "path": path}
        leaves.append({name: leaf[name] for name in facts} | others)
    named: dict[int, bool] = {}  # nodes that a search named, and whether one of those is verified
    for search in tree["searches"]:
        if search["first_failure"]:
            node = _at(leaves[search["leaf"]], search["first_failure"])
            named[node] = named.get(node, False) or search["verified"]
    for leaf in leaves:
        leaf["evidence"] = None
        if leaf["first_failure"]:
            verified = named.get(_at(leaf, leaf["first_failure"]))
            leaf["evidence"] = "assumed" if verified is None else "verified" if verified else "unverified"
    return leaves


def prepare(tree: Json, stage: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """One tree as the page wants it.

    Args:
      tree: As `trees/serial.py` writes it.
      stage: Name of the stage it comes from.
      vocabulary: Gets the tree's tokens.

    Returns:
      {"stage", "step", "task", "prompt", "outcome", "leaves", "nodes", "searches", "lost": attempts lost to failures of
      the machinery}. Leaves are as from `read_leaves`. Nodes are in the order of the dump; one has "parent", an index
      or -1, the content of its step, "status", the tool's or "answer", "no_calls" (a call when none was left) or "cut"
      (by the length limit), and lists of leaves: "critical", of which the step is the first irrecoverable one, known as
      "evidence" says; "oracle", likewise by the oracle; "recovered", of which it is a repaired fault.

    Raises:
      KeyError, IndexError, TypeError, ValueError: If the tree is not in that format.
    """
    index = {node["id"]: i for i, node in enumerate(tree["nodes"])}
    leaves = read_leaves(tree)
    contents: dict[int, Json] = {}
    for leaf, written in zip(leaves, tree["leaves"], strict=True):
        contents.update(zip(leaf["path"][leaf["anchor"] :], written["steps"], strict=True))
    final = {leaf["path"][-1]: _FINAL.get(leaf["finish"], "answer") for leaf in leaves}
    nodes = [_node(node, index, contents[i], vocabulary, final.get(i, "")) for i, node in enumerate(tree["nodes"])]
    for number, leaf in enumerate(leaves):
        if leaf["first_failure"]:
            node = nodes[_at(leaf, leaf["first_failure"])]
            node["critical"].append(number)
            node["evidence"] = leaf["evidence"]
        if leaf["oracle"]:
            nodes[_at(leaf, leaf["oracle"])]["oracle"].append(number)
        for step in leaf["recovered"]:
            nodes[_at(leaf, step)]["recovered"].append(number)
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


def _node(node: Json, index: Mapping[str, int], step: Json, vocabulary: Vocabulary, final: str) -> dict[str, Any]:
    call, result = step["call"], step["result"]
    numbers = ("value", "branch", "trajectory", "advantage")  # absent from a tree that was written without its credit
    tokens = [vocabulary.number(token, string) for token, string in zip(step["ids"], step["tokens"], strict=True)]
    return {
        "step": node["step"],
        "parent": -1 if node["parent"] is None else index[node["parent"]],
        "leaves": node["leaves"],
        **{name: node.get(name) for name in numbers},
        "status": result["status"] if result else final,
        "text": step["text"],
        "tokens": tokens,
        "logprobs": _rounded(step["logprobs"], len(tokens)),
        "entropies": _rounded(step["entropies"], len(tokens)),
        "call": call and {"name": call["name"], "arguments": _arguments(call["arguments"])},
        "result": result and {name: result[name] for name in ("status", "text", "detail")},
        "critical": [],
        "evidence": None,
        "oracle": [],
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


def _at(leaf: Json, step: int) -> int:
    """The node of a leaf's step."""
    if not 1 <= step <= len(leaf["path"]):
        raise ValueError(f"step {step} of an attempt with {len(leaf['path'])} steps")
    return leaf["path"][step - 1]


def _arguments(arguments: Json) -> list[list[str]]:
    return [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in arguments.items()]


def _rounded(values: Sequence[float] | None, length: int) -> list[float | None]:
    """Rounded values; all None where the sampler recorded none."""
    if values is None:
        return [None] * length
    if len(values) != length:
        raise ValueError(f"{len(values)} values for {length} tokens")
    return [None if value is None else round(value, _DIGITS) for value in values]


def _step(dump: Path) -> str:
    return dump.stem.removeprefix("step_")


def _family(tree: Json) -> str:
    task = tree.get("task")
    return str(task.get("family")) if isinstance(task, dict) else ""


def _rank(tree: Json) -> tuple[int, int]:
    """Sorts mixed trees first, among them those that a search looked into; then failed, then solved ones."""
    leaves = tree.get("leaves")
    if not isinstance(leaves, list) or not all(isinstance(leaf, dict) and "success" in leaf for leaf in leaves):
        return (3, 0)
    return (("mixed", "failed", "solved").index(outcome(leaves)), 0 if tree.get("searches") else 1)
