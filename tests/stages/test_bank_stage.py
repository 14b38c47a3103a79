"""Taking in an activation that was trained elsewhere: registered with where it is from, and what later stages train."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from pipeline.artifacts import StageRecord
from pipeline.config.bank import BankConfig
from pipeline.config.load import ConfigError, load_config
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import StandardConfig, TrainingConfig
from pipeline.stages.freeze import bank_node, frozen_bank, run_bank, threat_in_words
from pipeline.stages.graph import settled, tuned
from pipeline.stages.node import Finished, Node, StageContext, StageResult
from pipeline.tracking import Registry, Tracker, bank_digest
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


class Away:
    """A registry that cannot be reached."""

    def holding(self, digest: str) -> NoReturn:
        raise ConnectionError("MLflow is away")


def take_in(directory: Path, node: Node[Any], registry: object | None = None) -> tuple[StageResult | Exception, Told]:
    directory.mkdir(exist_ok=True)
    told, services = Told(), SimpleNamespace(registry=registry or Away())
    (outcome,) = run_bank([StageContext(node.key, node.task, directory, {}, told, services)])  # type: ignore[arg-type]
    return outcome, told


def small_bank(directory: Path, **source: str) -> ActivationBank:
    torch.manual_seed(0)
    bank = ActivationBank.from_model(build_model("resnet8", width=4, activation="frelu"), source=source)
    bank.save(directory)
    return bank


def finished(directory: Path, result: StageResult) -> Finished:
    return Finished(directory, StageRecord.model_construct(payload=result.payload))


def test_shipped_bank_is_registered_with_what_it_says_of_itself_and_moves_no_alias(tmp_path: Path) -> None:
    result, told = take_in(tmp_path / "out", bank_node(BankConfig(pretrained="cifar10-resnet8-linf8")))
    assert isinstance(result, StageResult)
    shipped = ActivationBank.pretrained("cifar10-resnet8-linf8")
    assert frozen_bank(finished(tmp_path / "out", result)) == shipped
    assert result.outputs == ["bank/bank.json", "bank/bank.safetensors"]
    assert (result.payload["reference"], result.payload["alias"]) == ("sparta-activation/7", None)
    tags = told.registered["tags"]
    assert tags["taken_from"] == "pretrained cifar10-resnet8-linf8"
    assert (tags["source.dataset"], tags["digest"]) == (shipped.source["dataset"], shipped.digest)
    assert (told.registered["digest"], told.registered["alias"]) == (bank_digest(tmp_path / "out" / "bank"), None)


def test_version_of_the_registry_is_pulled_and_not_registered_again(tmp_path: Path) -> None:
    bank = small_bank(tmp_path / "bank")
    registry = Registry(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    version = registry.register(tmp_path / "bank").reference
    result, told = take_in(tmp_path / "out", bank_node(BankConfig(registered=version)), registry)
    assert isinstance(result, StageResult)
    assert frozen_bank(finished(tmp_path / "out", result)) == bank
    assert result.payload["reference"] == version
    assert (told.activations, told.registered) == ([version], {})

    (tmp_path / "out" / "bank" / "bank.safetensors").write_bytes(b"damaged since")  # pulled anew, in the same place
    again, _ = take_in(tmp_path / "out", bank_node(BankConfig(registered=version)), registry)
    assert again == result
    assert frozen_bank(finished(tmp_path / "out", result)) == bank

    # The same files in a folder are that version.
    same, told = take_in(tmp_path / "same", bank_node(BankConfig(path=str(tmp_path / "bank"))), registry)
    assert isinstance(same, StageResult)
    assert same.payload["reference"] == version
    assert (told.activations, told.registered) == ([version], {})

    missing, _ = take_in(tmp_path / "none", bank_node(BankConfig(registered="sparta-activation/9")), registry)
    assert isinstance(missing, ValueError)
    assert "is not in the registry; known: sparta-activation@candidate" in str(missing)


def test_free_text_of_a_bank_makes_no_version_that_mlflow_refuses(tmp_path: Path) -> None:
    root = tmp_path / "chain"
    root.mkdir()
    small_bank(tmp_path / "bank", **{"threat (linf)": "8/255", "dataset": "photographs"})
    node = bank_node(BankConfig(path=str(tmp_path / "bank")))
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"), root)
    directory = root / "freeze" / "bank"
    directory.mkdir(parents=True)
    with tracker.chain("c") as chain, chain.stage(node.key) as run:
        services = SimpleNamespace(registry=Away())
        (result,) = run_bank([StageContext(node.key, node.task, directory, {}, run, services)])  # type: ignore[arg-type]
    assert isinstance(result, StageResult)
    found = Registry(TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"), root).resolve(result.payload["reference"])
    assert (found.tags["source.threat _linf_"], found.tags["source.dataset"], found.aliases) == (
        "8/255",
        "photographs",
        (),
    )


def test_targets_learn_the_activation_of_the_bank(tmp_path: Path) -> None:
    spec = {"name": "sparta", "sharing": "stage", "variant": "depthwise", "kernel_size": 3}
    bank = ActivationBank.from_model(build_model("resnet8", width=16, activation=spec))
    bank.save(tmp_path / "bank")
    config = load_config("demo", [f"bank.path={tmp_path / 'bank'}"])
    assert config.bank is not None
    result, _ = take_in(tmp_path / "out", bank_node(config.bank))
    assert isinstance(result, StageResult)
    done = {"freeze:bank": finished(tmp_path / "out", result)}
    later = tuned(config, done)
    assert later.model.activation.spec() == bank.spec.mapping() != config.model.activation.spec()
    assert later.model_copy(update={"model": config.model}) == config
    assert tuned(config, {}) == config
    assert (settled(config, done), settled(config, {})) == (True, False)


def test_bank_that_does_not_fit_a_target_is_refused_before_the_controls_are_trained(tmp_path: Path) -> None:
    small_bank(tmp_path / "bank")
    narrow = [f"bank.path={tmp_path / 'bank'}", "model.options={width: 8}"]
    config = load_config("demo", narrow)
    assert config.bank is not None
    result, _ = take_in(tmp_path / "out", bank_node(config.bank))
    assert isinstance(result, StageResult)
    with pytest.raises(ConfigError, match=r"target deeper: expected 16 channels .* got a function for 4 channels"):
        tuned(config, {"freeze:bank": finished(tmp_path / "out", result)})


def test_bank_that_changed_after_the_plan_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    small_bank(tmp_path / "bank")
    node = bank_node(BankConfig(path=str(tmp_path / "bank")))
    small_bank(tmp_path / "bank", dataset="told otherwise")
    outcome, told = take_in(tmp_path / "out", node)
    assert isinstance(outcome, ValueError)
    assert "as it was when the chain began" in str(outcome)
    assert told.registered == {}
    assert not (tmp_path / "out" / "bank").exists()


def test_what_a_bank_says_of_itself_is_part_of_its_identity(tmp_path: Path) -> None:
    small_bank(tmp_path / "one")
    small_bank(tmp_path / "other", dataset="photographs")
    one, other = (bank_node(BankConfig(path=str(tmp_path / name))).sections for name in ("one", "other"))
    assert one["bank"]["digest"] == other["bank"]["digest"]
    assert one != other


def test_folder_that_is_not_there_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARTA_DATA", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=f"bank.path='mine'.*{tmp_path / 'mine'} and {tmp_path / 'data' / 'mine'}"):
        bank_node(BankConfig(path="mine"))
    small_bank(tmp_path / "data" / "mine")
    assert bank_node(BankConfig(path="mine")).needs == ()


def test_the_words_of_a_threat_claim_no_attack_that_there_was_not() -> None:
    assert threat_in_words(TrainingConfig()) == "linf eps=0.03137, pgd_at"
    assert threat_in_words(TrainingConfig(method=StandardConfig())) == "no attack"
