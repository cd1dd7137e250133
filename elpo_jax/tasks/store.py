"""Keeps a data set's rows in a folder and opens them again, with random access and without reading them all.

A prepared folder has a manifest.json and either one jsonl file per split or, in array_record files, a data set of
tensorflow-datasets, which is needed for that only. Rows of one's own are jsonl: one file, or a folder with train.jsonl,
validation.jsonl and test.jsonl, as many as there are; `rows.Row` documents the keys.
"""

import contextlib
import functools
import io
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from elpo_jax.tasks.base import SPLITS, Split
from elpo_jax.tasks.rows import Conversation, DatasetError, Grader, Row, from_json, problem_of, split_word

Format = Literal["array_record", "jsonl"]
MANIFEST = "manifest.json"
NESTED = ("messages", "tools", "meta")  # stored as JSON: there is no feature for values of any shape

_FIELDS = {"rows": ("id", "problem", "answer", "grader", "meta"), "conversations": ("id", "messages", "tools", "meta")}


def open_splits(path: str | os.PathLike, lone: Split = "train") -> dict[Split, Sequence[Row | Conversation]]:
    """Every split that there is at `path`, by name.

    Args:
      path: A prepared folder, or rows of one's own.
      lone: What a single file is whose name speaks of no split.

    Raises:
      DatasetError: If there is nothing, or a row of one's own is not as documented (the line is named).
    """
    path = pathlib.Path(path)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return {split: _open_prepared(path, manifest, split) for split in manifest["splits"]}
    if path.is_file():
        return {split_word(path.name) or lone: _own_rows(path)}
    files: dict[Split, pathlib.Path] = {s: path / f"{s}.jsonl" for s in SPLITS if (path / f"{s}.jsonl").is_file()}
    if not files:
        raise DatasetError(
            f"{path} holds no data set: give a folder that `python -m elpo_jax.tasks.prepare` made, a jsonl file, or "
            "a folder with train.jsonl, validation.jsonl or test.jsonl"
        )
    return {split: _own_rows(file) for split, file in files.items()}


def open_rows(path: str | os.PathLike, split: Split) -> Sequence[Row | Conversation]:
    """One split; see `open_splits`. A single file is any split that its name does not contradict.

    Raises:
      DatasetError: If there is no such split, or as `open_splits` does.
    """
    splits = open_splits(path, lone=split)
    if split not in splits:
        raise DatasetError(f"{path} has no split {split}: there are {', '.join(splits)}")
    return splits[split]


def graders_of(rows: Sequence[Row | Conversation]) -> set[Grader]:
    """What grades an opened split: of all its rows, from the manifest where they are prepared. Empty: conversations."""
    if isinstance(rows, _Prepared):
        return set(rows.graders)
    return {row.grader for row in rows if isinstance(row, Row)}


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """What `prepare` recorded of a folder: name, format, kind, licence, private, and by split rows, graders and hash.

    Raises:
      DatasetError: If it is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] in ("array_record", "jsonl") and manifest["kind"] in _FIELDS:
            for split, facts in manifest["splits"].items():
                operator.index(facts["rows"])
                SPLITS.index(split)
                if not set(facts["graders"]) <= set(get_args(Grader)):
                    raise ValueError("unknown graders")
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DatasetError(f"{folder / MANIFEST} is damaged: prepare the data set again")


def require_array_record() -> Any:
    """The package tensorflow_datasets, imported.

    Raises:
      DatasetError: If it, or what it needs for array_record files, is not installed.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise DatasetError(
            f"array_record needs the packages tensorflow-datasets and array_record ({error}): install them, or prepare "
            "the data set with --format jsonl, which needs none"
        ) from None
    return tensorflow_datasets


def build_array_record(staged: pathlib.Path, kind: str, counts: Mapping[Split, int], folder: pathlib.Path) -> str:
    """Turns staged jsonl files into a data set of tensorflow-datasets.

    Args:
      staged: Folder with one SPLIT.jsonl per split.
      kind: "rows" or "conversations".
      counts: Rows by split.
      folder: Where the data set is put.

    Returns:
      The data set's own folder, relative to `folder`.

    Raises:
      DatasetError: If the package is missing, or what was written reads back with another number of rows.
    """
    tfds = require_array_record()
    builder = _builder_class()(config=kind, data_dir=str(folder), file_format="array_record")
    tfds.disable_progress_bar()  # nothing is downloaded, and the command line says what it did
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=str(staged / "downloads"),  # it makes one even if it stays empty
            download_config=tfds.download.DownloadConfig(manual_dir=str(staged)),
        )
    for split, count in counts.items():
        found = len(builder.as_data_source(split=split))
        if found != count:
            raise DatasetError(f"{split}: {count} rows were written to array_record, {found} can be read")
    return os.path.relpath(os.fspath(builder.data_dir), folder)


@functools.cache  # the package registers every builder class by its name, once
def _builder_class() -> type:
    tfds = require_array_record()

    class ElpoRows(tfds.core.GeneratorBasedBuilder):
        """Prepared rows, every field as text."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind) for kind in _FIELDS]  # noqa: RUF012
        MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with one SPLIT.jsonl per split."

        def _info(self):
            fields = _FIELDS[self.builder_config.name]
            features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            staged = pathlib.Path(dl_manager.manual_dir)
            return {file.stem: self._generate_examples(file) for file in sorted(staged.glob("*.jsonl"))}

        def _generate_examples(self, path):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    row = json.loads(line)
                    yield f"{number:09}", {k: _dumps(v) if k in NESTED else v for k, v in row.items()}

    return ElpoRows


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _open_prepared(folder: pathlib.Path, manifest: Mapping[str, Any], split: Split) -> Sequence[Row | Conversation]:
    facts = manifest["splits"][split]
    if manifest["format"] == "jsonl":
        rows: _Prepared = _JsonlRows(folder / f"{split}.jsonl", facts["graders"])
    else:
        tfds = require_array_record()
        builder = tfds.builder_from_directory(str(folder / manifest["builder"]))
        rows = _ArrayRecordRows(builder.as_data_source(split=split), facts["graders"])
    if len(rows) != facts["rows"]:
        raise DatasetError(
            f"{folder}, {split}: {len(rows)} rows instead of {facts['rows']}: prepare the data set again"
        )
    return rows


class _Prepared(Sequence):
    """Rows of a prepared split, with the graders that they need."""

    graders: frozenset[Grader]


class _JsonlRows(_Prepared):
    """The lines of a prepared file, parsed when they are asked for. Safe to share between threads."""

    def __init__(self, path: pathlib.Path, graders: Iterable[Grader]):
        self.graders = frozenset(graders)
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}: prepare the data set again") from None
        self._path = path
        self._ends = [0]
        for line in self._file:
            self._ends.append(self._ends[-1] + len(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Row | Conversation:
        index = range(len(self))[index]
        begin, end = self._ends[index : index + 2]
        try:
            return from_json(json.loads(os.pread(self._file.fileno(), end - begin, begin)), index)
        except ValueError:
            raise DatasetError(f"{self._path}, line {index + 1} is damaged: prepare the data set again") from None


class _ArrayRecordRows(_Prepared):
    """The records of a data source, parsed when they are asked for."""

    def __init__(self, source: Sequence[Mapping[str, Any]], graders: Iterable[Grader]):
        self.graders = frozenset(graders)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row | Conversation:
        index = range(len(self))[index]
        record = {key: value.decode() for key, value in self._source[index].items()}
        return from_json({k: json.loads(v) if k in NESTED else v for k, v in record.items()}, index)


def _own_rows(path: pathlib.Path) -> list[Row | Conversation]:
    """All rows of a file of one's own, each checked."""
    rows: list[Row | Conversation] = []
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = from_json(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), len(rows))
                reason = problem_of(row) if isinstance(row, Row) else None
            except DatasetError as error:
                reason = str(error)
            except (ValueError, RecursionError) as error:
                reason = f"it is not JSON in UTF-8 ({type(error).__name__})"
            if reason is None and row.id in lines:
                reason = f'it has the id of line {lines[row.id]}: give each row another "id", or none'
            if reason is not None:
                raise DatasetError(f"{path}, line {number}: {reason}")
            lines[row.id] = number
            rows.append(row)
    if not rows:
        raise DatasetError(f"{path} has no rows")
    return rows
