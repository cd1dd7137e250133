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
    """The parameters of FOLDER/params, in `config.param_dtype`.

    Raises:
      ValueError: If a file is missing or is not the one that FOLDER/SHA256SUMS records, or the parameters are not those
        of the network; the message names it.
    """
    hashes = _sums(folder)
    if not any(name.startswith(f"{PARAMS}/") for name in hashes):
        raise ValueError(f"{folder / HASHES} is missing, or names no files of {PARAMS}/: import the checkpoint again")
    verify(folder, hashes, "import the checkpoint again")
    return _restore(folder / PARAMS, abstract_params(config), shardings, "import the checkpoint again")


def read_stage(folder: str | os.PathLike, step: int | None = None) -> tuple[Params, ModelConfig, pathlib.Path]:
    """The parameters of a training run's stage, such as W/elpo, on the default device.

    Args:
      folder: Has checkpoints/ in the layout of train/checkpoint.py.
      step: Which checkpoint; None means the newest.

    Returns:
      The parameters, their network, and the folder of its tokenizer: the published one where the run has
      tokenizer.kind "checkpoint", or else the run's own, in which it was trained.

    Raises:
      ValueError: If there is no such checkpoint, or it is damaged; the message names the file.
    """
    folder = pathlib.Path(folder)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    if not steps:
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"{folder} has no checkpoint: this stage made no steps, or has not come to its first one")
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
        tokenizer = meta.get("tokenizer", {})
        published = tokenizer.get("kind") == "checkpoint" and (tokenizer.get("source") or config.source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is damaged ({type(error).__name__}: {error}): {remedy}") from None
    verify(checkpoint, files, remedy)
    params = _restore(checkpoint / "state", {"params": abstract_params(config)}, None, remedy)["params"]
    return params, config, pathlib.Path(published) if published else folder.parent


def recorded_hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 by file name, from SHA256SUMS and from NAME.sha256 files; of files that are there."""
    found = _sums(folder)
    for path in sorted(folder.glob("*.sha256")):
        match = re.match(r"\s*([0-9a-fA-F]{64})\b", path.read_text(errors="replace"))
        if match:
            found[path.stem] = match[1].lower()
    return {name: digest for name, digest in found.items() if (folder / name).is_file()}


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
    folder = folder.resolve()  # nothing replaces a link to a folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: choose a new folder")
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 by file name, as SHA256SUMS has them."""
    text = (folder / HASHES).read_text(errors="replace") if (folder / HASHES).is_file() else ""
    lines = (re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(.+)", line.strip()) for line in text.splitlines())
    return {match[2]: match[1].lower() for match in lines if match}


def _restore(path: pathlib.Path, abstract: Any, shardings: Any, remedy: str) -> Any:
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        try:
            return reader.restore(path.resolve(), args=args)
        except (ValueError, KeyError, OSError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(
                f"{path} does not hold the parameters of its network ({type(error).__name__}: {reason}): {remedy}"
            ) from None
