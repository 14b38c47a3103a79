"""A trained network on disk: model.safetensors and model.json, from which it is built again. Nothing is unpickled."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from pipeline.artifacts import MODEL, sha256_of
from pipeline.config.base import Section, one_line
from pipeline.training.files import DamagedFilesError, read_directory, write_directory
from sparta_models import Activation, ActivationSpec, build_model

FORMAT = 1
_WEIGHTS, _RECORD = "model", "model.json"


class ModelMeta(Section):
    """What build_model needs, and what the network was trained for."""

    format: int = FORMAT
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    activation: dict[str, Any]
    """Mapping of the activation that stands at the sites, that of the bank where one was put in."""
    frozen: bool = False
    """Whether the activations are frozen."""
    num_classes: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    dataset: str

    def build(self) -> nn.Module:
        """The network with fresh weights, its activations not yet frozen."""
        return build_model(
            self.name,
            # A frozen one has its bank's digest, whatever options came later.
            activation=ActivationSpec.saved(self.activation) if self.frozen else self.activation,
            num_classes=self.num_classes,
            in_channels=self.in_channels,
            mean=self.mean,
            std=self.std,
            **self.options,
        )


def save_model(directory: Path, model: nn.Module, meta: ModelMeta) -> str:
    """Write a network whole or not at all; returns the sha256 of its weights file."""
    write_directory(directory, {_WEIGHTS: model.state_dict()}, meta.model_dump(mode="json"), record=_RECORD)
    return model_sha256(directory)


def model_directory(directory: Path) -> Path:
    """Where the network lies in `directory`: in the folder of its own that a training gives it, or there itself."""
    inner = directory / MODEL
    return inner if inner.is_dir() else directory


def model_sha256(directory: Path) -> str:
    """Digest of a network's weights file."""
    return sha256_of(directory / f"{_WEIGHTS}.safetensors")


def record_sha256(directory: Path) -> str:
    """Digest of the file that says what network the weights belong to, and how its images are normalised."""
    return sha256_of(directory / _RECORD)


def load_model(directory: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network that `save_model` wrote, in eval mode on `device`.

    Raises:
        ValueError: for files that are missing, altered, of another format, or that fit no network of the zoo.
    """
    directory = model_directory(Path(directory))
    tensors, raw = read_directory(directory, record=_RECORD)
    if raw.get("format", FORMAT) != FORMAT:
        raise DamagedFilesError(f"expected format {FORMAT} in {directory / _RECORD}, got {raw['format']!r}")
    try:
        meta = ModelMeta.model_validate(raw)
        model = meta.build()
        model.load_state_dict(tensors[_WEIGHTS])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DamagedFilesError(f"expected a network of the zoo in {directory}, got: {one_line(error)}") from error
    if meta.frozen:
        freeze_activations(model)
    return model.eval().to(device)


def freeze_activations(model: nn.Module) -> None:
    """Pin every activation of a network."""
    for module in model.modules():
        if isinstance(module, Activation):
            module.freeze()
