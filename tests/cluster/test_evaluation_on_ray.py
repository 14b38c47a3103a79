"""An evaluation in Ray tasks whose worker is killed in the middle of a shard."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline.config.base import ThreatModel
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import AuditConfig, CurveConfig, EvaluationConfig, PGDAttack, TransferAttack
from pipeline.config.load import load_config
from pipeline.config.scaling import ScalingConfig
from pipeline.data import PreparedData, prepare
from pipeline.evaluation import Evaluation, evaluate
from pipeline.stages.evaluate import EvaluateTask, run_evaluations
from pipeline.stages.node import Finished, StageContext
from pipeline.training import load_model, save_model
from pipeline.training.model_io import ModelMeta

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCALING = ScalingConfig(num_workers=2, num_cpus=2, health_check_interval=0.2)
CONFIG = EvaluationConfig(
    threat=ThreatModel(eps=0.05),
    attacks=(PGDAttack(steps=50, restarts=5), TransferAttack(steps=5)),
    curve=CurveConfig(multiples=(1.0,), steps=5),
    num_examples=96,
    block_size=8,
    audit=AuditConfig(budget="off"),
)
NUM_BLOCKS = 12


@pytest.fixture
def context(tmp_path: Path) -> StageContext[EvaluateTask]:
    """One evaluation, without MLflow."""
    prepare(DataConfig(dataset="digits", loader="memory"), tmp_path / "data", seed=0)
    for seed, activation in enumerate(("sparta", "relu")):
        torch.manual_seed(seed)
        meta = ModelMeta(
            name="resnet8", options={"width": 8}, activation={"name": activation}, num_classes=10, in_channels=1,
            mean=(0.3,), std=(0.4,), image_size=8, dataset="digits",
        )  # fmt: skip
        save_model(tmp_path / activation / "model", meta.build(), meta)
    names = {"pretrain:sparta": "sparta", "pretrain:relu": "relu", "prepare:source": "data"}
    nothing = SimpleNamespace(dataset=lambda *_, **__: None, metrics=lambda *_: None, artifact=lambda *_: None)
    return StageContext(
        key="evaluate:sparta",
        task=EvaluateTask("pretrain:sparta", "pretrain:relu", "prepare:source", CONFIG, seed=0),
        directory=tmp_path / "evaluation",
        upstream={key: Finished(tmp_path / name, None) for key, name in names.items()},  # type: ignore[arg-type]
        run=nothing,  # type: ignore[arg-type]
        services=SimpleNamespace(  # type: ignore[arg-type]
            ray=lambda: None, config=load_config("demo").model_copy(update={"scaling": SCALING})
        ),
    )


def kill_a_worker_once_it_has_begun(directory: Path, done_before: list[int]) -> None:
    """Kill a process of our own Ray that judges a shard, and note how many blocks were done then."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = len(list(directory.rglob("block-*.npz")))
        for process in psutil.Process().children(recursive=True) if done else ():
            with suppress(psutil.Error):  # it ended by itself
                if "".join(process.cmdline()).startswith("ray::judge_shard"):
                    process.kill()
                    done_before.append(done)
                    return
        time.sleep(0.01)


def test_a_worker_killed_in_the_middle_of_a_shard_changes_nothing(context, tmp_path: Path):
    done_before: list[int] = []
    killer = threading.Thread(target=kill_a_worker_once_it_has_begun, args=(context.directory, done_before))
    killer.start()
    (outcome,) = run_evaluations([context])
    killer.join()
    assert 1 <= done_before[0] < NUM_BLOCKS
    assert outcome.outputs == ["evaluation.json", "evaluation.npz"]
    sparta, relu = (load_model(tmp_path / name / "model") for name in ("sparta", "relu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker that reserves one CPU: sums have the same order
    try:
        here = evaluate(sparta, PreparedData.load(tmp_path / "data"), CONFIG, tmp_path / "here", seed=0, reference=relu)
    finally:
        torch.set_num_threads(threads)
    assert here.attacks[0].attacked > 0
    assert Evaluation.load(context.directory) == here
