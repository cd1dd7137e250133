"""Builds what a run is made of from its config: tokenizer, families, tools, demonstrations and the run folder."""

import contextlib
import dataclasses
import fcntl
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from elpo_jax.config import Config, ConfigError, differences, to_json
from elpo_jax.policy.batch import Batch, demonstration_example, pack
from elpo_jax.report.log import read_json, write_json
from elpo_jax.rollout.agent import Environment
from elpo_jax.tasks.base import Family
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tasks.wordmath import WordMath
from elpo_jax.text.chat import ChatFormat
from elpo_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.toolbox import ToolBox
from elpo_jax.trees.demonstrate import demonstrations
from elpo_jax.trees.trajectory import Trajectory

# What a process can leave in a folder that it has not claimed, and what a run has in it before its first stage.
LEFTOVERS = {".lock", ".config-json-partial", "compile_cache"}
BEFORE_STAGES = LEFTOVERS | {"config.json", "tokenizer.model"}


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: Config, resume: bool) -> Iterator[None]:
    """Claims a run folder: writes config.json, or checks that the run in it is this one.

    A new run that fails before its first stage, as one with a bad config does, gives the folder back.

    Raises:
      ConfigError: If the folder holds another run, holds this one and `resume` was not asked for, holds none and it
        was, is in use, or cannot be written. Nothing in it is touched then.
    """
    recorded = workdir / "config.json"
    wanted = to_json(config)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file: give --workdir a folder")
    if recorded.exists():
        held = None
        with contextlib.suppress(ValueError):
            held = read_json(recorded)
        if not isinstance(held, dict):
            raise ConfigError(f"{recorded} is damaged: restore it, or start in another --workdir")
        changed = differences(held, wanted)
        if changed:
            raise ConfigError(
                f"{workdir} holds a run of another config ({'; '.join(changed[:4])}"
                f"{' ...' if len(changed) > 4 else ''}): choose another --workdir, or the config of that run"
            )
        if not resume:
            raise ConfigError(
                f"{workdir} already holds this run: add --resume to continue it, or choose another folder"
            )
    elif workdir.exists() and not _names(workdir) <= LEFTOVERS:
        raise ConfigError(f"{workdir} is not empty and holds no run: choose an empty or new --workdir")
    elif resume:
        raise ConfigError(f"{workdir} holds no run to resume: leave out --resume to start one, or correct --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {workdir} ({error.strerror}): choose another --workdir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is running in {workdir}: wait for it, or choose another folder"
            ) from None
        new = not recorded.exists()
        if new:
            write_json(recorded, wanted)
        try:
            yield
        except Exception:
            if new and _names(workdir) <= BEFORE_STAGES:
                (workdir / "tokenizer.model").unlink(missing_ok=True)
                recorded.unlink()
            raise


def _names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def open_tools(config: Config) -> Iterator[tuple[TaskStream, dict[str, ToolBox], Sandbox | None]]:
    """The task families, by family the tools that serve them, and the sandbox in which tools run programs, if any do.

    Worker processes end with the context.

    Raises:
      ConfigError: If a family is unknown.
      SandboxUnavailable: If a family needs a sandbox and none works here.
    """
    rollout, words, ledger = config.rollout, config.tasks.wordmath, config.tasks.ledger
    sandbox = None
    families: dict[str, Family] = {}
    with contextlib.ExitStack() as stack:
        for name in config.tasks.families:
            if name == "wordmath":
                limits = Limits(cpu_s=rollout.interpreter_seconds, memory_mb=rollout.interpreter_memory_mb)
                sandbox = stack.enter_context(
                    Sandbox(
                        rollout.interpreter_workers,
                        limits,
                        backend=rollout.sandbox,
                        packages=rollout.interpreter_packages,
                    )
                )
                interpreter = CodeInterpreter(
                    sandbox, traceback=rollout.interpreter_traceback, reference=rollout.interpreter_reference
                )
                families[name] = WordMath(interpreter, seed=config.seed, slack=words.slack)
            elif name == "ledger":
                families[name] = Ledger(seed=config.seed, slack=ledger.slack, noise=ledger.noise)
            else:
                raise ConfigError(f"unknown family {name!r} in tasks.families: there are wordmath, ledger")
        difficulties = {name: getattr(config.tasks, name).difficulties for name in families}
        toolboxes = {
            name: stack.enter_context(ToolBox(family.tools, workers=rollout.interpreter_workers))
            for name, family in families.items()
        }
        yield TaskStream(families, difficulties, config.seed), toolboxes, sandbox


def build_tokenizer(
    config: Config, workdir: pathlib.Path, stream: TaskStream, toolboxes: dict[str, ToolBox]
) -> Tokenizer:
    """The run's tokenizer; a sentencepiece model is trained on demonstrations once and kept in the run folder."""
    if config.tokenizer.kind == "byte":
        tokenizer = ByteTokenizer()
    else:
        path = workdir / "tokenizer.model"
        if not path.exists():
            # Demonstrations are written as bytes first: their text is what the pieces are learned from.
            chat = ChatFormat(ByteTokenizer(), tool_listing=config.tasks.chat_tools)
            count = dict.fromkeys(config.tasks.families, config.tokenizer.texts)
            texts = [
                t
                for trajectory in _demonstrate(config, chat, stream, toolboxes, count)
                for t in _texts(chat, trajectory)
            ]
            train_sentencepiece(texts, path, config.tokenizer.vocab_size)
        tokenizer = SentencePieceTokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size={config.model.vocab_size}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


def build_environment(
    config: Config,
    tokenizer: Tokenizer,
    stream: TaskStream,
    toolboxes: dict[str, ToolBox],
    sandbox: Sandbox | None,
) -> Environment:
    """What attempts meet outside the policy. The interpreter's answers are limited in tokens from here on."""
    for tool in (tool for family in stream.families.values() for tool in family.tools):
        if isinstance(tool, CodeInterpreter):
            tool.limit_tokens(tokenizer, config.rollout.interpreter_tokens)
    chat = ChatFormat(tokenizer, tool_listing=config.tasks.chat_tools)
    return Environment(stream.families, toolboxes, chat, config.rollout.max_turn_tokens, sandbox)


def check_prompts(config: Config, environment: Environment, stream: TaskStream) -> None:
    """Raises ValueError if a prompt that the run will meet leaves no room for a turn.

    All of them are made for this, at less than half a millisecond each: found when it is drawn, such a prompt would end
    the run in its middle.
    """
    first = config.first_rl_task
    during_rl = config.rl.eval_tasks if config.rl.eval_every else 0
    held_out = {"validation": max(during_rl, config.eval.validation_tasks), "test": config.eval.tasks}
    tasks = itertools.chain(
        (stream.task("train", n) for n in range(first, first + config.rl.steps * config.rl.prompts)),
        (stream.family_task(f, split, i) for split, n in held_out.items() for f in stream.families for i in range(n)),
    )
    for task in tasks:
        environment.check(task, config.sampler.context)


def demonstration_rows(config: Config, environment: Environment, stream: TaskStream) -> tuple[Batch, int, int]:
    """Packed demonstrations, numpy [N, T], and how many were left out: as failures, and as longer than the context.

    Where a world is noisy a demonstrator can run out of calls; a failure is nothing to imitate.

    Raises:
      ConfigError: If none of a family is left.
    """
    kept, failed, long = [], 0, 0
    for family, count in config.demonstrations.items():
        played = _demonstrate(config, environment.chat, stream, environment.toolboxes, {family: count})
        solved = [t for t in played if t.success]
        fitting = [t for t in solved if len(t.ids()) <= config.sampler.context]
        if not fitting:
            why = (
                f"the shortest has {min(len(t.ids()) for t in solved)} tokens, more than "
                f"sampler.context={config.sampler.context}: raise it or choose lower difficulties"
                if solved
                else f"all {count} failed: lower tasks.ledger.noise or raise sft.slack"
            )
            raise ConfigError(f"there is no demonstration of {family} to learn from, for {why}")
        kept, failed, long = kept + fitting, failed + count - len(solved), long + len(solved) - len(fitting)
    order = np.random.default_rng(config.seed).permutation(len(kept))
    return pack([demonstration_example(kept[i]) for i in order], config.sampler.context), failed, long


def _demonstrate(
    config: Config, chat: ChatFormat, stream: TaskStream, toolboxes: dict[str, ToolBox], count: Mapping[str, int]
) -> Iterator[Trajectory]:
    rate = config.sft.mistake_rate
    for family, n in count.items():
        tasks = (stream.family_task(family, "train", i) for i in range(n))
        tasks = [dataclasses.replace(task, max_steps=task.difficulty + config.sft.slack) for task in tasks]
        yield from demonstrations(stream.families, tasks, toolboxes[family], chat, seed=config.seed, mistake_rate=rate)


def _texts(chat: ChatFormat, trajectory: Trajectory) -> Iterator[str]:
    """The text between control ids and segment borders: what is encoded as one, and what pieces should cover."""
    control = set(chat.tokenizer.control.values())
    for segment in trajectory.segments():
        for is_control, run in itertools.groupby(segment.ids.tolist(), control.__contains__):
            if not is_control:
                yield chat.tokenizer.decode(list(run))
