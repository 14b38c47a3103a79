"""Checkpoints of a training: two alternating directories and the best network, each whole, with digests.

checkpoints/a and checkpoints/b hold the newest two states, best-EPOCH the networks that they name as selected. A run
that repeats its last steps after a crash writes the same files again. Tensors are safetensors, the rest is JSON.
"""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.artifacts import canonical
from pipeline.config.base import one_line
from pipeline.training.ema import EMA
from pipeline.training.files import DamagedFilesError, read_directory, sweep, write_directory
from pipeline.training.model_io import load_model
from pipeline.training.progress import Progress

_log = logging.getLogger(__name__)
_SLOTS = ("a", "b")
_RECORD = "state.json"
Groups = dict[str, dict[str, Tensor]]


class Checkpoints:
    """The checkpoints of one job below `directory`. `fingerprint` tells them from those of another job."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self.newest: Path | None = None
        """Directory of this job's newest state that was written or loaded."""
        self._next = 0
        self._referred: tuple[int, ...] = ()

    def best(self, epoch: int) -> Path:
        """Directory of the network selected in an epoch; a state names the epoch that belongs to it."""
        return self.directory / f"best-{epoch:04d}"

    def save(self, groups: Groups, progress: Progress) -> Path:
        """Write the state over the older of the two slots; returns the directory written."""
        slot = self.directory / _SLOTS[self._next]
        state = progress.model_dump(mode="json")
        meta = {"fingerprint": self.fingerprint, "progress": state, "seal": _seal(self.fingerprint, state)}
        write_directory(slot, groups, meta, record=_RECORD)
        self.newest, self._next = slot, 1 - self._next
        self._referred = (progress.best_epoch, *self._referred[:1])
        self._prune()
        return slot

    def _prune(self) -> None:
        """Drop the networks that neither of the two states refers to."""
        keep = {self.best(epoch) for epoch in self._referred}
        for directory in self.directory.glob("best-*"):
            if directory not in keep:
                shutil.rmtree(directory)

    def load(self) -> tuple[Groups, Progress] | None:
        """The newest state that is whole and of this job, with the network that it names as the best; a damaged one is
        reported and the one before it taken.

        What a killed process left half-written is removed, so no rank may be saving yet.
        """
        sweep(self.directory)
        found = {slot: state for slot in _SLOTS if (state := self._read(slot)) is not None}
        if not found:
            return None
        # The end of an epoch, with its validation, is no further step than the checkpoint of the epoch's last step.
        newest = max(found, key=lambda slot: (found[slot][1].step, found[slot][1].epoch))
        self.newest, self._next = self.directory / newest, 1 - _SLOTS.index(newest)
        self._referred = (found[newest][1].best_epoch,)
        return found[newest]

    def _read(self, slot: str) -> tuple[Groups, Progress] | None:
        directory = self.directory / slot
        if not directory.exists():
            return None
        try:
            groups, meta = read_directory(directory, record=_RECORD)
            if meta["seal"] != _seal(meta["fingerprint"], meta["progress"]):
                raise DamagedFilesError(f"{directory / _RECORD} was altered")
            progress = Progress.model_validate(meta["progress"])
        except (DamagedFilesError, ValidationError, KeyError) as error:
            _log.warning("checkpoint %s is damaged and passed over: %s", directory, one_line(error))
            return None
        if meta["fingerprint"] != self.fingerprint:
            _log.warning("checkpoint %s belongs to other settings and is passed over", directory)
            return None
        try:
            if progress.best_epoch:
                load_model(self.best(progress.best_epoch))
        except DamagedFilesError as error:
            _log.warning("checkpoint %s is passed over, its best network is damaged: %s", directory, one_line(error))
            return None
        return groups, progress


def _seal(fingerprint: str, state: Any) -> str:
    """Digest of what a state's record says; the tensors have their own."""
    return hashlib.sha256(canonical([fingerprint, state]).encode()).hexdigest()


def gather(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> Groups:
    """All tensors of a state: network, optimizer by parameter number, average."""
    groups: Groups = {"model": dict(model.state_dict()), "optimizer": _momenta(optimizer)}
    if ema is not None:
        groups["ema"] = dict(ema.model.state_dict())
    return groups


def restore(groups: Groups, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
    """Put a gathered state back, in place."""
    model.load_state_dict(groups["model"])
    if ema is not None:
        ema.model.load_state_dict(groups["ema"])
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in groups["optimizer"].items():
        number, name = key.split("/")
        # A copy, because momentum is updated in place; in the parameter's layout, so that every sum has the same order.
        state.setdefault(int(number), {})[name] = torch.empty_like(parameters[int(number)]).copy_(tensor)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _momenta(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor | None]] = optimizer.state_dict()["state"]
    return {f"{n}/{name}": t for n, values in state.items() for name, t in values.items() if t is not None}
