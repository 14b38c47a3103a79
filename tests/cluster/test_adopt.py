"""Taking over another training's checkpoint: what population-based training stands on."""

import shutil
from pathlib import Path

import pytest

from pipeline.cluster.sweep.adopt import CHECKPOINTS, inherited, mend, take_over
from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config, overlay
from pipeline.data import prepare
from pipeline.training import Context, TrainedModel, TrainJob, train

SETTINGS = ["model.options.width=4", "data.limit.train=64", "training.selection.every=1", "training.epochs=3"]
CONFIG = load_config("demo", SETTINGS)


def job(config: ChainConfig, data: Path, output: Path) -> TrainJob:
    return TrainJob(model=config.model, data=data, training=config.training, augment=config.augment, output=output)


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> tuple[TrainJob, TrainedModel]:
    """A training of two epochs."""
    root = tmp_path_factory.mktemp("donor")
    prepare(CONFIG.data, root / "data", seed=0)
    short = job(overlay(CONFIG, {"training.epochs": 2}), root / "data", root / "out")
    return short, train(short, Context())


@pytest.fixture
def heir(donor, tmp_path: Path) -> TrainJob:
    """One of three epochs with another eps."""
    return job(overlay(CONFIG, {"training.threat.eps": 0.05}), donor[0].data, tmp_path / "heir")


def epochs_trained(training: TrainJob) -> tuple[list[float], TrainedModel]:
    epochs: list[float] = []
    return epochs, train(training, Context(report=lambda metrics, _: epochs.append(metrics["epoch"])))


def test_a_training_goes_on_from_anothers_checkpoint_with_its_own_settings(donor, heir):
    assert inherited(heir.output) == 0
    take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert inherited(heir.output) == 2
    epochs, taken = epochs_trained(heir)
    assert epochs == [3]
    assert taken.history[:2] == donor[1].history
    assert taken.fingerprint != donor[1].fingerprint


def test_checkpoints_of_its_own_give_way_once_for_every_source(donor, heir):
    own = heir.output / CHECKPOINTS
    (own / "a").mkdir(parents=True)  # from when it trained with these values before
    take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert (own / "a" / "state.json").is_file() or (own / "b" / "state.json").is_file()
    (own / "newer").touch()
    take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert (own / "newer").exists(), "started again after a crash, it keeps what it trained since"
    take_over(donor[0].output / CHECKPOINTS, "donor later", heir)
    assert not (own / "newer").exists()


def test_a_kill_while_copying_leaves_what_was_there(donor, heir, monkeypatch):
    own = heir.output / CHECKPOINTS
    (own / "old").mkdir(parents=True)

    def killed(source: Path, target: Path) -> None:
        Path(target).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert [path.name for path in own.iterdir()] == ["old"]
    take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert epochs_trained(heir)[0] == [3]


def test_a_kill_between_the_old_and_the_new_is_mended(donor, heir, monkeypatch):
    own = heir.output / CHECKPOINTS
    (own / "old").mkdir(parents=True)
    rename = Path.rename

    def killed(path: Path, target: Path) -> None:
        if target == own:
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            take_over(donor[0].output / CHECKPOINTS, "donor", heir)
    assert not own.exists()
    mend(heir.output)
    assert [path.name for path in own.iterdir()] == ["old"]


def test_a_source_without_a_whole_checkpoint_is_refused(heir, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a whole checkpoint"):
        take_over(tmp_path / "empty", "donor", heir)
    assert not (heir.output / CHECKPOINTS).exists()
