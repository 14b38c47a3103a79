"""What every configuration section shares: frozen, no unknown keys, and perturbation sizes written as "8/255"."""

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


class Section(BaseModel):
    """A frozen group of settings. An unknown key is an error, so that a misspelling never passes in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def one_line(error: Exception) -> str:
    """The message of an exception on one line; of pydantic's, every mistake with its place."""
    if isinstance(error, ValidationError):
        mistakes = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
        return " ".join("; ".join(mistakes).split())
    return " ".join(str(error).split())


def parse_fraction(value: Any) -> Any:
    """Read "8/255" (pixel units of an image in [0, 1]) as the float 8 / 255; anything else is left to pydantic."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'expected a number or a fraction such as "8/255", got {value!r}') from None
    return value


Eps = Annotated[float, BeforeValidator(parse_fraction), Field(gt=0, allow_inf_nan=False)]
"""Radius of a perturbation, in pixel units of an image in [0, 1]; accepts "8/255". Above 1 it makes sense in l2 alone,
where it is the length of many pixels together; whoever knows the norm checks that, by `check_radius`."""

PixelStep = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, allow_inf_nan=False)]
"""A step in pixel units; may be 0; accepts "2/255". As to 1, see Eps."""


def check_radius(norm: str, eps: float) -> None:
    """Refuse a linf radius above 1, which is more than a pixel of [0, 1] can move by."""
    if norm == "linf" and eps > 1:
        raise ValueError(f'expected 0 < eps <= 1 for linf, got {eps}: pixels are in [0, 1], write "8/255"')
