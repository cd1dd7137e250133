"""Where the seconds of one RL step go: prefill, decode, tools, credit, update, checkpoint, as numbers and as a picture.

The quickstart's experiment is cold-started for a little, so that its attempts do call tools, and takes two ELPO steps.
The first compiles; the second is recorded by wrapping what the loop calls. Decoding is waited for by another thread,
all other device work where it is called, so phases are what they take and the whole is a little slower than unrecorded.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from elpo_jax.overrides import override
from elpo_jax.policy.loss import make_loss
from elpo_jax.report.log import MetricsLog
from elpo_jax.rollout import agent
from elpo_jax.rollout.sampler import Sampler
from elpo_jax.train import rl
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.mesh import make_mesh
from elpo_jax.train.setup import build_environment, build_tokenizer, open_tools
from elpo_jax.train.state import init_state
from elpo_jax.train.step import make_optimizer, make_train_step
from experiments.measure import Settings
from experiments.quickstart import get_config
from experiments.run import cold_start

# Phase -> the line of the picture that it is drawn on.
PHASES = {
    "decode": "device",
    "prefill and fork": "device",
    "update": "device",
    "parse, wait for tools, grade": "host",
    "credit and packing": "host",
    "checkpoint": "host",
    "tool": "tools",
}
COLOURS = dict(zip(PHASES, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb"), strict=True))
SHORT = {
    False: ["sft.steps=150", "sft.optimizer.warmup_steps=10", "rl.steps=2", "rl.dump_every=0", "rl.save_every=1"],
    True: [
        "sft.steps=2",
        "sft.optimizer.warmup_steps=1",
        "sft.rows=4",
        "sft.micro_rows=4",
        "rl.steps=2",
        "rl.prompts=2",
        "rl.updates=1",
        "rl.dump_every=0",
        "rl.save_every=1",
        "algo.search.budget=4",
        "tasks.wordmath.demonstrations=32",
        "tasks.ledger.demonstrations=32",
        "tokenizer.texts=32",
    ],
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that was done, in seconds from the start of the recording."""

    phase: str
    start: float
    end: float


class Recorder:
    """Collects spans of wrapped functions."""

    def __init__(self):
        self.spans: list[Span] = []
        self._began = time.perf_counter()
        self._watcher = concurrent.futures.ThreadPoolExecutor(1)

    def restart(self) -> None:
        """Forgets what was recorded."""
        self._began = time.perf_counter()
        self.spans = []

    def finish(self) -> float:
        """Waits for what is still under way; returns the seconds since the recording began."""
        elapsed = time.perf_counter() - self._began
        self._watcher.shutdown()
        return elapsed

    def timed(self, phase: str, function: Callable, wait: bool = True) -> Callable:
        """`function`, recorded; its arrays are waited for."""

        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if wait:
                jax.block_until_ready(result)
            self._add(phase, began)
            return result

        return call

    def watched(self, phase: str, function: Callable) -> Callable:
        """A decode function, recorded until its tokens are there, while the host goes on."""

        def call(*args):
            began = time.perf_counter()
            state, out = function(*args)
            self._watcher.submit(lambda: (jax.block_until_ready(out), self._add(phase, began)))
            return state, out

        return call

    def answered(self, phase: str, submit: Callable) -> Callable:
        """A tool box's `submit`, recorded from the call to its answer."""

        def call(request):
            began = time.perf_counter()
            future = submit(request)
            future.add_done_callback(lambda _: self._add(phase, began))
            return future

        return call

    def _add(self, phase: str, began: float) -> None:
        self.spans.append(Span(phase, began - self._began, time.perf_counter() - self._began))


def bench_timeline(settings: Settings) -> Iterator[dict]:
    """Seconds by phase of one ELPO step of the quickstart, and a picture."""
    config = override(get_config(), [f"seed={settings.seed}", *SHORT[settings.quick]])
    with tempfile.TemporaryDirectory() as folder:
        spans, elapsed, row = record(config, pathlib.Path(folder))
    seconds: dict[str, float] = collections.defaultdict(float)
    for span in spans:
        seconds[span.phase] += span.end - span.start
    line = {
        "bench": "timeline",
        "case": f"{config.rl.prompts} prompts x {config.algo.search.budget} attempts, {config.rl.updates} updates",
        "value": round(elapsed, 2),
        "unit": "s",
        "phases_s": {phase: round(seconds[phase], 3) for phase in PHASES},
        "tool_calls": row["rollout/tool_calls"],
        "model_tokens": row["rollout/model_tokens"],
        "slot_use": round(row["rollout/slot_use"], 3),
    }
    if settings.out is not None:
        draw(spans, elapsed, line["case"], settings.out / "timeline.png")
        line["picture"] = "timeline.png"
    yield line


def record(config: Any, workdir: pathlib.Path) -> tuple[list[Span], float, dict]:
    """Spans, seconds and metrics of the second RL step of an experiment that begins in an empty folder."""
    recorder = Recorder()
    mesh = make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stream, toolboxes, sandbox = stack.enter_context(open_tools(config))
        tokenizer = build_tokenizer(config, workdir, stream, toolboxes)
        environment = build_environment(config, tokenizer, stream, toolboxes, sandbox)
        sampler = Sampler(config.model, config.sampler, environment.chat.stop_ids, config.seed, mesh)
        meta = {"config": {}, "tokenizer": tokenizer.fingerprint, "chat": environment.chat.fingerprint}
        begun = cold_start(
            config, workdir, mesh, make_optimizer(config.sft.optimizer, config.sft.steps), environment, stream, meta
        )
        optimizer = make_optimizer(config.rl.optimizer, config.rl.steps * config.rl.updates * config.rl.epochs)
        state = init_state(config.model, optimizer, jax.random.key(config.seed), mesh, begun.params)
        sampler.load(state.params, version=0)
        sampler.compile()  # a run compiles a shape when it first needs it, which may be in any of its steps
        for name in ("_prefill", "_prefill_trunks", "_fork", "_rewind"):
            setattr(sampler, name, recorder.timed("prefill and fork", getattr(sampler, name)))
        sampler._decode = recorder.watched("decode", sampler._decode)
        for box in toolboxes.values():
            box.submit = recorder.answered("tool", box.submit)
        patches = [(agent, "_answer", "parse, wait for tools, grade")]
        patches += [(rl, name, "credit and packing") for name in ("assign", "policy_examples", "normalise", "pack")]
        for module, name, phase in patches:
            timed = recorder.timed(phase, getattr(module, name), wait=False)
            stack.enter_context(mock.patch.object(module, name, timed))
        checkpoints = Checkpoints(workdir / "elpo" / "checkpoints")
        checkpoints.save = recorder.timed("checkpoint", checkpoints.save, wait=False)
        load, loads = sampler.load, iter(range(2))

        def second_load(*args, **kwargs):
            if next(loads) == 1:
                recorder.restart()
            load(*args, **kwargs)

        sampler.load = second_load
        learner = rl.Learner(
            environment=environment,
            sampler=sampler,
            stream=stream,
            first_task=config.first_rl_task,
            seed=config.seed,
            temperature=config.rollout.temperature,
            step_fn=recorder.timed("update", make_train_step(make_loss(config.model), optimizer, mesh)),
            reference_logp=None,
            validate=lambda step: {},
        )
        rows: list[dict] = []
        log = MetricsLog(workdir / "elpo" / "metrics.jsonl", {})
        log.write = rows.append
        rl.train_rl(
            config.rl,
            config.algo,
            learner,
            state,
            start=0,
            meta=meta,
            checkpoints=checkpoints,
            log=log,
            dumps=workdir / "elpo" / "rollouts",
        )
        elapsed = recorder.finish()
    return recorder.spans, elapsed, rows[-1]


def draw(spans: list[Span], elapsed: float, title: str, path: pathlib.Path) -> None:
    """The spans as bars on three lines: what the device did, what the host did, and the calls of tools."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {line: i for i, line in enumerate(("tools", "host", "device"))}
    figure, axes = pyplot.subplots(figsize=(11, 3.2), layout="constrained")
    for phase, line in PHASES.items():
        mine = [(span.start, span.end - span.start) for span in spans if span.phase == phase]
        total = sum(length for _, length in mine)
        axes.broken_barh(
            mine,
            (lines[line] - 0.4, 0.8),
            facecolors=COLOURS[phase],
            alpha=0.4 if phase == "tool" else 1.0,
            label=f"{phase}: {total:.2f} s" + (f" in {len(mine)} calls" if phase == "tool" else ""),
        )
    axes.set_yticks(list(lines.values()), list(lines))
    axes.set_xlim(0, elapsed)
    axes.set_xlabel("seconds")
    axes.set_title(f"One ELPO step: {title}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
