from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.config.model import ActivationConfig, ModelConfig
from pipeline.config.training import AttackConfig, OptimizerConfig, PGDATConfig, SelectionConfig, TrainingConfig
from pipeline.data import PreparedData
from pipeline.training import TrainJob
from tests.helpers import few_digits

FAST = {
    "epochs": 2,
    "batch_size": 32,
    "threat": ThreatModel(eps=0.1),
    "method": PGDATConfig(attack=AttackConfig(steps=2)),
    "optimizer": OptimizerConfig(lr=0.05),
    "selection": SelectionConfig(attack=AttackConfig(steps=2)),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """90 training images: batches of 32, 32, 26."""
    return few_digits(tmp_path_factory.mktemp("digits"), train=90)


@pytest.fixture
def make_job(digits: PreparedData, tmp_path: Path) -> Callable[..., TrainJob]:
    """A job of two seconds; keywords replace fields of its training section, `output` its directory."""

    def make(output: str = "run", **training: Any) -> TrainJob:
        job = {key: training.pop(key) for key in ("bank", "bank_digest", "adapt", "augment", "seed") if key in training}
        activation = training.pop("activation", ActivationConfig())
        return TrainJob(
            model=ModelConfig(name="resnet8", activation=activation, options={"width": 4}),
            data=digits.directory,
            training=TrainingConfig(**{**FAST, **training}),
            output=tmp_path / output,
            **job,
        )

    return make


class SmallNet(nn.Module):
    """Convolution, batch norm, dropout and a linear layer: everything an attack could disturb."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.norm(self.conv(x)))
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(h, 2).flatten(1)))


@pytest.fixture
def small_net() -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    net.norm.running_mean.normal_(std=0.3)
    net.norm.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)
