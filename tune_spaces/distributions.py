"""The typed distributions that a search space is made of. Nothing but the standard library."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Uniform:
    """A real number between low and high; with `log`, uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)

    def sample(self, rng: random.Random) -> float:
        """Draw one value."""
        return self.at(rng.random())

    def at(self, share: float) -> float:
        """The value at `share` of the way from low (0) to high (1)."""
        if self.log:
            return min(max(self.low * math.pow(self.high / self.low, share), self.low), self.high)
        return self.low + (self.high - self.low) * share

    def grid(self, points: int) -> list[Value]:
        """`points` values from low to high, evenly spaced (with `log`, by factors)."""
        return [self.at(index / (points - 1)) for index in range(points)]

    def ends(self) -> list[Value]:
        """The extreme values."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Integer:
    """A whole number from low to high, both included; with `log`, uniform in its logarithm."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(end, bool) or not isinstance(end, int) for end in (self.low, self.high)):
            raise ValueError(f"a range of integers expected whole numbers, got {self.low!r} and {self.high!r}")
        _check_range(self.low, self.high, self.log)

    def sample(self, rng: random.Random) -> int:
        """Draw one value."""
        if not self.log:
            return rng.randint(self.low, self.high)
        # Half a step beyond both ends, so that rounding gives the ends their share.
        drawn = math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
        return min(max(round(drawn), self.low), self.high)

    def grid(self, points: int) -> list[Value]:
        """At most `points` different values from low to high."""
        inside = Uniform(self.low, self.high, self.log)
        return list(dict.fromkeys(round(inside.at(index / (points - 1))) for index in range(points)))

    def ends(self) -> list[Value]:
        """The extreme values."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Choice:
    """One of several options."""

    options: tuple[Value, ...]

    def __init__(self, *options: Value) -> None:
        if strangers := [option for option in options if not isinstance(option, Value)]:
            raise ValueError(f"a choice expected numbers, texts, true, false or null, got {strangers[0]!r}")
        if len(options) < 2 or len(set(map(repr, options))) < len(options):
            raise ValueError(f"a choice expected at least two different options, got {list(options)}")
        object.__setattr__(self, "options", options)

    def sample(self, rng: random.Random) -> Value:
        """Draw one value."""
        return rng.choice(self.options)

    def grid(self, points: int) -> list[Value]:
        """All options."""
        return list(self.options)

    def ends(self) -> list[Value]:
        """All options."""
        return list(self.options)


@dataclass(frozen=True)
class Relative:
    """A real number between low and high times the value that the configuration has at `to`.

    So one space of attack strengths fits photographs (8/255) and handwritten digits (0.15). `resolve` makes it Uniform.
    """

    low: float
    high: float
    to: str
    """Dotted key of the configuration, e.g. "evaluation.threat.eps"."""
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.log)

    def of(self, unit: float) -> Uniform:
        """The range in absolute numbers."""
        return Uniform(self.low * unit, self.high * unit, self.log)


@dataclass(frozen=True)
class When:
    """A parameter that exists only while another one, earlier in the space, has one of the given values.

    The other one may itself depend on a third, but what is in `then` may not: a condition holds a distribution.
    """

    key: str
    values: tuple[Value, ...]
    then: "Uniform | Integer | Choice | Relative"

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:  # "trades" would hold for every part of the word
            raise ValueError(f"a condition on {self.key!r} expected a tuple of values, got {self.values!r}")
        if not isinstance(self.then, Uniform | Integer | Choice | Relative):
            raise ValueError(
                f"a condition on {self.key!r} expected a Uniform, Integer, Choice or Relative, got {self.then!r}"
            )

    def holds(self, chosen: Mapping[str, Value]) -> bool:
        """Whether the parameter exists beside the values chosen so far."""
        return self.key in chosen and chosen[self.key] in self.values


Distribution = Uniform | Integer | Choice
Rule = Distribution | Relative | When
Space = Mapping[str, Rule]
"""Dotted configuration keys, in order, each with what it is drawn from."""


def resolve(space: Space, config: Mapping[str, Any]) -> Space:
    """The space with every relative range in absolute numbers, which is what can be drawn from.

    Args:
        space: as it was declared.
        config: the configuration as nested mappings.

    Raises:
        ValueError: a range is relative to a key that the configuration does not have, or that is no positive number.
    """
    return {key: _resolved(key, rule, config) for key, rule in space.items()}


def _resolved(key: str, rule: Rule, config: Mapping[str, Any]) -> Rule:
    if isinstance(rule, When):
        then = _resolved(key, rule.then, config)
        assert not isinstance(then, When), "a condition holds a distribution"
        return When(rule.key, rule.values, then)
    if not isinstance(rule, Relative):
        return rule
    unit: Any = config
    for part in rule.to.split("."):
        unit = unit.get(part) if isinstance(unit, Mapping) else None
    if isinstance(unit, bool) or not isinstance(unit, int | float) or unit <= 0:
        raise ValueError(
            f"{key} is relative to {rule.to}: expected a positive number there in the configuration, got {unit!r}"
        )
    return rule.of(unit)


def active(rule: Rule, chosen: Mapping[str, Value]) -> Distribution | None:
    """The distribution of a parameter given the values chosen before it; None when it does not exist."""
    found = rule.then if isinstance(rule, When) else rule
    if isinstance(rule, When) and not rule.holds(chosen):
        return None
    assert not isinstance(found, Relative | When), "expected a resolved space"
    return found


def draw(space: Space, rng: random.Random) -> dict[str, Value]:
    """One point of the space at random."""
    chosen: dict[str, Value] = {}
    for key, rule in space.items():
        if (distribution := active(rule, chosen)) is not None:
            chosen[key] = distribution.sample(rng)
    return chosen


def grid(space: Space, points: int) -> Iterator[dict[str, Value]]:
    """Every combination, `points` values along each range; a parameter that does not exist multiplies nothing.

    One at a time, the last key fastest: all together may be more than fit into memory.
    """
    return _combinations(list(space.items()), {}, points)


def _combinations(
    rules: Sequence[tuple[str, Rule]], chosen: dict[str, Value], points: int
) -> Iterator[dict[str, Value]]:
    if not rules:
        yield chosen
        return
    (key, rule), rest = rules[0], rules[1:]
    distribution = active(rule, chosen)
    extended = [chosen] if distribution is None else [{**chosen, key: value} for value in distribution.grid(points)]
    for combination in extended:
        yield from _combinations(rest, combination, points)


def _check_range(low: Any, high: Any, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"a range expected low < high, both finite, got {low} and {high}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range expected low > 0, got {low}")
