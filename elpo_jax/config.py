"""The configuration of a run: frozen dataclasses, one per part, and what their values must fulfil.

An experiment is a Python file with `get_config()`; a fork is `dataclasses.replace`, or an override (`overrides.py`).
"""

import dataclasses
import json
import math
import operator
import textwrap
import types
import typing
from typing import Any, Literal

from elpo_jax.model.config import ModelConfig
from elpo_jax.policy.recipes import Recipe, elpo, grpo
from elpo_jax.rollout.sampler import SamplerConfig
from elpo_jax.tasks.rewards import Reward
from elpo_jax.tools.observation import LEAST_LIMIT
from elpo_jax.train.mesh import MeshConfig
from elpo_jax.train.step import OptimizerConfig


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class WordMathConfig:
    """Word problems.

    Attributes:
      difficulties: Steps that a flawless attempt needs, 2 to 10; drawn uniformly.
      slack: Tool calls an attempt may make beyond its difficulty.
      demonstrations: Transcripts for the cold start; 0 for none.
    """

    difficulties: tuple[int, ...] = (2,)
    slack: int = 0
    demonstrations: int = 8000

    def line(self) -> str:
        """The tasks in words, for a protocol."""
        return f"{', '.join(map(str, self.difficulties))} steps and {self.slack} calls of slack"


@dataclasses.dataclass(frozen=True)
class LedgerConfig:
    """Bills and accounts in a stateful world.

    Attributes:
      difficulties: Steps that a flawless attempt needs, 2 to 10; drawn uniformly.
      slack: Tool calls an attempt may make beyond its difficulty.
      noise: Probability that a tool fails for no reason (the stochastic setting).
      demonstrations: Transcripts for the cold start; 0 for none.
    """

    difficulties: tuple[int, ...] = (2, 3, 4)
    slack: int = 0
    noise: float = 0.0
    demonstrations: int = 12000

    def line(self) -> str:
        """The tasks in words, for a protocol."""
        steps = ", ".join(map(str, self.difficulties))
        return f"{steps} steps and {self.slack} calls of slack, noise {self.noise:g}"


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A data set, as a family of tasks.

    Attributes:
      name: Of the family.
      path: What `python -m elpo_jax.tasks.prepare` made, or a jsonl file of one's own in the layout that it documents.
      use: "train": prompts for training; "test": held-out tasks only; "both".
      tool: Which tool attempts can call.
      max_calls: Calls that an attempt may make; a malformed one counts.
      checker: "default": what the data set's answers need (math, letter or program); "exact": the same, but answers
        that only symbolic algebra could tell equal count as wrong; "strict_box": the reference recipe's comparison.
      partial_credit: Run all tests of a program and reward the fraction that it passes; success needs all of them
        either way.
      plain: Prompts without instructions, for policies that learn what to do from demonstrations.
      validation: Share of the training rows that is held out, where the data set has no validation split.
      demonstrations: Transcripts for the cold start, of rows whose solutions have calculator marks; 0 for none.
      rows: How many test rows the protocol is about: a folder with another number is refused; 0 for any.
      k: Attempts at each test row in the evaluation of a stage; 0 for eval.k.
    """

    name: str
    path: str
    use: Literal["train", "test", "both"] = "both"
    tool: Literal["calculator", "code_interpreter"] = "code_interpreter"
    max_calls: int = 16
    checker: Literal["default", "exact", "strict_box"] = "default"
    partial_credit: bool = False
    plain: bool = False
    validation: float = 0.05
    demonstrations: int = 0
    rows: int = 0
    k: int = 0

    @property
    def difficulties(self) -> tuple[int, ...]:
        """None that anyone knows; the stream wants a number to hand on."""
        return (2,)

    @property
    def slack(self) -> int:
        """Calls that an attempt may make: it is not known how many it needs."""
        return self.max_calls

    def line(self) -> str:
        """The tasks in words, for a protocol."""
        return f"at most {self.max_calls} calls of {self.tool}"


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Which tasks are attempted.

    Attributes:
      families: Names of families: "wordmath", "ledger" and those of `datasets`; prompts alternate between them.
      wordmath: Its numbers.
      ledger: Its numbers.
      datasets: Data sets that `families` can name.
      chat_tools: How the prompt lists the tools: their names, or their full JSON schemas. A checkpoint's own template
        lists them in its own way.
    """

    families: tuple[str, ...] = ("wordmath", "ledger")
    wordmath: WordMathConfig = WordMathConfig()
    ledger: LedgerConfig = LedgerConfig()
    datasets: tuple[DatasetConfig, ...] = ()
    chat_tools: Literal["names", "schema"] = "names"

    def of(self, family: str) -> WordMathConfig | LedgerConfig | DatasetConfig:
        """The numbers of a family.

        Raises:
          ConfigError: If there is none of that name.
        """
        known = {"wordmath": self.wordmath, "ledger": self.ledger} | {d.name: d for d in self.datasets}
        if family not in known:
            raise ConfigError(f"unknown family {family!r} in tasks.families: there are {', '.join(known)}")
        return known[family]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids.

    Attributes:
      kind: "sentencepiece" and "bpe" (byte-level) are trained at the start of a run; "byte" has a fixed vocabulary and
        needs nothing; "checkpoint" is a published tokenizer with its chat template.
      vocab_size: Ids of the model that is trained.
      texts: Demonstrations per family that it learns its pieces from.
      source: Folder of a published tokenizer; "" for that of the weights, `model.source`.
      call_format: How the published model writes a call: between `<tool_call>` tags ("hermes"), or as the bare object
        ("llama"); "auto" chooses by its chat template.
    """

    kind: Literal["sentencepiece", "bpe", "byte", "checkpoint"] = "sentencepiece"
    vocab_size: int = 1024
    texts: int = 400
    source: str = ""
    call_format: Literal["auto", "hermes", "llama"] = "auto"


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Cold start on demonstrations.

    Attributes:
      data: Recorded conversations to imitate besides the demonstrations: what `python -m elpo_jax.tasks.prepare` made
        of them, or a jsonl file of one's own; "" for none.
      mistake_rate: Probability that the demonstrator slips before a turn, and then repairs, while it can afford to.
      slack: Calls that it may spend on slips; where a family's own slack is less, the policy has to do without them.
      steps: Optimizer steps.
      rows: Packed rows of `sampler.context` tokens per optimizer step.
      micro_rows: Rows per forward pass.
      save_every: Steps between checkpoints.
      optimizer: AdamW.
    """

    data: str = ""
    mistake_rate: float = 0.25
    slack: int = 2
    steps: int = 1200
    rows: int = 16
    micro_rows: int = 16
    save_every: int = 200
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-3, warmup_steps=20, schedule="cosine")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How attempts are sampled, in training.

    Attributes:
      temperature: Divides the logits in the sampler and in the trainer.
      max_turn_tokens: Longest turn; a longer one is cut and the attempt fails.
      tool_visits: Bursts of decoding (`sampler.steps_per_visit` tokens each) that every tool has before its answer is
        waited for: with more of them slow tools hold nobody up, and attempts with quick ones wait for longer, during
        which others use their slots (`sampler.parking`).
      sandbox: What isolates model-written programs: "auto" for the strongest that works here, or "namespaces",
        "landlock", "remote" or, at your own risk, "unsafe" (docs/sandbox.md).
      interpreter_workers: Processes that run model-written programs.
      interpreter_seconds: CPU seconds per program.
      interpreter_memory_mb: Memory per program, beyond what Python and its packages take.
      interpreter_packages: Installed packages that programs can import beside the standard library.
      interpreter_tokens: Longest answer of the interpreter; of a longer one, head and tail are shown.
      interpreter_traceback: "frames" shows of an error where in the program it arose, "last_line" only what it was.
      interpreter_reference: Runs and answers programs as the reference recipe does, quirks included, whatever the two
        keys above say.
    """

    temperature: float = 1.0
    max_turn_tokens: int = 64
    tool_visits: int = 1
    sandbox: Literal["auto", "namespaces", "landlock", "remote", "unsafe"] = "auto"
    interpreter_workers: int = 2
    interpreter_seconds: float = 2.0
    interpreter_memory_mb: int = 512
    interpreter_packages: tuple[str, ...] = ("numpy", "sympy")
    interpreter_tokens: int = 128
    interpreter_traceback: Literal["frames", "last_line"] = "last_line"
    interpreter_reference: bool = False


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """The policy-gradient loop.

    Attributes:
      steps: Collected batches.
      prompts: Tasks per batch; each grows one tree of `algo.search.budget` attempts.
      updates: Optimizer steps per pass over a batch; each takes `prompts / updates` trees.
      epochs: Passes over a batch; from the second on the clip bounds bind.
      micro_rows: Packed rows per forward pass.
      row_tokens: Tokens of a packed row; 0 means twice `sampler.context`. A tree that is longer than a row is cut, and
        what its parts share is computed once for each, so rows that are no longer than the context share little.
      share_prefixes: Compute a token that several attempts of a tree share once for all of them, which changes neither
        loss nor gradient; False computes it in every attempt, to compare.
      eval_every: Batches between validations (0: never), each of `eval_tasks` tasks per family, `eval_k` times.
      eval_tasks: See above.
      eval_k: See above.
      dump_every: Batches between dumps of all trees to rollouts/, beside the first and the last (0: never).
      dump_private: Dump also the trees of tasks whose authors ask that their text is not spread, such as GPQA's.
      save_every: Batches between checkpoints.
      optimizer: AdamW.
    """

    steps: int = 16
    prompts: int = 32
    updates: int = 4
    epochs: int = 1
    micro_rows: int = 8
    row_tokens: int = 0
    share_prefixes: bool = True
    eval_every: int = 0
    eval_tasks: int = 32
    eval_k: int = 2
    dump_every: int = 10
    dump_private: bool = False
    save_every: int = 10
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, warmup_steps=8, b2=0.99, weight_decay=0.0)

    def row_length(self, context: int) -> int:
        """Tokens of a packed row, where an attempt has at most `context`."""
        return self.row_tokens or 2 * context


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation of every stage.

    Attributes:
      tasks: Test tasks per family.
      validation_tasks: Validation tasks per family, for choices that the test split must not make; 0 for none.
      k: Attempts at each task, where its data set has no k of its own.
      temperature: Of sampling; 0 is greedy.
      top_p: Share of the probability that is sampled from.
      bootstrap: Resamples of the tasks behind each interval.
    """

    tasks: int = 200
    validation_tasks: int = 50
    k: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    bootstrap: int = 2000


# (key, smallest value, largest value) of numbers, or of all numbers in a tuple, that no class of their own checks.
_BOUNDS = (
    ("seed", 0, 2**32 - 1),
    ("cpu_devices", 1, math.inf),
    ("tasks.wordmath.difficulties", 2, 10),
    ("tasks.wordmath.slack", 0, math.inf),
    ("tasks.wordmath.demonstrations", 0, math.inf),
    ("tasks.ledger.difficulties", 2, 10),
    ("tasks.ledger.slack", 0, math.inf),
    ("tasks.ledger.noise", 0, 1),
    ("tasks.ledger.demonstrations", 0, math.inf),
    ("tokenizer.vocab_size", 1, math.inf),
    ("tokenizer.texts", 1, math.inf),
    ("rollout.temperature", 0.001, math.inf),  # training samples, and divides its logits by it
    ("rollout.max_turn_tokens", 1, math.inf),
    ("rollout.tool_visits", 1, math.inf),
    ("rollout.interpreter_workers", 1, math.inf),
    ("rollout.interpreter_seconds", 0.01, math.inf),
    ("rollout.interpreter_memory_mb", 64, math.inf),
    ("rollout.interpreter_tokens", LEAST_LIMIT, math.inf),
    ("sft.mistake_rate", 0, 1),
    ("sft.slack", 0, math.inf),
    ("sft.steps", 0, math.inf),
    ("sft.rows", 1, math.inf),
    ("sft.micro_rows", 1, math.inf),
    ("sft.save_every", 1, math.inf),
    ("rl.steps", 0, math.inf),
    ("rl.prompts", 1, math.inf),
    ("rl.updates", 1, math.inf),
    ("rl.epochs", 1, math.inf),
    ("rl.micro_rows", 1, math.inf),
    ("rl.row_tokens", 0, math.inf),
    ("rl.eval_every", 0, math.inf),
    ("rl.eval_tasks", 1, math.inf),
    ("rl.eval_k", 1, math.inf),
    ("rl.dump_every", 0, math.inf),
    ("rl.save_every", 1, math.inf),
    ("eval.tasks", 1, math.inf),
    ("eval.validation_tasks", 0, math.inf),
    ("eval.k", 1, math.inf),
    ("eval.temperature", 0, math.inf),
    ("eval.top_p", 0.001, 1),
    ("eval.bootstrap", 1, math.inf),
)
# What a recipe's folder in the run folder, its eval/NAME.json or its key in results.json would collide with.
_TAKEN = {"sft", "eval", "total", "compile_cache", "config.json", "results.json", "report.html"} | {
    "tokenizer",
    "tokenizer.model",
}
SCALARS = {int: "an int", float: "a finite number", bool: "a bool", str: "a string"}


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: a cold start, then `algo` and each of `against` from the same start under the same budget."""

    name: str = "experiment"
    seed: int = 0
    cpu_devices: int = 2  # XLA devices on a machine without accelerators; results depend on it in the last bits
    tasks: TasksConfig = TasksConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig(vocab_size=1024, d_model=96, layers=3, heads=4, kv_heads=1, head_dim=24, d_ff=256)
    mesh: MeshConfig = MeshConfig()
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: Reward = Reward()
    sft: SftConfig = SftConfig()
    algo: Recipe = dataclasses.field(default_factory=elpo)
    against: tuple[Recipe, ...] = dataclasses.field(default_factory=lambda: (grpo(),))
    rl: RlConfig = RlConfig()
    eval: EvalConfig = EvalConfig()

    def check(self, row_parts: int = 1) -> "Config":
        """The config itself, if its parts fit each other; not at construction, so overrides can come in any order.

        Args:
          row_parts: Into how many parts the mesh splits the rows of a batch, once there is a mesh.

        Raises:
          ConfigError: Naming the keys that disagree.
        """
        _check_type(self, Config, "")
        for key, low, high in _BOUNDS:
            value = operator.attrgetter(key)(self)
            for item in value if isinstance(value, tuple) else (value,):
                if not low <= item <= high:
                    upper = "" if high == math.inf else f" and at most {high}"
                    raise ConfigError(f"{key}={item} must be at least {low}{upper}")
        names = [recipe.name for recipe in self.recipes]
        # A file system may take upper and lower case for the same name.
        if len({name.lower() for name in names}) < len(names):
            raise ConfigError(f"algo and against need different names, not {', '.join(names)}: set algo.name")
        if taken := [name for name in names if name.lower() in _TAKEN]:
            raise ConfigError(f"a run has something else of the name {taken[0]!r}: set algo.name to another one")
        for key in ("tasks.families", "tasks.wordmath.difficulties", "tasks.ledger.difficulties"):
            if not operator.attrgetter(key)(self):
                raise ConfigError(f"{key} must name at least one: the dataset is empty")
        if len(set(self.tasks.families)) < len(self.tasks.families):
            raise ConfigError(f"tasks.families names a family twice: {self.tasks.families}")
        datasets = [dataset.name for dataset in self.tasks.datasets]
        if len({"wordmath", "ledger", *datasets}) < len(datasets) + 2:
            raise ConfigError(f"tasks.datasets needs a different name for each, not {', '.join(datasets)}")
        for i, dataset in enumerate(self.tasks.datasets):
            numbers = {name: getattr(dataset, name) for name in ("max_calls", "demonstrations", "rows", "k")}
            if min(numbers.values()) < 0 or not 0 <= dataset.validation < 1:
                said = ", ".join(f"{name}={value}" for name, value in numbers.items())
                raise ConfigError(
                    f"tasks.datasets.{i}: {said} must be at least 0, and validation={dataset.validation} at least 0 "
                    "and less than 1"
                )
        if not self.training_families and (self.sft.steps or self.rl.steps):
            raise ConfigError(
                "tasks.families has none to train on: set tasks.datasets.N.use to train or both for one, or sft.steps "
                "and rl.steps to 0 to evaluate only"
            )
        if self.tokenizer.kind == "checkpoint" and not (self.tokenizer.source or self.model.source):
            raise ConfigError("tokenizer.kind=checkpoint needs a folder: set tokenizer.source or model.source")
        if self.model.source and self.tokenizer.kind != "checkpoint":
            raise ConfigError(
                f"the weights in model.source know no ids of a tokenizer of kind {self.tokenizer.kind}: set "
                "tokenizer.kind=checkpoint"
            )
        for key, other in (("rl.prompts", "rl.updates"), ("sft.rows", "sft.micro_rows")):
            value, divisor = operator.attrgetter(key, other)(self)
            if value % divisor:
                raise ConfigError(f"{key}={value} is not a multiple of {other}={divisor}")
        if 0 < self.rl.row_tokens < self.sampler.context:
            raise ConfigError(
                f"rl.row_tokens={self.rl.row_tokens} is less than sampler.context={self.sampler.context}, which an "
                "attempt can fill: raise it, or set it to 0 for rows of twice that length"
            )
        if self.model.param_dtype != "float32":
            raise ConfigError(
                f"model.param_dtype={self.model.param_dtype} cannot be trained, for small updates would be rounded "
                "away: use float32, and model.dtype=bfloat16 to compute in bfloat16"
            )
        for key in ("sft.micro_rows", "rl.micro_rows"):
            value = operator.attrgetter(key)(self)
            if value % row_parts:
                raise ConfigError(
                    f"{key}={value} cannot be split over mesh.data * mesh.fsdp = {row_parts}: make it a multiple of "
                    f"{row_parts}, or the mesh smaller"
                )
        return self

    @property
    def training_families(self) -> tuple[str, ...]:
        """The families that training tasks are drawn from."""
        return tuple(name for name in self.tasks.families if getattr(self.tasks.of(name), "use", "both") != "test")

    @property
    def demonstrations(self) -> dict[str, int]:
        """Transcripts for the cold start, by family."""
        return {name: self.tasks.of(name).demonstrations for name in self.training_families}

    @property
    def first_rl_task(self) -> int:
        """Where the prompts of RL begin in the stream of training tasks: after as many as were demonstrated.

        In a data set those are not quite the same: rows that cannot be demonstrated are passed over, and it goes round.
        """
        return max(self.demonstrations.values(), default=0) * len(self.training_families)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The algorithms that are run; none where rl.steps=0, and then the start alone is measured."""
        return (self.algo, *self.against) if self.rl.steps else ()


def to_json(config: Any) -> dict:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as "key: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted({*old, *new}):
            where = f"{path}.{key}" if path else key
            out += differences(old.get(key, "(missing)"), new.get(key, "(missing)"), where)
        return out
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _check_type(value: Any, hint: Any, key: str) -> None:
    """Raises ConfigError where a value, or one inside it, is not what its field declares, or is not finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is not None or type(None) not in arguments:
            _check_type(value, next(a for a in arguments if a is not type(None)), key)
        return
    if origin is Literal:
        fits, wanted = value in arguments, f"one of {', '.join(map(str, arguments))}"
    elif origin is tuple:
        fits, wanted = isinstance(value, tuple), "a tuple, such as (x,) or (x, y)"
        for i, item in enumerate(value if fits else ()):
            _check_type(item, arguments[0], f"{key}.{i}")
    elif dataclasses.is_dataclass(hint):
        fits, wanted = isinstance(value, hint), f"a {hint.__name__}"
        for name, inner in typing.get_type_hints(hint).items() if fits else ():
            _check_type(getattr(value, name), inner, f"{key}.{name}".lstrip("."))
    else:  # to Python, a bool is an int and an int is no float
        fits = isinstance(value, int | float if hint is float else hint) and isinstance(value, bool) == (hint is bool)
        fits, wanted = fits and (not isinstance(value, float) or math.isfinite(value)), SCALARS[hint]
    if not fits:
        raise ConfigError(f"{key}={textwrap.shorten(repr(value), 60)} is not {wanted}")
