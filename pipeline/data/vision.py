"""Torchvision's data sets, downloaded when absent.

CIFAR's files are Python pickles. Torchvision compares them with the published MD5 digests before it opens any of them,
so only the authors' own bytes are ever unpickled; SVHN and STL-10 are compared likewise, and hold arrays alone.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from pipeline.config.data import DataConfig
from pipeline.data.errors import DataError
from pipeline.data.folder import FileImages
from pipeline.data.sources import Source, SourceSplit

_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"


class VisionSet(NamedTuple):
    """One of torchvision's data sets, as it delivers it."""

    kind: str
    """Its class there."""
    files: str
    """What belongs below `data.root`, for those who put it there themselves."""
    train: int
    """Training images."""
    test: int
    """Test images."""
    num_classes: int
    side: int = 32
    """Of the square images that are made of it."""
    channels: int = 3
    by_split: bool = False
    """Whether it is opened by split="train" or "test", not by train=True or False."""


VISION_SETS = {
    "mnist": VisionSet("MNIST", f"MNIST/raw/{_IDX}", 60_000, 10_000, 10, side=28, channels=1),
    "fashion_mnist": VisionSet("FashionMNIST", f"FashionMNIST/raw/{_IDX}", 60_000, 10_000, 10, side=28, channels=1),
    "cifar10": VisionSet("CIFAR10", "cifar-10-python.tar.gz", 50_000, 10_000, 10),
    "cifar100": VisionSet("CIFAR100", "cifar-100-python.tar.gz", 50_000, 10_000, 100),
    "svhn": VisionSet("SVHN", "train_32x32.mat and test_32x32.mat", 73_257, 26_032, 10, by_split=True),
    "gtsrb": VisionSet(
        "GTSRB",
        "gtsrb/GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, unpacked",
        26_640,
        12_630,
        43,
        by_split=True,
    ),
    "stl10": VisionSet("STL10", "stl10_binary.tar.gz", 5_000, 8_000, 10, side=96, by_split=True),
}


def vision_source(config: DataConfig) -> Source:
    """MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN, GTSRB or STL-10 from `config.root`.

    Raises:
        DataError: the files are neither there nor to be had; says which belong where.
    """
    from torchvision import datasets

    known = VISION_SETS[config.dataset]
    kind = getattr(datasets, known.kind)

    def factory(*, train: bool, **rest: Any) -> Any:
        part = {"split": "train" if train else "test"} if known.by_split else {"train": train}
        return kind(**part, **rest)

    opened = {split: _opened(factory, config, train) for split, train in _SPLITS.items()}
    splits = {split: _split(dataset) for split, dataset in opened.items()}
    names = _class_names(opened["train"], splits["train"])
    return Source(config.dataset, names, splits, size=known.side, channels=known.channels)


_SPLITS = {"train": True, "test": False}


def _opened(factory: Callable[..., Any], config: DataConfig, train: bool) -> Any:
    root = config.root.expanduser()
    # Of MNIST's files torchvision looks at the names alone, so damage shows itself while reading.
    troubles = (OSError, RuntimeError, ValueError, AssertionError, LookupError)
    with suppress(*troubles):
        return factory(train=train, root=root, download=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            with suppress(*troubles):  # another process may have downloaded them while this one waited
                return factory(train=train, root=root, download=False)
            return factory(train=train, root=root, download=True)
    except troubles as error:
        reason, place = " ".join(f"{type(error).__name__}: {error}".split()), root.absolute()
        raise DataError(
            f"data.dataset={config.dataset}: not in {place}, or damaged there, and the download failed "
            f"({reason}). Put {VISION_SETS[config.dataset].files} into {place}, or set data.root to where it is"
        ) from error


def _split(dataset: Any) -> SourceSplit:
    if hasattr(dataset, "_samples"):
        paths = [Path(path) for path, _ in dataset._samples]
        labels = np.array([label for _, label in dataset._samples], dtype=np.int64)
        return SourceSplit(FileImages(paths), labels, _tracks(paths))
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels).astype(np.int64)
    data = np.asarray(dataset.data)
    planar = data.ndim == 4 and data.shape[-1] != 3
    return SourceSplit(data.transpose(0, 2, 3, 1) if planar else data, labels)


def _tracks(paths: list[Path]) -> np.typing.NDArray[np.int64]:
    """GTSRB: CLASS/TRACK_FRAME.ppm; the frames of a track are nearly identical."""
    keys = np.array([f"{path.parent.name}/{path.stem.split('_')[0]}" for path in paths])
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _class_names(dataset: Any, train: SourceSplit) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or range(int(train.labels.max()) + 1)
    return tuple(str(name) for name in names)
