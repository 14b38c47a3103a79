"""What holds for all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are noisy: no example fails for having taken long
settings.load_profile("untimed")


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of the test live in a directory of its own, and join no Ray that happens to run."""
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
