"""The chain as an operator submits it: by `infra/submit.sh` to a head that wants a token; a search; stopped, again."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Registry, read_history, read_journal
from tests.faults.chains import Mirror, undisturbed
from tests.faults.toys import figures
from tests.helpers import free_port

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
STOPPED = (
    "name=stopped",
    "training.epochs=60",
    "training.checkpoint.every_steps=2",
    "model.options.width=8",
    "transfer=[]",
    "scaling.num_workers=1",
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

    def job(self, name: str) -> dict[str, object]:
        """What Ray says of a job."""
        request = urllib.request.Request(
            f"{self.url}/api/jobs/{name}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, object] = json.load(answer)
        return found

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

    def jobs(self) -> str:
        """What the cluster tells whoever holds the token of its jobs: command, environment, state."""
        request = urllib.request.Request(self.url + "/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())


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
    told = head.jobs()
    assert commit in told
    assert "MLFLOW_DISABLE_TELEMETRY" in told  # the job's environment is in it,
    assert "do not take me along" not in told  # the submitter's is not
    unpacked = head.directory.glob("ray/session_*/runtime_resources/working_dir_files/*/pipeline/data/loader.py")
    assert list(unpacked), "the job ran with code from elsewhere"
    (best,) = (head.runs / "job" / "search" / "best").glob("*/artifact.json")
    assert json.loads(best.read_text())["payload"]["overrides"]


@pytest.mark.extended  # on a busy machine one of the trainings may be over before `ray job stop` has started
@pytest.mark.timeout(900)
def test_stopped_job_is_submitted_again_and_comes_to_the_same_weights_and_metrics(
    head: Head, checkout: tuple[Path, str], tmp_path: Path
) -> None:
    submit = [str(checkout[0] / "infra" / "submit.sh"), *STOPPED, "--until", "pretrain"]
    detached = {**head.environment, "SUBMIT": "--no-wait --submission-id first"}
    subprocess.run(submit, env=detached, capture_output=True, timeout=120, check=True)
    deadline, branches = time.monotonic() + 150, ("source", "source-control")
    journals = {branch: head.runs / "stopped" / "pretrain" / branch for branch in branches}
    mirror, trainings = Mirror(head.runs), [f"pretrain:{branch}" for branch in branches]
    while not epochs(journals["source"]):
        assert head.job("first")["status"] in ("PENDING", "RUNNING"), head.job("first")
        assert time.monotonic() < deadline, head.job("first")
        time.sleep(0.1)
    subprocess.run(["ray", "job", "stop", "first"], env=head.environment, capture_output=True, timeout=60, check=True)
    assert head.job("first")["status"] == "STOPPED"
    assert all(epochs(journal) < 60 for journal in journals.values()), "one was over before it was stopped"
    assert {mirror.statuses()[name][-1] for name in ("stopped", *trainings)} == {"KILLED"}

    ended = subprocess.run(submit, env=head.environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert set(re.findall(r"^(\S+) +resume ", ended.stdout, re.MULTILINE)) == set(trainings)
    (data,) = (head.runs / "stopped" / "prepare" / "source").glob("*/prepared.json")
    expected = undisturbed(load_config(None, STOPPED), data.parent, tmp_path / "undisturbed")
    assert {name: mirror.statuses()[name] for name in trainings} == {name: ["FINISHED"] for name in trainings}
    for branch, place in journals.items():
        (output,) = [record.parent for record in place.glob("*/artifact.json")]
        assert json.loads((output / "trained.json").read_text())["weights_sha256"] == expected[branch].weights_sha256
        assert figures(output) == figures(tmp_path / "undisturbed" / branch)
        told = read_history(output / "metrics.jsonl")
        assert mirror.history(f"pretrain:{branch}") == {key: sorted(points) for key, points in told.items()}


def epochs(directory: Path) -> int:
    """How many epochs the training below a branch's directory has logged."""
    entries = [entry for path in directory.glob("*/metrics.jsonl") for entry in read_journal(path)[0]]
    return sum("epoch" in entry.metrics for entry in entries)
