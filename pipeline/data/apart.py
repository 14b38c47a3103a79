"""Writing a split in a process of its own, with a time limit: nothing FFCV does can hang or change the caller."""

import errno
import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import DISK_FULL
from pipeline.data.errors import DataError
from pipeline.data.write import TOO_SLOW, SplitWork

_GRACE = 5.0
_NO_SPACE = 1 << 18
NO_FFCV = "ffcv: "
"""How the message of a process begins that could not import FFCV."""


class FfcvUnusableError(Exception):
    """FFCV is installed but does not import."""


@dataclass(frozen=True)
class WriteJob:
    """What `pipeline.data.write_job` is to write, and the file that takes the reason when it fails."""

    splits: tuple[SplitWork, ...]
    error: Path
    terminal: int | None
    """Descriptor, inherited, of the terminal that takes the progress bar."""

    def report(self, message: str) -> None:
        """Leave the first message for the parent; renamed, so that it is never read half.

        Where a full disk has no room for it, the writer's processes end: FFCV would wait for the failed one for ever.
        """
        if self.error.exists():
            return
        temporary = self.error.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(message)
            temporary.replace(self.error)
        except OSError:
            os.killpg(0, signal.SIGTERM)


def ffcv_installed() -> bool:
    """Whether ffcv is there, found out without importing it."""
    return importlib.util.find_spec("ffcv") is not None


def write_apart(splits: Sequence[SplitWork], folder: Path, timeout: float) -> None:
    """`write_split` for each split, in a process of its own, with a progress bar on a terminal.

    Args:
        folder: takes temporary files.
        timeout: seconds for all splits together.

    Raises:
        DataError: a sample cannot be read, the time is up, or what was written is not what was read.
        OSError: the disk is full.
        FfcvUnusableError: FFCV does not import there.
    """
    deadline = time.monotonic() + timeout
    log = folder / "write.log"
    with _terminal() as terminal, log.open("wb") as output:
        job = WriteJob(tuple(splits), folder / "write.error", terminal)
        child = subprocess.Popen(  # noqa: S603, our own module and file
            [sys.executable, "-m", "pipeline.data.write_job", str(job.error)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,  # on a terminal too: the bar has a descriptor of its own, and tracebacks are not for users
            pass_fds=() if terminal is None else (terminal,),
            start_new_session=True,  # so that FFCV's own workers end with it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)},
        )
    with ThreadPoolExecutor(1) as pool:  # a process that does not take its job must not stop the clock
        handed = pool.submit(_hand_over, child, job)
        try:
            _wait(child, job, log, handed, deadline)
        finally:
            _end(child)
            log.unlink()


@contextmanager
def _terminal() -> Iterator[int | None]:
    if not sys.stderr.isatty():
        yield None
        return
    descriptor = os.dup(sys.stderr.fileno())
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _hand_over(child: "subprocess.Popen[bytes]", job: WriteJob) -> None:
    """Through a pipe between the two processes: nobody else can write what is unpickled there."""
    assert child.stdin is not None
    try:
        with child.stdin as pipe:
            pickle.dump(job, pipe)
    except BrokenPipeError:  # it ended at once; its exit code and its log say why
        return


def _wait(child: "subprocess.Popen[bytes]", job: WriteJob, log: Path, handed: "Future[None]", deadline: float) -> None:
    while child.poll() is None and not job.error.exists():
        if time.monotonic() > deadline:
            raise DataError(TOO_SLOW)
        time.sleep(0.02)
    if job.error.exists():
        message = job.error.read_text()
        if message.startswith(NO_FFCV):
            raise FfcvUnusableError(message.removeprefix(NO_FFCV))
        raise _failure(message, log)
    handed.result()
    if child.returncode:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise _failure(f"exit code {child.returncode} {''.join(tail)}", log)


def _failure(message: str, log: Path) -> Exception:
    """What went wrong there; on a full disk the process may not even have left a message."""
    if any(os.strerror(number) in message for number in DISK_FULL) or shutil.disk_usage(log.parent).free < _NO_SPACE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.parent.parent))
    return DataError(f"writing the splits failed: {message}")


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the writer's process group, if it has not ended well by itself."""
    if child.poll() == 0:
        return
    try:
        os.killpg(child.pid, signal.SIGTERM)
        # Python's own tracker ignores SIGTERM, removes the shared memory of the dead, and goes: it is given the time.
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()
