"""Evaluation of one model: blocks of the test split, in one process or over many, merged into one record."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.artifacts import digest_file, fingerprint
from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import EvaluationConfig, TransferAttack
from pipeline.data import PreparedData, open_split
from pipeline.data.sample import Positions, sample
from pipeline.evaluation.audit import audit
from pipeline.evaluation.blocks import OTHER_ATTACKS, Arrays, Block, judge_block, load_arrays, pictured, save_arrays
from pipeline.evaluation.judged_model import copied, model_digest, num_logits
from pipeline.evaluation.records import ARRAYS, AttackResult, ClassResult, CurvePoint, Evaluation
from pipeline.evaluation.stats import Accuracy

_LOG = logging.getLogger(__name__)
_BLOCKS = "blocks"
_VERSION = 3


def evaluate(
    model: nn.Module,
    prepared: PreparedData,
    config: EvaluationConfig,
    output: Path,
    *,
    seed: int,
    reference: nn.Module | None = None,
    matched: Mapping[str, nn.Module] | None = None,
) -> Evaluation:
    """Judge `model` on the test split: suite, curve, and the audit where the config asks for it.

    Args:
        model: logits (B, num_classes) from x (B, C, H, W) in [0, 1]. Judged in eval mode on the device of its
            parameters; modes, gradients and random state are left as they were.
        prepared: the data.
        config: threat model, attacks, curve, audit.
        output: directory for evaluation.json, evaluation.npz and the blocks. Called again with the same arguments it
            goes on with the blocks that are missing.
        seed: of every random number.
        reference: another model, for transfer attacks and for the audit.
        matched: networks of equal cost with other gates, by name, for check 15 of the audit.

    Returns:
        The record, also written to `output`.

    Raises:
        ValueError: a model of other classes; a missing package; no attack that can be run; more than the test split
            asked for; a gradient that is not a number.
    """
    # Before anybody asks the model anything: a forward pass may leave something in it.
    pristine = copied(model) if config.audit.budget != "off" else None
    identity = _Identity.of(model, reference)
    _judge(model, prepared, config, output, seed=seed, reference=reference, identity=identity)
    result = _merge(prepared, config, output, seed=seed, identity=identity)
    if config.audit.budget == "off":
        return result
    x, y = _audited(prepared, min(config.audit.resolved_num_examples, result.n), _device(model))
    report = audit(
        model, x, y, config.threat, config.audit.budget, seed=seed, reference=reference, matched=matched,
        directory=output, pristine=pristine,
    )  # fmt: skip
    result = result.model_copy(update={"audit": report})
    result.save(output)
    return result


def evaluate_shard(
    model: nn.Module,
    prepared: PreparedData,
    config: EvaluationConfig,
    output: Path,
    *,
    shard: int = 0,
    num_shards: int = 1,
    seed: int,
    reference: nn.Module | None = None,
) -> list[int]:
    """Judge the blocks `shard`, `shard` + `num_shards`, ... that are not done yet; each becomes a file at once.

    Any number of shards, on any machines that share `output`, gives the same blocks.

    Returns:
        The blocks that this call judged.
    """
    identity = _Identity.of(model, reference)
    return _judge(
        model, prepared, config, output, shard=shard, num_shards=num_shards, seed=seed, reference=reference,
        identity=identity,
    )  # fmt: skip


def _judge(
    model: nn.Module, prepared: PreparedData, config: EvaluationConfig, output: Path, *, shard: int = 0,
    num_shards: int = 1, seed: int, reference: nn.Module | None, identity: "_Identity",
) -> list[int]:  # fmt: skip
    if reference is None and all(isinstance(attack, TransferAttack) for attack in config.attacks):
        raise ValueError(
            "expected a reference model for the transfer attack, got none: give one, or add another attack"
        )
    if not 0 <= shard < num_shards:
        raise ValueError(f"expected 0 <= shard < num_shards, got shard {shard} of {num_shards}")
    directory = _block_directory(identity, prepared, config, output, seed=seed)
    mine = range(shard, _num_blocks(prepared, config), num_shards)
    missing = [number for number in mine if load_arrays(_path(directory, number)) is None]
    for block in _blocks(prepared, config, missing, _device(model)):
        if (num := num_logits(model, block.x[:1])) != prepared.num_classes:
            raise ValueError(f"expected a model of the {prepared.num_classes} classes of {prepared.name}, got {num}")
        save_arrays(_path(directory, block.number), judge_block(model, block, config, seed=seed, reference=reference))
        _LOG.info("judged block %d (%d images)", block.number, len(block.y))
    return missing


def merge(
    model: nn.Module,
    prepared: PreparedData,
    config: EvaluationConfig,
    output: Path,
    *,
    seed: int,
    reference: nn.Module | None = None,
) -> Evaluation:
    """Join the blocks of all shards into evaluation.json and evaluation.npz.

    Raises:
        ValueError: a block is missing or damaged.
    """
    return _merge(prepared, config, output, seed=seed, identity=_Identity.of(model, reference))


def _merge(
    prepared: PreparedData, config: EvaluationConfig, output: Path, *, seed: int, identity: "_Identity"
) -> Evaluation:
    directory = _block_directory(identity, prepared, config, output, seed=seed)
    arrays = _joined(directory, prepared, config)
    warnings = arrays.pop("warnings")
    save_arrays(output / ARRAYS, arrays)
    result = Evaluation(
        dataset=prepared.name,
        data_digest=prepared.digest,
        model_digest=identity.model,
        reference_digest=identity.reference,
        seed=seed,
        config=config,
        n=len(arrays["y"]),
        split_size=prepared.splits["test"].count,
        clean=_accuracy(arrays, "clean"),
        attacks=_attack_results(arrays, config.threat, [a.name for a in config.attacks], ""),
        union=_accuracy(arrays, "union"),
        other_threats=tuple(
            result
            for threat in config.other_threats
            for result in _attack_results(arrays, threat, [a.name for a in OTHER_ATTACKS], f"{threat.key}/")
        ),
        curve=_curve(arrays, config, _in_curve(prepared, config, arrays["index"].astype(np.int64))),
        per_class=_per_class(arrays, prepared.class_names),
        warnings=tuple(sorted(set(warnings.tolist()))),
        arrays_sha256=digest_file(output / ARRAYS).sha256,
    )
    result.save(output)
    return result


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class _Identity(NamedTuple):
    """Digests of the networks that a result is of."""

    model: str
    reference: str | None

    @classmethod
    def of(cls, model: nn.Module, reference: nn.Module | None) -> Self:
        return cls(model_digest(model), None if reference is None else model_digest(reference))


def _block_directory(
    identity: _Identity, prepared: PreparedData, config: EvaluationConfig, output: Path, *, seed: int
) -> Path:
    """Blocks of another model, config or seed are in another directory, so that none is ever taken for one of these."""
    settings = config.model_dump(mode="json", exclude={"audit"})
    models = list(identity)
    return (
        output
        / _BLOCKS
        / fingerprint({"v": _VERSION, "config": settings, "data": prepared.digest, "models": models, "seed": seed})[:16]
    )


def _judged(prepared: PreparedData, config: EvaluationConfig) -> Positions:
    """Positions of the images that are judged, in the test split."""
    available = prepared.splits["test"].count
    if config.num_examples is not None and config.num_examples > available:
        raise ValueError(f"expected evaluation.num_examples <= {available} (the test split), got {config.num_examples}")
    return sample(available, config.num_examples)


def _in_curve(prepared: PreparedData, config: EvaluationConfig, index: Positions) -> npt.NDArray[np.bool_]:
    """Which of the images at `index` are images of the curve."""
    return np.isin(index, sample(prepared.splits["test"].count, config.curve.num_examples))


def _num_blocks(prepared: PreparedData, config: EvaluationConfig) -> int:
    return -(-len(_judged(prepared, config)) // config.block_size)


def _path(directory: Path, number: int) -> Path:
    return directory / f"block-{number:05d}.npz"


def _blocks(
    prepared: PreparedData, config: EvaluationConfig, numbers: Sequence[int], device: torch.device
) -> Iterator[Block]:
    """The blocks of these rising numbers; no other image is read."""
    if not numbers:
        return
    size, judged = config.block_size, _judged(prepared, config)
    parts = [judged[number * size : (number + 1) * size] for number in numbers]
    with open_split(prepared, "test", batch_size=size, positions=np.concatenate(parts)) as loader:
        for number, index, (x, y) in zip(numbers, parts, loader, strict=True):
            yield Block(number, index, _in_curve(prepared, config, index), x.to(device), y.to(device))


def _audited(prepared: PreparedData, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The `count` test images (B, C, H, W) that the audit looks at, and their labels (B,)."""
    positions = sample(prepared.splits["test"].count, count)
    with open_split(prepared, "test", batch_size=256, positions=positions) as loader:
        batches = list(loader)
    return torch.cat([x for x, _ in batches]).to(device), torch.cat([y for _, y in batches]).to(device)


def _joined(directory: Path, prepared: PreparedData, config: EvaluationConfig) -> Arrays:
    num_blocks = _num_blocks(prepared, config)
    blocks = [load_arrays(_path(directory, number)) for number in range(num_blocks)]
    missing = [i for i, block in enumerate(blocks) if block is None]
    if missing:
        raise ValueError(
            f"expected {num_blocks} blocks in {directory}, missing or damaged: {missing}: run their shards again"
        )
    found = [block for block in blocks if block is not None]
    joined = {name: np.concatenate([block[name] for block in found]) for name in found[0]}
    shown = joined["picture/y"].astype(np.int64)
    chosen = pictured(shown, joined["picture/predicted"] != shown, config.num_pictures)
    return {name: array[chosen] if name.startswith("picture/") else array for name, array in joined.items()}


def _accuracy(arrays: Arrays, key: str) -> Accuracy:
    correct = arrays[f"correct/{key}"]
    return Accuracy.of(int(correct.sum()), len(correct))


def _attack_results(arrays: Arrays, threat: ThreatModel, names: list[str], prefix: str) -> tuple[AttackResult, ...]:
    results, before = [], _accuracy(arrays, "clean")
    for name in names:
        if f"correct/{prefix}{name}" not in arrays:  # a transfer attack without a reference
            continue
        after = _accuracy(arrays, prefix + name)
        fooled = before.correct - after.correct
        results.append(AttackResult(name=name, threat=threat, attacked=before.correct, fooled=fooled, accuracy=after))
        before = after
    return tuple(results)


def _curve(arrays: Arrays, config: EvaluationConfig, chosen: npt.NDArray[np.bool_]) -> tuple[CurvePoint, ...]:
    if not config.curve.multiples:
        return ()
    n = len(arrays["curve/0"])
    clean = CurvePoint(eps=0.0, accuracy=Accuracy.of(int(arrays["correct/clean"][chosen].sum()), n))
    points = (
        CurvePoint(eps=config.threat.scaled(multiple).eps, accuracy=Accuracy.of(int(arrays[f"curve/{i}"].sum()), n))
        for i, multiple in enumerate(config.curve.multiples)
    )
    return (clean, *points)


def _per_class(arrays: Arrays, names: Sequence[str]) -> tuple[ClassResult, ...]:
    results = []
    for label, name in enumerate(names):
        mine = arrays["y"] == label
        n = int(mine.sum())
        if n:
            clean, robust = (int(arrays[f"correct/{key}"][mine].sum()) for key in ("clean", "union"))
            results.append(ClassResult(name=name, clean=Accuracy.of(clean, n), robust=Accuracy.of(robust, n)))
    return tuple(results)
