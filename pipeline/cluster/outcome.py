"""How a job that ran in workers ended: one small file in its output directory, which survives the workers.

A worker group runs several jobs, may be killed, and may be started again. The file tells the next group what is already
settled in this run, and the driver what came out.
"""

import json
import os
import traceback
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from pipeline.artifacts import write_atomic
from pipeline.config.base import Section

_NAME = "outcome.json"


class Outcome(Section):
    """The end of one job in one run."""

    run: str
    state: Literal["done", "failed", "stopped"]
    result: dict[str, Any] = Field(default_factory=dict)
    """What the job returned, as JSON."""
    error: str = ""
    """Type and message of the exception, on one line; of a stopped job, where it stopped."""
    details: str = ""
    """Its traceback."""
    outside: bool = False
    """A failure that is none of the job's own: its workers were lost for good, or never came."""

    def save(self, output: Path) -> None:
        """Write this outcome into the job's directory; readers see all of it or nothing."""
        write_atomic(Path(output) / _NAME, self.model_dump_json(indent=1))


def load_outcome(output: Path, run: str) -> Outcome | None:
    """The outcome of the job in this run; None while there is none. One from another run does not count."""
    try:
        outcome = Outcome.model_validate_json((Path(output) / _NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return outcome if outcome.run == run else None


def done(run: str, result: BaseModel) -> Outcome:
    """The outcome of a job that returned."""
    return Outcome(run=run, state="done", result=json.loads(result.model_dump_json()))


def failed(run: str, error: BaseException, *, outside: bool = False) -> Outcome:
    """The outcome of a job that raised, or that something outside of it put an end to."""
    details = "".join(traceback.format_exception(error))
    return Outcome(run=run, state="failed", error=f"{type(error).__name__}: {error}", details=details, outside=outside)


def stopped(run: str, where: str) -> Outcome:
    """The outcome of a job that stopped because it was asked to; in the next run it goes on."""
    return Outcome(run=run, state="stopped", error=where)


def request_stop(output: Path) -> None:
    """Ask the job in this directory to checkpoint and stop."""
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / "stop").touch()


def clear_stop(output: Path) -> None:
    """Forget an earlier request to stop."""
    (Path(output) / "stop").unlink(missing_ok=True)


def stop_requested(output: Path) -> bool:
    """Whether somebody asked the job in this directory to stop."""
    return os.path.exists(Path(output) / "stop")  # noqa: PTH110 - called in every step; this is the cheap one
