"""Taking over another training's checkpoint: what population-based training stands on."""

import shutil
from pathlib import Path

from pipeline.cluster.sweep.adopt import adopt
from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config, overlay
from pipeline.data import prepare
from pipeline.training import Context, TrainJob, train


def job(config: ChainConfig, data: Path, output: Path) -> TrainJob:
    return TrainJob(model=config.model, data=data, training=config.training, augment=config.augment, output=output)


def test_a_training_goes_on_from_anothers_checkpoint_with_its_own_settings(tmp_path: Path):
    settings = ["model.options.width=4", "data.limit.train=64", "training.selection.every=1", "training.epochs=3"]
    config = load_config("demo", settings)
    data = tmp_path / "data"
    prepare(config.data, data, seed=0)
    donor = job(overlay(config, {"training.epochs": 2}), data, tmp_path / "donor")
    given = train(donor, Context())

    heir = job(overlay(config, {"training.threat.eps": 0.05}), data, tmp_path / "heir")
    shutil.copytree(donor.output / "checkpoints", heir.output / "checkpoints")
    adopt(heir.output / "checkpoints", heir)
    epochs: list[float] = []
    taken = train(heir, Context(report=lambda metrics, _: epochs.append(metrics["epoch"])))
    assert epochs == [3]
    assert taken.history[:2] == given.history
    assert taken.fingerprint != given.fingerprint
