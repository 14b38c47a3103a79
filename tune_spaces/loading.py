"""A space by name, or from a user's own Python or YAML file.

# my_space.yaml                                        # my_space.py
training.optimizer.lr: {log_uniform: [0.01, 0.5]}      from tune_spaces import Uniform
training.threat.eps: {uniform: ["2/255", "8/255"]}     SPACE = {"training.optimizer.lr": Uniform(0.01, 0.5, log=True)}
training.method.kind: {choice: [pgd_at, trades]}
training.method.beta: {uniform: [1, 10], when: {training.method.kind: trades}}
training.method.attack.step_size: {log_uniform: [0.1, 1], relative_to: evaluation.threat.eps}
"""

import importlib
import runpy
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from tune_spaces.distributions import Choice, Distribution, Integer, Relative, Rule, Space, Uniform, When

SPACES = ("activation", "attack", "joint", "optim")
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
    if path.suffix not in readers or not path.is_file():
        raise ValueError(
            f"expected a search space ({', '.join(SPACES)}) or the path of a .py or .yaml file with one, got {source!r}"
        )
    return _checked(readers[path.suffix](path), path)


def _read_python(path: Path) -> Any:
    try:
        content = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"search space {path} does not run: {type(error).__name__}: {error}") from error
    if "SPACE" not in content:
        raise ValueError(f"expected SPACE = {{...}} in {path}, got none; see tune_spaces/attack.py for one")
    return content["SPACE"]


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"search space {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a mapping of configuration keys in {path}, got {type(content).__name__}")
    return {str(key): _parse(entry, f"{path}: {key}") for key, entry in content.items()}


_EXTRAS = {"when", "relative_to"}


def _parse(entry: Any, where: str) -> Rule:
    kinds: dict[str, Callable[..., Distribution]] = {
        "uniform": lambda low, high: Uniform(_number(low), _number(high)),
        "log_uniform": lambda low, high: Uniform(_number(low), _number(high), log=True),
        "integer": lambda low, high: Integer(int(low), int(high)),
        "log_integer": lambda low, high: Integer(int(low), int(high), log=True),
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
    except (TypeError, ValueError) as error:
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
    return When(str(key), tuple(value) if isinstance(value, list) else (value,), distribution)


def _number(value: Any) -> float:
    return float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)


def _checked(space: Any, path: Path) -> Space:
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"expected a search space with at least one key in {path}, got {space!r}")
    seen: set[str] = set()
    for key, rule in space.items():
        if not isinstance(key, str) or not isinstance(rule, Rule):
            raise ValueError(f"{path}: {key}: expected a Uniform, Integer, Choice, Relative or When, got {rule!r}")
        if isinstance(rule, When) and rule.key not in seen:
            raise ValueError(f"{path}: {key} depends on {rule.key!r}, which is not above it; put that key first")
        seen.add(key)
    return space
