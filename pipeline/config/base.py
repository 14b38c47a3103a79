"""What the sections share: frozen, no unknown keys, sizes written as "8/255"; and what an adversary may do."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tune_spaces.loading import number

MISTAKES = 5
"""So many are told."""
_SHOWN_CHARACTERS = 200


class Section(BaseModel):
    """A frozen group of settings, or a record. An unknown key is an error: a misspelling never passes in silence. So is
    a number that is infinite or none."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def one_line(error: Exception) -> str:
    """The message of an exception on one line; of pydantic's, the first mistakes, each with its place."""
    if isinstance(error, ValidationError):
        details = error.errors()
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {mistake(e)}".removeprefix(": ") for e in details]
        return " ".join("; ".join(first_of(mistakes)).split())
    return " ".join(str(error).split())


def first_of(mistakes: Sequence[str]) -> list[str]:
    """The first mistakes, and how many more there are."""
    more = [f"and {len(mistakes) - MISTAKES} more"] if len(mistakes) > MISTAKES else []
    return [*mistakes[:MISTAKES], *more]


def mistake(detail: ErrorDetails) -> str:
    """What pydantic found wrong, without its place: what was expected and, where that tells anything, what came."""
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":  # our own, which say it all
        return message
    if detail["type"] == "missing":
        return "expected a value, got none"
    if detail["type"] in ("model_attributes_type", "model_type"):  # pydantic's words for it name a class, or objects
        return f"expected a section, such as {{key: value}}, got {detail['input']!r}"
    message = f"{message[0].lower()}{message[1:]}"
    if detail["type"] == "json_invalid":  # what came is a whole file
        return message
    got = repr(detail["input"])
    # Not the beginning of it: a password that is cut in two is no longer known for one.
    shown = got if len(got) <= _SHOWN_CHARACTERS else f"{type(detail['input']).__name__} of {len(got)} characters"
    return f"{message}, got {shown}"


def parse_fraction(value: Any) -> Any:
    """Read "8/255" (pixel units of an image in [0, 1]) as the float 8 / 255; anything else is left to pydantic."""
    if isinstance(value, str):
        try:
            return number(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f'expected a number or a fraction such as "8/255", got {value!r}') from None
    return value


Eps = Annotated[float, BeforeValidator(parse_fraction), Field(gt=0, allow_inf_nan=False)]
"""Radius of a perturbation, in pixel units of an image in [0, 1]; accepts "8/255". Above 1 it makes sense in l2 alone,
where it is the length of many pixels together; ThreatModel, which knows the norm, checks that."""

PixelStep = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, allow_inf_nan=False)]
"""A step in pixel units; may be 0; accepts "2/255". As to 1, see Eps."""


def told_in_levels(eps: float) -> bool:
    """Whether a radius is told as "8/255": a whole number of grey levels of 8-bit images, which four digits round."""
    return abs(float(f"{eps:.4g}") - eps) > 1e-9 and abs(255 * eps - round(255 * eps)) < 1e-6


def radius_label(eps: float) -> str:
    """A radius for people, e.g. "8/255" or "0.15"."""
    return f"{255 * eps:.0f}/255" if told_in_levels(eps) else f"{eps:.4g}"


class ThreatModel(Section):
    """What the adversary may do: move an image by at most eps in a norm, inside [0, 1]."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the perturbation."""
    eps: Eps = 8 / 255
    """Radius in pixel units of an image in [0, 1]; accepts "8/255". At most 1 for linf."""

    @model_validator(mode="after")
    def _inside_the_box(self) -> "ThreatModel":
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f'expected 0 < eps <= 1 for linf, got {self.eps}: pixels are in [0, 1], write "8/255"')
        return self

    @property
    def label(self) -> str:
        """Short name for people, e.g. "linf 8/255"."""
        return f"{self.norm} {radius_label(self.eps)}"

    @property
    def key(self) -> str:
        """Short name in files and in what random numbers come from, e.g. "linf 0.03137"."""
        return f"{self.norm} {self.eps:.4g}"

    def scaled(self, multiple: float) -> "ThreatModel":
        """The same norm at `multiple` times the radius (at most 1 for linf)."""
        eps = multiple * self.eps
        return ThreatModel(norm=self.norm, eps=min(eps, 1.0) if self.norm == "linf" else eps)


_LARGEST_L2 = 50.0


def _plausible(threat: ThreatModel) -> ThreatModel:
    """A user who means 128/255 may write 128, which l2 would take."""
    if threat.norm == "l2" and threat.eps > _LARGEST_L2:
        raise ValueError(
            f'expected an l2 radius of at most {_LARGEST_L2:g}, got {threat.eps:g}: pixels are in [0, 1], as "128/255"'
        )
    return threat


ChosenThreat = Annotated[ThreatModel, AfterValidator(_plausible)]
"""A threat model that a user chose."""
