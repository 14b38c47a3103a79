"""The unit of work: a block of test images goes through all attacks at once, and its result is a file.

Blocks are fixed slices of the test split, and every random number comes from (seed, attack, block). So the result does
not depend on which worker took which block, and an evaluation that was killed goes on with the blocks that are missing.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.artifacts import whole
from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import AnyAttack, EvaluationConfig, PGDAttack, TransferAttack
from pipeline.data.errors import UNREADABLE_NPZ
from pipeline.data.sample import Positions
from pipeline.evaluation.attacks import run_attack
from pipeline.evaluation.judged_model import attackable, evaluating, own_random_state, predict, short_seed

Arrays = dict[str, npt.NDArray[np.generic]]
Mask = npt.NDArray[np.bool_]


class Block(NamedTuple):
    """Test images that are attacked together."""

    number: int
    """Which of the evaluation's blocks; every random number depends on it."""
    positions: Positions
    """(B,) positions in the test split."""
    in_curve: Mask
    """(B,) whether each is one of the images of the curve."""
    x: Tensor
    """(B, C, H, W) in [0, 1], on the model's device."""
    y: Tensor
    """(B,) labels."""


class _Cascade:
    """Attacks in turn on what is still correct, under one threat model."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, correct: Tensor, threat: ThreatModel) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.correct, self.x_adv = correct.clone(), x.clone()
        self.warnings: list[str] = []

    def run(self, attack: AnyAttack, seed: int, reference: nn.Module | None) -> npt.NDArray[np.bool_]:
        """Attack the survivors; returns (B,) who is correct after it."""
        alive = self.correct.nonzero().flatten()
        if len(alive):
            x, y = self.x[alive], self.y[alive]
            x_adv, warnings = run_attack(attack, self.model, x, y, self.threat, seed=seed, reference=reference)
            _require_inside(x_adv, x, self.threat, attack.name)
            self.warnings += [f"{attack.name}: {warning}" for warning in warnings]
            self.x_adv[alive] = x_adv
            self.correct[alive] = predict(self.model, x_adv) == y
        return self.correct.cpu().numpy().copy()


def _require_inside(x_adv: Tensor, x: Tensor, threat: ThreatModel, name: str) -> None:
    broken = int((~x_adv.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"expected images from attack {name}, got values that are not finite in {broken} of {len(x)}: the model's "
            "gradient is not a number there; find out where (torch.autograd.set_detect_anomaly), and evaluate again"
        )
    delta = (x_adv - x).flatten(1)
    size = (delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)).max().item()
    if not (size <= threat.eps * (1 + 1e-4) + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1):
        raise AssertionError(f"attack {name} left the ball or the box: |delta| = {size}, eps = {threat.eps}")


def judge_block(
    model: nn.Module, block: Block, config: EvaluationConfig, *, seed: int, reference: nn.Module | None
) -> Arrays:
    """All attacks, the other threats and the curve on one block.

    Args:
        model: logits (B, num_classes) from x in [0, 1].
        block: the images.
        config: the suite.
        seed: with the block's number it decides every random number.
        reference: model for transfer attacks.

    Returns:
        Arrays over the block: index (in the test split), y, predicted, correct/..., curve/<i> (of the curve's images
        alone), picture/..., x and x_adv, and the warnings.

    Raises:
        ValueError: an attack met a gradient that is not a number.
    """
    x, y, number = block.x, block.y, block.number
    with evaluating(model), own_random_state(short_seed(seed, "model", number)):
        model = attackable(model, x)
        predicted = predict(model, x)
        clean = predicted == y
        found: Arrays = {
            "index": block.positions,
            "y": y.cpu().numpy(),
            "predicted": predicted.cpu().numpy(),
            "correct/clean": clean.cpu().numpy(),
        }
        main = _Cascade(model, x, y, clean, config.threat)
        for attack in config.attacks:
            if isinstance(attack, TransferAttack) and reference is None:
                main.warnings.append(f"{attack.name}: skipped, there is no reference model")
                continue
            found[f"correct/{attack.name}"] = main.run(attack, short_seed(seed, attack.name, number), reference)
        found["correct/union"] = main.correct.cpu().numpy()
        warnings = list(main.warnings)
        for threat in config.other_threats:
            other = _Cascade(model, x, y, clean, threat)
            for attack in OTHER_ATTACKS:
                key = f"{threat.key}/{attack.name}"
                found[f"correct/{key}"] = other.run(attack, short_seed(seed, key, number), reference)
        found.update(_curve(model, block, clean, config, seed=seed))
        found.update(_pictures(main, clean, predict(model, main.x_adv), config, block.positions))
    found["warnings"] = np.array(sorted(set(warnings)), dtype=np.str_)
    return found


OTHER_ATTACKS: tuple[PGDAttack, ...] = (PGDAttack(steps=20), PGDAttack(steps=50, loss="margin"))


def _curve(model: nn.Module, block: Block, clean: Tensor, config: EvaluationConfig, *, seed: int) -> Arrays:
    """An example fooled at one radius is fooled at every larger one, so only survivors are attacked again."""
    keep = torch.from_numpy(block.in_curve).to(block.x.device)
    x, y, correct = block.x[keep], block.y[keep], clean[keep]
    found: Arrays = {}
    attack = PGDAttack(steps=config.curve.steps, loss="margin")
    for i, multiple in enumerate(config.curve.multiples):
        cascade = _Cascade(model, x, y, correct, config.threat.scaled(multiple))
        found[f"curve/{i}"] = cascade.run(attack, short_seed(seed, "curve", multiple, block.number), None)
        correct = cascade.correct
    return found


def _pictures(
    cascade: _Cascade, clean: Tensor, predicted: Tensor, config: EvaluationConfig, index: Positions
) -> Arrays:
    right = clean.nonzero().flatten().cpu().numpy()
    fooled = (predicted != cascade.y).cpu().numpy()
    picked = right[pictured(cascade.y.cpu().numpy()[right], fooled[right], config.num_pictures)]
    chosen = torch.from_numpy(picked).to(cascade.x.device)
    found: Arrays = {
        "picture/index": index[picked],
        "picture/x": cascade.x[chosen].cpu().numpy(),
        "picture/x_adv": cascade.x_adv[chosen].cpu().numpy(),
        "picture/y": cascade.y[chosen].cpu().numpy(),
        "picture/predicted": predicted[chosen].cpu().numpy(),
    }
    if config.save_adversarial:
        found |= {"x": cascade.x.cpu().numpy(), "x_adv": cascade.x_adv.cpu().numpy()}
    return found


def pictured(y: npt.NDArray[np.int64], fooled: Mask, count: int) -> Positions:
    """Which of the images classified correctly, of labels y (N,), are shown: up to `count` of them.

    Those that the attack changed the class of come first, then those that withstood it; of either, one of each class
    before the second of any.
    """
    chosen = _diverse(y, np.flatnonzero(fooled), count)
    return np.concatenate([chosen, _diverse(y, np.flatnonzero(~fooled), count - len(chosen))])


def _diverse(y: npt.NDArray[np.int64], candidates: Positions, count: int) -> Positions:
    seen: Counter[int] = Counter()
    rank = []
    for label in y[candidates].tolist():
        rank.append(seen[label])
        seen[label] += 1
    return np.sort(candidates[np.argsort(rank, kind="stable")][:count])


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz and read it back; whole or not at all."""
    with whole(path) as temporary:
        with temporary.open("xb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for an array
        if load_arrays(temporary) is None:
            raise OSError(f"{path} could not be read back after writing: is the disk full?")


def load_arrays(path: Path) -> Arrays | None:
    """The arrays of an .npz, or None where there is none or it is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UNREADABLE_NPZ:
        return None
