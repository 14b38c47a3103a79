"""A folder of images, one subfolder per class (the layout of torchvision's ImageFolder), of any kind PIL can read."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.errors import DataError
from pipeline.data.paths import resolve_path
from pipeline.data.samples import to_channels
from pipeline.data.sources import Source, SourceSplit

_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
_DRAFT = (64, 64)
_NUM_LISTED = 5


@dataclass(frozen=True)
class FileImages:
    """Image files by position, decoded when asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            with Image.open(self.paths[index]) as image:
                image.load()
                return image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.paths[index]} does not decode: {error}") from error


def folder_source(config: DataConfig) -> Source:
    """The images under `config.path`: CLASS/FILE, or train/CLASS/FILE with test/ and val/ beside it.

    With train/ and val/ but no test/ (as ImageNet comes), val/ is the test split, and a validation split is held out.

    Raises:
        DataError: no images, a class that train lacks, an empty class, or files that do not decode (on_bad_image=fail).
    """
    assert config.path is not None
    root = resolve_path(config.path, "data.path")
    if not root.is_dir():
        raise DataError(f"data.path={config.path!r}: expected a folder of images, got a file; for .npz use dataset=npz")
    folders = _split_folders(root)
    names = _class_names(folders["train"])
    splits, bad = {}, []
    for split, folder in folders.items():
        paths, labels = _files(folder, names)
        reasons = _undecodable(paths)
        bad += [f"{path.relative_to(root)}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
        good = [number for number, reason in enumerate(reasons) if not reason]
        kept = [paths[number] for number in good]
        splits[split] = SourceSplit(FileImages(kept), labels[good], _groups(kept, root, config.group_pattern))
    if bad and config.on_bad_image == "fail":
        listed = "; ".join(bad[:_NUM_LISTED]) + (" ..." if len(bad) > _NUM_LISTED else "")
        raise DataError(f"{root}: {len(bad)} images do not decode: {listed}. Repair them or set data.on_bad_image=skip")
    return Source(root.name, tuple(names), splits, size=224, channels=3, bad_images=tuple(bad))


def _split_folders(root: Path) -> dict[str, Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    found = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    return found


def _class_names(train: Path) -> list[str]:
    names = sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(
            f"{train}: expected one subfolder of images per class (CLASS/FILE, or train/CLASS/FILE), "
            f"got {', '.join(names) or 'none'}"
        )
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{train}: expected class folders with names in UTF-8, got {name!r}; rename it") from None
    return names


def _files(folder: Path, names: list[str]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    unknown = sorted({p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(names))
    if unknown:
        raise DataError(
            f"{folder}: classes {', '.join(unknown[:5])} are not in the training folder; add or remove them"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        entries = list((folder / name).rglob("*"))
        found = sorted(p for p in entries if p.suffix.lower() in _SUFFIXES)
        others = (p for p in entries if p.suffix.lower() not in _SUFFIXES)
        if linked := next((p for p in others if p.is_symlink() and p.is_dir()), None):
            raise DataError(
                f"{linked}: expected a folder, got a link to one, which is not followed; put the images there"
            )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder}: no images ({', '.join(sorted(_SUFFIXES))}); check data.path")
    return paths, np.array(labels, dtype=np.int64)


def _undecodable(paths: list[Path]) -> list[str]:
    """Why each file does not decode, "" where it does. All are read before anything is written."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_reason, paths))


def _reason(path: Path) -> str:
    try:
        with Image.open(path) as image:
            # A JPEG is read whole but only an eighth of each side computed: enough to find the damage.
            image.draft("RGB", _DRAFT)
            to_channels(image, 3)
    except Exception as error:  # what PIL raises on a damaged file depends on its format and on the damage
        return str(error) or type(error).__name__
    return ""


def _groups(paths: list[Path], root: Path, pattern: str | None) -> npt.NDArray[np.int64] | None:
    if pattern is None:
        return None
    keys: list[Any] = []
    for path in paths:
        match = re.search(pattern, path.relative_to(root).as_posix())
        if match is None or match.group(1) is None:
            raise DataError(
                f"data.group_pattern={pattern!r} finds no group in {path.relative_to(root).as_posix()!r}; "
                "every image needs one"
            )
        keys.append(match.group(1))
    return np.unique(np.array(keys), return_inverse=True)[1].astype(np.int64)
