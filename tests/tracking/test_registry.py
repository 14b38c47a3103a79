import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from safetensors.numpy import load_file

from pipeline.config.tracking import TrackingConfig
from pipeline.tracking import Registry, Tracker
from pipeline.tracking.__main__ import main as sync_main
from sparta_models import ActivationBank, build_model, convert, frozen_parameters, named_sites
from tests.tracking.conftest import write_bank


@pytest.fixture
def registry(root: Path, config: TrackingConfig) -> Registry:
    return Registry(config, root)


def test_what_is_pulled_is_what_was_registered(registry: Registry, bank: Path, tmp_path: Path):
    made = registry.register(bank, tags={"variant": "depthwise"}, description="a bank")
    pulled = registry.pull("sparta-activation@candidate", tmp_path / "pulled")
    assert pulled == made
    assert (made.version, made.tags["variant"], made.description, made.aliases) == (
        1,
        "depthwise",
        "a bank",
        ("candidate",),
    )
    assert sorted(p.name for p in (tmp_path / "pulled").iterdir()) == ["activation.json", "activation.safetensors"]
    for name in ("activation.json", "activation.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (bank / name).read_bytes()
    assert load_file(tmp_path / "pulled" / "activation.safetensors")["layer1.0.kernel"].shape == (8, 3, 3)


def test_a_registered_bank_goes_into_a_converted_network(registry: Registry, tmp_path: Path):
    bank = ActivationBank.from_model(build_model("resnet18", width=8), source={"dataset": "digits"})
    registry.register(bank.save(tmp_path / "bank"))
    registry.pull("sparta-activation@candidate", tmp_path / "pulled")
    pulled = ActivationBank.load(tmp_path / "pulled")
    assert pulled == bank
    network = convert(torchvision.models.resnet18(), "sparta", input_shape=(3, 64, 64))
    pulled.apply_to(network, adapt="mean")
    assert network(torch.rand(2, 3, 64, 64)).isfinite().all()
    assert len(frozen_parameters(network)) == len(dict(named_sites(network))) * 2


def test_the_mlmodel_names_our_flavour_and_the_digests(registry: Registry, bank: Path):
    model = registry.client.get_logged_model(registry.model_id(registry.register(bank)))
    text = (Path(model.artifact_location.removeprefix("file://")) / "MLmodel").read_text(encoding="utf-8")
    assert "sparta_models" in text
    assert registry.resolve("sparta-activation/1").digest in text
    assert "pickle" not in text
    assert model.status == "READY"


def test_versions_count_up_and_the_alias_moves(registry: Registry, bank: Path, root: Path):
    registry.register(bank)
    second = registry.register(write_bank(root / "other", 2.0))
    assert second.version == 2
    assert registry.resolve("sparta-activation@candidate").version == 2
    assert [(a.version, a.aliases) for a in registry.versions()] == [(2, ("candidate",)), (1, ())]
    registry.set_alias("sparta-activation/1", "champion")
    assert registry.resolve("sparta-activation@champion").version == 1


def test_a_late_delivery_takes_no_alias_from_a_newer_version(root: Path, config: TrackingConfig, registry: Registry):
    for number in (1, 2):
        with (
            Tracker(config, root).chain("demo") as chain,
            chain.stage("freeze", tags={"fingerprint": str(number)}) as stage,
        ):
            stage.register(write_bank(root / f"bank-{number}", float(number)))
    assert sync_main(["sync", "--all", str(root)]) == 0
    assert registry.resolve("sparta-activation@candidate").version == 2
    assert len(registry.versions()) == 2


def test_a_stage_registers_its_bank_once(root: Path, config: TrackingConfig, bank: Path, registry: Registry):
    for _ in range(2):
        with Tracker(config, root).chain("demo") as chain:
            stage = chain.stage("freeze", tags={"fingerprint": "f"})
            with pytest.raises(RuntimeError), stage:  # noqa: PT012  the stage is what is interrupted
                assert stage.register(bank) == "sparta-activation/1"
                raise RuntimeError("interrupted")
    assert len(registry.versions()) == 1
    assert registry.resolve("sparta-activation/1").run_id == stage.run_id


def test_a_pull_into_the_same_directory_is_checked_not_repeated(registry: Registry, bank: Path, tmp_path: Path):
    registry.register(bank)
    registry.pull("sparta-activation/1", tmp_path / "pulled")
    registry.pull("sparta-activation/1", tmp_path / "pulled")
    (tmp_path / "pulled" / "activation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="altered"):
        registry.pull("sparta-activation/1", tmp_path / "pulled")


@pytest.mark.parametrize("adjust_manifest", [False, True])
def test_a_tampered_store_is_refused_and_nothing_is_left(
    registry: Registry, bank: Path, tmp_path: Path, adjust_manifest: bool
):
    made = registry.register(bank)
    store = Path(registry.client.get_logged_model(registry.model_id(made)).artifact_location.removeprefix("file://"))
    evil = write_bank(tmp_path / "evil", 666.0)
    shutil.copyfile(evil / "activation.safetensors", store / "activation.safetensors")
    if adjust_manifest:
        (store / "MLmodel").write_text((store / "MLmodel").read_text().replace(made.digest, "0" * 64))
    with pytest.raises(ValueError, match="altered"):
        registry.pull("sparta-activation/1", tmp_path / "pulled")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chain", "evil"]


def test_files_that_could_carry_code_are_refused_both_ways(registry: Registry, bank: Path, tmp_path: Path):
    made = registry.register(bank)
    store = Path(registry.client.get_logged_model(registry.model_id(made)).artifact_location.removeprefix("file://"))
    (store / "model.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"only plain .* got 'model.pkl'"):
        registry.pull("sparta-activation/1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    (bank / "extra.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only plain .* got 'extra.pkl'"):
        registry.register(bank)
    (bank / "extra.pkl").unlink()
    (bank / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"only plain .* got 'link.json'"):
        registry.register(bank)


def test_a_folder_in_the_store_is_refused(registry: Registry, bank: Path, tmp_path: Path):
    made = registry.register(bank)
    store = Path(registry.client.get_logged_model(registry.model_id(made)).artifact_location.removeprefix("file://"))
    (store / "code").mkdir()
    (store / "code" / "run.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="expected plain file names"):
        registry.pull("sparta-activation/1", tmp_path / "pulled")


def test_a_version_from_elsewhere_is_refused(registry: Registry, bank: Path, tmp_path: Path):
    made = registry.register(bank)
    registry.client.create_model_version(made.name, source="/etc", tags={"sparta.digest": made.digest})
    with pytest.raises(ValueError, match="expected sparta-activation/2 to come from a logged model, got source '/etc'"):
        registry.pull("sparta-activation/2", tmp_path / "pulled")
    registry.client.create_model_version(made.name, source="/etc")
    with pytest.raises(ValueError, match="not registered by this pipeline"):
        registry.resolve("sparta-activation/3")
    assert [found.version for found in registry.versions()] == [2, 1]


def test_another_process_that_is_quicker_is_borne(registry: Registry, bank: Path, monkeypatch: pytest.MonkeyPatch):
    """As MLflow says it: after three attempts at a version number, and where two insert the same alias."""
    monkeypatch.setattr("pipeline.tracking.registry._PAUSES", (0.0, 0.0))
    complaints = {
        "create_model_version": "Model Version creation error (name=x). Giving up after 3 attempts.",
        "set_registered_model_alias": "(psycopg.errors.UniqueViolation) duplicate key value",
    }
    left = dict.fromkeys(complaints, 2)

    def contended(name: str, real: Callable[..., object], *args: object, **options: object) -> object:
        left[name] -= 1
        if left[name] >= 0:
            raise MlflowException(complaints[name])
        return real(*args, **options)

    for name in complaints:
        monkeypatch.setattr(registry.client, name, partial(contended, name, getattr(registry.client, name)))
    assert registry.register(bank).aliases == ("candidate",)
    assert list(left.values()) == [-1, -1]


def test_any_other_refusal_is_not_tried_again(registry: Registry, bank: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def refused(*args: object, **kw: object):
        calls.append(args)
        raise MlflowException("no", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(registry.client, "create_model_version", refused)
    with pytest.raises(ValueError, match=r"MLflow at sqlite.* refuses: no"):
        registry.register(bank)
    assert len(calls) == 1


def test_files_that_were_deleted_in_mlflow_are_one_readable_line(registry: Registry, bank: Path, tmp_path: Path):
    """As `pull` of a transfer meets it, which then takes the local files."""
    registry.client.delete_logged_model(registry.model_id(registry.register(bank)))
    with pytest.raises(ValueError, match=r"MLflow at sqlite.* refuses: .*m-[0-9a-f]{32}.* not found") as caught:
        registry.pull("sparta-activation/1", tmp_path / "pulled")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["chain"]


@pytest.mark.parametrize(
    "call", ["mlflow.MlflowClient.list_logged_model_artifacts", "mlflow.artifacts.download_artifacts"]
)
def test_a_store_of_files_that_is_closed_is_taken_for_one_that_is_away(
    registry: Registry, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    class NoCredentialsError(Exception):
        """As boto's: none of MLflow's own, and no OSError."""

    def closed(*arguments: object, **options: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    registry.register(bank)
    monkeypatch.setattr(call, closed)
    with pytest.raises(ConnectionError, match="sparta-activation/1 cannot be fetched: Unable to locate credentials"):
        registry.pull("sparta-activation/1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_one_may_not_read_is_refused_by_a_value_error(
    registry: Registry, bank: Path, monkeypatch: pytest.MonkeyPatch
):
    def forbidden(*args: object) -> None:
        raise MlflowException("Permission denied\nfor run", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(registry.client, "get_run", forbidden)
    with Tracker(registry.config, bank.parents[1]).chain("demo") as chain, chain.stage("freeze") as stage:
        stage.register(bank)
    with pytest.raises(ValueError, match=r"refuses: Permission denied$"):
        registry.lineage("sparta-activation/1")


@pytest.mark.parametrize("reference", ["sparta-activation", "a@b@c", "../x/1", "sparta-activation/0", "", "name@"])
def test_malformed_references_say_what_is_expected(registry: Registry, reference: str):
    with pytest.raises(ValueError, match="expected NAME@ALIAS or NAME/VERSION"):
        registry.resolve(reference)


def test_an_unknown_reference_lists_the_known(registry: Registry, bank: Path):
    with pytest.raises(ValueError, match="known: nothing yet"):
        registry.resolve("sparta-activation@candidate")
    registry.register(bank)
    with pytest.raises(ValueError, match="known: sparta-activation@candidate, sparta-activation/1"):
        registry.resolve("sparta-activation@champion")


@pytest.mark.parametrize("alias", ["latest", "v3", "a b", ""])
def test_reserved_aliases_are_refused(registry: Registry, bank: Path, alias: str):
    with pytest.raises(ValueError, match="expected an alias"):
        registry.register(bank, alias=alias)


def test_the_digest_of_a_version_cannot_be_retagged(registry: Registry, bank: Path):
    registry.register(bank)
    with pytest.raises(ValueError, match=r"sparta\.digest"):
        registry.set_tags("sparta-activation/1", {"sparta.digest": "0"})


def test_a_directory_without_tensors_is_no_bank(registry: Registry, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"with a \.safetensors among them"):
        registry.register(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected a bank directory"):
        registry.register(tmp_path / "missing")


def test_a_run_that_used_a_version_is_linked_to_it(root: Path, config: TrackingConfig, bank: Path, registry: Registry):
    with Tracker(config, root).chain("demo") as chain:
        with chain.stage("freeze") as stage:
            reference = stage.register(bank)
        assert reference is not None
        with chain.stage("transfer") as stage:
            stage.activation(reference)
    assert stage.run_id is not None
    inputs = registry.client.get_run(stage.run_id).inputs
    assert [model.model_id for model in inputs.model_inputs] == [registry.model_id(registry.resolve(reference))]
