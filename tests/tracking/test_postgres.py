"""A real PostgreSQL and the team's MLflow server (`infra/mlflow/start.sh`) on loopback; the chain tracks to them."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Registry, bank_digest, read_history
from pipeline.tracking.client import open_client
from tests.helpers import free_port
from tests.tracking.conftest import write_bank
from tests.tracking.test_tracking_faults import healthy

ROOT = Path(__file__).parents[2]
BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
CHAIN = (
    "name=team",
    "training.epochs=1",
    "model.options.width=8",
    "transfer=[]",
    "scaling.num_workers=1",
    "tracking.close_seconds=60",
    "--until",
    "freeze",
)
pytestmark = [
    pytest.mark.chain,
    pytest.mark.slow,
    pytest.mark.skipif(BIN is None, reason="no PostgreSQL; infra/setup.sh dev installs it where apt can"),
]


@pytest.fixture(scope="module")
def secrets() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sparta-secrets-"))
    subprocess.run([ROOT / "infra" / "mlflow" / "secrets.sh", directory], check=True, capture_output=True)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def database(secrets: Path) -> Iterator[int]:
    """Port of a PostgreSQL with the user and database `mlflow`, that asks for the password."""
    assert BIN is not None
    directory, port = Path(tempfile.mkdtemp(prefix="sparta-postgres-")), free_port()
    password = directory / "password"
    shutil.copyfile(secrets / "postgres_password", password)
    as_other = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        owner = pwd.getpwnam("postgres")
        for path in (directory, password):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        as_other = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    data = directory / "data"
    initialise = [
        BIN / "initdb",
        "--auth=scram-sha-256",
        "--username=mlflow",
        f"--pwfile={password}",
        "--no-sync",
        data,
    ]
    subprocess.run(initialise, check=True, capture_output=True, cwd=directory, **as_other)
    command = [BIN / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", directory]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, **as_other)
    environment = {**os.environ, "PGPASSWORD": (secrets / "postgres_password").read_text()}
    create = [BIN / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
    deadline = time.monotonic() + 60
    while subprocess.run(create, env=environment, capture_output=True, check=False).returncode != 0:
        assert process.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < deadline, (directory / "log").read_text()
        time.sleep(0.2)
    yield port
    process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    process.wait(30)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def server(secrets: Path, database: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of the MLflow server, started by the script that the containers run."""
    directory, port = tmp_path_factory.mktemp("mlflow"), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SECRETS": str(secrets),
        "PORT": str(port),
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg://mlflow@127.0.0.1:{database}/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": str(directory / "artifacts"),
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [ROOT / "infra" / "mlflow" / "start.sh"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not healthy(port):
        assert process.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < deadline, (directory / "log").read_text()
        time.sleep(0.3)
    yield port
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def test_nobody_without_a_password_gets_in_and_no_command_line_shows_one(secrets: Path, server: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{server}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=10)
    assert refused.value.code == 401
    refused.value.close()
    hidden = [(secrets / name).read_text() for name in ("postgres_password", "mlflow_admin_password")]
    shown = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in shown if any(password in line for password in hidden)]


@pytest.mark.timeout(480)
def test_chain_tracks_and_registers_on_postgresql(
    secrets: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, password = f"http://127.0.0.1:{server}", (secrets / "mlflow_admin_password").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "pipeline.run", *CHAIN]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    nodes = set(re.findall(r"^(\S+) +done ", ended.stdout, re.MULTILINE))
    assert nodes == {"prepare:source", "pretrain:source", "pretrain:source-control", "freeze:bank"}

    client = open_client(uri)
    experiment = client.get_experiment_by_name("sparta")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"team", *nodes}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    journal = next((tmp_path / "team" / "pretrain").glob("source/*/metrics.jsonl"))
    told, run_id = read_history(journal), runs["pretrain:source"].info.run_id
    assert told
    for key, points in told.items():
        arrived = [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
        assert sorted(arrived) == sorted(points), key

    registry = Registry(TrackingConfig(uri=uri), tmp_path / "team")
    pulled = registry.pull("sparta-activation@candidate", tmp_path / "bank")
    frozen = next((tmp_path / "team" / "freeze").glob("bank/*/bank/bank.safetensors"))
    assert (tmp_path / "bank" / "bank.safetensors").read_bytes() == frozen.read_bytes()
    assert "made by freeze:bank" in registry.lineage(pulled.reference)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert kept == []


@pytest.mark.timeout(240)
def test_processes_may_race_for_version_numbers_and_an_alias(
    secrets: Path, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", (secrets / "mlflow_admin_password").read_text())
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import Registry;"
        "from pipeline.config.tracking import TrackingConfig;"
        "registry = Registry(TrackingConfig(registry_model='raced', request_timeout=60), Path('.'));"
        "[registry.register(Path(sys.argv[1])) for _ in range(3)]"
    )
    banks = [write_bank(tmp_path / f"bank{i}", float(i)) for i in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(bank)], stderr=subprocess.PIPE, text=True) for bank in banks
    ]
    for process in processes:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    versions = Registry(TrackingConfig(registry_model="raced"), tmp_path).versions()
    assert [found.version for found in versions] == list(range(9, 0, -1))
    assert Counter(found.digest for found in versions) == dict.fromkeys((bank_digest(bank) for bank in banks), 3)
    assert [found.aliases for found in versions if found.aliases] == [("candidate",)]
