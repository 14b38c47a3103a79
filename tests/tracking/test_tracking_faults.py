"""Outages and kills, with real processes and a real server: nothing is lost, nothing doubled, nothing raised."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Journal, Registry, Tracker, bank_digest
from pipeline.tracking.__main__ import main
from pipeline.tracking.client import open_client
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.flusher import Flusher
from pipeline.tracking.spool import Spool, latest
from tests.helpers import free_port
from tests.tracking.conftest import write_bank

CHAIN = """
import signal, sys, time
from pathlib import Path
from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Journal, Tracker

root, first, last, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
config = TrackingConfig(flush_seconds=0.05)
with Tracker(config, root).chain("demo", params={"seed": 0}) as chain:
    with chain.stage("pretrain", tags={"fingerprint": "f"}) as stage:
        stage.mirror(root / "metrics.jsonl")
        assert chain.tracker.flush(60)
        print("delivered", flush=True)
        with Journal(root / "metrics.jsonl") as journal:
            for step in range(first, last):
                journal.log({"loss": float(step)}, step)
                time.sleep(pause)
"""


def start(root: Path, first: int, last: int, pause: float = 0.0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHAIN, str(root), str(first), str(last), str(pause)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "delivered\n"
    return process


def steps(client: MlflowClient, name: str = "pretrain") -> tuple[str, list[int]]:
    """Status of the only run called `name`, and the steps at which it has a loss."""
    experiment = client.get_experiment_by_name("sparta")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
    assert len(found) == 1
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert all(point.value == point.step for point in history)
    return found[0].info.status, sorted(point.step for point in history)


@pytest.mark.slow
def test_a_killed_chain_goes_on_in_the_same_run_with_every_point_once(root: Path):
    process = start(root, 0, 10_000, pause=0.005)
    time.sleep(0.7)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    logged = len((root / "metrics.jsonl").read_bytes().splitlines())
    assert logged > 10
    process = start(root, logged // 2, logged + 50)  # from the last checkpoint
    assert process.wait(60) == 0
    assert steps(open_client(f"sqlite:///{root}/mlflow.db")) == ("FINISHED", list(range(logged + 50)))


@pytest.mark.slow
def test_sigterm_leaves_killed_runs(root: Path):
    process = start(root, 0, 10_000, pause=0.005)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(30) == 143
    client = open_client(f"sqlite:///{root}/mlflow.db")
    status, found = steps(client)
    assert status == "KILLED"
    assert found == list(range(len(found)))
    assert steps(client, "demo")[0] == "KILLED"


def test_the_end_of_a_killed_chain_does_not_queue_behind_an_upload(
    root: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
):
    tracker, uploaded = Tracker(config, root), threading.Event()
    deliver = Delivery.run

    def slow(self: Delivery) -> list[str]:
        uploaded.wait(60)
        return deliver(self)

    with pytest.raises(KeyboardInterrupt), tracker.chain("demo") as chain:  # noqa: PT012
        chain.tag({"a": "b"})
        assert tracker.flush(30)
        monkeypatch.setattr(Delivery, "run", slow)
        raise KeyboardInterrupt
    assert not uploaded.is_set()
    client = open_client(tracker.uri)
    deadline = time.monotonic() + 30
    while steps(client, "demo")[0] != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    uploaded.set()


def test_a_run_without_a_server_is_delivered_later_in_full(
    root: Path, config: TrackingConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    bank = write_bank(root / "bank")
    away = config.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}", "close_seconds": 0.5})
    with Tracker(away, root).chain("demo", params={"seed": 0}) as chain, chain.stage("pretrain") as stage:
        stage.mirror(root / "metrics.jsonl")
        with Journal(root / "metrics.jsonl") as journal:
            for step in range(1500):
                journal.log({"loss": float(step)}, step)
        assert stage.register(bank) is None
        stage.artifact(bank / "activation.json")
    assert "python -m pipeline.tracking sync" in caplog.text
    assert main(["status", str(root)]) == 1
    assert "2 of 2 runs to deliver: demo, pretrain" in capsys.readouterr().out
    here = f"sqlite:///{root}/mlflow.db"
    assert main(["sync", str(root), "--uri", here]) == 0
    assert main(["sync", str(root), "--uri", here]) == 0
    assert "0 runs delivered" in capsys.readouterr().out
    assert steps(open_client(here)) == ("FINISHED", list(range(1500)))
    assert Registry(config, root).resolve("sparta-activation@candidate").version == 1


def test_an_activation_that_mlflow_did_not_know_yet_is_pinned_when_it_does(root: Path, config: TrackingConfig):
    bank = write_bank(root / "bank")
    away = config.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}", "close_seconds": 0})
    with Tracker(away, root).chain("demo") as chain:
        with chain.stage("freeze") as stage:
            assert stage.register(bank) is None
        with chain.stage("transfer") as stage:
            stage.activation(f"sha256:{bank_digest(bank)}")
        with chain.stage("stranger") as stage:
            stage.activation(f"sha256:{'0' * 64}")
    here = f"sqlite:///{root}/mlflow.db"
    assert main(["sync", str(root), "--uri", here]) == 1  # there is no such bank
    client, registry = open_client(here), Registry(config, root)
    experiment = client.get_experiment_by_name("sparta")
    assert experiment is not None
    runs = {
        run.info.run_name: client.get_run(run.info.run_id) for run in client.search_runs([experiment.experiment_id])
    }
    found = registry.resolve("sparta-activation/1")
    assert [used.model_id for used in runs["transfer"].inputs.model_inputs] == [registry.model_id(found)]
    assert runs["transfer"].data.tags["activation"] == "sparta-activation/1"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    spool = Spool(root)
    assert [record.name for record in spool.pending(here)] == ["stranger"]


def test_sync_of_anything_else_says_what_it_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sync", str(tmp_path)]) == 2
    assert "expected the output directory of a chain" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "sync"])
def test_runs_for_an_address_with_credentials_go_nowhere_else(
    command: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    here = f"sqlite:///{root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@tracker")
    with Tracker(TrackingConfig(enabled=False), root).chain("demo") as chain:
        chain.tag({"a": "b"})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main([command, str(root)]) == 2
    error = capsys.readouterr().err
    assert "expected MLFLOW_TRACKING_URI: the runs of" in error
    assert error.count("\n") == 1
    assert Spool(root).pending(here)
    assert main(["sync", str(root), "--uri", here]) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here)
    assert main([command, str(root)]) == 0


@pytest.mark.parametrize("noticed", [True, False])
def test_an_emptied_database_is_filled_again_from_the_local_files(
    root: Path, config: TrackingConfig, migrated: Path, noticed: bool
):
    tracker = Tracker(config, root)
    with tracker.chain("demo") as chain, chain.stage("pretrain") as stage:
        for step in range(5):
            stage.metrics({"loss": float(step)}, step)
        stage.register(write_bank(root / "bank"))
    for path in root.glob("mlflow.db*"):
        path.unlink()
    (root / "mlflow.db").write_bytes(migrated.read_bytes())
    if noticed:  # something new is to be said about the runs
        for record in tracker.spool.records():
            tracker.spool.update(record.key, tags={**record.tags, "note": "later"})
    assert main(["sync", str(root), *([] if noticed else ["--all"])]) == 0
    assert steps(open_client(tracker.uri))[1] == [0, 1, 2, 3, 4]
    assert Registry(config, root).resolve("sparta-activation@candidate").version == 1


def test_a_database_that_is_emptied_under_a_chain_is_filled_again_by_it(
    root: Path, config: TrackingConfig, migrated: Path
):
    tracker = Tracker(config, root)
    with tracker.chain("demo") as chain:
        with chain.stage("pretrain") as stage:
            stage.metrics({"loss": 0.0}, 0)
        delivery = Delivery(config, tracker.spool)
        delivery.run()
        for path in root.glob("mlflow.db*"):
            path.unlink()
        (root / "mlflow.db").write_bytes(migrated.read_bytes())
        tracker.spool.update(stage.key, tags={"note": "later"})
        assert delivery.run() == []
    assert steps(open_client(tracker.uri))[1] == [0]


def test_what_a_server_refuses_does_not_hold_up_the_rest(root: Path, config: TrackingConfig):
    tracker = Tracker(config, root)
    with tracker.chain("demo") as chain:
        with chain.stage("broken") as stage:
            assert stage.register(write_bank(root / "bank"), alias="latest") is None  # reserved by MLflow
        with chain.stage("pretrain") as stage:
            stage.metrics({"loss": 0.0}, 0)
    assert steps(open_client(f"sqlite:///{root}/mlflow.db")) == ("FINISHED", [0])
    assert [record.name for record in tracker.spool.pending(tracker.uri)] == ["broken"]


class NoCredentialsError(Exception):
    """As boto's: none of MLflow's own, and no OSError."""


def closed(*arguments: object, **options: object) -> None:
    raise NoCredentialsError("Unable to locate credentials\nfor http://me:hunter2@store")


def test_a_store_of_files_that_is_closed_holds_up_nothing_and_loses_nothing(
    root: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    upload = MlflowClient.log_artifact
    monkeypatch.setattr(MlflowClient, "log_artifact", lambda *a: closed() if a[2].endswith("page.html") else upload(*a))
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", closed)
    bank, tracker = write_bank(root / "bank"), Tracker(config, root)
    with tracker.chain("demo") as chain:
        with chain.stage("freeze") as stage:
            for name in ("page.html", "table.csv"):
                (root / name).write_text("")
                stage.artifact(root / name)
            assert stage.register(bank) is None
        with chain.stage("transfer") as stage:
            stage.activation(f"sha256:{bank_digest(bank)}")
        with chain.stage("pretrain") as stage:
            stage.metrics({"loss": 0.0}, 0)

    client, registry = open_client(tracker.uri), Registry(config, root)
    assert [steps(client, name)[0] for name in ("demo", "freeze", "transfer", "pretrain")] == ["FINISHED"] * 4
    assert steps(client) == ("FINISHED", [0])
    freeze = latest(tracker.spool.records(), "freeze", parents=False)
    assert freeze is not None
    run_id = str(tracker.spool.delivered(tracker.uri, freeze.key).run_id)
    assert [file.path for file in client.list_artifacts(run_id)] == ["table.csv"]
    assert registry.versions() == []
    assert client.search_logged_models([client.get_run(run_id).info.experiment_id]) == []
    assert main(["sync", str(root)]) == 1
    told = capsys.readouterr()
    assert "refused: freeze: page.html: NoCredentialsError: Unable to locate credentials\n" in told.err
    assert "refused: freeze: bank: NoCredentialsError: Unable to locate credentials\n" in told.err
    assert "0 runs delivered" in told.out
    assert "hunter2" not in told.err

    monkeypatch.undo()
    assert main(["sync", str(root)]) == 0
    assert "2 runs delivered" in capsys.readouterr().out
    assert {file.path for file in client.list_artifacts(run_id)} == {"page.html", "table.csv"}
    assert registry.pull("sparta-activation@candidate", root / "pulled").run_id == run_id
    assert tracker.pending() == 0


def test_what_is_refused_again_and_again_is_said_once(
    root: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    refused = ["freeze: page.html: no credentials"]
    delivery = Delivery(config, Spool(root))
    monkeypatch.setattr(delivery, "run", lambda: refused)
    flusher = Flusher(delivery, 0.01)
    assert [flusher.flush(30) for _ in range(3)] == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [f"MLflow refused {refused[0]}"]
    refused.clear()
    assert flusher.flush(30)
    assert "what was kept locally was delivered" in caplog.text
    flusher.stop(0)


def test_a_server_that_goes_during_an_upload_is_away_not_against_it(
    root: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
):
    def gone(*arguments: object, **options: object) -> None:
        raise MlflowException("API request failed: Connection refused")

    (root / "page.html").write_text("")
    with Tracker(config.model_copy(update={"enabled": False}), root).chain("demo") as chain:
        chain.artifact(root / "page.html")
    for name in ("log_artifact", "get_run"):
        monkeypatch.setattr(MlflowClient, name, gone)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        Delivery(config, Spool(root)).run()


def test_a_server_that_answers_too_late_makes_one_run(
    tmp_path: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
):
    asked, answered, made = [], threading.Event(), []
    run = {"info": {"run_id": "r", "run_name": "demo"}}

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("runs/create"):
                asked.append(self.path)
                answered.wait(30)
                made.append(run)
            self.answer({"runs": made, "run": run, "run_info": run["info"]})

        def do_GET(self) -> None:
            self.answer({"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}})

        def answer(self, body: dict[str, object]) -> None:
            with suppress(BrokenPipeError):  # the client did not wait
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with Tracker(config.model_copy(update={"enabled": False}), tmp_path).chain("demo") as chain:
        chain.tag({"a": "b"})
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow:
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        remote = config.model_copy(update={"uri": f"http://127.0.0.1:{slow.server_port}"})
        delivery = Delivery(remote, Spool(tmp_path))
        with pytest.raises(ConnectionError, match="timed out"):
            delivery.run()
        with pytest.raises(ConnectionError, match="was asked for the run demo and has not made it yet"):
            delivery.run()
        answered.set()
        deadline = time.monotonic() + 30
        while not made:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert delivery.run() == []
        slow.shutdown()
    assert len(asked) == 1
    assert delivery.spool.pending(delivery.uri) == []


def test_an_error_that_nobody_expected_is_one_line_of_sync(
    root: Path, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with Tracker(config.model_copy(update={"enabled": False}), root).chain("demo") as chain:
        chain.tag({"a": "b"})
    monkeypatch.setattr("pipeline.tracking.delivery.open_client", closed)
    assert main(["sync", str(root)]) == 1
    assert capsys.readouterr().err == "error: NoCredentialsError: Unable to locate credentials\n"


@pytest.mark.slow
def test_processes_may_race_for_a_fresh_database_and_for_version_numbers(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import Registry;"
        "from pipeline.config.tracking import TrackingConfig;"
        "registry = Registry(TrackingConfig(), Path(sys.argv[1]));"
        "[registry.register(Path(sys.argv[2])) for _ in range(3)]"
    )
    banks = [write_bank(tmp_path / f"bank{i}", float(i)) for i in range(3)]
    commands = [[sys.executable, "-c", code, str(tmp_path), str(bank)] for bank in banks]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    versions = Registry(TrackingConfig(), tmp_path).versions()
    assert [found.version for found in versions] == list(range(9, 0, -1))
    assert len({found.digest for found in versions}) == 3


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_has_every_point_once(root: Path, config: TrackingConfig):
    port = free_port()
    remote = config.model_copy(update={"uri": f"http://127.0.0.1:{port}"})
    tracker = Tracker(remote, root)
    bank = write_bank(root / "bank")
    with tracker.chain("demo") as chain, chain.stage("pretrain") as stage:
        with server(root, port):
            stage.mirror(root / "metrics.jsonl")
            journal = Journal(root / "metrics.jsonl")
            for step in range(150):
                journal.log({"loss": float(step)}, step)
            assert tracker.flush(30)
        for step in range(150, 300):  # the server is gone
            journal.log({"loss": float(step)}, step)
        assert not tracker.flush(30)
        with server(root, port):
            for step in range(300, 400):
                journal.log({"loss": float(step)}, step)
            journal.close()
            assert tracker.flush(60)
            client = open_client(remote.resolved_uri(root))
            assert steps(client) == ("RUNNING", list(range(400)))
            # The registry works through the server too, files and all.
            assert stage.register(bank) == "sparta-activation/1"
            registry = Registry(remote, root)
            assert registry.pull("sparta-activation@candidate", root / "pulled").run_id == stage.run_id
            assert "made by pretrain" in registry.lineage("sparta-activation/1")


@contextmanager
def server(root: Path, port: int) -> Iterator[None]:
    """An MLflow server on the database of `root`, killed without notice at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (root / "server.log").open("a")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not healthy(port):
            assert process.poll() is None, (root / "server.log").read_text()
            assert time.monotonic() < deadline, (root / "server.log").read_text()
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
