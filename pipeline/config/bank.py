"""Where an activation comes from that was trained elsewhere."""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.config.base import Section

_VERSION = re.compile(r"^[^/:@\s]+/[1-9]\d*$")


class BankConfig(Section):
    """A trained activation that a chain transfers, instead of training one. Exactly one of its fields is given."""

    pretrained: str | None = None
    """Name of a bank that ships with the package, see `sparta_models.pretrained_banks`."""
    registered: str | None = None
    """NAME/VERSION in the registry of `tracking.uri`; no alias, which may point elsewhere tomorrow."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """Folder that `ActivationBank.save` or `python -m pipeline.registry pull` wrote; also looked for in SPARTA_DATA."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of pretrained, registered and path, got {' and '.join(given) or 'none'}")
        if self.registered is not None and not _VERSION.match(self.registered):
            raise ValueError(
                f"expected registered as NAME/VERSION, got {self.registered!r}; "
                "`python -m pipeline.registry show NAME@ALIAS` says which version an alias points at"
            )
        return self

    @property
    def label(self) -> str:
        """What was given, in words."""
        return next(f"{name} {value}" for name, value in self if value is not None)
