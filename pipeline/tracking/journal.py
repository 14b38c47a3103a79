"""The truth about a run's metrics: an append-only file of JSON lines.

One line per call: {"step": 3, "time": 1700000000000, "metrics": {"loss": 0.5}}. `time` is in milliseconds and never
decreases, also when the clock is set back. A key is written once per step, so that a resumed run that goes over the
same steps again adds nothing; mirrors may replay the file as often as they like.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One line of a journal."""

    step: int
    time: int  # milliseconds since the epoch
    metrics: dict[str, float]


class Journal:
    """Append-only metrics of one run; there is one writer at a time, and any number of readers."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries, self._size = read_journal(self.path)
        self._seen = {(key, entry.step) for entry in entries for key in entry.metrics}
        self._time = max((entry.time for entry in entries), default=0)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._size)  # a torn last line was never read by anyone

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics that were not logged at this step before.

        Raises OSError when the disk refuses the line; the file is then as it was, and the call may be repeated.
        """
        fresh = {key: float(value) for key, value in metrics.items() if (key, step) not in self._seen}
        if not fresh:
            return
        self._time = max(self._time, time.time_ns() // 1_000_000)
        line = json.dumps({"step": int(step), "time": self._time, "metrics": {k: _encode(v) for k, v in fresh.items()}})
        self._append(line.encode() + b"\n")
        self._seen.update((key, step) for key in fresh)

    def _append(self, line: bytes) -> None:
        try:
            if os.pwrite(self._file, line, self._size) != len(line):
                raise OSError(f"only a part of a line could be written to {self.path}; is the disk full?")
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Force the file to the disk and close it; more than once is fine."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path, offset: int = 0) -> tuple[list[Entry], int]:
    """Read the complete lines from byte `offset` on; return them and the offset after the last of them.

    A file that does not exist is empty. A complete line that is no entry is skipped with a warning.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    entries = [entry for line in complete.splitlines() if (entry := _parse(line, path)) is not None]
    return entries, offset + len(complete)


def read_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of every key of a journal, in the order of logging."""
    history: dict[str, list[tuple[int, float]]] = {}
    for entry in read_journal(path)[0]:
        for key, value in entry.metrics.items():
            history.setdefault(key, []).append((entry.step, value))
    return history


def _parse(line: bytes, path: Path) -> Entry | None:
    try:
        raw = json.loads(line)
        return Entry(int(raw["step"]), int(raw["time"]), {str(k): float(v) for k, v in raw["metrics"].items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("skipped a line of %s that is no journal entry: %.80r", path, line)
        return None


def _encode(value: float) -> float | str:
    # JSON has no nan and inf; float() reads these names back.
    return value if math.isfinite(value) else str(value)
