"""The protocol behind each column of the paper's Table 1, and the figures that it prints for ELPO.

The paper gives a protocol for none of them. Four columns are those of Open-AgentRL, whose evaluation script is public;
three are not in that repository, and how the paper made them is unknown, so theirs are our choice. Nothing here is a
like-for-like target: most rows of other methods in that table are copied from papers with other tools, data and k.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Source = Literal["Open-AgentRL", "our choice"]


@dataclasses.dataclass(frozen=True)
class Column:
    """How a column is measured.

    Attributes:
      dataset: Name for `python -m elpo_jax.tasks.prepare`.
      rows: Problems of its test split.
      k: Attempts at each problem; the figure is their mean, avg@k.
      source: Of k; all columns share the other numbers below.
      elpo_qwen2_5_7b: What the paper prints for ELPO with Qwen2.5-7B, in percent.
      elpo_qwen3_4b: Likewise with Qwen3-4B.
    """

    dataset: str
    rows: int
    k: int
    source: Source
    elpo_qwen2_5_7b: float
    elpo_qwen3_4b: float


# Open-AgentRL's evaluation; for the other columns our choice. ELPO's context of 20K tokens holds prompt and answer.
TEMPERATURE, TOP_P, MOST_TURNS, CONTEXT = 1.0, 0.6, 16, 20480

COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "AIME24": Column("aime2024", 30, 32, "Open-AgentRL", 48.1, 74.3),
        "AIME25": Column("aime2025", 30, 32, "Open-AgentRL", 31.1, 69.4),
        # With 500 problems four attempts, and with more one, leave a standard error of at most about one point.
        "MATH500": Column("math500", 500, 4, "our choice", 89.4, 89.6),
        "GSM8K": Column("gsm8k", 1319, 1, "our choice", 92.8, 94.5),
        "MATH": Column("math", 5000, 1, "our choice", 91.2, 92.8),
        "GPQA-D": Column("gpqa_diamond", 198, 32, "Open-AgentRL", 52.7, 59.1),
        # The slice of contests from February to May 2025, as in Open-AgentRL; a problem counts if all tests pass.
        "LCB-v6": Column("livecodebench_v6", 131, 32, "Open-AgentRL", 19.7, 28.6),
    }
)
