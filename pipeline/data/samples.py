"""Images made ready to be written: channels, size and labels as configured, and a ledger of what was written."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.data.sources import ImageSequence

Pixels = npt.NDArray[np.uint8]

RECORD = np.dtype([("digest", "u1", (16,)), ("sum", "<u8", (3,)), ("squares", "<u8", (3,)), ("count", "<u8")])
"""What the ledger keeps of every sample: a digest of label and pixels, and per-channel sums (exact, so order-free)."""


@dataclass(frozen=True)
class Samples:
    """One split, image by image: (uint8 (H, W, C), label). Indexable and picklable, as FFCV's writer asks."""

    images: ImageSequence
    indices: npt.NDArray[np.int64]
    """Positions in `images`."""
    labels: npt.NDArray[np.int64]
    channels: Literal[1, 3]
    size: int | None
    """Side of the square images; None keeps the shape, up to `max_side` (for JPEG)."""
    max_side: int = 0
    ledger: Path | None = None
    """File that takes a `RECORD` per sample, filled while the samples are read."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        pixels = to_channels(self.images[int(self.indices[index])], self.channels)
        pixels = fit(pixels, self.size) if self.size else shrink(pixels, self.max_side)
        label = int(self.labels[index])
        if self.ledger is not None:
            self._records[index] = record(pixels, label)
        return pixels, label

    @cached_property
    def _records(self) -> npt.NDArray[Any]:
        assert self.ledger is not None
        return np.memmap(self.ledger, RECORD, "r+", shape=(len(self),))


def record(pixels: Pixels, label: int) -> Any:
    """The ledger's entry of one image (H, W, C)."""
    entry = np.zeros((), RECORD)
    digest = blake2b(f"{label} {pixels.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    entry["digest"] = np.frombuffer(digest.digest(), np.uint8)
    flat = pixels.reshape(-1, pixels.shape[2])
    entry["sum"][: pixels.shape[2]] = flat.sum(0, dtype=np.uint64)
    entry["squares"][: pixels.shape[2]] = np.einsum("nc,nc->c", flat, flat, dtype=np.uint64, casting="unsafe")
    entry["count"] = len(flat)
    return entry


def moments(ledger: npt.NDArray[Any], channels: int) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation in [0, 1], from a ledger."""
    count = float(ledger["count"].sum())
    mean = ledger["sum"].sum(0)[:channels] / count
    variance = np.maximum(ledger["squares"].sum(0)[:channels] / count - mean**2, 0)
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in np.sqrt(variance)]


def to_channels(image: Any, channels: Literal[1, 3]) -> Pixels:
    """Any PIL image or uint8 array as uint8 (H, W, channels)."""
    if isinstance(image, np.ndarray):
        pixels = image if image.ndim == 3 else image[:, :, None]
        if pixels.shape[2] == channels:
            return pixels
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    # A camera stores "turn me" in EXIF; 16-bit greys must be scaled, since PIL's own conversion clips them.
    image = _eight_bit(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    return image


def fit(pixels: Pixels, size: int) -> Pixels:
    """Shorter side to `size` (bilinear, antialiased), then the centre square."""
    height, width = pixels.shape[:2]
    if height != size or width != size:
        scale = size / min(height, width)
        pixels = _resize(pixels, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def shrink(pixels: Pixels, max_side: int) -> Pixels:
    """Longer side to at most `max_side`, the shape kept."""
    height, width = pixels.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(pixels)
    return _resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return resized if resized.ndim == 3 else resized[:, :, None]
