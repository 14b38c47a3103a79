"""The command line: exit codes, one readable line per mistake, nothing written by a refusal or a dry run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import run


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(autouse=True)
def _own_signals() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainng.epochs=3"], "did you mean 'training'?"),
        (["training.threat.eps=2"], "less than or equal to 1, got 2"),
        (["no-such-preset"], "expected a preset"),
        (["--from", "report", "--until", "prepare"], "expected --from not after --until"),
        (["data.dataset=npz", "data.path=missing.npz", "data.classes=null"], "missing.npz"),
        (["data.dataset=folder", "data.path=missing", "data.classes=null"], "missing"),
        (["data.dataset=npz"], "needs data.path"),
        (["search.enabled=true", "search.space=atack"], "expected a search space"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("sparta: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_the_cluster_has_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["scaling.num_workers=4096"]) == 3
    error = capsys.readouterr().err
    assert "need 4096 workers" in error
    assert "scaling.num_workers" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_is_too_big_is_exit_3_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["search.enabled=true", "search.num_workers=4096"]) == 3
    assert "lower search.num_workers" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_dry_run_names_every_stage_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for stage in (
        "prepare:source",
        "pretrain:source",
        "freeze:bank",
        "transfer:deeper",
        "evaluate:deeper",
        "report:page",
    ):
        assert stage in printed
    assert "search" not in printed
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_an_enabled_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", "search.enabled=true"]) == 0
    assert "search:best" in capsys.readouterr().out


def test_later_stage_alone_fails_when_the_earlier_ones_are_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "report"]) == 1
    assert "not chosen to run" in capsys.readouterr().out


def test_runs_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.runs_root() == tmp_path / "runs"
    monkeypatch.delenv("SPARTA_RUNS")
    monkeypatch.chdir(tmp_path)
    assert run.runs_root() == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run.runs_root() == Path.home() / "sparta-runs"


@pytest.mark.slow
def test_command_line_ends_with_the_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", "training.epochs=-1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "training.epochs" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_chain_says_so_and_goes_on_later(tmp_path: Path, number: signal.Signals, code: int) -> None:
    environment = {**os.environ, "SPARTA_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "pipeline.run", "tracking.enabled=false", "--until", "prepare"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while child.poll() is None and not list((tmp_path / "runs").glob("demo/prepare/source/*/started.json")):
        time.sleep(0.01)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in error
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "prepare:source" in ended.stdout
