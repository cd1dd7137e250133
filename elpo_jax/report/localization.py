"""How good the localization was in training: the first irrecoverable steps in the dumps against the exact oracle's."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from elpo_jax.report.trees import UNREADABLE, Dump, read_leaves

_EVIDENCE = ("verified", "unverified", "assumed")


def localization(dumps: Sequence[Dump]) -> dict[str, Any] | None:
    """Compares every step that is marked as first irrecoverable, in all trees of families that have an oracle.

    A step counts once, however many failed attempts share it. Steps named by the oracle only (where credit marks none)
    are not counted.

    Args:
      dumps: All trees that were read, not only those that the page embeds: they are chosen by outcome.

    Returns:
      {"about": what was counted, "rows": [{"stage", "evidence", "steps": n, "agree", "early", "late"}]} with rows in
      the order of `dumps` and then of trust; "early" and "late" count steps before and after the oracle's. None where
      no oracle was asked.
    """
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    where = dict.fromkeys((dump.stage, dump.step) for dump in dumps)
    families: set[str] = set()
    for dump in dumps:
        for tree in dump.trees:
            try:
                leaves = read_leaves(tree)
                marked = {leaf["path"][leaf["first_failure"] - 1]: leaf for leaf in leaves if leaf["evidence"]}
                found = [
                    (leaf["evidence"], _verdict(leaf["first_failure"], leaf["oracle"]))
                    for leaf in marked.values()
                    if leaf["oracle"]
                ]
                families |= {str(tree["task"]["family"]) for leaf in leaves if leaf["oracle"]}
            except UNREADABLE:  # the choice of trees to embed tells of those
                continue
            for evidence, verdict in found:
                counts[dump.stage, evidence][verdict] += 1
    rows = [
        {"stage": stage, "evidence": evidence, "steps": found.total()}
        | {verdict: found[verdict] for verdict in ("agree", "early", "late")}
        for stage in dict.fromkeys(stage for stage, _ in where)
        for evidence in _EVIDENCE
        if (found := counts.get((stage, evidence)))
    ]
    read = ", ".join(f"{stage} step {step}" for stage, step in where)
    about = (
        f"Distinct steps marked as first irrecoverable in all trees of {', '.join(sorted(families))} in the dumps that "
        f"were read ({read}). Located: a search named the step; verified: a continuation from before it was solved (or "
        "that is the prompt), and all that were to follow it failed. Assumed: no search named it, so credit takes the "
        "first step below which nothing in the tree was solved: step 1 of an attempt that was never branched. Early: "
        "the goal was still in reach after it. Late: it was lost before it. The oracle asks whether any player could "
        "still reach the goal, a search whether this policy did."
    )
    return {"about": about, "rows": rows} if rows else None


def _verdict(step: int, oracle: int) -> str:
    return "agree" if step == oracle else "early" if step < oracle else "late"
