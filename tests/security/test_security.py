"""Nobody in who doesn't belong: no code from files, no way out of a folder, no secret in what is kept or shown."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import pipeline.config.load
import tune_spaces.loading
from pipeline.artifacts import load_record, sha256_of
from pipeline.chain import Chain
from pipeline.cluster.outcome import load_outcome
from pipeline.cluster.sweep import load_trials
from pipeline.config.load import ConfigError, load_config, validate
from pipeline.config.tracking import TrackingConfig, redact
from pipeline.data import DataError, PreparedData
from pipeline.data.npz import npz_source
from pipeline.data.readers import open_reader
from pipeline.data.remote import fetch_prepared
from pipeline.data.sidecar import Sidecar, read_sidecar, sampled_digest
from pipeline.evaluation.blocks import load_arrays
from pipeline.evaluation.records import Evaluation
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.services import Services
from pipeline.tracking import Registry
from pipeline.tracking.journal import read_journal
from pipeline.training import load_model
from pipeline.training.checkpoint import Checkpoints
from sparta_models import ActivationBank

ROOT = Path(__file__).parents[2]
MODULES = [
    p for package in ("pipeline", "sparta_models", "tune_spaces") for p in sorted((ROOT / package).rglob("*.py"))
]
SECRET = "hunter2-correct-horse"


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


@pytest.fixture
def payload(tmp_path: Path, mark: Path) -> Path:
    """A pickle as torch.save writes it: it is a .npz's zip, too."""
    path = tmp_path / "payload"
    torch.save({"model": Exploit(mark)}, path)
    return path


def test_the_payload_is_one(payload: Path, mark: Path) -> None:
    torch.load(payload, weights_only=False)
    assert mark.exists()


def _network(directory: Path, payload: Path) -> object:
    shutil.copy(payload, directory / "model.safetensors")
    record = {"sha256": {"model.safetensors": sha256_of(payload)}}
    (directory / "model.json").write_text(json.dumps(record))
    return load_model(directory)


def _checkpoint(directory: Path, payload: Path) -> object:
    slot = directory / "a"
    slot.mkdir()
    shutil.copy(payload, slot / "model.safetensors")
    record = {"fingerprint": "f", "progress": {}, "sha256": {"model.safetensors": sha256_of(payload)}}
    (slot / "state.json").write_text(json.dumps(record))
    return Checkpoints(directory, "f").load()


def _bank(directory: Path, payload: Path) -> object:
    shutil.copy(payload, directory / "bank.safetensors")
    shutil.copy(payload, directory / "bank.json")
    return ActivationBank.load(directory)


def _data_set(directory: Path, payload: Path) -> object:
    path = directory / "set.npz"
    array = np.array([Exploit(directory.parent / "unpickled")], dtype=object)
    np.savez(path, train_images=array, train_labels=array, test_images=array, test_labels=array, class_names=array)
    return npz_source(SimpleNamespace(path=str(path)))  # type: ignore[arg-type]


def _split(directory: Path, payload: Path, suffix: str = ".npz") -> object:
    """A split whose sidecar vouches for it."""
    path = directory / f"train{suffix}"
    if suffix == ".npz":
        array = np.array([Exploit(directory.parent / "unpickled")], dtype=object)
        np.savez(path, images=array, labels=array)
    else:
        shutil.copy(payload, path)
    sidecar = Sidecar(
        source="s", split="train", storage="raw", fields={}, count=1, class_counts=(1,), image_size=1, channels=1,
        mean=(0.5,), std=(0.5,), content="", size=path.stat().st_size, sha256=sha256_of(path),
        sampled=sampled_digest(path), origin="train", indices=(0,),
    )  # fmt: skip
    return open_reader(path, sidecar)


def _beton(directory: Path, payload: Path) -> object:
    pytest.importorskip("ffcv")
    return _split(directory, payload, ".beton")


def _evaluation_blocks(directory: Path, payload: Path) -> object:
    array = np.array([Exploit(directory.parent / "unpickled")], dtype=object)
    np.savez(directory / "block.npz", y=array)
    return load_arrays(directory / "block.npz")


def _record(name: str, read: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    def use(directory: Path, payload: Path) -> object:
        place = directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(payload, place)
        return read(directory)

    return use


LOADERS: dict[str, Callable[[Path, Path], object]] = {
    "network": _network,
    "checkpoint": _checkpoint,
    "bank": _bank,
    "npz data set": _data_set,
    "npz split": _split,
    "beton split": _beton,
    "evaluation blocks": _evaluation_blocks,
    "artifact": _record("artifact.json", load_record),
    "evaluation": _record("evaluation.json", Evaluation.load),
    "prepared data": _record("prepared.json", PreparedData.load),
    "sidecar": _record("x.npz.json", lambda d: read_sidecar(d / "x.npz")),
    "journal": _record("metrics.jsonl", lambda d: read_journal(d / "metrics.jsonl")),
    "outcome": _record("outcome.json", lambda d: load_outcome(d, "run")),
    "trial": _record("trials/0-x/trial.json", load_trials),
    "configuration": _record("c.yaml", lambda d: load_config(str(d / "c.yaml"))),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_runs_what_a_file_says(loader: str, tmp_path: Path, payload: Path, mark: Path) -> None:
    directory = tmp_path / "fed"
    directory.mkdir()
    try:
        found = LOADERS[loader](directory, payload)
    except (ValueError, OSError):
        found = None
    assert not mark.exists()
    assert not found or found in ([], ([], 0)) or loader == "journal"


FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "marshal.loads", "marshal.load", "shelve.open",
    "pickle.loads", "pickle.load", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load",
    "pandas.read_pickle", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
TRUSTED = {  # SECURITY.md, "What is trusted", says why
    ("tune_spaces/loading.py", "runpy.run_path"),
    ("pipeline/data/write_job.py", "pickle.load"),
}
CODE_FROM_BYTES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "runpy"}
IMPORTERS = {
    ("tune_spaces/loading.py", "runpy"),
    ("pipeline/data/write_job.py", "pickle"),
    ("pipeline/data/apart.py", "pickle"),
}


def test_no_call_in_the_sources_runs_data_as_code() -> None:
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            shell = any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            unsafe_yaml = name == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["yaml_loader()"]
            if name in FORBIDDEN or shell or unsafe_yaml:
                found.add((str(path.relative_to(ROOT)), name))
    assert found == TRUSTED
    assert pipeline.config.load.yaml_loader is tune_spaces.loading.yaml_loader
    assert issubclass(tune_spaces.loading.yaml_loader(), yaml.SafeLoader)


def test_what_makes_code_of_bytes_is_imported_by_the_trusted_alone() -> None:
    """Under whatever name it is then called."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(str(path.relative_to(ROOT)), name) for name in names if name.split(".")[0] in CODE_FROM_BYTES}
    assert found == IMPORTERS


# --- ways out of a folder --------------------------------------------------------------------------------------------


def test_an_artifact_that_names_a_place_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def get_model_version(self, name: str, version: str) -> SimpleNamespace:
            tags = {"sparta.digest": "0" * 64}
            source = "models:/m-" + "0" * 32
            return SimpleNamespace(
                name=name, version="1", tags=tags, run_id=None, description="", aliases=[], source=source
            )

        def get_logged_model(self, model_id: str) -> SimpleNamespace:
            return SimpleNamespace(model_id=model_id, artifact_location="file:///nowhere")

        def list_logged_model_artifacts(self, model_id: str) -> list[SimpleNamespace]:
            return [SimpleNamespace(path="../../evil.json", is_dir=False)]

    registry = Registry(TrackingConfig(), tmp_path)
    monkeypatch.setattr(registry, "_client", Store())
    with pytest.raises(ValueError, match="expected plain file names"):
        registry.pull("sparta-activation/1", tmp_path / "in" / "pulled")
    assert not (tmp_path / "in" / "pulled").exists()
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize("name", ["../evil.npz", "/tmp/evil.npz", "a/../../evil.npz", ""])
def test_prepared_data_behind_a_url_cannot_name_a_place_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path / "cache"))
    split = {"file": name, "count": 1, "class_counts": [1], "content": "", "sha256": ""}
    record = {
        "name": "x", "num_classes": 1, "class_names": ["a"], "channels": 1, "image_size": 1, "mean": [0], "std": [1],
        "storage": "raw", "splits": {"train": split}, "digest": "", "request": "",
    }  # fmt: skip
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "prepared.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="should match pattern"):
        fetch_prepared((tmp_path / "far").as_uri())
    assert not list(tmp_path.rglob("evil*"))


def test_a_network_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    names = {"../secret.safetensors": sha256_of(tmp_path / "secret.safetensors")}
    (tmp_path / "m" / "model.json").write_text(json.dumps({"sha256": names}))
    with pytest.raises(ValueError, match="expected plain file names"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".hidden", "", "A B"])
def test_the_name_of_a_chain_stays_in_the_run_root(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        validate({"name": name})


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {"tracking": {"uri": f"http://me:{SECRET}@tracker:5000"}},
        {"tracking": {"uri": f"http://me:a?{SECRET}@tracker:5000"}},
        {"tracking": {"uri": f"postgresql://db/mlflow?user=me&password={SECRET}"}},
        {"data": {"dataset": "npz", "path": f"https://me:{SECRET}@store/x.npz"}},
        {"data": {"dataset": "npz", "path": f"https://store/x.npz?X-Amz-Date=1&X-Amz-Signature={SECRET}"}},
        {"data": {"mirror": f"ftp://me:{SECRET}@store/x"}},
        {"data": {"mirror": f"https://store/x?sig={SECRET}"}},
    ],
)
def test_a_password_in_the_configuration_is_refused_and_not_repeated(section: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="without a password") as refusal:
        validate(section)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at http://me:{SECRET}@host:5000/x now", "at http://***@host:5000/x now"),
        (f"http://me:{SECRET}@{SECRET}@host", "http://***@host"),
        (f"postgresql://h/db?user=me&password={SECRET}", "postgresql://h/db?user=me&password=***"),
        (f"https://s/x?X-Amz-Security-Token={SECRET}&y=1, gone", "https://s/x?X-Amz-Security-Token=***&y=1, gone"),
        (f"https://s/x?SIG={SECRET}&sv=2", "https://s/x?SIG=***&sv=2"),
        ("http://host:5000/?design=1#/models", "http://host:5000/?design=1#/models"),
        (
            "sqlite:////runs/a@b/mlflow.db and models:/x@champion",
            "sqlite:////runs/a@b/mlflow.db and models:/x@champion",
        ),
    ],
)
def test_an_address_is_shown_without_its_secrets_and_otherwise_whole(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_stage_that_fails_over_an_address_keeps_its_password_to_itself(tmp_path: Path) -> None:
    class Run:
        def fail(self) -> None:
            pass

    class Local:
        """Neither Ray nor MLflow, but the real keeping of tracebacks."""

        output = tmp_path / "chain"
        log_failure = Services.log_failure

        @contextmanager
        def stage_run(self, *described: object) -> Iterator[Run]:
            yield Run()

    def stage(context: StageContext[None]) -> StageResult:
        raise RuntimeError(f"no answer from http://me:{SECRET}@store/x and postgresql://h/db?password={SECRET}")

    lines: list[str] = []
    chain = Chain(Local.output, say=lines.append)
    chain.execute([Node("a", "x", None, {}, one_by_one(stage))], Local())  # type: ignore[arg-type]
    assert "FAILED" in lines[-1]
    assert "no answer from http://***@store/x" in lines[-1]
    kept = {path.name: path.read_text() for path in Local.output.rglob("*") if path.is_file()}
    assert "no answer from http://***@store/x" in kept["a-x.txt"]
    assert SECRET not in json.dumps([lines, chain.failed, kept])


@pytest.mark.slow
def test_credentials_of_the_environment_are_in_no_file_line_or_argument(tmp_path: Path) -> None:
    """MLflow's address with a password, a Ray token, cloud keys: a chain that meets an outage keeps them to itself."""
    secrets = {
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:9",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    command = [
        sys.executable,
        "-m",
        "pipeline.run",
        "--until",
        "prepare",
        "tracking.close_seconds=3",
        "data.loader=memory",
    ]
    child = subprocess.Popen(
        command,
        env={**os.environ, **secrets, "SPARTA_RUNS": str(tmp_path / "runs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 0, printed
    assert "python -m pipeline.tracking sync" in printed  # the outage was met, and spoken of
    assert SECRET not in printed
    leaks = [p for p in (tmp_path / "runs").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert leaks == []


def test_no_secret_is_given_to_a_process_as_an_argument() -> None:
    """An argument is seen by everyone who may list processes."""
    pattern = re.compile(r"--[a-z-]*(password|token|secret)[ =]", re.IGNORECASE)
    files = [*MODULES, *(p for p in (ROOT / "infra").rglob("*") if p.suffix in {".sh", ".yaml"})]
    found = [f"{p.name}: {line.strip()}" for p in files for line in p.read_text().splitlines() if pattern.search(line)]
    assert found == []


def test_the_environment_of_jobs_holds_no_secret() -> None:
    environment = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text())["env_vars"]
    assert not [name for name in environment if re.search(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|_KEY|_URI", name)]


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "warns"), [(None, False), ("localhost", False), ("0.0.0.0", True)])
def test_the_ui_is_for_this_machine_unless_asked_and_then_warns(host: str | None, warns: bool, tmp_path: Path) -> None:
    (tmp_path / "infra").mkdir()
    shutil.copy(ROOT / "infra" / "ui.sh", tmp_path / "infra")
    mlflow = tmp_path / ".venv" / "bin" / "mlflow"
    mlflow.parent.mkdir(parents=True)
    shows = 'echo "from $MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"\necho "asked as $MLFLOW_SERVER_ALLOWED_HOSTS"\n'
    mlflow.write_text(f'#!/bin/sh\necho "$@"\n{shows}')
    mlflow.chmod(0o755)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    environment = {k: v for k, v in os.environ.items() if k not in ("BIND", "SPARTA_RUNS", "PORT")} | (
        {"BIND": host} if host else {}
    )
    shown = subprocess.run(
        ["bash", tmp_path / "infra" / "ui.sh"], env=environment, capture_output=True, text=True, check=True
    )
    assert f"--host {host or '127.0.0.1'} " in shown.stdout
    assert ("WARNING" in shown.stderr) == warns
    names = shown.stdout.rpartition("asked as ")[2].strip().split(",")
    # MLflow's own list has addresses alone: by this machine's name, others would get 403.
    assert (f"{os.uname().nodename}:5000" in names) == warns
    origins = shown.stdout.rpartition("from ")[2].splitlines()[0].split(",")
    assert (f"http://{os.uname().nodename}:5000" in origins) == warns
