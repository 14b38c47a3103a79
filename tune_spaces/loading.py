"""A space by name, or from a user's own Python or YAML file.

# my_space.yaml                                        # my_space.py
training.optimizer.lr: {log_uniform: [0.01, 0.5]}      from tune_spaces import Uniform
training.threat.eps: {uniform: ["2/255", "8/255"]}     SPACE = {"training.optimizer.lr": Uniform(0.01, 0.5, log=True)}
training.method.kind: {choice: [pgd_at, trades]}
training.method.beta: {uniform: [1, 10], when: {training.method.kind: trades}}
training.method.attack.step_size: {log_uniform: [0.1, 1], relative_to: evaluation.threat.eps}
"""

import importlib
import re
import runpy
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from tune_spaces.distributions import Choice, Distribution, Integer, Relative, Rule, Space, Uniform, When

SPACES = ("activation", "attack", "joint", "optim", "strength")
"""Names of the spaces that come with the project."""


def load_space(source: str) -> Space:
    """The space of that name, or from that .py, .yaml or .yml file.

    Raises:
        ValueError: for an unknown name, an unreadable file, or an entry that is no distribution.
    """
    if source in SPACES:
        space: Space = importlib.import_module(f"tune_spaces.{source}").SPACE
        return space
    path = Path(source)
    readers: dict[str, Callable[[Path], Any]] = {".py": _read_python, ".yaml": _read_yaml, ".yml": _read_yaml}
    try:
        found = path.suffix in readers and path.is_file()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ValueError(f"search space {source} cannot be read: {error}") from error
    if not found:
        raise ValueError(
            f"expected a search space ({', '.join(SPACES)}) or the path of a .py or .yaml file with one, got {source!r}"
        )
    return _checked(readers[path.suffix](path), path)


def _read_python(path: Path) -> Any:
    try:
        content = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"search space {path} does not run: {what}") from error
    if "SPACE" not in content:
        raise ValueError(f"expected SPACE = {{...}} in {path}, got none; see tune_spaces/attack.py for one")
    return content["SPACE"]


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), yaml_loader())  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ValueError(f"search space {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not all are the parser's: 2001-99-99, not UTF-8
        raise ValueError(f"search space {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a mapping of configuration keys in {path}, got {type(content).__name__}")
    return {str(key): _parse(entry, f"{path}: {key}") for key, entry in content.items()}


_NO_WORDS = {
    "bool": (r"(?i:true|false)", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""What is no word, by its YAML type: pattern and first characters. Floats as in PyYAML, but for those of base 60."""


@cache
def yaml_loader() -> Any:
    """How the project reads YAML: as version 1.2 has booleans and whole numbers, and every key once.

    In YAML 1.1, as PyYAML reads it, `off` is false, 00014 is 12 and 1:30 is 90; here they are words. And of a repeated
    key the last value would count.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:  # before `<<` brings in what these replace
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if before := lines.get((key.tag, key.value)):
                        raise yaml.YAMLError(
                            f"the key {key.value!r} stands in line {before} and again in line {line}; leave one out"
                        )
                    lines[key.tag, key.value] = line
            return node

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _NO_WORDS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, first) in _NO_WORDS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), list(first))
    return Loader


_EXTRAS = {"when", "relative_to"}


def _parse(entry: Any, where: str) -> Rule:
    kinds: dict[str, Callable[..., Distribution]] = {
        "uniform": lambda low, high: Uniform(_number(low), _number(high)),
        "log_uniform": lambda low, high: Uniform(_number(low), _number(high), log=True),
        "integer": Integer,
        "log_integer": lambda low, high: Integer(low, high, log=True),
        "choice": Choice,
    }
    names = set(entry) - _EXTRAS if isinstance(entry, Mapping) else set()
    if len(names) != 1 or not names <= set(kinds) or not isinstance(entry[min(names)], list):
        raise ValueError(
            f"{where}: expected one of {', '.join(kinds)} with a list, as {{uniform: [0, 1]}}, got {entry!r}"
        )
    (name,) = names
    try:
        distribution = kinds[name](*entry[name])
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{where}: {name} cannot be made of {entry[name]}: {error}") from error
    rule = _relative(distribution, entry["relative_to"], where) if "relative_to" in entry else distribution
    return _conditional(rule, entry["when"], where) if "when" in entry else rule


def _relative(distribution: Distribution, to: Any, where: str) -> Relative:
    if not isinstance(distribution, Uniform) or not isinstance(to, str):
        raise ValueError(f"{where}: relative_to expected a key beside uniform or log_uniform, got {to!r}")
    return Relative(distribution.low, distribution.high, to, distribution.log)


def _conditional(distribution: Distribution | Relative, when: Any, where: str) -> When:
    if not isinstance(when, Mapping) or len(when) != 1:
        raise ValueError(f"{where}: expected one condition, as when: {{training.method.kind: trades}}, got {when!r}")
    ((key, value),) = when.items()
    try:
        return When(str(key), tuple(value) if isinstance(value, list) else (value,), distribution)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def number(text: str) -> float:
    """Read "0.1" or "8/255". Raises ValueError, ZeroDivisionError or OverflowError for anything else."""
    text = text.replace(" ", "")
    # A Fraction of "1e99999999" would have all of its digits.
    return float(Fraction(text)) if "/" in text else float(text)


def _number(value: Any) -> float:
    return number(value) if isinstance(value, str) else float(value)


def _checked(space: Any, path: Path) -> Space:
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"expected a search space with at least one key in {path}, got {space!r}")
    seen: dict[str, Rule] = {}
    for key, rule in space.items():
        if not isinstance(key, str) or not isinstance(rule, Rule):
            raise ValueError(f"{path}: {key}: expected a Uniform, Integer, Choice, Relative or When, got {rule!r}")
        if isinstance(rule, When) and rule.key not in seen:
            raise ValueError(f"{path}: {key} depends on {rule.key!r}, which is not above it; put that key first")
        if isinstance(rule, When) and (never := [value for value in rule.values if not _takes(seen[rule.key], value)]):
            raise ValueError(f"{path}: {key} depends on {rule.key}={never[0]!r}, a value that is never chosen there")
        seen[key] = rule
    return space


def _takes(rule: Rule, value: Any) -> bool:
    """Whether a parameter can come to have this value, other than by a chance of zero."""
    distribution = rule.then if isinstance(rule, When) else rule
    if isinstance(distribution, Integer):
        return isinstance(value, int) and distribution.low <= value <= distribution.high
    return isinstance(distribution, Choice) and value in distribution.options
