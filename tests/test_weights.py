"""Published checkpoints: equal to transformers on the same weights, bit-identical there and back, bad ones refused."""

import dataclasses
import functools
import gc
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from elpo_jax.model import weights
from elpo_jax.model.config import ModelConfig, RopeScaling, count_params
from elpo_jax.model.hf_config import from_hf, read_eos_ids, read_hf_config, to_hf
from elpo_jax.model.rotary import rotary_angles, rotary_frequencies
from elpo_jax.model.tensorfile import read_header, write_file
from elpo_jax.model.transformer import apply, init, unembed
from elpo_jax.rollout.sampler import Request, Sampler, SamplerConfig
from elpo_jax.train.checkpoint import Checkpoints
from elpo_jax.train.mesh import MeshConfig, make_mesh
from elpo_jax.train.state import init_state
from elpo_jax.train.step import OptimizerConfig, make_optimizer
from elpo_jax.trees.trajectory import Author, Segment

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ModelConfig(
    vocab_size=67, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=24, qk_norm=True, tied=False
)
KINDS = (
    "qwen2",
    "qwen2_tied",
    "qwen2_yarn",
    "qwen3",
    "qwen3_yarn",
    "llama",
    "llama3",
    "llama_linear",
    "mistral",
)


@pytest.fixture(scope="module")
def hf():
    """tests/hf_models.py, which needs torch and transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    import hf_models

    return hf_models


@pytest.fixture(scope="module")
def models(hf):
    return functools.cache(hf.build)


def rows(*lengths, vocab=257, seed=0):
    """Random ids [B, T] of rows of those lengths, padded with -1."""
    ids = np.random.default_rng(seed).integers(0, vocab, (len(lengths), max(lengths))).astype(np.int32)
    return np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], ids, -1)


def our_logits(folder, ids, **changes):
    config = dataclasses.replace(read_hf_config(folder), **changes)
    return np.stack(list(weights.row_logits(config, weights.load(folder, config), ids)))


def same(a, b):
    def equal(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(equal, a, b)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Against transformers, on the same weights


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(hf, models, tmp_path, kind):
    """Both forms of config.json, several files, ragged rows, and positions beyond the original context of 32."""
    model, ids = models(kind), rows(100, 60, 7)
    folder = hf.save(model, tmp_path, shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = our_logits(folder, ids)
    reference = hf.reference_logits(model, ids)
    assert np.abs(ours - reference)[ids >= 0].max() < 2e-5 and np.abs(reference).max() > 3
    assert not ours[ids < 0].any()
    new = read_hf_config(folder)
    hf.to_old_form(folder)
    assert read_hf_config(folder) == new and "rope_parameters" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_are_as_exact_as_transformers(hf, models, tmp_path, kind):
    """An ulp is that of the largest logit. Both round differently inside, so both are measured against float32."""
    folder, ids = hf.save(models(kind), tmp_path, dtype="bfloat16"), rows(100, 60, 7)
    assert read_hf_config(folder).dtype == read_hf_config(folder).param_dtype == "bfloat16"
    real = ids >= 0
    exact = hf.reference_logits(hf.read(folder, "float32"), ids)[real]
    half = hf.reference_logits(hf.read(folder), ids)[real]
    ours = our_logits(folder, ids)[real]
    ulp = 2.0 ** (np.floor(np.log2(np.abs(half).max())) - 7)
    assert np.abs(ours - exact).max() < np.abs(half - exact).max() + 2 * ulp
    assert np.sqrt(np.mean((ours - half) ** 2)) < ulp
    if kind == "qwen3":  # the same file in float32
        wide = our_logits(folder, ids, dtype="float32", param_dtype="float32")[real]
        assert np.abs(wide - exact).max() < 2e-5


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_yarn", "llama3"])
def test_far_positions_equal_transformers(hf, models, tmp_path, kind):
    model = models(kind)
    folder = hf.save(model, tmp_path)
    config = read_hf_config(folder)
    ids = rows(12)
    positions = np.array([[0, 1, 50, 51, 4000, 4001, 16000, 16001, 30000, 32765, 32766, 32767]], np.int32)
    hidden, _ = apply(config, weights.load(folder, config), ids, positions)
    ours = unembed(config, weights.load(folder, config), hidden)
    assert np.abs(ours - hf.reference_logits(model, ids, positions)).max() < 1e-4


@pytest.mark.parametrize("beside", [16, None])
def test_the_original_context_can_stand_beside_the_rope_scaling(hf, models, tmp_path, beside):
    """Some files have it there; where it is nowhere, it is max_position_embeddings."""
    folder, ids = hf.save(models("qwen2_yarn"), tmp_path), rows(100)
    hf.to_old_form(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    values |= {"max_position_embeddings": 64} | ({"original_max_position_embeddings": beside} if beside else {})
    path.write_text(json.dumps(values))
    assert read_hf_config(folder).rope_scaling.original_context == (beside or 64)
    assert np.abs(our_logits(folder, ids) - hf.reference_logits(hf.read(folder), ids)).max() < 2e-5


@pytest.mark.parametrize(
    "theirs",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False},
    ],
    ids=lambda theirs: theirs["rope_type"],
)
def test_rotary_frequencies_equal_transformers(hf, theirs):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for head_dim in (16, 64, 128):
        for theta in (1e4, 1e6):
            scaled = {} if theirs["rope_type"] in ("default", "linear") else {"original_max_position_embeddings": 8192}
            hf_config = LlamaConfig(
                hidden_size=head_dim, num_attention_heads=1, rope_parameters={**theirs, **scaled, "rope_theta": theta}
            )
            reference = LlamaRotaryEmbedding(hf_config)
            config = from_hf(hf_config.to_dict() | {"num_key_value_heads": 1, "architectures": None})
            frequencies, factor = rotary_frequencies(config)
            wanted = reference.inv_freq.numpy()
            assert frequencies.dtype == wanted.dtype and factor == reference.attention_scaling
            np.testing.assert_allclose(frequencies, wanted, rtol=5e-7)
            assert np.mean(frequencies == wanted) >= 0.9
            positions = np.array([[0, 1, 777, 32767]], np.int32)
            ours = np.stack(rotary_angles(config, jnp.asarray(positions)))
            import torch

            both = np.stack([x.numpy() for x in reference(torch.zeros(1), torch.tensor(positions))])
            np.testing.assert_allclose(ours, both[..., : head_dim // 2], atol=1e-4)


def test_greedy_generation_equals_transformers(hf, tmp_path):
    """200 prompts of 1 to 40 tokens; eleven stop ids, by generation_config.json."""
    import torch

    model = hf.build("qwen3", sharpness=4.0)
    stops = list(range(3, 257, 25))
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = 0
    folder = hf.save(model, tmp_path)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 257, length).astype(np.int32) for length in rng.integers(1, 41, 200)]
    width, new = max(map(len, prompts)), 16
    ids, mask = np.zeros((200, width), np.int64), np.zeros((200, width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    out = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = out.sequences[:, width:].numpy()
    eos = read_eos_ids(folder)
    assert eos == tuple(stops)
    config = read_hf_config(folder)
    shapes = SamplerConfig(slots=32, context=64, steps_per_visit=8, prefill_buckets=(40,), prefill_rows=(32,))
    sampler = Sampler(config, shapes, eos, seed=0)
    requests = [Request((Segment(Author.ENVIRONMENT, p),), (0, 0, i, 0), new) for i, p in enumerate(prompts)]
    turns = sampler.generate(weights.load(folder, config), requests, temperature=0.0)
    best = torch.stack(out.logits, 1).topk(2).values
    gaps = (best[..., 0] - best[..., 1]).numpy()
    stopped = 0
    for turn, row, gap in zip(turns, expected, gaps, strict=True):
        assert turn.ids.tolist() == row[: len(turn)].tolist()
        assert len(turn) == new or turn.ids[-1] in eos
        assert gap[: len(turn)].min() > 1e-4  # rounding decided nothing
        stopped += turn.ids[-1] in eos
    assert 10 < stopped < 190


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_tied", "qwen3_yarn", "llama3", "mistral"])
def test_an_export_is_the_same_model_in_transformers(hf, models, tmp_path, kind):
    model, ids = models(kind), rows(50, 9)
    folder = hf.save(model, tmp_path / "a")
    config = read_hf_config(folder)
    params = weights.load(folder, config)
    weights.export(params, config, tmp_path / "b", copy_from=folder, max_shard_bytes=60_000)
    again = read_hf_config(tmp_path / "b")
    assert dataclasses.replace(again, source="") == dataclasses.replace(config, source="")
    same(weights.load(tmp_path / "b", again), params)
    back = hf.read(tmp_path / "b")
    assert str(back.dtype) == "torch.float32"
    assert back.config.max_position_embeddings == 128 and back.config.eos_token_id == model.config.eos_token_id
    np.testing.assert_array_equal(hf.reference_logits(back, ids), hf.reference_logits(model, ids))


# There and back


def make_params(config, seed=0):
    """Random parameters, norms and biases included."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An exported checkpoint in three files, with companions; tests leave it as it is."""
    base = tmp_path_factory.mktemp("weights")
    companions = base / "companions"
    (companions / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "additional_chat_templates/rag.jinja",
        "pytorch_model.bin",
    ):
        (companions / name).write_text(json.dumps({"eos_token_id": [2, 1]}))
    (companions / "config.json").write_text(json.dumps({"eos_token_id": 1, "hidden_act": "gelu"}))
    weights.export(make_params(SMALL), SMALL, base / "hf", copy_from=companions, max_shard_bytes=14_000)
    return base / "hf"


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of it, for damage."""
    return pathlib.Path(shutil.copytree(checkpoint, tmp_path / "hf"))


def test_an_export_is_complete_and_bit_identical(checkpoint):
    assert {path.name for path in checkpoint.glob("model*")} == {
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    }
    assert max(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < 16_000
    assert (checkpoint / "tokenizer.json").exists() and (checkpoint / "additional_chat_templates/rag.jinja").exists()
    assert not (checkpoint / "pytorch_model.bin").exists()
    values = json.loads((checkpoint / "config.json").read_text())
    assert values["hidden_act"] == "silu" and values["eos_token_id"] == 1
    assert read_eos_ids(checkpoint) == (2, 1)
    same(weights.load(checkpoint, read_hf_config(checkpoint)), make_params(SMALL))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_files_are_those_of_the_library(tmp_path, dtype):
    numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.normal(size=s).astype(dtype) for i, s in enumerate([(3, 5), (7,), (600, 9000), (0, 4)])}
    write_file(tmp_path / "ours", {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.values())
    for name, array in numpy.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, arrays[name])
    numpy.save_file(arrays, tmp_path / "theirs")
    assert {n: t.shape for n, t in read_header(tmp_path / "theirs").items()} == {n: a.shape for n, a in arrays.items()}


@pytest.mark.parametrize("stored_as,wanted", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_dtypes_are_cast_as_numpy_does(tmp_path, stored_as, wanted):
    params = make_params(SMALL)
    weights.export(params, SMALL, tmp_path / "a")
    header = read_header(tmp_path / "a" / weights.SINGLE)
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {n: a.astype(np.dtype(stored_as)) for n, a in numpy.load_file(tmp_path / "a" / weights.SINGLE).items()}
    numpy.save_file(tensors, tmp_path / "a" / weights.SINGLE)
    assert header.keys() == tensors.keys()
    config = dataclasses.replace(SMALL, param_dtype=wanted)
    same(
        weights.load(tmp_path / "a", config),
        jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(stored_as).astype(wanted)), params),
    )


def test_import_and_export_on_the_command_line(checkpoint, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert weights.main(["import", str(checkpoint), str(out)]) == 0
    config = read_hf_config(out)
    assert config == dataclasses.replace(SMALL, source=str(out)) and read_eos_ids(out) == (2, 1)
    same(weights.load(out, config), make_params(SMALL))
    half = dataclasses.replace(config, param_dtype="bfloat16")
    same(weights.load(out, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(SMALL)))
    assert weights.main(["export", str(out), str(back), "--max-shard-mb", "1"]) == 0
    same(weights.load(back, read_hf_config(back)), make_params(SMALL))
    assert (back / "tokenizer.json").exists()
    before = content(out)
    assert weights.main(["import", str(checkpoint), str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert content(out) == before
    with pytest.raises(ValueError, match=r"model\.d_ff is 24 there and 32"):
        weights.load(out, dataclasses.replace(config, d_ff=32))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax drops its other reads
def test_a_damaged_import_is_refused_by_name(checkpoint, tmp_path):
    out = tmp_path / "out"
    config = weights.import_checkpoint(checkpoint, out)
    largest = max((out / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data, sums = largest.read_bytes(), (out / "SHA256SUMS").read_text()

    def refused(change, said):
        change()
        with pytest.raises(ValueError, match=said) as error:
            weights.load(out, config)
        assert str(out) in str(error.value) and "import the checkpoint again" in str(error.value)
        largest.write_bytes(data)
        (out / "SHA256SUMS").write_text(sums)

    refused(lambda: largest.write_bytes(data[:-1] + b"\0"), "is damaged .its SHA-256")
    refused(largest.unlink, f"{largest.name} is missing")
    refused((out / "SHA256SUMS").unlink, "SHA256SUMS is missing, or names no files of params/")
    refused(lambda: (out / "SHA256SUMS").write_text(""), "SHA256SUMS is missing, or names no files of params/")
    same(weights.load(out, config), make_params(SMALL))
    # Files that are all there, of another network than model.json says.
    (out / "model.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(config, d_ff=32))))
    config = read_hf_config(out)
    refused(lambda: None, "params does not hold the parameters of its network")
    gc.collect()  # what orbax dropped is warned of here


def test_a_link_to_an_empty_folder_is_filled(checkpoint, tmp_path):
    """And the link stays; a folder that is not empty is as untouched behind a link."""
    (tmp_path / "disk" / "x").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "x")
    weights.export(make_params(SMALL), SMALL, link)
    assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["x"]
    same(weights.load(link, SMALL), make_params(SMALL))
    with pytest.raises(ValueError, match="exists already"):
        weights.import_checkpoint(checkpoint, link)


def test_a_stage_of_a_run_is_exported(tmp_path, capsys):
    """The newest checkpoint or the one asked for, with the network by its meta and the tokenizer of the run."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), 10)
    config = dataclasses.replace(SMALL, layers=1, rope_scaling=RopeScaling("yarn", 2.0, 64))
    # A tokenizer of its own, whatever else is named.
    numbers = {"kind": "bpe", "source": str(tmp_path / "gone")}
    meta = {"config": {"model": dataclasses.asdict(config), "tokenizer": numbers}}
    (tmp_path / "w" / "sft" / "checkpoints").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path / "w" / "elpo" / "checkpoints")
    first = init_state(config, optimizer, jax.random.key(0), mesh)
    states = {1: first, 2: first.replace(params=make_params(config))}
    for step, state in states.items():
        checkpoints.save(step, state, meta)
    (tmp_path / "w" / "tokenizer.json").write_text("{}")
    stage = str(tmp_path / "w" / "elpo")
    assert weights.main(["export", stage, str(tmp_path / "new"), "--dtype", "bfloat16"]) == 0
    assert weights.main(["export", stage, str(tmp_path / "old"), "--step", "1"]) == 0
    assert (tmp_path / "new" / "tokenizer.json").exists()
    same(weights.load(tmp_path / "old", config), states[1].params)
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    assert read_hf_config(tmp_path / "new") == dataclasses.replace(half, source=str(tmp_path / "new"))
    same(weights.load(tmp_path / "new", half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), states[2].params))
    (damaged,) = (path for path in (tmp_path / "w/elpo/checkpoints/2/state/d").iterdir())
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    for arguments, said in (
        ([stage], r"is damaged \(its SHA-256 is not the one recorded\): take another with --step \(1\)"),
        ([stage, "--step", "7"], "has no checkpoint 7: there are 1, 2"),
        ([str(tmp_path / "w" / "sft")], "sft has no checkpoint: this stage made no steps"),
        ([str(tmp_path / "w")], "name one of its stages, .*w/elpo"),
        ([str(tmp_path)], "give the folder of a stage"),
    ):
        assert weights.main(["export", arguments[0], str(tmp_path / "x"), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert re.search(said, error), error
    assert not list(tmp_path.glob("*x*"))


def test_settings_are_those_of_the_weights_and_tokenizers_may_be_anothers(tmp_path, capsys):
    """The folders that a run was given; one that was moved is an error, and can be named."""
    hub, other = tmp_path / "hub", tmp_path / "other"
    config = dataclasses.replace(SMALL, layers=1, source=str(hub))
    weights.export(make_params(config), config, hub)
    values = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 777, "eos_token_id": 5}))
    (hub / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (hub / "tokenizer.json").write_text('"of the weights"')
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gemma2", "max_position_embeddings": 8, "eos_token_id": 1}')
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    (other / "tokenizer.json").write_text('"of another"')
    (other / "chat_template.jinja").write_text("")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(config, make_optimizer(OptimizerConfig(), 10), jax.random.key(0), mesh)
    stages = {}
    for name, source in (("own", ""), ("others", str(other))):
        meta = {"config": {"model": dataclasses.asdict(config), "tokenizer": {"kind": "checkpoint", "source": source}}}
        stages[name] = str(tmp_path / name)
        Checkpoints(tmp_path / name / "checkpoints").save(1, state, meta)

    def exported(stage, *arguments):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert weights.main(["export", stages[stage], str(out), *arguments]) == 0
        values = json.loads((out / "config.json").read_text())
        files = {path.name for path in out.iterdir()} - {"config.json", weights.SINGLE}
        return values["max_position_embeddings"], read_eos_ids(out), (out / "tokenizer.json").read_text(), files

    settings, files = (777, (5, 6)), {"tokenizer.json", "generation_config.json"}
    assert exported("own") == (*settings, '"of the weights"', files)
    assert exported("others") == (*settings, '"of another"', files | {"chat_template.jinja"})
    hub.rename(tmp_path / "moved")
    for stage in stages:
        assert weights.main(["export", stages[stage], str(tmp_path / "x")]) == 2
        error = capsys.readouterr().err
        assert f"there is no folder {hub}" in error and "--copy-from" in error
    assert exported("own", "--copy-from", str(tmp_path / "moved")) == (*settings, '"of the weights"', files)
    assert exported("own", "--copy-from", str(other))[:2] == (32768, (1,))
    with pytest.raises(ValueError, match=r"no folder .*nowhere, .*--copy-from"):
        weights.export(make_params(config), config, tmp_path / "x", copy_from=tmp_path / "nowhere")
    assert not list(tmp_path.glob("*x*"))


def test_logits_on_the_command_line(checkpoint, tmp_path):
    ids = rows(9, 4, vocab=67)
    np.save(tmp_path / "ids.npy", ids)
    command = [sys.executable, "-m", "elpo_jax.model.weights", "logits", checkpoint, "ids.npy", "out.npy"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, our_logits(checkpoint, ids), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "out.npy"]


@pytest.mark.parametrize(
    "ids,said",
    [
        (rows(4, vocab=67).astype(np.float32), "must be integers"),
        (rows(4, vocab=67)[0], "must be integers [B, T], not int32[4]"),
        (np.zeros((2, 0), np.int32), "not int32[2, 0]"),
        (np.array([[1, -1, 2]]), "row 0 of the ids has tokens after padding"),
        (np.array([[1, 67]]), "go from 1 to 67: this network has 0 to 66"),
        (np.array([[1, -2]]), "go from -2 to 1"),
        (None, "not an array"),
    ],
)
def test_bad_ids_are_refused(checkpoint, tmp_path, capsys, ids, said):
    path = tmp_path / "ids.npy"
    if ids is None:
        path.write_text("1 2 3")
    else:
        np.save(path, ids)
    assert weights.main(["logits", str(checkpoint), str(path), str(tmp_path / "out.npy")]) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["ids.npy"]


def test_loading_streams_on_to_a_mesh(tmp_path):
    """In a process of its own: 300 MB in which the last tensors are the largest, and a mesh of four devices."""
    big = ModelConfig(
        vocab_size=64, d_model=1024, layers=2, heads=2, kv_heads=1, head_dim=64, d_ff=24576, param_dtype="bfloat16"
    )
    noise = np.random.default_rng(0).normal(size=1024 * 24576).astype(ml_dtypes.bfloat16)
    places = list(weights._places(big).values())
    (tmp_path / "big").mkdir()
    write_file(
        tmp_path / "big" / weights.SINGLE,
        {place.name: (noise.dtype, place.file_shape) for place in places},
        (noise[: np.prod(place.shape)].reshape(place.file_shape) for place in places),
    )
    (tmp_path / "big" / "config.json").write_text(json.dumps(to_hf(big)))
    config = dataclasses.replace(SMALL, d_model=32, d_ff=40, qkv_bias=True, qk_norm=False)
    weights.export(make_params(config), config, tmp_path / "small", max_shard_bytes=10_000)
    expected = {
        jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree_util.tree_leaves_with_path(make_params(config))
    }
    np.savez(tmp_path / "expected.npz", **expected)
    code = """
import pathlib, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from elpo_jax.model import stored, weights
from elpo_jax.model.hf_config import read_hf_config
from elpo_jax.train.mesh import MeshConfig, make_mesh, shardings

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if name in line)

small, expected = read_hf_config("small"), np.load("expected.npz")
for sizes in ((1, 2, 2), (2, 1, 2), (1, 4, 1), (4, 1, 1)):
    mesh = make_mesh(MeshConfig(*sizes))
    where = shardings(mesh, stored.abstract_params(small))
    params = weights.load("small", small, where)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(np.asarray(x), expected[jax.tree_util.keystr(path)])
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, params, where)))
    if sizes == (1, 2, 2):
        assert {s.data.shape for s in params["layers_0"]["mlp"]["up"].addressable_shards} == {(16, 20)}
    # What a step donates must not be what another device reads.
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0, out_shardings=where)(params)
    for path, x in jax.tree_util.tree_leaves_with_path(doubled):
        np.testing.assert_array_equal(np.asarray(x), 2 * expected[jax.tree_util.keystr(path)])
del params, doubled
big = read_hf_config("big")
before = status("VmRSS")
params = weights.load("big", big)
arrays = sum(x.nbytes for x in jax.tree.leaves(params))
print(status("VmHWM") - before - arrays, arrays, max(x.nbytes for x in jax.tree.leaves(params)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    beyond, arrays, largest = map(int, done.stdout.split())
    assert arrays > 250e6 and largest > 50e6
    assert beyond < 1.5 * largest + 20e6, f"{beyond / 1e6:.0f} MB beyond the arrays"


# What is refused, by name and before a tensor is read


def published(**changes):
    values = to_hf(SMALL) | changes
    return {key: value for key, value in values.items() if value != "absent"}


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported: there are qwen2, qwen3, llama, mistral"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"model_type": "absent"}, "model_type None"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "only Qwen3ForCausalLM is"),
        ({"quantization_config": {"quant_method": "awq"}}, 'quantization_config={"quant_method": "awq"} is not'),
        ({"vision_config": {"depth": 2}}, 'vision_config={"depth": 2} is not'),
        ({"num_experts": 8}, "num_experts=8 is not"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not"),
        ({"attention_bias": True}, "attention_bias=true is not"),
        ({"mlp_bias": True}, "mlp_bias=true is not"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported: only "silu" is'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"model_type": "mistral", "architectures": None}, "sliding_window is absent (which means 4096)"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 4096}, "sliding_window is 4096"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported: there are"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "mrope_section of rope type 'default'"),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale of rope type 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, 'factor="4" of rope type'),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "model.rope_scaling.factor must be a number of at least 1"),
        ({"rope_scaling": [4.0]}, "the rope scaling [4.0] is damaged"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters and rope_scaling disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention of rope type 'default'"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        ({"hidden_size": "16"}, "model.d_model must be a positive integer, not '16'"),
        ({"num_key_value_heads": 3}, "model.heads=4 is not a multiple of model.kv_heads=3"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings="false" is damaged'),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6" is damaged: it is a number'),
        ({"rope_theta": "1e6"}, 'rope_theta="1e6" is damaged: it is a number'),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta=true is damaged: it is a number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, said):
    """There are no weights in the folder: they are not looked for."""
    (tmp_path / "config.json").write_text(json.dumps(published(**changes)))
    for refuse in (read_hf_config, lambda folder: weights.load(folder, SMALL)):
        with pytest.raises(ValueError) as error:
            refuse(tmp_path)
        assert said in str(error.value) and str(tmp_path / "config.json") in str(error.value)


def test_published_configs_are_read():
    """The config.json files of three published checkpoints, but for what concerns no network."""
    common = {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "bfloat16"}
    qwen2_5_7b = {
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584},
        **{"intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
        **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False, "sliding_window": 131072},
        **{"max_position_embeddings": 32768, "max_window_layers": 28, "use_sliding_window": False},
    }
    qwen3_4b = {
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560},
        **{"intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-06, "rope_theta": 5000000, "tie_word_embeddings": True, "sliding_window": None},
        **{"head_dim": 128, "attention_bias": False, "rope_scaling": None, "max_window_layers": 36},
        **{"max_position_embeddings": 262144, "use_sliding_window": False},
    }
    llama3_1_8b = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096},
        **{"intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "pretraining_tp": 1},
        **{"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 131072},
    }
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    llama3_1_8b["rope_scaling"] = scaling | {"original_max_position_embeddings": 8192}
    for values, parameters in (
        (qwen2_5_7b, 7_615_616_512),
        (qwen3_4b, 4_022_468_096),
        (llama3_1_8b, 8_030_261_248),
    ):
        config = from_hf(common | values)
        assert count_params(config) == parameters and config.dtype == "bfloat16"
        assert from_hf(to_hf(config)) == config
    assert from_hf(llama3_1_8b).rope_scaling == RopeScaling("llama3", 8.0, 8192)
    # The long-context setting that Qwen's model cards describe.
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    assert from_hf(qwen2_5_7b | {"rope_scaling": yarn}).rope_scaling == RopeScaling("yarn", 4.0, 32768)


def test_absent_keys_mean_what_they_mean_in_transformers():
    config = from_hf(published(model_type="llama", architectures=None, head_dim=None, num_key_value_heads="absent"))
    assert config.head_dim == 4 and config.kv_heads == 4
    assert from_hf(published(head_dim="absent")).head_dim == 128  # Qwen3's own default
    bare = published(**dict.fromkeys(("rope_theta", "rope_scaling", "tie_word_embeddings", "torch_dtype"), "absent"))
    config = from_hf(bare)
    assert config.rope_theta == 10000.0 and not config.tied and config.param_dtype == "float32"
    assert from_hf(published(torch_dtype="float16")).dtype == "float32"
    assert from_hf(published(torch_dtype="float32", dtype="bfloat16")).dtype == "bfloat16"
    scaled = from_hf(published(rope_scaling={"type": "yarn", "factor": 4.0}, max_position_embeddings=4096))
    assert scaled.rope_scaling == RopeScaling("yarn", 4.0, 4096)
    assert from_hf(published(rope_parameters={"rope_type": "default", "rope_theta": 5e5})).rope_theta == 5e5


@pytest.mark.parametrize(
    "text,said",
    [(b"{", "is damaged"), (b"[1]", "holds no object"), (None, "has no config.json"), (b"\x80", "is damaged")],
)
def test_a_damaged_config_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=said):
        read_hf_config(tmp_path)


def test_eos_ids_come_from_the_first_file_that_names_them(tmp_path):
    assert read_eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert read_eos_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    assert read_eos_ids(tmp_path) == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert read_eos_ids(tmp_path) == (151645, 151643)
    for bad in ('"</s>"', "[1, null]", "true", "-1"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(ValueError, match="neither an id nor a list of ids"):
            read_eos_ids(tmp_path)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"rope_theta": 5e5}, "model.rope_theta is 10000.0 there and 500000.0 in this config"),
        ({"vocab_size": 99, "tied": True}, "model.vocab_size is 67 there and 99 in this config; model.tied is False"),
    ],
)
def test_the_config_must_be_the_folders(checkpoint, change, said):
    with pytest.raises(ValueError) as error:
        weights.load(checkpoint, dataclasses.replace(SMALL, **change))
    assert said in str(error.value)


def test_a_rope_scaling_can_be_added_but_not_changed(checkpoint, broken):
    longer = dataclasses.replace(SMALL, rope_scaling=RopeScaling("yarn", 4.0, 32768))
    same(weights.load(checkpoint, longer), make_params(SMALL))
    (broken / "config.json").write_text(json.dumps(to_hf(longer)))
    same(weights.load(broken, longer), make_params(SMALL))
    with pytest.raises(ValueError, match=r"model\.rope_scaling is RopeScaling"):
        weights.load(broken, SMALL)


def edit_header(path, change):
    """Rewrites a file with a changed header, and the tensors as they were."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def set_value(path, name, value):
    """Overwrites the first number of a tensor."""
    tensor = read_header(path)[name]
    with path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(np.float32(value).tobytes())


UP = "model.layers.1.mlp.up_proj.weight"
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def truncate(folder):
    (folder / FILES[2]).write_bytes((folder / FILES[2]).read_bytes()[:-4])


def empty(folder):
    (folder / FILES[2]).write_bytes(b"")


def cut_header(folder):
    (folder / FILES[2]).write_bytes((folder / FILES[2]).read_bytes()[:40])


def longer_file(folder):
    (folder / FILES[2]).write_bytes((folder / FILES[2]).read_bytes() + b"\0")


def garbage(folder):
    (folder / FILES[2]).write_bytes(b"\xff" * 4000)


def garbage_json(folder):
    (folder / FILES[2]).write_bytes((20).to_bytes(8, "little") + b"{" * 20 + b"\0" * 100)


def pointer(folder):
    (folder / FILES[2]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def overlap(folder):
    edit_header(folder / FILES[2], lambda h: h[UP].update(data_offsets=[0, h[UP]["data_offsets"][1]]))


def wrong_size(folder):
    edit_header(folder / FILES[2], lambda h: h[UP].update(shape=[23, 16]))


def no_offsets(folder):
    edit_header(folder / FILES[2], lambda h: h[UP].pop("data_offsets"))


def other_shape(folder):
    edit_header(folder / FILES[2], lambda h: h[UP].update(shape=[12, 32]))


def other_dtype(folder):
    edit_header(folder / FILES[2], lambda h: h[UP].update(dtype="I32"))


def renamed(folder):
    edit_header(folder / FILES[2], lambda h: h.update({"model.layers.1.mlp.up.weight": h.pop(UP)}))


def one_more(folder):
    (folder / FILES[2]).rename(folder / "x.safetensors")
    path = folder / weights.INDEX
    path.write_text(path.read_text().replace(FILES[2], "x.safetensors"))
    shutil.copy(folder / FILES[1], folder / FILES[2])
    values = json.loads(path.read_text())
    values["weight_map"]["another"] = FILES[2]
    path.write_text(json.dumps(values))


def not_a_number(folder):
    set_value(folder / FILES[2], UP, np.nan)


def infinite(folder):
    set_value(folder / FILES[2], UP, -np.inf)


def absent_file(folder):
    (folder / FILES[2]).unlink()


def no_index(folder):
    (folder / weights.INDEX).unlink()


def bad_index(folder):
    (folder / weights.INDEX).write_text("{")


def escaping_index(folder):
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {UP: "../model.safetensors"}}))


def only(name):
    def change(folder):
        for path in folder.glob("model*"):
            path.unlink()
        if name:
            (folder / name).write_bytes(b"x")

    change.__name__ = f"only_{name}"
    return change


def wrong_hash(folder):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {FILES[0]}\n")


def wrong_hash_beside(folder):
    (folder / f"{FILES[0]}.sha256").write_text("0" * 64)


@pytest.mark.parametrize(
    "damage,said",
    [
        (truncate, f"{FILES[2]} is truncated"),
        (empty, f"{FILES[2]} is truncated (0 bytes"),
        (cut_header, f"{FILES[2]} is truncated (40 bytes end within its header)"),
        (longer_file, f"{FILES[2]} has bytes beyond its tensors"),
        (garbage, f"{FILES[2]} is not a safetensors file"),
        (garbage_json, f"the header of {{folder}}/{FILES[2]} is damaged"),
        (pointer, f"{FILES[2]} is a git-lfs pointer"),
        (overlap, f"{FILES[2]} is damaged at"),
        (wrong_size, f"{FILES[2]} is damaged at {UP}"),
        (no_offsets, f"the header of {{folder}}/{FILES[2]} is damaged"),
        (other_shape, f"of another shape: {UP} [12, 32] (not [24, 16])"),
        (other_dtype, f"of a dtype other than F32, BF16, F16: {UP} I32"),
        (renamed, f"missing: {UP}; not part of this network: model.layers.1.mlp.up.weight"),
        (one_more, "keep one"),
        (not_a_number, f"{UP} in {{folder}}/{FILES[2]} has values that are not finite"),
        (infinite, f"{UP} in {{folder}}/{FILES[2]} has values that are not finite"),
        (absent_file, f"lacks {FILES[2]}, which {weights.INDEX} names"),
        (no_index, f"safetensors files but no {weights.INDEX}"),
        (bad_index, f"{weights.INDEX} is damaged"),
        (escaping_index, f"{weights.INDEX} is damaged"),
        (only(None), "neither model.safetensors nor"),
        (only("pytorch_model.bin"), "pytorch_model.bin is a pickle, which can run code when it is read: convert"),
        (only("consolidated.00.pth"), "consolidated.00.pth is a pickle"),
        (only("model-q4.gguf"), "model-q4.gguf is a format that is not read"),
        (wrong_hash, f"{FILES[0]} is damaged (its SHA-256 is not the one recorded)"),
        (wrong_hash_beside, f"{FILES[0]} is damaged (its SHA-256 is not the one recorded)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_damage_is_an_error_that_names_it_and_leaves_nothing(broken, tmp_path, capsys, damage, said):
    damage(broken)
    before = content(tmp_path)
    assert weights.main(["import", str(broken), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said.format(folder=broken) in error and error.startswith("error: ") and len(error) < 600
    assert content(tmp_path) == before and not (tmp_path / "out").exists()


def test_superfluous_tensors_that_change_nothing_are_left_out(tmp_path):
    """Rotary buffers of old checkpoints, and a head beside a tied embedding that has the embedding's values."""
    tied = dataclasses.replace(SMALL, tied=True)
    params = make_params(tied)
    weights.export(params, tied, tmp_path / "a")
    path = tmp_path / "a" / weights.SINGLE
    numpy = pytest.importorskip("safetensors.numpy")
    arrays, embed = numpy.load_file(path), np.asarray(params["embed"])
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    for head, accepted in ((embed, True), (embed + 1, False), (embed[:-1], False)):
        numpy.save_file({**arrays, "lm_head.weight": head}, path)
        if accepted:
            same(weights.load(tmp_path / "a", tied), params)
        else:
            with pytest.raises(ValueError, match=r"lm_head\.weight"):
                weights.load(tmp_path / "a", tied)


def test_what_cannot_be_exported_is_refused(tmp_path):
    both = dataclasses.replace(SMALL, qkv_bias=True)
    with pytest.raises(ValueError, match=r"both model\.qk_norm and model\.qkv_bias"):
        weights.export(make_params(both), both, tmp_path / "a")
    odd = dataclasses.replace(SMALL, qk_norm=False, d_model=18)
    with pytest.raises(ValueError, match=r"not a multiple of model\.heads"):
        weights.export(make_params(odd), odd, tmp_path / "a")
    with pytest.raises(ValueError, match="not those of this network"):
        weights.export(make_params(SMALL), dataclasses.replace(SMALL, d_ff=8), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="exists already: choose a new folder"):
        weights.export(make_params(SMALL), SMALL, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "mine.txt"]
