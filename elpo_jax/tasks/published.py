"""The published data sets that `python -m elpo_jax.tasks.prepare` knows: how many rows, which ones, under what licence.

Hashes are over what every published layout of a data set shares, in any order (`readers.content_hash`). Where nobody
here has seen the published file, the hash is unknown: `prepare` prints the one it found.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from elpo_jax.tasks.base import Split

Layout = Literal["gsm8k", "math", "integer", "gpqa", "livecodebench", "mixed", "chat"]
Hashed = Literal["rows", "answers"]


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of a published data set.

    Attributes:
      layout: How its rows are read (`readers.py`).
      rows: By split, the numbers of rows that are right; none where it is unknown.
      licence: Of the content, in words, for people.
      sha256: By split, where it is known.
      hashed: "rows": problems without white space and answers; "answers": only those, as copies word the problems
        differently; conversations by all that is said.
      pick: A word that the file's name has, where several data sets are published together.
      skip: Words that the names of other files beside it have.
      key: Column with the row's own id, in small letters; "" numbers the rows.
    """

    layout: Layout
    rows: Mapping[Split, tuple[int, ...]]
    licence: str
    sha256: Mapping[Split, str] = dataclasses.field(default_factory=dict)
    hashed: Hashed = "rows"
    pick: str = ""
    skip: tuple[str, ...] = ()
    key: str = ""


_MATH = "problems by MAA and AoPS, whatever the licence of the copy; do not redistribute"
_MATH500 = "e7c38ab0d726e3f3dc699c26a4c6631c43b531db3fbb106f1085811788701491"

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "gsm8k": Published(
            "gsm8k",
            {"train": (7473,), "test": (1319,)},
            "MIT (openai/grade-school-math)",
            {
                "train": "d51e4fda461d2b9f125504e55e7c7b187ab8adbeb56e19f4b713b2972b83859b",
                "test": "b26148c0e2e5e5b61e2120159fbbbb70aa1977500ec6e989044308c03b800e7d",
            },
            skip=("socratic", "example_model_solutions"),
        ),
        "math": Published("math", {"train": (7500,), "test": (5000,)}, f"MIT (hendrycks/math); {_MATH}"),
        "math500": Published(
            "math", {"test": (500,)}, f"MIT (openai/prm800k); {_MATH}", {"test": _MATH500}, key="unique_id"
        ),
        "math_level3to5": Published(  # 2 of the training rows have no answer
            "math",
            {"train": (8523,), "test": (500,)},
            f"MIT (hkust-nlp/simpleRL-reason); {_MATH}",
            {"train": "caaff8bca2949e16d7aeeb91a96d2bff6f33e6899034ab08ff4421fbd83f6677", "test": _MATH500},
        ),
        "aime2024": Published(
            "integer",
            {"test": (30,)},
            _MATH,
            {"test": "d9ada1c19f7c24469e319bbfa69d7ec30740af087afe2f6026da3be55cc869f7"},
            "answers",
        ),
        "aime2025": Published(
            "integer",
            {"test": (30,)},
            _MATH,
            {"test": "e37d88270557ef45337ad5487f2cf5c771865ab9bb59cd37090f313a4b0d7bf5"},
            "answers",
        ),
        "amc23": Published(
            "integer",
            {"test": (40,)},
            _MATH,
            {"test": "98766aa49d2415529e26270171eb9b4462970f4a95200302f7983dfaa9fac250"},
            "answers",
        ),
        "gpqa_diamond": Published(
            "gpqa",
            {"test": (198,)},
            "CC BY 4.0; its authors ask that no example be shown in plain text online",
            pick="diamond",
            key="record id",
        ),
        "livecodebench_v6": Published(
            "livecodebench",
            # All releases to v6; what v6 added (test6.jsonl); contests of February to May 2025, as usually reported.
            # --from-date and --to-date take those out of the others.
            {"test": (1055, 175, 131)},
            "CC (livecodebench/code_generation_lite); problems by LeetCode, AtCoder and Codeforces",
            key="question_id",
        ),
        "open_agentrl_sft_3k": Published("chat", {"train": ()}, "see Gen-Verse/Open-AgentRL"),
        "open_agentrl_30k": Published("mixed", {"train": ()}, "see Gen-Verse/Open-AgentRL and what it is made of"),
    }
)
