"""Data: any source -> verified splits on disk -> batches that depend on the seed alone."""

from pipeline.data.build import identity, prepare, wants_jpeg
from pipeline.data.errors import DataError, FfcvMissingWarning
from pipeline.data.loader import Loader
from pipeline.data.prepared import PreparedData, SplitInfo, open_split
from pipeline.data.remote import publish
from pipeline.data.sources import BAD_IMAGES

__all__ = [
    "BAD_IMAGES",
    "DataError",
    "FfcvMissingWarning",
    "Loader",
    "PreparedData",
    "SplitInfo",
    "identity",
    "open_split",
    "prepare",
    "publish",
    "wants_jpeg",
]
