"""Throughput, memory and first-batch latency of the loaders: `python benchmarks/loader.py [--quick]` prints tables.

Every figure is from a process of its own, bound to as many cores as it has workers; rates are those of the first
seconds after the first batch, or of the whole epoch where it is shorter. Variants take turns within a repeat. Small
images: 50,000 of 32 x 32 with pad-crop and flip, batch 512, from cifar10.npz in SPARTA_DATA (repeated) or random.
Photographs: 2,000 JPEG of about 500 x 400, random resized crop to 224 and flip, batch 64; memory holds no JPEG. Large:
a file of 2 GB, images of 128 x 128, batch 128, read to its end.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL, PHOTOS, LARGE = "small", "photos", "large"
LOADERS = {
    SMALL: ("ffcv", "memory", "torchvision PIL", "torchvision v2 tensors"),
    PHOTOS: ("ffcv", "torchvision PIL", "torchvision v2 tensors"),
}
BATCH = {SMALL: 512, PHOTOS: 64, LARGE: 128}
SECONDS = 4.0
"""Reading small images and photographs is timed for so long."""


def make(place: Path, num_small: int, num_photos: int, large_gb: float) -> None:
    """Write the source files, and prepare them."""
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
    prepare(_config(DataConfig, place / "small.npz"), place / SMALL, seed=0)
    _photos(place / "source", images, num_photos)
    config = DataConfig(dataset="folder", path=str(place / "source"), storage="jpeg", max_side=512, val_fraction=0.01)
    prepare(config, place / PHOTOS, seed=0)
    if large_gb:
        count = int(large_gb * 1e9 / (128 * 128 * 3))
        _npz(place / "large.npz", rng.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8))
        prepare(_config(DataConfig, place / "large.npz"), place / LARGE, seed=0)
        (place / "large.npz").unlink()


def _config(kind, path):
    return kind(dataset="npz", path=str(path), val_fraction=0.001)


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

    crop = RandomResizedCropConfig() if what == PHOTOS else None
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


def child(place: Path, what: str, loader: str, workers: int) -> dict[str, float]:
    """One epoch, in this process: images/s, peak memory above the imports, seconds to the first batch."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    os.sched_setaffinity(0, cores)
    import psutil
    import torch

    import pipeline.data

    if what == LARGE:
        import pipeline.data.beton  # noqa: F401, so that the peak is above this import too

    torch.set_num_threads(workers)
    me = psutil.Process()

    def memory():
        return sum(p.memory_info().rss for p in [me, *me.children(recursive=True)])

    base, peak, count, start = memory(), 0, 0, time.perf_counter()
    batches = iter(opened(place, what, loader, workers))
    next(batches)
    first = steady = time.perf_counter()
    for number, (x, _) in enumerate(batches):
        count += len(x)
        if number % 16 == 0:
            peak = max(peak, memory())
        if what != LARGE and time.perf_counter() - steady > SECONDS:
            break
    rate = count / (time.perf_counter() - steady)
    return {"rate": rate, "peak": (max(peak, memory()) - base) / 2**20, "first": first - start}


def wait(place: Path, steps: int = 12) -> dict[str, float]:
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


def run(*arguments: str, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def medians(
    place: Path, what: str, variants: list[tuple[str, int]], repeats: int, cache: Path
) -> list[tuple[tuple[str, int], dict[str, float]]]:
    """Of every (loader, workers), in turn, so that a change of the machine's load meets all of them."""
    rounds = [
        {variant: run(str(place), what, variant[0], str(variant[1]), cache=cache) for variant in variants}
        for _ in range(repeats)
    ]
    return [(v, {key: statistics.median(r[v][key] for r in rounds) for key in rounds[0][v]}) for v in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: to see that it runs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        place, what = Path(options.child[0]), options.child[1]
        result = wait(place) if what == "wait" else child(place, what, options.child[2], int(options.child[3]))
        print(json.dumps(result))
        return
    repeats = 1 if options.quick else 3
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place, cache = Path(folder), Path(folder) / "cache"
        make(place, 5_000 if options.quick else 50_000, 200 if options.quick else 2_000, 0.1 if options.quick else 2)
        report(place, cache, repeats)


def report(place: Path, cache: Path, repeats: int) -> None:
    import torch

    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {cores} cores, load {load:.1f} at the start, median of {repeats}\n")
    cold = run(str(place), SMALL, "ffcv", "1", cache=cache)["first"]
    for what, loaders in LOADERS.items():
        print(f"| {what} | workers | images/s | peak MiB | first batch s |\n|---|---|---|---|---|")
        variants = [(loader, workers) for loader in loaders for workers in (1, 2)[:cores]]
        for (loader, workers), got in medians(place, what, variants, repeats, cache):
            print(
                f"| {loader} | {workers} | {got['rate']:,.0f} | {got['peak']:,.0f} | {got['first']:.2f} |", flush=True
            )
        print()
    ((_, warm),) = medians(place, SMALL, [("ffcv", 1)], repeats, cache)
    print(
        f"First batch through FFCV, import of ffcv included: cold {cold:.2f} s, with the compile cache "
        f"{warm['first']:.2f} s"
    )
    large = run(str(place), LARGE, "ffcv", "1", cache=cache)
    size = (place / LARGE / "train.beton").stat().st_size / 1e9
    print(
        f"Reading a {size:.1f} GB file: peak {large['peak']:,.0f} MiB above the imports, {large['rate']:,.0f} images/s"
    )
    waiting = run(str(place), "wait", cache=cache)
    print(
        f"PGD-10 training of ResNet-8, batch 128: {waiting['share']:.2%} of {waiting['step']:.2f} s per step is waiting"
    )


if __name__ == "__main__":
    main()
