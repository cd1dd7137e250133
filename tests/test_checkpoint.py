"""Checkpoints: bit-identical round trips, damage that is found before use, and a kill at any moment."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from elpo_jax.model.config import ModelConfig
from elpo_jax.train.checkpoint import FORMAT, CheckpointError, Checkpoints
from elpo_jax.train.mesh import MeshConfig, make_mesh, shardings
from elpo_jax.train.state import TrainState, init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ModelConfig(vocab_size=32, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=24)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def abstract(config: ModelConfig, mesh) -> TrainState:
    return jax.eval_shape(lambda: init_state(config, OPTIMIZER, jax.random.key(0), mesh))


def make_state(mesh, seed: int) -> TrainState:
    """A state in which every array, moments and counters too, depends on the seed."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if x.dtype == np.float32:
            return rng.normal(size=x.shape).astype(np.float32)
        return rng.integers(1, 1000, x.shape).astype(x.dtype)

    numbers = jax.tree.map(fill, abstract(CONFIG, mesh).replace(key=None)).replace(key=jax.random.key(seed))
    return jax.device_put(numbers, shardings(mesh, numbers))


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    state = state.replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def assert_same(a: TrainState, b: TrainState):
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(value, right[name], err_msg=name)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def two(tmp_path, mesh):
    """A folder with intact checkpoints 10 and 20, and their states."""
    checkpoints = Checkpoints(tmp_path / "c")
    states = {step: make_state(mesh, step) for step in (10, 20)}
    for step, state in states.items():
        checkpoints.save(step, state, {"cursor": step * 3})
    return tmp_path / "c", states


def test_round_trip_is_bit_identical_and_keeps_the_meta(tmp_path, mesh):
    state = make_state(mesh, 1)
    state = state.replace(key=jax.device_put(jax.random.key(5, impl="rbg"), state.key.sharding))
    meta = {"cursor": 7, "config": {"name": "x", "list": [1, 2.5, None]}}
    Checkpoints(tmp_path).save(3, state, meta)
    other = make_state(mesh, 2).replace(key=state.key)
    restored, read = Checkpoints(tmp_path).restore(other, mesh)
    assert_same(restored, state)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    assert float(jax.random.normal(restored.key)) == float(jax.random.normal(state.key))
    assert type(restored.opt_state) is type(state.opt_state)
    assert {k: read[k] for k in meta} == meta and read["step"] == 3 and read["format"] == FORMAT
    assert read["versions"]["jax"] == jax.__version__ and {"python", "flax", "optax", "orbax"} <= set(read["versions"])


def test_an_abstract_state_is_enough(two, mesh):
    folder, states = two
    restored, _ = Checkpoints(folder).restore(abstract(CONFIG, mesh), mesh)
    assert_same(restored, states[20])


def test_keeps_the_newest_and_reads_the_one_asked_for(two, mesh):
    folder, states = two
    checkpoints = Checkpoints(folder)
    checkpoints.save(30, make_state(mesh, 30), {})
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"] and checkpoints.latest() == 30
    restored, meta = checkpoints.restore(states[10], mesh, step=20)
    assert meta["step"] == 20 and meta["cursor"] == 60
    assert_same(restored, states[20])
    only = Checkpoints(folder, keep=1)
    only.save(40, make_state(mesh, 40), {})
    assert [p.name for p in folder.iterdir()] == ["40"]


def test_without_waiting_the_state_may_be_donated_at_once(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path)
    state, same = make_state(mesh, 1), make_state(mesh, 1)
    checkpoints.save(1, state, {}, wait=False)
    assert checkpoints.latest() is None  # not before it is complete
    numbers = state.replace(key=None)
    overwritten = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(numbers)
    assert float(overwritten.params["embed"][0, 0]) == -1
    checkpoints.close()
    assert checkpoints.latest() == 1
    assert_same(checkpoints.restore(same, mesh)[0], same)


def test_the_same_step_again_keeps_the_former_one_aside(two, mesh):
    folder, _ = two
    checkpoints = Checkpoints(folder)
    before = content(folder / "20")
    new = make_state(mesh, 99)
    checkpoints.save(20, new, {})
    assert content(folder / "20.replaced") == before
    assert checkpoints.latest() == 20
    assert_same(checkpoints.restore(new, mesh)[0], new)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, pathlib.Path.unlink])
@pytest.mark.parametrize("which", ["largest", "meta/metadata", "manifest.json"])
def test_a_damaged_newest_is_named_and_passed_over(two, mesh, damage, which):
    folder, states = two
    path = largest(folder / "20") if which == "largest" else folder / "20" / which
    damage(path)
    before = content(folder)
    checkpoints = Checkpoints(folder)
    with pytest.warns(RuntimeWarning, match="falling back to checkpoint 10") as caught:
        restored, meta = checkpoints.restore(states[20], mesh)
    assert meta["step"] == 10
    assert_same(restored, states[10])
    assert str(path) in str(caught[0].message)
    with pytest.raises(CheckpointError, match=str(folder / "20")) as error:
        checkpoints.restore(states[20], mesh, step=20)
    assert "\n" not in str(error.value) and "restore the file from a copy" in str(error.value)
    assert content(folder) == before
    # The run goes on from 10 and comes to step 20 again.
    checkpoints.save(20, states[20], {})
    assert_same(checkpoints.restore(states[10], mesh)[0], states[20])


def test_every_file_is_covered(two, mesh):
    folder, states = two
    for path in sorted(p for p in (folder / "20").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        flip(path)
        with pytest.raises(CheckpointError, match=path.name):
            Checkpoints(folder).restore(states[20], mesh, step=20)
        path.write_bytes(whole)
    assert_same(Checkpoints(folder).restore(states[10], mesh)[0], states[20])


def test_nothing_intact_is_an_error_that_deletes_nothing(two, mesh):
    folder, states = two
    for step in ("10", "20"):
        flip(largest(folder / step))
    before = content(folder)
    with pytest.raises(CheckpointError, match=r"20/.*damaged.*10/.*damaged") as error:
        Checkpoints(folder).restore(states[20], mesh)
    assert "\n" not in str(error.value) and content(folder) == before


def test_a_newer_format_is_an_error_not_a_fallback(two, mesh):
    folder, states = two
    path = folder / "20" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}.*update elpo_jax"):
        Checkpoints(folder).restore(states[20], mesh)


def test_a_missing_checkpoint_and_a_foreign_network_are_errors(two, mesh, tmp_path):
    folder, states = two
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Checkpoints(tmp_path / "nothing").restore(states[20], mesh)
    assert Checkpoints(tmp_path / "nothing").latest() is None and not (tmp_path / "nothing").exists()
    with pytest.raises(CheckpointError, match=r"15/manifest.json is missing"):
        Checkpoints(folder).restore(states[20], mesh, step=15)
    for change, named in (
        ({"d_ff": 48}, r"layers_0/mlp/down is float32\[24, 16\] there and float32\[48, 16\] in this config"),
        ({"layers": 2}, r"layers_1/attn/k is absent there"),
        ({"tied": False}, r"head is absent there"),
        ({"param_dtype": "bfloat16"}, r"embed is float32\[32, 16\] there and bfloat16"),
    ):
        other = dataclasses.replace(CONFIG, **change)
        with pytest.raises(CheckpointError, match=f"another network or optimizer: .*{named}"):
            Checkpoints(folder).restore(abstract(other, mesh), mesh)
    with pytest.raises(ValueError, match="meta keys step"):
        Checkpoints(folder).save(30, states[20], {"step": 1})
    with pytest.raises(ValueError, match="at least one"):
        Checkpoints(folder, keep=0)


def test_a_save_that_failed_half_way_leaves_the_former_one(two, mesh, monkeypatch):
    """Every point between the first byte and the rename, by making each file operation of the end fail in turn."""
    folder, states = two

    def fail(*arguments, **options):
        raise OSError("killed")

    for owner, name in ((json, "dumps"), (pathlib.Path, "write_text"), (pathlib.Path, "rename")):
        checkpoints = Checkpoints(folder)
        checkpoints.save(30, states[10], {}, wait=False)
        checkpoints._writer.wait_until_finished()  # orbax's own files are not what fails here
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="killed"):
                checkpoints.close()
        fresh = Checkpoints(folder)
        assert fresh.latest() == 20
        assert_same(fresh.restore(states[10], mesh)[0], states[20])
    fresh.save(30, states[10], {})
    assert fresh.latest() == 30 and sorted(p.name for p in folder.iterdir()) == ["20", "30"]


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path, mesh):
    """A process that saves without pause is killed; whatever it left, the newest checkpoint is intact and its own."""
    code = (
        "import sys, jax\n"
        "from test_checkpoint import Checkpoints, MeshConfig, make_mesh, make_state\n"
        "mesh = make_mesh(MeshConfig(), jax.devices()[:1])\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "first = (checkpoints.latest() or 0) + 1\n"
        "states = [make_state(mesh, seed) for seed in range(2)]\n"
        "for step in range(first, first + 10000):\n"
        "    checkpoints.save(step, states[step % 2], {'seed': step % 2})\n"
        "    print(step, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    wait = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        announced = int(writer.stdout.readline())
        time.sleep(wait.uniform(0.0, 0.4))
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        announced = int(rest[-1]) if rest else announced
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.latest() in (announced, announced + 1)
        restored, meta = checkpoints.restore(make_state(mesh, 7), mesh, step=checkpoints.latest())
        assert_same(restored, make_state(mesh, meta["seed"]))
