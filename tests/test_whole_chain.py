"""The whole chain as a user runs it, made small: Ray, FFCV, MLflow, registry, report; again; killed; with a search."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Registry, read_history
from sparta_models.files import SCHEMA
from tests.faults.chains import Mirror

SMALL = (
    "name=small",
    "training.epochs=2",
    "model.options.width=8",
    "transfer=[{name: wider, model: {name: resnet8, options: {width: 12}}, adapt: mean}]",
    "evaluation.attacks=[{kind: pgd, steps: 5}]",
    "evaluation.curve.multiples=[1.0]",
    "evaluation.audit.budget=off",
    "evaluation.num_examples=64",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the checkout's own may change meanwhile
AWAY = ("tracking.uri=http://127.0.0.1:9", "tracking.close_seconds=1")
pytestmark = [pytest.mark.chain, pytest.mark.slow]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.run", *SMALL, *arguments]


def environment(root: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**kept, "SPARTA_RUNS": str(root), "SPARTA_GIT_COMMIT": COMMIT}


def run(root: Path, *arguments: str, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), env=environment(root), capture_output=True, text=True, timeout=timeout, check=False
    )


def node_lines(printed: str, action: str) -> list[str]:
    return re.findall(rf"^(\S+) +{action} ", printed, re.MULTILINE)


def digests(root: Path) -> dict[str, str]:
    found = {}
    for path in (root / "small").glob("*/*/*/artifact.json"):
        record = json.loads(path.read_text())
        found[f"{record['stage']}:{record['branch']}"] = record["output_digest"]
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("runs")
    ended = run(root)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return root, ended.stdout


def test_chain_makes_table_report_and_registered_activation(done: tuple[Path, str]) -> None:
    root, printed = done
    assert set(node_lines(printed, "done")) == set(digests(root))
    assert re.search(r"^wider +transfer +resnet8 +sparta \(frozen\)", printed, re.MULTILINE)
    page = (root / "small" / "report.html").read_text()
    assert "wider-control" in page
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline.registry", "--root", str(root), "list"],
        env=environment(root), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "candidate" in shown.stdout
    found = Registry(TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"), root).resolve("sparta-activation@candidate")
    assert {name: found.tags[name] for name in ("schema", "variant", "activation", "architecture")} == {
        "schema": str(SCHEMA),
        "variant": "smoothmax",
        "activation": "sparta",
        "architecture": "resnet8",
    }
    assert found.tags["git_commit"] == COMMIT
    assert all(re.fullmatch(r"\d+\.\d % \[.+\] \(n = \d+\)", found.tags[f"val_{name}"]) for name in ("clean", "robust"))


def test_transfer_used_the_registered_activation_and_left_it_as_it_was(done: tuple[Path, str]) -> None:
    root, _ = done
    (frozen,) = (root / "small" / "freeze").glob("bank/*/artifact.json")
    (transfer,) = (root / "small" / "transfer").glob("wider/*/artifact.json")
    assert json.loads(frozen.read_text())["payload"]["reference"] == "sparta-activation/1"
    assert (transfer.parent / "bank" / "bank.safetensors").is_file()
    assert json.loads(transfer.read_text())["payload"]["bank_digest"] is not None


def test_again_at_once_everything_is_up_to_date_and_no_ray_starts(done: tuple[Path, str]) -> None:
    root, _ = done
    before = digests(root)
    program = (
        "import sys; from pipeline.run import main; code = main(sys.argv[1:]); "
        "print('ray' in sys.modules, 'mlflow' in sys.modules); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *SMALL],
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert set(node_lines(ended.stdout, "up to date")) == set(before)
    assert ended.stdout.splitlines()[-1] == "False False"
    assert digests(root) == before


def test_another_chain_takes_the_activation_from_the_registry(done: tuple[Path, str]) -> None:
    root, _ = done
    ended = run(root, "name=reuse", "bank.registered=sparta-activation/1", "training.epochs=1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    both = {f"{stage}:wider{role}" for stage in ("transfer", "evaluate") for role in ("", "-control")}
    assert set(node_lines(ended.stdout, "done")) == {"prepare:source", "freeze:bank", "report:page", *both}
    assert re.search(r"^wider +transfer +resnet8 +sparta \(frozen\)", ended.stdout, re.MULTILINE)
    page = (root / "reuse" / "report.html").read_text()
    assert re.search(r'<th scope="row">digits 0-4<span class="interval">sparta in resnet8</span>', page)
    assert "sparta-activation/1" in page
    digests = []
    for chain in ("small", "reuse"):
        (record,) = (root / chain / "transfer" / "wider").glob("*/artifact.json")
        digests.append(json.loads(record.read_text())["payload"]["bank_digest"])
    assert digests[0] == digests[1] is not None
    registry = Registry(TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"), root)
    assert [found.version for found in registry.versions()] == [1]


def test_killed_chain_goes_on_without_mlflow_to_the_same_results_which_are_delivered_later(
    done: tuple[Path, str], tmp_path: Path
) -> None:
    root, _ = done
    child = subprocess.Popen(
        command(*AWAY),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 500
    while not list(tmp_path.glob("small/pretrain/source/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    ended = run(tmp_path, *AWAY, "--until", "transfer")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert node_lines(ended.stdout, "resume")
    resumed = digests(tmp_path)
    assert "transfer:wider" in resumed
    assert resumed == {key: value for key, value in digests(root).items() if key in resumed}

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sync = [sys.executable, "-m", "pipeline.tracking", "sync", "--uri", uri, str(tmp_path / "small")]
    synced = subprocess.run(sync, capture_output=True, text=True, timeout=120, check=False)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    mirror = Mirror(tmp_path)
    assert mirror.statuses() == {name: ["FINISHED"] for name in ("small", *resumed)}
    trainings = {key for key in resumed if key.startswith(("pretrain:", "transfer:"))}
    for key in trainings:
        (journal,) = (tmp_path / "small" / key.replace(":", "/")).glob("*/metrics.jsonl")
        assert mirror.history(key) == {name: sorted(points) for name, points in read_history(journal).items()}
    found = Registry(TrackingConfig(uri=uri), tmp_path).resolve("sparta-activation@candidate")
    transfer = mirror.run("transfer:wider")
    assert (found.version, found.run_id) == (1, mirror.run("freeze:bank").info.run_id)
    assert transfer.data.tags["activation"] == "sparta-activation/1"
    assert len(transfer.inputs.model_inputs) == 1


def test_search_finds_settings_that_the_later_stages_use(tmp_path: Path) -> None:
    search: Sequence[str] = ("search.enabled=true", "search.space=attack", "search.num_trials=2", "search.epochs=1")
    ended = run(tmp_path, *search, "scaling.num_workers=1", "--until", "freeze")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (record,) = (tmp_path / "small" / "search").glob("best/*/artifact.json")
    overrides = json.loads(record.read_text())["payload"]["overrides"]
    (trained,) = (tmp_path / "small" / "pretrain").glob("source/*/artifact.json")
    training = json.loads(trained.read_text())["inputs"]["sections"]["training"]
    for key, value in overrides.items():
        if key.startswith("training.method.attack."):
            assert training["method"]["attack"][key.rpartition(".")[2]] == value


def test_study_compares_activations_over_seeds(tmp_path: Path) -> None:
    study = "study={seeds: [0, 1], contenders: [{name: silu, activation: {name: silu}}]}"
    small = ("training.epochs=1", "model.options.width=4", "scaling.num_workers=1", "data.limit.train=128")
    ended = run(tmp_path, study, *small)  # twelve networks
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| silu | silu | shared, independent | 2 |" in ended.stdout
    assert "frozen minus control, robust:" in ended.stdout
    (page,) = (tmp_path / "small" / "report" / "study").glob("*/study.html")
    assert "adversarial training" in page.read_text()
