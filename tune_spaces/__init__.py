"""Declarative search spaces: dotted configuration keys, each with a typed distribution. Imports nothing heavy."""

from tune_spaces.distributions import (
    Choice,
    Distribution,
    Integer,
    Relative,
    Rule,
    Space,
    Uniform,
    Value,
    When,
    active,
    draw,
    grid,
    resolve,
)
from tune_spaces.loading import SPACES, load_space

__all__ = [
    "SPACES",
    "Choice",
    "Distribution",
    "Integer",
    "Relative",
    "Rule",
    "Space",
    "Uniform",
    "Value",
    "When",
    "active",
    "draw",
    "grid",
    "load_space",
    "resolve",
]
