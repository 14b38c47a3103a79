"""Speed of an adversarial training step against its arithmetic floor and against a textbook loop, and what an epoch
costs besides its steps, in one run.

    python benchmarks/at_step.py [--networks resnet8 resnet18] [--methods pgd_at trades fgsm_rs] [--variants ...]
                                 [--compiled] [--steps 10] [--rounds 5] [--activation sparta] [--device cpu|cuda]
                                 [--clock wall|cpu] [--threads N] [--no-epochs] [--json FILE]

ResNet-8 and ResNet-18 see images of 32 x 32. `--networks resnet50`, ImageNet's form, sees 64 of 224 x 224 in a step:
what docs/scale.md asks for. It is meant for a GPU, and left out unless it is named.

Every variant makes one step per round, in turn, so that a change of the machine's load meets all of them; the table
takes the median over rounds of the time, and of the ratios within a round. The process is bound to as many cores as it
has threads. On a GPU all variants run by default, and the table has a column for memory: the most that was allocated in
a contestant's first step, beyond what was held before it. On a CPU the eager ones run, those in bfloat16 only where the
processor does not emulate it; --compiled adds the compiled variants of ResNet-8, which take minutes to compile.
  floor      the bare network's own passes (K + 1 forwards, K backwards to the input, one full backward; TRADES and
             FGSM-RS likewise), each timed alone, eager, channels_last, in float32 or bfloat16
  folded     the same passes with the batch norms folded for the attack, as our loop has them
  textbook   as most public repositories write it: loss.backward() in the attack, default layout, float32, for TRADES
             two forward passes per loss
  ours       pipeline.training.loop.train_step itself, with everything it does
"x floor" and "x folded" are times over these floors in the variant's own precision.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.data import AugmentConfig, DataConfig, SplitLimits
from pipeline.config.model import ActivationConfig, ModelConfig
from pipeline.config.training import (
    AttackConfig,
    FGSMRSConfig,
    PGDATConfig,
    SelectionConfig,
    TRADESConfig,
    TrainingConfig,
)
from pipeline.data import PreparedData, prepare
from pipeline.training import Context, TrainJob, train
from pipeline.training.floor import floor_seconds
from pipeline.training.fold import FoldedShadow
from pipeline.training.loop import train_step
from pipeline.training.network import Forward, shadow
from pipeline.training.run import Run, open_run


class Setting(NamedTuple):
    options: dict[str, Any]
    batch: int
    side: int = 32
    """Height and width of its images."""


NETWORKS = {
    "resnet8": Setting({"width": 16}, 128),
    "resnet18": Setting({"width": 64}, 32),
    "resnet50": Setting({"stem": "imagenet"}, 64, 224),
}
VARIANTS = {
    "fp32 eager": ("fp32", "off"),
    "bf16 eager": ("bf16", "off"),
    "fp32 compiled": ("fp32", "on"),
    "bf16 compiled": ("bf16", "on"),
    "auto": ("auto", "auto"),
}
EPS = 8 / 255


def method_config(name: str, steps: int):
    attack = {"steps": steps, "step_size": 2 / 255}
    return {
        "pgd_at": PGDATConfig(attack=AttackConfig(**attack)),
        "trades": TRADESConfig(attack=AttackConfig(**attack, loss="kl", start="normal")),
        "fgsm_rs": FGSMRSConfig(),
    }[name]


def textbook(net: nn.Module, optimizer: torch.optim.Optimizer, name: str, steps: int, x: Tensor, y: Tensor) -> None:
    """One step as in the repositories of Madry, Rice, Zhang and Wong: every attack step fills parameter gradients."""
    alpha, count = (1.25 * EPS, 1) if name == "fgsm_rs" else (2 / 255, steps)
    delta = torch.empty_like(x).uniform_(-EPS, EPS) if name != "trades" else 0.001 * torch.randn_like(x)
    net.eval()
    clean = F.softmax(net(x).detach(), 1) if name == "trades" else None
    for _ in range(count):
        x_adv = (x + delta).clamp(0, 1).requires_grad_()
        z = net(x_adv)
        loss = F.cross_entropy(z, y) if clean is None else F.kl_div(F.log_softmax(z, 1), clean, reduction="sum")
        net.zero_grad()
        loss.backward()
        delta = (x_adv.detach() + alpha * x_adv.grad.sign() - x).clamp(-EPS, EPS)
    x_adv = (x + delta).clamp(0, 1)
    net.train()
    optimizer.zero_grad()
    if name == "trades":
        z, z_adv = net(x), net(x_adv)
        kl = F.kl_div(F.log_softmax(z_adv, 1), F.softmax(z, 1), reduction="batchmean")
        loss = F.cross_entropy(z, y) + 6 * kl
    else:
        loss = F.cross_entropy(net(x_adv), y)
    loss.backward()
    optimizer.step()
    loss.item()


def random_images(directory: Path, num_train: int, side: int = 32) -> PreparedData:
    """So many random images to train on."""
    directory.mkdir(parents=True)
    draws, count = np.random.default_rng(0), num_train + num_train // 4
    arrays = {
        f"{split}_images": draws.integers(0, 256, (count, side, side, 3), np.uint8) for split in ("train", "test")
    }
    arrays |= {f"{split}_labels": np.arange(count) % 10 for split in ("train", "test")}
    np.savez(directory / "images.npz", **arrays)
    config = DataConfig(
        dataset="npz", path=str(directory / "images.npz"), loader="memory", limit=SplitLimits(train=num_train)
    )
    return prepare(config, directory / "data", seed=0)


def our_run(prepared: PreparedData, network: str, method, variant: str, batch: int, options: argparse.Namespace) -> Run:
    precision, compiled = VARIANTS[variant]
    job = TrainJob(
        model=ModelConfig(
            name=network, activation=ActivationConfig(name=options.activation), options=NETWORKS[network].options
        ),
        data=prepared.directory,
        training=TrainingConfig(epochs=10**6, batch_size=batch, method=method, precision=precision, compile=compiled),
        output=prepared.directory / "out",
    )
    return open_run(job, Context(device=torch.device(options.device)), prepared, None, "benchmark")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of a piece of work, from an idle device to an idle device."""
    wait, clock = torch.cuda.synchronize if options.device == "cuda" else lambda: None, CLOCKS[options.clock]
    wait()
    begin = clock()
    work()
    wait()
    return clock() - begin


def contestants(
    prepared: PreparedData, network: str, name: str, variants: list[str], options: argparse.Namespace
) -> dict:
    """Name -> a function that makes one step and returns its seconds; warmed up."""
    batch, method = NETWORKS[network].batch, method_config(name, options.steps)
    runs = {variant: our_run(prepared, network, method, variant, batch, options) for variant in variants}
    any_run = next(iter(runs.values()))
    x, y = (t[:batch] for t in next(iter(any_run.loader)))
    found: dict[str, Callable[[], float]] = {}
    plain = our_run(prepared, network, method, "fp32 eager", batch, options).model.to(
        memory_format=torch.contiguous_format
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    found["textbook"] = lambda: timed(lambda: textbook(plain, optimizer, name, options.steps, x, y), options)
    fast = x.contiguous(memory_format=torch.channels_last)
    for precision in sorted({run.trained.precision for run in runs.values()} | {"fp32"}):
        trained = Forward(copy.deepcopy(any_run.model), precision)
        bare = Forward(shadow(any_run.model), precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        folded = Forward(FoldedShadow(any_run.model, fast[:2], dtype), precision)
        for kind, attacked in (("floor", bare), ("folded", folded)):
            found[f"{kind} {precision}"] = lambda a=attacked, t=trained: floor_seconds(
                a, t, fast, any_run.method.cost, repeats=1, clock=CLOCKS[options.clock]
            )
    for variant, run in runs.items():
        found[f"ours {variant}"] = lambda r=run: timed(lambda: train_step(r, x, y), options)
    memory = {key: first_peak(step, options) for key, step in found.items()}
    return found | {"precisions": {f"ours {v}": run.trained.precision for v, run in runs.items()}, "memory": memory}


def first_peak(step: Callable[[], object], options: argparse.Namespace) -> float | None:
    """Make a first step, with all compilation and capture; the MiB that it allocated at most, on a GPU.

    The first, because a replayed graph allocates nothing: it keeps what it took when it was captured.
    """
    if options.device != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    prepared: PreparedData, network: str, name: str, variants: list[str], options: argparse.Namespace
) -> list[dict]:
    torch._dynamo.reset()  # lets go of the graphs of the networks before
    found = contestants(prepared, network, name, variants, options)
    precisions, memory = found.pop("precisions"), found.pop("memory")
    rounds = [{key: step() for key, step in found.items()} for _ in range(options.rounds)]
    rows = []
    for key in found:
        precision = precisions.get(key) or ("bf16" if key.endswith("bf16") else "fp32")
        rows.append(
            {
                "network": network,
                "method": name,
                "variant": key,
                "images_per_second": NETWORKS[network].batch / statistics.median(r[key] for r in rounds),
                "times_floor": statistics.median(r[key] / r[f"floor {precision}"] for r in rounds),
                "times_folded": statistics.median(r[key] / r[f"folded {precision}"] for r in rounds),
                "over_textbook": statistics.median(r["textbook"] / r[key] for r in rounds),
                "peak_mib": memory[key],
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"| {row['network']:8} | {row['method']:7} | {row['variant']:18} | {row['images_per_second']:8.1f} "
            f"| {row['times_floor']:7.2f} | {row['times_folded']:8.2f} | {row['over_textbook']:10.2f} |"
            + ("" if row["peak_mib"] is None else f" {row['peak_mib']:8.0f} |"),
            flush=True,
        )


def epoch_shares(directory: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Shares of an epoch that are no training step, from the journal of a real training of ResNet-8: its second epoch.

    The epoch has 16 steps; journal and checkpoint come once per epoch, so in a longer one their share is smaller.
    """
    prepared = random_images(directory / name, 16 * 128)
    job = TrainJob(
        model=ModelConfig(
            name="resnet8", activation=ActivationConfig(name=options.activation), options=NETWORKS["resnet8"].options
        ),
        data=prepared.directory,
        training=TrainingConfig(
            epochs=2,
            batch_size=128,
            method=method_config(name, options.steps),
            selection=SelectionConfig(attack=AttackConfig(steps=1), max_samples=64),
        ),
        augment=AugmentConfig(),
        output=directory / name / "out",
    )
    entries: list[dict[str, float]] = []
    context = Context(device=torch.device(options.device), log=lambda metrics, _: entries.append(dict(metrics)))
    with contextlib.redirect_stdout(sys.stderr):  # its progress does not belong into the table
        train(job, context)
    last = entries[-1]
    return {key: last[key] for key in ("overhead_share", "loader_wait_share", "share_of_floor", "step_ms")}


def show_epochs(directory: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    print("\nResNet-8, batch 128, epochs of 16 steps, auto settings: shares of the epoch outside the steps")
    print("| method  | outside the steps | of it waiting for the loader | ms/step |\n|---|---|---|---|")
    found = {}
    for name in options.methods:
        found[name] = shares = epoch_shares(directory, name, options)
        print(
            f"| {name:7} | {shares['overhead_share']:17.2%} | {shares['loader_wait_share']:28.2%} "
            f"| {shares['step_ms']:7.1f} |",
            flush=True,
        )
    return found


def has_bf16(device: str) -> bool:
    """Whether bfloat16 is computed and not emulated."""
    return device == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pin(options: argparse.Namespace) -> None:
    """As many threads as asked for, each with a core for itself, where the system lets us choose."""
    cores = sorted(os.sched_getaffinity(0))
    options.threads = min(options.threads or len(cores), len(cores))
    os.sched_setaffinity(0, cores[: options.threads])
    torch.set_num_threads(options.threads)


def describe(options: argparse.Namespace) -> str:
    amx = "yes" if torch.cpu._is_amx_tile_supported() else "no"
    device = torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return (
        f"torch {torch.__version__}, {options.device} ({device}), {options.threads} threads of {os.cpu_count()} cores, "
        f"AMX {amx}, load {os.getloadavg()[0]:.1f}, K = {options.steps}, {options.activation}, {options.clock} time, "
        f"median of {options.rounds} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet8", "resnet18"], choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=["pgd_at", "trades", "fgsm_rs"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all on a GPU, else the eager ones")
    parser.add_argument("--compiled", action="store_true", help="on a CPU: also compiled, ResNet-8 alone")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activation", default="sparta")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of the process, for a shared machine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-epochs", action="store_true", help="leave out what an epoch costs besides its steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pin(options)
    torch._dynamo.config.recompile_limit = 64  # of one class's forward, for all variants; past it, it runs eagerly
    precisions = ["fp32", "bf16"] if has_bf16(options.device) else ["fp32"]
    gpu = options.device == "cuda"
    chosen = options.variants or (list(VARIANTS) if gpu else [f"{precision} eager" for precision in precisions])
    print(describe(options))
    heads = "| network  | method  | variant            | images/s | x floor | x folded | x textbook |"
    print(heads + " peak MiB |" * gpu)
    print("|---|---|---|---|---|---|---|" + "---|" * gpu)
    rows, epochs = [], {}
    with tempfile.TemporaryDirectory() as directory:
        sides = {NETWORKS[network].side for network in options.networks}
        images = {side: random_images(Path(directory) / f"steps-{side}", 256, side) for side in sides}
        for network in options.networks:
            prepared = images[NETWORKS[network].side]
            wanted = options.compiled and network == "resnet8"
            compiled = [f"{precision} compiled" for precision in precisions if wanted]
            variants = list(dict.fromkeys([*chosen, *compiled]))
            for name in options.methods:
                found = measure(prepared, network, name, variants, options)
                show(found)
                rows += found
        if not options.no_epochs:
            epochs = show_epochs(Path(directory), options)
    if options.json:
        options.json.write_text(json.dumps({"steps": rows, "epochs": epochs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
