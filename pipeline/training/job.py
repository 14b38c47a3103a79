"""A training to be done, and the record of one that is."""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.config.base import Section
from pipeline.config.data import AugmentConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import TrainingConfig


class TrainJob(Section):
    """Everything that a training depends on. JSON-serialisable; the same on all ranks."""

    model: ModelConfig
    data: Path
    """Directory of a PreparedData."""
    training: TrainingConfig
    augment: AugmentConfig | None = None
    """None: images as they are."""
    seed: int = 0
    bank: Path | None = None
    """Directory of an ActivationBank that is put into the network, frozen."""
    bank_digest: str | None = None
    """The digest that bank must have; None: any."""
    adapt: str | None = None
    """Rule for sites of another width than the bank's."""
    output: Path

    def fingerprint(self, data_digest: str, bank_digest: str | None) -> str:
        """sha256 of what the result depends on: paths give way to the digests of what lies there."""
        settings = self.model_dump(mode="json", exclude={"data", "bank", "bank_digest", "output"})
        del settings["training"]["checkpoint"]
        settings |= {"data": data_digest, "bank": bank_digest}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class EpochRecord(BaseModel):
    """What one validated epoch came to."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    train_loss: float
    train_clean: float | None
    train_robust: float | None
    val_clean: float
    val_robust: float


class TrainedModel(BaseModel):
    """The record of a finished training, `trained.json` in its output directory."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    weights_sha256: str
    record_sha256: str | None = None
    """Digest of the network's model.json; None in records from before it was noted."""
    epochs: int
    """Epochs that were run."""
    selected_epoch: int
    """The epoch (counted from 1) whose weights are kept."""
    val_clean: float
    val_robust: float
    history: tuple[EpochRecord, ...]
    stopped_early: str | None = None
    """Why fewer epochs were run than configured."""
    bank_digest: str | None = None
    """Digest of the bank that was put in, frozen."""
    activation_digest_before: str | None = None
    """Digest of the network's activations before the training, where they are frozen."""
    activation_digest: str
    """Digest of the activations of the kept network; where they are frozen it was checked against the one before."""
    images_per_second: float
    flops_per_step: float
    """Floating-point operations of one optimizer step of the last epoch on one full batch, forward passes counted by
    torch."""
    share_of_floor: float | None = None
    """Time of the bare arithmetic of a step, over the measured time of a step."""
    precision: str
    world_size: int
    bit_exact: bool = True
    """False when it was resumed with another number of workers, or on another kind of machine, than it began with."""
