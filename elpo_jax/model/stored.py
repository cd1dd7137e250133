"""Folders of our own that hold parameters: what `import` makes of a published checkpoint, and a training run's stage.

The parameters of both are orbax checkpoints, of whose files the SHA-256 is recorded and compared before use.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from elpo_jax.model.config import ModelConfig, config_from_json
from elpo_jax.model.transformer import Params, init

PARAMS = "params"  # of an imported folder
HASHES = "SHA256SUMS"
_MANIFEST = "manifest.json"  # of a checkpoint of a training run


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the network's parameters, as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def save_params(folder: pathlib.Path, params: Params) -> None:
    """Writes the parameters into the new folder FOLDER/params, and their hashes into FOLDER/SHA256SUMS."""
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((folder / PARAMS).resolve(), args=ocp.args.PyTreeSave(params))
    names = sorted(str(path.relative_to(folder)) for path in (folder / PARAMS).rglob("*") if path.is_file())
    (folder / HASHES).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def restore_params(folder: pathlib.Path, config: ModelConfig, shardings: Any = None) -> Params:
    """The parameters of FOLDER/params, in `config.param_dtype`, whose hashes `verify` has compared."""
    return _restore(folder / PARAMS, abstract_params(config), shardings)


def read_stage(folder: str | os.PathLike, step: int | None = None) -> tuple[Params, ModelConfig, pathlib.Path]:
    """The parameters of a training run's stage, such as W/elpo, on the default device.

    Args:
      folder: Has checkpoints/ in the layout of train/checkpoint.py.
      step: Which checkpoint; None means the newest.

    Returns:
      The parameters, their network, and the folder of its tokenizer: the one that the run was given, or else its own.

    Raises:
      ValueError: If there is no such checkpoint, or it is damaged; the message names the file.
    """
    folder = pathlib.Path(folder)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    if not steps:
        stages = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
        other = (
            f"name one of its stages, {', '.join(stages)}" if stages else "give the folder of a stage, such as W/elpo"
        )
        raise ValueError(f"{folder} has no checkpoints: {other}")
    if step is not None and step not in steps:
        raise ValueError(f"{folder} has no checkpoint {step}: there are {', '.join(map(str, steps))}")
    checkpoint = folder / "checkpoints" / str(steps[-1] if step is None else step)
    others = [str(s) for s in steps if str(s) != checkpoint.name]
    remedy = f"take another with --step ({', '.join(others)})" if others else "restore it from a copy"
    try:
        files = json.loads((checkpoint / _MANIFEST).read_bytes())["files"]
        meta = json.loads((checkpoint / "meta" / "metadata").read_bytes())["config"]
        config = config_from_json(meta["model"])
        tokenizer = meta.get("tokenizer", {}).get("source") or config.source
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is damaged ({type(error).__name__}: {error}): {remedy}") from None
    verify(checkpoint, files, remedy)
    params = _restore(checkpoint / "state", {"params": abstract_params(config)}, None)["params"]
    return params, config, pathlib.Path(tokenizer) if tokenizer else folder.parent


def recorded_hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 by file name, from SHA256SUMS and from NAME.sha256 files; of files that are there."""
    found = {}
    for path in [folder / HASHES, *sorted(folder.glob("*.sha256"))]:
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            match = re.fullmatch(r"([0-9a-fA-F]{64})(?:\s+\*?(.+))?", line.strip())
            name = (path.stem if path.name != HASHES else match[2]) if match else None
            if name and (folder / name).is_file():
                found[name] = match[1].lower()
    return found


def verify(folder: pathlib.Path, hashes: Mapping[str, str], remedy: str = "copy it again") -> None:
    """Raises ValueError for the first file that is missing or whose SHA-256 is not the one recorded."""
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: {remedy}")
        if sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged (its SHA-256 is not the one recorded): {remedy}")


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes the name `folder` when the block ends, and vanishes where it fails.

    Raises:
      ValueError: If there is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose a new folder")
    partial = folder.absolute().with_name(f".{folder.absolute().name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _restore(path: pathlib.Path, abstract: Any, shardings: Any) -> Any:
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        return reader.restore(path.resolve(), args=args)
