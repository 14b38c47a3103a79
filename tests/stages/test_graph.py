"""Which nodes a configuration makes, and what their identity depends on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import StageRecord, fingerprint
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, load_config
from pipeline.data import prepare
from pipeline.stages.fit import check_images
from pipeline.stages.graph import STAGES, head, reported_models, tail
from pipeline.stages.node import Finished, Node
from sparta_models import ActivationBank, build_model


def nodes(*overrides: str) -> dict[str, Node[Any]]:
    config = load_config("demo", overrides)
    return {node.key: node for node in [*head(config), *tail(config)]}


def identities(*overrides: str) -> dict[str, str]:
    return {
        key: fingerprint({"sections": dict(node.sections), "needs": node.needs})
        for key, node in nodes(*overrides).items()
    }


def test_every_node_comes_after_what_it_needs_and_stages_are_in_order() -> None:
    seen: set[str] = set()
    stages = []
    for key, node in nodes("search.enabled=true").items():
        assert set(node.needs) <= seen
        seen.add(key)
        stages.append(STAGES.index(node.stage))
    assert stages == sorted(stages)
    assert "search:best" in seen


@pytest.mark.parametrize(("preset", "page"), [("demo", "report:page"), ("study_quick", "report:study")])
def test_what_passes_on_records_of_trainings_knows_them_by_more_than_their_files(preset: str, page: str) -> None:
    config = load_config(preset)
    reading = {node.key for node in [*head(config), *tail(config)] if node.reads_records}
    assert page in reading
    assert {key.partition(":")[0] for key in reading - {page}} == {"freeze"}


def test_every_target_has_a_frozen_network_and_a_control_of_equal_budget() -> None:
    models = {model.branch: model for model in reported_models(load_config("demo"))}
    for name in ("deeper", "digits-5-9"):
        frozen, control = models[name], models[f"{name}-control"]
        assert frozen.task.bank == "freeze:bank"
        assert control.task.bank is None
        assert control.activation == "relu"
        assert (frozen.task.training, frozen.task.augment, frozen.task.seed, frozen.task.data) == (
            control.task.training,
            control.task.augment,
            control.task.seed,
            control.task.data,
        )
        assert frozen.task.model.name == control.task.model.name
        assert (frozen.twin, control.twin) == (control.trained, frozen.trained)


@pytest.mark.parametrize(
    "override",
    [
        "scaling.num_workers=1",
        "scaling.max_failures=9",
        "tracking.experiment=other",
        "training.checkpoint.every_steps=5",
        "data.writers=2",
    ],
)
def test_where_and_how_is_no_part_of_any_identity(override: str) -> None:
    assert identities(override) == identities()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("training.epochs=3", {"pretrain", "transfer"}),
        ("data.val_fraction=0.2", {"prepare"}),
        ("model.activation.options.kernel_size=5", {"pretrain", "transfer"}),
        ("evaluation.threat.eps=0.2", {"evaluate"}),
        ("training.threat.eps=0.2", {"pretrain", "freeze", "transfer"}),
        ("report.num_pictures=1", {"report"}),
    ],
)
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_others(override: str, changed: set[str]) -> None:
    before, after = identities(), identities(override)
    assert {key.partition(":")[0] for key in before if before[key] != after[key]} == changed


def test_target_with_its_own_data_has_its_own_preparation() -> None:
    found = nodes()
    assert found["transfer:digits-5-9"].task.data == "prepare:digits-5-9"
    assert found["transfer:deeper"].task.data == "prepare:source"


def test_chain_without_targets_still_freezes_and_reports() -> None:
    config = load_config("demo").model_copy(update={"transfer": ()})
    keys = [node.key for node in [*head(config), *tail(ChainConfig.model_validate(config.model_dump()))]]
    assert "freeze:bank" in keys
    assert "report:page" in keys
    assert not any(key.startswith("transfer") for key in keys)


TAKEN = "bank.pretrained=cifar10-resnet8-linf8"


def test_activation_from_elsewhere_is_taken_to_the_targets_and_no_source_is_trained() -> None:
    found = nodes(TAKEN)
    assert not any(key.startswith(("search", "pretrain")) or "source-" in key for key in found)
    assert found["freeze:bank"].needs == ()
    assert found["freeze:bank"].sections["bank"]["digest"] == ActivationBank.pretrained("cifar10-resnet8-linf8").digest
    assert "freeze:bank" in found["transfer:deeper"].needs
    assert "freeze:bank" not in found["transfer:deeper-control"].needs
    assert [model.role for model in found["report:page"].task.models] == ["transfer", "control"] * 2
    seen: set[str] = set()
    for key, node in found.items():
        assert set(node.needs) <= seen
        seen.add(key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["transfer.0.model.options={width: 24}"], "target deeper: expected 24 channels at site .*; pass adapt="),
        (
            ["transfer.0.model={name: vgg16_bn}", "transfer.0.adapt=none"],
            "target deeper: unknown adapt rule 'none'; known: interpolate, mean",
        ),
        (
            ["transfer.0.model.options={depth: 3}"],
            r"transfer:deeper: resnet14 with {'depth': 3} cannot be built: .*depth",
        ),
        (["model.options={width: 0}"], r"pretrain:source: resnet8 with {'width': 0} cannot be built: .*width"),
        (["model.options={widht: 8}", "transfer=[]"], r"pretrain:source: .* cannot be built: .*widht"),
    ],
)
def test_target_that_the_activation_does_not_fit_is_refused_before_anything_is_trained(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        nodes(*overrides)
    assert nodes("transfer.0.model.options={width: 24}", "transfer.0.adapt=mean")


def test_more_test_images_than_there_are_are_refused_when_the_data_is_there(tmp_path: Path) -> None:
    config = load_config("demo", ["evaluation.num_examples=225"])
    prepared = prepare(config.data, tmp_path, seed=0)
    record = StageRecord.model_construct(payload={})
    done = {"prepare:source": Finished(prepared.directory, record)}
    with pytest.raises(ConfigError, match="expected num_examples <= 224, the test images of digits 0-4, got 225"):
        check_images(tail(config), done)
    check_images(tail(config), {})
    check_images(tail(load_config("demo", ["evaluation.num_examples=224"])), done)


def test_trying_the_fit_moves_no_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    nodes()
    assert torch.equal(torch.rand(4), expected)


def test_source_data_is_prepared_beside_a_bank_only_where_a_target_trains_on_it() -> None:
    assert "prepare:source" in nodes(TAKEN)
    own = "transfer=[{name: a, data: {dataset: digits}}, {name: b, data: {dataset: digits}}]"
    assert {key for key in nodes(TAKEN, own) if key.startswith("prepare")} == {"prepare:a", "prepare:b"}


def test_bank_in_a_folder_is_known_by_what_it_holds(tmp_path: Path) -> None:
    network = build_model("resnet8", width=4, activation="frelu")
    for name in ("one", "other"):
        ActivationBank.from_model(network).save(tmp_path / name)
    first, second = (nodes(f"bank.path={tmp_path / name}")["freeze:bank"].sections for name in ("one", "other"))
    assert first == second
    (tmp_path / "one" / "bank.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match=r"bank: .*one"):
        nodes(f"bank.path={tmp_path / 'one'}")
    with pytest.raises(ConfigError, match="among cifar10-resnet8-linf8, got 'imagenet'"):
        nodes("bank.pretrained=imagenet")
