"""`python -m elpo_jax.tasks.prepare NAME --from PATH --out DIR` turns a published data set into a folder of rows.

The file is checked first: its number of rows and the hash of their content against the table in `published.py`. Rows
that cannot be graded are refused by name, or left out and counted. The folder appears whole or not at all.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from elpo_jax.tasks.base import SPLITS, Split
from elpo_jax.tasks.published import PUBLISHED, Published
from elpo_jax.tasks.readers import Source, content, content_hash, find_sources, raw_rows, read_row
from elpo_jax.tasks.rows import DatasetError, Row, problem_of, to_json
from elpo_jax.tasks.store import MANIFEST, Format, build_array_record, require_array_record

NAMED = 5  # rows that an error names


def prepare(
    name: str,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: Format = "array_record",
    password: str | None = None,
    split: Split | None = None,
    drop_unanswered: bool = False,
    unchecked: bool = False,
    readable: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Reads, checks and stores a published data set.

    Args:
      name: A key of `PUBLISHED`.
      source: The published file, or a folder or zip with it.
      out: Folder to make; it must not hold anything yet.
      form: How rows are stored; "array_record" needs tensorflow-datasets.
      password: Of an encrypted zip.
      split: Prepare this one only; a file whose name speaks of no split is taken for it.
      drop_unanswered: Leave out rows that cannot be graded, instead of refusing the file.
      unchecked: Accept other numbers of rows and other hashes than the table's; the manifest says so.
      readable: Whether the math grader can read a reference; those that it cannot count as unanswered.

    Returns:
      The manifest, as written.

    Raises:
      DatasetError: If the file is not what it should be. Nothing is left behind.
    """
    if name not in PUBLISHED:
        raise DatasetError(f"unknown data set {name!r}: there are {', '.join(PUBLISHED)}")
    published, out = PUBLISHED[name], pathlib.Path(out)
    if form == "array_record":
        require_array_record()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} is not empty: choose another --out, or remove it")
    groups = _by_split(name, published, find_sources(pathlib.Path(source), published, password), split)
    with _new_folder(out) as folder:
        staged = folder if form == "jsonl" else folder / "staged"
        staged.mkdir(exist_ok=True)
        splits = {}
        for part, sources in groups.items():
            expected = (published.rows[part], published.sha256.get(part))
            file = staged / f"{part}.jsonl"
            splits[part] = _write_split(
                f"{name}, {part}", published, expected, sources, file, drop_unanswered, unchecked, readable
            )
        kind = "conversations" if published.layout == "chat" else "rows"
        manifest = {"name": name, "format": form, "kind": kind, "licence": published.licence}
        manifest |= {"private": published.layout == "gpqa", "splits": splits}
        if form == "array_record":
            counts = {part: facts["rows"] for part, facts in splits.items()}
            manifest["builder"] = build_array_record(staged, kind, counts, folder)
            shutil.rmtree(staged)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_split(
    title: str,
    published: Published,
    expected: tuple[tuple[int, ...], str | None],
    sources: Sequence[Source],
    path: pathlib.Path,
    drop_unanswered: bool,
    unchecked: bool,
    readable: Callable[[str], bool] | None,
) -> dict[str, Any]:
    """Reads, checks and writes one split; returns what the manifest says of it."""
    lines, refused, taken, written = [], [], set(), 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for where, raw in (found for source in sources for found in raw_rows(source)):
            try:
                row = read_row(raw, len(lines), published)
                lines.append(content(row, published.hashed))
                if row.id in taken:
                    row = dataclasses.replace(row, id=f"{row.id}#{len(lines) - 1}")
                taken.add(row.id)
                text = to_json(row)
            except DatasetError as error:
                raise DatasetError(f"{title}: {where}: {error}") from None
            reason = _ungradable(row, readable) if isinstance(row, Row) else None
            if reason is not None:
                refused.append(f"{where}: {reason}")
            else:
                file.write(text + "\n")
                written += 1
    files = ", ".join(s.name for s in sources[:NAMED]) + (" ..." if len(sources) > NAMED else "")
    digest = content_hash(lines)
    checked = _check(f"{title} ({files})", expected, len(lines), digest, unchecked)
    if refused and not drop_unanswered:
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise DatasetError(
            f"{title}: {len(refused)} rows cannot be graded ({'; '.join(refused[:NAMED])}{more}): "
            "--drop-unanswered leaves them out"
        )
    if not written:
        raise DatasetError(f"{title} ({files}): no rows are left")
    return {"rows": written, "dropped": len(refused), "sha256": digest, "checked": checked}


def _ungradable(row: Row, readable: Callable[[str], bool] | None) -> str | None:
    reason = problem_of(row)
    if reason is None and row.grader == "math" and readable is not None and not readable(row.answer):
        reason = "its answer is one that no parser reads"
    return reason


def _check(
    title: str, expected: tuple[tuple[int, ...], str | None], rows: int, digest: str, unchecked: bool
) -> Literal["count and content", "count", "nothing"]:
    """What of a split agrees with the table's numbers of rows and content hash."""
    counts, known = expected
    remedy = "give --from the published file alone, or --unchecked to take this one as it is"
    if counts and rows not in counts:
        if not unchecked:
            raise DatasetError(f"{title}: expected {' or '.join(map(str, counts))} rows, found {rows}: {remedy}")
        return "nothing"
    if known not in (None, digest):
        if not unchecked:
            raise DatasetError(
                f"{title}: these {rows} rows are not the published ones (expected content hash {known}, found "
                f"{digest}): {remedy}"
            )
        return "count"
    return "count and content" if known else "count" if counts else "nothing"


def _by_split(
    name: str, published: Published, sources: Sequence[Source], wanted: Split | None
) -> dict[Split, list[Source]]:
    """The files of each split, in the splits' order."""
    if wanted is not None and wanted not in published.rows:
        raise DatasetError(f"{name} has no split {wanted}: there is {', '.join(published.rows)}")
    if len(published.rows) == 1:  # copies call the only one as they like
        return {next(iter(published.rows)): list(sources)}
    groups: dict[Split, list[Source]] = {}
    for source in sources:
        part = source.split() or wanted
        if part is None:
            raise DatasetError(f"{name}: the name {source.name} does not say which split it is: add --split")
        if wanted in (None, part):
            groups.setdefault(part, []).append(source)
    for part in groups:
        if part not in published.rows:
            named = ", ".join(published.rows)
            raise DatasetError(f"{name} has no split {part} ({groups[part][0].name}): there is {named}")
    if not groups:
        raise DatasetError(f"{name}: no file of the split {wanted}")
    return {part: groups[part] for part in SPLITS if part in groups}


@contextlib.contextmanager
def _new_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `out` that takes its place at the end, or vanishes with an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DatasetError(f"cannot write to {out.parent} ({error.strerror}): choose another --out") from None
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elpo_jax.tasks.prepare", description="Turns a published data set into a folder of rows."
    )
    parser.add_argument("name", choices=list(PUBLISHED), metavar="NAME", help=", ".join(PUBLISHED))
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help="published file, folder or zip")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--format", dest="form", choices=get_args(Format), default="array_record")
    parser.add_argument("--password", help="of an encrypted zip, as its publisher names it")
    parser.add_argument("--split", choices=SPLITS, help="prepare this one only")
    parser.add_argument("--drop-unanswered", action="store_true", help="leave out rows that cannot be graded")
    parser.add_argument("--unchecked", action="store_true", help="take other rows than the published ones")
    options = vars(parser.parse_args(arguments))
    try:
        manifest = prepare(options.pop("name"), options.pop("source"), options.pop("out"), **options)
    except (DatasetError, OSError) as error:
        sys.exit(f"{error}")
    for split, facts in manifest["splits"].items():
        print(f"{split}: {facts['rows']} rows, {facts['dropped']} left out, content hash {facts['sha256']}")
        print(f"  agrees with the published data set: {facts['checked']}")
    print(f"licence: {manifest['licence']}")


if __name__ == "__main__":
    main()
