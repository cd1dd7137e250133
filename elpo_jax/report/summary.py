"""What was run and what came out: the header, the tables of results and budgets, and accuracy by difficulty."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ORDER = ("sft", "grpo", "elpo")  # of the algorithms, in every table and chart; others follow by name
_HIGHLIGHTS = (  # of the config, worth seeing at once
    *("tasks.families", "tasks.wordmath.difficulties", "tasks.ledger.difficulties", "tasks.ledger.noise"),
    *("model.layers", "model.d_model", "model.vocab_size", "sampler.context", "rollout.temperature"),
    *("sft.mistake_rate", "sft.steps", "rl.steps", "rl.prompts", "rl.updates"),
    *("algo.search.budget", "algo.search.localizer", "algo.critical", "algo.lambda_tree"),
    *("algo.eps_low", "algo.eps_high", "algo.eps_elc"),
)


def ordered(names: Sequence[str]) -> list[str]:
    """Algorithm names in the order of the page."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def header(config: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, config highlights and the whole config, each as [[label, text]]; what is not known is left out."""
    made = results.get("provenance") or {}
    machine = [f"{made['devices']} x {made['device_kind']}" if "device_kind" in made else None, made.get("processor")]
    machine.append(f"{made['cores']} cores" if made.get("cores") else None)
    software = [f"{name} {made[name]}" for name in ("python", "jax") if name in made]
    facts = {
        "Experiment": config.get("name"),
        "Seed": config.get("seed"),
        "Commit": made.get("commit"),
        "Machine": ", ".join(filter(None, machine)) or None,
        "Software": ", ".join(software) or None,
    }
    flat = flatten(config)
    texts = dict(flat)
    return {
        "facts": [[label, _text(value)] for label, value in facts.items() if value is not None],
        "highlights": [[name, texts[name]] for name in _HIGHLIGHTS if name in texts],
        "config": flat,
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested names and values as [["a.b", "text"]], in order; the items of a list of groups are numbered."""
    out = []
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            out += flatten(value, f"{prefix}{key}.")
        else:
            out.append([f"{prefix}{key}", _text(value)])
    return out


def protocol_line(protocol: Mapping[str, Any] | None) -> str:
    """What stands beside every figure: the protocol's own line, or all its values."""
    protocol = protocol or {}
    return protocol.get("line") or ", ".join(f"{name} {text}" for name, text in flatten(protocol))


def validation_line(config: Mapping[str, Any]) -> str:
    """How the figures at fixed steps of training were measured, as far as the config tells."""
    rl, rollout = config.get("rl") or {}, config.get("rollout") or {}
    parts = [f"{rl['eval_tasks']} tasks per family" if "eval_tasks" in rl else None]
    parts += [f"temperature {rollout['temperature']}" if "temperature" in rollout else None]
    return ", ".join(filter(None, ["validation split", *parts]))


def result_tables(results: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The result and budget tables.

    Args:
      results: results.json; empty where the run has not finished.
      evaluations: eval/NAME.json by NAME.

    Returns:
      {"protocol", "families": [{"name", "rows": [row]}], "validation": {"protocol", "families"} of the other split,
      "budget": [row], "seconds", "reading": [sentence]}; a row of a family is {"name", "n", "tool_calls", "tokens",
      "metrics": [{"name", "value", "ci"}]}.
    """
    families = {name: dict(rows) for name, rows in (results.get("families") or {}).items()}
    for algorithm, evaluation in evaluations.items():
        for family, entry in (evaluation.get("families") or {}).items():
            known = families.setdefault(family, {}).get(algorithm) or {}
            families[family][algorithm] = {**entry, **known}
    validations = {name: evaluation.get("validation") or {} for name, evaluation in evaluations.items()}
    validation: dict[str, dict[str, Any]] = {}
    for algorithm, figures in validations.items():
        for family, entry in (figures.get("families") or {}).items():
            validation.setdefault(family, {})[algorithm] = entry
    protocol = results.get("protocol") or next((_protocol(e) for e in evaluations.values()), {})
    tables = _tables(families)
    budget, seconds = results.get("budget") or {}, results.get("seconds") or {}
    return {
        "protocol": protocol_line(protocol),
        "families": tables,
        "validation": {
            "protocol": next((line for v in validations.values() if (line := protocol_line(_protocol(v)))), ""),
            "families": _tables(validation),
        },
        "budget": [
            {"name": name, "seconds": seconds.get(name), **(budget.get(name) or {})}
            for name in ordered(list(dict.fromkeys([*budget, *(s for s in seconds if s not in ("eval", "total"))])))
        ],
        "seconds": {name: seconds[name] for name in ("eval", "total") if name in seconds},
        "reading": _reading(families, tables, budget) if tables else [],
    }


def difficulty_charts(evaluations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy by difficulty: [{"family", "metric", "protocol", "groups": [{"label", "bars": [bar]}]}].

    A bar is {"name": algorithm, "value", "ci": [low, high] or None, "n"}.
    """
    names = ordered(list(evaluations))
    families = dict.fromkeys(family for name in names for family in evaluations[name].get("families") or {})
    charts = []
    for family in families:
        entries = {name: ((evaluations[name].get("families") or {}).get(family) or {}) for name in names}
        tables = {name: entry.get("by_difficulty") or {} for name, entry in entries.items()}
        levels = sorted({level for table in tables.values() for level in table}, key=lambda level: (len(level), level))
        groups = [
            {"label": level, "bars": [_bar(name, table[level]) for name, table in tables.items() if level in table]}
            for level in levels
        ]
        metric = next((key for entry in entries.values() for key in entry if key.startswith("avg@")), "avg@k")
        protocol = protocol_line(_protocol(evaluations[names[0]]))
        if groups:
            charts.append({"family": family, "metric": metric, "protocol": protocol, "groups": groups})
    return charts


def _protocol(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    protocol = dict(evaluation.get("protocol") or {})
    return protocol | ({"line": evaluation["protocol_line"]} if "protocol_line" in evaluation else {})


def _tables(families: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table per family, from its evaluation figures by algorithm."""
    return [
        {"name": family, "rows": [_row(name, rows[name]) for name in ordered(list(rows))]}
        for family, rows in families.items()
    ]


def _row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    metrics = []
    for key, value in entry.items():
        if re.fullmatch(r"(avg|pass|maj)@\d+", key):
            nested = isinstance(value, Mapping)
            interval = value.get("ci") if nested else entry.get("ci")
            metrics.append({"name": key, "value": value.get("value") if nested else value, "ci": interval})
    metrics.sort(key=lambda metric: ("avg", "pass", "maj").index(metric["name"].split("@")[0]))
    return {
        "name": name,
        "metrics": metrics,
        **{key: entry.get(key) for key in ("n", "tool_calls", "tokens", "status")},
    }


def _bar(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    value = next((value for key, value in entry.items() if key.startswith("avg@")), None)
    return {"name": name, "value": value, "ci": entry.get("ci"), "n": entry.get("n")}


def paired_interval(first: Sequence[float], second: Sequence[float], samples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap over tasks of the mean difference first - second of two policies on the same tasks."""
    differences = np.subtract(first, second)
    draws = np.random.default_rng(0).integers(0, len(differences), (samples, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _reading(
    families: Mapping[str, Mapping[str, Any]], tables: Sequence[Mapping[str, Any]], budget: Mapping[str, Any]
) -> list[str]:
    """Sentences that say how to read the table, and what it does and does not settle."""
    out = [
        "avg@k is the share of right answers among k sampled attempts at a task, averaged over the n held-out tasks; "
        "the brackets are its bootstrap interval over tasks. pass@k asks whether any of the k is right, maj@k whether "
        "the most frequent answer is."
    ]
    rollouts = {name: (budget.get(name) or {}).get("rollouts") for name in ("grpo", "elpo")}
    if all(rollouts.values()):
        grpo, elpo = rollouts["grpo"], rollouts["elpo"]
        same = abs(grpo - elpo) <= 0.01 * max(grpo, elpo)
        out.append(
            f"Both started from the same SFT policy. GRPO used {grpo:,} rollouts and ELPO {elpo:,}: "
            + ("the same budget." if same else "not the same budget, so compare with care.")
            + " A branch reuses its prefix, so equal rollouts are not equal tokens; the budget table has both."
        )
    comparisons = []
    for table in tables:
        rows = {row["name"]: row["metrics"][0] for row in table["rows"] if row["metrics"]}
        tasks = {name: families[table["name"]][name].get("per_task") or [] for name in rows}
        parts = [
            _compare(rows["elpo"], rows[name], name, tasks["elpo"], tasks[name])
            for name in ORDER[:-1]
            if {"elpo", name} <= rows.keys()
        ]
        if any(parts):
            comparisons.append(
                f"{table['name']}: {rows['elpo']['name']} with ELPO is {' and '.join(filter(None, parts))}."
            )
    if comparisons:
        out += comparisons
        out.append(
            "Every interval here is over tasks, with one training seed: it says how much hangs on which tasks were "
            "drawn, and nothing about how another training would have come out."
        )
    return out


def _compare(
    elpo: Mapping[str, Any], other: Mapping[str, Any], name: str, ours: Sequence[float], theirs: Sequence[float]
) -> str:
    """How far ELPO is from another policy; with an interval where the success at each task, `ours` and `theirs`, is."""
    if elpo["value"] is None or other["value"] is None:
        return ""
    gain = 100 * (elpo["value"] - other["value"])
    side = "level with" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    part = f"{side} {name.upper()}"
    # Two policies meet the same tasks, so whether their own intervals overlap says little about the difference.
    if ours and len(ours) == len(theirs):
        low, high = (100 * end for end in paired_interval(ours, theirs))
        part += f" (paired bootstrap of the difference over {len(ours)} tasks: {low:+.1f} to {high:+.1f})"
    return part


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else str(value)
