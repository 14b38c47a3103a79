"""Torchvision's data sets from files in their real formats, tiny and written here, read by torchvision's own readers.

The readers compare the files with published MD5 digests; here those are replaced by the digests of what was written.
"""

import hashlib
import pickle
import struct
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_sets import picture
from scipy.io import savemat
from torchvision import datasets

from pipeline.config.data import DataConfig
from pipeline.data import DataError, prepare, vision
from pipeline.data.sources import Source, open_source

DRAWS = np.random.default_rng(0)
NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pixels(*shape):
    return DRAWS.integers(0, 256, shape, dtype=np.uint8)


def images(source: Source, split: str) -> np.ndarray:
    return np.stack([np.asarray(source.splits[split].images[i]) for i in range(len(source.splits[split].images))])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def know(monkeypatch, kind, folder: Path, lists=("train_list", "test_list")):
    """Let torchvision take the files in `folder` for the published ones."""
    for name in lists:
        monkeypatch.setattr(kind, name, [[file, md5(folder / file)] for file, _ in getattr(kind, name)])


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's format: two zero bytes, type 8 (unsigned bytes), number of dimensions, sizes big-endian, values."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True)
    written = {}
    for split, prefix, count in (("train", "train", 30), ("test", "t10k", 10)):
        written[split] = pixels(count, 28, 28), np.arange(count) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte", written[split][0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", written[split][1])
    return written


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files_are_grey_images(tmp_path, dataset, folder):
    written = write_mnist(tmp_path / folder / "raw")
    source = open_source(DataConfig(dataset=dataset, root=tmp_path))
    for split, (x, y) in written.items():
        assert (images(source, split) == x).all()
        assert source.splits[split].labels.tolist() == y.tolist()
    assert (source.size, source.channels, len(source.class_names)) == (28, 1, 10)


@pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")
def test_idx_files_are_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
    write_mnist(tmp_path / "MNIST" / "raw")
    config = DataConfig(dataset="mnist", root=tmp_path, val_fraction=0.34)
    prepared = prepare(config, tmp_path / "out", seed=0)
    assert (prepared.channels, prepared.image_size, prepared.num_classes) == (1, 28, 10)
    assert {name: split.count for name, split in prepared.splits.items()} == {"train": 20, "val": 10, "test": 10}


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x08\x03" + b"\0\0\0\x1e" * 3 + b"short", b"x" * 900])
def test_damaged_idx_files_are_one_readable_error(tmp_path, content):
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset=mnist: not in .*, or damaged there.*Put MNIST/raw"):
        open_source(DataConfig(dataset="mnist", root=tmp_path))


def write_cifar(folder: Path, files: list[str], label_key: str) -> dict[str, np.ndarray]:
    folder.mkdir()
    written = {name: pixels(10, 3, 32, 32) for name in files}
    for name, planar in written.items():
        content = {"data": planar.reshape(10, -1), label_key: list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    return written


def write_cifar10(monkeypatch, root: Path) -> dict[str, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    written = write_cifar(folder, [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"], "labels")
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    know(monkeypatch, datasets.CIFAR10, folder)
    meta = {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return written


def test_cifar10_batches_are_joined_and_turned(monkeypatch, tmp_path):
    written = write_cifar10(monkeypatch, tmp_path)
    source = open_source(DataConfig(dataset="cifar10", root=tmp_path))
    assert source.class_names == tuple(NAMES)
    train = np.concatenate([written[f"data_batch_{n}"] for n in range(1, 6)])
    assert (images(source, "train") == train.transpose(0, 2, 3, 1)).all()
    assert (images(source, "test") == written["test_batch"].transpose(0, 2, 3, 1)).all()
    assert source.splits["test"].labels.tolist() == list(range(10))


def test_cifar100_has_the_fine_labels(monkeypatch, tmp_path):
    folder = tmp_path / "cifar-100-python"
    written = write_cifar(folder, ["train", "test"], "fine_labels")
    names = [f"class {n}" for n in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    know(monkeypatch, datasets.CIFAR100, folder)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5(folder / "meta")})
    source = open_source(DataConfig(dataset="cifar100", root=tmp_path))
    assert (images(source, "train") == written["train"].transpose(0, 2, 3, 1)).all()
    assert source.class_names == tuple(names)


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_a_pickle_that_is_not_the_published_one_is_never_opened(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    write_cifar10(monkeypatch, tmp_path)
    trace = tmp_path / "was here"
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # it would work
    trace.unlink()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(DataError, match="dataset=cifar10: not in"):
        open_source(DataConfig(dataset="cifar10", root=tmp_path))
    assert not trace.exists()


def test_svhn_digits_count_from_zero(monkeypatch, tmp_path):
    """In the .mat files images lie along the last axis, and the digit 0 has the label 10."""
    x, y = pixels(32, 32, 3, 4), np.array([[10], [1], [2], [9]], dtype=np.uint8)
    files = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
    for file in files.values():
        savemat(tmp_path / file, {"X": x, "y": y})
    known = {split: ["", file, md5(tmp_path / file)] for split, file in files.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", {**datasets.SVHN.split_list, **known})
    source = open_source(DataConfig(dataset="svhn", root=tmp_path))
    assert (images(source, "test") == x.transpose(3, 0, 1, 2)).all()
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 9]
    assert (source.size, source.channels, len(source.class_names)) == (32, 3, 10)


def test_stl10_is_column_by_column(monkeypatch, tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    x = pixels(4, 3, 96, 96)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(x.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([4, 2, 3, 1]))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    (folder / "fold_indices.txt").write_text("")
    know(monkeypatch, datasets.STL10, folder)
    source = open_source(DataConfig(dataset="stl10", root=tmp_path))
    assert (images(source, "train") == x.transpose(0, 3, 2, 1)).all()
    assert source.splits["train"].labels.tolist() == [3, 1, 2, 0]
    assert (source.size, source.class_names) == (96, tuple(NAMES))


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "gtsrb", "stl10"])
def test_offline_says_where_the_files_belong(monkeypatch, tmp_path, dataset):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError, match=f"dataset={dataset}: not in .*no route to host.* Put .* into .*{tmp_path}"):
        open_source(DataConfig(dataset=dataset, root=tmp_path))


def test_two_at_once_download_once(tmp_path):
    """Torchvision would write the same files twice at the same time."""
    downloads = []

    def factory(*, train, root, download):
        if download:
            downloads.append(1)
            time.sleep(0.3)
            (root / "files").touch()
        if not (root / "files").exists():
            raise RuntimeError("Dataset not found")
        return train

    config = DataConfig(dataset="mnist", root=tmp_path / "root")
    with ThreadPoolExecutor(2) as pool:  # each opens the lock's file for itself, as processes do
        opened = [pool.submit(vision._opened, factory, config, True) for _ in range(2)]
    assert [done.result() for done in opened] == [True, True]
    assert len(downloads) == 1


def test_gtsrb_tracks_are_groups(tmp_path):
    for label in range(2):
        folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for track in range(3):
            for frame in range(2):
                picture(track, 30, 33).save(folder / f"{track:05d}_{frame:05d}.ppm")
    test = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    picture(9, 30, 30).save(test / "00000.ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;1\n")
    source = open_source(DataConfig(dataset="gtsrb", root=tmp_path))
    assert source.splits["train"].groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert source.splits["test"].labels.tolist() == [1]
    assert source.size == 32
