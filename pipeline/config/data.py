"""Which images, how they are split, stored and read, and how they are augmented while training."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.config.tracking import has_password

DatasetName = Literal[
    "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "gtsrb", "stl10", "npz", "folder"
]
LoaderName = Literal["auto", "ffcv", "memory"]
Positive = Field(None, ge=1)


class SplitLimits(Section):
    """At most so many images per split, drawn at random with the classes in proportion; None keeps all."""

    train: int | None = Positive
    """Largest number of training images."""
    val: int | None = Positive
    """Largest number of validation images."""
    test: int | None = Positive
    """Largest number of test images."""


class DataConfig(Section):
    """A data set and how it becomes verified splits on disk."""

    dataset: DatasetName = "digits"
    """digits: scikit-learn's, embedded. mnist ... stl10: through torchvision. npz and folder: your own, at `path`."""
    path: str | None = None
    """npz: a file or an fsspec URL; folder: a local ImageFolder tree. What is not found here is looked up in
    SPARTA_DATA."""
    root: Path = Path("data")
    """Where torchvision's data sets lie, or are downloaded to."""
    classes: tuple[int | str, ...] | None = None
    """Keep these classes only (by number or name), relabelled 0, 1, ... in the order given; None keeps all."""
    image_size: int | None = Field(None, ge=1, le=4096)
    """Side of the square images that the loader yields; None takes the size the source has (folder: 224, gtsrb: 32)."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; the images are converted. None keeps what the source has (folder: 3)."""
    limit: SplitLimits = SplitLimits()
    """Upper limits on the size of each split."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images held out for selection, where the source has no validation split of its own."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share held out for testing, where the source has no test split (digits, a folder without train/ and test/)."""
    group_pattern: str | None = None
    """folder: a regular expression on the relative path; its first group names the group (for example the video) that
    must not straddle training and validation."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """folder: what to do with files that do not decode. skip leaves them out and lists them in bad_images.txt."""
    storage: Literal["auto", "raw", "jpeg"] = "auto"
    """raw: pixels at image_size. jpeg: compressed at up to max_side, cropped and resized while loading.
    auto: jpeg for RGB folders with image_size above 64 where FFCV is installed, otherwise raw."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Quality of the stored JPEG images."""
    max_side: int = Field(512, ge=16, le=8192)
    """Longest side of the stored JPEG images."""
    loader: LoaderName = "auto"
    """ffcv streams from the file; memory holds the split as one tensor, which with storage=auto means raw pixels.
    auto: ffcv where it is installed."""
    writers: int = Field(0, ge=0)
    """Processes in which FFCV writes a split; 0 takes one per core (1 below 10,000 images)."""
    timeout: float = Field(3600 * 6.0, gt=0)
    """Seconds after which writing the splits, all of them together, is given up."""
    node_cache: Path | None = None
    """A folder on each node's own disk: files are copied there once per node, verified, and read from there."""
    mirror: str | None = None
    """An fsspec URL (s3://, gs://, file://) that gets a copy of the prepared files, in a folder named by their digest;
    workers read that copy. For nodes that share no folder."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        needs_path = self.dataset in ("npz", "folder")
        if needs_path and not self.path:
            raise ValueError(
                f"data.dataset={self.dataset} needs data.path; set it to the file or folder with the images"
            )
        if self.path and not needs_path:
            raise ValueError(
                f"data.path={self.path!r} has no meaning for data.dataset={self.dataset}; "
                "set data.dataset to npz or folder, or data.root for torchvision's data sets"
            )
        for key, location in (("path", self.path), ("mirror", self.mirror)):
            if location and has_password(location):
                raise ValueError(
                    f"data.{key} expected an URL without a password, which would stand in every log; "
                    "give it to fsspec's backend, for example by its environment variables"
                )
        if self.dataset == "folder" and self.path and "://" in self.path:
            raise ValueError(
                f"data.path={self.path!r}: data.dataset=folder reads a folder of this machine, not a URL; "
                "copy it here first, or pack the images into an .npz (data.dataset=npz)"
            )
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"data.classes expected at least two different classes, got {list(self.classes)}")
        if self.storage == "jpeg" and self.channels == 1:
            raise ValueError("data.storage=jpeg holds RGB images; set data.channels=3 or data.storage=raw")
        if self.storage == "jpeg" and self.loader == "memory":
            raise ValueError("data.storage=jpeg is decoded by FFCV; set data.storage=raw for data.loader=memory")
        if self.group_pattern is not None:
            _check_pattern(self.group_pattern, self.dataset)
        return self


def _check_pattern(pattern: str, dataset: str) -> None:
    if dataset != "folder":
        raise ValueError(f"data.group_pattern is for data.dataset=folder, got dataset={dataset}; leave it out")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"data.group_pattern={pattern!r} is not a regular expression: {error}") from error
    if groups < 1:
        raise ValueError(f"data.group_pattern={pattern!r} needs a group in parentheses that names the group")


class RandomResizedCropConfig(Section):
    """A random part of the image, resized to the full size (Szegedy et al. 2015, arXiv 1409.4842)."""

    scale: tuple[float, float] = (0.25, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height."""

    @model_validator(mode="after")
    def _ordered(self) -> "RandomResizedCropConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"random_resized_crop.scale expected 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"random_resized_crop.ratio expected 0 < low <= high, got {self.ratio}")
        return self


class ColorJitterConfig(Section):
    """Random brightness, contrast, saturation and hue, each drawn once per image."""

    brightness: float = Field(0.0, ge=0)
    """Factor drawn from [max(0, 1 - b), 1 + b]."""
    contrast: float = Field(0.0, ge=0)
    """Factor drawn from [max(0, 1 - c), 1 + c], about the image's mean grey level."""
    saturation: float = Field(0.0, ge=0)
    """Factor drawn from [max(0, 1 - s), 1 + s]; RGB only."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Shift drawn from [-h, h] turns of the colour circle; RGB only."""


class AugmentConfig(Section):
    """What happens to a training image before the attack sees it. Everything off leaves the image as it is."""

    pad_crop: int = Field(4, ge=0)
    """Shift by up to so many pixels in each direction, zeros coming in; 0 turns it off."""
    flip: bool = True
    """Mirror left to right with probability 1/2 (turn off for digits and traffic signs)."""
    cutout: int = Field(0, ge=0)
    """Side of a square set to zero at a random place (DeVries & Taylor 2017, arXiv 1708.04552); 0 turns it off."""
    random_resized_crop: RandomResizedCropConfig | None = None
    """A random part of the image, resized; instead of pad_crop."""
    color_jitter: ColorJitterConfig | None = None
    """Random brightness, contrast, saturation and hue."""

    @model_validator(mode="before")
    @classmethod
    def _instead_of_the_default_crop(cls, given: Any) -> Any:
        """Said outright, so that it is still so when the whole is written out and read again."""
        if isinstance(given, Mapping) and given.get("random_resized_crop") is not None:
            return {"pad_crop": 0, **given}
        return given

    @model_validator(mode="after")
    def _one_crop(self) -> "AugmentConfig":
        if self.random_resized_crop is not None and self.pad_crop > 0:
            raise ValueError(
                f"augment.pad_crop={self.pad_crop} and augment.random_resized_crop are both set; "
                "set pad_crop=0 or leave random_resized_crop out"
            )
        return self
