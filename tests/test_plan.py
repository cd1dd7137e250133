"""The planner against what really lies on devices, what is counted by hand here, and what the paper prints.

Eight CPU devices need a process of their own; it runs the command line once, and the tests look at what it saw.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from elpo_jax.config import Config, RlConfig, SftConfig
from elpo_jax.model import cache as kv
from elpo_jax.model.config import ModelConfig, count_params
from elpo_jax.model.transformer import init
from elpo_jax.overrides import load, override
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import SamplerConfig, most_copies
from elpo_jax.train.mesh import MeshConfig, make_mesh
from experiments import footprint, plan
from experiments.chips import CHIPS, Chip
from experiments.footprint import Volume, abstract_mesh
from experiments.hlo import Traffic, work_of
from experiments.paper.evaluation import COLUMNS

ROOT = pathlib.Path(__file__).parents[1]
PAPER = ROOT / "experiments" / "paper"
TINY = Config(
    name="tiny",
    model=ModelConfig(
        vocab_size=256, d_model=64, layers=6, heads=4, kv_heads=2, head_dim=16, d_ff=128, qkv_bias=True, tied=False
    ),
    sampler=SamplerConfig(
        slots=16, group=8, parking=8, context=128, steps_per_visit=4, prefill_buckets=(64,), prefill_rows=(8,)
    ),
    rl=RlConfig(prompts=8, updates=2, micro_rows=8, row_tokens=128),
    sft=SftConfig(rows=8, micro_rows=8),
)

EIGHT_DEVICES = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from experiments import plan
assert plan.main([sys.argv[2], "--mesh", "4x2", "--json", sys.argv[3]]) == 0

import jax
import jax.numpy as jnp
from elpo_jax.overrides import load
from elpo_jax.rollout import decode
from elpo_jax.rollout.sampler import Sampler, most_copies
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.state import init_state
from experiments import footprint
config, mesh = load(sys.argv[2]), make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
def held(tree):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == jax.devices()[3]]
    return sum(s.data.nbytes for s in shards)
with jax.set_mesh(mesh):
    state = init_state(config.model, footprint.rl_optimizer(config), jax.random.key(0), mesh)
    sampler = Sampler(config.model, config.sampler, (0,), 0, mesh)
    sampler.load(state.params, 0)
    begun = jax.tree.map(lambda x: x.copy(), state.params)
real = {"parameters": held(state.params), "optimizer": held(state.opt_state), "cold start's parameters": held(begun),
        "sampler's parameters": held(sampler._params), "KV cache": held(sampler._state[:2])}
lines = {}
for phase in plan.PHASES:
    depths = {n: plan.compile_phase(phase, plan.of_depth(config, n), mesh, 4) for n in plan.DEPTHS}
    line = plan.extrapolate(depths, config.model.layers)
    counts = {kind: t.count for kind, t in line.traffic.items()}
    lines[phase] = {"flops": line.flops, "arguments": line.arguments, "traffic": counts, "sent": line.sent}

slots = config.sampler.slots
copies = jax.ShapeDtypeStruct((most_copies(config.sampler, slots // footprint.slot_group(config, mesh)), 4), jnp.int32)
fork = decode.make_fork(config.model, mesh).lower(footprint.sampler_state(config, mesh), copies).compile()
staged = [fork.memory_analysis().temp_size_in_bytes, footprint.staged(config, mesh)]

mesh = make_mesh(MeshConfig(data=8))
copies = plan.compile_phase("update", plan.of_depth(config, 2), mesh, 4)
copies = {kind: [t.payload, t.sent] for kind, t in copies.traffic.items()}
pathlib.Path(sys.argv[4]).write_text(json.dumps({"real": real, "lines": lines, "copies": copies, "staged": staged}))
"""


def get_config() -> Config:
    """Makes this file an experiment that the command line can plan."""
    return TINY


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(the plan, what its process saw beside it, what it printed)"""
    folder = tmp_path_factory.mktemp("plan")
    paths = [pathlib.Path(__file__), folder / "plan.json", folder / "seen.json"]
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, str(ROOT), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(paths[1].read_text()), json.loads(paths[2].read_text()), done.stdout


@pytest.fixture(scope="module")
def one():
    """The three programs of TINY on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return {phase: plan.compile_phase(phase, TINY, mesh, 4) for phase in plan.PHASES}


def test_bytes_are_those_of_the_arrays_that_a_run_has_on_a_device(eight):
    result, seen, _ = eight
    assert result["resident_bytes"] == seen["real"]
    # Moments twice the parameters, and two int32 counts of optax.
    assert seen["real"]["optimizer"] == 2 * seen["real"]["parameters"] + 8


def test_the_compiled_step_is_given_the_state_and_the_batch_and_nothing_else(eight):
    result, seen, _ = eight
    # 12 arrays of 4 bytes, 4 micro-batches, 8 rows over 4 parts; 8 scalars, two counts and a key of 2 words
    batch = 12 * 4 * 4 * 2 * 128
    rest = result["phases"]["update"]["argument_bytes"] - batch
    rest -= seen["real"]["parameters"] + seen["real"]["optimizer"]
    assert 0 <= rest <= 128


def test_operations_are_those_of_a_count_by_hand(one):
    """6 N for a token and the matrices, 12 H head_dim for every pair of query and key."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init(TINY.model, jax.random.key(0))))
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves if leaf.ndim == 2}
    matrices, tokens = sum(sizes.values()) - sizes["['embed']"], 4 * 8 * 128
    pairs = 4 * 8 * 128 * 128  # a single block
    count = 6 * matrices * tokens + 6 * 12 * 4 * 16 * pairs
    assert one["update"].flops == pytest.approx(count, rel=0.01)
    token = 16 * (2 * matrices + 6 * 4 * 4 * 16 * 2 * 128)  # 16 slots that read 128 columns of rows and of trunks
    assert one["decode"].flops == pytest.approx(4 * token, rel=0.01), "4 steps of a burst"
    assert one["decode"].counted_once < 0.5 * one["decode"].flops, "XLA counts the body of the loop once"
    for phase, by_hand in plan.by_hand(TINY, abstract_mesh((1, 1, 1)), 4).items():
        times = 4 if phase == "decode" else 1
        assert times * by_hand.flops == pytest.approx(one[phase].flops, rel=0.01), phase
    assert not any(program.unknown_loops for program in one.values())


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_working_memory_by_hand_is_near_what_the_compiler_takes(remat):
    """In float32, which CPUs keep, and where attention scores rule, as they do at a length worth planning for."""
    config = dataclasses.replace(
        plan.of_depth(TINY, 2),
        sampler=dataclasses.replace(TINY.sampler, context=1024, prefill_buckets=(256,)),
        rl=dataclasses.replace(TINY.rl, row_tokens=1024),
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for phase in ("update", "prefill")[: 2 if remat == "none" else 1]:
        compiled, count = plan.compile_phase(phase, config, mesh, 2), plan.by_hand(config, mesh, 2)[phase]
        assert count.working == pytest.approx(compiled.temporary, rel=0.25), phase
        assert count.flops == pytest.approx(compiled.flops, rel=0.01), "also what is computed again"


@pytest.mark.parametrize("limit", [0, 2**28])  # one layer at a time, and all at once
def test_what_a_fork_stages_is_what_the_compiler_takes(limit, monkeypatch):
    monkeypatch.setattr(kv, "STAGED_BYTES", limit)
    config = dataclasses.replace(TINY, sampler=dataclasses.replace(TINY.sampler, context=1024))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    copies = np.zeros((most_copies(config.sampler, 2), 4), np.int32)
    assert len(copies) == 16 + 2 + 8
    fork = decode.make_fork.__wrapped__(config.model, mesh)  # a function of its own, so that it is traced anew
    temporary = fork.lower(footprint.sampler_state(config, mesh), copies).compile().memory_analysis().temp_size_in_bytes
    counted = footprint.staged(config, mesh)
    assert counted == len(copies) * 2 * 1024 * 2 * 16 * 4 * (6 if limit else 1)
    assert counted <= temporary <= 1.25 * counted


def test_the_most_bytes_at_once_may_be_those_of_a_fork(eight):
    result, seen, _ = eight
    compiled, counted = seen["staged"]
    assert counted == (16 + 4 + 8) * 2 * 128 * 1 * 16 * 4 * 6, (
        "each device has half of the heads, and stages all copies"
    )
    assert counted <= compiled <= 1.25 * counted
    assert result["staged_bytes"] == counted
    # One short row is trained, so that nothing takes as much as the copies.
    sampler = dataclasses.replace(TINY.sampler, context=1024)
    config = dataclasses.replace(TINY, sampler=sampler, rl=RlConfig(micro_rows=1, row_tokens=16))
    mesh = abstract_mesh((1, 1, 1))
    most = max(phase.working for phase in plan.by_hand(config, mesh, 1).values())
    staged = footprint.staged(config, mesh)
    assert staged > most
    assert plan.peak_bytes(config, mesh, 1) == sum(footprint.resident(config, mesh).values()) + staged


def test_the_line_through_two_depths_is_the_whole_network(eight):
    result, seen, _ = eight
    assert result["compiled_layers"] == [6], "few enough layers to compile"
    for phase, line in seen["lines"].items():
        whole, times = result["phases"][phase], 4 if phase == "decode" else 1
        assert line["flops"] == pytest.approx(times * whole["flops"]["compiled"], rel=1e-6)
        assert line["arguments"] == pytest.approx(whole["argument_bytes"], rel=1e-3)
        assert line["traffic"].keys() == whole["collectives"].keys()
        sent = times * sum(entry["sent"] for entry in whole["collectives"].values())
        assert line["sent"] == pytest.approx(sent, rel=0.02)


def test_devices_that_share_talk_and_one_does_not(eight, one):
    assert all(program.traffic == {} and program.sent == 0 for program in one.values())
    result, seen, printed = eight
    assert {"all-gather", "all-reduce"} <= result["phases"]["update"]["collectives"].keys()
    # Copies of the parameters agree on the gradients in float32, once for all 4 micro-batches, and on a few metrics.
    gradients = 4 * count_params(plan.of_depth(TINY, 2).model)
    assert seen["copies"].keys() == {"all-reduce"}
    payload, sent = seen["copies"]["all-reduce"]
    assert gradients <= payload < 1.01 * gradients and sent == pytest.approx(2 * 7 / 8 * payload)
    for word in ("Memory", "Operations", "Collectives", "Seconds per batch", "Which meshes fit", "all 6 layers"):
        assert word in printed


def test_seconds_are_the_slowest_of_three(eight):
    chip = Chip(flops=100.0, memory=1.0, bandwidth=10.0, interconnect=1.0)
    assert plan.roofline(chip, 1000.0, 20.0, 3.0) == (10.0, "compute")
    assert plan.roofline(chip, 1000.0, 200.0, 3.0) == (20.0, "memory")
    assert plan.roofline(chip, 1000.0, 200.0, 30.0) == (30.0, "network")
    result, _, _ = eight
    assert list(result["phases"]["update"]["seconds"]) == list(CHIPS) == ["v5e", "v5p", "v6e", "A100", "H100", "H200"]
    volume = result["volume"]
    assert (volume["attempts"], volume["tokens"]) == (8 * 16, 51)
    assert result["phases"]["decode"]["calls"] == pytest.approx(128 * 51 * 0.75 / 16)
    assert result["phases"]["update"]["calls"] == 2 and volume["micro_batches"] == 4  # 64 attempts in 25.5 rows of 8
    for phase in result["phases"].values():
        for seconds in phase["seconds"].values():
            assert seconds["batch"] == pytest.approx(seconds["call"] * phase["calls"]) and seconds["call"] > 0


def test_meshes_that_fit(monkeypatch):
    volume = Volume(attempts=128, tokens=51, sampled=0.75)
    sizes = {name: entry["bytes"] for name, entry in plan.fits(TINY, volume, 8, ()).items()}
    assert list(sizes) == ["8x1", "4x2", "2x4"], "4 heads cannot be split into 8"
    room = sorted(sizes.values())[1]
    chips = {"exact": Chip(1, room, 1, 1), "smaller": Chip(1, room - 1, 1, 1), "none": Chip(1, 1000.0, 1, 1)}
    monkeypatch.setattr(plan, "CHIPS", chips)
    table = plan.fits(TINY, volume, 8, chips)
    assert sum("exact" in entry["fits"] for entry in table.values()) == 2
    assert sum("smaller" in entry["fits"] for entry in table.values()) == 1
    assert not any("none" in entry["fits"] for entry in table.values())
    smallest = plan.smallest(TINY, volume, chips, most=16)
    assert smallest["none"] is None
    for chip in ("exact", "smaller"):
        fsdp, tensor = map(int, smallest[chip].split("x"))
        assert chip in plan.fits(TINY, volume, fsdp * tensor, chips)[smallest[chip]]["fits"]
        fewer = plan.fits(TINY, volume, fsdp * tensor // 2, chips) if fsdp * tensor > 1 else {}
        assert not any(chip in entry["fits"] for entry in fewer.values())


def test_without_fsdp_the_sampler_has_no_parameters_of_its_own():
    for sizes, copies in (((1, 1, 2), 0), ((2, 1, 1), 0), ((1, 2, 1), 1)):
        mesh = abstract_mesh(sizes)
        resident = footprint.resident(TINY, mesh)
        whole = footprint.bytes_per_device(footprint.sampler_params(TINY, mesh))
        assert resident["sampler's parameters"] == copies * whole


def test_what_cannot_be_planned_is_named_with_a_remedy(tmp_path, capsys):
    for arguments, message in (
        (["--mesh", "3"], "micro_rows=8 cannot be split over mesh.data * mesh.fsdp = 3"),
        (["--mesh", "data=8", "--set", "sampler.slots=12"], "--set sampler.slots=16"),
        (["--mesh", "data=8", "--set", "sampler.parking=12"], "--set sampler.parking=16"),
        (["--mesh", "2x"], "--mesh '2x' is no mesh: give 8 (fsdp)"),
        (["--mesh", "rows=2"], "is no mesh"),
        (["--mesh", "0"], "is no mesh"),
        (["--mesh", ""], "is no mesh"),
        (["--mesh", "2x2x2"], "is no mesh"),
        (["--chip", "v4"], "unknown chip 'v4': there are v5e, v5p, v6e, A100, H100, H200"),
        (["--attempt-tokens", "129"], "at most sampler.context=128"),
        (["--sampled", "1.5"], "between 0 and 1"),
        (["--set", "rl.micro_row=8"], "did you mean 'micro_rows'"),
    ):
        assert plan.main([__file__, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert plan.main([str(tmp_path / "none.py")]) == 2
    assert "no experiment file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("8", (1, 8, 1)), ("2x4", (1, 2, 4)), ("data=2,fsdp=2,tensor=2", (2, 2, 2)), ("tensor=4", (1, 1, 4))],
)
def test_meshes_in_words(text, sizes):
    mesh = plan.parse_mesh(text)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == sizes


HLO = """HloModule jit_f, entry_computation_layout={()->f32[]}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[4,8]) -> f32[4,16] {
  %p = f32[4,8]{1,0} parameter(0)
  %c = f32[8,16]{1,0} constant({...})
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %v = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %f = f32[4,16]{1,0} fusion(%v), kind=kOutput, calls=%fused
  %g = bf16[8,8]{1,0} all-gather(%v), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %v)
}

%cond (s: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[4,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  %in = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%in), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %other = (s32[], f32[4,8]{1,0}) while(%in), condition=%cond, body=%body, backend_config={}
  %r = f32[100]{0} all-reduce(%a), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add.1
  %alone = f32[100]{0} all-reduce(%a), channel_id=3, replica_groups={{0},{1}}, to_apply=%add.1
  %n = f32[10]{0} reduce-scatter(%r), replica_groups=mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}, to_apply=%add.1
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=mesh['x'=2,'y'=8] {'x', 'y':(1)2}, dimensions={0}
  ROOT %p = f32[6]{0} collective-permute(%n), source_target_pairs={{0,1},{1,0}}
}
"""


def test_a_program_is_read_with_its_loops():
    work = work_of(HLO)
    assert work.flops == (5 + 1) * 2 * 4 * 16 * 8 and work.unknown_loops == 1
    gathered = Traffic(6, 6 * 128, 6 * 128 * 3 / 4) + Traffic(1, 64, 64 * 3 / 4)  # groups of 4: tiled; 2 of x, 2 of y
    assert work.traffic["all-gather"] == gathered
    assert work.traffic["all-reduce"] == Traffic(1, 400, 400), "the one without company is none"
    assert work.traffic["reduce-scatter"] == Traffic(1, 160, 120)
    assert work.traffic["collective-permute"] == Traffic(1, 24, 24)
    with pytest.raises(ValueError, match="groups of a collective"):
        work_of(HLO.replace("{{0,1},{2,3}}", "somewhere"))
    with pytest.raises(ValueError, match="no ENTRY"):
        work_of("nothing")


# From the paper: section 5.3, Table 2 and eq. 1, 7 and 8 (the std by its Figure 4).
PUBLISHED = {
    "rl.prompts": 128,
    "rl.steps": 30000 // 128,
    "sampler.context": 20480,
    "algo.kl": 0.0,
    "algo.search.budget": 16,
}
PUBLISHED_ELPO = {
    "algo.search.buffer": 3,
    "algo.search.x_min": 1,
    "algo.search.x_max": 3,
    "algo.search.beta": 5.0,
    "algo.search.localizer": "binary",
    "algo.lambda_tree": 0.5,
    "algo.eps_low": 0.2,
    "algo.eps_high": 0.315,
    "algo.eps_elc": 0.115,
    "algo.critical_weight": 1.0,
    "algo.ddof": 0,
    "algo.normalisation": "sequence",
    "algo.prefix_weight": "per_leaf",
}
BASELINES = {
    "grpo": {"algo.eps_low": 0.2, "algo.eps_high": 0.2},
    "dapo": {"algo.eps_low": 0.2, "algo.eps_high": 0.28},
}
FLAT = {
    "algo.search.localizer": "none",
    "algo.lambda_tree": 0.0,
    "algo.eps_elc": 0.0,
    "algo.ddof": 1,
    "algo.normalisation": "token",
}
# Of the published config.json: layers, heads, key/value heads, their width, D, F, V, base of the rotation, parameters.
BACKBONES = {
    "qwen2_5_7b": (28, 28, 4, 128, 3584, 18944, 152064, 1e6, 7_615_616_512),
    "qwen3_4b": (36, 32, 8, 128, 2560, 9728, 151936, 5e6, 4_022_468_096),
}


def value(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("recipe", ["elpo", "grpo", "dapo"])
def test_a_paper_experiment_has_the_published_numbers(recipe, backbone):
    config = override(load(str(PAPER / f"{recipe}_{backbone}.py")), [])
    assert config.check(row_parts=8) is config and config.name == f"{recipe}_{backbone}"
    expected = PUBLISHED | (PUBLISHED_ELPO if recipe == "elpo" else FLAT | BASELINES[recipe])
    assert {key: value(config, key) for key in expected} == expected
    assert config.rl.prompts / config.rl.updates == 16, "PPO mini-batch"
    assert config.sft.steps == 465 and config.rl.epochs == 1, "5 epochs of 93 steps; 1 epoch"
    model = config.model
    shape = (model.layers, model.heads, model.kv_heads, model.head_dim, model.d_model, model.d_ff, model.vocab_size)
    assert (*shape, model.rope_theta, count_params(model)) == BACKBONES[backbone]
    qwen3 = backbone == "qwen3_4b"
    assert (model.qk_norm, model.qkv_bias, model.tied, model.norm_eps) == (qwen3, not qwen3, qwen3, 1e-6)
    assert config.training_families == ("open_agentrl_30k",), "test sets are for tests"


def test_every_paper_experiment_is_tested():
    names = {path.stem for path in PAPER.glob("*.py")} - {"__init__", "common", "backbones", "evaluation"}
    assert names == {f"{job}_{backbone}" for job in ("elpo", "grpo", "dapo", "evaluate") for backbone in BACKBONES}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_evaluation_measures_every_column_by_its_protocol_and_trains_nothing(backbone):
    trained, config = (load(f"experiments/paper/{job}_{backbone}.py") for job in ("elpo", "evaluate"))
    assert config.check(row_parts=8).recipes == () and config.sft.steps == 0
    assert config.tasks.families == tuple(column.dataset for column in COLUMNS.values())
    assert config.eval == trained.eval and config.eval.tasks == 5000
    for column in COLUMNS.values():
        dataset = config.tasks.of(column.dataset)
        assert dataset == trained.tasks.of(column.dataset)
        assert (dataset.k, dataset.rows, dataset.use) == (column.k, column.rows, "test")


def test_the_columns_of_table_1_are_those_of_the_paper():
    printed = {
        "AIME24": (48.1, 74.3),
        "AIME25": (31.1, 69.4),
        "MATH500": (89.4, 89.6),
        "GSM8K": (92.8, 94.5),
        "MATH": (91.2, 92.8),
        "GPQA-D": (52.7, 59.1),
        "LCB-v6": (19.7, 28.6),
    }
    assert {name: (c.elpo_qwen2_5_7b, c.elpo_qwen3_4b) for name, c in COLUMNS.items()} == printed
    means = [sum(figures) / len(printed) for figures in zip(*printed.values(), strict=True)]
    assert [round(mean, 1) for mean in means] == [60.7, 72.6], "the averages that the paper prints"
