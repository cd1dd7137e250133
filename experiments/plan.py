"""Will it fit, and how long will it take? Compiles an experiment for devices that one does not have.

    python -m experiments.plan experiments/paper/elpo_qwen2_5_7b.py --mesh 8 --chip v5p [--set KEY=VALUE ...]

The train step, the prefill and the decode burst of a run are compiled ahead of time from shapes alone, over CPU devices
that stand for the chips of a mesh: nothing is allocated, so a laptop plans for a pod. Of a large model only two depths
are compiled, and the line through them gives the operations and the communication of all layers, exactly.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from elpo_jax.config import Config, ConfigError
from elpo_jax.model.config import count_params
from elpo_jax.overrides import load, override
from elpo_jax.policy.batch import empty
from elpo_jax.policy.loss import make_loss
from elpo_jax.rollout import decode
from elpo_jax.train.mesh import AXES, MeshConfig, batch_sharding, make_mesh, replicated, row_parts
from elpo_jax.train.step import make_train_step
from experiments import footprint
from experiments.chips import CHIPS, Chip
from experiments.footprint import Phase, Volume, abstract_mesh, micro_batches
from experiments.hlo import Traffic, work_of

PHASES = ("update", "prefill", "decode")
DEPTHS = (2, 4)
# As on an accelerator: communication is not merged into a few huge calls, what is to be computed again is not found to
# be a duplicate, and what is not needed soon is not computed early.
OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "all-reduce-combiner,cpu-all-reduce-combiner,cse_barrier_expander",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled call, per device.

    Attributes:
      flops: Operations of matrix products, loops multiplied.
      counted_once: What XLA's cost analysis says, which counts the body of a loop once.
      arguments: Bytes of what it is given.
      temporary: Bytes of its temporary arrays, as compiled for CPUs.
      traffic: Collectives by kind.
      unknown_loops: Loops whose trip count is not known, so that they count once.
      seconds: That compiling took.
    """

    flops: float
    counted_once: float
    arguments: float
    temporary: float
    traffic: dict[str, Traffic]
    unknown_loops: int
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends to its neighbours."""
        return sum(traffic.sent for traffic in self.traffic.values())


def compile_phase(phase: str, config: Config, mesh: Mesh, micro: int) -> Program:
    """Compiles one optimizer step of `micro` micro-batches, the largest prefill or one burst of decoding."""
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = {"update": _update, "prefill": _prefill, "decode": _decode}[phase](config, mesh, micro).compile(
            compiler_options=OPTIONS
        )
    # How many blocks attention meets in training depends on the trees; all on and below the diagonal are counted.
    steps = footprint.attention_steps(config.rl.row_length(config.sampler.context)) if phase == "update" else None
    work, memory = work_of(compiled.as_text(), steps), compiled.memory_analysis()
    return Program(
        flops=work.flops,
        counted_once=compiled.cost_analysis().get("flops", math.nan),
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        traffic=work.traffic,
        unknown_loops=work.unknown_loops,
        seconds=time.perf_counter() - began,
    )


def _update(config: Config, mesh: Mesh, micro: int):
    state = footprint.abstract_state(config, mesh)
    shape = (micro, config.rl.micro_rows, config.rl.row_length(config.sampler.context))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh)), empty(1, 1))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    scalars = dict.fromkeys([*config.algo.scalars(), "temperature"], scalar)
    step = make_train_step(make_loss(config.model), footprint.rl_optimizer(config), mesh)
    places = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, batch, scalars)


def _prefill(config: Config, mesh: Mesh, micro: int):
    del micro
    rows, tokens = footprint.prefill_shape(config, mesh)
    rows *= row_parts(mesh)
    indices, ids = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows, tokens)))
    params, state = footprint.sampler_params(config, mesh), footprint.sampler_state(config, mesh)
    return decode.make_prefill(config.model, mesh).lower(params, state, indices, indices, ids, ids)


def _decode(config: Config, mesh: Mesh, micro: int):
    del micro
    params, state = footprint.sampler_params(config, mesh), footprint.sampler_state(config, mesh)
    burst = decode.make_decode(config.model, mesh, (0,), config.seed, config.sampler.steps_per_visit)
    return burst.lower(params, state, jax.ShapeDtypeStruct((2,), jnp.float32))


def of_depth(config: Config, layers: int) -> Config:
    """The same experiment with another number of layers."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers))


def extrapolate(programs: dict[int, Program], layers: int) -> Program:
    """The program of `layers` layers from those of two depths: all but the temporary memory grows by the layer.

    How CPUs schedule a deep network says little of other machines; the memory is therefore that of the deeper program.
    """
    (low, first), (high, second) = sorted(programs.items())
    share = (layers - low) / (high - low)

    def line(a, b):
        return a * (1 - share) + b * share

    kinds = {*first.traffic, *second.traffic}
    return Program(
        flops=line(first.flops, second.flops),
        counted_once=line(first.counted_once, second.counted_once),
        arguments=line(first.arguments, second.arguments),
        temporary=second.temporary,
        traffic={k: line(first.traffic.get(k, Traffic()), second.traffic.get(k, Traffic())) for k in sorted(kinds)},
        unknown_loops=second.unknown_loops,
        seconds=first.seconds + second.seconds,
    )


def by_hand(config: Config, mesh, micro: int) -> dict[str, Phase]:
    """What the same calls take by count."""
    return {
        "update": footprint.update(config, mesh, micro),
        "prefill": footprint.prefill(config, mesh, *footprint.prefill_shape(config, mesh)),
        "decode": footprint.decode(config, mesh),
    }


def calls(config: Config, mesh, volume: Volume) -> dict[str, float]:
    """How often each call is made for one batch of RL: optimizer steps, full prefills, decoded tokens per slot."""
    rows, tokens = footprint.prefill_shape(config, mesh)
    return {
        "update": config.rl.updates * config.rl.epochs,
        "prefill": volume.prefilled / (rows * row_parts(mesh) * tokens),
        "decode": volume.decoded / config.sampler.slots,
    }


def roofline(chip: Chip, flops: float, traffic: float, sent: float) -> tuple[float, str]:
    """Seconds that a call takes at least, and what bounds it, if all that can overlap does."""
    parts = {"compute": flops / chip.flops, "memory": traffic / chip.bandwidth, "network": sent / chip.interconnect}
    bound = max(parts, key=parts.get)
    return parts[bound], bound


def peak_bytes(config: Config, mesh, micro: int) -> float:
    """Most bytes on a device at once: what lies there, and the working memory of the greediest call."""
    working = max(phase.working for phase in by_hand(config, mesh, micro).values())
    return sum(footprint.resident(config, mesh).values()) + max(working, footprint.staged(config, mesh))


def splits(devices: int, heads: int) -> list[tuple[int, int, int]]:
    """All meshes (1, fsdp, tensor) of that many devices that give every tensor device a head."""
    tensors = [t for t in range(1, devices + 1) if devices % t == 0 and heads % t == 0]
    return [(1, devices // t, t) for t in tensors]


def fitted(config: Config, parts: int) -> Config:
    """The config with micro-batches, slots and parked rows raised to what `parts` parts of the rows can share."""

    def up(number: int) -> int:
        return -(-number // parts) * parts

    return dataclasses.replace(
        config,
        rl=dataclasses.replace(config.rl, micro_rows=up(config.rl.micro_rows)),
        sampler=dataclasses.replace(config.sampler, slots=up(config.sampler.slots), parking=up(config.sampler.parking)),
    )


def fits(config: Config, volume: Volume, devices: int, chips: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For every split of the devices, bytes per device and on which chips they fit."""
    table = {}
    for sizes in splits(devices, config.model.heads):
        mesh = abstract_mesh(sizes)
        this = fitted(config, row_parts(mesh))
        size = peak_bytes(this, mesh, micro_batches(this, volume))
        table[f"{sizes[1]}x{sizes[2]}"] = {"bytes": size, "fits": [c for c in chips if size <= CHIPS[c].memory]}
    return table


def smallest(config: Config, volume: Volume, chips: Sequence[str], most: int = 1024) -> dict[str, str | None]:
    """By chip, the mesh of fewest devices (a power of two) that fits."""
    found: dict[str, str | None] = dict.fromkeys(chips)
    devices = 1
    while devices <= most and None in found.values():
        for mesh, entry in sorted(fits(config, volume, devices, chips).items(), key=lambda item: item[1]["bytes"]):
            for chip in entry["fits"]:
                found[chip] = found[chip] or mesh
        devices *= 2
    return found


def parse_mesh(text: str) -> MeshConfig:
    """ "8" (fsdp), "2x4" (fsdp x tensor) or "data=2,fsdp=2,tensor=2".

    Raises:
      ConfigError: For anything else.
    """
    try:
        if "=" in text:
            pairs = [part.split("=") for part in text.split(",")]
            sizes = {name.strip(): int(size) for name, size in pairs}
        else:
            sizes = dict(zip(("fsdp", "tensor"), map(int, text.split("x", 1)), strict=False))
        if not sizes.keys() <= set(AXES) or min(sizes.values()) < 1:
            raise ValueError
        return MeshConfig(**{"data": 1} | sizes)
    except ValueError:
        raise ConfigError(
            f"--mesh {text!r} is no mesh: give 8 (fsdp), 2x4 (fsdp x tensor) or data=2,fsdp=2,tensor=2"
        ) from None


def plan(config: Config, mesh: Mesh, volume: Volume, chips: Sequence[str], depths: Sequence[int]) -> dict[str, Any]:
    """Everything that is printed, as plain values.

    Args:
      config: The experiment.
      mesh: Over as many devices as are planned for.
      volume: Of a batch.
      chips: Names of those to compare.
      depths: Numbers of layers to compile; one for the whole network, else two.
    """
    layers, micro = config.model.layers, micro_batches(config, volume)
    programs, measured = {}, {}
    for phase in PHASES:
        compiled = {n: compile_phase(phase, of_depth(config, n), mesh, micro) for n in depths}
        programs[phase] = extrapolate(compiled, layers) if len(compiled) > 1 else compiled[depths[0]]
        measured[phase] = max(compiled)
    count, often = by_hand(config, mesh, micro), calls(config, mesh, volume)
    # One token of a burst.
    steps = {"decode": config.sampler.steps_per_visit}
    phases = {}
    for phase, program in programs.items():
        times = steps.get(phase, 1)
        flops, sent, traffic = program.flops / times, program.sent / times, count[phase].traffic
        seconds = {}
        for chip in chips:
            one, bound = roofline(CHIPS[chip], flops, traffic, sent)
            seconds[chip] = {"call": one, "batch": one * often[phase], "bound": bound}
        shallow = by_hand(of_depth(config, measured[phase]), mesh, micro)[phase].working
        phases[phase] = {
            "calls": often[phase],
            "flops": {"compiled": flops, "by_hand": count[phase].flops, "xla": program.counted_once / times},
            "traffic_bytes": traffic,
            "working_bytes": count[phase].working,
            "check": {"layers": measured[phase], "by_hand": shallow, "compiled": program.temporary},
            "argument_bytes": program.arguments,
            "collectives": {
                kind: {"count": t.count / times, "bytes": t.payload / times, "sent": t.sent / times}
                for kind, t in program.traffic.items()
            },
            "unknown_loops": program.unknown_loops,
            "compile_s": program.seconds,
            "seconds": seconds,
        }
    devices = mesh.devices.size
    return {
        "experiment": config.name,
        "parameters": count_params(config.model),
        "layers": layers,
        "compiled_layers": sorted(depths),
        "mesh": {name: mesh.shape[name] for name in AXES},
        "volume": dataclasses.asdict(volume) | {"micro_batches": micro, "prefill": _prefill_line(config, mesh)},
        "resident_bytes": footprint.resident(config, mesh),
        "staged_bytes": footprint.staged(config, mesh),
        "peak_bytes": peak_bytes(config, mesh, micro),
        "phases": phases,
        "fits": fits(config, volume, devices, chips),
        "smallest": smallest(config, volume, chips),
    }


def _prefill_line(config: Config, mesh) -> str:
    rows, tokens = footprint.prefill_shape(config, mesh)
    return f"{rows} rows x {tokens} tokens on each part of the rows"


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a plan."""
    mesh, volume, phases = result["mesh"], result["volume"], result["phases"]
    devices = math.prod(mesh.values())
    console.print(
        f"[bold]{result['experiment']}[/bold]: {result['parameters']:,} parameters on {devices} device(s), "
        + ", ".join(f"{name} {size}" for name, size in mesh.items())
    )
    depths, seconds = result["compiled_layers"], sum(phase["compile_s"] for phase in phases.values())
    if depths == [result["layers"]]:
        console.print(f"Compiled whole, all {result['layers']} layers, in {seconds:.0f} s.")
    else:
        console.print(
            f"Compiled with {depths[0]} and {depths[1]} of {result['layers']} layers in {seconds:.0f} s; operations "
            "and communication are the line through both, which is exact. --full compiles all layers."
        )
    console.print(
        f"A batch is taken to be {volume['attempts']:,} attempts of {volume['tokens']:,} tokens, "
        f"{100 * volume['sampled']:.0f} % of them sampled (--attempt-tokens, --sampled), which fill "
        f"{volume['micro_batches']} micro-batches an update. ELPO's shared prefixes make it less.\n"
    )

    memory = Table("bytes per device", "", title="Memory", title_justify="left")
    for name, size in result["resident_bytes"].items():
        memory.add_row(name, _bytes(size))
    for name, phase in phases.items():
        memory.add_row(f"working memory, {name}", _bytes(phase["working_bytes"]))
    memory.add_row("working memory, fork", _bytes(result["staged_bytes"]))
    memory.add_row("[bold]at most at once[/bold]", f"[bold]{_bytes(result['peak_bytes'])}[/bold]")
    console.print(memory)
    chips = list(phases["update"]["seconds"])
    for word, good in (("Fits", True), ("Does not fit", False)):
        if names := [name for name in chips if (result["peak_bytes"] <= CHIPS[name].memory) == good]:
            console.print(f"{word}: " + ", ".join(f"{name} ({_bytes(CHIPS[name].memory)})" for name in names))
    checks = ", ".join(
        f"{name} {_bytes(phase['check']['by_hand'])} and {_bytes(phase['check']['compiled'])}"
        for name, phase in phases.items()
    )
    console.print(
        f"Working memory is counted by hand. With {phases['update']['check']['layers']} layers the count and the "
        "program compiled for CPUs, which keep bfloat16 as float32 and order the work of deep networks badly, say: "
        f"{checks}.\n"
    )

    flops = Table(
        "per device and call", "calls", "compiled", "by hand", "XLA", title="Operations", title_justify="left"
    )
    for name, phase in phases.items():
        values = (_si(phase["flops"][key]) for key in ("compiled", "by_hand", "xla"))
        flops.add_row(name, f"{phase['calls']:,.0f}", *values)
    console.print(flops)
    console.print(
        "Calls are those of one batch: optimizer steps, full prefills "
        f"({volume['prefill']}), tokens decoded by every slot. XLA's own count takes the body of a loop once.\n"
    )

    for name, phase in phases.items():
        if (ratio := phase["flops"]["compiled"] / phase["flops"]["by_hand"]) > 1.05:
            console.print(
                f"[yellow]{name}: {ratio:.2f} times what is needed, for devices along an axis repeat work that is not "
                "split over it.[/yellow]\n"
            )

    network = Table("per device and call", "kind", "count", "bytes", "sent", title="Collectives", title_justify="left")
    for name, phase in phases.items():
        for kind, t in phase["collectives"].items():
            network.add_row(name, kind, f"{t['count']:,.0f}", _bytes(t["bytes"]), _bytes(t["sent"]))
        if not phase["collectives"]:
            network.add_row(name, "none", "", "", "")
    console.print(network)
    console.print(
        "CPUs gather and reduce in float32, and reduce whole gradients where accelerators scatter them: at most.\n"
    )
    if unknown := [name for name, phase in phases.items() if phase["unknown_loops"]]:
        console.print(f"[yellow]In {', '.join(unknown)} a loop of unknown length counts once.[/yellow]\n")

    times = Table("chip", *PHASES, "batch", title="Seconds per batch, at least", title_justify="left")
    for chip in chips:
        by_phase = [phases[name]["seconds"][chip] for name in PHASES]
        cells = (f"{entry['batch']:,.1f} ({entry['bound']})" for entry in by_phase)
        times.add_row(chip, *cells, f"{sum(entry['batch'] for entry in by_phase):,.1f}")
    console.print(times)
    console.print("All at the chip's peaks, all that can overlap overlapped; expect two to three times as much.\n")

    room = Table("fsdp x tensor", "bytes", *chips, title=f"Which meshes fit ({devices} devices)", title_justify="left")
    for name, entry in result["fits"].items():
        room.add_row(name, _bytes(entry["bytes"]), *("yes" if chip in entry["fits"] else "no" for chip in chips))
    room.add_section()
    room.add_row("fewest devices", "", *(result["smallest"][chip] or "none of 1024" for chip in chips))
    console.print(room)
    console.print(
        "Counted by hand, with micro-batches, slots and parked rows raised to what the rows' parts can share."
    )


def _si(value: float) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    return f"{_si(value)}B"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", help="a Python file with get_config()")
    parser.add_argument("--mesh", help="8 (fsdp), 2x4 (fsdp x tensor) or data=2,fsdp=2,tensor=2; else the config's")
    parser.add_argument("--chip", help=f"only this one of {', '.join(CHIPS)}")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--attempt-tokens", type=int, help="mean tokens of an attempt; else 0.4 of the context")
    parser.add_argument("--sampled", type=float, default=0.75, help="share of them that the model samples")
    parser.add_argument("--full", action="store_true", help=f"compile all layers, not {DEPTHS[0]} and {DEPTHS[1]}")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write everything there")
    options = parser.parse_args(arguments)
    try:
        config = override(load(options.experiment), options.assignments)
        chip = {name.lower(): name for name in CHIPS}.get((options.chip or "").lower())
        if options.chip is not None and chip is None:
            raise ConfigError(f"unknown chip {options.chip!r}: there are {', '.join(CHIPS)}")
        if options.json and not options.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}")
        volume = make_volume(config, options.attempt_tokens, options.sampled)
        sizes = config.mesh if options.mesh is None else parse_mesh(options.mesh)
        sizes = dataclasses.replace(sizes, data=max(sizes.data, 1))
        parts = sizes.data * sizes.fsdp
        config.check(parts)
        for name in ("slots", "parking"):
            rows, whole = (getattr(c.sampler, name) for c in (config, fitted(config, parts)))
            if rows != whole:
                raise ConfigError(
                    f"sampler.{name}={rows} cannot be split over mesh.data * mesh.fsdp = {parts}: choose a multiple, "
                    f"as with --set sampler.{name}={whole}"
                )
        mesh = cpu_mesh(sizes)
        whole = options.full or config.model.layers <= 2 * DEPTHS[1]
        depths = (config.model.layers,) if whole else DEPTHS
        chips = list(CHIPS) if options.chip is None else [chip]
        result = plan(config, mesh, volume, chips, depths)
        if options.json:
            partial = options.json.with_name(options.json.name + ".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(options.json)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def make_volume(config: Config, tokens: int | None, sampled: float) -> Volume:
    """What a batch of the experiment amounts to; ConfigError where the guesses cannot be."""
    context = config.sampler.context
    tokens = max(1, round(0.4 * context)) if tokens is None else tokens
    if not 1 <= tokens <= context:
        raise ConfigError(f"--attempt-tokens {tokens} must be at least 1 and at most sampler.context={context}")
    if not 0 <= sampled <= 1:
        raise ConfigError(f"--sampled {sampled:g} must be between 0 and 1")
    return Volume(config.rl.prompts * config.algo.search.budget, tokens, sampled)


def cpu_mesh(sizes: MeshConfig) -> Mesh:
    """A mesh over that many CPU devices, whatever else the machine has; before JAX has made its own."""
    count = sizes.data * sizes.fsdp * sizes.tensor
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return make_mesh(sizes, jax.devices("cpu")[:count])


if __name__ == "__main__":
    sys.exit(main())
