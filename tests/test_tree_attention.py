"""Attention over trees against float64 NumPy, forward and backward, and its other implementations against the first.

The kernels for TPUs are run by Pallas' interpreter; that they lower to Mosaic is all that is known of a real one.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from elpo_jax.model import tree_attention, tree_kernel
from elpo_jax.model.tree_attention import attend
from elpo_jax.train.mesh import MeshConfig, make_mesh


def random_ends(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Rows of several random trees in depth-first order, and of padding behind them."""
    ends = np.zeros((rows, length), np.int32)

    def grow(row: int, start: int, stop: int) -> None:
        """A chain from `start`, behind which the columns up to `stop` are split among its branches."""
        trunk = int(rng.integers(1, stop - start + 1))
        ends[row, start : start + trunk] = stop
        start += trunk
        while start < stop:
            branch = int(rng.integers(1, stop - start + 1))
            grow(row, start, start + branch)
            start += branch

    for row in range(rows):
        start, used = 0, int(rng.integers(0, length + 1))
        while start < used:
            tree = int(rng.integers(1, used - start + 1))
            grow(row, start, start + tree)
            start += tree
    return ends


def random_inputs(rng, rows, tokens, heads, kv_heads, width):
    """q, k and v as `attend` takes them, and a gradient by the output."""
    shapes = (rows, tokens, heads, width), (rows, kv_heads, width, tokens), (rows, kv_heads, tokens, width)
    return [rng.normal(size=shape).astype(np.float32) for shape in (*shapes, shapes[0])]


@functools.partial(jax.jit, static_argnums=5)
def with_gradient(q, k, v, slope, ends, implementation="blocks"):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, ends, implementation), q, k, v)
    return out, *pull(slope)


def reference(q, k, v, slope, ends):
    """The same in float64, head by head; of the gradients by k and v the sums over a group's heads."""
    results = [np.zeros(x.shape) for x in (q, q, k, v)]
    rows, _, heads, _ = q.shape
    for row in range(rows):
        for head in range(heads):
            shared = head // (heads // k.shape[1])
            one = (x.astype(np.float64) for x in (q[row, :, head], k[row, shared].T, v[row, shared]))
            parts = numpy_model.tree_attention(*one, ends[row], slope[row, :, head].astype(np.float64))
            results[0][row, :, head], results[1][row, :, head] = parts[:2]
            results[2][row, shared] += parts[2].T
            results[3][row, shared] += parts[3]
    return results


def close(ours, theirs):
    for mine, exact in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("tokens", "block"), [(1, 1), (7, 4), (16, 16), (33, 16), (50, 7)])
def test_any_trees_equal_float64_numpy(tokens, block, monkeypatch):
    """Lengths that the block does and does not divide; one row's blocks are another's gaps."""
    monkeypatch.setattr(tree_attention, "block_length", lambda tokens: -(-tokens // -(-tokens // block)))
    with_gradient.clear_cache()  # once: seeds share a shape, and what is compiled for it
    for seed in range(10):
        rng = np.random.default_rng((seed, tokens))
        ends, inputs = random_ends(rng, 3, tokens), random_inputs(rng, 3, tokens, 4, 2, 8)
        close(with_gradient(*inputs, ends), reference(*inputs, ends))


@pytest.mark.parametrize(("tokens", "block"), [(1, 1), (512, 128), (513, 57), (1152, 64), (8192, 64), (8320, 128)])
def test_blocks_are_small_where_rows_hold_trees_and_equally_long(tokens, block):
    assert tree_attention.block_length(tokens) == block


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_groups_of_heads_and_the_length_of_real_blocks(heads, kv_heads):
    rng = np.random.default_rng(heads)
    ends, inputs = random_ends(rng, 2, 300), random_inputs(rng, 2, 300, heads, kv_heads, 4)
    close(with_gradient(*inputs, ends), reference(*inputs, ends))


def test_queries_that_see_nothing_give_zero_and_take_no_gradient():
    inputs = random_inputs(np.random.default_rng(0), 2, 40, 2, 1, 8)
    ends = np.stack([np.zeros(40, np.int32), np.where(np.arange(40) < 10, 10, 0).astype(np.int32)])
    out, *gradients = with_gradient(*inputs, ends)
    assert not np.any(out[0]) and not np.any(out[1, 10:]) and np.all(np.any(out[1, :10], axis=(1, 2)))
    assert all(np.isfinite(g).all() and not np.any(g[0]) for g in gradients)


def test_blocks_that_nobody_sees_are_not_computed():
    """A trunk of one block and six branches of one block each: every branch meets the trunk and itself."""
    ends = np.concatenate([np.full(16, 112), 16 * np.repeat(np.arange(2, 8), 16)])[None].astype(np.int32)
    pairs, needed = tree_attention._visible_blocks(ends, 16)
    found = {tuple(pair) for pair in np.asarray(pairs)[: int(needed)].tolist()}
    assert found == {(i, 0) for i in range(7)} | {(i, i) for i in range(7)}
    # What another row needs is computed for both; padding needs nothing.
    chain = np.where(np.arange(112) < 48, 48, 0)[None].astype(np.int32)
    _, alone = tree_attention._visible_blocks(chain, 16)
    _, both = tree_attention._visible_blocks(np.concatenate([ends, chain]), 16)
    assert (int(alone), int(both)) == (6, 13 + 1)


def test_the_backward_pass_holds_no_scores():
    rows, tokens, heads, width = 2, 2048, 4, 16
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_inputs(np.random.default_rng(0), 2, 8, 4, 2, 16)]
    shapes = [jax.ShapeDtypeStruct([tokens if n == 8 else n for n in x.shape], x.dtype) for x in shapes]
    ends = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    compiled = with_gradient.lower(*shapes, ends).compile()
    activations = 4 * rows * heads * tokens * width
    scores = 4 * rows * heads * tokens * tokens
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * activations < scores / 4


# Other implementations


@pytest.mark.parametrize(
    ("tokens", "block", "heads"), [(5, 8, (4, 2)), (16, 16, (3, 1)), (41, 8, (3, 1)), (48, 16, (4, 2))]
)
def test_the_kernels_equal_the_portable_path(tokens, block, heads, monkeypatch):
    """Forward and backward, lengths that the block does not divide, padding, trees that begin within a block."""
    monkeypatch.setattr(tree_kernel, "BLOCK", block)
    with_gradient.clear_cache()
    for seed in range(5):
        rng = np.random.default_rng((seed, tokens))
        ends, inputs = random_ends(rng, 3, tokens), random_inputs(rng, 3, tokens, *heads, 8)
        close(with_gradient(*inputs, ends, "pallas"), with_gradient(*inputs, ends))


def test_the_kernels_in_bfloat16_are_near():
    rng = np.random.default_rng(0)
    ends, inputs = random_ends(rng, 2, 300), random_inputs(rng, 2, 300, 4, 2, 16)
    half = [x.astype(jnp.bfloat16) for x in inputs]
    for ours, theirs in zip(with_gradient(*half, ends, "pallas"), with_gradient(*inputs, ends), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.03 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_lower_for_a_tpu(dtype):
    rows, kv_heads, group, tokens, width = 2, 2, 4, 2 * tree_kernel.BLOCK, 128
    q, k, v = (rows, kv_heads, group, tokens, width), (rows, kv_heads, width, tokens), (rows, kv_heads, tokens, width)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, v)]

    def both(q, k, v, ends):
        out, pull = jax.vjp(lambda q, k, v: tree_kernel.attend_blocks(q, k, v, ends), q, k, v)
        return pull(out)

    lowered = (
        jax.jit(both).trace(*shapes, jax.ShapeDtypeStruct((rows, tokens), jnp.int32)).lower(lowering_platforms=("tpu",))
    )
    assert lowered.as_text().count("tpu_custom_call") == 3  # forward, by queries, by keys and values


def on_meshes():
    """What runs on four devices: the kernels on each one's rows and heads, and their lowering for a TPU."""
    rng = np.random.default_rng(0)
    ends, inputs = random_ends(rng, 4, 40), random_inputs(rng, 4, 40, 4, 2, 8)
    expected = with_gradient(*inputs, ends)
    tree_kernel.BLOCK = 16

    def in_a_shard(*arrays):  # as where copies of the parameters add up their gradients on their own
        rows = PartitionSpec("data")
        return jax.shard_map(
            functools.partial(with_gradient, implementation="pallas"),
            in_specs=rows,
            out_specs=rows,
            axis_names={"data"},
            check_vma=False,
        )(*arrays)

    for sizes in ((4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)):  # two heads for four devices: each takes both
        mesh = make_mesh(MeshConfig(*sizes))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        with jax.set_mesh(mesh):
            for function in (functools.partial(with_gradient, implementation="pallas"), in_a_shard):
                run = jax.jit(function, in_shardings=rows, out_shardings=rows)
                close(run(*inputs, ends), expected)

        with jax.set_mesh(mesh):  # a batch that no axis splits
            odd = [x[:3] for x in (*inputs, ends)]
            close(jax.jit(functools.partial(with_gradient, implementation="pallas"))(*odd), with_gradient(*odd))

    tree_kernel.BLOCK, jax.default_backend = 128, lambda: "tpu"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_inputs(rng, 4, 256, 4, 2, 128)]
    mesh = make_mesh(MeshConfig(2, 1, 2))
    with jax.set_mesh(mesh):
        run = jax.jit(in_a_shard, in_shardings=NamedSharding(mesh, PartitionSpec("data")))
        traced = run.trace(*shapes, jax.ShapeDtypeStruct((4, 256), jnp.int32))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3
    print("kernels on meshes")


def test_each_device_of_a_mesh_runs_the_kernels_on_its_own_rows_and_heads():
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    code = "import jax; jax.config.update('jax_num_cpu_devices', 4); import test_tree_attention as t; t.on_meshes()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "kernels on meshes" in done.stdout, done.stderr[-3000:]


def test_the_table_of_blocks_names_each_row_its_own():
    """A chain of three blocks beside a trunk with two branches: the second branch does not see the first."""
    ends = np.stack([np.full(24, 24), np.repeat([24, 16, 24], 8)]).astype(np.int32)
    visible = tree_kernel._visible(jnp.asarray(ends), 8)
    table, counts = tree_kernel._table(visible)
    np.testing.assert_array_equal(counts, [[1, 2, 3], [1, 2, 2]])
    np.testing.assert_array_equal(table[1], [[0, 0, 0], [0, 1, 1], [0, 2, 2]])  # the last one is repeated
    by_keys, counts = tree_kernel._table(visible.swapaxes(1, 2))
    np.testing.assert_array_equal(counts, [[3, 2, 1], [3, 1, 1]])
    np.testing.assert_array_equal(by_keys[1, 0], [0, 1, 2])


def test_the_library_is_given_the_same_mask():
    """What cuDNN would be asked for, computed by XLA; a query that sees nothing is nobody's business."""
    rng = np.random.default_rng(1)
    ends, inputs = random_ends(rng, 3, 40), random_inputs(rng, 3, 40, 4, 2, 8)
    inputs[3] *= (ends > 0)[:, :, None, None]
    ours, theirs = with_gradient(*inputs, ends, "xla"), with_gradient(*inputs, ends)
    close([ours[0] * (ends > 0)[:, :, None, None], *ours[1:]], theirs)
