"""Faults of a chain, by its command line: full disks, altered outputs, two at once. The data end up the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import run
from pipeline.config.data import DataConfig
from pipeline.data import prepare
from tests.data.data_sets import HAS_FFCV
from tests.faults.conftest import Disk
from tests.faults.toys import run_apart

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")]
PREPARE = ("tracking.enabled=false", "--until", "prepare")


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def digest(root: Path) -> str:
    (record,) = root.glob("demo/prepare/source/*/artifact.json")
    return str(json.loads(record.read_text())["output_digest"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = DataConfig(dataset="digits", classes=(0, 1, 2, 3, 4), val_fraction=0.15, test_fraction=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
        return prepare(config, tmp_path_factory.mktemp("undisturbed"), seed=0).digest


def prepare_digits(directory: str, ffcv: bool) -> None:
    """In a process of its own: what is mapped into memory ends with a signal when the disk is full."""
    from pipeline.data import build

    if not ffcv:
        build.ffcv_installed = lambda: False
    prepare(DataConfig(dataset="digits"), Path(directory), seed=0)


@pytest.mark.parametrize("ffcv", [pytest.param(True, marks=pytest.mark.skipif(not HAS_FFCV, reason="no ffcv")), False])
def test_disk_is_full_while_splits_are_written(ffcv: bool, disk: Disk, tmp_path: Path) -> None:
    directory = disk.root / "digits"
    for leave in (0, 60_000) if ffcv else (0, 5_000, 40_000, 90_000):
        disk.fill(leave)
        code, said = run_apart(prepare_digits, str(directory), ffcv, log=tmp_path / "log")
        assert code == 1, f"ended by signal {-code}" if code < 0 else said
        assert "space" in said, said
        disk.empty()
        assert not (directory / "prepared.json").exists()
    left = [path.name for path in directory.iterdir()]
    assert set(left) <= {".lock"}, "what was half written takes up space"
    places = (directory, tmp_path / "elsewhere")
    for place in places:
        assert run_apart(prepare_digits, str(place), ffcv, log=tmp_path / "log") == (0, "")
    records = [json.loads((place / "prepared.json").read_text()) for place in places]
    assert records[0] == records[1]


def test_disk_is_full_while_artifacts_are_written(
    undisturbed: str, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARTA_RUNS", str(disk.root))
    for leave in (0, 8_192, 200_000):
        disk.fill(leave)
        assert run.main(PREPARE) == 1
        disk.empty()
        shown = capsys.readouterr()
        assert "No space left on device" in shown.out + shown.err
    assert run.main(PREPARE) == 0
    assert digest(disk.root) == undisturbed


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"x"), "has 1 bytes, expected"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x07"), "was altered"),
    ],
)
def test_output_is_deleted_or_altered(
    harm: Callable[[Path], object], reason: str, undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(PREPARE) == 0
    (split,) = (tmp_path / "runs").glob("demo/prepare/source/*/train.npz")
    harm(split)
    capsys.readouterr()
    assert run.main(PREPARE) == 0
    assert f"output train.npz {reason}" in capsys.readouterr().out
    assert digest(tmp_path / "runs") == undisturbed


def test_two_chains_are_started_on_one_output(
    undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    command = [sys.executable, "-m", "pipeline.run", *PREPARE]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not list(root.glob("demo/prepare/source/*/started.json")):
            assert first.poll() is None
            time.sleep(0.005)
        os.kill(first.pid, signal.SIGSTOP)  # it holds its lock for as long as we look
        assert run.main(PREPARE) == 2
        error = capsys.readouterr().err
        assert "another one is running there" in error
        assert error.count("\n") == 1
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
    (record,) = root.glob("demo/prepare/source/*/prepared.json")
    if not HAS_FFCV:
        assert json.loads(record.read_text())["digest"] == undisturbed
    shutil.rmtree(root / "demo" / "prepare")
    assert run.main(PREPARE) == 0
    assert digest(root) == undisturbed
