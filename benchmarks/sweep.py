"""Sweeps, measured: packing of one-worker trials, what ASHA saves, memory of the driver, time to resume.

    python -m benchmarks.sweep [--trials 8] [--epochs 8] [--output benchmarks/sweep.md]

Prints one table with the targets, and writes it to a file where one is named. Trainings have one thread each, in Ray's
workers as in this process, and one trial goes before the first measured sweep, because the first training on a machine
compiles kernels.
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import ray
import torch

from pipeline.artifacts import fingerprint
from pipeline.cluster import ensure_ray
from pipeline.cluster.sweep import Trial, search
from pipeline.cluster.sweep.search import SearchResult, _identify
from pipeline.cluster.sweep.trials import Leg, Point, save_trial
from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config, overlay
from pipeline.data import prepare
from pipeline.training import Context, TrainJob, train

CPUS = 2


def timed(config: ChainConfig, data: Path, output: Path) -> tuple[float, SearchResult]:
    begin = time.perf_counter()
    found = search(config, data=data, output=output)
    return time.perf_counter() - begin, found


def pure_seconds(config: ChainConfig, found: SearchResult, data: Path, root: Path) -> float:
    """Time of the same trainings one after the other in this process, without Ray."""
    from pipeline.cluster.sweep.space import trial_config

    torch.set_num_threads(1)  # as in a worker that reserves one CPU
    begin = time.perf_counter()
    for trial in found.trials:
        own = trial_config(config, trial.values)
        options = {"model": own.model, "training": own.training, "augment": own.augment, "seed": own.seed}
        train(TrainJob(**options, data=data, output=root / fingerprint(trial.values)), Context())
    return time.perf_counter() - begin


def resume_seconds(config: ChainConfig, data: Path, root: Path, num_trials: int = 50) -> float:
    """Time of a search whose trials are all finished: read, ranked, drawn; it does not start Ray."""
    identify = _identify(config)
    for number in range(num_trials):
        values = {"training.optimizer.lr": 0.01 + 0.001 * number}
        history = tuple(Point(epoch=e, robust=0.01 * number, clean=0.5) for e in range(1, 31))
        legs = (Leg(epoch=0, values=values),)
        save_trial(root, Trial(number=number, identity=identify(values), legs=legs, state="done", history=history))
    settings = {"search.num_trials": num_trials, "search.space": "optim"}
    return timed(overlay(config, settings), data, root)[0]


def epochs_run(found: SearchResult) -> int:
    return sum(trial.history[-1].epoch for trial in found.trials if trial.history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    root = Path(tempfile.mkdtemp())
    settings = [
        "search.enabled=true",
        "search.space=optim",
        "search.algorithm=random",
        "search.scheduler=none",
        f"search.num_trials={arguments.trials}",
        f"search.epochs={arguments.epochs}",
        f"scaling.num_cpus={CPUS}",
    ]
    config = load_config("demo", settings)
    prepare(config.data, root / "data", seed=config.seed)

    begin = time.perf_counter()
    with ensure_ray(config.scaling):
        start = time.perf_counter() - begin
        warm_up = {"search.num_trials": 1, "search.epochs": 1}
        search(overlay(config, warm_up), data=root / "data", output=root / "warm-up")
        plain_wall, plain = timed(config, root / "data", root / "none")
        asha = search(overlay(config, {"search.scheduler": "asha"}), data=root / "data", output=root / "asha")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # before trainings run in this very process
    resume = resume_seconds(config, root / "data", root / "resume")
    pure = pure_seconds(config, plain, root / "data", root / "pure")

    n, epochs = arguments.trials, arguments.epochs
    best = [found.best.best.robust for found in (plain, asha)]
    run = [epochs_run(found) for found in (plain, asha)]
    rows = [
        ("start of Ray", f"{start:.1f} s", ""),
        (f"{n} trials x {epochs} epochs, one worker each, {CPUS} CPUs, Ray running", f"{plain_wall:.1f} s", ""),
        ("the same trainings in one process, one after the other", f"{pure:.1f} s", ""),
        (
            f"share of ideal packing, {pure:.1f} / {CPUS} / {plain_wall:.1f}",
            f"{pure / CPUS / plain_wall:.2f}",
            ">= 0.75",
        ),
        (
            "epochs of the same search without and with ASHA",
            f"{run[0]} and {run[1]}, {1 - run[1] / run[0]:.0%} saved",
            "",
        ),
        ("best robust accuracy without and with ASHA", f"{best[0]:.4f} and {best[1]:.4f}", "equal"),
        ("peak memory of the driver", f"{memory:.0f} MB", ""),
        ("resume of 50 finished trials (Ray is not started)", f"{resume:.1f} s", "< 10 s"),
    ]
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}, ray {ray.__version__}"
    lines = [
        "# Sweeps, measured\n",
        f"`python -m benchmarks.sweep --trials {n} --epochs {epochs}`: the demo's training, space `optim`, random",
        f"draws, seed {config.seed}, one thread for each training. {machine}; load at the start {load:.1f}.\n",
        "| measure | value | target |\n|---|---|---|",
        *(f"| {name} | {value} | {target} |" for name, value, target in rows),
    ]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
