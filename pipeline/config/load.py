"""From the command line to a checked ChainConfig: preset or file, `key.path=value` overrides, one readable error."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.base import Section, first_of, mistake, one_line
from pipeline.config.chain import ChainConfig
from tune_spaces.loading import yaml_loader

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"
_KIND = ".kind"


class ConfigError(ValueError):
    """The configuration cannot be used; the message says what was expected, what came and what to do."""


def load_config(source: str | None = None, overrides: Sequence[str] = ()) -> ChainConfig:
    """Read a preset by name or a YAML file by path, and lay `key.path=value` overrides over it.

    Without a source the embedded demo is meant, also where an override stands in its place. A chain whose file gives no
    `name` is called as the file.

    Raises:
        ConfigError: on a missing or malformed file, an unknown key, or a value out of range.
    """
    if source is not None and "=" in source and not Path(source).is_file():
        overrides = [source, *overrides]
        source = None
    content = read(source or DEFAULT_PRESET)
    slug = re.sub(r"[^a-z0-9._-]+", "-", Path(source).stem.lower())[:48] if source else ""
    return validate(apply_overrides({**({"name": slug} if slug[:1].isalnum() else {}), **content}, overrides))


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
        got = "an empty file" if content is None else type(content).__name__
        raise ConfigError(f"expected a mapping of sections in {path}, got {got}")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted keys ("training.epochs=3", "transfer.0.name=x"); values are read as YAML.

    Another `kind` of a section keeps of it what the new kind has too.
    """
    result = dict(content)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"expected key.path=value, got {override!r}")
        value = _parse(text, f"the value of {override!r}")
        result = _set(result, key.split("."), value, key)
        if key.endswith(_KIND):
            *section, _ = key.split(".")
            fits = _sections_at(ChainConfig, [*section, str(value)])[1]
            # What is asked for beside it stays, and is refused by its name where it does not fit.
            asked = [other.partition("=")[0].split(".") for other in overrides]
            names = {name for *above, name in (path[: len(section) + 1] for path in asked) if above == section}
            result = _without_strangers(result, section, names.union(*(one.model_fields for one in fits)))
    return result


def _without_strangers(container: Any, path: Sequence[str], known: Collection[str]) -> Any:
    """`container` where the section at `path` holds known keys alone."""
    if not path:
        return {key: value for key, value in container.items() if key in known}
    if isinstance(container, list | tuple):
        return [_without_strangers(v, path[1:], known) if i == int(path[0]) else v for i, v in enumerate(container)]
    return {**container, path[0]: _without_strangers(container[path[0]], path[1:], known)}


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
    """The checked configuration, or a ConfigError of one line per mistake, for the first ones."""
    try:
        return ChainConfig.model_validate(content)
    except ValidationError as error:
        mistakes = list(dict.fromkeys(" ".join(_explain(detail).split()) for detail in error.errors()))
        raise ConfigError("\n  ".join(first_of(mistakes))) from error


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
    if detail["type"] == "extra_forbidden":
        *above, last = detail["loc"]
        names, candidates = _sections_at(ChainConfig, above)
        known = sorted({name for candidate in candidates for name in candidate.model_fields})
        where = ".".join([*names, str(last)])
        return f"unknown key {where!r}{_close(str(last), known)}; known here: {', '.join(known)}"
    where = ".".join(_sections_at(ChainConfig, detail["loc"])[0]) or "configuration"
    return f"{where}: {mistake(detail)}"


def _close(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _sections_at(section: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The path of keys that an error location points to, without pydantic's names for the members of a union, and the
    sections that may stand there."""
    names, candidates, free = [], [section], False
    for part in loc:
        fields = [candidate.model_fields.get(str(part)) for candidate in candidates]
        annotations = [field.annotation for field in fields if field is not None]
        if annotations:
            names.append(str(part))
            candidates = [found for annotation in annotations for found in _sections_in(annotation)]
            free = any("Mapping" in str(annotation) or "dict" in str(annotation) for annotation in annotations)
        elif isinstance(part, int) or str(part).isdecimal() or (free and not candidates):
            names.append(str(part))
        elif candidates:  # the tag of a discriminated union: keep the members that carry it
            tagged = [c for c in candidates if "kind" in c.model_fields and c.model_fields["kind"].default == part]
            candidates = tagged or candidates
    return names, candidates


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _sections_in(argument)]
