"""The measure by which epochs are compared: clean and robust accuracy on the validation split.

Always the same attack with the same random starts, in float32, in eval mode; an image that is already misclassified
counts as not robust and is not attacked.
"""

import torch

from pipeline.config.base import ThreatModel
from pipeline.config.training import SelectionConfig
from pipeline.data import Loader
from pipeline.training.attacks.pgd import Model
from pipeline.training.context import Context
from pipeline.training.distributed import sum_over_ranks
from pipeline.training.methods import Attack
from pipeline.training.seeds import generator_for


def validate(
    model: Model, loader: Loader, threat: ThreatModel, selection: SelectionConfig, *, seed: int, context: Context
) -> tuple[float, float]:
    """Clean and robust accuracy in [0, 1] over all ranks' images."""
    attack = Attack(threat, selection.attack)
    totals = torch.zeros(3, dtype=torch.float64, device=context.device)
    for number, (images, labels) in enumerate(loader):
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        generator = generator_for(context.device, seed, "validation", number, context.rank)
        x, y = images[right], labels[right]
        if len(x):
            x_adv = attack(model, x, y, 1.0, generator)
            with torch.no_grad():
                totals[2] += (model(x_adv).argmax(1) == y).sum()
        totals[0] += len(right)
        totals[1] += right.sum()
    count, clean, robust = sum_over_ranks(totals, context.world_size).tolist()
    return clean / count, robust / count
