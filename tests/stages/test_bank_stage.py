"""Taking in an activation that was trained elsewhere: registered with where it is from, and what later stages train."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.artifacts import StageRecord
from pipeline.config.bank import BankConfig
from pipeline.config.load import load_config
from pipeline.config.tracking import TrackingConfig
from pipeline.stages.freeze import BankTask, frozen_bank, run_bank
from pipeline.stages.graph import tuned
from pipeline.stages.node import Finished, StageContext, StageResult
from pipeline.tracking import Registry, bank_digest
from sparta_models import ActivationBank, build_model


class Told:
    """A stage's run that remembers what it is told."""

    def __init__(self) -> None:
        self.activations: list[str] = []
        self.registered: dict[str, Any] = {}

    def activation(self, reference: str) -> None:
        self.activations.append(reference)

    def register(self, directory: Path, **facts: Any) -> str:
        self.registered = {"digest": bank_digest(directory), **facts}
        return "sparta-activation/7"


def take_in(directory: Path, registry: Registry | None = None, **bank: str) -> tuple[StageResult | Exception, Told]:
    directory.mkdir()
    told, services = Told(), SimpleNamespace(registry=registry)
    task = BankTask(BankConfig(**bank))
    (outcome,) = run_bank([StageContext("freeze:bank", task, directory, {}, told, services)])  # type: ignore[arg-type]
    return outcome, told


def finished(directory: Path, result: StageResult) -> Finished:
    return Finished(directory, StageRecord.model_construct(payload=result.payload))


def test_shipped_bank_is_registered_with_what_it_says_of_itself(tmp_path: Path) -> None:
    result, told = take_in(tmp_path / "out", pretrained="cifar10-resnet8-linf8")
    assert isinstance(result, StageResult)
    shipped = ActivationBank.pretrained("cifar10-resnet8-linf8")
    assert frozen_bank(finished(tmp_path / "out", result)) == shipped
    assert result.outputs == ["bank/bank.json", "bank/bank.safetensors"]
    assert result.payload["reference"] == "sparta-activation/7"
    tags = told.registered["tags"]
    assert tags["taken_from"] == "pretrained cifar10-resnet8-linf8"
    assert (tags["dataset"], tags["digest"]) == (shipped.source["dataset"], shipped.digest)
    assert told.registered["digest"] == bank_digest(tmp_path / "out" / "bank")


def test_version_of_the_registry_is_pulled_and_not_registered_again(tmp_path: Path) -> None:
    bank = ActivationBank.from_model(build_model("resnet8", width=4, activation="frelu"))
    registry = Registry(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    version = registry.register(bank.save(tmp_path / "bank"))
    result, told = take_in(tmp_path / "out", registry, registered=version.reference)
    assert isinstance(result, StageResult)
    assert frozen_bank(finished(tmp_path / "out", result)) == bank
    assert result.payload["reference"] == version.reference
    assert (told.activations, told.registered) == ([version.reference], {})
    missing, _ = take_in(tmp_path / "none", registry, registered="sparta-activation/9")
    assert isinstance(missing, ValueError)
    assert "is not in the registry; known: sparta-activation@candidate" in str(missing)


def test_targets_learn_the_activation_of_the_bank(tmp_path: Path) -> None:
    spec = {"name": "sparta", "sharing": "stage", "variant": "depthwise", "kernel_size": 3}
    bank = ActivationBank.from_model(build_model("resnet8", width=4, activation=spec))
    bank.save(tmp_path / "bank")
    config = load_config("demo", [f"bank.path={tmp_path / 'bank'}"])
    result, _ = take_in(tmp_path / "out", path=str(tmp_path / "bank"))
    assert isinstance(result, StageResult)
    later = tuned(config, {"freeze:bank": finished(tmp_path / "out", result)})
    assert later.model.activation.spec() == bank.spec.mapping() != config.model.activation.spec()
    assert tuned(config, {}) == config
    assert later.model_copy(update={"model": config.model}) == config


def test_bank_that_was_damaged_after_the_plan_fails_its_node_alone(tmp_path: Path) -> None:
    ActivationBank.from_model(build_model("resnet8", width=4)).save(tmp_path / "bank")
    shutil.copyfile(tmp_path / "bank" / "bank.json", tmp_path / "bank" / "bank.safetensors")
    outcome, told = take_in(tmp_path / "out", path=str(tmp_path / "bank"))
    assert isinstance(outcome, Exception)
    assert told.registered == {}
    with pytest.raises(ValueError, match="bank"):
        raise outcome
