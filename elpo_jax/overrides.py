"""From an experiment file and `--set key=value` to a `Config`.

A key that does not exist, and a value of the wrong type, are errors that say what would have been right.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import pathlib
import traceback
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from elpo_jax.config import SCALARS, Config, ConfigError


class _DoesNotFit(ConfigError):
    """A value that its dataclass refuses beside the present values of its other fields."""


def load(path: str) -> Config:
    """The config of an experiment file, by its `get_config()`.

    Raises:
      ConfigError: If the file or the function is missing, it returns something else, or it makes a config of keys that
        do not exist or values that are not allowed.
    """
    file = pathlib.Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"there is no experiment file {path}: give a file NAME.py with a get_config() function")
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _errors_name_the_line(file):
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError("there is no get_config() function: add one that returns an elpo_jax.config.Config")
        config = get_config()
        if not isinstance(config, Config):
            raise ConfigError(f"get_config() returned {type(config).__name__}, not an elpo_jax.config.Config")
    return config


@contextlib.contextmanager
def _errors_name_the_line(file: pathlib.Path) -> Iterator[None]:
    """What a dataclass says of a bad keyword or value becomes a ConfigError that names the file and its line."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        here = str(file.absolute())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == here]
        where = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise ConfigError(f"{where}: {error}") from error


def override(config: Config, assignments: list[str]) -> Config:
    """`config` with "a.b=c" applied; each value is read as the type of its field.

    The order does not matter: what does not fit the other values yet is tried again after them. Of a key that is given
    twice the last value counts.

    Raises:
      ConfigError: For an unknown key or a value that does not fit, naming what would.
    """
    waiting: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, as in --set algo.eps_elc=0.0, not {assignment!r}")
        waiting[key.strip()] = text.strip()
    while waiting:
        problems: dict[str, ConfigError] = {}
        for key, text in waiting.items():
            try:
                config = _set(config, key.split("."), text, key)
            except _DoesNotFit as error:
                problems[key] = error
        if len(problems) == len(waiting):
            raise next(iter(problems.values()))
        waiting = {key: waiting[key] for key in problems}
    return config.check()


def _set(config: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(config, tuple):  # against.0.eps_high=...
        if not name.isdigit() or int(name) >= len(config):
            raise ConfigError(f"unknown key {key!r}: {name!r} is not an index below {len(config)}")
        index = int(name)
        return config[:index] + (_set(config[index], rest, text, key),) + config[index + 1 :]
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"unknown key {key!r}: {name!r} goes deeper than the value it names")
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
        raise ConfigError(f"unknown key {key!r}: {type(config).__name__} has no {name!r}; {hint}")
    old = getattr(config, name)
    if rest:
        value = _set(old, rest, text, key)
    else:
        hint = typing.get_type_hints(type(config))[name]
        if dataclasses.is_dataclass(hint):
            inner = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(hint))
            raise ConfigError(f"{key!r} is a group; set one of {inner}")
        value = _parse(text, hint, key)
    try:
        return dataclasses.replace(config, **{name: value})
    except ConfigError:
        raise
    except ValueError as error:
        raise _DoesNotFit(f"{key}={text}: {error}") from None


def _parse(text: str, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _parse(text, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if text in arguments:
            return text
        raise ConfigError(f"{key}={text!r} must be one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if dataclasses.is_dataclass(arguments[0]):
            if items:
                raise ConfigError(f"{key} can be emptied with {key}=() or changed with {key}.0.FIELD=VALUE")
            return ()
        return tuple(_parse(item, arguments[0], key) for item in items)
    if hint is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
    elif hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    elif hint is str:
        return text
    raise ConfigError(f"{key}={text!r} is not {SCALARS[hint]}")
