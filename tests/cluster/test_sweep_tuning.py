"""What the sweep asks of Tune and hears from it, without a running Ray."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_records import make_board

from pipeline.cluster import Capacity
from pipeline.cluster.sweep import load_trials
from pipeline.cluster.sweep.trainable import Sweep
from pipeline.cluster.sweep.tuning import _callback, _concurrent, _resources
from pipeline.config.load import load_config
from pipeline.config.scaling import ScalingConfig

NODES = Capacity(({"CPU": 4.0}, {"CPU": 3.0}))


def sweep(num_workers: int, *settings: str) -> Sweep:
    config = load_config("demo", ["search.enabled=true", *settings])
    return Sweep("run", config, Path("data"), Path("out"), ScalingConfig(num_workers=num_workers), train=print)


@pytest.mark.parametrize(
    ("num_workers", "settings", "expected"),
    [
        (1, (), 7),
        (2, (), 3),
        (7, (), 1),
        (2, ("search.max_concurrent=2",), 2),
        (2, ("search.max_concurrent=9",), 3),
    ],
)
def test_no_more_trials_run_at_a_time_than_their_workers_fit(num_workers, settings, expected):
    assert _concurrent(sweep(num_workers, *settings), NODES) == expected


def test_the_process_of_a_trial_of_several_workers_takes_no_cpu_from_them():
    assert _resources(sweep(1), NODES) == {"CPU": 1}
    nested = _resources(sweep(2), NODES)
    assert nested.pop("CPU") == 0
    assert nested, "Tune wants something reserved"
    assert not {"GPU"} & set(nested)


def test_a_trial_whose_process_dies_before_it_started_is_recorded_as_failed(tmp_path: Path):
    pytest.importorskip("ray")
    board = make_board(tmp_path)
    number = board.next().number
    dead = SimpleNamespace(trial_id="a1b2", config={"trial": {"number": number}}, get_error=lambda: None)
    _callback(board).on_trial_error(0, [], dead)
    (record,) = load_trials(tmp_path)
    assert (record.state, record.error, record.retry) == ("failed", "the trial's process died", True)
