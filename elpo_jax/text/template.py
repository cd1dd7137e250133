"""Chat templates of checkpoint folders: found, compiled once, and rendered as the transformers library renders them.

A template is foreign code in a small language, hence jinja2's sandbox. Jinja's own `tojson` would escape `<` and `&`
for HTML; this one writes JSON as it is.
"""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class TemplateError(ValueError):
    """A chat template that is missing, does not parse, or refuses a conversation."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the model wrote, and changes nothing in what is written."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Template:
    """One compiled template.

    Args:
      source: The template.
      origin: Where it is from, for errors.
      variables: What it can refer to beside the conversation: `bos_token` and its like, and options of its own.
      now: Gives the time for `strftime_now`.

    Raises:
      TemplateError: If it does not parse.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ):
        self.source, self.origin, self.variables = source, origin, dict(variables or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{origin} does not parse, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise TemplateError(f"{origin} does not parse: it is nested too deeply") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Args:
          messages: In the layout of chat models: `role`, `content`, `tool_calls`.
          tools: Function schemas; none at all is written as the template writes a conversation without tools.
          add_generation_prompt: Whether to write what stands before the assistant's next turn.

        Raises:
          TemplateError: If the template raises.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # a template can make any of Python's
            roles = ", ".join(message["role"] for message in messages)
            reason = str(error) or type(error).__name__
            raise TemplateError(f"{self.origin} refuses a conversation of {roles}: {reason}") from None


@dataclasses.dataclass(frozen=True)
class Templates:
    """The templates of a folder: with tools the one for tools, where there is one."""

    default: Template
    tool_use: Template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """See `Template.render`."""
        return (self.tool_use if tools else self.default).render(messages, tools, add_generation_prompt)


def load_templates(
    folder: str | os.PathLike,
    options: Mapping[str, Any] | None = None,
    now: Callable[[], datetime.datetime] = datetime.datetime.now,
) -> Templates:
    """The chat templates of a checkpoint folder.

    They are looked for in `chat_template.jinja` and `additional_chat_templates/*.jinja`, and where there are none, in
    `tokenizer_config.json`, as one string or as a list of named ones.

    Args:
      folder: The checkpoint.
      options: Variables of the template's own, such as `enable_thinking` or `date_string`.
      now: Gives the time for `strftime_now`.

    Raises:
      TemplateError: If there is no template, or it does not parse.
      ValueError: If a file is damaged.
    """
    folder = pathlib.Path(folder)
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file)
    variables = _special_tokens(config, read_json(folder / "special_tokens_map.json")) | dict(options or {})
    found = _files(folder) or _named(config.get("chat_template"), config_file)
    if not found:
        raise TemplateError(
            f"{folder} has no chat template: copy the checkpoint's tokenizer_config.json or chat_template.jinja, and "
            "take an instruction-tuned checkpoint, for base models often have none"
        )
    if "default" not in found and "tool_use" not in found:
        raise TemplateError(f'{folder} has chat templates {", ".join(found)} but neither "default" nor "tool_use"')
    made = {name: Template(*found[name], variables, now) for name in ("default", "tool_use") if name in found}
    return Templates(made.get("default", made.get("tool_use")), made.get("tool_use", made.get("default")))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
      ValueError: If the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it from the checkpoint again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: copy it from the checkpoint again")
    return value


def _files(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Templates in files of their own, by name, with where they are from."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    try:
        return {name: (path.read_text(encoding="utf-8"), f"the chat template {path}") for name, path in paths.items()}
    except UnicodeDecodeError as error:
        raise TemplateError(f"a chat template of {folder} is not UTF-8: {error}") from None


def _named(value: Any, path: pathlib.Path) -> dict[str, tuple[str, str]]:
    """The templates in a configuration, by name, with where they are from."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, f"the chat template in {path}")}
    try:
        pairs = [(entry["name"], entry["template"]) for entry in value]
    except (KeyError, TypeError):
        pairs = [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise TemplateError(f"chat_template in {path} is neither a string nor a list of {{name, template}}")
    return {name: (source, f"the chat template {name!r} in {path}") for name, source in pairs}


def _special_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as strings; absent ones are left out, as the library does."""
    tokens = {}
    for key in (f"{name}_token" for name in _SPECIAL):
        value = config[key] if key in config else legacy.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
