import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import ValidationError

from pipeline.config.tracking import TrackingConfig, has_password, redact
from pipeline.tracking import Journal, Tracker
from pipeline.tracking.__main__ import main
from pipeline.tracking.client import open_client
from pipeline.tracking.origin import origin_tags


def runs(root: Path) -> dict[str, Run]:
    client = open_client(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("sparta")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def client_of(root: Path) -> MlflowClient:
    return open_client(f"sqlite:///{root}/mlflow.db")


def test_importing_and_an_idle_tracker_do_not_import_mlflow(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import Tracker, Registry;"
        "from pipeline.config.tracking import TrackingConfig as C;"
        f"t = Tracker(C(), Path({str(tmp_path)!r}));\n"
        "with t.chain('demo', params={'a': 1}): pass\n"
        "assert 'mlflow' not in sys.modules; assert not t.pending()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_chain_and_its_stages_stand_in_mlflow(root: Path, config: TrackingConfig):
    output = root / "pretrain"
    with Tracker(config, root).chain("demo", params={"seed": 1, "data": {"name": "digits"}}) as chain:
        with chain.stage("prepare", tags={"fingerprint": "aa"}):
            pass
        with chain.stage(
            "pretrain", params={"lr": 0.1}, tags={"fingerprint": "bb"}, upstream={"prepare": "aa"}
        ) as stage:
            stage.mirror(output / "metrics.jsonl")
            stage.dataset("digits", "d" * 64, profile={"num_train": 100})
            with Journal(output / "metrics.jsonl") as journal:
                for step in range(30):
                    journal.log({"train/loss": 1 / (step + 1), "odd@key=(1)": 1.0}, step)
            stage.metrics({"seconds": 3.5})
            (output / "model.json").write_text("{}", encoding="utf-8")
            stage.artifact(output / "model.json", folder="model")
    found = runs(root)
    assert set(found) == {"demo", "prepare", "pretrain"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["demo"].data.params == {"seed": "1", "data.name": "digits"}
    run = found["pretrain"]
    assert run.data.tags["mlflow.parentRunId"] == found["demo"].info.run_id
    assert found["prepare"].info.run_id in run.data.tags["sparta.upstream"]
    assert run.data.tags["fingerprint"] == "bb"
    assert run.data.tags["sparta.data.training"].endswith("d" * 64)
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    client = client_of(root)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / (step + 1)) for step in range(30)]
    assert run.data.metrics["odd_key__1_"] == 1.0
    assert run.data.metrics["seconds"] == 3.5
    assert [a.path for a in client.list_artifacts(run.info.run_id, "model")] == ["model/model.json"]


def test_a_rerun_after_a_failure_goes_on_with_the_same_runs(root: Path, config: TrackingConfig):
    def chain(steps: range, crash: bool) -> None:
        with (
            Tracker(config, root).chain("demo", params={"seed": 1}) as chain,
            chain.stage("pretrain", params={"lr": 0.1}, tags={"fingerprint": "f"}) as stage,
        ):
            stage.mirror(root / "metrics.jsonl")
            with Journal(root / "metrics.jsonl") as journal:
                for step in steps:
                    journal.log({"loss": step}, step)
            if crash:
                raise RuntimeError("a worker died")

    with pytest.raises(RuntimeError, match="a worker died"):
        chain(range(10), crash=True)
    first = runs(root)
    assert {run.info.status for run in first.values()} == {"FAILED"}
    chain(range(5, 20), crash=False)
    second = runs(root)
    assert {n: r.info.run_id for n, r in first.items()} == {n: r.info.run_id for n, r in second.items()}
    assert {run.info.status for run in second.values()} == {"FINISHED"}
    history = client_of(root).get_metric_history(second["pretrain"].info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(20))


def test_changed_settings_begin_new_runs_and_leave_the_old_ones(root: Path, config: TrackingConfig):
    for rate in (0.1, 0.2):
        with (
            Tracker(config, root).chain("demo", params={"lr": rate}) as chain,
            chain.stage("pretrain", params={"lr": rate}, tags={"fingerprint": str(rate)}),
        ):
            pass
    experiment = client_of(root).get_experiment_by_name("sparta")
    assert experiment is not None
    found = client_of(root).search_runs([experiment.experiment_id])
    assert sorted((r.info.run_name, r.data.params["lr"]) for r in found) == [
        ("demo", "0.1"),
        ("demo", "0.2"),
        ("pretrain", "0.1"),
        ("pretrain", "0.2"),
    ]


def test_a_stage_done_again_from_the_start_is_a_new_run_with_its_own_metrics(root: Path, config: TrackingConfig):
    for value in (1.0, 2.0):
        (root / "metrics.jsonl").unlink(missing_ok=True)
        with (
            Tracker(config, root).chain("demo") as chain,
            chain.stage("pretrain", tags={"fingerprint": "f"}) as stage,
        ):
            stage.mirror(root / "metrics.jsonl")
            with Journal(root / "metrics.jsonl") as journal:
                journal.log({"loss": value}, 0)
            run_id = stage.run_id if chain.tracker.flush(30) else None
            assert run_id is not None
        assert [m.value for m in client_of(root).get_metric_history(run_id, "loss")] == [value]


def test_a_stage_done_again_adds_nothing_to_the_run_before_it(root: Path, config: TrackingConfig):
    """Its journal lies at the same place and becomes longer than the one that was delivered."""
    run_ids = []
    for value, steps in ((1.0, 3), (2.0, 10)):
        (root / "metrics.jsonl").unlink(missing_ok=True)
        with (
            Tracker(config, root).chain("demo") as chain,
            chain.stage("pretrain", tags={"fingerprint": "f"}) as stage,
        ):
            stage.mirror(root / "metrics.jsonl")
            with Journal(root / "metrics.jsonl") as journal:
                for step in range(steps):
                    journal.log({"loss": value}, step)
            assert chain.tracker.flush(30)
            run_ids.append(stage.run_id)
    assert Tracker(config, root).pending() == 0
    histories = [client_of(root).get_metric_history(str(run_id), "loss") for run_id in run_ids]
    assert [[(m.step, m.value) for m in history] for history in histories] == [
        [(step, 1.0) for step in range(3)],
        [(step, 2.0) for step in range(10)],
    ]


def test_a_stage_names_the_run_that_made_what_it_uses_not_a_later_one(root: Path, config: TrackingConfig):
    with Tracker(config, root).chain("demo") as chain:
        with chain.stage("pretrain", tags={"fingerprint": "a"}) as made:
            pass
        with chain.stage("pretrain", tags={"fingerprint": "b"}):
            pass
        with chain.stage("freeze", upstream={"pretrain": "a", "prepare": "never tracked"}) as stage:
            pass
    assert chain.tracker.spool.load(stage.key).upstream == {"pretrain": made.key}


def test_a_clock_that_was_set_back_loses_no_lineage(root: Path, config: TrackingConfig):
    tracker = Tracker(config.model_copy(update={"enabled": False}), root)
    with tracker.chain("demo") as chain:
        with chain.stage("pretrain", tags={"fingerprint": "a"}) as made:
            pass
        with chain.stage("freeze", upstream={"pretrain": "a"}) as used:
            pass
    tracker.spool.update(used.key, started=tracker.spool.load(made.key).started - 3_600_000)
    assert main(["sync", str(root)]) == 0
    upstream = json.loads(runs(root)["freeze"].data.tags["sparta.upstream"])
    assert upstream == {"pretrain": runs(root)["pretrain"].info.run_id}


@pytest.mark.parametrize("what", ["artifact", "journal"])
@pytest.mark.parametrize("way", ["absolute", "above", "link"])
def test_of_a_directory_from_elsewhere_nothing_outside_is_sent(
    way: str, what: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
):
    secret = tmp_path / "id_rsa"
    with Journal(secret) as journal:
        journal.log({"secret": 42.0}, 0)
    tracker = Tracker(TrackingConfig(enabled=False), root)
    with tracker.chain("demo") as chain:
        (root / "page.html").symlink_to(secret)
        chain.artifact(root / "page.html") if what == "artifact" else chain.mirror(root / "page.html")
    if way != "link":
        (record,) = (root / "tracking" / "runs").glob("*.json")
        written = record.read_text().replace("page.html", str(secret) if way == "absolute" else "../id_rsa")
        record.write_text(written)
    assert main(["sync", str(root)]) == (1 if way == "link" else 2)
    assert ("a link to" if way == "link" else "expected names below") in capsys.readouterr().err
    assert not list(root.glob("mlartifacts/**/*.html")) + list(root.glob("mlartifacts/**/id_rsa"))
    assert way != "link" or not runs(root)["demo"].data.metrics


def test_what_lies_outside_of_a_chain_is_refused_and_spoils_nothing(tmp_path: Path, root: Path):
    tracker = Tracker(TrackingConfig(enabled=False), root)
    with tracker.chain("demo") as chain:
        chain.tag({"a": "b"})
        with pytest.raises(ValueError, match="expected a path below"):
            chain.artifact(tmp_path / "page.html")
    assert len(tracker.spool.records()) == 1


def test_passwords_go_to_no_server_that_only_a_directory_names(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config, there = TrackingConfig(enabled=False, uri="http://127.0.0.1:9"), "http://127.0.0.1:9"
    with Tracker(config, root).chain("demo") as chain:
        chain.metrics({"robust": 0.5})
    chain.tracker.spool.aim(config, there)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert main(["status", str(root)]) == 1  # asks no server
    assert main(["sync", str(root)]) == 2
    error = capsys.readouterr().err
    assert f"expected --uri or MLFLOW_TRACKING_URI: {root} says to deliver to {there}" in error
    assert "hunter2" not in error
    assert main(["sync", str(root), "--uri", there]) == 1  # chosen, and away
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there)
    assert main(["sync", str(root)]) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org:5000")
    assert main(["sync", str(root)]) == 2
    assert main(["sync", str(root), "--uri", "http://me:hunter2@127.0.0.1:9"]) == 2
    assert "--uri: expected a uri without a password" in capsys.readouterr().err


def test_a_chains_own_database_needs_no_second_word(root: Path, monkeypatch: pytest.MonkeyPatch):
    config = TrackingConfig(enabled=False, uri=f"sqlite:///{root}/mlflow.db")
    with Tracker(config, root).chain("demo") as chain:
        chain.metrics({"robust": 0.5})
    chain.tracker.spool.aim(config, str(config.uri))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    assert main(["sync", str(root)]) == 0


@pytest.mark.parametrize("name", ["paper (2021)", "a//b", "x" * 300, "ü", "", "../x"])
def test_any_name_of_a_setting_or_a_tag_is_delivered(name: str, root: Path, config: TrackingConfig, bank: Path):
    chain = Tracker(config, root).chain("demo", params={"bank": {"source": {name: "x"}}})
    with chain, chain.stage("freeze") as stage:
        assert stage.register(bank, tags={f"source.{name}": "x"})
    assert list(runs(root)["demo"].data.params.values()) == ["x"]


def test_a_last_line_that_a_kill_tore_is_nothing_to_deliver(root: Path, config: TrackingConfig):
    tracker = Tracker(config, root)
    with tracker.chain("demo") as chain, chain.stage("pretrain") as stage:
        stage.metrics({"loss": 1.0}, 0)
    assert tracker.spool.pending(tracker.uri) == []
    journal = root / tracker.spool.load(stage.key).journals[0]
    with journal.open("a") as file:
        file.write('{"step": 1, "metr')
    assert tracker.spool.pending(tracker.uri) == []


def test_a_chain_that_goes_on_shows_its_newest_figures(root: Path, config: TrackingConfig):
    for robust in (0.4, 0.4, 0.5):
        with Tracker(config, root).chain("demo", params={"seed": 1}) as chain:
            chain.metrics({"source/clean": 0.9, "source/robust": robust})
    run = runs(root)["demo"]
    assert run.data.metrics == {"source/clean": 0.9, "source/robust": 0.5}
    history = client_of(root).get_metric_history(run.info.run_id, "source/robust")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.4), (1, 0.5)]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ValueError, "FAILED")]
)
def test_the_way_a_chain_ends_is_its_status(
    root: Path, config: TrackingConfig, error: type[BaseException], status: str
):
    tracker = Tracker(config, root)
    with pytest.raises(error), tracker.chain("demo") as chain, chain.stage("pretrain"):  # noqa: PT012
        assert tracker.flush(30)
        raise error
    assert {run.info.status for run in runs(root).values()} == {status}


def test_a_branch_that_failed_marks_the_chain_without_an_exception(root: Path, config: TrackingConfig):
    with Tracker(config, root).chain("demo") as chain, chain.stage("evaluate"):
        chain.fail()
    found = runs(root)
    assert (found["demo"].info.status, found["evaluate"].info.status) == ("FAILED", "FINISHED")


def test_replaying_everything_adds_nothing(root: Path, config: TrackingConfig):
    tracker = Tracker(config, root)
    with tracker.chain("demo") as chain, chain.stage("pretrain") as stage:
        for step in range(5):
            stage.metrics({"loss": step}, step)
        chain.tracker.flush(30)
        run_id = stage.run_id
    assert run_id is not None
    for record in tracker.spool.records():  # the crash came before the deliveries were noted
        tracker.spool._delivered_path(tracker.uri, record.key).unlink()
    assert Tracker(config, root).pending() == 2
    assert Tracker(config, root).delivery.run() == []
    found = runs(root)
    assert len(found) == 2
    assert found["pretrain"].info.run_id == run_id
    assert len(client_of(root).get_metric_history(run_id, "loss")) == 5


def test_long_values_are_seen_to_be_cut_and_credentials_never_leave(root: Path, config: TrackingConfig):
    params = {"long": "x" * 9000, "server": {"uri": "http://me:hunter2@host/path"}}
    with Tracker(config, root).chain("demo", params=params) as chain:
        chain.tag({"where": "postgresql://me:hunter2@host/db"})
    run = runs(root)["demo"]
    assert run.data.params["long"].endswith("x ...")
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["server.uri"] == "http://***@host/path"
    assert "hunter2" not in "".join(p.read_text(errors="ignore") for p in (root / "tracking").rglob("*.json"))
    assert b"hunter2" not in (root / "mlflow.db").read_bytes()


def test_disabled_tracking_keeps_everything_for_later(root: Path, config: TrackingConfig):
    off = config.model_copy(update={"enabled": False})
    with Tracker(off, root).chain("demo") as chain, chain.stage("pretrain") as stage:
        stage.metrics({"loss": 1.0})
    tracker = Tracker(config, root)
    assert tracker.pending() == 2
    assert tracker.delivery.run() == []
    assert runs(root)["pretrain"].data.metrics == {"loss": 1.0}


def test_branches_side_by_side_do_not_mix(root: Path, config: TrackingConfig):
    tracker = Tracker(config, root)

    def branch(number: int) -> None:
        with chain.stage(f"branch{number}", params={"number": number}) as stage:
            for step in range(20):
                stage.metrics({"loss": number}, step)

    with tracker.chain("demo") as chain, ThreadPoolExecutor(8) as pool:
        list(pool.map(branch, range(8)))
    found = runs(root)
    assert len(found) == 9
    for number in range(8):
        run = found[f"branch{number}"]
        assert run.data.params == {"number": str(number)}
        assert run.data.tags["mlflow.parentRunId"] == found["demo"].info.run_id
        history = client_of(root).get_metric_history(run.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == [(step, number) for step in range(20)]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://x", "expected a tracking uri that starts with"),
        ("file:///x", "expected a tracking uri that starts with"),
        ("http://me:hunter2@x", "expected a uri without a password"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_without_showing_its_password(uri: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        TrackingConfig(uri=uri)
    assert "hunter2" not in str(caught.value).replace("input_value='http://me:hunter2@x'", "")


DATABASES = [
    "postgresql+psycopg://mlflow:Zk/9qR+x7@db/mlflow",
    "mysql+pymysql://mlflow:Zk 9qR?x7@db:3306/mlflow",
    "postgresql://mlflow:it's \"Zk/9qR@db/mlflow",
    "postgresql://mlflow:Zk@9qR/x7@db/mlflow",
    "postgresql://me@corp:Zk/9qR x7@db/mlflow",
    "postgresql://db:5432/mlflow?user=me&password=Zk@9qR",
]


@pytest.mark.parametrize("uri", DATABASES)
def test_a_database_password_that_looks_like_a_path_is_seen(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValidationError, match="expected a uri without a password") as caught:
        TrackingConfig(uri=uri)
    assert "Zk" not in caught.value.errors()[0]["msg"]
    assert not any(part in redact(f"at {uri}: no route") for part in ("Zk", "9qR", "x7"))
    assert redact(redact(uri)) == redact(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Tracker(TrackingConfig(enabled=False), tmp_path).chain("demo") as chain:
        chain.tag({"where": uri})
    assert not any("9qR" in str(path) or (path.is_file() and "9qR" in path.read_text()) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://mlflow.example.org:5432/mlflow cannot be reached",
        "postgresql:///mlflow?host=/run/postgresql",
        "sqlite:////runs/a@b/mlflow.db and http://host:5000/x@y and s3://bucket/a@b",
    ],
)
def test_an_address_without_a_password_stays_whole(text: str):
    assert redact(text) == text
    assert not has_password(text)


def test_a_database_whose_password_is_elsewhere_is_taken():
    assert TrackingConfig(uri="postgresql://mlflow@127.0.0.1:5432/mlflow").uri


def test_where_runs_go_is_the_section_then_the_environment_then_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert TrackingConfig().resolved_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert TrackingConfig().resolved_uri(Path("/a?b/c%20d")) == "sqlite:////a%3Fb/c%2520d/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert TrackingConfig().resolved_uri(tmp_path) == "http://127.0.0.1:5000"
    assert TrackingConfig(uri="sqlite:///x.db").resolved_uri(tmp_path) == "sqlite:///x.db"


def test_credentials_of_the_environment_are_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with Tracker(TrackingConfig(close_seconds=0), tmp_path).chain("demo", params={"a": 1}) as chain, chain.stage("one"):
        pass
    for path in tmp_path.rglob("*"):
        assert "hunter2" not in str(path)
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


def test_a_copy_without_its_repository_is_told_the_commit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARTA_GIT_COMMIT", "0123abc-dirty")
    assert origin_tags()["mlflow.source.git.commit"] == "0123abc-dirty"
    monkeypatch.setenv("SPARTA_GIT_COMMIT", "")
    assert origin_tags().get("mlflow.source.git.commit") != "0123abc-dirty"
