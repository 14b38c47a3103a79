"""Which nodes a study makes: all else equal but the activation and the seed."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config.load import ConfigError, load_config
from pipeline.config.training import AWPConfig, TrainingConfig
from pipeline.evaluation.records import AuditReport, Check, Verdict
from pipeline.stages.graph import STAGES, head, tail
from pipeline.stages.node import Node
from pipeline.stages.study_page import audited, epochs_like_the_last
from pipeline.stages.train import TrainTask

OWN_DATA = ("data={dataset: digits}", "transfer.2.data={dataset: digits}")


def nodes(preset: str = "study_quick", *overrides: str) -> dict[str, Node[Any]]:
    config = load_config(preset, overrides)
    every = [*head(config), *tail(config)]
    assert len({node.key for node in every}) == len(every)
    return {node.key: node for node in every}


@pytest.mark.parametrize(("preset", "overrides"), [("study", OWN_DATA), ("study_quick", ())])
def test_every_node_comes_after_what_it_needs_and_stages_are_in_order(preset: str, overrides: tuple[str, ...]) -> None:
    seen: set[str] = set()
    stages = []
    for key, node in nodes(preset, *overrides).items():
        assert set(node.needs) <= seen
        seen.add(key)
        stages.append(STAGES.index(node.stage))
    assert stages == sorted(stages)
    assert "report:study" in seen


def test_only_activation_and_seed_differ() -> None:
    every = nodes()
    trained = [node.task for key, node in every.items() if key.startswith("pretrain:")]
    assert len(trained) == 2 * 6
    first: TrainTask = trained[0]
    factors = {}
    for task in trained:
        factors[task.model.activation.name] = task.training.optimizer.activation_lr_factor
        optimizer = task.training.optimizer.model_copy(update={"activation_lr_factor": 5.0})
        training = task.training.model_copy(update={"optimizer": optimizer})
        assert (training, task.augment, task.data) == (first.training, first.augment, first.data)
        assert (task.model.name, task.model.options) == (first.model.name, first.model.options)
    assert {(task.model.activation.name, task.seed) for task in trained} == {
        (name, seed) for name in ("sparta", "relu", "silu", "meta_acon", "position_prelu", "frelu") for seed in (0, 1)
    }
    # What the preset says of its own.
    assert {name for name, factor in factors.items() if factor != 5} == {"meta_acon", "position_prelu"}


def test_a_frozen_activation_comes_from_the_same_seed() -> None:
    every = nodes()
    for seed in (0, 1):
        assert every[f"transfer:deeper-frozen-s{seed}"].needs == ("prepare:source", f"freeze:s{seed}")
        assert every[f"freeze:s{seed}"].needs == (f"pretrain:sparta-s{seed}", "prepare:source")
        assert every[f"transfer:deeper-learned-s{seed}"].task.bank is None
        assert every[f"transfer:deeper-control-s{seed}"].task.model.activation.name == "relu"
        untrained, learned = (every[f"transfer:deeper-{name}-s{seed}"].task for name in ("untrained", "learned"))
        assert untrained.training.optimizer.activation_lr_factor == 0
        optimizer = learned.training.optimizer
        assert optimizer.activation_lr_factor > 0
        training = untrained.training.model_copy(update={"optimizer": optimizer})
        assert replace(untrained, training=training) == learned


def test_what_stands_beside_the_frozen_activation_may_be_left_out() -> None:
    every = nodes("study_quick", "study.on_targets=[untrained]")
    assert {key.rpartition("-")[0] for key in every if key.startswith("transfer:deeper")} == {
        "transfer:deeper-frozen",
        "transfer:deeper-untrained",
        "transfer:deeper-control",
    }


def test_a_contender_may_be_wider_or_train_longer() -> None:
    every = nodes("study", *OWN_DATA)
    assert every["pretrain:relu.wider-s0"].task.model.options["width"] == 18
    assert every["pretrain:relu.longer-s0"].task.training.epochs == 7
    assert every["pretrain:standard-sparta-s0"].task.training.method.kind == "standard"


def test_a_contender_may_have_a_learning_rate_of_its_own() -> None:
    own = "{name: frelu, activation: {name: frelu}, activation_lr_factor: 0.5}"
    every = nodes("study_quick", f"study.contenders=[{own}]")
    assert every["pretrain:frelu-s0"].task.training.optimizer.activation_lr_factor == 0.5
    assert every["pretrain:sparta-s0"].task.training.optimizer.activation_lr_factor != 0.5


def test_finalists_are_trained_once_and_judged_twice() -> None:
    final = "study.final={contenders: [frelu], evaluation: {attacks: full}}"
    with_final, without = nodes("study_quick", final), nodes()
    trainings = {key for key in without if key.startswith(("pretrain:", "transfer:"))}
    assert {key for key in with_final if key.startswith(("pretrain:", "transfer:"))} == trainings
    judged = {key.removeprefix("evaluate:final-") for key in with_final if key.startswith("evaluate:final-")}
    places = ("sparta", "control", "frelu", "deeper-frozen", "deeper-control")
    assert judged == {
        f"{place}-s{seed}" for place in (*places, "digits-5-9-frozen", "digits-5-9-control") for seed in (0, 1)
    }
    task = with_final["evaluate:final-sparta-s1"].task
    assert task.model == "pretrain:sparta-s1"
    assert task.evaluation.attacks[-2].kind == "autoattack"
    assert [name for name, _ in task.matched] == ["frelu"]
    (one,) = {
        k for k in nodes("study_quick", final[:-1] + ", targets: [deeper]}") if "final-d" in k and "frozen-s0" in k
    }
    assert one == "evaluate:final-deeper-frozen-s0"
    assert with_final["evaluate:sparta-s1"].task == without["evaluate:sparta-s1"].task


def test_of_an_activation_from_elsewhere_there_are_transfers_alone() -> None:
    bank = ("bank.pretrained=cifar10-resnet8-linf8", "study.contenders=[]")
    every = nodes("study_quick", *bank, "study.final={evaluation: {attacks: full}}")
    assert {key.rpartition("-")[0] for key in every if key.startswith(("pretrain:", "transfer:"))} == {
        f"transfer:{target}-{name}"
        for target in ("deeper", "digits-5-9")
        for name in ("frozen", "learned", "untrained", "control")
    }
    assert [key for key in every if key.startswith("freeze")] == ["freeze:bank"]
    for seed in (0, 1):
        assert every[f"transfer:deeper-frozen-s{seed}"].needs == ("prepare:source", "freeze:bank")
        assert f"evaluate:final-deeper-frozen-s{seed}" in every
    assert "evaluate:final-sparta-s0" not in every


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("study.seeds=[0]", "study.seeds"),
        ("bank.pretrained=cifar10-resnet8-linf8", "training the source, which study.contenders would need"),
        ("study.seeds=[1, 1]", "different seeds"),
        ("study.contenders=[{name: sparta, activation: {name: silu}}]", "the chain's own network"),
        *(
            (f"study.contenders=[{{name: {role}, activation: {{name: silu}}}}]", "the chain's own network")
            for role in ("control", "frozen", "learned", "untrained")
        ),
        (
            "study.contenders=[{name: a, activation: {name: silu}}, {name: a, activation: {name: gelu}}]",
            "different names",
        ),
        ("study.contenders=[{name: a, activation: {name: nothing}}]", "unknown activation"),
        ("study.final={contenders: [mish], evaluation: {}}", "among silu, .* got mish"),
        ("transfer=[{name: final-home, model: {name: resnet14}}]", "begin with .* got final-home"),
        ("study.final={targets: [moon], evaluation: {}}", "among deeper, digits-5-9, got moon"),
        (
            "study.contenders=[{name: short, activation: {name: silu}, epochs: 2}]",
            "study.contenders short: .*warmup_epochs",
        ),
    ],
)
def test_bad_studies_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("study_quick", [override, "training.schedule={kind: cosine, warmup_epochs: 2}"])


def test_a_skipped_check_is_not_counted_among_those_that_passed() -> None:
    verdicts: tuple[Verdict, ...] = ("pass", "skip", "warn", "pass", "skip", "skip")
    checks = tuple(
        Check(
            number=number, name=f"c{number}", verdict=verdict, figure=None, warn_above=None, fail_above=None,
            summary="", details={},
        )
        for number, verdict in enumerate(verdicts, 1)
    )  # fmt: skip
    threat = load_config("demo").evaluation.threat
    report = AuditReport(budget="quick", n=64, threat=threat, model_digest="m", checks=checks)
    assert report.passed
    assert audited(report) == "quick, 64 images: 2 pass, 1 warn, 0 fail, 3 skip"


@pytest.mark.parametrize(("warmup_epochs", "expected"), [(0, 10), (8, 8)])
def test_the_epochs_before_awp_sets_in_cost_less(warmup_epochs: int, expected: float) -> None:
    """Three attack steps (6 passes) and a batch (3), or with AWP two."""
    method, awp = {"kind": "pgd_at", "attack": {"steps": 3}}, AWPConfig(warmup_epochs=warmup_epochs)
    training = TrainingConfig.model_validate({"epochs": 10, "method": method, "awp": awp})
    assert epochs_like_the_last(training, 10) == pytest.approx(expected)
