"""`python -m elpo_jax.tasks.prepare NAME --from PATH --out DIR` turns a published data set into a folder of rows.

The file is checked first: its number of rows and the hash of their content against the table in `published.py`. Rows
that cannot be graded are refused by name, or left out and counted. The folder appears whole or not at all.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from elpo_jax.tasks.base import SPLITS, Split
from elpo_jax.tasks.published import PUBLISHED, Published
from elpo_jax.tasks.readers import Source, content, content_hash, find_sources, raw_rows, read_row
from elpo_jax.tasks.rows import Conversation, DatasetError, Row, problem_of, to_json
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
    from_date: datetime.date | None = None,
    to_date: datetime.date | None = None,
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
      from_date: Keep the problems of contests on this day or later only; for LiveCodeBench.
      to_date: Keep the problems of contests on this day or earlier only.

    Returns:
      The manifest, as written.

    Raises:
      DatasetError: If the file is not what it should be. Nothing is left behind.
    """
    if name not in PUBLISHED:
        raise DatasetError(f"unknown data set {name!r}: there are {', '.join(PUBLISHED)}")
    published, out = PUBLISHED[name], pathlib.Path(out)
    days = (from_date or datetime.date.min, to_date or datetime.date.max) if from_date or to_date else None
    if days and published.layout != "livecodebench":
        raise DatasetError(f"{name} has no contest dates: --from-date and --to-date are for livecodebench_v6 only")
    if days and days[0] > days[1]:
        raise DatasetError(f"no day is from {days[0]} to {days[1]}: correct --from-date or --to-date")
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
                f"{name}, {part}", published, expected, sources, file, drop_unanswered, unchecked, days
            )
        kind = "conversations" if published.layout == "chat" else "rows"
        manifest = {"name": name, "format": form, "kind": kind, "licence": published.licence}
        manifest |= {"private": published.layout == "gpqa", "splits": splits}
        manifest |= {"from_date": from_date and str(from_date), "to_date": to_date and str(to_date)}
        if form == "array_record":
            counts = {part: facts["rows"] for part, facts in splits.items()}
            manifest["builder"] = build_array_record(staged, kind, counts, folder)
            shutil.rmtree(staged)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _in_days(row: Row | Conversation, days: tuple[datetime.date, datetime.date] | None) -> bool:
    """Whether the row's contest was between two days, both included; None stands for all."""
    if days is None:
        return True
    try:
        day = datetime.date.fromisoformat(str(row.meta.get("contest_date", ""))[:10])
    except ValueError:
        raise DatasetError("it has no contest_date in ISO form, which --from-date and --to-date need") from None
    return days[0] <= day <= days[1]


def _write_split(
    title: str,
    published: Published,
    expected: tuple[tuple[int, ...], str | None],
    sources: Sequence[Source],
    path: pathlib.Path,
    drop_unanswered: bool,
    unchecked: bool,
    days: tuple[datetime.date, datetime.date] | None,
) -> dict[str, Any]:
    """Reads, checks and writes one split; returns what the manifest says of it."""
    lines, refused, taken, graders = [], [], set(), set()
    written = outside = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for where, raw in (found for source in sources for found in raw_rows(source)):
            try:
                row = read_row(raw, len(lines), published)
                lines.append(content(row, published.hashed))
                if row.id in taken:
                    row = dataclasses.replace(row, id=f"{row.id}#{len(lines) - 1}")
                taken.add(row.id)
                text, inside = to_json(row), _in_days(row, days)
            except DatasetError as error:
                raise DatasetError(f"{title}: {where}: {error}") from None
            reason = problem_of(row) if isinstance(row, Row) and inside else None
            if not inside:
                outside += 1
            elif reason is not None:
                refused.append(f"{where}: {reason}")
            else:
                file.write(text + "\n")
                written += 1
                graders |= {row.grader} if isinstance(row, Row) else set()
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
        raise DatasetError(
            f"{title} ({files}): no rows are left" + (f" between the dates ({outside} are outside)" if outside else "")
        )
    facts = {"rows": written, "dropped": len(refused), "outside": outside, "graders": sorted(graders)}
    return facts | {"sha256": digest, "checked": checked}


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


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day such as 2025-02-01") from None


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
    for flag, which in (("--from-date", "first"), ("--to-date", "last")):
        parser.add_argument(flag, type=_day, metavar="YYYY-MM-DD", help=f"livecodebench_v6: {which} day of a contest")
    parser.add_argument("--unchecked", action="store_true", help="take other rows than the published ones")
    options = vars(parser.parse_args(arguments))
    try:
        manifest = prepare(options.pop("name"), options.pop("source"), options.pop("out"), **options)
    except (DatasetError, OSError) as error:
        sys.exit(f"{error}")
    for split, facts in manifest["splits"].items():
        print(f"{split}: {facts['rows']} rows, {facts['dropped']} left out, content hash {facts['sha256']}")
        if facts["outside"]:
            print(f"  {facts['outside']} of other dates were left out too")
        print(f"  agrees with the published data set: {facts['checked']}")
    print(f"licence: {manifest['licence']}")


if __name__ == "__main__":
    main()
