"""Training and evaluation where workers share no folder: they are given the mirror, and need nothing but it."""

import shutil
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config
from pipeline.data import PreparedData
from pipeline.stages import train as train_stage
from pipeline.stages.evaluate import _judgement
from pipeline.stages.graph import head, tail
from pipeline.stages.node import Finished, Node, StageContext
from pipeline.training import Context, train

pytestmark = pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")
SMALL = [
    "training.epochs=1",
    "training.batch_size=32",
    "training.method.attack.steps=1",
    "model.options.width=4",
    "data.loader=memory",
    "model.activation={name: relu}",
]
LIMITS = ["data.limit.train=64", "data.limit.val=16", "data.limit.test=16", "training.selection.attack.steps=1"]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "ffcv", None)
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def nodes(config: ChainConfig) -> dict[str, Node[Any]]:
    return {node.key: node for node in [*head(config), *tail(config)]}


def context(node: Node[Any], config: ChainConfig, root: Path, upstream: dict[str, Finished]) -> StageContext[Any]:
    """Without MLflow and Ray."""
    directory = root / node.stage / node.branch
    directory.mkdir(parents=True, exist_ok=True)
    run = SimpleNamespace(dataset=lambda *_, **__: None, mirror=lambda *_: None)
    return StageContext(node.key, node.task, directory, upstream, run, SimpleNamespace(config=config))  # type: ignore[arg-type]


def finished(directory: Path) -> Finished:
    return Finished(directory, None)  # type: ignore[arg-type] - these stages read the files alone


def test_networks_are_trained_and_judged_from_the_mirror_alone(bucket, monkeypatch, tmp_path):
    """The mirror is set after the data were prepared; when the workers start, the folder is gone."""
    before = load_config("demo", [*SMALL, *LIMITS])
    preparing = context(nodes(before)["prepare:source"], before, tmp_path, {})
    (result,) = nodes(before)["prepare:source"].runner([preparing])
    assert not isinstance(result, Exception), result
    config = load_config("demo", [*SMALL, *LIMITS, f"data.mirror={bucket}"])
    assert nodes(config)["prepare:source"].sections == nodes(before)["prepare:source"].sections

    def launch_many(jobs: list[Any], *_: Any, **__: Any) -> list[Any]:
        hidden = preparing.directory.rename(tmp_path / "hidden")
        trained = [train(job, Context()) for job in jobs]
        hidden.rename(preparing.directory)
        return trained

    monkeypatch.setattr(train_stage, "launch_many", launch_many)
    node, data = nodes(config)["pretrain:source"], {"prepare:source": finished(preparing.directory)}
    (result,) = node.runner([context(node, config, tmp_path, data)])
    assert not isinstance(result, Exception), result
    assert (tmp_path / "pretrain" / "source" / "model" / "model.safetensors").exists()

    judging = nodes(config)["evaluate:source"]
    done = {key: finished(tmp_path / "pretrain" / "source") for key in judging.needs} | data
    work = _judgement(context(judging, config, tmp_path, done))
    shutil.rmtree(preparing.directory)
    assert work.num_examples == 16
    assert PreparedData.load(work.data).splits["test"].count == 16


def test_without_a_mirror_workers_are_given_the_folder(bucket, tmp_path):
    fsspec.filesystem("memory").mkdir(bucket)
    config = load_config("demo", [*SMALL, *LIMITS])
    node = nodes(config)["prepare:source"]
    preparing = context(node, config, tmp_path, {})
    node.runner([preparing])
    training = nodes(config)["pretrain:source"]
    job = train_stage._job(context(training, config, tmp_path, {"prepare:source": finished(preparing.directory)}))
    assert job.data == preparing.directory
