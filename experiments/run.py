"""Runs an experiment: cold start, then each algorithm from that start under the same rollout budget, then a report.

    python -m experiments.run experiments/quickstart.py --workdir W [--set algo.eps_elc=0.0 ...] [--resume]

Every stage picks up where its last checkpoint left it, so a run that was stopped at any moment goes on with --resume.
"""

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import jax

from elpo_jax.config import Config, ConfigError, differences, to_json
from elpo_jax.overrides import load, override
from elpo_jax.policy.loss import make_logprobs, make_loss
from elpo_jax.policy.recipes import Recipe
from elpo_jax.report.log import MetricsLog, read_json, read_metrics, write_json
from elpo_jax.report.page import build_report
from elpo_jax.report.progress import Progress
from elpo_jax.rollout.agent import Environment
from elpo_jax.rollout.sampler import Sampler
from elpo_jax.tasks.base import Split, Task
from elpo_jax.tasks.stream import TaskStream
from elpo_jax.tools.base import InfrastructureError
from elpo_jax.train.checkpoint import CheckpointError, Checkpoints
from elpo_jax.train.evaluate import Protocol, evaluate
from elpo_jax.train.mesh import make_mesh, row_parts
from elpo_jax.train.provenance import provenance, versions
from elpo_jax.train.rl import Learner, reference_logprobs, train_rl
from elpo_jax.train.setup import (
    build_environment,
    build_tokenizer,
    check_prompts,
    demonstration_rows,
    open_tools,
    open_workdir,
    with_weights_shape,
)
from elpo_jax.train.sft import make_sft_loss, train_sft
from elpo_jax.train.state import TrainState, init_state, load_params
from elpo_jax.train.step import Optimizer, make_optimizer, make_train_step


def run(config: Config, workdir: pathlib.Path, resume: bool = False) -> dict:
    """Runs or continues the experiment in `workdir` and returns the content of results.json."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        # Everything that can be wrong with a config shows before the first step: what it raises is for the user.
        with bad_values_are_config_errors():
            config = with_weights_shape(config)
            mesh = make_mesh(config.mesh)
            config.check(row_parts(mesh))
            stack.enter_context(open_workdir(workdir, config, resume))
            if finished(config, workdir):
                results = read_figures(workdir / "results.json", RESULTS)
                build_report(workdir)
                return results
            stack.enter_context(jax.set_mesh(mesh))
            stream, toolboxes, sandbox = stack.enter_context(open_tools(config))
            tokenizer = build_tokenizer(config, workdir, stream, toolboxes)
            environment = build_environment(config, tokenizer, stream, toolboxes, sandbox)
            check_prompts(config, environment, stream)
            sampler = Sampler(config.model, config.sampler, environment.chat.stop_ids, config.seed, mesh)
            sft_optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
            rl_optimizer = make_optimizer(config.rl.optimizer, config.rl.steps * config.rl.updates * config.rl.epochs)
        meta = {"config": to_json(config), "tokenizer": tokenizer.fingerprint, "chat": environment.chat.fingerprint}

        begun = cold_start(config, workdir, mesh, sft_optimizer, environment, stream, meta)
        measure(config, workdir, "sft", begun, environment, sampler, stream)
        begun = begun.replace(opt_state=None)  # the moments are of no more use, and twice as large as the parameters
        for recipe in config.recipes:
            state = reinforce(config, recipe, workdir, mesh, rl_optimizer, begun, environment, stream, sampler, meta)
            measure(config, workdir, recipe.name, state, environment, sampler, stream)
        results = summarise(config, workdir, time.perf_counter() - began)
        write_json(workdir / "results.json", results)
        build_report(workdir)
        return results


@contextlib.contextmanager
def bad_values_are_config_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def finished(config: Config, workdir: pathlib.Path) -> bool:
    """Whether everything was measured: then results.json, which says when and where, is left as it is."""
    paths = [workdir / "results.json", *(workdir / "eval" / f"{name}.json" for name in stages(config))]
    return all(path.exists() for path in paths)


def stages(config: Config) -> list[str]:
    return ["sft", *(recipe.name for recipe in config.recipes)]


def held_out(stream: TaskStream, split: Split, count: int) -> dict[str, list[Task]]:
    """The first tasks of a split, by family, of the families that have any."""
    return {family: stream.first(family, split, count) for family in stream.names(split)}


def last_state(checkpoints: Checkpoints, blank: TrainState, mesh, meta: dict) -> tuple[TrainState, int]:
    """The state and the step that a stage goes on from: its newest checkpoint, or `blank` and 0.

    Raises:
      CheckpointError: If it was saved by another stage, config or tokenizer than `meta` names.
    """
    if checkpoints.latest() is None:
        return blank, 0
    state, saved = checkpoints.restore(blank, mesh)
    if saved["tokenizer"] != meta["tokenizer"]:
        raise CheckpointError(
            "the checkpoint was trained with another tokenizer than the run folder's tokenizer.model: restore that file"
        )
    if saved.get("chat") != meta["chat"]:
        raise CheckpointError(
            "the checkpoint was trained with another chat template, or other ids that end a turn: restore the files of "
            "tokenizer.source or model.source"
        )
    changed = differences(*({key: of.get(key) for key in ("stage", "config")} for of in (saved, meta)))
    if changed:
        raise CheckpointError(
            f"checkpoint {saved['step']} in {checkpoints.directory} is not this run's ({'; '.join(changed[:4])}): move "
            "it out of the folder"
        )
    if changed := differences(saved["versions"], versions()):
        print(f"note: other versions than when the run began ({'; '.join(changed)}): last bits may differ", flush=True)
    return state, int(saved["step"])


def open_log(folder: pathlib.Path, start: int, environment: Environment) -> MetricsLog:
    """The stage's metrics, ready for the row after step `start`."""
    always = {"unsafe_tools": True} if environment.isolation == "unsafe" else {}
    with bad_values_are_config_errors():  # a damaged file
        log = MetricsLog(folder / "metrics.jsonl", always)
        log.truncate_after(start)
    return log


def cold_start(
    config: Config, workdir, mesh, optimizer: Optimizer, environment: Environment, stream: TaskStream, meta: dict
) -> TrainState:
    """SFT from random or published weights, or its last state."""
    folder, meta = workdir / "sft", meta | {"stage": "sft"}
    checkpoints = Checkpoints(folder / "checkpoints")
    params = None
    if checkpoints.latest() is None:
        with bad_values_are_config_errors():
            params = load_params(config.model, mesh)
    blank = init_state(config.model, optimizer, jax.random.key(config.seed), mesh, params)
    state, start = last_state(checkpoints, blank, mesh, meta)
    data = None
    if start < config.sft.steps:  # before the stage's first file: with nothing to learn from, it has not begun
        began = time.perf_counter()
        data, failed, long = demonstration_rows(config, environment, stream)
        seconds = time.perf_counter() - began
        print(
            f"{int((data.positions == 0).sum())} demonstrations in {data.tokens.shape[0]} rows of "
            f"{config.sampler.context} tokens (left out: {failed} that failed, {long} too long), {seconds:.0f} s",
            flush=True,
        )
    log = open_log(folder, start, environment)
    if data is None:
        return state
    return train_sft(
        config.sft,
        state,
        make_train_step(make_sft_loss(config.model), optimizer, mesh),
        data,
        start=start,
        seed=config.seed,
        meta=meta,
        checkpoints=checkpoints,
        log=log,
    )


def reinforce(
    config: Config,
    recipe: Recipe,
    workdir: pathlib.Path,
    mesh,
    optimizer: Optimizer,
    begun: TrainState,
    environment: Environment,
    stream: TaskStream,
    sampler: Sampler,
    meta: dict,
) -> TrainState:
    """One recipe's RL from the cold start, or from its last state."""
    folder, meta = workdir / recipe.name, meta | {"stage": recipe.name}
    checkpoints = Checkpoints(folder / "checkpoints")
    # A copy, since the train step donates its state and the next recipe starts from the same parameters.
    params = jax.tree.map(lambda x: x.copy(), begun.params)
    blank = init_state(config.model, optimizer, jax.random.key(config.seed), mesh, params)
    state, start = last_state(checkpoints, blank, mesh, meta)

    def validate(step: int) -> dict[str, float]:
        tasks = held_out(stream, "validation", config.rl.eval_tasks)
        sampling = config.rl.eval_k, config.rollout.temperature, 1.0
        protocol = protocol_of(config, environment, "validation", tasks, *sampling)
        families = evaluate(recipe.name, tasks, protocol, environment, sampler, config.eval.bootstrap)["families"]
        row = {}
        for family, figures in families.items():
            row[f"eval/{family}/avg@{protocol.k}"] = figures[f"avg@{protocol.k}"]
            row[f"eval/{family}/ci_low"], row[f"eval/{family}/ci_high"] = figures["ci"]
        return row

    learner = Learner(
        environment=environment,
        sampler=sampler,
        stream=stream,
        first_task=config.first_rl_task,
        seed=config.seed,
        temperature=config.rollout.temperature,
        step_fn=make_train_step(make_loss(config.model), optimizer, mesh),
        reference_logp=reference_logprobs(make_logprobs(config.model, config.rollout.temperature), begun.params)
        if recipe.kl > 0
        else None,
        validate=validate,
    )
    return train_rl(
        config.rl,
        recipe,
        learner,
        state,
        start=start,
        meta=meta,
        checkpoints=checkpoints,
        log=open_log(folder, start, environment),
        dumps=folder / "rollouts",
    )


def measure(
    config: Config,
    workdir,
    name: str,
    state: TrainState,
    environment: Environment,
    sampler: Sampler,
    stream: TaskStream,
) -> None:
    """Evaluates a stage's policy on the test and the validation split, once, into eval/NAME.json.

    The file has the test split's figures, and under "validation" those of the other, each with its protocol.
    """
    path = workdir / "eval" / f"{name}.json"
    if path.exists():
        read_figures(path, FIGURES)  # damage shows now, not after the stages that follow
        return
    began = time.perf_counter()
    sampler.load(state.params, version=int(state.step))
    counts: dict[Split, int] = {"test": config.eval.tasks, "validation": config.eval.validation_tasks}
    tasks = {split: held_out(stream, split, count) for split, count in counts.items() if count}
    sampling = config.eval.k, config.eval.temperature, config.eval.top_p
    own_k = {name: k for name in config.tasks.families if (k := getattr(config.tasks.of(name), "k", 0))}
    protocols = {
        split: protocol_of(config, environment, split, of, *sampling, own_k if split == "test" else {})
        for split, of in tasks.items()
        if of
    }
    attempts = {s: sum(p.k_of(family) * len(of) for family, of in tasks[s].items()) for s, p in protocols.items()}
    by_split, done = {}, 0
    with Progress(f"evaluating {name}", sum(attempts.values())) as progress:
        for split, protocol in protocols.items():
            by_split[split] = evaluate(
                name,
                tasks[split],
                protocol,
                environment,
                sampler,
                config.eval.bootstrap,
                lambda rollouts, done=done: progress.update(done + rollouts, rollouts=1),
            ) | {"protocol_line": protocol.line()}
            done += attempts[split]
    for split, figures in by_split.items():
        print(f"{name}, {figures['protocol_line']}")
        for family, values in figures["families"].items():
            print(f"  {split:<10} {family:<9} {figures_line(values, protocols[split].k_of(family))}", flush=True)
    figures = by_split["test"] | {"validation": by_split.get("validation"), "seconds": time.perf_counter() - began}
    write_json(path, figures)


def figures_line(values: dict, k: int) -> str:
    """The figures of a family in one line, in percent with their intervals."""
    parts = []
    for metric in (f"avg@{k}", f"pass@{k}", f"maj@{k}"):
        entry = values[metric]
        value, (low, high) = (entry["value"], entry["ci"]) if isinstance(entry, dict) else (entry, values["ci"])
        parts.append(f"{metric} {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    return ", ".join(parts) + f"; {values['tool_calls']:.1f} tool calls and {values['tokens']:.0f} tokens an attempt"


def protocol_of(
    config: Config,
    environment: Environment,
    split: str,
    tasks: Mapping[str, Sequence[Task]],
    k: int,
    temperature: float,
    top_p: float,
    own_k: Mapping[str, int] = MappingProxyType({}),
) -> Protocol:
    return Protocol(
        split=split,
        families={name: f"{len(of)} tasks, {config.tasks.of(name).line()}" for name, of in tasks.items()},
        k=k,
        own_k={name: own_k[name] for name in tasks if name in own_k},
        temperature=temperature,
        top_p=top_p,
        seed=config.seed,
        max_turn_tokens=config.rollout.max_turn_tokens,
        context=config.sampler.context,
        isolation=environment.isolation,
        checkers={name: environment.families[name].checker for name in tasks},
    )


# Faults of ours: their names in results.json, the metric of each, and what it counts.
FAULTS = {
    "lost_attempts": ("rollout/infrastructure_failures", "attempts lost"),
    "sandbox_errors": ("sandbox/sandbox_errors", "programs given up"),
    "sandbox_retries": ("sandbox/retries", "programs run again"),
    "paused_s": ("sandbox/paused_s", "seconds paused"),
}
# The keys that results.json and an eval/NAME.json are read by.
RESULTS = {"protocol", "families", "budget", "seconds"}
FIGURES = {"protocol", "protocol_line", "families", "seconds"}


def read_figures(path: pathlib.Path, keys: set[str]) -> dict:
    """What `write_json` wrote there; ConfigError for anything else."""
    with bad_values_are_config_errors():
        figures = read_json(path)
    if not isinstance(figures, dict) or not keys <= figures.keys():
        raise ConfigError(f"{path} is damaged: restore it, or delete it to have it written again")
    return figures


def summarise(config: Config, workdir: pathlib.Path, elapsed: float) -> dict:
    """results.json from what the stages left on disk; `elapsed` is what this process took, in seconds."""
    names = stages(config)
    evals = {name: read_figures(workdir / "eval" / f"{name}.json", FIGURES) for name in names}
    rows = {name: read_metrics(workdir / name / "metrics.jsonl") for name in names}
    seconds = {name: sum(row["seconds/step"] for row in rows[name]) for name in names}
    seconds["eval"] = sum(figures["seconds"] for figures in evals.values())
    seconds["total"] = max(elapsed, sum(seconds.values()))  # a resumed run: at least what its stages took
    return {
        "protocol": evals["sft"]["protocol"] | {"line": evals["sft"]["protocol_line"], "seed": config.seed},
        "families": accuracies(evals),
        "validation": {
            "line": evals["sft"]["validation"]["protocol_line"],
            "families": accuracies({name: figures["validation"] for name, figures in evals.items()}),
        }
        if config.eval.validation_tasks
        else None,
        "budget": {name: totals(rows[name]) for name in names[1:]},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "provenance": provenance() | {"config": config.name, "seed": config.seed},
    }


def totals(rows: Sequence[Mapping]) -> dict[str, int | float]:
    """What an algorithm's training took, and what was lost on the way to faults of ours, from its metrics."""
    spent = {
        name: int(sum(row[f"rollout/{name}"] for row in rows)) for name in ("rollouts", "model_tokens", "tool_calls")
    }
    # Not in every row: a run without programs has no sandbox.
    faults = {name: sum(row.get(key, 0) for row in rows) for name, (key, _) in FAULTS.items()}
    return spent | {name: round(value, 1) if name == "paused_s" else int(value) for name, value in faults.items()}


def accuracies(evals: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """family -> stage -> avg@k, its interval and the number of tasks."""
    families = dict.fromkeys(family for figures in evals.values() for family in figures["families"])
    return {
        family: {
            name: {
                key: value
                for key, value in figures["families"][family].items()
                if key.startswith("avg@") or key in ("ci", "n")
            }
            for name, figures in evals.items()
        }
        for family in families
    }


def show(results: dict) -> None:
    """The comparison, on the terminal."""
    print(f"\nheld-out accuracy: {results['protocol']['line']}")
    for family, by_name in results["families"].items():
        for name, figures in by_name.items():
            low, high = figures["ci"]
            key = next(key for key in figures if key.startswith("avg@"))
            budget = results["budget"].get(name)
            spent = (
                f"   {budget['rollouts']:,} rollouts, {budget['model_tokens']:,} model tokens, "
                f"{budget['tool_calls']:,} tool calls{faults_line(budget)}"
                if budget
                else ""
            )
            print(
                f"  {family:<9} {name:<6} {key} {100 * figures[key]:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]{spent}"
            )
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items()))


def faults_line(budget: Mapping) -> str:
    """What was lost to faults of ours; empty where nothing was."""
    parts = [f"{words} {budget[key]:,}" for key, (_, words) in FAULTS.items() if budget.get(key)]
    return f"; faults of ours: {', '.join(parts)}" if parts else ""


def keep_programs(folder: pathlib.Path) -> None:
    """Compiled programs are kept in the folder, or where JAX_COMPILATION_CACHE_DIR says, for the next process.

    All of them: a run has dozens of small ones, whose compile times add up.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the run; made if missing")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="continue the run that is in the folder")
    options = parser.parse_args(arguments)
    workdir = options.workdir.resolve()
    try:
        config = override(load(options.experiment), options.assignments)
        # Before the first array: the number of CPU devices and the compile cache cannot change afterwards.
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        keep_programs(workdir / "compile_cache")
        show(run(config, workdir, options.resume))
    except (ConfigError, CheckpointError, InfrastructureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "with --resume goes on from the last checkpoint"
        more = resume if (workdir / "config.json").exists() else "begins again"
        print(f"\nstopped; the same command {more}", file=sys.stderr)
        return 130
    print(f"open {workdir / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
