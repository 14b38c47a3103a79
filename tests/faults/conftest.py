"""A training to be disturbed, what it comes to undisturbed, and a disk that can be filled."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.base import ThreatModel
from pipeline.config.model import ModelConfig
from pipeline.config.training import (
    AttackConfig,
    CheckpointConfig,
    EMAConfig,
    OptimizerConfig,
    PGDATConfig,
    SelectionConfig,
    TrainingConfig,
)
from pipeline.data import PreparedData
from pipeline.training import TrainJob
from tests.faults.toys import Result, finish, start
from tests.helpers import few_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """64 training images: two steps an epoch."""
    return few_digits(tmp_path_factory.mktemp("digits"), train=64)


@pytest.fixture(scope="session")
def make_job(digits: PreparedData) -> Callable[[Path], TrainJob]:
    """Eight epochs with a checkpoint after every step."""
    training = TrainingConfig(
        epochs=8,
        batch_size=32,
        threat=ThreatModel(eps=0.1),
        method=PGDATConfig(attack=AttackConfig(steps=1)),
        optimizer=OptimizerConfig(lr=0.05),
        selection=SelectionConfig(attack=AttackConfig(steps=1)),
        ema=EMAConfig(),
        checkpoint=CheckpointConfig(every_steps=1),
    )
    model = ModelConfig(name="resnet8", options={"width": 4})
    return lambda output: TrainJob(model=model, data=digits.directory, training=training, output=output)


@pytest.fixture(scope="session")
def undisturbed(make_job: Callable[[Path], TrainJob], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What the training comes to when nothing happens to it."""
    job = make_job(tmp_path_factory.mktemp("undisturbed") / "run")
    return finish(job, start(job))


class Disk:
    """A file system of 64 MiB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Use up all space but `leave` bytes."""
        with self._ballast.open("ab", buffering=0) as file:
            free = os.statvfs(self.root)
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))

    def empty(self) -> None:
        """Give the space back."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk" / "volume"  # logs go beside it
    root.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(root)
    subprocess.run(["umount", "--lazy", str(root)], check=True)
