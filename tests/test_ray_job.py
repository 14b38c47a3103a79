"""The chain as an operator submits it: by `infra/submit.sh` to a head that wants a token, a search in the same job."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Registry

ROOT = Path(__file__).parents[1]
SMALL = (
    "name=job",
    "training.epochs=1",
    "model.options.width=8",
    "transfer=[]",
    "evaluation.attacks=[{kind: pgd, steps: 2}]",
    "evaluation.curve.multiples=[1.0]",
    "evaluation.audit.budget=off",
    "evaluation.num_examples=32",
    "scaling.num_workers=1",
    "search.enabled=true",
    "search.space=attack",
    "search.num_trials=2",
    "search.epochs=1",
)
pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Head:
    """A Ray head on loopback that wants a token, its files in a short path (Ray's sockets do not bear a long one)."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.runs = directory, directory / "runs"
        self.token = secrets.token_hex(32)
        self.url = f"http://127.0.0.1:{free_port()}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        self.environment = {
            **kept,
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_API_SERVER_ADDRESS": self.url,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self) -> "subprocess.Popen[bytes]":
        ports = {"--port": free_port(), "--dashboard-agent-listen-port": free_port(), "--num-cpus": 2}
        command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"{name}={value}" for name, value in ports.items()]
        command += [f"--dashboard-port={self.url.rpartition(':')[2]}", f"--temp-dir={self.directory / 'ray'}"]
        command += ["--object-store-memory=200000000"]
        log = (self.directory / "head.log").open("wb")
        environment = {**self.environment, "SPARTA_RUNS": str(self.runs)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        deadline = time.monotonic() + 90
        while self.status("/api/jobs/", self.token) != 200:
            assert process.poll() is None, (self.directory / "head.log").read_text()
            assert time.monotonic() < deadline, (self.directory / "head.log").read_text()
            time.sleep(0.5)
        return process

    def status(self, path: str, token: str | None = None) -> int | None:
        """HTTP status of a request; None while nobody answers."""
        request = urllib.request.Request(self.url + path)
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except (urllib.error.URLError, OSError):
            return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="sparta-"))
    served = Head(directory)
    process = served.start()
    try:
        yield served
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, str]:
    """A clean repository with the code in it, and its commit: nobody edits it while it is submitted."""
    for name in ("pipeline", "sparta_models", "tune_spaces", "infra"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "as submitted"]):
        subprocess.run([*git, *arguments], check=True)
    head_of = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return tmp_path, head_of.stdout.strip()


def test_without_the_token_nobody_gets_in(head: Head) -> None:
    assert head.status("/api/jobs/") == 401
    assert head.status("/api/jobs/", "0" * 64) in (401, 403)
    assert head.status("/api/jobs/", head.token) == 200
    environment = {**head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(
        ["ray", "job", "submit", "--", "true"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode != 0


@pytest.mark.timeout(420)
def test_submitted_chain_searches_trains_registers_and_reports(head: Head, checkout: tuple[Path, str]) -> None:
    source, commit = checkout
    ended = subprocess.run(
        [str(source / "infra" / "submit.sh"), *SMALL],
        env={**head.environment, "A_SECRET_OF_THE_SUBMITTER": "do not take me along"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert set(re.findall(r"^(\S+) +done ", ended.stdout, re.MULTILINE)) == {
        "prepare:source",
        "search:best",
        "pretrain:source",
        "pretrain:source-control",
        "freeze:bank",
        "evaluate:source",
        "evaluate:source-control",
        "report:page",
    }
    assert (head.runs / "job" / "report.html").is_file()
    registry = Registry(TrackingConfig(uri=f"sqlite:///{head.runs}/mlflow.db"), head.runs / "job")
    assert commit in registry.lineage("sparta-activation@candidate")
    assert not [path for path in head.runs.rglob("*.json") if "do not take me along" in path.read_text()]
    (best,) = (head.runs / "job" / "search" / "best").glob("*/artifact.json")
    assert json.loads(best.read_text())["payload"]["overrides"]
