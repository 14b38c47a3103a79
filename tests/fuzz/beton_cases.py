"""Damaged .beton files with sidecars that vouch for them, opened and read: `python -m tests.fuzz.beton_cases FOLDER`.

A process of its own, because what is at stake is compiled code that reads or writes where it must not. Prints how many
files were refused; whatever else than a DataError ends it with a traceback or a signal.
"""

import sys
from pathlib import Path

import numpy as np
from ffcv.types import FieldDescType, HeaderType

from pipeline.artifacts import sha256_of
from pipeline.data import DataError, PreparedData
from pipeline.data.augment import center_boxes
from pipeline.data.beton import Reader
from pipeline.data.readers import open_reader
from pipeline.data.sidecar import Sidecar, check_file, sampled_digest

NUM_CASES = 120
EDGES = [0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


def structure(path: Path) -> list[int]:
    """Offsets of the bytes that say where the images are: header, fields' types and names, samples, allocations."""
    reader = Reader(str(path))
    samples = HeaderType.itemsize + 2 * FieldDescType.itemsize
    fields = [HeaderType.itemsize + n * FieldDescType.itemsize + k for n in range(2) for k in range(20)]
    return [
        *range(HeaderType.itemsize),
        *fields,
        *range(samples, samples + reader.metadata.nbytes),
        *range(int(reader.header["alloc_table_ptr"]), path.stat().st_size),
    ]


def damaged(content: bytes, places: list[int], rng: np.random.Generator) -> bytes:
    """One to three numbers of one to eight bytes written over what says where the images are."""
    result = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        width = int(rng.choice([1, 2, 4, 8]))
        edges = [*EDGES, len(content), len(content) - 1, int(rng.integers(0, 2**63))]
        value = edges[rng.integers(len(edges))] % 2 ** (8 * width)
        place = places[rng.integers(len(places))]
        result[place : place + width] = value.to_bytes(width, "little")
    return bytes(result)


def refused(path: Path, sidecar: Sidecar) -> bool:
    """Open a file whose sidecar agrees with it, and read every image."""
    vouching = {"size": path.stat().st_size, "sha256": sha256_of(path), "sampled": sampled_digest(path)}
    sidecar = sidecar.model_copy(update=vouching)
    try:
        check_file(path, sidecar)
        reader = open_reader(path, sidecar)
    except DataError:
        return True
    try:
        boxes = center_boxes(reader.shapes) if reader.storage == "jpeg" else None
        reader.read(np.arange(reader.num_samples), boxes)
    except DataError:
        return True
    finally:
        reader.close()
    return False


def main(folder: Path) -> None:
    prepared = PreparedData.load(folder)
    sidecar, content = prepared.sidecar("train"), prepared.path("train").read_bytes()
    places, rng, count = structure(prepared.path("train")), np.random.default_rng(0), 0
    for number in range(NUM_CASES):
        path = folder / f"case{number % 2}.beton"  # an opened file is never changed in place
        path.unlink(missing_ok=True)
        path.write_bytes(damaged(content, places, rng))
        count += refused(path, sidecar)
    print(count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
