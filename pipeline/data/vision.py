"""Torchvision's data sets, downloaded when absent.

CIFAR's files are Python pickles. Torchvision compares them with the published MD5 digests before it opens any of them,
so only the authors' own bytes are ever unpickled; SVHN and STL-10 are compared likewise, and hold arrays alone.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pipeline.config.data import DataConfig
from pipeline.data.errors import DataError
from pipeline.data.folder import FileImages
from pipeline.data.sources import Source, SourceSplit

_FILES = {
    "mnist": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
    "fashion_mnist": "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "gtsrb": "gtsrb/GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, unpacked",
    "stl10": "stl10_binary.tar.gz",
}


def vision_source(config: DataConfig) -> Source:
    """MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN, GTSRB or STL-10 from `config.root`.

    Raises:
        DataError: the files are neither there nor to be had; says which belong where.
    """
    from torchvision import datasets

    open_split: dict[str, Callable[..., Any]] = {
        "mnist": lambda train, **rest: datasets.MNIST(train=train, **rest),
        "fashion_mnist": lambda train, **rest: datasets.FashionMNIST(train=train, **rest),
        "cifar10": lambda train, **rest: datasets.CIFAR10(train=train, **rest),
        "cifar100": lambda train, **rest: datasets.CIFAR100(train=train, **rest),
        "svhn": lambda train, **rest: datasets.SVHN(split="train" if train else "test", **rest),
        "gtsrb": lambda train, **rest: datasets.GTSRB(split="train" if train else "test", **rest),
        "stl10": lambda train, **rest: datasets.STL10(split="train" if train else "test", **rest),
    }
    opened = {split: _opened(open_split[config.dataset], config, train) for split, train in _SPLITS.items()}
    splits = {split: _split(dataset) for split, dataset in opened.items()}
    names = _class_names(opened["train"], splits["train"])
    grey = config.dataset in ("mnist", "fashion_mnist")
    size = 28 if grey else 96 if config.dataset == "stl10" else 32
    return Source(config.dataset, names, splits, size=size, channels=1 if grey else 3)


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"data.dataset={config.dataset}: not in {root.absolute()}, or damaged there, and the download failed "
            f"({reason}). Put {_FILES[config.dataset]} into {root.absolute()}, or set data.root to where it is"
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
