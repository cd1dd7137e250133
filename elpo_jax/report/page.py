"""`report.html`: one file that shows what a run did, and needs nothing but a browser.

The page is a template, a style sheet and a script from `assets/`, with the run's data as a block of JSON that the
script reads. What a model or a tool wrote is data to the end: it passes `printable` here, is escaped inside the block,
and the script only ever makes text nodes of it. A content security policy names the hashes of the style and the script
and allows nothing else, so the page can make no request and run no other code.
"""

import base64
import hashlib
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elpo_jax.report.curves import curves
from elpo_jax.report.localization import localization
from elpo_jax.report.log import finite, read_json, read_metrics, write_text
from elpo_jax.report.summary import difficulty_charts, header, ordered, result_tables, validation_line
from elpo_jax.report.text import printable
from elpo_jax.report.trees import MOST_TREES, Dump, embedded_trees, read_dumps

_SCRIPTS = ("dom.js", "charts.js", "summary.js", "tree.js", "attempt.js", "main.js")  # in order of use
# What a reader must know before anything else on the page.
UNSAFE = (
    "UNSAFE: model-written programs ran without isolation, with all the rights of the user who ran this. They could "
    "read and change files, so nothing on this page can be trusted more than the programs were."
)
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def build_report(workdir: str | Path) -> Path:
    """Writes WORKDIR/report.html from whatever the run has written so far.

    Missing or damaged pieces are named on the page, in a plain sentence each; they never stop the rest.

    Args:
      workdir: The run's folder.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: If there is no such folder.
      ValueError: If the folder holds nothing that a run writes.
    """
    workdir = Path(workdir)
    path = workdir / "report.html"
    write_text(path, render(payload(workdir)))
    return path


def payload(workdir: Path) -> dict[str, Any]:
    """All that the page shows, as JSON-serialisable data with untrusted text still as it was written."""
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a folder: give the --workdir of a run")
    notes: list[str] = []
    config = _read(workdir / "config.json", notes, "The configuration is not shown")
    results = _read(workdir / "results.json", notes, "The run has not finished, so there are no final results")
    evaluations = {p.stem: _read(p, notes, "") for p in sorted((workdir / "eval").glob("*.json"))}
    evaluations = {name: value for name, value in evaluations.items() if value}
    if not evaluations:
        notes.append("No evaluation was written, so pass@k, maj@k and accuracy by difficulty are missing.")
    folders = {p.name: p for p in workdir.iterdir() if p.is_dir() and _is_stage(p)}
    folders = {name: folders[name] for name in ordered(list(folders))}
    if config is None and results is None and not evaluations and not folders:
        raise ValueError(f"{workdir} holds nothing that a run writes: give the --workdir of a run")
    if "elpo" in folders and "grpo" not in folders:
        notes.append("There is no GRPO stage, so ELPO has nothing beside it.")
    metrics = {name: _metrics(folder, notes) for name, folder in folders.items()}
    if any(row.get("unsafe_tools") for rows in metrics.values() for row in rows):
        notes.insert(0, UNSAFE)
    dumps, others, torn = read_dumps(folders)
    trees, unreadable = embedded_trees(dumps)
    return {
        "title": workdir.resolve().name,
        "header": header(config or {}, results or {}),
        "results": result_tables(results or {}, evaluations),
        "curves": curves(metrics, validation_line(config or {})),
        "difficulty": difficulty_charts(evaluations),
        "localization": localization(dumps),
        "notes": notes + torn + unreadable,
        "treesNote": _trees_note(trees["trees"], dumps, others),
        **trees,
    }


def render(data: Mapping[str, Any]) -> str:
    """The page around the data."""
    style = _asset("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, _SCRIPTS)) + "})();\n"
    policy = f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'"
    block = json.dumps(_visible(finite(data)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {"policy": policy, "style": style, "script": script, "data": block.translate(_ESCAPES)}
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html")
    )  # one pass: data is not searched


def _visible(value: Any) -> Any:
    """Every string in the data, names too, without characters that hide or steer."""
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, dict):
        return {printable(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list) else value


def _asset(name: str) -> str:
    return (importlib.resources.files("elpo_jax.report") / "assets" / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """The text's hash as a source expression of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _read(path: Path, notes: list[str], without: str) -> dict[str, Any] | None:
    """A JSON object, or None with a note."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        notes.append(f"{without}: there is no {path.name}.")
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object and was left out.")
        return None
    return value


def _is_stage(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "rollouts").is_dir()


def _metrics(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except ValueError as error:
        notes.append(f"The learning curves of {folder.name} are missing: {error}.")
        return []
    if not rows:
        notes.append(f"The stage {folder.name} has written no metrics yet, so it has no learning curves.")
    return rows


def _trees_note(trees: Sequence[Mapping[str, Any]], dumps: Sequence[Dump], others: int) -> str:
    """Exactly which trees are embedded."""
    if not dumps:
        return "No rollouts were written, so there are no trees to show."
    if not trees:
        return "None of the rollouts that were written could be read."
    shown = Counter((tree["stage"], tree["step"]) for tree in trees)
    seen = sum(len(dump.trees) for dump in dumps)
    parts = [f"{shown[d.stage, d.step]} of {len(d.trees)} from {d.stage} step {d.step}" for d in dumps]
    unread = f" Of each stage the first, the middle and the last dump were read; {others} others were not."
    return (
        f"Embedded are {len(trees)} of the {seen} trees in {len(dumps)} dumps: {', '.join(parts)}."
        f"{unread if others else ''} At most {MOST_TREES} are embedded, those with solved and failed attempts first; "
        "all are in STAGE/rollouts/."
    )
