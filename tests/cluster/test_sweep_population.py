"""Population-based training without Ray: what it may change, when, by which draws, and what a kill leaves of it."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_records import KIND, LR

from pipeline.cluster.sweep import Trial, load_trials
from pipeline.cluster.sweep.adopt import CHECKPOINTS
from pipeline.cluster.sweep.pbt import _clipped, mutable_keys, pbt
from pipeline.cluster.sweep.search import _identify, _known_trials
from pipeline.cluster.sweep.trials import Leg, save_trial
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError
from pipeline.config.search import SearchConfig
from tune_spaces import Choice, Uniform

SPACE = {LR: Uniform(0.01, 1.0, log=True), "training.eps_warmup_epochs": Choice(0.0, 1.0)}
BASE = ChainConfig()


def test_population_based_training_changes_settings_of_the_training_only_and_stays_in_range():
    space = {"model.activation.name": Choice("relu", "silu"), KIND: Choice("pgd_at", "mart"), **SPACE}
    mutable = mutable_keys(space)
    assert set(mutable) == set(SPACE)
    assert _clipped({LR: 7.0, "model.activation.name": "relu"}, mutable) == {LR: 1.0, "model.activation.name": "relu"}
    with pytest.raises(ConfigError, match="pbt needs an unconditional training"):
        mutable_keys({KIND: Choice("pgd_at", "mart")})


class Member:
    """As much of a Tune trial as the scheduler looks at."""

    status, experiment_tag, last_result = "RUNNING", "", {}

    def __init__(self, number: int, lr: float) -> None:
        self.trial_id = str(number)
        self.config = {"trial": {"number": number}, "values": {LR: lr, "training.eps_warmup_epochs": 0.0}}
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=4))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return False

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict) -> None:
        self.config = config


def exploited(seed: int, epoch: int) -> list[dict]:
    """The values of four trials after each has reported `epoch` of nine; the last one is the weakest."""
    scheduler = pbt(SearchConfig(), SPACE, epochs=9, seed=seed)
    assert scheduler.set_search_properties("robust", "max")
    members = [Member(number, lr) for number, lr in enumerate((0.3, 0.2, 0.1, 0.9))]
    controller = SimpleNamespace(
        search_alg=None,
        get_trials=lambda: members,
        pause_trial=lambda trial, should_checkpoint: None,
        _schedule_trial_save=lambda trial, result: SimpleNamespace(),
    )
    for member in members:
        scheduler.on_trial_add(controller, member)
    for member in members:
        result = {"epoch": epoch, "robust": 1 - member.config["values"][LR]}
        assert scheduler.on_trial_result(controller, member, result) == "CONTINUE"
    return [member.config["values"] for member in members]


def test_the_weakest_trial_goes_on_with_changed_values_drawn_by_the_seed_of_the_sweep():
    pytest.importorskip("ray")
    outside = random.getstate()
    *others, weakest = exploited(seed=1, epoch=1)
    assert [values[LR] for values in others] == [0.3, 0.2, 0.1]
    assert weakest[LR] != 0.9
    assert exploited(seed=1, epoch=1)[-1] == weakest
    assert len({exploited(seed, epoch=1)[-1][LR] for seed in range(9)}) > 2
    assert random.getstate() == outside


def test_nothing_is_changed_at_the_last_epoch():
    pytest.importorskip("ray")
    assert exploited(seed=1, epoch=9)[-1][LR] == 0.9


def interrupted(root: Path, *lrs: float, trained: int, state: str = "running") -> Trial:
    """A trial that went on with each of `lrs`, of which the first `trained` left checkpoints."""
    legs = tuple(Leg(epoch=2 * n, values={LR: lr}) for n, lr in enumerate(lrs))
    trial = Trial(number=0, identity=_identify(BASE)(legs[0].values), legs=legs, state=state)
    save_trial(root, trial)
    for count in range(1, trained + 1):
        leg = trial.model_copy(update={"legs": legs[:count]})
        (root / leg.job_directory / CHECKPOINTS).mkdir(parents=True)
    return trial


@pytest.mark.parametrize(
    ("lrs", "trained", "state", "kept"),
    [
        ((0.1, 0.2), 1, "running", 1),  # killed after the new values were noted, before their weights were there
        ((0.1, 0.2), 2, "running", 2),
        ((0.1, 0.2, 0.3), 2, "running", 2),
        ((0.1, 0.2), 0, "running", 2),  # nothing to go back to
        ((0.1, 0.2), 1, "done", 2),  # somebody tidied up
    ],
)
def test_an_interrupted_trial_goes_on_with_the_last_values_that_it_has_weights_for(
    lrs, trained, state, kept, tmp_path: Path
):
    trial = interrupted(tmp_path, *lrs, trained=trained, state=state)
    (known,) = _known_trials(tmp_path, BASE)
    assert known.legs == trial.legs[:kept]
    assert load_trials(tmp_path) == [trial]  # the record is changed when it is started
