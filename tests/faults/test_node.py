"""A node of a cluster of three is lost in the middle of a training and another one joins."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import ensure_ray, launch
from pipeline.config.scaling import ScalingConfig
from pipeline.training import TrainJob
from pipeline.training.files import read_directory
from tests.faults.toys import figures, newest, steps_done

pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # of which 120 s until it is disturbed, and 240 s after that
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCALING = ScalingConfig(num_workers=3, max_failures=5, health_check_interval=0.2)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def weights(job: TrainJob) -> str:
    return str(json.loads((job.output / "trained.json").read_text())["weights_sha256"])


def test_a_lost_node_is_replaced_and_the_result_is_the_same(
    cluster: Any, make_job: Callable[[Path], TrainJob], tmp_path: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]

    def job(name: str) -> TrainJob:
        base = make_job(tmp_path / name)
        training = base.training.model_copy(update={"epochs": 30, "batch_size": 48})
        return base.model_copy(update={"training": training})

    whole, disturbed = job("whole"), job("disturbed")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            launch(disturbed, SCALING)
        except BaseException as error:
            errors.append(error)

    with ensure_ray(SCALING.model_copy(update={"address": cluster.address})):
        launch(whole, SCALING)
        thread = threading.Thread(target=run)
        thread.start()
        deadline = time.monotonic() + 120
        while steps_done(disturbed) < 6:
            assert thread.is_alive(), errors
            assert time.monotonic() < deadline, "no step was checkpointed"
            time.sleep(0.02)
        cluster.remove_node(nodes[1], allow_graceful=False)
        caught = steps_done(disturbed)
        assert caught < 60, "the training was over before its node was lost"
        cluster.add_node(num_cpus=1)
        thread.join(240)
        assert not thread.is_alive()
    assert not errors
    assert weights(disturbed) == weights(whole)
    assert figures(disturbed.output) == figures(whole.output)
    states = [read_directory(newest(one), record="state.json")[0] for one in (whole, disturbed)]
    assert all(
        (states[0][group][name] == states[1][group][name]).all() for group in states[0] for name in states[0][group]
    )
    assert json.loads((disturbed.output / "trained.json").read_text())["bit_exact"]
