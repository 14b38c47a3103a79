"""From the command line to a checked ChainConfig: preset or file, `key.path=value` overrides, one readable error."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.base import Section, mistake, one_line
from pipeline.config.chain import ChainConfig
from tune_spaces.loading import yaml_loader

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"


class ConfigError(ValueError):
    """The configuration cannot be used; the message says what was expected, what came and what to do."""


def load_config(source: str | None = None, overrides: Sequence[str] = ()) -> ChainConfig:
    """Read a preset by name or a YAML file by path, and lay `key.path=value` overrides over it.

    Raises:
        ConfigError: on a missing or malformed file, an unknown key, or a value out of range.
    """
    return validate(apply_overrides(read(source or DEFAULT_PRESET), overrides))


def preset_names() -> list[str]:
    """Names that can stand where a path to a configuration can."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read(source: str) -> dict[str, Any]:
    """The mapping in a preset or a YAML file."""
    path = PRESETS / f"{source}.yaml" if source in preset_names() else Path(source)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8
        raise ConfigError(f"{source!r} cannot be read: {one_line(error)}") from error
    if text is None:
        raise ConfigError(
            f"expected a preset ({', '.join(preset_names())}) or the path of a YAML file, got {source!r}"
            + _close(source, preset_names())
        )
    content = _parse(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"expected a mapping of sections in {path}, got {type(content).__name__}")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys ("training.epochs=3", "transfer.0.name=x"); values are read as YAML."""
    result = dict(content)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"expected key.path=value, got {override!r}")
        result = _set(result, key.split("."), _parse(text, f"the value of {override!r}"), key)
    return result


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, yaml_loader())  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # not all are the parser's: 2001-99-99
        raise ConfigError(f"{what} is not valid YAML: {one_line(error)}") from error


def overlay(config: ChainConfig, values: Mapping[str, Any]) -> ChainConfig:
    """`config` with dotted keys replaced, checked again; how the best trial of a search reaches the later stages."""
    content: dict[str, Any] = config.model_dump(mode="json")
    for key, value in values.items():
        content = _set(content, key.split("."), value, key)
    return validate(content)


def validate(content: Mapping[str, Any]) -> ChainConfig:
    """The checked configuration, or a ConfigError of one line per mistake."""
    try:
        return ChainConfig.model_validate(content)
    except ValidationError as error:
        mistakes = "; ".join(dict.fromkeys(_explain(detail) for detail in error.errors()))
        raise ConfigError(" ".join(mistakes.split())) from error


def _set(container: Any, path: Sequence[str], value: Any, key: str) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(container, list | tuple):
        if not head.isdecimal() or int(head) >= len(container):
            raise ConfigError(f"expected an index below {len(container)} at {head!r} in {key!r}")
        index = int(head)
        return [_set(item, rest, value, key) if i == index else item for i, item in enumerate(container)]
    if container is None:
        container = {}
    if not isinstance(container, Mapping):
        raise ConfigError(f"{key!r} goes through {head!r}, but what is there is {container!r}, not a section")
    return {**container, head: _set(container.get(head), rest, value, key)}


def _explain(detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"]) or "configuration"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(ChainConfig, detail["loc"][:-1])
        return f"unknown key {where!r}{_close(str(detail['loc'][-1]), known)}; known here: {', '.join(known)}"
    return f"{where}: {mistake(detail)}"


def _close(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _fields_at(section: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Field names of the section that an error location points to; tags of unions and indices are passed over."""
    candidates: list[type[BaseModel]] = [section]
    for part in loc:
        fields = [candidate.model_fields.get(str(part)) for candidate in candidates]
        annotations = [field.annotation for field in fields if field is not None]
        if annotations:
            candidates = [found for annotation in annotations for found in _sections_in(annotation)]
        elif isinstance(part, str):  # the tag of a discriminated union: keep the members that carry it
            tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == part]
            candidates = tagged or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections_in(argument)]
