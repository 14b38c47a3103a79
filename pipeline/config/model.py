"""Which network, and which activation stands at its sites."""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Section
from sparta_models import ACTIVATIONS, MODELS, ActivationSpec, build_activation

Option = bool | int | float | str


class ActivationConfig(Section):
    """An activation by its registry name, and the options of its constructor."""

    name: str = "sparta"
    """A name in `sparta_models.ACTIVATIONS`."""
    sharing: Literal["site", "stage", "network"] = "site"
    """Who shares parameters: every site its own, one function per resolution stage, or one for the network."""
    options: Mapping[str, Option] = Field(default_factory=dict)
    """Keyword arguments of the activation, e.g. kernel_size, beta, variant for "sparta"."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        """Give options that aren't named their defaults: a later version's defaults then can't pass for these."""
        if not isinstance(data, Mapping) or not isinstance(options := data.get("options", {}), Mapping):
            return data
        name = data.get("name", cls.model_fields["name"].default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            return data
        return {**data, "options": {**ActivationSpec.parse(name).options, **options}}

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        try:
            with torch.device("meta"):  # a kernel that fills the memory is told from its size
                build_activation(self.name, 8, **self.options)
        except (TypeError, RuntimeError) as error:  # RuntimeError: more elements than torch can count
            raise ValueError(f"activation {self.name!r} does not take these options: {error}") from error
        return self

    def spec(self) -> dict[str, Any]:
        """The mapping that `sparta_models.build_model(activation=...)` takes."""
        return {"name": self.name, "sharing": self.sharing, **self.options}


class ArchitectureConfig(Section):
    """A network of the zoo, by name, with the options of its constructor."""

    name: str = "resnet8"
    """A name in `sparta_models.MODELS`."""
    options: Mapping[str, Option] = Field(default_factory=dict)
    """Keyword arguments of the model, e.g. width, stem."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
        return name

    @property
    def label(self) -> str:
        """Name and options in words, e.g. "resnet8 width=16"."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


class ModelConfig(ArchitectureConfig):
    """An architecture together with the activation at its sites."""

    activation: ActivationConfig = ActivationConfig()
    """What stands at every activation site."""
