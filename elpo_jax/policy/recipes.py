"""Recipes: an algorithm as numbers.

GRPO, DAPO and ELPO are the same loop with the same loss; they differ in how the tree grows, in which advantages fill
the batch, and in a few clip numbers. A recipe is a frozen dataclass of these; an ablation replaces a field.
"""

import dataclasses
import math
import re
from typing import Any, Literal, get_args

from elpo_jax.trees.grow import SearchConfig

Critical = Literal["first_wrong", "searched", "verified"]
Normalisation = Literal["sequence", "token", "constant"]
PrefixWeight = Literal["per_leaf", "once"]


def elpo(**overrides: Any) -> "Recipe":
    """ELPO with the paper's hyper-parameters (Table 2): binary search, eq. 10 and 11, sequence-mean of token-means."""
    return dataclasses.replace(Recipe("elpo", SearchConfig()), **overrides)


def grpo(**overrides: Any) -> "Recipe":
    """GRPO as its common implementations have it: independent attempts, sample std, symmetric clip, token-mean.

    `grpo(ddof=0, normalisation="sequence")` is the control that `elpo` with `lambda_tree=0` on a flat tree must equal.
    """
    flat = Recipe(
        "grpo",
        SearchConfig(localizer="none"),
        lambda_tree=0.0,
        ddof=1,
        eps_high=0.2,
        eps_elc=0.0,
        normalisation="token",
    )
    return dataclasses.replace(flat, **overrides)


def dapo(**overrides: Any) -> "Recipe":
    """DAPO's loss: GRPO with the upper clip raised to 0.28.

    DAPO's dynamic sampling and overlong penalty concern prompts and rewards; they are not part of a recipe.
    """
    return grpo(**{"name": "dapo", "eps_high": 0.28} | overrides)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What tells one algorithm from another.

    Attributes:
      name: Names the stage's folder and plots.
      search: How rollouts are spent.
      lambda_tree: Weight of the branch advantage against the trajectory advantage (eq. 10), in 0..1.
      critical: Which failed attempts get a first irrecoverable step. `first_wrong`: every one, at the earliest node
        whose whole subtree failed (the paper's Figure 4). `searched`: those whose search named one (Algorithm 1), and
        the failed continuations that share it. `verified`: of these, where complete probes decided the search.
      ddof: 0 for the population std (the paper's numbers), 1 for the sample std, in eq. 7 and 8.
      eps_low: Clip range of the ratio below 1.
      eps_high: Clip range of the ratio above 1.
      eps_elc: What the lower range is widened by from the first irrecoverable step on (eq. 11).
      critical_weight: Factor on the loss of the first irrecoverable step; 1 in the paper.
      dual_clip: Bound c > 1 on the ratio where the advantage is negative; 0 for none.
      kl: Coefficient of the KL penalty to a reference policy; 0 for none.
      normalisation: `sequence`: mean over attempts of token means (eq. 1). `token`: mean over all tokens. `constant`:
        sum over a constant.
      prefix_weight: Whether a shared step counts once per leaf through it (the paper) or once.

    Raises:
      ValueError: If a field is out of range.
    """

    name: str
    search: SearchConfig
    lambda_tree: float = 0.5
    critical: Critical = "first_wrong"
    ddof: int = 0
    eps_low: float = 0.2
    eps_high: float = 0.315
    eps_elc: float = 0.115
    critical_weight: float = 1.0
    dual_clip: float = 0.0
    kl: float = 0.0
    normalisation: Normalisation = "sequence"
    prefix_weight: PrefixWeight = "per_leaf"

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"recipe name {self.name!r} cannot name a folder; use letters, digits, '_', '-' and '.'")
        for field, choices in (
            ("critical", Critical),
            ("normalisation", Normalisation),
            ("prefix_weight", PrefixWeight),
        ):
            if getattr(self, field) not in get_args(choices):
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(get_args(choices))}")
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof is {self.ddof}; use 0 (population std) or 1 (sample std)")
        if self.critical != "first_wrong" and self.search.localizer == "none":
            raise ValueError(f"critical={self.critical!r} needs searches, but search.localizer is 'none'")
        if self.critical != "searched" and self.search.localizer == "feedback":
            raise ValueError(
                f"search.localizer='feedback' samples nothing and only names steps, which critical={self.critical!r} "
                "does not read: choose critical='searched', or localizer='none'"
            )
        for field, number in self.scalars().items():
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{field} is {number}; it must be a finite number of at least 0")
        if self.lambda_tree > 1:
            raise ValueError(f"lambda_tree is {self.lambda_tree}; it must be between 0 and 1")
        if self.eps_low + self.eps_elc >= 1:
            raise ValueError(f"eps_low + eps_elc is {self.eps_low + self.eps_elc}; it must be less than 1")
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be more than 1, or 0 for none")

    def scalars(self) -> dict[str, float]:
        """The numbers that the jitted loss takes as traced scalars, so that changing one does not recompile."""
        names = ("lambda_tree", "eps_low", "eps_high", "eps_elc", "critical_weight", "dual_clip", "kl")
        return {name: float(getattr(self, name)) for name in names}
