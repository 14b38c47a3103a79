"""What fits into a cluster is known before anything is started."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cluster import Capacity, ClusterTooSmall, preflight
from pipeline.cluster.capacity import uses_gpu, worker_bundle
from pipeline.config.scaling import ScalingConfig

CPU_NODE = {"CPU": 4.0}
GPU_NODE = {"CPU": 8.0, "GPU": 2.0}


@settings(max_examples=50)
@given(nodes=st.lists(st.integers(0, 9), max_size=5), cpus=st.integers(1, 4))
def test_slots_are_counted_per_node_because_a_worker_cannot_be_divided(nodes, cpus):
    capacity = Capacity(tuple({"CPU": float(n)} for n in nodes))
    assert capacity.slots({"CPU": cpus}) == sum(n // cpus for n in nodes)
    assert capacity.slots({"CPU": cpus}, placement="STRICT_PACK") == max((n // cpus for n in nodes), default=0)
    assert capacity.slots({"CPU": cpus}, placement="STRICT_SPREAD") == sum(n >= cpus for n in nodes)


@pytest.mark.parametrize(
    ("placement", "cpus", "workers", "groups"),
    [
        ("PACK", (8, 8, 8, 8), 8, 4),
        ("STRICT_PACK", (8, 8, 8, 8), 8, 4),
        ("STRICT_PACK", (12, 7, 4), 4, 5),
        ("STRICT_SPREAD", (8, 8, 8, 8), 4, 8),
        ("STRICT_SPREAD", (8, 2, 1), 2, 3),  # two with the second node, one with the third
        ("STRICT_SPREAD", (8, 2, 1), 3, 1),
        ("SPREAD", (3, 3), 4, 1),
        ("PACK", (1,), 4, 1),  # later, when nodes come
        ("STRICT_SPREAD", (1,), 4, 1),
    ],
)
def test_groups_fill_the_cluster_side_by_side(placement, cpus, workers, groups):
    scaling = ScalingConfig(num_workers=workers, placement=placement)
    assert Capacity(tuple({"CPU": float(n)} for n in cpus)).groups(scaling) == groups


def test_enough_cpus_on_different_nodes_do_not_make_a_worker():
    scaling = ScalingConfig(num_workers=1, cpus_per_worker=6)
    with pytest.raises(ClusterTooSmall, match=r"need 1 workers x CPU=6 .* cluster has CPU=8 on 2 nodes, room for 0"):
        preflight(scaling, Capacity((CPU_NODE, CPU_NODE)))


def test_the_refusal_names_what_is_missing_and_what_to_do():
    scaling = ScalingConfig(num_workers=4, use_gpu=True)
    with pytest.raises(ClusterTooSmall, match=r"GPU=0 on 2 nodes, room for 0; lower scaling.*use_gpu=false"):
        preflight(scaling, Capacity((CPU_NODE, CPU_NODE)))


def test_elastic_training_needs_room_for_its_fewest_workers_only():
    capacity = Capacity((CPU_NODE,))
    assert preflight(ScalingConfig(num_workers=(2, 100)), capacity) is capacity
    with pytest.raises(ClusterTooSmall, match="need 5 workers"):
        preflight(ScalingConfig(num_workers=(5, 100)), capacity)


def test_an_autoscaling_cluster_may_be_too_small_for_now():
    assert preflight(ScalingConfig(num_workers=99, allow_autoscale=True), Capacity((CPU_NODE,)))


def test_auto_takes_gpus_where_there_are_some():
    scaling = ScalingConfig(num_workers=2, cpus_per_worker=3)
    assert not uses_gpu(scaling, Capacity((CPU_NODE,)))
    assert worker_bundle(scaling, Capacity((CPU_NODE, GPU_NODE))) == {"CPU": 3, "GPU": 1}
    assert worker_bundle(scaling.model_copy(update={"use_gpu": False}), Capacity((GPU_NODE,))) == {"CPU": 3}


def test_an_impossible_request_is_refused_without_starting_or_importing_ray():
    code = (
        "import sys\n"
        "from pipeline.cluster import ClusterTooSmall, preflight\n"
        "from pipeline.config.scaling import ScalingConfig\n"
        "try:\n    preflight(ScalingConfig(num_workers=100000))\n"
        "except ClusterTooSmall:\n    print('refused', 'ray' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["refused", "False"]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_workers": 0}, "greater than 0"),
        ({"num_workers": [3, 2]}, "min <= max"),
        ({"cpus_per_worker": 0}, "greater than 0"),
        ({"use_gpu": "maybe"}, "auto"),
        ({"workers": 2}, "Extra inputs"),
    ],
)
def test_a_bad_scaling_section_is_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        ScalingConfig.model_validate(settings_)
