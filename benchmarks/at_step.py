"""Speed of an adversarial training step against its arithmetic floor and against a textbook loop, in one run.

    python benchmarks/at_step.py [--networks resnet8 resnet18] [--methods pgd_at trades fgsm_rs] [--variants ...]
                                 [--steps 10] [--rounds 5] [--activation sparta] [--device cpu|cuda]
                                 [--clock wall|cpu] [--threads N] [--json FILE]

Every variant makes one step per round, in turn, so that a change of the machine's load meets all of them; the table
takes the median over rounds of the time, and of the ratios within a round.
  floor      the bare network's own passes (K + 1 forwards, K backwards to the input, one full backward; TRADES and
             FGSM-RS likewise), each timed alone, eager, channels_last, in float32 or bfloat16
  textbook   as most public repositories write it: loss.backward() in the attack, default layout, float32, for TRADES
             two forward passes per loss
  ours       pipeline.training.loop.train_step itself, with everything it does
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.data import DataConfig
from pipeline.config.model import ActivationConfig, ModelConfig
from pipeline.config.training import AttackConfig, FGSMRSConfig, PGDATConfig, TRADESConfig, TrainingConfig
from pipeline.data import PreparedData, prepare
from pipeline.training import Context, TrainJob
from pipeline.training.floor import floor_seconds
from pipeline.training.loop import train_step
from pipeline.training.run import Run, open_run

NETWORKS = {"resnet8": ({"width": 16}, 128), "resnet18": ({"width": 64}, 32)}
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


def random_images(directory: Path, batch: int) -> PreparedData:
    draws = np.random.default_rng(0)
    arrays = {
        f"{split}_images": draws.integers(0, 256, (4 * batch, 32, 32, 3), np.uint8) for split in ("train", "test")
    }
    arrays |= {f"{split}_labels": np.arange(4 * batch) % 10 for split in ("train", "test")}
    np.savez(directory / "images.npz", **arrays)
    config = DataConfig(dataset="npz", path=str(directory / "images.npz"), loader="memory")
    return prepare(config, directory / "data", seed=0)


def our_run(prepared: PreparedData, network: str, method, variant: str, batch: int, options: argparse.Namespace) -> Run:
    precision, compiled = VARIANTS[variant]
    job = TrainJob(
        model=ModelConfig(
            name=network, activation=ActivationConfig(name=options.activation), options=NETWORKS[network][0]
        ),
        data=prepared.directory,
        training=TrainingConfig(epochs=10**6, batch_size=batch, method=method, precision=precision, compile=compiled),
        output=prepared.directory / "out",
    )
    return open_run(job, Context(device=torch.device(options.device)), prepared, None, "benchmark")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable[[], object], options: argparse.Namespace) -> float:
    wait, clock = torch.cuda.synchronize if options.device == "cuda" else lambda: None, CLOCKS[options.clock]
    wait()
    begin = clock()
    work()
    wait()
    return clock() - begin


def contestants(prepared: PreparedData, network: str, name: str, options: argparse.Namespace) -> dict:
    """Name -> a function that makes one step and returns its seconds; warmed up."""
    batch, method = NETWORKS[network][1], method_config(name, options.steps)
    runs = {variant: our_run(prepared, network, method, variant, batch, options) for variant in options.variants}
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
        found[f"floor {precision}"] = lambda p=precision: floor_seconds(
            any_run.model, fast, any_run.method.cost, p, repeats=1, clock=CLOCKS[options.clock]
        )
    for variant, run in runs.items():
        found[f"ours {variant}"] = lambda r=run: timed(lambda: train_step(r, x, y), options)
    for step in found.values():
        step()
        step()
    return found | {"precisions": {f"ours {v}": run.trained.precision for v, run in runs.items()}}


def measure(prepared: PreparedData, network: str, name: str, options: argparse.Namespace) -> list[dict]:
    found = contestants(prepared, network, name, options)
    precisions = found.pop("precisions")
    rounds = [{key: step() for key, step in found.items()} for _ in range(options.rounds)]
    rows = []
    for key in found:
        floor = f"floor {precisions.get(key, 'fp32')}"
        rows.append(
            {
                "network": network,
                "method": name,
                "variant": key,
                "images_per_second": NETWORKS[network][1] / statistics.median(r[key] for r in rounds),
                "times_floor": statistics.median(r[key] / r[floor] for r in rounds),
                "over_textbook": statistics.median(r["textbook"] / r[key] for r in rounds),
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    for row in rows:
        print(
            f"| {row['network']:8} | {row['method']:7} | {row['variant']:18} | {row['images_per_second']:8.1f} "
            f"| {row['times_floor']:5.2f} | {row['over_textbook']:5.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=["pgd_at", "trades", "fgsm_rs"])
    parser.add_argument(
        "--variants", nargs="+", default=["fp32 eager", "fp32 compiled", "bf16 compiled"], choices=VARIANTS
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activation", default="sparta")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of the process, for a shared machine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    amx = torch.cpu._is_amx_tile_supported()
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, AMX {'yes' if amx else 'no'}, load {os.getloadavg()[0]:.1f}, "
        f"K = {options.steps}, {options.activation}, {options.clock} time"
    )
    print("| network  | method  | variant            | images/s | x floor | x textbook |\n|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        prepared = random_images(Path(directory), 256)
        for network in options.networks:
            for name in options.methods:
                rows += measure(prepared, network, name, options)
                show(rows[-len(options.variants) - 3 :])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
