"""Launching and searching on a real Ray, one for all tests of this file; trainings are toys unless said otherwise."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import torch
from cluster_toys import ToyJob, ToyResult, slow_trial, toy_train, toy_trial
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pipeline.cluster import ClusterTooSmall, TrainingFailed, launch, preflight
from pipeline.cluster.launch import run_jobs
from pipeline.cluster.orphans import free_orphans, freeing_orphans
from pipeline.cluster.sweep import SearchFailed, load_trials, search
from pipeline.cluster.tasks import run_tasks
from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config, overlay
from pipeline.config.scaling import ScalingConfig
from pipeline.data import PreparedData, prepare
from pipeline.tracking.journal import read_history
from pipeline.training import Context, TrainedModel, TrainingStopped, TrainJob, train

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(600),  # three starts of a worker group, for all launched jobs together, on a busy machine
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCALING = ScalingConfig(num_workers=2, num_cpus=2, max_failures=2, health_check_interval=0.2)
ONE = SCALING.model_copy(update={"num_workers": 1})
LR_SPACE = """
training.optimizer.lr: {choice: [0.001, 0.01, 0.1, 1.0]}
training.eps_warmup_epochs: {choice: [0.0, 1.0]}
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory, ray_session):
    """Launched together on two workers: two are well, one raises, one has a worker killed once, one is to stop."""
    root = tmp_path_factory.mktemp("launched")
    faults = ("", "value", "kill once", "", "stop")
    jobs = [ToyJob(output=root / str(n), seed=n, fault=fault) for n, fault in enumerate(faults)]
    heard: list[tuple[int, int]] = []
    results = run_jobs(
        jobs,
        SCALING,
        train=toy_train,
        result_type=ToyResult,
        on_progress=lambda job, e: heard.append((job.seed, e.step)),
    )
    return jobs, results, heard


def test_what_a_signals_handler_raises_while_tasks_run_comes_out_at_once_and_as_it_is():
    class Told(BaseException):
        pass

    def tell(*_):
        raise Told

    def sleep(seconds):
        time.sleep(seconds)

    before = signal.signal(signal.SIGTERM, tell)
    timer = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    begun = time.monotonic()
    try:
        with pytest.raises(Told):
            run_tasks(sleep, [60.0], ONE)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - begun < 30


def test_only_calls_that_returned_are_done():
    def inverse(number):
        return 1 / number

    done = []
    one, error = run_tasks(inverse, [1, 0], ONE, on_done=done.append)
    assert (one, type(error), done) == (1.0, ZeroDivisionError, [0])


def test_results_come_in_the_order_of_the_jobs_from_workers_that_share_a_process_group(launched):
    _, results, _ = launched
    assert results[0] == ToyResult(seed=0, world_size=2, total=6.0, backend="gloo")
    assert results[3] == ToyResult(seed=3, world_size=2, total=6.0, backend="gloo")


def test_a_job_that_raises_is_not_tried_again_and_does_not_take_the_others_along(launched):
    jobs, results, _ = launched
    assert isinstance(results[1], TrainingFailed)
    assert str(results[1]) == "ValueError: expected something else"
    assert "_go_wrong" in results[1].details
    assert (jobs[1].output / "attempts").read_text() == "x"


def test_a_worker_that_is_killed_is_replaced_and_its_job_comes_to_its_result(launched):
    jobs, results, _ = launched
    assert results[2].total == 6.0
    assert (jobs[2].output / "attempts").read_text() == "xx"


def test_a_job_that_is_asked_to_stop_is_told_apart_from_one_that_failed(launched):
    jobs, results, _ = launched
    assert isinstance(results[4], TrainingStopped)
    assert str(results[4]) == "stopped on request after step 2"
    assert json.loads((jobs[4].output / "outcome.json").read_text())["state"] == "stopped"


def test_the_driver_hears_of_every_epoch_once(launched):
    _, _, heard = launched
    assert [step for seed, step in heard if seed == 0] == [1, 2, 3]
    assert [step for seed, step in heard if seed == 2] == [1, 2, 3]


def test_ray_leaves_nothing_in_the_output(launched):
    jobs, _, _ = launched
    assert not any((job.output / "ray").exists() for job in jobs)


def test_a_job_whose_worker_dies_more_often_than_is_allowed_fails_and_the_next_one_runs(tmp_path: Path):
    jobs = [ToyJob(output=tmp_path / "0", fault="kill always"), ToyJob(output=tmp_path / "1", seed=1)]
    scaling = ONE.model_copy(update={"max_failures": 0, "cpus_per_worker": 2})  # one group for both
    results = run_jobs(jobs, scaling, train=toy_train, result_type=ToyResult)
    assert isinstance(results[0], TrainingFailed)
    assert (jobs[0].output / "attempts").read_text() == "x"
    assert results[1].seed == 1


def test_more_workers_than_the_running_cluster_has_are_refused_at_once():
    with pytest.raises(ClusterTooSmall, match=r"need 3 workers x CPU=1 .* room for 2"):
        preflight(ScalingConfig(num_workers=3))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[ChainConfig, Path]:
    config = load_config("demo", ["training.epochs=2", "model.options.width=4", "data.limit.train=128"])
    data = tmp_path_factory.mktemp("data")
    prepare(config.data, data, seed=0)
    return config, data


def test_a_real_training_has_the_same_weights_in_a_worker_as_in_this_process(demo, tmp_path: Path):
    config, data = demo

    def job(name: str) -> TrainJob:
        options = {"model": config.model, "training": config.training, "augment": config.augment}
        return TrainJob(**options, data=data, output=tmp_path / name)

    launched = launch(job("worker"), ONE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker that reserves one CPU: sums have the same order
    try:
        here = train(job("here"), Context())
    finally:
        torch.set_num_threads(threads)
    assert launched.weights_sha256 == here.weights_sha256
    assert launched.history == here.history


def sweep_config(tmp_path: Path, *settings: str, space: str = LR_SPACE) -> ChainConfig:
    (tmp_path / "space.yaml").write_text(space)
    fixed = [
        "search.enabled=true",
        f"search.space={tmp_path / 'space.yaml'}",
        "search.num_trials=8",
        "search.epochs=3",
        "search.scheduler=none",
        "search.algorithm=random",
        "scaling.health_check_interval=0.2",
        "scaling.max_failures=1",
    ]
    return load_config("demo", [*fixed, *settings])


@pytest.mark.parametrize(
    ("algorithm", "scheduler"),
    [
        ("random", "none"),
        ("grid", "asha"),
        ("optuna", "none"),
        ("optuna", "asha"),
        ("random", "asha"),
        ("grid", "none"),
    ],
)
def test_every_algorithm_and_scheduler_finds_the_known_optimum_of_a_small_space(algorithm, scheduler, tmp_path: Path):
    config = sweep_config(tmp_path, f"search.algorithm={algorithm}", f"search.scheduler={scheduler}")
    found = search(config, data=tmp_path, output=tmp_path / "out", train=toy_trial)
    assert found.best.values == {"training.optimizer.lr": 0.1, "training.eps_warmup_epochs": 0.0}
    assert len(found.trials) == 8
    states = {trial.state for trial in found.trials}
    assert states <= ({"done", "stopped"} if scheduler == "asha" else {"done"})
    assert found.best.best.robust == pytest.approx(1.0)


def test_a_trial_that_diverges_and_one_whose_process_is_killed_do_not_end_the_sweep(tmp_path: Path):
    space = "training.optimizer.momentum: {choice: [0.4, 0.5, 0.6]}"
    config = sweep_config(tmp_path, "search.num_trials=3", space=space)
    found = search(config, data=tmp_path, output=tmp_path / "out", train=toy_trial)
    by_momentum = {trial.values["training.optimizer.momentum"]: trial for trial in found.trials}
    assert (by_momentum[0.5].state, by_momentum[0.5].error) == ("failed", "ArithmeticError: diverged")
    killed = by_momentum[0.6]
    assert killed.state == "done"
    assert [point.epoch for point in killed.history] == [1, 2, 3]  # killed between the end of 2 and its report
    assert found.best.number in {killed.number, by_momentum[0.4].number}


def test_a_sweep_in_which_every_trial_fails_says_why(tmp_path: Path):
    space = "training.optimizer.lr: {choice: [0.1, 0.2]}"
    config = sweep_config(tmp_path, "training.optimizer.momentum=0.5", "search.num_trials=2", space=space)
    config = overlay(config, {"training.optimizer.nesterov": False})
    with pytest.raises(SearchFailed, match="none of 2 trials came to a result: ArithmeticError: diverged"):
        search(config, data=tmp_path, output=tmp_path / "out", train=toy_trial)


def test_a_finished_sweep_runs_nothing_again_and_a_longer_one_only_what_is_new(tmp_path: Path):
    config = sweep_config(tmp_path, "search.num_trials=2")
    first = search(config, data=tmp_path, output=tmp_path / "out", train=toy_trial)
    again = search(config, data=tmp_path, output=tmp_path / "out", train=None)
    assert again.trials == first.trials
    heard: list[int] = []
    longer = overlay(config, {"search.num_trials": 3})
    more = search(
        longer, data=tmp_path, output=tmp_path / "out", train=toy_trial, on_trial=lambda t: heard.append(t.number)
    )
    assert more.trials[:2] == first.trials
    assert set(heard) == {2}


def test_trials_of_two_workers_nest_a_training_and_do_not_block_each_other_though_one_is_stopped(tmp_path: Path):
    space = "training.optimizer.lr: {choice: [0.1, 0.001, 0.11]}"
    settings = ("search.num_workers=2", "search.num_trials=3", "search.algorithm=grid", "search.scheduler=asha")
    config = sweep_config(tmp_path, *settings, space=space)
    found = search(config, data=tmp_path, output=tmp_path / "out", train=slow_trial)
    first, weak, last = found.trials
    assert (first.state, weak.state, weak.history[-1].epoch) == ("done", "stopped", 1)
    assert last.history, "the workers of the stopped trial are free again"
    outcome = (tmp_path / "out" / found.best.job_directory / "outcome.json").read_text()
    assert '"world_size": 2' in outcome


def test_what_a_dead_actor_had_reserved_is_freed_and_nothing_else():
    class Controller:
        def reserve(self) -> bool:
            return placement_group([{"CPU": 1}]).wait(60)

        def die(self) -> None:
            os._exit(1)

        def lives(self) -> bool:
            return True

    driver = placement_group([{"CPU": 1}])
    assert driver.wait(60)
    controller = ray.remote(num_cpus=0, max_restarts=1)(Controller).remote()
    assert ray.get(controller.reserve.remote())
    assert free_orphans() == 0, "its owner lives"
    controller.die.remote()
    while True:
        with suppress(ray.exceptions.ActorUnavailableError, ray.exceptions.ActorDiedError):
            assert ray.get(controller.lives.remote())
            break
    assert free_orphans() == 0, "its owner lives again"
    ray.kill(controller)
    with freeing_orphans():
        waiting = placement_group([{"CPU": 1}])
        assert waiting.wait(60), "both CPUs are still reserved"
    assert free_orphans() == 0
    for group in (waiting, driver):
        assert placement_group_table(group)["state"] == "CREATED"
        remove_placement_group(group)


def test_trials_that_are_too_big_for_the_cluster_are_refused(tmp_path: Path):
    config = sweep_config(tmp_path, "search.num_workers=9")
    with pytest.raises(ClusterTooSmall, match="need 9 workers"):
        search(config, data=tmp_path, output=tmp_path / "out", train=toy_trial)
    assert load_trials(tmp_path / "out") == []


@pytest.mark.parametrize("space", ["attack", "activation"])
def test_a_space_of_the_project_is_searched_end_to_end_on_the_demo_data(space, demo, tmp_path: Path):
    config, prepared = demo
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    PreparedData.load(data).path("test").unlink()  # nothing of a sweep may look at it
    settings = {"search.enabled": True, "search.space": space, "search.num_trials": 2, "search.epochs": 1}
    found = search(overlay(config, settings), data=data, output=tmp_path)
    assert [trial.state for trial in found.trials] == ["done", "done"]
    outcome = TrainedModel.model_validate_json((tmp_path / found.best.job_directory / "trained.json").read_text())
    assert outcome.val_robust == found.best.best.robust


def test_population_based_training_goes_on_from_copied_weights_with_changed_settings(demo, tmp_path: Path):
    config, data = demo
    (tmp_path / "space.yaml").write_text("training.threat.eps: {log_uniform: [0.01, 0.3]}")
    settings = {
        "search.enabled": True,
        "search.space": str(tmp_path / "space.yaml"),
        "search.num_trials": 4,
        "search.epochs": 6,
        "search.scheduler": "pbt",
        "search.algorithm": "random",
    }
    found = search(overlay(config, settings), data=data, output=tmp_path)
    changed = [trial for trial in found.trials if len(trial.legs) > 1]
    assert changed, "with four trials and six epochs the worst one is replaced at least once"
    for trial in changed:
        epochs = [value for _, value in read_history(tmp_path / trial.job_directory / "metrics.jsonl")["epoch"]]
        assert 1 < epochs[0] <= epochs[-1] == 6, "with the weights of the other one it went on where that one was"
    for trial in found.trials:
        assert trial.history[-1].epoch == 6
        assert [point.epoch for point in trial.history] == sorted({point.epoch for point in trial.history})
