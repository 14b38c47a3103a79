"""How strong the training attack is against how far Sparta's gate reaches: a grid of six, which `make study` tries."""

from tune_spaces.distributions import Choice, Relative, Space

SPACE: Space = {
    "training.threat.eps": Relative(0.5, 1.5, to="evaluation.threat.eps"),
    "model.activation.options.kernel_size": Choice(3, 5),
}
