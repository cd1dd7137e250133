"""Builds what a run is made of from its config: tokenizer, families, tools, demonstrations and the run folder."""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elpo_jax.config import Config, ConfigError, DatasetConfig, differences, to_json
from elpo_jax.model.hf_config import read_eos_ids, read_hf_config
from elpo_jax.policy.batch import Batch, demonstration_example, pack
from elpo_jax.report.log import read_json, write_json
from elpo_jax.rollout.agent import Environment
from elpo_jax.tasks.base import Family, Grade, Split
from elpo_jax.tasks.dataset import DatasetFamily
from elpo_jax.tasks.graders import Graders
from elpo_jax.tasks.ledger import Ledger
from elpo_jax.tasks.rows import Conversation, Row
from elpo_jax.tasks.store import graders_of, open_splits
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tasks.wordmath import WordMath
from elpo_jax.text.chat import Chat, ChatFormat
from elpo_jax.text.hub_tokenizer import HubTokenizer, load_tokenizer, train_bpe
from elpo_jax.text.template import TemplateError
from elpo_jax.text.template_chat import TemplateChat, load_chat
from elpo_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from elpo_jax.tools.calculator import Calculator
from elpo_jax.tools.interpreter import CodeInterpreter
from elpo_jax.tools.sandbox import Limits, Sandbox
from elpo_jax.tools.toolbox import ToolBox
from elpo_jax.trees.demonstrate import demonstrations
from elpo_jax.trees.trajectory import Trajectory
from elpo_jax.trees.transcripts import TranscriptError, system_of, transcript

# What a process can leave in a folder that it has not claimed, and what a run has in it before its first stage.
LEFTOVERS = {".lock", ".config-json-partial", "compile_cache"}
TOKENIZERS = {"sentencepiece": "tokenizer.model", "bpe": "tokenizer.json"}
# Templates that write a date would write today's, and a resumed run would go on with other prompts. This one is what
# Llama 3's own fall back to.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
TEMPLATE_OPTIONS = {"date_string": f"{TEMPLATE_DATE:%d %b %Y}"}
BEFORE_STAGES = LEFTOVERS | {"config.json", *TOKENIZERS.values()}


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
                for file in TOKENIZERS.values():
                    (workdir / file).unlink(missing_ok=True)
                recorded.unlink()
            raise


def _names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_weights_shape(config: Config) -> Config:
    """The config with the network that `model.source` holds, if it names one; how to compute stays as configured.

    A rope scaling of the config's own, such as YaRN for a longer context, stays too where the checkpoint has none.
    Folders become absolute, so that a run can be exported from anywhere.

    Raises:
      ValueError: If the folder holds no checkpoint, or one of a kind that is not supported, or has another scaling.
    """
    model, tokenizer = config.model, config.tokenizer
    if tokenizer.source:
        tokenizer = dataclasses.replace(tokenizer, source=str(pathlib.Path(tokenizer.source).resolve()))
    if model.source:
        held = read_hf_config(model.source)
        kept = {name: getattr(model, name) for name in ("dtype", "param_dtype", "remat", "scan_layers", "attention")}
        if held.rope_scaling.kind == "none":
            kept["rope_scaling"] = model.rope_scaling
        elif model.rope_scaling.kind != "none" and model.rope_scaling != held.rope_scaling:
            raise ConfigError(
                f"the weights in {model.source} have a rope scaling of kind {held.rope_scaling.kind}, which "
                f"model.rope_scaling.kind={model.rope_scaling.kind} cannot replace: leave it out"
            )
        model = dataclasses.replace(held, source=str(pathlib.Path(model.source).resolve()), **kept)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)


@contextlib.contextmanager
def open_tools(config: Config) -> Iterator[tuple[TaskStream, dict[str, ToolBox], Sandbox | None]]:
    """The task families, by family the tools that serve them, and the sandbox in which tools run programs, if any do.

    Worker processes end with the context.

    Raises:
      ConfigError: If a family is unknown.
      SandboxUnavailable: If a family needs a sandbox and none works here.
    """
    rollout, words, ledger = config.rollout, config.tasks.wordmath, config.tasks.ledger
    chosen = {name: config.tasks.of(name) for name in config.tasks.families}
    datasets = {
        name: open_splits(numbers.path, lone="test" if numbers.use == "test" else "train")
        for name, numbers in chosen.items()
        if isinstance(numbers, DatasetConfig)
    }
    families: dict[str, Family] = {}
    with contextlib.ExitStack() as stack:
        sandbox = interpreter = None
        if any(name == "wordmath" or _runs_programs(chosen[name], datasets.get(name, {})) for name in chosen):
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
        for name, numbers in chosen.items():
            if name == "wordmath":
                families[name] = WordMath(interpreter, seed=config.seed, slack=words.slack)
            elif name == "ledger":
                families[name] = Ledger(seed=config.seed, slack=ledger.slack, noise=ledger.noise)
            else:
                tool = Calculator() if numbers.tool == "calculator" else interpreter
                found = len(datasets[name].get("test", ()))
                if numbers.rows not in (0, found):
                    raise ConfigError(
                        f"{numbers.path} has {found} test rows and the protocol of {name} is about {numbers.rows}: "
                        "prepare that slice of the data set, or set rows=0 for another protocol"
                    )
                grade, checker = _grader(numbers, datasets[name], sandbox, stack)
                families[name] = DatasetFamily(
                    name,
                    datasets[name],
                    tool,
                    grade,
                    checker=checker,
                    max_calls=numbers.max_calls,
                    validation=numbers.validation,
                    use=numbers.use,
                    seed=config.seed,
                    plain=numbers.plain,
                )
        difficulties = {name: numbers.difficulties for name, numbers in chosen.items()}
        toolboxes = {
            name: stack.enter_context(ToolBox(family.tools, workers=rollout.interpreter_workers))
            for name, family in families.items()
        }
        yield TaskStream(families, difficulties, config.seed), toolboxes, sandbox


Splits = Mapping[Split, Sequence[Row | Conversation]]


def _graders_of(splits: Splits) -> set[str]:
    """The graders that the rows need."""
    return {kind for rows in splits.values() for kind in graders_of(rows)}


def _runs_programs(numbers, splits: Splits) -> bool:
    """Whether a data set's attempts or answers are programs."""
    return isinstance(numbers, DatasetConfig) and (
        numbers.tool == "code_interpreter" or "program" in _graders_of(splits)
    )


def _grader(numbers: DatasetConfig, splits: Splits, sandbox: Sandbox | None, stack: contextlib.ExitStack):
    """What grades a data set's final turns, and the same in words.

    Raises:
      ConfigError: If what its answers need is not installed.
    """
    strict = numbers.checker == "strict_box"
    kinds = sorted({"strict_box" if strict and kind == "math" else kind for kind in _graders_of(splits)})
    symbolic = numbers.checker == "default" and "math" in kinds
    try:
        graders = stack.enter_context(Graders(symbolic=symbolic, sandbox=sandbox, all_tests=numbers.partial_credit))
    except ImportError as error:
        raise ConfigError(f"data set {numbers.name}: {error}, here tasks.datasets.N.checker=exact") from None

    def grade(kind: str, text: str, reference: str, meta: Mapping) -> Grade:
        return graders.grade("strict_box" if strict and kind == "math" else kind, text, reference, meta)

    return grade, "; ".join(map(graders.checker, kinds))


def build_tokenizer(
    config: Config, workdir: pathlib.Path, stream: TaskStream, toolboxes: dict[str, ToolBox]
) -> Tokenizer:
    """The run's tokenizer; one that is trained learns from demonstrations once and is kept in the run folder."""
    kind, source = config.tokenizer.kind, config.tokenizer.source or config.model.source
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "checkpoint":
        tokenizer = _loaded(load_tokenizer, source)
    else:
        path = workdir / TOKENIZERS[kind]
        if not path.exists():
            # Demonstrations are written as bytes first: their text is what the pieces are learned from.
            chat = ChatFormat(ByteTokenizer(), tool_listing=config.tasks.chat_tools)
            count = {name: config.tokenizer.texts for name, n in config.demonstrations.items() if n}
            texts = [
                t
                for trajectory in _demonstrate(config, chat, stream, toolboxes, count)
                for t in _texts(chat, trajectory)
            ]
            train = train_sentencepiece if kind == "sentencepiece" else train_bpe
            train(texts, path, config.tokenizer.vocab_size)
        tokenizer = SentencePieceTokenizer(path) if kind == "sentencepiece" else HubTokenizer(path)
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
    if config.tokenizer.kind == "checkpoint":
        source = config.tokenizer.source or config.model.source
        chat: Chat = _loaded(lambda folder: _load_chat(config, folder, tokenizer), source)
        if not chat.append_only:
            print(f"note: {chat.why} Sampled tokens are kept as they are.", flush=True)
        if not chat.lists_tools:
            print(f"note: the chat template in {source} does not tell the model which tools there are", flush=True)
    else:
        chat = ChatFormat(tokenizer, tool_listing=config.tasks.chat_tools)
    rollout = config.rollout
    return Environment(
        stream.families, toolboxes, chat, rollout.max_turn_tokens, sandbox, config.reward, rollout.tool_visits
    )


def _load_chat(config: Config, folder: str, tokenizer: Tokenizer, system: str | None = None) -> TemplateChat:
    """The folder's chat format; the ids that end a turn are those of the weights, where they name any."""
    stops = read_eos_ids(config.model.source) if config.model.source else ()
    call_format = config.tokenizer.call_format
    return load_chat(
        folder,
        tokenizer,
        eos_ids=stops or None,
        system=system,
        call_format=None if call_format == "auto" else call_format,
        options=TEMPLATE_OPTIONS,
        now=lambda: TEMPLATE_DATE,
    )


def _loaded(load: Callable[[str], Any], folder: str) -> Any:
    """What a published folder holds; a missing file is the config's fault."""
    try:
        return load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer.kind=checkpoint: {error}") from error


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
        (task for split, n in held_out.items() for f in stream.names(split) for task in stream.first(f, split, n)),
    )
    for task in tasks:
        environment.check(task, config.sampler.context)


def demonstration_rows(config: Config, environment: Environment, stream: TaskStream) -> tuple[Batch, int, int]:
    """Packed demonstrations, numpy [N, T], and how many were left out: as failures, and as longer than the context.

    Where a world is noisy a demonstrator can run out of calls; a failure is nothing to imitate. Recorded conversations
    that no attempt can look like count as failures too.

    Raises:
      ConfigError: If none of a family, or of `sft.data`, is left.
    """
    kept, failed, long = [], 0, 0
    for family, count in config.demonstrations.items():
        if not count:
            continue
        played = list(_demonstrate(config, environment.chat, stream, environment.toolboxes, {family: count}))
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
        kept, failed, long = kept + fitting, failed + len(played) - len(solved), long + len(solved) - len(fitting)
    if config.sft.data:
        recorded, refused = _recorded(config, environment.chat)
        fitting = [t for t in recorded if len(t.ids()) <= config.sampler.context]
        if not fitting:
            raise ConfigError(
                f"sft.data={config.sft.data} has nothing to learn from: {len(refused)} conversations are no attempts"
                f"{f' (the first: {refused[0]})' if refused else ''}, and {len(recorded)} are longer than "
                f"sampler.context={config.sampler.context}"
            )
        if refused:
            print(
                f"{len(refused)} conversations of {config.sft.data} are no attempts; the first: {refused[0]}",
                flush=True,
            )
        kept, failed, long = kept + fitting, failed + len(refused), long + len(recorded) - len(fitting)
    if not kept:
        raise ConfigError("there is nothing to learn from: set sft.steps=0, sft.data or the demonstrations of a family")
    order = np.random.default_rng(config.seed).permutation(len(kept))
    return pack([demonstration_example(kept[i]) for i in order], config.sampler.context), failed, long


def _recorded(config: Config, chat: Chat) -> tuple[list[Trajectory], list[TranscriptError]]:
    """The conversations of `sft.data` as attempts, and why the others are none."""
    rows = open_splits(config.sft.data).get("train", ())
    if len(rows) and not isinstance(rows[0], Conversation):
        raise ConfigError(f"sft.data={config.sft.data} holds problems, not conversations: name it in tasks.datasets")
    chats: dict[str | None, Chat] = {None: chat}
    out, refused = [], []
    for row in rows:
        try:
            system = system_of(row)
            if system not in chats:
                if config.tokenizer.kind != "checkpoint":
                    raise TranscriptError("the project's own chat format has no system text")
                source = config.tokenizer.source or config.model.source
                chats[system] = _load_chat(config, source, chat.tokenizer, system)
            out.append(transcript(chats[system], row))
        except TranscriptError as error:
            refused.append(error)
        except TemplateError as error:  # it refuses the row's system text
            refused.append(TranscriptError(f"{row.id}: {error}"))
    return out, refused


def _demonstrate(
    config: Config, chat: Chat, stream: TaskStream, toolboxes: dict[str, ToolBox], count: Mapping[str, int]
) -> Iterator[Trajectory]:
    rate = config.sft.mistake_rate
    for family, n in count.items():
        indices = itertools.islice(stream.families[family].demonstrable("train"), n)
        tasks = [stream.family_task(family, "train", i) for i in indices]
        if not isinstance(config.tasks.of(family), DatasetConfig):
            tasks = [dataclasses.replace(task, max_steps=task.difficulty + config.sft.slack) for task in tasks]
        yield from demonstrations(stream.families, tasks, toolboxes[family], chat, seed=config.seed, mistake_rate=rate)


def _texts(chat: Chat, trajectory: Trajectory) -> Iterator[str]:
    """The text between control ids and segment borders: what is encoded as one, and what pieces should cover."""
    control = set(chat.tokenizer.control.values())
    for segment in trajectory.segments():
        for is_control, run in itertools.groupby(segment.ids.tolist(), control.__contains__):
            if not is_control:
                yield chat.tokenizer.decode(list(run))
