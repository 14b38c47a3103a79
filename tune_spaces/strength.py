"""How strong the training attack is against how far Sparta's gate reaches and how fast it learns: a grid of twelve.

`search.algorithm=grid search.num_trials=12 search.scheduler=none` tries all of it; docs/results.md has what came out.
"""

from tune_spaces.distributions import Choice, Relative, Space

SPACE: Space = {
    "training.threat.eps": Relative(0.5, 1.5, to="evaluation.threat.eps"),
    "model.activation.options.kernel_size": Choice(3, 5),
    "training.optimizer.activation_lr_factor": Choice(1.0, 5.0),
}
