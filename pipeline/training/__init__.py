"""Adversarial training: attacks, methods, the loop, checkpoints. Knows nothing of the launcher that runs it."""

from pipeline.training.context import Context
from pipeline.training.errors import NonFiniteLossError, OutOfMemoryError, TrainingStopped
from pipeline.training.job import EpochRecord, TrainedModel, TrainJob
from pipeline.training.loop import train
from pipeline.training.model_io import ModelMeta, load_model, save_model

__all__ = [
    "Context",
    "EpochRecord",
    "ModelMeta",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "TrainJob",
    "TrainedModel",
    "TrainingStopped",
    "load_model",
    "save_model",
    "train",
]
