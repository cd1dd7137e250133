"""Reads data sets in the layouts in which they are published: jsonl, json, csv, parquet, gz, zip, folders of them.

A file becomes raw rows (`raw_rows`), a raw row becomes a `Row` or a `Conversation` (`read_row`). Column names are
compared in small letters, since copies of a data set agree on little else. Nothing here quotes a row's text.
"""

import csv
import dataclasses
import datetime
import gzip
import hashlib
import io
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from elpo_jax.tasks.base import Split
from elpo_jax.tasks.boxed import last_boxed
from elpo_jax.tasks.livecodebench import read_tests
from elpo_jax.tasks.published import Hashed, Layout, Published
from elpo_jax.tasks.rows import Conversation, DatasetError, Row, answer_text, from_json, split_word

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
MOST_ZIPPED = 8 << 30  # bytes that a zip's member may inflate to

_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$]+?)\s*\$")  # "$\boxed 2$", as some of MATH's solutions have it
_INTEGER = re.compile(r"\$?\s*(-?[0-9]+)(?:\.0*)?\s*(?:°|\^\s*(?:\\circ|\{\s*\\circ\s*\}))?\s*\$?")
_LETTER = re.compile(r"(?:\\boxed\s*\{)?\s*(?:\\text\s*\{)?\s*\(?([A-D])\)?\.?[}\s]*")


@dataclasses.dataclass(frozen=True)
class Source:
    """One data file, possibly inside a zip.

    Attributes:
      name: Path from where the search began, for people.
      open: Opens it for reading bytes.
    """

    name: str
    open: Callable[[], IO[bytes]]

    def split(self) -> Split | None:
        """The split that its name, or the nearest folder's, speaks of."""
        for part in reversed(pathlib.PurePosixPath(self.name).parts):
            if found := split_word(part):
                return found
        return None


def find_sources(path: pathlib.Path, published: Published, password: str | None = None) -> list[Source]:
    """The data files at `path`: itself, or those in a zip or, at any depth, a folder; in order of their names.

    Raises:
      DatasetError: If there is none, or a zip is damaged.
    """
    if not path.exists():
        raise DatasetError(f"{path} does not exist: give --from the published file or its folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sources = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if name.lower().endswith(".zip"):
            sources += _members(file, name, password)
        else:
            sources.append(Source(name, lambda file=file: file.open("rb")))
    sources = [source for source in sources if _is_data(source.name)]
    if len(sources) > 1:
        wanted = [s for s in sources if published.pick in s.name.lower()]
        sources = [s for s in wanted or sources if not any(word in s.name.lower() for word in published.skip)]
    if not sources:
        raise DatasetError(f"{path} has no data file: it needs one that ends in {', '.join(SUFFIXES)} or .zip")
    return sources


def raw_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one file, each after words that say where it is.

    Raises:
      DatasetError: If the file is damaged, or a row is not an object.
    """
    try:
        with source.open() as stream:
            for where, raw in _parsed(source.name.lower(), stream):
                if not isinstance(raw, dict):
                    raise DatasetError(f"{where} is not an object")
                yield f"{source.name}, {where}", raw
    except DatasetError as error:
        raise DatasetError(f"{source.name}: {error}") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
        raise DatasetError(f"{source.name} is damaged or not what its name says ({_short(error)})") from None


def read_row(raw: Mapping[str, Any], number: int, published: Published) -> Row | Conversation:
    """A published row in our form.

    Answers can be "" where a published row has none: who may refuse it is the caller.

    Args:
      raw: As published.
      number: The row's, from 0.
      published: The data set's entry.

    Raises:
      DatasetError: If a column is missing or has an unexpected value; the row is for the caller to name.
    """
    columns = {key.lower().strip(): value for key, value in raw.items() if isinstance(key, str)}
    identity = answer_text(columns.get(published.key)) if published.key else ""
    row = _LAYOUTS[published.layout](columns, identity or str(number))
    if isinstance(row, Row) and not row.problem:
        raise DatasetError("the problem is empty")
    return row


def content(row: Row | Conversation, hashed: Hashed) -> str:
    """What a row says, as far as all published layouts agree: one line of a data set's hash."""
    if isinstance(row, Conversation):
        parts: list[Any] = [[m["role"], m.get("content", ""), m.get("tool_calls", [])] for m in row.messages]
    elif hashed == "answers":
        parts = [row.answer]
    else:
        parts = ["".join(row.problem.split()), "".join(row.answer.split())]
        if row.grader == "program":
            parts.append([row.meta["tests"]["inputs"], row.meta["tests"]["outputs"]])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_hash(lines: Iterable[str]) -> str:
    """The hash of a split from its rows' `content`, whatever their order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _is_data(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in pathlib.PurePosixPath(name).parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _short(error: BaseException) -> str:
    """What is wrong, without what a parser may quote of the file."""
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError | EOFError) else type(error).__name__


def _members(file: pathlib.Path, name: str, password: str | None) -> list[Source]:
    try:
        archive = zipfile.ZipFile(file)  # stays open: MATH's has 12,500 members
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{name} is no readable zip ({_short(error)})") from None
    members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
    return [Source(f"{name}/{m.filename}", lambda m=m: _open_member(archive, m, password)) for m in members]


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, password: str | None) -> IO[bytes]:
    if member.file_size > MOST_ZIPPED:
        raise DatasetError(f"it would inflate to {member.file_size} bytes: unpack it and give the file")
    try:
        if not member.flag_bits & 1:
            return archive.open(member)
        if password is None:
            raise DatasetError("it asks for a password: give the one that its publisher names with --password")
        # Read at once: only the checksum at the end tells some wrong passwords from the right one.
        return io.BytesIO(archive.read(member, password.encode()))
    except NotImplementedError as error:
        raise DatasetError(f"{error}: unpack it and give the file") from None
    except (RuntimeError, zlib.error, zipfile.BadZipFile):
        raise DatasetError("the password is wrong, or the zip is damaged") from None


def _parsed(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    if name.endswith(".gz"):
        name, stream = name.removesuffix(".gz"), gzip.GzipFile(fileobj=stream)
    if name.endswith(".parquet"):
        yield from _parquet(stream)
    elif name.endswith(".csv"):
        csv.field_size_limit(1 << 28)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        yield from ((f"row {i}", row) for i, row in enumerate(csv.DictReader(text, strict=True)))
    elif name.endswith(".jsonl"):
        yield from _lines(stream)
    else:
        whole = stream.read()
        try:
            rows = json.loads(whole.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
            yield from _lines(io.BytesIO(whole))  # JSON lines, despite the name
            return
        yield from ((f"row {i}", row) for i, row in enumerate(rows if isinstance(rows, list) else [rows]))


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise DatasetError(f"line {number} is not UTF-8") from None
            except (ValueError, RecursionError):
                raise DatasetError(f"line {number} is not JSON: the file is cut off or damaged") from None


def _parquet(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DatasetError("reading parquet needs the package pyarrow: install it (see the README)") from None
    try:
        # It seeks a lot, which a compressed stream cannot.
        seekable = stream if isinstance(stream, io.BufferedReader) else io.BytesIO(stream.read())
        file = pyarrow.parquet.ParquetFile(seekable)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _first(columns: Mapping[str, Any], *names: str) -> Any:
    """The first column that is there and not null."""
    return next((columns[name] for name in names if columns.get(name) is not None), None)


def _text(columns: Mapping[str, Any], *names: str) -> str:
    value = _first(columns, *names)
    if not isinstance(value, str):
        raise DatasetError(f"no text in a column {' or '.join(names)} (there are {', '.join(sorted(columns))})")
    return value.strip()


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """An object that may be given as JSON; empty for null."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DatasetError(f"{name} is not JSON") from None
    if value is not None and not isinstance(value, dict):
        raise DatasetError(f"{name} is not an object")
    return value or {}


def _problem(columns: Mapping[str, Any]) -> str:
    """The problem, from a conversation that ends with it or from a column of text."""
    prompt, extra = columns.get("prompt"), columns.get("extra_info")
    if isinstance(extra, dict) and isinstance(extra.get("question"), str):
        return extra["question"].strip()
    if isinstance(prompt, list):
        said = [m["content"] for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
        if not said or not isinstance(said[-1], str):
            raise DatasetError("the prompt has no user's message")
        return said[-1].strip()
    return _text(columns, "problem", "question", "input", "prompt")


def _answer(columns: Mapping[str, Any]) -> str:
    """The reference, from the reward's settings, a column of its own, or the box at the end of a solution."""
    settings = _object(columns.get("reward_model"), "reward_model")
    value = settings["ground_truth"] if "ground_truth" in settings else _first(columns, "answer", "output")
    if isinstance(value, dict):
        value = _first(value, "ground_truth", "answer")
    if value is None and isinstance(columns.get("solution"), str):
        solution = columns["solution"].replace("\\fbox{", "\\boxed{")
        bare = _BARE_BOX.findall(solution)
        value = last_boxed(solution) or (bare[-1] if bare else None)
    return answer_text(value)


def _meta(columns: Mapping[str, Any]) -> dict[str, Any]:
    extra = columns.get("extra_info")
    columns = dict(extra if isinstance(extra, dict) else {}) | dict(columns)
    meta = {
        "solution": _first(columns, "solution"),
        "subject": _first(columns, "subject", "type"),
        "level": _first(columns, "level"),
        "source": _first(columns, "data_source", "url"),
    }
    if isinstance(meta["level"], str):  # "Level 5" in the full MATH, and "Level ?"
        digits = re.findall(r"\d+", meta["level"])
        meta["level"] = int(digits[0]) if digits else None
    return {key: value for key, value in meta.items() if isinstance(value, str | int)}


def _read_gsm8k(columns: Mapping[str, Any], identity: str) -> Row:
    extra = columns.get("extra_info")
    columns = columns | extra if isinstance(extra, dict) else columns
    solution, mark, answer = _text(columns, "answer").rpartition("####")
    if not mark:
        raise DatasetError('the answer has no "####" before its number')
    return Row(
        identity, _text(columns, "question"), answer.strip().replace(",", ""), "math", {"solution": solution.strip()}
    )


def _read_math(columns: Mapping[str, Any], identity: str) -> Row:
    return Row(identity, _problem(columns), _answer(columns), "math", _meta(columns))


def _read_integer(columns: Mapping[str, Any], identity: str) -> Row:
    """The integer without dollars and degrees, which some copies put around it."""
    row = _read_math(columns, identity)
    found = _INTEGER.fullmatch(row.answer)
    if row.answer and found is None:
        raise DatasetError("its answer is not an integer: correct it, or give --from another copy")
    return dataclasses.replace(row, answer=str(int(found[1])) if found else "")


def _read_gpqa(columns: Mapping[str, Any], identity: str) -> Row:
    meta = {"private": True, "domain": _first(columns, "high-level domain", "domain")}
    meta["subject"] = columns.get("subdomain")
    meta |= {key: value for key, value in columns.items() if "canary" in key}
    meta = {key: value for key, value in meta.items() if value}
    if "correct answer" not in columns:  # options and letter are already in place
        given = _text(columns, "solution", "answer")
        letter = _LETTER.fullmatch(last_boxed(given) or given)
        if letter is None:
            raise DatasetError("its solution is not one of the letters A to D")
        return Row(identity, _text(columns, "problem", "question"), letter[1], "letter", meta)
    question = _text(columns, "question")
    names = ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
    options = [_text(columns, name) for name in names]
    # Sorted by a hash: the same on every machine and Python, and nothing to do with the order of the rows.
    key = answer_text(columns.get("record id")) or question
    order = sorted(range(4), key=lambda k: hashlib.sha256(f"{key}/{k}".encode()).digest())
    listed = "\n".join(f"{letter}. {options[k]}" for letter, k in zip("ABCD", order, strict=True))
    return Row(identity, f"{question}\n\n{listed}", "ABCD"[order.index(0)], "letter", meta)


def _read_livecodebench(columns: Mapping[str, Any], identity: str) -> Row:
    if "question_content" not in columns:
        return _read_program(columns, identity)
    names = ("question_title", "platform", "contest_id", "contest_date", "difficulty", "starter_code")
    if isinstance(columns.get("contest_date"), datetime.date):  # a parquet file may hold a timestamp
        columns = columns | {"contest_date": columns["contest_date"].isoformat()}
    meta = {name: answer_text(columns.get(name)) for name in names}
    meta = {name: value for name, value in meta.items() if value} | {"tests": read_tests(columns)}
    return Row(identity, _text(columns, "question_content"), "", "program", meta)


def _read_program(columns: Mapping[str, Any], identity: str) -> Row:
    """A program's row in the layout for RL: tests are the ground truth, as an object or as JSON."""
    extra = _object(columns.get("extra_info"), "extra_info")
    truth = _object(columns.get("reward_model"), "reward_model").get("ground_truth")
    try:
        truth = _object(truth, "ground_truth")
    except DatasetError:  # whoever asks whether the row can be graded learns that it has no tests
        truth = {}
    name = _first(truth, "fn_name") or _first(extra, "fn_name", "func_name")
    meta: dict[str, Any] = {"tests": {"inputs": truth.get("inputs"), "outputs": truth.get("outputs"), "fn_name": name}}
    meta |= {key: extra[key] for key in ("starter_code", "difficulty", "contest_date") if extra.get(key)}
    if isinstance(columns.get("data_source"), str):
        meta["source"] = columns["data_source"]
    return Row(identity, _problem(columns | {"extra_info": extra}), "", "program", meta)


def _read_mixed(columns: Mapping[str, Any], identity: str) -> Row:
    kinds = f"{columns.get('data_source')} {columns.get('ability')}".lower()
    return (_read_program if "code" in kinds else _read_math)(columns, identity)


def _read_chat(columns: Mapping[str, Any], identity: str) -> Row | Conversation:
    messages, tools = columns.get("messages"), columns.get("tools")
    value = {"id": identity, "messages": _filled(_listed(messages, "messages"))}
    value["tools"] = _filled(_listed(tools, "tools")) if tools is not None else []
    if isinstance(columns.get("enable_thinking"), bool):
        value["meta"] = {"enable_thinking": columns["enable_thinking"]}
    return from_json(value, 0)


def _listed(value: Any, name: str) -> list:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DatasetError(f"{name} is not JSON") from None
    if not isinstance(value, list):
        raise DatasetError(f"{name} is not a list")
    return value


def _filled(value: Any) -> Any:
    """The value without the nulls that parquet puts where a row has not the keys of the others."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


_LAYOUTS: Mapping[Layout, Callable[[Mapping[str, Any], str], Row | Conversation]] = {
    "gsm8k": _read_gsm8k,
    "math": _read_math,
    "integer": _read_integer,
    "gpqa": _read_gpqa,
    "livecodebench": _read_livecodebench,
    "mixed": _read_mixed,
    "chat": _read_chat,
}
