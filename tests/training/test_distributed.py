"""Two gloo ranks against one process: the same gradients, samples, statistics and, where promised, the same bits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.config.training import AttackConfig, AWPConfig, CheckpointConfig, EMAConfig, TRADESConfig
from pipeline.data import open_split
from pipeline.training import Context, NonFiniteLossError, TrainingStopped, TrainJob, train
from pipeline.training import loop as loop_module
from pipeline.training.awp import perturbed_weights
from pipeline.training.distributed import StepReducer, SyncBatchNorm, synchronise_batch_norms
from pipeline.training.files import read_directory

pytestmark = pytest.mark.slow


def _start(rank: int, world_size: int, directory: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    init = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    try:
        work(rank, Path(directory), *args)
    finally:
        dist.destroy_process_group()


def on_ranks(work: Callable[..., None], directory: Path, *args, world_size: int = 2) -> None:
    """Run work(rank, directory, *args) on gloo ranks in processes of their own; an exception in one is raised here."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "rendezvous").unlink(missing_ok=True)
    mp.spawn(_start, (world_size, str(directory), work, args), nprocs=world_size)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 16, 3)
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(7) % 3


def loss_of(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(x), y, reduction="sum")


def gradients_on_a_rank(rank: int, directory: Path) -> None:
    """Ranks hold 4 and 3 examples. Rank 0 writes what came out, with synchronised and with pinned statistics."""
    x, y = batch()
    x, y = x[rank::2], y[rank::2]
    results = {}
    for mode in ("sync", "eval"):
        net = network().train(mode == "sync")
        if mode == "sync":
            synchronise_batch_norms(net)
        reduce = StepReducer(net, list(net.parameters()), 2)
        with perturbed_weights(net, lambda n=net: loss_of(n, x, y), gamma=0.01, world_size=2):
            loss_of(net, x, y).backward()
        sums = reduce(torch.tensor([float(len(y)), 1.0], dtype=torch.float64))
        results |= {f"{mode}/{n}": p.grad for n, p in net.named_parameters()}
        results |= {f"{mode}/buffer/{n}": b for n, b in net.named_buffers()}
        results[f"{mode}/sums"] = sums
    if rank == 0:
        torch.save(results, directory / "gradients.pt")


def test_gradients_of_two_ranks_are_those_of_the_joint_batch(tmp_path):
    """With synchronised batch norms and with pinned ones, 4 + 3 examples, under adversarial weights."""
    on_ranks(gradients_on_a_rank, tmp_path)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    x, y = batch()
    for mode in ("sync", "eval"):
        net = network().train(mode == "sync")
        with perturbed_weights(net, lambda n=net: loss_of(n, x, y), gamma=0.01, world_size=1):
            (loss_of(net, x, y) / 7).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[f"{mode}/{name}"], parameter.grad)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(found[f"{mode}/buffer/{name}"], buffer)
        assert found[f"{mode}/sums"].tolist() == [7, 2]


def train_on_a_rank(rank: int, directory: Path, jobs: list[TrainJob]) -> None:
    for job in jobs:
        trained = train(job, Context.from_process_group())
        assert trained.world_size == 2


def stop_on_a_rank(rank: int, directory: Path, job: TrainJob) -> None:
    """Only rank 1 is asked to stop, after four steps; all stop."""
    asked = iter([False, False, False, rank == 1])
    with pytest.raises(TrainingStopped, match="after step 4"):
        train(job, replace(Context.from_process_group(), stop_requested=lambda: next(asked)))


def break_on_a_rank(rank: int, directory: Path, job: TrainJob) -> None:
    """Rank 1 alone meets an image that is not a number in step 4; all stop before the step."""
    real = loop_module.train_step

    def spoilt(run, x, y):
        if rank == 1 and run.state.step == 4:
            x = x * torch.nan
        return real(run, x, y)

    loop_module.train_step = spoilt
    with pytest.raises(NonFiniteLossError, match="at step 4"):
        train(job, Context.from_process_group())


def final_tensors(job: TrainJob) -> dict[str, torch.Tensor]:
    slots = [job.output / "checkpoints" / slot for slot in "ab"]
    states = [read_directory(slot, record="state.json") for slot in slots if slot.exists()]
    groups, _ = max(states, key=lambda state: state[1]["progress"]["step"])
    return {f"{g}/{n}": t for g, values in groups.items() for n, t in values.items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def record(job: TrainJob) -> dict:
    return json.loads((job.output / "trained.json").read_text())


def test_two_ranks_repeat_stop_break_and_resume_bit_for_bit(make_job, tmp_path):
    """The same bits from a run in one go, one that was stopped, and one that met a non-finite loss."""
    options = {
        "ema": EMAConfig(),
        "awp": AWPConfig(),
        "method": TRADESConfig(attack=AttackConfig(steps=1)),
        "checkpoint": CheckpointConfig(every_steps=1),
    }
    whole, stopped, broken = (make_job(name, **options) for name in ("whole", "stopped", "broken"))
    on_ranks(interrupt_and_resume_on_a_rank, tmp_path / "group", whole, stopped, broken)
    assert same(final_tensors(whole), final_tensors(stopped))
    assert same(final_tensors(whole), final_tensors(broken))
    weights = {record(job)["weights_sha256"] for job in (whole, stopped, broken)}
    assert len(weights) == 1
    assert record(whole)["bit_exact"]
    assert (broken.output / "nonfinite-step4-rank1.safetensors").exists()
    assert len((whole.output / "metrics.jsonl").read_text().splitlines()) == 2  # rank 0 alone writes


def interrupt_and_resume_on_a_rank(
    rank: int, directory: Path, whole: TrainJob, stopped: TrainJob, broken: TrainJob
) -> None:
    stop_on_a_rank(rank, directory, stopped)
    real = loop_module.train_step
    break_on_a_rank(rank, directory, broken)
    loop_module.train_step = real
    train_on_a_rank(rank, directory, [whole, stopped, broken])


def test_another_number_of_workers_goes_on_and_says_it_is_not_bit_exact(make_job, tmp_path, caplog):
    job = make_job("elastic", batch_norm="sync")
    on_ranks(stop_on_a_rank, tmp_path / "group", job)
    trained = train(job, Context())
    assert "resumed with 1 workers a training begun with 2: correct, but no longer bit-exact" in caplog.text
    assert (trained.epochs, trained.world_size, trained.bit_exact) == (2, 1, False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_of_an_epoch_comes_once_over_all_ranks(world_size, digits):
    """90 samples do not divide by 4, nor into batches of 32."""
    counts, total = torch.zeros(90, dtype=torch.int64), 0
    with open_split(digits, "train", batch_size=90) as every:
        images, _ = next(iter(every))
    for rank in range(world_size):
        with open_split(
            digits, "train", batch_size=32 // world_size, shuffle=True, rank=rank, world_size=world_size
        ) as loader:
            for x, _ in loader:
                counts += (x.flatten(1)[:, None] == images.flatten(1)[None]).all(2).sum(0)
                total += len(x)
    assert counts.tolist() == [1] * 90  # no two of the images are equal
    assert total == 90


def test_batch_norms_are_synchronised_only_where_they_train():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval())
    synchronise_batch_norms(net)
    assert [type(m) for m in net] == [SyncBatchNorm, nn.BatchNorm2d]
    with pytest.raises(ValueError, match="expected batch norms with weights"):
        synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(2, affine=False)))


def test_plain_process_sees_itself_as_the_only_rank():
    context = Context.from_process_group(torch.device("cpu"))
    assert (context.rank, context.world_size) == (0, 1)
