"""Data set -> verified splits on disk, once."""

import json
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from pipeline.artifacts import DISK_FULL
from pipeline.config.data import DataConfig
from pipeline.data.apart import FfcvUnusableError, ffcv_installed, write_apart
from pipeline.data.errors import DataError, FfcvMissingWarning
from pipeline.data.paths import resolve_path
from pipeline.data.prepared import PreparedData, SplitInfo, data_digest
from pipeline.data.readers import open_reader
from pipeline.data.remote import publish
from pipeline.data.samples import Samples
from pipeline.data.sidecar import RECORD_NAME, Sidecar, Storage, read_sidecar, sampled_digest, write_json
from pipeline.data.sources import BAD_IMAGES, Source, open_source
from pipeline.data.splits import Selection, select
from pipeline.data.write import SplitRecipe, SplitWork, write_split

_PLACES = {"path", "root", "writers", "timeout", "loader", "node_cache", "mirror"}
"""Settings that say where and how, not what: changing them does not change the data, with one exception: of folders
above 64 pixels, `loader` decides what storage=auto means (`_storage`)."""
_LARGE = 64
_NUM_GLIMPSED = 10_000
_BUILDING = ".building-"


def prepare(config: DataConfig, directory: Path, *, seed: int) -> PreparedData:
    """Write train, val and test of a data set to `directory`, or return what is already there and still matches.

    Two processes that prepare the same folder at once do it once: the second waits. Everything is written under
    temporary names and verified before it takes the place of what was there.

    Raises:
        DataError: bad input, with what was expected, what came and what to do. The folder is left as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        for stale in directory.glob(f"{_BUILDING}*"):
            shutil.rmtree(stale)
        request = _request(config, seed)
        existing = _existing(directory, config, request)
        if existing is None:
            _build(config, directory, seed, request)
        else:
            use = {"loader": config.loader, "node_cache": config.node_cache}
            write_json(directory / RECORD_NAME, existing.model_copy(update=use).model_dump(mode="json"))
        if config.mirror is not None:
            publish(directory, config.mirror)
    return PreparedData.load(directory)


def identity(config: DataConfig, *, planning: bool = False) -> dict[str, Any]:
    """What the data depends on besides the seed, as JSON: the settings that matter, and a stamp of the user's files.

    Raises:
        DataError: the file or folder is not there; when `planning`, it then has no stamp.
    """
    try:
        stamp = _source_stamp(config)
    except DataError:
        if not planning:
            raise
        stamp = None
    # 2: the digest of JPEG data covers image_size. Those that were prepared before it did are prepared again.
    version = {"version": 2} if _may_be_jpeg(config) else {}
    return {**config.model_dump(mode="json", exclude=_PLACES), "source": stamp, **version}


def _request(config: DataConfig, seed: int) -> str:
    return sha256(json.dumps([identity(config), seed], sort_keys=True).encode()).hexdigest()


def _source_stamp(config: DataConfig) -> Any:
    """Tells a changed file or folder from an unchanged one, wherever it lies."""
    if config.path is None:
        return None
    path = resolve_path(config.path, "data.path")
    if path.is_file():
        return [path.stat().st_size, sampled_digest(path)]
    files = [p for p in sorted(path.rglob("*")) if p.is_file()]
    listed = [[str(p.relative_to(path)), p.stat().st_size] for p in files]
    # Of a large folder some files only: this is done whenever a chain starts.
    with ThreadPoolExecutor() as pool:
        glimpses = list(pool.map(_glimpse, files[:: max(1, -(-len(files) // _NUM_GLIMPSED))]))
    return sha256(json.dumps([listed, glimpses]).encode()).hexdigest()


def _glimpse(path: Path) -> str:
    """Digest of a file's first, middle and last 4 KiB."""
    try:
        return sampled_digest(path, 3)
    except OSError:  # the source will say what is wrong with it
        return ""


def _existing(directory: Path, config: DataConfig, request: str) -> PreparedData | None:
    """What is there, if it is whole, what is asked for, and can be read here."""
    try:
        prepared = PreparedData.load(directory)
        if prepared.request != request:
            return None
        for split in prepared.splits:
            path = prepared.check(split)
            storage = _storage(config, prepared.image_size, prepared.channels, path.suffix)
            if prepared.storage != storage or (config.loader == "ffcv" and path.suffix == ".npz"):
                return None
            if path.suffix == ".beton":
                _check_readable(path, prepared.sidecar(split))
    except DataError:
        return None
    return prepared


def _check_readable(path: Path, sidecar: Sidecar) -> None:
    """Raise a DataError where FFCV is no longer installed, or no longer imports."""
    if not ffcv_installed():
        raise DataError(f"{path}: ffcv is not installed")
    open_reader(path, sidecar).close()


def _build(config: DataConfig, directory: Path, seed: int, request: str) -> None:
    source = open_source(config)
    chosen, class_names = select(source, config, seed)
    suffix = ".beton" if ffcv_installed() else ".npz"
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=directory) as place:
        try:
            sidecars = _write_all(source, chosen, class_names, config, Path(place), suffix)
        except FfcvUnusableError as error:
            suffix = ".npz"
            sidecars = _write_all(source, chosen, class_names, config, Path(place), suffix, str(error))
        record = _record(source, class_names, config, sidecars, suffix, request)
        for split in sidecars:
            for name in (f"{split}{suffix}", f"{split}{suffix}.json"):
                (Path(place) / name).replace(directory / name)
        report = directory / BAD_IMAGES
        report.write_text(
            "".join(f"{line}\n" for line in source.bad_images), encoding="utf-8", errors="backslashreplace"
        )
        # Last, so that a folder with this record is complete.
        write_json(directory / RECORD_NAME, record.model_dump(mode="json"))


def _write_all(  # noqa: PLR0917
    source: Source,
    chosen: dict[str, Selection],
    class_names: tuple[str, ...],
    config: DataConfig,
    place: Path,
    suffix: str,
    reason: str = "not installed",
) -> dict[str, Sidecar]:
    if suffix == ".npz":
        _announce_fallback(config, reason)
    size = _image_size(config, source)
    channels: Literal[1, 3] = config.channels or (3 if source.channels == 3 else 1)
    storage = _storage(config, size, channels, suffix)
    work = {}
    for split, part in chosen.items():
        images = source.splits[part.origin].images
        side = size if storage == "raw" else None
        samples = Samples(images, part.indices, part.labels, channels, size=side, max_side=config.max_side)
        recipe = SplitRecipe(
            source=source.name,
            split=split,
            origin=part.origin,
            storage=storage,
            image_size=size,
            num_classes=len(class_names),
            jpeg_quality=config.jpeg_quality,
            writers=config.writers,
        )
        work[split] = SplitWork(samples, place / f"{split}{suffix}", recipe)
    _write(list(work.values()), place, config.timeout)
    return {split: read_sidecar(item.path) for split, item in work.items()}


def _write(work: list[SplitWork], place: Path, timeout: float) -> None:
    if work[0].path.suffix == ".beton":
        write_apart(work, place, timeout)
        return
    deadline = time.monotonic() + timeout
    for item in work:
        try:
            write_split(item, terminal=sys.stderr if sys.stderr.isatty() else None, deadline=deadline)
        except OSError as error:
            if error.errno in DISK_FULL:  # not the data's fault
                raise
            raise DataError(f"writing {item.path.name} failed: {error}") from error


def _announce_fallback(config: DataConfig, reason: str) -> None:
    if config.loader == "ffcv":
        raise DataError(
            f"data.loader=ffcv, but ffcv cannot be used here ({reason}); install it or set data.loader=auto"
        )
    if config.storage == "jpeg":
        raise DataError(f"data.storage=jpeg needs ffcv, which cannot be used here ({reason}); set data.storage=raw")
    warnings.warn(
        f"ffcv cannot be used here ({reason}): splits are stored as .npz and read into memory",
        FfcvMissingWarning,
        stacklevel=5,
    )


def _image_size(config: DataConfig, source: Source) -> int:
    size = config.image_size or source.size
    if size is None:
        raise DataError(f"{source.name}: the images are not all of one square size; set data.image_size")
    return size


def _storage(config: DataConfig, size: int, channels: int, suffix: str) -> Storage:
    if config.storage == "jpeg" and channels == 1:
        raise DataError("data.storage=jpeg holds RGB images; set data.channels=3 or data.storage=raw")
    jpeg = wants_jpeg(config, size, channels) and (config.storage == "jpeg" or suffix == ".beton")
    return "jpeg" if jpeg else "raw"


def wants_jpeg(config: DataConfig, size: int, channels: int) -> bool:
    """Whether images of this size are stored as JPEG where FFCV, which alone can decode it, is there."""
    if config.storage != "auto":
        return config.storage == "jpeg"
    return config.dataset == "folder" and size > _LARGE and channels == 3 and config.loader != "memory"


def _may_be_jpeg(config: DataConfig) -> bool:
    """What `_storage` can come to, whatever the loader, and whether FFCV is here."""
    large = config.image_size is None or config.image_size > _LARGE
    auto = config.storage == "auto" and config.dataset == "folder" and large and config.channels != 1
    return auto or config.storage == "jpeg"


def _record(  # noqa: PLR0917
    source: Source,
    class_names: tuple[str, ...],
    config: DataConfig,
    sidecars: dict[str, Sidecar],
    suffix: str,
    request: str,
) -> PreparedData:
    train = sidecars["train"]
    contents = {split: sidecar.content for split, sidecar in sidecars.items()}
    digest = data_digest(
        class_names=class_names,
        storage=train.storage,
        quality=config.jpeg_quality,
        image_size=train.image_size,
        contents=contents,
    )
    return PreparedData(
        name=source.name if config.classes is None else f"{source.name} {_listed(class_names)}",
        num_classes=len(class_names),
        class_names=class_names,
        channels=train.channels,
        image_size=train.image_size,
        mean=train.mean,
        std=train.std,
        storage=train.storage,
        splits={
            split: SplitInfo(
                file=f"{split}{suffix}",
                count=sidecar.count,
                class_counts=sidecar.class_counts,
                content=sidecar.content,
                sha256=sidecar.sha256,
            )
            for split, sidecar in sidecars.items()
        },
        digest=digest,
        loader=config.loader,
        node_cache=config.node_cache,
        request=request,
    )


def _listed(class_names: tuple[str, ...]) -> str:
    """A subset of the classes, in words short enough for a table: "5-9", "cat, dog"."""
    first, last = class_names[0], class_names[-1]
    if first.isdigit() and class_names == tuple(str(int(first) + i) for i in range(len(class_names))):
        return f"{first}-{last}"
    return ", ".join(class_names) if len(class_names) <= 6 else f"{len(class_names)} classes"
