"""Runs, metrics and activations in MLflow: the only package that imports mlflow, and not before it is needed."""

from pipeline.tracking.bank_files import bank_digest
from pipeline.tracking.journal import Entry, Journal, read_history, read_journal
from pipeline.tracking.lineage import DIGEST_PREFIX, Activation
from pipeline.tracking.registry import Registry
from pipeline.tracking.tracker import ChainRun, StageRun, Tracker

__all__ = [
    "DIGEST_PREFIX",
    "Activation",
    "ChainRun",
    "Entry",
    "Journal",
    "Registry",
    "StageRun",
    "Tracker",
    "bank_digest",
    "read_history",
    "read_journal",
]
