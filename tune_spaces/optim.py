"""The optimizer of the network's weights."""

from tune_spaces.distributions import Choice, Space, Uniform, When

SPACE: Space = {
    "training.optimizer.lr": Uniform(0.01, 0.5, log=True),
    "training.optimizer.momentum": Uniform(0.8, 0.95),
    "training.optimizer.weight_decay": Uniform(1e-5, 5e-3, log=True),
    "training.schedule.kind": Choice("one_cycle", "cosine", "piecewise"),
    "training.schedule.peak": When("training.schedule.kind", ("one_cycle",), Uniform(0.1, 0.6)),
    "training.label_smoothing": Uniform(0.0, 0.2),
}
