"""Models and data that the evaluation tests share; trained once per session, in seconds."""

import pytest
import torch

from pipeline.config.data import DataConfig
from pipeline.data import PreparedData, prepare
from pipeline.evaluation.audit.planted import HONEST, Digits


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small lose more to waiting than they gain
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits.load()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> PreparedData:
    return prepare(DataConfig(dataset="digits", loader="memory"), tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(scope="session")
def robust(digits) -> torch.nn.Module:
    """An adversarially trained ReLU network."""
    return HONEST["ReLU"].make(digits)


@pytest.fixture(scope="session")
def gated(digits) -> torch.nn.Module:
    """An adversarially trained Sparta network."""
    return HONEST["Sparta"].make(digits)
