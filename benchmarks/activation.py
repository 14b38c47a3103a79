"""What an activation costs: alone, and inside networks during a PGD attack. Prints Markdown tables with ratios.

    python benchmarks/activation.py [--threads 2] [--repeats 7] [--nets resnet18 resnet8] [--clock wall]
                                    [--only relu silu ...] [--skip-alone] [--json FILE]

Rounds are interleaved: each round times every activation once, and a ratio is the median over the rounds of the ratio
within a round, so that what else the machine does falls on all of them. --clock cpu counts the process's own
processor time, for a machine that others use too. All steps of a PGD attack do the same work, so a round times a few
of them and the table gives the time of one. Memory is the peak of resident memory above the level before, each measured
in a process of its own: of two steps, or of one forward and full backward.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models import build_activation, build_model, kernel_status
from sparta_models.activations.sparta import VARIANTS

ACTIVATIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("relu", "silu", "frelu", "atac", "sparta")},
    **{f"sparta {v}": {"name": "sparta", "variant": v} for v in VARIANTS if v != "depthwise"},
}
NETS = {"resnet18": ({"width": 64}, 32, 2), "resnet8": ({"width": 16}, 128, 5)}
"""Options of the network, images in a batch, steps in a round."""
ALONE = [(32, 64, 32, 32), (128, 16, 32, 32), (32, 512, 4, 4)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Work = Callable[[], object]
Times = dict[str, list[float]]


def interleaved(work: dict[str, Work], repeats: int, clock: Callable[[], float]) -> Times:
    """Seconds of each piece of work in each round; a round of warm-up comes first."""
    times: Times = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, run in work.items():
            start = clock()
            run()
            if i:
                times[name].append(clock() - start)
    return times


def ratio(times: Times, name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def by_itself(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """The activation, its input, and the gradient of its output."""
    module = build_activation(num_channels=shape[1], **ACTIVATIONS[name]).to(dtype).eval()
    x, dy = (torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return module, x.requires_grad_(), dy


def alone(shape: tuple[int, ...], dtype: torch.dtype, names: list[str], args: argparse.Namespace) -> dict[str, Times]:
    """Forward; backward to the input; backward to input and parameters, of each activation by itself."""
    forward: dict[str, Work] = {}
    to_input: dict[str, Work] = {}
    full: dict[str, Work] = {}
    for name in names:
        module, x, dy = by_itself(name, shape, dtype)
        y = module(x)
        everything = [x, *module.parameters()]
        forward[name] = torch.no_grad()(lambda module=module, x=x: module(x))
        to_input[name] = lambda y=y, x=x, dy=dy: torch.autograd.grad(y, x, dy, retain_graph=True)
        full[name] = lambda y=y, e=everything, dy=dy: torch.autograd.grad(y, e, dy, retain_graph=True)
    return {
        "forward": interleaved(forward, args.repeats, CLOCKS[args.clock]),
        "backward to input": interleaved(to_input, args.repeats, CLOCKS[args.clock]),
        "full backward": interleaved(full, args.repeats, CLOCKS[args.clock]),
    }


def pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Ascend on the cross-entropy within 8/255, steps of 2/255."""
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x_adv).float(), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        step = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = torch.clamp(x + torch.clamp(step - x, -8 / 255, 8 / 255), 0, 1)
    return x_adv


def attack(net: str, name: str, steps: int, dtype: torch.dtype, **small: int) -> Work:
    """So many steps of a PGD attack on a batch; on 2 images of 8 x 8, where `small` options are given."""
    options, batch, _ = NETS[net]
    torch.manual_seed(0)
    model = build_model(net, activation=ACTIVATIONS[name], **(options | small))
    model = model.to(memory_format=torch.channels_last).eval()
    x = torch.rand((2, 3, 8, 8) if small else (batch, 3, 32, 32)).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (len(x),))
    return lambda: pgd(model, x, y, steps, dtype)


def there_and_back(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Work:
    """Forward and full backward of the activation by itself."""
    module, x, dy = by_itself(name, shape, dtype)
    return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], dy)


def _memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _peak(net: str | None, name: str, dtype: str, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    if net is None:
        shape = ALONE[0]
        work, warm = (there_and_back(name, s, DTYPES[dtype]) for s in (shape, (2, shape[1], 4, 4)))
    else:
        work, warm = attack(net, name, 2, DTYPES[dtype]), attack(net, name, 1, DTYPES[dtype], width=4)
    # The first touch of libraries and thread pools is no matter of the activation: a small batch takes it.
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _memory("VmRSS")
    work()
    queue.put(_memory("VmHWM") - before)


def peak_memory(net: str | None, name: str, dtype: str, threads: int) -> int:
    """Bytes of resident memory above the level before: of two PGD steps, or without a net of the activation alone."""
    # Without a fixed threshold glibc keeps freed tensors in its heap, and the peak measures its fragmentation.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(net, name, dtype, threads, queue))
    process.start()
    peak = int(queue.get(timeout=300))
    process.join()
    return peak


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def print_alone(args: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    for (label, dtype), shape in itertools.product(DTYPES.items(), ALONE):
        measured = alone(shape, dtype, names, args)
        rows = []
        for name in names:
            columns = measured.values()
            rows.append(
                [name, *(f"{1e3 * statistics.median(t[name]):.2f} ({ratio(t, name, 'silu'):.2f})" for t in columns)]
            )
        results[f"alone {label} {shape}"] = measured
        print(f"\n### Alone, {label}, {shape}, channels_last: ms (ratio to SiLU)\n")
        print(table(["activation", *measured], rows), flush=True)


def print_nets(args: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    for net, (label, dtype) in itertools.product(args.nets, DTYPES.items()):
        options, batch, steps = NETS[net]
        attacks = {name: attack(net, name, steps, dtype) for name in names}
        times = interleaved(attacks, args.repeats, CLOCKS[args.clock])
        peaks = {name: peak_memory(net, name, label, args.threads) for name in names}
        rows = [
            [
                name,
                f"{statistics.median(times[name]) / steps * 1e3:.0f}",
                f"{ratio(times, name, 'relu'):.2f}",
                f"{ratio(times, name, 'silu'):.2f}",
                f"{peaks[name] / 2**20:.0f}",
                f"{peaks[name] / peaks['silu']:.2f}",
            ]
            for name in names
        ]
        results[f"{net} {label}"] = {"seconds": times, "steps": steps, "peak bytes": peaks}
        print(f"\n### A PGD step in {net} (width {options['width']}, batch {batch}, 32 x 32), {label}\n")
        print(table(["activation", "ms", "/ ReLU", "/ SiLU", "peak MiB", "peak / SiLU"], rows), flush=True)


def print_memory(args: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    peaks = {label: {name: peak_memory(None, name, label, args.threads) for name in names} for label in DTYPES}
    results["alone, peak bytes"] = peaks
    columns = [f"{label} MiB (/ SiLU)" for label in DTYPES]
    rows = [
        [name, *(f"{peaks[d][name] / 2**20:.1f} ({peaks[d][name] / peaks[d]['silu']:.2f})" for d in DTYPES)]
        for name in names
    ]
    print(f"\n### Alone, {ALONE[0]}, channels_last: peak memory of a forward and a full backward\n")
    print(table(["activation", *columns], rows), flush=True)


def surroundings(args: argparse.Namespace) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    load = Path("/proc/loadavg").read_text().split()[0]
    return (
        f"{cpu}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {commit}, seed 0, median of {args.repeats} rounds by the {args.clock} clock, load before {load}, "
        f"compiled kernel {kernel_status().split(':')[0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--only", nargs="*", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--skip-alone", action="store_true")
    parser.add_argument("--json", type=Path, help="write every time that was taken")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = list(dict.fromkeys(["relu", "silu", *args.only]))
    results: dict[str, Any] = {"surroundings": surroundings(args)}
    print(results["surroundings"])
    if not args.skip_alone:
        print_alone(args, names, results)
        print_memory(args, names, results)
    print_nets(args, names, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
