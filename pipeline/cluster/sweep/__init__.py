"""Hyperparameter search with Ray Tune over the spaces of `tune_spaces`."""

from pipeline.cluster.sweep.search import SearchFailed, SearchResult, checked_space, preflight_trial, search
from pipeline.cluster.sweep.trials import Trial, load_trials, pareto_front

__all__ = [
    "SearchFailed",
    "SearchResult",
    "Trial",
    "checked_space",
    "load_trials",
    "pareto_front",
    "preflight_trial",
    "search",
]
