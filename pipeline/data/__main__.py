"""Look into prepared data: `python -m pipeline.data inspect FILE.beton|FILE.npz [--grid PICTURE.png]`."""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.augment import center_boxes
from pipeline.data.errors import DataError
from pipeline.data.prepared import PreparedData
from pipeline.data.readers import Reader, open_reader
from pipeline.data.sidecar import Sidecar, check_file, read_sidecar

_COLUMNS, _ROWS = 12, 8


def main(arguments: list[str] | None = None) -> int:
    """Print what a split file holds and write a grid of its images. Exit code 0, or 2 if it cannot be opened."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="check a split file, describe it, and write a grid of its images")
    inspect.add_argument("file", type=Path, help="a .beton or .npz written by the prepare stage")
    inspect.add_argument("--grid", type=Path, help="where the picture goes (default: FILE.png in the current folder)")
    options = parser.parse_args(arguments)
    try:
        _inspect(options.file, options.grid or Path(f"{options.file.stem}.png"))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _inspect(path: Path, grid: Path) -> None:
    sidecar = read_sidecar(path)
    check_file(path, sidecar)
    reader = open_reader(path, sidecar)
    try:
        print(_described(path, sidecar))
        _save(picture(reader), grid)
    finally:
        reader.close()
    print(f"{'grid':<14}{grid}")


def _save(image: Image.Image, place: Path) -> None:
    try:
        image.save(place)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no format
        raise DataError(f"--grid={place}: cannot be written ({error}); name a .png in a folder of yours") from error


def _described(path: Path, sidecar: Sidecar) -> str:
    shown = sidecar.model_dump(exclude={"indices", "class_counts", "fields"})
    lines = [str(path)] + [f"{key:<14}{_text(value)}" for key, value in shown.items()]
    lines += [f"field {name:<8}{kind}" for name, kind in sidecar.fields.items()]
    names = _class_names(path, sidecar)
    width = max(map(len, names)) + 2
    return "\n".join(
        [*lines, "class counts"]
        + [f"  {name:<{width}}{count:>8,}" for name, count in zip(names, sidecar.class_counts, strict=True)]
    )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{part:.4f}" for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _class_names(path: Path, sidecar: Sidecar) -> list[str]:
    """From the record beside the file, if it is a record and the file's."""
    numbers = [str(n) for n in range(len(sidecar.class_counts))]
    try:
        prepared = PreparedData.load(path.parent)
    except DataError:
        return numbers
    mine = sidecar.sha256 in {split.sha256 for split in prepared.splits.values()}
    return list(prepared.class_names) if mine and len(prepared.class_names) == len(numbers) else numbers


def picture(reader: Reader) -> Image.Image:
    """A grid of up to 96 images spread over the split, sorted by class."""
    number = min(_COLUMNS * _ROWS, reader.num_samples)
    by_class = np.argsort(reader.labels, kind="stable")
    chosen = by_class[np.linspace(0, reader.num_samples - 1, number).astype(np.int64)]
    boxes = center_boxes(reader.shapes[chosen]) if reader.storage == "jpeg" else None
    images = reader.read(chosen, boxes)
    rows, step = -(-number // _COLUMNS), reader.size + 1
    canvas = np.full((rows * step + 1, _COLUMNS * step + 1, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // _COLUMNS * step + 1, place % _COLUMNS * step + 1
        canvas[top : top + reader.size, left : left + reader.size] = image
    zoom = max(1, 48 // reader.size)
    return Image.fromarray(canvas.repeat(zoom, 0).repeat(zoom, 1))


if __name__ == "__main__":
    sys.exit(main())
