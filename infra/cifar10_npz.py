"""Make the study's cifar10.npz of the official CIFAR-10: 3,000 training images of each class, and 5,000 test images.

    python infra/cifar10_npz.py ROOT SPARTA_DATA    # ROOT holds cifar-10-batches-py, or is where it is downloaded to

The first of each class and the first test images, in official order. What comes out is compared with the images that
the study was made with, by digest.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

PER_CLASS, NUM_TEST = 3000, 5000
DIGESTS = {
    "train_images": "6930b49054fbc32d62a8d49d8f718dd114f3616292470c7c22d5fa4c9de61bf6",
    "train_labels": "960c486df9636a4f260553ed8cb074b01c1282e09648cf43bdd50250cd5d25c5",
    "test_images": "cdd34a45cc6d1a61e7cad06ff2c4e9b1f2803e8a055f690628f490bb1ea2aa42",
    "test_labels": "b629832fe381ed44d74a64b50ecb388874f558f2223775cedc2862a3fb41b0fc",
}
"""sha256 of the arrays' bytes, uint8."""
Arrays = dict[str, npt.NDArray[np.uint8]]


def chosen(train: tuple[npt.ArrayLike, npt.ArrayLike], test: tuple[npt.ArrayLike, npt.ArrayLike]) -> Arrays:
    """Images (N, 32, 32, 3) and labels (N,) of the study, of the official splits' in official order."""
    (images, labels), (test_images, test_labels) = ([np.asarray(array, np.uint8) for array in s] for s in (train, test))
    first = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in np.unique(labels)]))
    return {
        "train_images": images[first],
        "train_labels": labels[first],
        "test_images": test_images[:NUM_TEST],
        "test_labels": test_labels[:NUM_TEST],
    }


def differing(arrays: Arrays) -> list[str]:
    """Names of the arrays that are not those of the study."""
    return [name for name, digest in DIGESTS.items() if hashlib.sha256(arrays[name].tobytes()).hexdigest() != digest]


def main() -> None:
    """Read the official files, choose, compare, write."""
    from torchvision.datasets import CIFAR10

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT")
    parser.add_argument("folder", type=Path, metavar="SPARTA_DATA")
    args = parser.parse_args()
    train, test = (CIFAR10(args.root, train=train, download=True) for train in (True, False))
    arrays = chosen((train.data, train.targets), (test.data, test.targets))
    if others := differing(arrays):
        raise SystemExit(
            f"expected the study's images, got others: {', '.join(others)}; is {args.root} the official one?"
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    np.savez(args.folder / "cifar10.npz", class_names=np.array(train.classes), **arrays)
    print(f"{args.folder / 'cifar10.npz'}: the images of the study")


if __name__ == "__main__":
    main()
