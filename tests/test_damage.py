"""A file that is found damaged is made anew by its stage, whatever else of the stage's work is still there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import run
from pipeline.stages import evaluate as evaluate_stage
from pipeline.stages import train as train_stage
from pipeline.stages.services import Services
from pipeline.training import Context, TrainedModel, TrainJob, train

SMALL = (
    "demo",
    "tracking.enabled=false",
    "model.options.width=4",
    "data.limit.train=128",
    "training.epochs=1",
    "training.batch_size=64",
    "training.method.attack.steps=1",
    "training.selection.attack.steps=1",
    "training.selection.max_samples=32",
    "transfer=[]",
    "evaluation.num_examples=16",
    "evaluation.attacks=[{kind: fgsm}]",
    "evaluation.curve.steps=1",
    "evaluation.curve.num_examples=16",
    "evaluation.audit.budget=off",
    "evaluation.num_pictures=0",
    "report.num_pictures=0",
    "report.png_dpi=50",
)


@pytest.fixture
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch_many(jobs: Sequence[TrainJob], *_: Any, **__: Any) -> list[TrainedModel]:
        return [train(job, Context()) for job in jobs]

    def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
        return [function(task) for task in tasks]

    monkeypatch.setattr(train_stage, "launch_many", launch_many)
    monkeypatch.setattr(evaluate_stage, "run_tasks", run_tasks)
    monkeypatch.setattr(evaluate_stage, "num_task_slots", lambda scaling: 1)
    monkeypatch.setattr(Services, "ray", lambda self: None)


def damage(path: Path) -> bytes:
    """Change one byte, of JSON one digit, so that it still reads; returns what was there."""
    before = path.read_bytes()
    changed = bytearray(before)
    digits = [i for i, byte in enumerate(before) if chr(byte).isdigit()] if path.suffix == ".json" else []
    position = digits[len(digits) // 2] if digits else len(before) // 2
    changed[position] = ord("1") if before[position] != ord("1") else ord("2")
    path.write_bytes(changed)
    return before


@pytest.mark.slow
@pytest.mark.usefixtures("_without_ray")
def test_every_output_of_every_stage_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path))
    assert run.main(SMALL) == 0
    nodes = {
        path.parent: sorted(json.loads(path.read_text())["outputs"]) for path in tmp_path.glob("*/*/*/*/artifact.json")
    }
    stages = {directory.parent.parent.name for directory in nodes}
    assert stages == {"prepare", "pretrain", "freeze", "evaluate", "report"}
    for number in range(max(map(len, nodes.values()))):
        chosen = [directory / names[number] for directory, names in nodes.items() if number < len(names)]
        before = {path: damage(path) for path in chosen}
        assert run.main(SMALL) == 0
        assert [str(path) for path, content in before.items() if path.read_bytes() != content] == []
