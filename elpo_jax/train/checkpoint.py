"""Checkpoints that survive a kill at any moment and that are verified before they are used.

A checkpoint is written by orbax into a hidden folder, gets a manifest with the SHA-256 of every file, and only then
takes its name by one atomic rename: a folder DIR/STEP is complete or damaged, never half-written. Older checkpoints go
only after that. `ocp.CheckpointManager` can read the folders, but does not write them: it would let a checkpoint count,
and delete its predecessors, before the manifest exists. One process writes; several hosts need a barrier here.
"""

import hashlib
import json
import pathlib
import shutil
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from elpo_jax.train.mesh import shardings
from elpo_jax.train.provenance import commit, versions
from elpo_jax.train.state import TrainState

FORMAT = 1  # of the folder's content; a change that old code cannot read raises it
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
RESERVED = ("format", "step", "key_impl", "versions", "commit")  # what `save` itself adds to the meta


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and the remedy. Nothing on disk was changed."""


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Making one touches nothing: the folder appears with the first save.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        """Names the folder.

        Args:
          directory: Folder of the run's checkpoints.
          keep: How many of the newest to keep; 2 leaves one to fall back to when the newest is damaged.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept")
        self.directory = pathlib.Path(directory).resolve()
        self.keep = keep
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pending: tuple[int, dict[str, str]] | None = None  # step and arrays of an unfinished save

    def save(self, step: int, state: TrainState, meta: dict[str, Any], wait: bool = True) -> None:
        """Writes a checkpoint, and then deletes those before the newest `keep`.

        A checkpoint of the same step that is already there (a damaged one, or one of a run that was taken back to an
        earlier step) is kept as STEP.replaced.

        Args:
          step: Names the checkpoint, >= 0.
          state: Copied before this returns, so a train step may donate it right away.
          meta: JSON values to get back from `restore`, beside what is added here: format, step, versions, commit.
          wait: Return only when the checkpoint is complete. Otherwise it is completed by the next `save` or `close`,
            while training goes on; until then the one before it is the newest.
        """
        taken = sorted(set(meta) & set(RESERVED))
        if taken:
            raise ValueError(f"the meta keys {', '.join(taken)} are written by the checkpoint itself: rename yours")
        self.close()
        staging = self.directory / UNFINISHED
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        meta = {
            **meta,
            "format": FORMAT,
            "step": step,
            "key_impl": str(jax.random.key_impl(state.key)),
            "versions": versions(),
            "commit": commit(),
        }
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._writer.save(
            staging / str(step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state.replace(key=jax.random.key_data(state.key))),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        self._pending = (step, _arrays(state))
        if wait:
            self.close()

    def close(self) -> None:
        """Completes a checkpoint that was saved without waiting."""
        if self._pending is None:
            return
        (step, arrays), self._pending = self._pending, None
        self._writer.wait_until_finished()
        staged, final = self.directory / UNFINISHED / str(step), self.directory / str(step)
        files = {name: _sha256(staged / name) for name in _files(staged)}
        manifest = {"format": FORMAT, "arrays": arrays, "files": files}
        (staged / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
        if final.exists():
            replaced = final.with_name(f"{step}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        staged.rename(final)
        for old in [s for s in self._steps() if s < step][: -(self.keep - 1) or None]:
            # Renamed first, so that a kill in the middle leaves no damaged checkpoint behind.
            (self.directory / str(old)).rename(self.directory / UNFINISHED / str(old))
        shutil.rmtree(self.directory / UNFINISHED)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None where there is none. Nothing is verified."""
        steps = self._steps()
        return steps[-1] if steps else None

    def restore(self, abstract_state: TrainState, mesh: Mesh, step: int | None = None) -> tuple[TrainState, dict]:
        """Reads a checkpoint onto a mesh, which need not be the one it was saved from.

        Every file is compared with the manifest before anything is read. Without a `step`, a damaged checkpoint is
        passed over for the one before it, with a warning that names the file.

        Args:
          abstract_state: A state of the same run: shapes and dtypes, as arrays or `jax.ShapeDtypeStruct`s.
          mesh: Where the restored state shall lie.
          step: Which checkpoint; None means the newest that is intact.

        Returns:
          The state, bit for bit the one saved, and the meta; `meta["step"]` says which one was read.

        Raises:
          CheckpointError: If there is none, the one asked for or all of them are damaged, a newer version of this
            package wrote it, or it holds the state of another network or optimizer.
        """
        steps = self._steps() if step is None else [step]
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {self.directory}: start the run without resuming")
        problems = []
        for candidate in reversed(steps):
            problem = self._damage(candidate)
            if problem is None:
                for found in problems:
                    warnings.warn(f"{found}; falling back to checkpoint {candidate}", RuntimeWarning, stacklevel=2)
                return self._read(candidate, abstract_state, mesh)
            problems.append(problem)
        raise CheckpointError(f"{'; '.join(problems)}: restore the file from a copy, or start again in another folder")

    def _read(self, step: int, abstract_state: TrainState, mesh: Mesh) -> tuple[TrainState, dict]:
        """Reads a checkpoint whose files are known to be intact."""
        folder = self.directory / str(step)
        held, wanted = json.loads((folder / MANIFEST).read_bytes())["arrays"], _arrays(abstract_state)
        for name in sorted(held.keys() | wanted.keys()):
            if held.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{folder} holds the state of another network or optimizer: {name} is {held.get(name, 'absent')} "
                    f"there and {wanted.get(name, 'absent')} in this config; resume with the config of that run"
                )
        data = abstract_state.replace(key=jax.eval_shape(jax.random.key_data, abstract_state.key))
        target = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            data,
            shardings(mesh, abstract_state),
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
            read = reader.restore(folder, args=items)
        key = jax.random.wrap_key_data(read.state.key, impl=read.meta["key_impl"])
        return read.state.replace(key=key), read.meta

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, in words; None where they are those that were written."""
        folder = self.directory / str(step)
        path = folder / MANIFEST
        if not path.exists():
            return f"{path} is missing"
        try:
            manifest = dict(json.loads(path.read_bytes()))
            written, digest = int(manifest["format"]), manifest.pop("sha256")
        except (ValueError, KeyError, TypeError):
            return f"{path} is damaged"
        if written > FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {written}, and this version of elpo_jax reads up to {FORMAT}: "
                "update elpo_jax, or start in another folder"
            )
        if digest != _digest(manifest):
            return f"{path} is damaged"
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
            if _sha256(folder / name) != digest:
                return f"{folder / name} is damaged (its SHA-256 is not the one recorded)"
        return None

    def _steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _arrays(state: TrainState) -> dict[str, str]:
    """Path -> dtype and shape of every array, such as "float32[16, 24]"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for p, x in leaves}


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(manifest: dict) -> str:
    """The manifest's own SHA-256, so that a damaged one is not taken for another network's."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
