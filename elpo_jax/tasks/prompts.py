r"""What a model is asked: a row's problem between the instructions for its kind, after the recipe of Open-AgentRL.

The structure is the recipe's, the words are ours: a line that asks for steps, the problem, what the tool is for, a plan
before any call, and the form of the final answer; in training math answers are asked for without units. `plain` is
the problem alone with the form of the answer, for policies that are too small for instructions.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from elpo_jax.tasks.rows import Row

_TOOL = "You may call the tool to calculate something or to check a result."
_PLAN = "**Note:** first lay out a high-level strategy for the solution; only then call the tool, step by step."


@dataclasses.dataclass(frozen=True)
class Instructions:
    """The words around a problem, a blank line between all parts.

    Attributes:
      opening: Before the problem; {domain} is " of" and the row's domain, or nothing.
      details: After the problem; {starter} is the row's starter code.
      form: The form of the final answer.
      training: Added to that in training.
    """

    opening: str
    details: tuple[str, ...]
    form: str
    training: str = ""


INSTRUCTIONS: Mapping[str, Instructions] = MappingProxyType(
    {
        "math": Instructions(
            "Analyze the following problem and solve it step by step.",
            (_TOOL, _PLAN),
            "When you have the result, call no tool any more and end with the final answer inside \\boxed{}.",
            "Put no units inside the box.",
        ),
        "letter": Instructions(
            "Analyze the following problem{domain} and solve it step by step.",
            (_TOOL, _PLAN),
            "When you have decided, call no tool any more and end with the uppercase letter of the right option inside "
            "\\boxed{}.",
        ),
        "program": Instructions(
            "Analyze the following programming problem and solve it in Python step by step.",
            (
                "You may call the tool to try your program, for instance on the examples.",
                _PLAN,
                "The program must read its input from standard input and write its output to standard output.",
            ),
            "When you are sure, call no tool any more and end with the whole program in one block that begins with "
            "```python and ends with ```.",
        ),
        "function": Instructions(
            "Analyze the following programming problem and solve it in Python step by step.",
            (
                "You may call the tool to try your program, for instance on the examples.",
                _PLAN,
                "Complete this code and keep its names; it will be called, so read no input and print nothing:\n"
                "```python\n{starter}\n```",
            ),
            "When you are sure, call no tool any more and end with the whole program in one block that begins with "
            "```python and ends with ```.",
        ),
    }
)


def prompt_of(row: Row, training: bool, plain: bool = False) -> str:
    """The user's message for a row.

    Args:
      row: The problem.
      training: With what the recipe asks for in training only.
      plain: Only the problem, and what the form of the answer is.
    """
    function = row.grader == "program" and row.meta.get("tests", {}).get("fn_name") is not None
    words = INSTRUCTIONS["function" if function else row.grader]
    form = " ".join(filter(None, (words.form, words.training if training else "")))
    domain = f" of {row.meta['domain']}" if row.meta.get("domain") else ""
    # A starter code and a domain can hold braces themselves, so they are put in by hand.
    opening = words.opening.replace("{domain}", domain)
    details = [d.replace("{starter}", str(row.meta.get("starter_code", "")).strip()) for d in words.details]
    if plain:
        return f"{row.problem}\n\n{details[-1]}\n\n{form}" if function else f"{row.problem}\n\n{form}"
    return "\n\n".join((opening, row.problem, *details, form))
