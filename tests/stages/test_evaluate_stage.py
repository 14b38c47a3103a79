"""The evaluate stage without Ray: what its tasks report is passed on."""

import logging
from pathlib import Path
from types import SimpleNamespace

from pipeline.config.evaluation import EvaluationConfig
from pipeline.stages import evaluate as stage


def test_why_a_shard_failed_is_logged_and_the_rest_is_judged_all_the_same(tmp_path: Path, monkeypatch, caplog):
    work = stage.Judgement(
        model=tmp_path, reference=tmp_path, data=tmp_path, evaluation=EvaluationConfig(block_size=10),
        output=tmp_path / "out", seed=0, num_examples=20,
    )  # fmt: skip
    judged = []

    def run_tasks(function, works, scaling, *, on_done=None):
        judged.append(function)
        return [None, OSError("no space\nleft")] if function is stage.judge_shard else [RuntimeError("nor here")]

    monkeypatch.setattr(stage, "run_tasks", run_tasks)
    monkeypatch.setattr(stage, "num_task_slots", lambda scaling: 2)
    monkeypatch.setattr(stage, "_judgement", lambda context: work)
    services = SimpleNamespace(ray=lambda: None, config=SimpleNamespace(scaling=None))
    with caplog.at_level(logging.WARNING):
        (outcome,) = stage.run_evaluations([SimpleNamespace(services=services, key="evaluate:a")])  # type: ignore[list-item]
    assert isinstance(outcome, RuntimeError)
    assert judged == [stage.judge_shard, stage.judge_rest]
    assert f"a shard of {tmp_path / 'out'} failed, it is tried again: no space left" in caplog.text
