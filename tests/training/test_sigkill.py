"""A training in a process of its own, killed inside an epoch by SIGKILL, goes on to the bits of the undisturbed one."""

import json
import signal
import subprocess
import sys

import torch

from pipeline.config.data import AugmentConfig
from pipeline.config.training import CheckpointConfig, EMAConfig
from pipeline.training import Context, TrainedModel, train
from pipeline.training.files import read_directory

DYING = """
import os, signal, sys
import torch
from pipeline.training import Context, TrainJob, train

torch.set_num_threads(1)
asked = 0

def die_in_step(number):
    global asked
    asked += 1
    if asked == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return False

# Asked once in every step, after the gradient is there and before the weights move.
train(TrainJob.model_validate_json(sys.argv[1]), Context(stop_requested=lambda: die_in_step(6)))
"""
TIMES = {"images_per_second", "share_of_floor", "loader_wait_share", "overhead_share", "step_ms", "time"}


def newest_state(output):
    """Weights, average and momentum of the newest checkpoint, and where it stands."""
    slots = [output / "checkpoints" / slot for slot in "ab"]
    states = [read_directory(slot, record="state.json") for slot in slots if slot.exists()]
    groups, record = max(states, key=lambda state: state[1]["progress"]["step"])
    return {f"{g}/{n}": t for g, values in groups.items() for n, t in values.items()}, record["progress"]


def journal(output):
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in (e | e.pop("metrics", {})).items() if k not in TIMES} for e in entries]
    return sorted(figures, key=lambda entry: entry["step"])


def test_killed_inside_an_epoch_and_resumed_is_bit_for_bit_the_uninterrupted(make_job):
    options = {
        "epochs": 3,
        "ema": EMAConfig(decay=0.9),
        "augment": AugmentConfig(pad_crop=1, flip=False),
        "checkpoint": CheckpointConfig(every_steps=2),
    }
    whole, killed = make_job("whole", **options), make_job("killed", **options)
    child = subprocess.run([sys.executable, "-c", DYING, killed.model_dump_json()], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    _, progress = newest_state(killed.output)
    assert (progress["epoch"], progress["batch"], progress["step"]) == (1, 1, 4)  # of six: the fifth is lost
    expected, resumed = train(whole, Context()), train(killed, Context())
    same = TrainedModel.model_fields.keys() - TIMES
    assert resumed.model_dump(include=same) == expected.model_dump(include=same)
    (tensors, end), (reference, last) = newest_state(killed.output), newest_state(whole.output)
    assert {name.partition("/")[0] for name in tensors} == {"model", "ema", "optimizer"}
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[name], reference[name]) for name in reference)
    assert end | {"seconds": 0} == last | {"seconds": 0}
    assert journal(killed.output) == journal(whole.output)
