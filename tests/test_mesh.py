"""Sharding by the table, and eight devices against one: the same parameters after the same steps.

The eight CPU devices need a process of their own (their number is fixed when JAX starts); it runs once, writes what it
saw, and the tests look at that.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from elpo_jax.model.cache import new_cache
from elpo_jax.model.config import ROWS, ModelConfig
from elpo_jax.model.logprob import summed_loss
from elpo_jax.model.transformer import apply
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.mesh import AXES, MeshConfig, make_mesh, replicated, shardings
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ModelConfig(
    vocab_size=48,
    d_model=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    d_ff=48,
    qk_norm=True,
    qkv_bias=True,
    tied=False,
)
OPTIMIZER = make_optimizer(OptimizerConfig(lr=1e-2, eps=1e-4), 10)  # a large eps: Adam's first step is a sign otherwise
MESHES = {"1": (1, 1, 1), "8,1,1": (-1, 1, 1), "2,2,2": (2, 2, 2), "1,8,1": (1, 8, 1), "1,1,8": (1, 1, 8)}


def random_batch():
    """Two micro-batches of eight packed rows, of which the loss reads 1 to 14 tokens each, and in a half none."""
    rng = np.random.default_rng(0)
    shape = (2, 8, 16)
    positions = np.tile(np.arange(8, dtype=np.int32), 2)
    read = (np.arange(16) < rng.integers(2, 17, (2, 8, 1))) & (positions > 0)
    read[1, 4:] = False
    return {
        "read": read,
        "tokens": rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32),
        "positions": np.broadcast_to(positions, shape),
        "ends": np.broadcast_to(np.repeat(np.array([8, 16], np.int32), 8), shape),
        "weight": rng.normal(size=shape).astype(np.float32) / 16,
    }


def loss_fn(params, batch, scalars):
    hidden, _ = apply(CONFIG, params, batch["tokens"], batch["positions"], ends=batch["ends"])
    rest = batch["tokens"], scalars["temperature"], batch, scalars
    return summed_loss(weighted, CONFIG, params, hidden, *rest, read=batch["read"], chunk=4)


def weighted(logp, entropy, batch, scalars):
    logp, entropy = (jnp.where(batch["read"], x, 0.0) for x in (logp, entropy))
    return -jnp.sum(batch["weight"] * logp), {"entropy": entropy.sum(), "surprise_max": -logp.min()}


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def communication(compiled) -> list[str]:
    """Kinds of the collectives in a compiled function."""
    return sorted(set(re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", compiled.as_text())))


def decode_communication(mesh) -> list[str]:
    """Collectives of a decode loop whose rows are sharded and whose parameters are not."""
    rows = NamedSharding(mesh, P(ROWS))
    state = jax.eval_shape(lambda: init_state(CONFIG, OPTIMIZER, jax.random.key(0), mesh))
    cache = jax.eval_shape(lambda: new_cache(CONFIG, 16, 32))
    ids = jax.ShapeDtypeStruct((16, 1), jnp.int32)

    def decode(params, cache, tokens, positions):
        def step(carry, _):
            cache, positions = carry
            hidden, cache = apply(CONFIG, params, tokens, positions, cache)
            return (cache, positions + 1), hidden

        return jax.lax.scan(step, (cache, positions), None, length=4)

    jitted = jax.jit(decode, in_shardings=(replicated(mesh), rows, rows, rows), donate_argnums=1)
    return communication(jitted.lower(state.params, cache, ids, ids).compile())


def train_communication(mesh, batch) -> list[str]:
    """Collectives of one micro-batch's gradient."""
    params = jax.eval_shape(lambda: init_state(CONFIG, OPTIMIZER, jax.random.key(0), mesh)).params
    place = shardings(mesh, params)
    gradient = jax.grad(lambda p, b: loss_fn(p, b, {"temperature": 1.0})[0])
    jitted = jax.jit(gradient, in_shardings=(place, NamedSharding(mesh, P(ROWS))), out_shardings=place)
    return communication(jitted.lower(params, jax.tree.map(lambda x: x[0], batch)).compile())


def child(folder: pathlib.Path):
    """What runs on eight devices."""
    report = {}
    batch, scalars = random_batch(), {"temperature": np.float32(0.7)}
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:1] if name == "1" else None)
        state = init_state(CONFIG, OPTIMIZER, jax.random.key(0), mesh)
        start = {f"start:{path}": x for path, x in flat(state.params).items()}
        step = make_train_step(loss_fn, OPTIMIZER, mesh)
        state, metrics = step(state, batch, scalars)
        np.savez(folder / f"{name}.npz", **start, **flat(state.params))
        leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
        report[name] = {
            "metrics": {k: float(v) for k, v in metrics.items()},
            "share": {
                jax.tree_util.keystr(path, simple=True, separator="/"): x.addressable_shards[0].data.size / x.size
                for path, x in leaves
            },
        }
        if name == "2,2,2":
            Checkpoints(folder / "checkpoints").save(1, state, {})
        if name == "1,8,1":
            restored, _ = Checkpoints(folder / "checkpoints").restore(state, mesh)
            np.savez(folder / "restored.npz", **flat(restored.params))
            places = jax.tree.map(lambda x: str(x.sharding), restored)
            assert places == jax.tree.map(lambda x: str(x.sharding), state)
            restored, after = step(restored, batch, scalars)
            state, straight = step(state, batch, scalars)
            report["continued"] = [float(after["loss"]), float(straight["loss"]), int(restored.step)]
        if name in ("8,1,1", "1,8,1"):
            report[name]["train"] = train_communication(mesh, batch)
    report["decode"] = decode_communication(make_mesh(MeshConfig()))
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("eight")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def report_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_eight_devices_equal_one(eight, name):
    one, many = read(eight, "1"), read(eight, name)
    assert one.keys() == many.keys() and len(one) > 30
    for path, expected in one.items():
        if path.startswith("start:"):
            np.testing.assert_array_equal(many[path], expected, err_msg=path)
        else:
            np.testing.assert_allclose(many[path], expected, rtol=1e-5, atol=1e-5, err_msg=path)
            assert np.abs(expected - one[f"start:{path}"]).max() > 1e-3, path  # the step did move it
    for metric, expected in report_of(eight)["1"]["metrics"].items():
        assert report_of(eight)[name]["metrics"][metric] == pytest.approx(expected, rel=1e-5), metric


def test_parameters_and_moments_are_split_as_the_mesh_says(eight):
    report = report_of(eight)
    for name, wanted in {"1": 1.0, "8,1,1": 1.0, "2,2,2": 1 / 4, "1,8,1": 1 / 8, "1,1,8": 1 / 8}.items():
        share = report[name]["share"]
        matrices = [path for path in share if re.search(r"layers_0/mlp/up$|layers_0/attn/q$|embed$|head$", path)]
        assert len(matrices) == 4 * 3  # parameters and both moments
        assert {share[path] for path in matrices} == {wanted}, name


def test_a_checkpoint_moves_to_another_mesh(eight):
    saved, restored = read(eight, "2,2,2"), read(eight, "restored")
    for path, value in restored.items():
        np.testing.assert_array_equal(value, saved[path], err_msg=path)
    after, straight, step = report_of(eight)["continued"]
    assert after == pytest.approx(straight, rel=1e-5) and step == 2


def test_only_parameters_and_sums_travel(eight):
    """Decoding rows exchange nothing; where only rows and parameters are split, no activation changes its device."""
    report = report_of(eight)
    assert report["decode"] == []
    assert report["8,1,1"]["train"] == ["all-reduce"]
    assert "all-gather" in report["1,8,1"]["train"] and "all-to-all" not in report["1,8,1"]["train"]


# The table


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def specs_of(mesh, config=CONFIG) -> dict[str, P]:
    state = jax.eval_shape(lambda: init_state(config, OPTIMIZER, jax.random.key(0), make_mesh(MeshConfig())))
    leaves = jax.tree_util.tree_leaves_with_path(shardings(mesh, state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves}


def test_the_table_places_moments_like_their_parameters():
    specs = specs_of(abstract_mesh(2, 2, 2))
    assert specs["params/layers_0/attn/o"] == P("tensor", "fsdp") and specs["params/embed"][0] == ("tensor", "fsdp")
    assert specs["key"] == specs["step"] == P()
    for path in [path for path in specs if path.startswith("params/")]:
        name = path.removeprefix("params/")
        moments = [spec for other, spec in specs.items() if re.search(rf"opt_state/.*/(mu|nu)/{name}$", other)]
        assert moments == [specs[path]] * 2, path


def test_a_dimension_that_is_not_divisible_is_replicated():
    specs = specs_of(abstract_mesh(1, 3, 5), dataclasses.replace(CONFIG, d_ff=45))
    assert specs["params/layers_0/mlp/up"] == P(None, "tensor")  # 32 / 3, 45 / 5
    assert specs["params/embed"] == P(None, None)  # 48 / 15


def test_an_unmatched_parameter_and_a_wrong_rank_raise():
    mesh = abstract_mesh(1, 1, 1)
    with pytest.raises(ValueError, match=r"no sharding rule matches layers_0/attn/gate of shape \(2, 3\)"):
        shardings(mesh, {"layers_0": {"attn": {"gate": jnp.zeros((2, 3))}}})
    with pytest.raises(ValueError, match="no sharding rule matches reembed"):
        shardings(mesh, {"reembed": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match="names 2 axes but embed has shape"):
        shardings(mesh, {"embed": jnp.zeros(3)})


@pytest.mark.parametrize(
    "config,remedy",
    [
        (MeshConfig(data=3), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 4 .*: set mesh.data=-1"),
        (MeshConfig(fsdp=3), r"does not fit 4 .*: choose mesh.fsdp \* mesh.tensor so that it divides 4"),
        (MeshConfig(tensor=8), "does not fit 4 .* divides 4"),
        (MeshConfig(data=2), "does not fit 4 .*: set mesh.data=-1"),
    ],
)
def test_an_impossible_mesh_says_how_many_devices_there_are(config, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_mesh(config, jax.devices()[:1] * 4)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -2}, {"fsdp": -1}, {"tensor": 0}])
def test_an_impossible_axis_is_named(sizes):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=rf"mesh.{name}={value} is impossible: use at least 1"):
        MeshConfig(**sizes)


def test_the_axes_are_automatic_whatever_their_sizes():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "tensor") and set(mesh.axis_types) == {AxisType.Auto}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    child(pathlib.Path(sys.argv[1]))
