"""The process that `pipeline.data.apart` starts: `python -m pipeline.data.write_job JOB`."""

import pickle
import sys
import traceback
from pathlib import Path

from pipeline.data.apart import NO_FFCV, WriteJob
from pipeline.data.write import write_split


def main() -> int:
    """Run the job that was pickled by our own parent process."""
    job: WriteJob = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301
    try:
        from pipeline.data import beton  # noqa: F401, to tell a missing FFCV from any other failure
    except (ImportError, OSError) as error:
        job.report(f"{NO_FFCV}{error}")
        return 1
    try:
        for work in job.splits:
            write_split(work, job.report)
    except Exception as error:
        traceback.print_exc()
        job.report(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
