"""Builds the folder of a run as the loops write it, with made-up but plausible content, for the tests of the report.

Attempts are drawn from a toy world in which a fatal step loses the task for good, so the trees have the structure of
real ones: roots, a binary search in a failed one, probes, and an oracle of one family; credit and JSON are the
package's own. Run as a script it writes a folder to look at: `PYTHONPATH=. python tests/report_fixture.py FOLDER`.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np

from elpo_jax.policy.credit import assign
from elpo_jax.policy.recipes import elpo, grpo
from elpo_jax.tasks.base import Task
from elpo_jax.tools.base import Status, ToolCall, ToolResult
from elpo_jax.trees.serial import tree_to_json
from elpo_jax.trees.trajectory import Author, Finish, Segment, Step, Trajectory
from elpo_jax.trees.tree import Leaf, Probe, RolloutTree, SearchRecord

FAMILIES = ("ledger", "wordmath")
TOOLS = {"ledger": ("balance", "transfer", "spend", "close_account"), "wordmath": ("code_interpreter",)}
CALLS = 5  # that an attempt may make

HOSTILE = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "'\"><svg onload=window.hit=1>",
    "{{script}} \\u003c/script>",
    "line\u2028separator\u2029end",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eright to left\u202c \u05d0\u200f",
    "null \x00 and half \ud83d of a pair",
    "javascript:window.hit=1",
)


def build_run(
    folder: Path, *, seed: int = 0, dumps: tuple[int, ...] = (1, 20, 40), tasks: int = 8, budget: int = 8
) -> Path:
    """Writes a finished run: sft, grpo and elpo with metrics, dumps of `tasks` trees, evaluations and results."""
    rng = np.random.default_rng(seed)
    write(folder / "config.json", CONFIG)
    final = {"sft": (0.41, 0.48), "grpo": (0.62, 0.66), "elpo": (0.79, 0.74)}
    evaluations = {name: evaluation(name, accuracies, rng) for name, accuracies in final.items()}
    for name, value in evaluations.items():
        write(folder / "eval" / f"{name}.json", value)
    write(folder / "results.json", results(evaluations))
    write_rows(folder / "sft" / "metrics.jsonl", sft_rows(rng))
    for stage, gain in (("grpo", 0.22), ("elpo", 0.34)):
        write_rows(folder / stage / "metrics.jsonl", rl_rows(stage, gain, rng))
        for dump in dumps:
            skills = [0.3 + dump / 100] * (tasks - 2) + [0.0, 1.0]  # the last but one always fails, the last never
            trees = [tree(stage, dump, FAMILIES[i % 2], i, rng, skill, budget) for i, skill in enumerate(skills)]
            write_rows(folder / stage / "rollouts" / f"step_{dump:06d}.jsonl", trees)
    return folder


def build_hostile_run(folder: Path) -> Path:
    """A run in which every string that a model, a tool or a task wrote is hostile."""
    build_run(folder, dumps=(1,), tasks=2)
    for path in folder.glob("*/rollouts/*.jsonl"):
        write_rows(path, [poison(json.loads(line)) for line in path.read_text().splitlines()])
    write(folder / "config.json", CONFIG | {"name": HOSTILE[0], HOSTILE[1]: HOSTILE[5]})
    return folder


def poison(tree: dict) -> dict:
    everything = " ".join(HOSTILE)
    tree["task"] |= {"id": everything, "family": HOSTILE[1], "prompt": everything, "answer": everything}
    tree["prompt"]["text"] = everything
    for leaf in tree["leaves"]:
        leaf |= {"reason": everything, "answer": everything}
        for step in leaf["steps"]:
            step["text"] = everything
            step["tokens"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(step["tokens"]))]
            if step["call"]:
                step["call"] = {"name": HOSTILE[1], "arguments": {HOSTILE[0]: everything, "x": {HOSTILE[4]: 1}}}
            if step["result"]:
                step["result"] |= {"text": everything, "detail": HOSTILE[5]}
    return tree


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CONFIG = {
    "name": "quickstart",
    "seed": 17,
    "tasks": {
        "families": list(FAMILIES),
        "wordmath": {"difficulties": [2, 3], "slack": 2},
        "ledger": {"difficulties": [2, 3, 4], "slack": 2, "noise": 0.0},
    },
    "model": {"vocab_size": 512, "d_model": 96, "layers": 3, "dtype": "float32"},
    "rollout": {"temperature": 1.0, "max_turn_tokens": 64},
    "sft": {"mistake_rate": 0.25, "steps": 300, "optimizer": {"lr": 0.003}},
    "algo": {"name": "elpo", "search": {"budget": 16, "localizer": "binary"}, "lambda_tree": 0.5, "eps_elc": 0.115},
    "against": [{"name": "grpo", "search": {"budget": 16, "localizer": "none"}, "lambda_tree": 0.0, "eps_elc": 0.0}],
    "rl": {"steps": 40, "prompts": 16, "updates": 4, "eval_tasks": 32, "eval_k": 4},
    "eval": {"tasks": 200, "k": 8, "temperature": 1.0},
}
PROTOCOL = {
    "split": "test",
    "families": {"wordmath": "200 tasks", "ledger": "200 tasks"},
    "k": 8,
    "temperature": 1.0,
    "seed": 17,
    "checkers": {"wordmath": "exact number", "ledger": "goal against the final database"},
    "majority_ties": "first answer given",
    "interval": "95 % percentile bootstrap over tasks",
}
LINE = "test split, 200 tasks per family, k=8, temperature 1, seed 17; 95 % percentile bootstrap over tasks"
VALIDATION = "validation split, 50 tasks per family, k=8, temperature 1, seed 17"

PROVENANCE = {"commit": "3f9c2d1", "python": "3.11.9", "jax": "0.10.2", "backend": "cpu", "devices": 2} | {
    "device_kind": "cpu",
    "cores": 2,
    "processor": "a laptop",
    "config": "quickstart",
    "seed": 17,
}


def evaluation(name: str, accuracies: tuple[float, float], rng: np.random.Generator) -> dict:
    families = {}
    for family, x in zip(FAMILIES, accuracies, strict=True):
        levels = {}
        for level in (2, 3, 4, 5):
            y = float(np.clip(x + 0.12 * (3 - level) + rng.normal(0, 0.02), 0.02, 0.98))
            levels[str(level)] = {"avg@8": y, "ci": [max(0.0, y - 0.06), min(1.0, y + 0.06)], "n": 50}
        families[family] = {
            "avg@8": x,
            "ci": [x - 0.035, x + 0.034],
            "n": 200,
            "pass@8": {"value": min(1.0, x + 0.21), "ci": [x + 0.17, min(1.0, x + 0.25)]},
            "maj@8": {"value": x + 0.06, "ci": [x + 0.01, x + 0.11]},
            "by_difficulty": levels,
            "tool_calls": 2.9 + rng.random(),
            "tokens": 118 + 20 * rng.random(),
            "status": {"ok": 4100, "error": 310, "malformed": 44, "empty": 12},
            "finish": {"answer": 1531, "max_steps": 60, "length": 9},
            "per_task": per_task(x, rng),
        }
    smaller = {
        family: figures | {"n": 50, "per_task": figures["per_task"][:50]} for family, figures in families.items()
    }
    validation = {"protocol": PROTOCOL | {"split": "validation"}, "protocol_line": VALIDATION, "families": smaller}
    protocol = {"protocol": PROTOCOL, "protocol_line": LINE}
    return {"name": name, **protocol, "seconds": 16.2, "families": families, "validation": validation}


def per_task(mean: float, rng: np.random.Generator) -> list[float]:
    """Shares of 8 attempts at each of 200 tasks with this mean."""
    successes = np.zeros(1600)
    successes[: round(1600 * mean)] = 1
    return rng.permutation(successes).reshape(200, 8).mean(axis=1).tolist()


def lost(attempts: int) -> dict:
    """What faults of ours cost an algorithm."""
    programs = {"sandbox_errors": attempts, "sandbox_retries": 4 * attempts, "paused_s": 13.5 * attempts}
    return {"lost_attempts": attempts, **programs}


def results(evaluations: dict[str, dict]) -> dict:
    families = {
        family: {
            name: {key: value["families"][family][key] for key in ("avg@8", "ci", "n")}
            for name, value in evaluations.items()
        }
        for family in FAMILIES
    }
    return {
        "protocol": {**PROTOCOL, "line": LINE},
        "families": families,
        "budget": {
            "grpo": {"rollouts": 10240, "model_tokens": 1238771, "tool_calls": 30412} | lost(0),
            "elpo": {"rollouts": 10240, "model_tokens": 912034, "tool_calls": 22871} | lost(3),
        },
        "seconds": {"sft": 61.2, "grpo": 171.0, "elpo": 166.4, "eval": 48.8, "total": 447.4},
        "provenance": PROVENANCE,
    }


def sft_rows(rng: np.random.Generator, steps: int = 300) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        loss = 0.12 + 5.5 * float(np.exp(-step / 40)) + rng.normal(0, 0.03)
        row = {"step": step, "loss": loss, "lr": 1e-3 * min(1, step / 20), "grad_norm": 0.4 + rng.random() / 4}
        rows.append({**row, "tokens": 4096, "tokens_per_s": 21000 + 900 * rng.random()})
        if step % 100 == 0:
            rows.append({"step": step, **validation(0.1 + step / 900)})
    return rows


def validation(x: float) -> dict:
    out = {}
    for family, shift in zip(FAMILIES, (0.0, 0.05), strict=True):
        out |= {f"eval/{family}/avg@4": x + shift, f"eval/{family}/ci_low": x + shift - 0.05}
        out |= {f"eval/{family}/ci_high": x + shift + 0.05}
    return out


def rl_rows(stage: str, gain: float, rng: np.random.Generator, steps: int = 40) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        progress = gain * (1 - float(np.exp(-step / 15)))
        noise = rng.normal(0, 0.03, 3)
        row = {
            "step": step,
            "rollout/success": 0.38 + progress + noise[0],
            "rollout/root_success": 0.42 + progress + noise[0],
            "rollout/root_success/ledger": 0.40 + progress + noise[1],
            "rollout/root_success/wordmath": 0.45 + progress + noise[2],
            "rollout/model_tokens": int(22000 + 3000 * rng.random()),
            "rollout/tool_calls": int(570 + 40 * rng.random()),
            "status/ok": 0.9,
            "status/error": 0.08,
            "tree/mixed": 0.5 + noise[0],
            "loss": noise[1] / 10,
            "loss/clip_low": 0.01 + abs(noise[2]) / 4,
            "loss/clip_high": 0.008 + abs(noise[1]) / 4,
            "loss/relaxed_only": 0.004 + abs(noise[0]) / 9 if stage == "elpo" else 0.0,
            "rollout/entropy": 0.31 - 0.2 * progress + noise[0] / 9,
            "loss/entropy": 0.42 - 0.2 * progress + noise[0] / 9,
            "loss/first_mismatch_mean": 2e-6 * rng.random(),
            "loss/first_mismatch_max": 3e-5 * rng.random(),
            "loss/mismatch_mean": 0.01 + 0.004 * rng.random(),
            "loss/mismatch_max": 1.5 + 2 * rng.random(),
            "loss/first_ratio_deviation_max": 4e-6 * rng.random(),
            "grad_norm": 0.3 + rng.random() / 5,
            "seconds/collect": 2.9 + rng.random(),
            "seconds/update": 0.9 + rng.random() / 4,
        }
        rows.append(row)
        if step % 10 == 0:
            rows.append({"step": step, **validation(0.42 + progress)})
    return rows


# --- trees -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToyState:
    """Good calls that are still to be made, and whether a step lost the task for good."""

    left: int
    lost: bool

    def fork(self, key: int) -> "ToyState":
        return self


class ToyFamily:
    """As much of a family as a dump asks for: the exact oracle of the toy world, where there is one."""

    def __init__(self, has_oracle: bool):
        self._has_oracle = has_oracle

    def first_irrecoverable(self, task: Task, states: list[ToyState]) -> int | None:
        if not self._has_oracle:
            return None
        if not (states[-1].left or states[-1].lost):
            return 0
        lost = [state.lost or state.left > task.max_steps - step for step, state in enumerate(states, 1)]
        return lost.index(True) + 1


TOYS = {"ledger": ToyFamily(True), "wordmath": ToyFamily(False)}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A step, whether its call was a (repairable) fault, and whether it lost the task for good."""

    step: Step
    fault: bool
    fatal: bool


@dataclasses.dataclass(frozen=True)
class World:
    """A toy task: `calls` good tool calls and an answer; each call is fatal with some probability."""

    family: str
    number: int
    calls: int
    skill: float
    budget: int
    prompt: Segment


class Words:
    """A tokenizer of sorts: every piece of text that was seen has an id."""

    def __init__(self):
        self.pieces: list[str] = []
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> np.ndarray:
        pieces = re.findall(r"<[^<>\s]+>|\s?\w{1,5}|\s|[^\w\s]", text)
        assert "".join(pieces) == text, (pieces, text)
        for piece in pieces:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return np.array([self.ids[piece] for piece in pieces], np.int32)

    def decode(self, token: int) -> str:
        return self.pieces[token]


WORDS = Words()


def tree(
    stage: str, rl_step: int, family: str, number: int, rng: np.random.Generator, skill: float, budget: int = 8
) -> dict:
    """One tree of `budget` rollouts as its JSON line."""
    uid = rl_step * 100 + number
    prompt = f"Solve problem {number} in at most {CALLS} calls. A crate holds 12 boxes; every third one is empty."
    chat = f"<|im_start|>system\nTools: {', '.join(TOOLS[family])}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
    segment = Segment(Author.ENVIRONMENT, WORDS.encode(chat + "<|im_start|>assistant\n"))
    world = World(family, number, int(rng.integers(2, 5)), skill, budget, segment)
    task = Task(
        id=f"{family}/train/{uid:05d}",
        uid=uid,
        family=family,
        prompt=prompt,
        answer=str(number * 7),
        max_steps=CALLS,
        difficulty=world.calls,
        meta={},
    )
    leaves, paths, searches = [], [], []
    roots = budget if stage == "grpo" else 3
    while len(leaves) < budget:
        new = range(len(leaves), min(budget, len(leaves) + roots))
        for _ in new:
            attempt(world, None, 0, leaves, paths, rng)
        failed = [i for i in new if not leaves[i].trajectory.success]
        if failed and len(leaves) < budget:
            searches.append(search(world, failed[0], leaves, paths, rng))
    grown = RolloutTree(task, tuple(leaves), tuple(searches))
    recipe = {"grpo": grpo, "elpo": elpo}[stage]()
    line = tree_to_json(grown, decode_token=WORDS.decode, credit=assign(grown, recipe), family=TOYS[family])
    return {**line, "rl_step": rl_step, "recipe": stage}


def search(world: World, index: int, leaves: list, paths: list, rng: np.random.Generator) -> SearchRecord:
    """The inclusive binary search for the first irrecoverable step of an attempt; adds its probes to the leaves."""
    low, high, probes = 1, len(paths[index]) - 1, []
    while low <= high and len(leaves) < world.budget:
        middle = (low + high) // 2
        planned = int(rng.integers(1, 4))
        new = range(len(leaves), min(world.budget, len(leaves) + planned))
        for _ in new:
            attempt(world, index, middle, leaves, paths, rng)
        probes.append(Probe(middle, tuple(new), planned))
        low, high = (middle + 1, high) if any(leaves[i].trajectory.success for i in new) else (low, middle - 1)
    return SearchRecord(index, "binary", low, low > high, tuple(probes))


def attempt(world: World, parent: int | None, anchor: int, leaves: list, paths: list, rng: np.random.Generator) -> None:
    """Adds an attempt that shares `anchor` steps with its parent; after a fatal step it fails."""
    path: list[Turn] = [] if parent is None else list(paths[parent][:anchor])
    lost = any(turn.fatal for turn in path)
    while sum(not turn.fault for turn in path) < world.calls and len(path) < CALLS:
        fault = rng.random() < 0.14
        fatal = not fault and not lost and rng.random() > world.skill ** (1 / world.calls)
        lost = lost or fatal
        left = world.calls - sum(not turn.fault for turn in path) - (not fault)
        path.append(Turn(tool_step(world, len(path), fault, ToyState(left, lost), rng), fault, fatal))
    out = sum(not turn.fault for turn in path) < world.calls
    answer = "" if out else str(world.number * 7 + (3 if lost else 0))
    # The agent loop keeps a call that it does not answer as a turn without call and result.
    text = (
        tool_step(world, len(path), False, None, rng).text if out else f"The answer is \\boxed{{{answer}}}.<|im_end|>"
    )
    path.append(Turn(Step(model(text, rng), text=text), False, False))
    success = not lost and not out
    trajectory = Trajectory(
        prompt=world.prompt,
        steps=tuple(turn.step for turn in path),
        finish=Finish.MAX_STEPS if out else Finish.ANSWER,
        success=success,
        reward=float(success),
        reason="correct" if success else "out of tool calls; no answer" if out else "wrong answer",
        answer=answer,
    )
    paths.append(path)
    leaves.append(Leaf(trajectory, parent, anchor))


def tool_step(world: World, position: int, fault: bool, state: ToyState | None, rng: np.random.Generator) -> Step:
    """One assistant turn with its tool call; about one fault in three cannot even be parsed."""
    name = str(rng.choice(TOOLS[world.family]))
    amount = int(rng.integers(3, 60))
    if name == "code_interpreter":
        code = f"price = {amount}\nboxes = {position + 2}\n" + ("print(price / 0)" if fault else "print(price * boxes)")
        arguments = {"code": code}
    else:
        arguments = {"account": f"A{position + 1}", "amount": amount, "dry_run": False}
    text = f"{'I try again. ' if position and fault else ''}Step {position + 1}: I ask the tool for the next amount.\n"
    text += f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"
    call, result = ToolCall(name, arguments), ToolResult(Status.OK, f"{amount * 3}.00")
    if fault and rng.random() < 0.35:
        call, result = None, ToolResult(Status.MALFORMED, "Error: the call is not valid JSON.", "json")
        text = text.replace("}}</tool_call>", "}</tool_call>")
    elif fault:
        status = Status(rng.choice(["error", "timeout", "empty", "unknown_tool", "memory", "output_limit", "crash"]))
        result = ToolResult(status, f"Error: {status.value} in {name}", "ZeroDivisionError")
    response = Segment(Author.ENVIRONMENT, WORDS.encode(f"<tool_response>{result.text}</tool_response>"))
    return Step(model(text, rng), call, result, response, state, text)


def model(text: str, rng: np.random.Generator) -> Segment:
    """The text as model tokens with made-up log-probabilities and entropies."""
    ids = WORDS.encode(text)
    entropies = rng.gamma(0.5, 0.5, len(ids)).astype(np.float32)
    logprobs = -(rng.gamma(0.4, 0.8, len(ids)) * entropies).astype(np.float32)
    return Segment(Author.MODEL, ids, logprobs, entropies)


if __name__ == "__main__":
    build_run(Path(sys.argv[1]), tasks=16, budget=16)
