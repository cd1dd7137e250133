"""Learning curves: metrics files in, panels of lines out.

A panel shows one metric with one line per stage, so that the algorithms lie on the same axes. Stages that learn by
imitation have a group of panels of their own, because their step counts something else.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_POINTS = 300  # of one line; more are averaged in equal runs of steps

Row = Mapping[str, Any]
Panel = dict[str, Any]

# Trees with one outcome have no gradient and are left out of the batch, and of every mean over its tokens.
_TRAINED = "the model tokens of trees with different outcomes"
# (key, title, what it tells)
RL_PANELS = (
    ("loss", "Loss", "clipped policy-gradient objective"),
    ("rollout/entropy", "Entropy of the policy", "nats per sampled token of all trees, full vocabulary"),
    ("loss/clip_low", "Clipped low", f"ratio fell below the lower bound; share of {_TRAINED}"),
    ("loss/clip_high", "Clipped high", f"ratio rose above the upper bound; share of {_TRAINED}"),
    ("loss/relaxed_only", "Kept by the relaxed bound", f"only the relaxed bound keeps them alive; share of {_TRAINED}"),
    (
        "loss/first_mismatch_mean",
        "Sampler against trainer, mean",
        "|difference of log-probabilities|, nats, at the first update",
    ),
    ("loss/first_mismatch_max", "Sampler against trainer, largest", "likewise, nats; rounding only"),
    ("loss/first_ratio_deviation_max", "Ratio at the first update", "largest distance from 1, rounding only"),
    ("loss/mismatch_mean", "Drift within a batch, mean", "|change of log-probability since sampling| over all updates"),
    ("loss/mismatch_max", "Drift within a batch, largest", "likewise, nats; what the updates before have learned"),
    ("grad_norm", "Gradient norm", "before clipping"),
)
SFT_PANELS = (
    ("loss", "Loss", "nats per model token"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("lr", "Learning rate", ""),
    ("tokens_per_s", "Speed", "tokens per second"),
)
_ABOUT_RL = (
    "Training success counts only the root attempts, as they were sampled for training: the other leaves continue "
    f"failed attempts and would bias it. Of more than {MOST_POINTS} steps, neighbours are averaged."
)
_ABOUT_SFT = (
    f"Imitation of demonstrations, model tokens only. Of more than {MOST_POINTS} steps, neighbours are averaged."
)
_ROOT = "rollout/root_success"
_VALIDATION = re.compile(r"eval/(?P<family>.+)/(?P<metric>avg@\d+)")
_BAND = re.compile(r"eval/.+/ci_(low|high)")


def is_rl(rows: Iterable[Row]) -> bool:
    """True for a stage that made rollouts."""
    return any(key.startswith("rollout/") for row in rows for key in row)


def curves(stages: Mapping[str, Sequence[Row]], validation: str = "") -> list[dict[str, Any]]:
    """Groups of panels from the metrics rows of each stage.

    Args:
      stages: Rows of each stage, by name.
      validation: How validation figures were measured; stands beside them.

    Returns:
      [{"title", "axis", "about", "panels": [panel], "rest": [panel]}]; "rest" holds every other metric of the group. A
      panel is {"title", "about", "fraction": bool, "lines": [{"name", "points": [[step, y]], "band": [[step, low,
      high]]}]}.
    """
    learning = {name: rows for name, rows in stages.items() if rows and is_rl(rows)}
    imitation = {name: rows for name, rows in stages.items() if rows and not is_rl(rows)}
    groups = []
    if learning:
        groups.append(_group("Reinforcement learning", "RL step", _ABOUT_RL, learning, RL_PANELS, validation))
    if imitation:
        groups.append(_group("Cold start", "SFT step", _ABOUT_SFT, imitation, SFT_PANELS, validation))
    return groups


def thin(points: list[list[float]], most: int = MOST_POINTS) -> list[list[float]]:
    """At most `most` points: equal runs of consecutive points, each replaced by its mean in every coordinate."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [[sum(column) / len(run) for column in zip(*run, strict=True)] for run in runs]


def _group(
    title: str, axis: str, about: str, stages: Mapping[str, Sequence[Row]], listed: tuple, validation: str
) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for rows in stages.values() for row in rows for key in row))
    roots = [key for key in keys if key.startswith(_ROOT + "/")] or [key for key in keys if key == _ROOT]
    shown = [(key, f"Training success, {_family(key)}", "in %, root attempts only") for key in roots]
    for match in filter(None, map(_VALIDATION.fullmatch, keys)):
        heading = f"Validation {match['metric']}, {match['family']}"
        shown.append((match[0], heading, f"in %, interval shaded. {validation}"))
    shown += listed
    used = {"step", _ROOT, *(key for key, _, _ in shown)}
    rest = [(key, key, "") for key in sorted(keys) if key not in used and not _BAND.fullmatch(key)]
    return {
        "title": title,
        "axis": axis,
        "about": about,
        "panels": [panel for item in shown if (panel := _panel(stages, *item))["lines"]],
        "rest": [panel for item in rest if (panel := _panel(stages, *item))["lines"]],
    }


def _panel(stages: Mapping[str, Sequence[Row]], key: str, title: str, about: str) -> Panel:
    match = _VALIDATION.fullmatch(key)
    lines = []
    for stage, rows in stages.items():
        points = _column(rows, key)
        band = _column(rows, f"eval/{match['family']}/ci_low", f"eval/{match['family']}/ci_high") if match else []
        if points:
            lines.append({"name": stage, "points": thin(points), "band": thin(band)})
    success = bool(match) or key.startswith((_ROOT, "rollout/success"))
    return {"title": title, "about": about, "fraction": success, "lines": lines}


def _column(rows: Sequence[Row], *keys: str) -> list[list[float]]:
    """[[step, value, ...]] of the rows in which every key has a number (null stands for one that was not finite)."""
    return [
        [row["step"], *(row[key] for key in keys)]
        for row in rows
        if all(isinstance(row.get(key), int | float) and not isinstance(row[key], bool) for key in keys)
    ]


def _family(key: str) -> str:
    return key.removeprefix(_ROOT).lstrip("/") or "all families"
