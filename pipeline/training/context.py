"""What a training sees of the world it runs in: its rank, its device, and whom it tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

Report = Callable[[Mapping[str, float], Path | None], None]
Log = Callable[[Mapping[str, float], int], None]


def _no_report(metrics: Mapping[str, float], checkpoint: Path | None) -> None:
    del metrics, checkpoint


@dataclass(frozen=True)
class Context:
    """One rank's view. With world_size > 1 the default process group of torch.distributed is up."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - devices are immutable
    report: Report = _no_report
    """Called once per epoch by every rank, with the epoch's metrics and the newest checkpoint; may be a barrier."""
    log: Log | None = None
    """Takes metrics at a step, on rank 0; None: a journal metrics.jsonl in the job's output directory."""
    stop_requested: Callable[[], bool] = lambda: False
    """Asked after every step; true on any rank ends the training on all, with a checkpoint."""

    def __post_init__(self) -> None:
        """Take "cuda" for the device it names, as torch does."""
        object.__setattr__(self, "device", torch.device(self.device))

    @property
    def reports(self) -> bool:
        """Whether somebody is told of every epoch, who then shows it."""
        return self.report is not _no_report

    @classmethod
    def from_process_group(cls, device: torch.device | None = None) -> Self:
        """The context of a rank started by torchrun or torch.multiprocessing, or of a plain process."""
        up = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if up else (0, 1)
        return cls(rank=rank, world_size=world_size, device=device or _own_device(rank))


def _own_device(rank: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")
