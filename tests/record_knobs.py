"""Runs the tiny experiment and prints, as JSON, the config fields that nothing read; the argument is a new folder.

Reads by the machinery that only checks, compares or saves a config do not count.
"""

import dataclasses
import json
import sys

from elpo_jax.config import Config
from experiments.run import main

MACHINERY = ("dataclasses.py", "<string>")
CHECKS = {"__post_init__", "check", "_set"}
seen: set[tuple[str, str]] = set()
fields: set[tuple[str, str]] = set()


def record(cls: type) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    fields.update((cls.__name__, name) for name in names)

    def read(self, name):
        if name in names and (cls.__name__, name) not in seen:
            frame = sys._getframe(1)
            if not frame.f_code.co_filename.endswith(MACHINERY):
                stack = frame
                while stack is not None and stack.f_code.co_name not in CHECKS:
                    stack = stack.f_back
                if stack is None:
                    seen.add((cls.__name__, name))
        return object.__getattribute__(self, name)

    cls.__getattribute__ = read


def walk(value: object) -> None:
    if isinstance(value, tuple):
        for item in value:
            walk(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            walk(getattr(value, field.name))
        if type(value).__getattribute__ is object.__getattribute__:
            record(type(value))


walk(Config())
# Short: what is read does not depend on how well the policy does.
few = {"sft.steps": 6, "tasks.ledger.demonstrations": 40, "against": "()", "rl.steps": 2, "eval.tasks": 1, "eval.k": 1}
assert main(["tests/tiny.py", "--workdir", sys.argv[1], *(f"--set={name}={value}" for name, value in few.items())]) == 0
print(json.dumps(sorted(f"{cls}.{name}" for cls, name in fields - seen)))
