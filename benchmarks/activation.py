"""What an activation costs: alone, and inside networks during a PGD attack; and what importing the library costs.
Prints Markdown tables with ratios, and where the default Sparta has a target, the verdict.

    python benchmarks/activation.py [--device cpu] [--threads 2] [--repeats 7] [--nets resnet18 resnet8] [--clock wall]
                                    [--only relu silu ...] [--skip-alone] [--json FILE]

Rounds are interleaved: each round times every activation once, and a ratio is the median over the rounds of the ratio
within a round, so that what else the machine does falls on all of them. --clock cpu counts the process's own
processor time, for a machine that others use too. All steps of a PGD attack do the same work, so a round times a few
of them and the table gives the time of one. Memory is the peak above the level before, of two steps, or of one forward
and full backward: on a CPU of resident memory, each measured in a process of its own; on a GPU of allocated memory.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models import build_activation, build_model, kernel_status
from sparta_models.activations.gates import GATES
from sparta_models.kernels import triton_kernel

ACTIVATIONS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("relu", "silu", "frelu", "atac", "sparta")},
    "sparta 3x3": {"name": "sparta", "kernel_size": 3},
    **{f"{v} 3x3": {"name": "sparta", "variant": v, "kernel_size": 3} for v in GATES if v != "smoothmax"},
}
NETS = {"resnet18": ({"width": 64}, 32, 2), "resnet8": ({"width": 16}, 128, 5)}
"""Options of the network, images in a batch, steps in a round."""
ALONE = [(32, 64, 32, 32), (128, 16, 32, 32), (32, 512, 4, 4)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

TARGETS = {"/ ReLU": 1.25, "/ SiLU": 1.10, "peak / SiLU": 1.10}
"""Of the default Sparta in a network: time of a PGD step, and peak memory."""
IMPORT_TARGET = 0.2
"""Seconds that sparta_models may add to the import of torch."""
IMPORTS = {"torch": "import torch", "torch and sparta_models": "import torch, sparta_models"}

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


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds by the chosen clock, when a GPU has done what it was given."""
    if args.device == "cpu":
        return CLOCKS[args.clock]

    def synchronised() -> float:
        torch.cuda.synchronize()
        return CLOCKS[args.clock]()

    return synchronised


def verdict(measured: float, target: float) -> str:
    return "met" if measured <= target else "MISSED"


def ratio(times: Times, name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def by_itself(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The activation, its input, and the gradient of its output."""
    module = build_activation(num_channels=shape[1], **ACTIVATIONS[name]).to(device, dtype).eval()
    random = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in random)
    return module, x.requires_grad_(), dy


def alone(shape: tuple[int, ...], dtype: torch.dtype, names: list[str], args: argparse.Namespace) -> dict[str, Times]:
    """Forward; backward to the input; backward to input and parameters, of each activation by itself."""
    forward: dict[str, Work] = {}
    to_input: dict[str, Work] = {}
    full: dict[str, Work] = {}
    for name in names:
        module, x, dy = by_itself(name, shape, dtype, args.device)
        y = module(x)
        everything = [x, *module.parameters()]
        forward[name] = torch.no_grad()(lambda module=module, x=x: module(x))
        to_input[name] = lambda y=y, x=x, dy=dy: torch.autograd.grad(y, x, dy, retain_graph=True)
        full[name] = lambda y=y, e=everything, dy=dy: torch.autograd.grad(y, e, dy, retain_graph=True)
    work = {"forward": forward, "backward to input": to_input, "full backward": full}
    return {label: interleaved(pieces, args.repeats, clock(args)) for label, pieces in work.items()}


def pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Ascend on the cross-entropy within 8/255, steps of 2/255."""
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x_adv).float(), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        step = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = torch.clamp(x + torch.clamp(step - x, -8 / 255, 8 / 255), 0, 1)
    return x_adv


def attack(net: str, name: str, steps: int, dtype: torch.dtype, device: str, **small: int) -> Work:
    """So many steps of a PGD attack on a batch; on 2 images of 8 x 8, where `small` options are given."""
    options, batch, _ = NETS[net]
    torch.manual_seed(0)
    model = build_model(net, activation=ACTIVATIONS[name], **(options | small))
    model = model.to(device, memory_format=torch.channels_last).eval()
    x = torch.rand((2, 3, 8, 8) if small else (batch, 3, 32, 32)).to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (len(x),)).to(device)
    return lambda: pgd(model, x, y, steps, dtype)


def there_and_back(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    """Forward and full backward of the activation by itself."""
    module, x, dy = by_itself(name, shape, dtype, device)
    return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], dy)


def _memory(field: str) -> int:
    """Bytes of VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def _work_and_warm_up(net: str | None, name: str, dtype: str, device: str) -> tuple[Work, Work]:
    """What is measured, and the same on a small batch for the first touch of libraries and thread pools, which is no
    matter of the activation."""
    if net is None:
        whole, small = (there_and_back(name, s, DTYPES[dtype], device) for s in (ALONE[0], (2, ALONE[0][1], 4, 4)))
        return whole, small
    return attack(net, name, 2, DTYPES[dtype], device), attack(net, name, 1, DTYPES[dtype], device, width=4)


def _peak_of_process(net: str | None, name: str, dtype: str, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    work, warm = _work_and_warm_up(net, name, dtype, "cpu")
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _memory("VmRSS")
    work()
    queue.put(_memory("VmHWM") - before)


def _peak_of_gpu(net: str | None, name: str, dtype: str) -> int:
    work, warm = _work_and_warm_up(net, name, dtype, "cuda")
    warm()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(net: str | None, name: str, dtype: str, args: argparse.Namespace) -> int:
    """Bytes of memory above the level before: of two PGD steps, or without a net of the activation alone."""
    if args.device == "cuda":
        return _peak_of_gpu(net, name, dtype)
    # Without a fixed threshold glibc keeps freed tensors in its heap, and the peak measures its fragmentation.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_of_process, args=(net, name, dtype, args.threads, queue))
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
    verdicts = []
    for net, (label, dtype) in itertools.product(args.nets, DTYPES.items()):
        options, batch, steps = NETS[net]
        attacks = {name: attack(net, name, steps, dtype, args.device) for name in names}
        times = interleaved(attacks, args.repeats, clock(args))
        peaks = {name: peak_memory(net, name, label, args) for name in names}
        ratios = {
            name: (ratio(times, name, "relu"), ratio(times, name, "silu"), peaks[name] / peaks["silu"])
            for name in names
        }
        rows = []
        for name in names:
            to_relu, to_silu, memory = (f"{value:.2f}" for value in ratios[name])
            ms, peak = statistics.median(times[name]) / steps * 1e3, peaks[name] / 2**20
            rows.append([name, f"{ms:.0f}" if ms >= 10 else f"{ms:.2f}", to_relu, to_silu, f"{peak:.0f}", memory])
        results[f"{net} {label}"] = {"seconds": times, "steps": steps, "peak bytes": peaks}
        print(f"\n### A PGD step in {net} (width {options['width']}, batch {batch}, 32 x 32), {label}\n")
        print(table(["activation", "ms", "/ ReLU", "/ SiLU", "peak MiB", "peak / SiLU"], rows), flush=True)
        if "sparta" in names:
            for (what, target), value in zip(TARGETS.items(), ratios["sparta"], strict=True):
                verdicts.append([net, label, what, f"{target:.2f}", f"{value:.2f}", verdict(value, target)])
    if verdicts:
        print("\n### Targets of the default Sparta in a PGD step\n")
        print(table(["network", "type", "ratio", "target", "measured", "verdict"], verdicts), flush=True)


def import_seconds(rounds: int) -> Times:
    """Seconds of each import in a process of its own, in each round; a round of warm-up comes first."""
    times: Times = {name: [] for name in IMPORTS}
    for i in range(rounds + 1):
        for name, statement in IMPORTS.items():
            code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            if i:
                times[name].append(float(out))
    return times


def print_imports(results: dict[str, Any], rounds: int = 5) -> None:
    times = import_seconds(rounds)
    own = statistics.median(b - a for a, b in zip(*times.values(), strict=True))
    results["imports"] = times
    print(f"\n### Import, seconds: medians over {rounds} interleaved rounds\n")
    rows = [[name, f"{statistics.median(t):.2f}", "", ""] for name, t in times.items()]
    rows.append(["sparta_models on top of torch", f"{own:.2f}", f"{IMPORT_TARGET:.2f}", verdict(own, IMPORT_TARGET)])
    print(table(["import", "seconds", "target", "verdict"], rows), flush=True)


def print_memory(args: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    peaks = {label: {name: peak_memory(None, name, label, args) for name in names} for label in DTYPES}
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
    if args.device == "cuda":
        cpu = f"{torch.cuda.get_device_name()}; {cpu}"
        compiled = "on" if triton_kernel() else "off"
    else:
        compiled = kernel_status().split(":")[0]
    return (
        f"{cpu}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {commit}, seed 0, median of {args.repeats} rounds by the {args.clock} clock, load before {load}, "
        f"compiled kernel {compiled}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
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
    print_imports(results)
    if not args.skip_alone:
        print_alone(args, names, results)
        print_memory(args, names, results)
    print_nets(args, names, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
