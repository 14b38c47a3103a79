"""Finished checks as files, so that an audit that was killed goes on with those that are missing.

They are under a key of all that decides them: the weights, the images and labels, the threat, the budget, the seed and
the other networks. Check 16 is never kept: whether an activation is frozen is in no digest, and asking costs nothing.
"""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from pipeline.artifacts import fingerprint, write_atomic
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.records import Check

FOLDER = "audit"
_VERSION = 4
"""Raised when a check's code makes another figure of the same."""


class Kept:
    """The finished checks of one audit.

    Args:
        directory: where all audits of an evaluation are kept; None keeps nothing.
        subject: the audit.
        digests: of the weights: the model's, the reference's, the networks' of equal cost.
    """

    def __init__(self, directory: Path | None, subject: Subject, digests: object) -> None:
        self._directory = None
        if directory is not None:
            decides = {
                "v": _VERSION,
                "models": digests,
                "images": _digest(subject),
                "threat": subject.threat.model_dump(mode="json"),
                "budget": subject.budget,
                "seed": subject.seed,
            }
            self._directory = directory / FOLDER / fingerprint(decides)[:16]

    def load(self, number: int) -> Check | None:
        """Check `number`, or None where it is not there or damaged."""
        if self._directory is None:
            return None
        try:
            return Check.model_validate_json(self._path(self._directory, number).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError):
            return None

    def save(self, check: Check) -> None:
        """Write a finished check, all or nothing."""
        if self._directory is not None:
            write_atomic(self._path(self._directory, check.number), check.model_dump_json(indent=1))

    @staticmethod
    def _path(directory: Path, number: int) -> Path:
        return directory / f"check-{number:02d}.json"


def _digest(subject: Subject) -> str:
    state = hashlib.sha256(str((tuple(subject.all_x.shape), str(subject.all_x.dtype))).encode())
    for images in (subject.all_x, subject.all_y):
        for start in range(0, len(images), 256):
            state.update(images[start : start + 256].detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
