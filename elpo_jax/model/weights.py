"""Weights of published checkpoints: loaded tensor by tensor on to a mesh, written back, and compared with others'.

    python -m elpo_jax.model.weights import HF_DIR OUT           a folder of our own, for model.source
    python -m elpo_jax.model.weights export RUN HF_DIR           OUT of import, or a stage of a run such as W/elpo
    python -m elpo_jax.model.weights logits HF_DIR IDS.npy OUT.npy

IDS.npy is [B, T] int32, rows padded on the right with -1; OUT.npy is [B, T, V] float32, 0 at padding.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elpo_jax.model import stored
from elpo_jax.model.config import DTYPES, ModelConfig
from elpo_jax.model.hf_config import MODEL_FILE, read_hf_config, to_hf
from elpo_jax.model.tensorfile import DTYPES as FILE_DTYPES
from elpo_jax.model.tensorfile import Tensor, pieces, read_header, write_file
from elpo_jax.model.transformer import Params, apply, unembed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Our parameter -> their tensor, within a layer and outside.
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    **{f"attn/{n}": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attn/{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"attn/{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
    **{f"mlp/{n}": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}
_OUTSIDE = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
# What goes along with weights: the tokenizer's, the checkpoint's, and keys of config.json that are not the network's.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_SETTINGS = ("generation_config.json", "LICENSE*")
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
# Other formats of weights, and why they are not read.
_OTHERS = {
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), "a pickle, which can run code when it is read"),
    **dict.fromkeys(("*.gguf", "*.h5", "*.msgpack", "*.onnx"), "a format that is not read"),
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter is in a checkpoint."""

    name: str
    transposed: bool  # they keep matrices as [out, in]
    shape: tuple[int, ...]  # ours

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def load(folder: str | os.PathLike, config: ModelConfig, shardings: Any = None) -> Params:
    """The parameters of a checkpoint folder.

    They are checked as a whole by the headers of their files; then each is read in pieces, and is on its devices before
    the next one is. So the host holds at most the largest parameter and some megabytes. (On a CPU "device" that
    parameter is the array itself.) A folder that `import` made is read by orbax, several parameters at a time.

    Args:
      folder: safetensors files and a config.json, or what `import` made.
      config: The network; but for dtype, param_dtype, remat, scan_layers and source it must be the folder's. It may
        add a rope scaling to a checkpoint without one.
      shardings: Tree of `jax.sharding.Sharding` like the parameters; None for the default device.

    Returns:
      The parameters in `config.param_dtype`.

    Raises:
      ValueError: If the folder, a file or a tensor is missing, superfluous, damaged, of another shape, not finite or
        not supported, or the folder holds another network; the message names it and the remedy.
    """
    folder = pathlib.Path(folder)
    _check_config(folder, config)
    if (folder / MODEL_FILE).is_file():
        return stored.restore_params(folder, config, shardings)
    tensors = _tensors(folder)
    places = _places(config)
    _check_tensors(folder, tensors, places.values(), config.tied)
    stored.verify(folder, stored.recorded_hashes(folder))
    abstract = stored.abstract_params(config)
    if shardings is None:
        shardings = jax.tree.map(lambda _: None, abstract)

    def read(path, x, sharding):
        place = places[_name(path)]
        return _read(place, tensors[place.name], x.dtype, sharding)

    return jax.tree_util.tree_map_with_path(read, abstract, shardings)


def export(
    params: Params,
    config: ModelConfig,
    folder: str | os.PathLike,
    *,
    copy_from: str | os.PathLike | None = None,
    settings_from: str | os.PathLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
) -> None:
    """Writes parameters as a checkpoint that transformers 4 and 5 read, in one process.

    Args:
      params: Of the network, anywhere.
      config: The network.
      folder: New or empty; it is complete or not there.
      copy_from: A folder whose tokenizer and chat template go along.
      settings_from: A folder whose generation_config.json, context length and token ids of config.json, and licence go
        along; by default the one that the weights are of, `config.source`, or `copy_from` where that is no folder.
      max_shard_bytes: Largest file, but for a single tensor that is larger.
      dtype: What to cast to; None leaves the parameters as they are.

    Raises:
      ValueError: If the folder is not empty, one of the others is no folder, or no published family has the network's
        features.
    """
    folder = pathlib.Path(folder)
    settings_from = settings_from or (config.source if os.path.isdir(config.source) else copy_from)
    for source in (copy_from, settings_from):
        if source and not os.path.isdir(source):
            raise ValueError(
                f"there is no folder {source}, which has the tokenizer or the settings that go along: "
                "say where it is now with --copy-from"
            )
    copy_from, settings_from = (pathlib.Path(source) if source else None for source in (copy_from, settings_from))
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = _places(config)
    if {name: tuple(leaf.shape) for name, leaf in leaves.items()} != {n: p.shape for n, p in places.items()}:
        raise ValueError("the parameters are not those of this network: give the config that they were made with")
    dtype = jnp.dtype(dtype or leaves["embed"].dtype)
    values = to_hf(dataclasses.replace(config, param_dtype=dtype.name), _positions(config, settings_from))
    values |= {key: value for key, value in _json(settings_from, "config.json").items() if key in _CARRIED}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, place in places.items():
        size = dtype.itemsize * int(np.prod(place.shape))
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [SINGLE]

    def arrays(names: Sequence[str]) -> Iterator[np.ndarray]:
        for name in names:
            # An array keeps the value that was fetched from a device; that of a copy goes with the copy.
            value = np.asarray(jnp.copy(leaves[name])).astype(dtype, copy=False)
            yield value.T if places[name].transposed else value

    with stored.new_folder(folder) as partial:
        for file, names in zip(files, shards, strict=True):
            shapes = {places[name].name: (dtype, places[name].file_shape) for name in names}
            write_file(partial / file, shapes, arrays(names))
        if len(files) > 1:
            weight_map = {places[n].name: file for file, names in zip(files, shards, strict=True) for n in names}
            total = dtype.itemsize * sum(int(np.prod(place.shape)) for place in places.values())
            _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _copy(copy_from, partial, _TOKENIZER)
        _copy(settings_from, partial, _SETTINGS)
        _write_json(partial / "config.json", values)


def import_checkpoint(folder: str | os.PathLike, out: str | os.PathLike) -> ModelConfig:
    """Turns a published checkpoint into a folder of our own, in the checkpoint's dtype, and returns its network.

    Args:
      folder: A checkpoint that `load` reads.
      out: New or empty; gets params/ (orbax), model.json, SHA256SUMS, and the checkpoint's tokenizer and settings.

    Raises:
      ValueError: As `load`, or if `out` is not empty.
    """
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    config = read_hf_config(folder)
    with stored.new_folder(out) as partial:
        stored.save_params(partial, load(folder, config))
        _copy(folder, partial, (*_TOKENIZER, *_SETTINGS, "config.json"))
        _write_json(partial / MODEL_FILE, dataclasses.asdict(dataclasses.replace(config, source="")))
    return config


def row_logits(config: ModelConfig, params: Params, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Logits of one row after the other.

    Args:
      config: The network.
      params: Its parameters.
      ids: int [B, T], rows padded on the right with -1; positions count from a row's first token.

    Yields:
      float32 [T, V] per row, 0 at padding; products are exact to float32 where `config.dtype` is float32.

    Raises:
      ValueError: If the ids are of another form, or outside the vocabulary.
    """
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        raise ValueError(f"the ids must be integers [B, T], not {ids.dtype}{list(ids.shape)}")
    if ids.min() < -1 or ids.max() >= config.vocab_size:
        raise ValueError(f"the ids go from {ids.min()} to {ids.max()}: this network has 0 to {config.vocab_size - 1}")
    real = ids >= 0
    gaps = np.flatnonzero((real[:, 1:] > real[:, :-1]).any(axis=1))
    if len(gaps):
        raise ValueError(f"row {gaps[0]} of the ids has tokens after padding: pad on the right only")

    @jax.jit
    def forward(params, tokens, positions):
        hidden, _ = apply(config, params, tokens, positions)
        return jnp.where(positions[0, :, None] >= 0, unembed(config, params, hidden[0]), 0.0)

    positions = np.where(real, np.arange(ids.shape[1]), -1).astype(np.int32)
    for row in range(len(ids)):
        # A float32 product is less than that by default on accelerators.
        with jax.default_matmul_precision("highest"):
            out = forward(params, np.maximum(ids[row : row + 1], 0).astype(np.int32), positions[row : row + 1])
        yield np.asarray(out)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _places(config: ModelConfig) -> dict[str, _Place]:
    """Where every parameter is in a checkpoint, by our name."""
    places = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(stored.abstract_params(config)):
        ours = _name(path)
        layer = re.fullmatch(r"layers_(\d+)/(.+)", ours)
        theirs = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}" if layer else _OUTSIDE[ours]
        places[ours] = _Place(theirs, len(leaf.shape) == 2 and ours != "embed", tuple(leaf.shape))
    return places


def _read(place: _Place, tensor: Tensor, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """One parameter, on its devices."""
    if sharding is None:
        (whole,) = _read_parts(place, tensor, dtype, [tuple((0, n) for n in place.shape)])
        return jax.block_until_ready(jax.device_put(whole))
    devices = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, place.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(place.shape).items()
    }
    spans = list(dict.fromkeys(devices.values()))  # several devices can have the same part
    parts = dict(zip(spans, _read_parts(place, tensor, dtype, spans), strict=True))
    shards = [jax.device_put(parts[span], device) for device, span in devices.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(place.shape, sharding, shards))


Span = tuple[tuple[int, int], ...]  # (start, stop) of every dimension


def _read_parts(place: _Place, tensor: Tensor, dtype: np.dtype, spans: Sequence[Span]) -> list[np.ndarray]:
    """Parts of a parameter in our layout; the rows of the file that any of them needs are read once."""
    parts = [np.empty([stop - start for start, stop in span], dtype) for span in spans]
    in_file = [span[::-1] if place.transposed else span for span in spans]
    first, last = min(span[0][0] for span in in_file), max(span[0][1] for span in in_file)
    for where, piece in pieces(tensor, slice(first, last)):
        if not np.isfinite(piece).all():
            raise ValueError(f"{place.name} in {tensor.path} has values that are not finite: copy it again")
        piece = piece.astype(dtype, copy=False)  # before it is transposed: numpy casts fast only what is contiguous
        begin, end = first + where.start, first + where.stop
        for part, ((start, stop), *columns) in zip(parts, in_file, strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                target = part.T if place.transposed else part
                columns = [slice(*column) for column in columns]
                target[low - start : high - start] = piece[(slice(low - begin, high - begin), *columns)]
    return parts


def _check_config(folder: pathlib.Path, config: ModelConfig) -> None:
    """Raises ValueError if the folder holds another network than that of the config."""
    held = read_hf_config(folder)
    if held.rope_scaling.kind == "none":
        held = dataclasses.replace(held, rope_scaling=config.rope_scaling)
    free = ("dtype", "param_dtype", "remat", "scan_layers", "source")
    wrong = [
        f"model.{f.name} is {getattr(held, f.name)!r} there and {getattr(config, f.name)!r} in this config"
        for f in dataclasses.fields(config)
        if f.name not in free and getattr(held, f.name) != getattr(config, f.name)
    ]
    if wrong:
        raise ValueError(
            f"{folder} holds another network: {'; '.join(wrong)}: "
            "take its numbers, as elpo_jax.model.hf_config.read_hf_config(folder) does"
        )


def _tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; from one file, or from those of its index."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        for pattern, why in _OTHERS.items():
            for path in sorted(folder.glob(pattern)):
                raise ValueError(
                    f"{path} is {why}: convert the checkpoint to safetensors with transformers, "
                    "from_pretrained(OLD).save_pretrained(NEW)"
                )
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has safetensors files but no {INDEX}: copy it from the checkpoint too")
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: copy the checkpoint's weights")
    weight_map = _json(folder, INDEX).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(n, str) and n == os.path.basename(n) and n for n in names):
        raise ValueError(f"{folder / INDEX} is damaged: copy it from the checkpoint again")
    files = sorted(set(names))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {_some(absent)}, which {INDEX} names: copy the checkpoint's files again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        header = read_header(folder / file)
        twice = sorted(set(header) & set(tensors))
        if twice:
            raise ValueError(f"{_some(twice)} is in {tensors[twice[0]].path.name} and in {file}: keep one")
        tensors |= header
    return tensors


def _check_tensors(folder: pathlib.Path, tensors: Mapping[str, Tensor], places: Collection[_Place], tied: bool) -> None:
    """Raises ValueError that lists everything by which the tensors differ from the network's."""
    wanted = {place.name: place.file_shape for place in places}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    extra = [name for name in sorted(set(tensors) - set(wanted)) if not name.endswith("rotary_emb.inv_freq")]
    embed, head = _OUTSIDE["embed"], _OUTSIDE["head"]
    if tied and head in extra and shapes.get(embed) == shapes[head] and tensors[embed].dtype == tensors[head].dtype:
        extra.remove(head)  # a copy of the embedding, if the values say so too
    both = [name for name in wanted if name in tensors]
    odd = [n for n in both if tensors[n].dtype not in FILE_DTYPES]
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "not part of this network": extra,
        "of another shape": [f"{n} {[*shapes[n]]} (not {[*wanted[n]]})" for n in both if shapes[n] != wanted[n]],
        f"of a dtype other than {', '.join(FILE_DTYPES)}": [f"{n} {tensors[n].dtype}" for n in odd],
    }
    found = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the tensors in {folder} are not those of its config.json; {'; '.join(found)}")
    if tied and head in tensors:
        pairs = zip(pieces(tensors[embed]), pieces(tensors[head]), strict=True)
        if any(not np.array_equal(a.view(np.uint8), b.view(np.uint8)) for (_, a), (_, b) in pairs):
            raise ValueError(
                f"{head} in {folder} differs from the embedding, but tie_word_embeddings is true: "
                "take it out of the file, or set tie_word_embeddings to false"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _positions(config: ModelConfig, folder: pathlib.Path | None) -> int | None:
    """max_position_embeddings as the folder's config.json has it, unless the rope scaling is another one now."""
    values = _json(folder, "config.json")
    try:
        same = "model_type" in values and read_hf_config(folder).rope_scaling == config.rope_scaling
    except ValueError:  # a kind that is not read, of which only the tokenizer is wanted
        same = False
    return values.get("max_position_embeddings") if same else None


def _json(folder: pathlib.Path | None, name: str) -> dict:
    """The object in a JSON file; empty where there is none."""
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        return dict(json.loads((folder / name).read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{folder / name} is damaged: copy it from the checkpoint again") from None


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: pathlib.Path | None, target: pathlib.Path, patterns: Sequence[str]) -> None:
    """Copies the files that go along with weights."""
    for path in (path for pattern in patterns for path in (source.glob(pattern) if source else ())):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _import(options: argparse.Namespace) -> None:
    config = import_checkpoint(options.source, options.out)
    print(f"{options.out}: {config.layers} layers of width {config.d_model} in {config.param_dtype}")


def _export(options: argparse.Namespace) -> None:
    if (options.run / MODEL_FILE).is_file():
        config = read_hf_config(options.run)
        params, companions = load(options.run, config), options.run
    else:
        params, config, companions = stored.read_stage(options.run, options.step)
    export(
        params,
        config,
        options.out,
        copy_from=options.copy_from or companions,
        # Where that is gone, and nothing is said, its settings would be missed too late.
        settings_from=config.source if options.copy_from is None else None,
        max_shard_bytes=options.max_shard_mb * 1_000_000,
        dtype=options.dtype,
    )


def _logits(options: argparse.Namespace) -> None:
    try:
        ids = np.load(options.ids, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{options.ids} is not an array of integers ({error}): save one with numpy.save") from None
    config = dataclasses.replace(
        read_hf_config(options.source), dtype=options.dtype or "float32", param_dtype=options.dtype or "float32"
    )
    rows = row_logits(config, load(options.source, config), ids)
    first = next(rows)
    partial = options.out.with_name(f".{options.out.name}-partial")
    try:
        out = np.lib.format.open_memmap(partial, "w+", np.float32, (*ids.shape, config.vocab_size))
        out[0] = first
        for row, values in enumerate(rows, 1):
            out[row] = values
        out.flush()
        os.replace(partial, options.out)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elpo_jax.model.weights", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser
    command = add("import", help="turn a published checkpoint into a folder of our own")
    command.add_argument("source", metavar="HF_DIR", type=pathlib.Path)
    command.add_argument("out", metavar="OUT", type=pathlib.Path)
    command.set_defaults(command=_import)
    command = add("export", help="write a checkpoint that transformers reads")
    command.add_argument("run", metavar="RUN", type=pathlib.Path, help="what import made, or a stage of a run")
    command.add_argument("out", metavar="HF_DIR", type=pathlib.Path)
    command.add_argument("--step", type=int, help="which checkpoint of the stage; the newest by default")
    command.add_argument("--copy-from", type=pathlib.Path, metavar="DIR", help="folder of tokenizer and settings")
    command.add_argument("--max-shard-mb", type=int, default=5000, metavar="N", help="largest file, in 10^6 bytes")
    command.add_argument("--dtype", choices=DTYPES, help="cast to this")
    command.set_defaults(command=_export)
    command = add("logits", help="write the logits of rows of ids")
    command.add_argument("source", metavar="HF_DIR", type=pathlib.Path)
    command.add_argument("ids", metavar="IDS.npy", type=pathlib.Path, help="int32 [B, T], padded on the right with -1")
    command.add_argument("out", metavar="OUT.npy", type=pathlib.Path, help="gets float32 [B, T, V]")
    command.add_argument("--dtype", choices=DTYPES, help="of parameters and computation; float32 by default")
    command.set_defaults(command=_logits)
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
