"""Runs programs that a model wrote, so that they can do nothing but answer.

    from elpo_jax.tools.sandbox import Sandbox, Limits

    with Sandbox(workers=2, limits=Limits(cpu_s=2.0)) as sandbox:
        result = sandbox.run("print(sum(range(10)))")
        results = sandbox.run_many(["print(1)", Program("print(input())", stdin="2")])

`docs/sandbox.md` says what is promised and what is not; `python -m elpo_jax.tools.sandbox check` tries it on this
machine.
"""

from elpo_jax.tools.base import InfrastructureError, Status, ToolResult
from elpo_jax.tools.sandbox.backends import SandboxUnavailable
from elpo_jax.tools.sandbox.limits import Limits
from elpo_jax.tools.sandbox.pool import Program, Sandbox

__all__ = ["InfrastructureError", "Limits", "Program", "Sandbox", "SandboxUnavailable", "Status", "ToolResult"]
