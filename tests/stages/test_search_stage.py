"""What identifies a search, and how a longer one takes over the trials of a shorter one."""

import json
from pathlib import Path

import pytest

from pipeline.artifacts import STARTED
from pipeline.cluster import ClusterTooSmall
from pipeline.cluster.sweep import SearchResult
from pipeline.cluster.sweep.trials import Leg, Point, Trial
from pipeline.config.load import load_config
from pipeline.stages.search import TRIALS, SearchTask, _take_over, _trials, search_node
from pipeline.stages.services import Services


def sections(space: Path, *settings: str) -> dict:
    config = load_config("demo", ["search.enabled=true", f"search.space={space}", *settings])
    return dict(search_node(SearchTask(config, "prepare:source")).sections)


def test_a_space_is_known_by_what_it_holds(tmp_path: Path):
    here, there = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for path in (here, there):
        path.write_text("training.optimizer.lr: {uniform: [0.1, 0.2]}")
    before = sections(here)
    assert sections(there) == before
    assert sections(here, "search.max_concurrent=1") == before
    assert sections(here, "training.checkpoint.every_steps=7") == before
    here.write_text("training.optimizer.lr: {uniform: [0.1, 0.3]}")
    assert sections(here) != before


def test_only_the_threat_that_trials_are_judged_by_identifies_a_search(tmp_path: Path):
    space, other = tmp_path / "space.yaml", "evaluation.threat.eps=0.05"
    space.write_text("training.optimizer.lr: {uniform: [0.1, 0.2]}")
    assert sections(space, other) != sections(space)
    fixed = "search.threat={eps: 0.05}"
    assert sections(space, fixed, "evaluation.threat.eps=0.07") == sections(space, fixed) == sections(space, other)
    assert sections(space, "search.threat={eps: 0.06}") != sections(space, fixed)


def started(directory: Path, num_trials: int, lr: float, trials: int = 0) -> Path:
    directory.mkdir()
    inputs = {"sections": {"search": {"num_trials": num_trials}, "training": {"lr": lr}}}
    (directory / STARTED).write_text(json.dumps(inputs))
    for number in range(trials):
        (directory / TRIALS / str(number)).mkdir(parents=True)
        (directory / TRIALS / str(number) / "trial.json").write_text(str(number))
    return directory


def test_a_longer_search_begins_with_the_trials_of_the_longest_equal_one(tmp_path: Path):
    started(tmp_path / "short", 2, 0.1, trials=2)
    started(tmp_path / "middle", 3, 0.1, trials=3)
    started(tmp_path / "other", 9, 0.2, trials=9)
    longer = started(tmp_path / "long", 4, 0.1)
    _take_over(longer)
    assert sorted(path.name for path in (longer / TRIALS).iterdir()) == ["0", "1", "2"]
    assert len(list((tmp_path / "middle" / TRIALS).iterdir())) == 3


def test_a_forced_search_takes_nothing_over(tmp_path: Path):
    started(tmp_path / "short", 2, 0.1, trials=2)
    forced = started(tmp_path / "long", 4, 0.1)
    started(tmp_path / "long.superseded-1", 4, 0.1, trials=4)
    _take_over(forced)
    assert not (forced / TRIALS).exists()


def test_the_report_is_given_the_ranked_trials_by_the_names_that_all_else_calls_them():
    point, legs = Point(epoch=1, robust=0.3, clean=0.6), (Leg(epoch=0, values={"training.optimizer.clip_norm": None}),)
    well = Trial(number=1, identity="1" * 64, legs=legs, state="done", history=(point,))
    ill = Trial(number=2, identity="2" * 64, legs=legs, state="failed", history=(point,))
    (shown,) = _trials(SearchResult(overrides={}, best=well, trials=[well, ill], front=[well], files=[]))
    assert (shown.name, shown.best, shown.settings) == ("trial 2", True, {"training.optimizer.clip_norm": "null"})


def test_a_trial_that_does_not_fit_is_no_matter_when_the_search_is_done(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config("demo", ["search.enabled=true", "search.num_workers=4096", "training.batch_size=8192"])
    services = Services(config, tmp_path)
    services.check_cluster(searching=False)
    with pytest.raises(ClusterTooSmall, match=r"search\.num_workers"):
        services.check_cluster(searching=True)
