"""What tests of several packages need."""

import socket
import sys
import warnings
from pathlib import Path

import pytest

from pipeline.config.data import DataConfig, SplitLimits
from pipeline.data import FfcvMissingWarning, PreparedData, prepare


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def few_digits(directory: Path, *, train: int) -> PreparedData:
    """So many training images, and 30 to validate on. As .npz, which opens faster than FFCV's file."""
    config = DataConfig(dataset="digits", limit=SplitLimits(train=train, val=30, test=20), loader="memory")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FfcvMissingWarning)
        patch.setitem(sys.modules, "ffcv", None)
        return prepare(config, directory, seed=0)
