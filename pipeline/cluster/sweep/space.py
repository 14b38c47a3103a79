"""From a point of a search space to a checked configuration, and whether a whole space can be."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, overlay
from tune_spaces import Space, Value, When, active

_SEARCHABLE = ("model", "augment", "training")
_JUDGE = "training.selection"
_LENGTH = "training.epochs"
_KIND = ".kind"


def overrides(base: ChainConfig, values: Mapping[str, Value]) -> dict[str, Any]:
    """The values as overrides of `base`, kinds before the settings of their sections.

    Another `kind` of a section brings its own defaults: the settings of the old kind would not fit it.
    """
    content = base.model_dump(mode="json")
    kinds = {key.removesuffix(_KIND): value for key, value in values.items() if key.endswith(_KIND)}
    others = {key: value for key, value in values.items() if not key.endswith(_KIND)}
    new = {section: {"kind": kind} for section, kind in kinds.items() if _lookup(content, section).get("kind") != kind}
    return {**new, **others}


def judged(base: ChainConfig, values: Mapping[str, Value]) -> dict[str, Any]:
    """The overrides of `values`, and the fixed threat that the epochs of every trial are validated against."""
    threat = base.search.threat or base.evaluation.threat
    return {**overrides(base, values), "training.selection.threat": threat.model_dump(mode="json")}


def trial_config(base: ChainConfig, values: Mapping[str, Value]) -> ChainConfig:
    """The configuration that a trial with these values trains by."""
    search = base.search
    budget = {"training.epochs": search.epochs} if search.epochs else {}
    # Schedulers and the live table look at every epoch.
    return overlay(base, {**judged(base, values), **budget, "training.selection.every": 1, "search.enabled": False})


def check_space(space: Space, base: ChainConfig) -> None:
    """Try every parameter at all its ends; the others stay at their first values.

    Raises:
        ConfigError: for a key that the configuration does not have, or that would change how trials are judged or how
            long they last, and for a value that it refuses; the message names the parameter.
    """
    for key in space:
        if key.partition(".")[0] not in _SEARCHABLE or key.startswith(_JUDGE):
            raise ConfigError(
                f"search space: {key} cannot be searched, it does not belong to a trial or decides how it is judged; "
                f"search keys of {', '.join(_SEARCHABLE)} outside {_JUDGE}"
            )
        if key == _LENGTH:
            raise ConfigError(
                f"search space: {key} cannot be searched, schedulers compare trials of one length; set search.epochs"
            )
    for key in space:
        for values in _at_the_ends(space, key):
            try:
                trial_config(base, values)
            except ConfigError as error:
                raise ConfigError(f"search space: {key}={values.get(key)!r}: {error}") from error


def _at_the_ends(space: Space, varied: str) -> list[dict[str, Value]]:
    """Points in which `varied` takes each of its ends under each value that it depends on; all else has its first."""
    return [point for wanted in _conditions(space, varied) for point in _points(space, varied, wanted)]


def _conditions(space: Space, key: str) -> Iterator[dict[str, Value]]:
    """Every way in which a parameter comes to exist, all the way up where its condition depends on another one."""
    rule = space[key]
    if not isinstance(rule, When):
        yield {}
        return
    for above in _conditions(space, rule.key):
        for value in rule.values:
            yield {**above, rule.key: value}


def _points(space: Space, varied: str, wanted: Mapping[str, Value]) -> list[dict[str, Value]]:
    points: list[dict[str, Value]] = [{}]
    for key, rule in space.items():
        extended = []
        for point in points:
            distribution = active(rule, point)
            if distribution is None:
                extended.append(point)
                continue
            ends = distribution.ends()
            options = ends if key == varied else [wanted.get(key, ends[0])]
            extended.extend({**point, key: option} for option in options)
        points = extended
    return points


def _lookup(content: Any, key: str) -> Mapping[str, Any]:
    for part in key.split("."):
        content = content.get(part) or {} if isinstance(content, Mapping) else {}
    return content if isinstance(content, Mapping) else {}
