"""One branch that cannot begin, or whose result cannot be read, takes no other along; and what is shown of each."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.artifacts import StageRecord
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.stages import evaluate as evaluate_stage
from pipeline.stages import train as train_stage
from pipeline.stages.node import Finished, StageContext, StageResult
from pipeline.tracking import Entry, Registry, bank_digest
from pipeline.training import TrainJob
from tests.tracking.conftest import write_bank

KEYS = ("a", "broken", "c")


def context(key: str, directory: Path, **options: Any) -> StageContext[Any]:
    services = SimpleNamespace(ray=lambda: None, config=SimpleNamespace(scaling=None))
    return StageContext(key, None, directory, options.get("upstream", {}), options.get("run"), services)  # type: ignore[arg-type]


def broken(key: str, made: Callable[[str], Any]) -> Any:
    if key == "broken":
        raise ArithmeticError("this branch")
    return made(key)


@pytest.mark.parametrize("where", ["_job", "_result"])
def test_of_trainings(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch_many(jobs: list[TrainJob], *_: object, **__: object) -> list[str]:
        launched.extend(jobs)
        return ["trained"] * len(jobs)

    def job(key: str) -> TrainJob:
        return TrainJob.model_construct(output=tmp_path / key)

    def result(trained: str, made: StageContext[Any]) -> StageResult:
        return (broken if where == "_result" else lambda key, make: make(key))(made.key, lambda _: StageResult({}, []))

    monkeypatch.setattr(train_stage, "launch_many", launch_many)
    monkeypatch.setattr(train_stage, "_job", lambda made: broken(made.key, job) if where == "_job" else job(made.key))
    monkeypatch.setattr(train_stage, "_result", result)
    outcomes = train_stage.run_training([context(key, tmp_path) for key in KEYS])
    assert [type(outcome) for outcome in outcomes] == [StageResult, ArithmeticError, StageResult]
    assert len(launched) == (2 if where == "_job" else 3)


@pytest.mark.parametrize("where", ["_judgement", "_result"])
def test_of_evaluations(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judgement(key: str) -> evaluate_stage.Judgement:
        return evaluate_stage.Judgement(
            model=tmp_path, reference=tmp_path, data=tmp_path, evaluation=EvaluationConfig(),
            output=tmp_path / key, seed=0, num_examples=1,
        )  # fmt: skip

    def run_tasks(function: object, works: list[Any], scaling: object, *, on_done: Any = None) -> list[None]:
        for number in range(len(works)):
            if on_done is not None:
                on_done(number)
        return [None] * len(works)

    parts = {"_judgement": judgement, "_result": lambda key: StageResult({}, [])}
    for name, part in parts.items():
        fails = name == where
        monkeypatch.setattr(evaluate_stage, name, lambda c, p=part, f=fails: broken(c.key, p) if f else p(c.key))
    monkeypatch.setattr(evaluate_stage, "run_tasks", run_tasks)
    monkeypatch.setattr(evaluate_stage, "num_task_slots", lambda scaling: 2)
    outcomes = evaluate_stage.run_evaluations([context(key, tmp_path) for key in KEYS])
    assert [type(outcome) for outcome in outcomes] == [StageResult, ArithmeticError, StageResult]
    judged = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert judged == (["a", "c"] if where == "_judgement" else list(KEYS))


def test_an_epoch_resumed_after_its_last_step_is_shown_without_a_speed() -> None:
    figures = {"epoch": 3.0, "train_loss": 0.5, "val_clean": 0.75, "val_robust": 0.5}
    line = train_stage.progress_line("pretrain:source", Entry(6, 0, figures), 8)
    assert line is not None
    assert line.endswith("epoch   3/8  loss 0.500  validation: clean 75.0 %, robust 50.0 %")
    line = train_stage.progress_line("pretrain:source", Entry(6, 0, {**figures, "images_per_second": 99.6}), 8)
    assert line is not None
    assert line.endswith("robust 50.0 %  100 img/s")


def test_an_activation_that_is_not_registered_yet_is_used_by_its_digest(tmp_path: Path) -> None:
    bank, told = write_bank(tmp_path / "freeze" / "bank"), SimpleNamespace(activations=[], tags={})
    payload = {"directory": "bank", "digest": "d" * 64, "reference": None, "alias": "candidate"}
    record = StageRecord.model_construct(payload=payload)
    run = SimpleNamespace(activation=told.activations.append, tag=told.tags.update)
    using = context("transfer:x", tmp_path / "x", upstream={"freeze:bank": Finished(bank.parent, record)}, run=run)
    directory, frozen = train_stage._bank(using, "freeze:bank")
    assert (directory, frozen.digest) == (bank, "d" * 64)
    assert told.activations == [f"sha256:{bank_digest(bank)}"]
    assert told.tags == {"activation_digest": "d" * 64}


@pytest.mark.parametrize("registered", ["another activation", "nothing"])
def test_a_version_of_another_registry_is_not_taken_for_the_pinned_one(registered: str, tmp_path: Path) -> None:
    own, other = write_bank(tmp_path / "freeze" / "bank"), write_bank(tmp_path / "other", value=2.0)
    registry = Registry(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    if registered == "another activation":
        registry.register(other)
    told: list[str] = []
    payload = {"directory": "bank", "digest": "d" * 64, "reference": "sparta-activation/1", "alias": None}
    record = StageRecord.model_construct(payload=payload)
    run = SimpleNamespace(activation=told.append, tag=lambda tags: None)
    using = context("transfer:x", tmp_path / "x", upstream={"freeze:bank": Finished(own.parent, record)}, run=run)
    using.services.registry = registry
    assert train_stage._bank(using, "freeze:bank")[0] == own
    assert told == [f"sha256:{bank_digest(own)}"]
    registry.register(own)  # version 2, or 1 where there was none
    payload["reference"] = "sparta-activation/2" if registered == "another activation" else "sparta-activation/1"
    directory, _ = train_stage._bank(using, "freeze:bank")
    assert directory == tmp_path / "x" / "bank"
    assert bank_digest(directory) == bank_digest(own)
    assert told[1:] == [payload["reference"]]
