"""Elastic training on a cluster of three nodes: it shrinks when a node is lost and grows when one joins."""

import threading
import time
from pathlib import Path

import pytest
from cluster_toys import ToyJob, ToyResult, elastic_train

from pipeline.cluster import ensure_ray
from pipeline.cluster.launch import run_jobs
from pipeline.config.scaling import ScalingConfig

pytestmark = [
    pytest.mark.extended,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCALING = ScalingConfig(num_workers=(1, 2), max_failures=5, resize_interval=1.0, health_check_interval=0.2)


@pytest.fixture
def cluster(_workers_find_the_toys):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def world_sizes(output: Path) -> list[int]:
    log = output / "epochs.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def wait_until(condition, what: str, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_lost_node_shrinks_the_training_and_a_new_one_lets_it_grow(cluster, tmp_path: Path):
    cluster.add_node(num_cpus=1)
    lost = cluster.add_node(num_cpus=1)
    job, results = ToyJob(output=tmp_path / "job", epochs=10_000), []
    with ensure_ray(SCALING.model_copy(update={"address": cluster.address})):
        thread = threading.Thread(
            target=lambda: results.extend(run_jobs([job], SCALING, train=elastic_train, result_type=ToyResult))
        )
        thread.start()
        wait_until(lambda: 2 in world_sizes(job.output), "training never ran on both nodes")
        cluster.remove_node(lost, allow_graceful=False)
        seen = len(world_sizes(job.output))
        wait_until(lambda: 1 in world_sizes(job.output)[seen:], "training did not go on with one node")
        cluster.add_node(num_cpus=1)
        seen = len(world_sizes(job.output))
        wait_until(lambda: 2 in world_sizes(job.output)[seen:], "training did not grow onto the new node")
        (job.output / "enough").touch()
        thread.join(60)
    assert isinstance(results[0], ToyResult)
    assert results[0].total == len(world_sizes(job.output)), "no epoch was lost or run twice"
