"""Makers of small data sets that several test files share."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import sha256_of
from pipeline.data.sidecar import sampled_digest, sidecar_path

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")


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


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A smooth random picture, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, *, classes: int = 2, images: int = 8) -> Path:
    """CLASS/FILE, JPEG images of different shapes."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(images):
            picture(100 * label + number, 90 + 5 * number, 120 - 4 * number).save(
                root / f"class{label}" / f"{number:02d}.jpg", quality=95
            )
    return root


def edit_sidecar(path: Path, **changes: object) -> None:
    place = sidecar_path(path)
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


def vouch_for(path: Path) -> None:
    """Make the sidecar agree with what the file holds now, so that only its content can give it away."""
    digests = {"sha256": sha256_of(path), "sampled": sampled_digest(path), "size": path.stat().st_size}
    edit_sidecar(path, **digests)
    record = path.parent / "prepared.json"
    content = json.loads(record.read_text())
    content["splits"][path.stem]["sha256"] = digests["sha256"]
    record.write_text(json.dumps(content))
