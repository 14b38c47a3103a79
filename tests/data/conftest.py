"""Small data sets, prepared once per session: writing through FFCV starts a process that takes seconds."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data import PreparedData, prepare

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARTA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_npz(path: Path, *, train: int = 60, test: int = 20, classes: int = 3, size: int = 12, **changes) -> Path:
    """A small RGB data set of random pixels; `changes` replace arrays (None removes one)."""
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (train, size, size, 3), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, size, size, 3), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


@pytest.fixture(scope="session")
def rgb_config(tmp_path_factory) -> DataConfig:
    path = write_npz(tmp_path_factory.mktemp("source") / "random.npz")
    return DataConfig(dataset="npz", path=str(path), val_fraction=0.25)


@pytest.fixture(scope="session")
def rgb(rgb_config, tmp_path_factory) -> PreparedData:
    """RGB images in .beton files."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed")
    return prepare(rgb_config, tmp_path_factory.mktemp("rgb"), seed=0)


@pytest.fixture(scope="session")
def rgb_npz(rgb_config, tmp_path_factory) -> PreparedData:
    """The same, in .npz files, as where FFCV is missing."""
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="read into memory"):
        patch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
        return prepare(rgb_config, tmp_path_factory.mktemp("rgb_npz"), seed=0)


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A smooth random picture, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_folder(root: Path, *, classes: int = 2, images: int = 8) -> Path:
    """CLASS/FILE, JPEG images of different shapes."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(images):
            picture(100 * label + number, 90 + 5 * number, 120 - 4 * number).save(
                root / f"class{label}" / f"{number:02d}.jpg", quality=95
            )
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> PreparedData:
    """JPEG images of different shapes in .beton files."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed")
    root = write_folder(tmp_path_factory.mktemp("photos"))
    config = DataConfig(dataset="folder", path=str(root), image_size=48, storage="jpeg", max_side=100)
    return prepare(config, tmp_path_factory.mktemp("photos_prepared"), seed=0)
