import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import client as tracking_client


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database: the migrations take seconds, a copy takes none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking_client.open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The output directory of a chain, with its database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = tmp_path / "chain"
    directory.mkdir()
    shutil.copyfile(migrated, directory / "mlflow.db")
    return directory


@pytest.fixture
def config() -> TrackingConfig:
    return TrackingConfig(flush_seconds=0.05)


def write_bank(directory: Path, value: float = 1.0) -> Path:
    directory.mkdir(parents=True)
    save_file({"layer1.0.kernel": np.full((8, 3, 3), value, np.float32)}, directory / "activation.safetensors")
    (directory / "activation.json").write_text('{"activation": "sparta"}', encoding="utf-8")
    return directory


@pytest.fixture
def bank(root: Path) -> Path:
    return write_bank(root / "freeze" / "bank")
