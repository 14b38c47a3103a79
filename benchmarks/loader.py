"""Throughput, memory and first-batch latency of the loaders: `python benchmarks/loader.py [--quick]` prints tables.

Every figure is from a process of its own, bound to as many cores as it has workers, with as many torch threads. Rates
are those of the first seconds after the first batch, or of the whole epoch where it is shorter. Variants take turns
within a repeat. Small images: 50,000 of 32 x 32 with pad-crop and flip, batch 512, from cifar10.npz in SPARTA_DATA
(repeated) or random. Photographs: 2,000 JPEG of about 500 x 400, random resized crop to 224 and flip, batch 64; memory
holds no JPEG; photos-400 are the same as FFCV's recipes store them, at most 400 pixels long. Large: a file of 2 GB,
images of 128 x 128, batch 128, read to its end.

Memory is the proportional set size of the process and all its children, sampled 20 times a second: what processes share
is counted once. First batch: from open files of a running Python with torch to the first batch, the import of FFCV
included. Cold: nothing compiled, and the file not yet verified on this machine; everywhere else both are done. The
files are in the page cache throughout.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

SMALL, PHOTOS, RECIPE, LARGE = "small", "photos", "photos-400", "large"
LOADERS = {
    SMALL: ("ffcv", "memory", "torchvision PIL", "torchvision v2 tensors"),
    PHOTOS: ("ffcv", "torchvision PIL", "torchvision v2 tensors"),
    RECIPE: ("ffcv",),
}
BATCH = {SMALL: 512, PHOTOS: 64, RECIPE: 64, LARGE: 128}
SECONDS = 4.0
"""Reading small images and photographs is timed for so long."""
Figures = dict[str, float]
Table = dict[tuple[str, str, int], Figures]
"""By data, loader and number of workers."""


class Memory:
    """Peak of the memory of this process and its children over a `with` block, above what it was before, in MiB."""

    def __enter__(self) -> Self:
        self._before, self._peak = self._now(), 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self._peak = max(self._peak, self._now())

    @property
    def peak(self) -> float:
        return (self._peak - self._before) / 2**20

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        import psutil

        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        return total


def make(place: Path, num_small: int, num_photos: int, large_gb: float) -> None:
    """Write the source files, and prepare the photographs."""
    import numpy as np

    from pipeline.config.data import DataConfig
    from pipeline.data import prepare

    rng = np.random.default_rng(0)
    cifar = Path(os.environ.get("SPARTA_DATA", "")) / "cifar10.npz"
    if cifar.exists():
        with np.load(cifar) as arrays:
            images = np.resize(arrays["train_images"], (num_small, 32, 32, 3))
    else:
        images = rng.integers(0, 256, (num_small, 32, 32, 3), dtype=np.uint8)
    _npz(place / "small.npz", images)
    _photos(place / "source", images, num_photos)
    for what, side in ((PHOTOS, 512), (RECIPE, 400)):
        source = str(place / "source")
        config = DataConfig(dataset="folder", path=source, storage="jpeg", max_side=side, val_fraction=0.01)
        prepare(config, place / what, seed=0)
    count = int(large_gb * 1e9 / (128 * 128 * 3))
    _npz(place / "large.npz", rng.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8))


def write(place: Path, what: str) -> Figures:
    """Prepare an .npz: seconds, and the peak memory of this process and FFCV's writers, their imports included."""
    from pipeline.config.data import DataConfig
    from pipeline.data import prepare

    config = DataConfig(dataset="npz", path=str(place / f"{what}.npz"), val_fraction=0.001)
    start = time.perf_counter()
    with Memory() as memory:
        prepare(config, place / what, seed=0)
    return {"seconds": time.perf_counter() - start, "peak": memory.peak}


def _npz(path: Path, images) -> None:
    import numpy as np

    labels = np.arange(len(images)) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:100], test_labels=labels[:100])


def _photos(root: Path, images, number: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(1)
    for split, count in (("train", number), ("test", 20)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
        for index in range(count):
            size = int(rng.integers(470, 530)), int(rng.integers(370, 430))
            picture = np.asarray(Image.fromarray(images[index]).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
            picture = (picture + rng.integers(-12, 13, picture.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / split / str(index % 2) / f"{index:05d}.jpg", quality=90)


def opened(place: Path, what: str, loader: str, workers: int):
    """Batches of one epoch, and the number of images."""
    if loader.startswith("torchvision"):
        return torchvision_loader(place, what, loader, workers)
    from pipeline.config.data import AugmentConfig, RandomResizedCropConfig
    from pipeline.data import PreparedData, open_split

    crop = RandomResizedCropConfig() if what in (PHOTOS, RECIPE) else None
    return open_split(
        PreparedData.load(place / what),
        "train",
        batch_size=BATCH[what],
        shuffle=True,
        augment=AugmentConfig(random_resized_crop=crop),
        loader=loader,
        workers=workers,
    )


def torchvision_loader(place: Path, what: str, loader: str, workers: int):
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import datasets
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    tensors = loader.endswith("tensors")
    crop = v2.RandomResizedCrop(224, scale=(0.25, 1)) if what == PHOTOS else v2.RandomCrop(32, padding=4)
    final = (
        [v2.ToDtype(torch.float32, scale=True)] if tensors else [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *final])

    class Small(Dataset):
        def __init__(self):
            with np.load(place / "small.npz") as arrays:
                self.images, self.labels = arrays["train_images"], arrays["train_labels"]
            if tensors:
                self.images = torch.from_numpy(self.images).permute(0, 3, 1, 2).contiguous()

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            image = self.images[index] if tensors else Image.fromarray(self.images[index])
            return transform(image), int(self.labels[index])

    def decoded(path: str):
        return decode_image(path, mode=ImageReadMode.RGB)

    files = {"loader": decoded} if tensors else {}
    source = Small() if what == SMALL else datasets.ImageFolder(str(place / "source" / "train"), transform, **files)
    return DataLoader(source, BATCH[what], shuffle=True, num_workers=workers)


def child(place: Path, what: str, loader: str, workers: int) -> Figures:
    """One epoch, in this process: images/s, peak memory above the imports, seconds to the first batch."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    os.sched_setaffinity(0, cores)
    import torch

    import pipeline.data

    if what == LARGE:
        import pipeline.data.beton  # noqa: F401, so that the peak is above this import too

    torch.set_num_threads(workers)
    with Memory() as memory:
        start, count = time.perf_counter(), 0
        batches = iter(opened(place, what, loader, workers))
        next(batches)
        first = time.perf_counter()
        for x, _ in batches:
            count += len(x)
            if what != LARGE and time.perf_counter() - first > SECONDS:
                break
        rate = count / (time.perf_counter() - first)
    return {"rate": rate, "peak": memory.peak, "first": first - start}


def wait(place: Path, steps: int = 12) -> Figures:
    """Share of a PGD-10 adversarial training step of ResNet-8 that is spent waiting for the loader."""
    import torch
    from torch.nn import functional

    from pipeline.config.data import AugmentConfig
    from pipeline.data import PreparedData, open_split
    from pipeline.training.attacks import pgd
    from sparta_models import build_model

    model = build_model("resnet8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    prepared = PreparedData.load(place / SMALL)
    waited = total = 0.0
    with open_split(prepared, "train", batch_size=128, shuffle=True, augment=AugmentConfig()) as loader:
        batches = iter(loader)
        next(batches)
        for _ in range(steps):
            start = time.perf_counter()
            x, y = next(batches)
            waited += time.perf_counter() - start
            x_adv = pgd(model, x, y, eps=8 / 255, step_size=2 / 255, steps=10)
            optimizer.zero_grad()
            functional.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
            total += time.perf_counter() - start
    return {"share": waited / total, "step": total / steps}


def run(place: Path, *arguments: str, caches: Path | None = None) -> Figures:
    """Figures of a process of its own, whose caches are in `place`, or elsewhere."""
    command = [sys.executable, __file__, "--child", str(place), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings(caches or place))
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def surroundings(place: Path) -> dict[str, str]:
    """The environment, with nothing compiled or verified by earlier runs, and nothing left for later ones."""
    caches = {"NUMBA_CACHE_DIR": str(place / "numba"), "SPARTA_CACHE": str(place / "cache")}
    return {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(sys.path)}


def medians(place: Path, what: str, repeats: int) -> Table:
    """Of every loader and number of workers, in turn, so that a change of the machine's load meets all of them."""
    counts = (1, 2)[: len(os.sched_getaffinity(0))]
    variants = [(what, loader, workers) for loader in LOADERS[what] for workers in counts]
    rounds = [{v: run(place, what, v[1], str(v[2])) for v in variants} for _ in range(repeats)]
    return {v: {key: statistics.median(r[v][key] for r in rounds) for key in rounds[0][v]} for v in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: to see that it runs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*options.child)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        os.environ.update(surroundings(place))
        make(place, *((5_000, 200, 0.3) if options.quick else (50_000, 2_000, 2)))
        report(place, 1 if options.quick else 3)


def measured(place: str, what: str, *more: str) -> Figures:
    match what:
        case "wait":
            return wait(Path(place))
        case "write":
            return write(Path(place), *more)
        case _:
            return child(Path(place), what, more[0], int(more[1]))


def report(place: Path, repeats: int) -> None:
    import torch

    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {cores} cores, load {load:.1f} at the start, median of {repeats}\n")
    writing = {what: run(place, "write", what) for what in (SMALL, LARGE)}
    whats = (SMALL, PHOTOS, LARGE)
    cold = {what: run(place, what, "ffcv", "1", caches=place / "cold" / what)["first"] for what in whats}
    for what in LOADERS:  # compiled and verified, for all that follows
        run(place, what, "ffcv", "1")
    table: Table = {}
    for what in LOADERS:
        table |= shown(medians(place, what, repeats))
    large, waiting = run(place, LARGE, "ffcv", "1"), run(place, "wait")
    for what, figures in writing.items():
        size = sum(path.stat().st_size for path in (place / what).glob("*.beton")) / 1e9
        print(
            f"Writing {size:.2f} GB: {figures['seconds']:.0f} s, peak {figures['peak']:,.0f} MiB above the imports, "
            "but for those of the writer's own process"
        )
    print(f"Reading the largest: {large['rate']:,.0f} images/s, first batch {large['first']:.2f} s")
    print(f"PGD-10 training of ResNet-8, batch 128: {waiting['step']:.2f} s per step")
    print("First batch, cold: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in cold.items()) + "\n")
    targets(table, large, waiting)


def shown(table: Table) -> Table:
    """Print it and hand it on."""
    (what,) = {key[0] for key in table}
    print(f"| {what} | workers | images/s | peak MiB | first batch s |\n|---|---|---|---|---|")
    for (_, loader, workers), got in table.items():
        print(f"| {loader} | {workers} | {got['rate']:,.0f} | {got['peak']:,.0f} | {got['first']:.2f} |", flush=True)
    print()
    return table


def targets(table: Table, large: Figures, waiting: Figures) -> None:
    """Print what was to be reached beside what was."""
    rows: list[tuple[str, str, bool]] = []

    def ratio(text: str, what: str, one: str, other: str, least: float, *, of: str | None = None) -> None:
        for workers in sorted({key[2] for key in table}):
            got = table[what, one, workers]["rate"] / table[of or what, other, workers]["rate"]
            rows.append((f"{text}, {workers} workers: at least {least:.2f} x", f"{got:.2f} x", got >= least))

    ratio("FFCV over torchvision v2 tensors, small", SMALL, "ffcv", "torchvision v2 tensors", 4)
    ratio("memory over torchvision v2 tensors, small", SMALL, "memory", "torchvision v2 tensors", 4)
    ratio("FFCV over memory, small", SMALL, "ffcv", "memory", 1 / 1.3)
    ratio("FFCV over torchvision PIL, photographs", PHOTOS, "ffcv", "torchvision PIL", 2)
    ratio("FFCV, stored with max_side=400, over the same", RECIPE, "ffcv", "torchvision PIL", 2, of=PHOTOS)
    first = max(got["first"] for (_, loader, _), got in table.items() if loader == "ffcv")
    rows += [
        ("first batch, warm: under 2 s", f"{first:.2f} s", first < 2),
        ("loader's share of a step: at most 2 %", f"{waiting['share']:.2%}", waiting["share"] <= 0.02),
        ("memory while reading the largest: under 300 MB", f"{large['peak'] * 1.048576:,.0f} MB", large["peak"] < 286),
    ]
    print("| target | measured | met |\n|---|---|---|")
    for text, got, met in rows:
        print(f"| {text} | {got} | {'yes' if met else 'no'} |")


if __name__ == "__main__":
    main()
