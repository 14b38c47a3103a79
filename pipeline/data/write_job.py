"""The process that `pipeline.data.apart` starts: `python -m pipeline.data.write_job NAME <job`; NAME only marks it."""

import os
import pickle
import signal
import sys
import threading
import time
import traceback

from pipeline.data.apart import NO_FFCV, WriteJob
from pipeline.data.write import write_split


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot end this process group: it ends itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGTERM)


def main() -> int:
    """Run the job that our own parent process sends through the pipe."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    job: WriteJob = pickle.load(sys.stdin.buffer)  # noqa: S301 - the parent's end of a pipe
    try:
        from pipeline.data import beton  # noqa: F401, to tell a missing FFCV from any other failure
    except Exception as error:  # whatever a package raises that is damaged, or does not fit the others
        job.report(f"{NO_FFCV}{type(error).__name__}: {error}")
        return 1
    try:
        terminal = None if job.terminal is None else os.fdopen(job.terminal, "w")
        for work in job.splits:
            write_split(work, job.report, terminal=terminal)
    except Exception as error:
        traceback.print_exc()
        job.report(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Without the interpreter's own end, in which native threads of what FFCV imports were seen to wait for ever.
    os._exit(code)
