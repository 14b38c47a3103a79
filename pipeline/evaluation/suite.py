"""Evaluation of one model: blocks of the test split, in one process or over many, merged into one record."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.artifacts import digest_file, fingerprint
from pipeline.config.evaluation import EvaluationConfig, ThreatModel
from pipeline.data import PreparedData, open_split
from pipeline.evaluation.audit import audit
from pipeline.evaluation.blocks import (
    OTHER_ATTACKS,
    Arrays,
    diverse,
    judge_block,
    load_arrays,
    model_digest,
    save_arrays,
)
from pipeline.evaluation.records import ARRAYS, AttackResult, ClassResult, CurvePoint, Evaluation
from pipeline.evaluation.stats import Accuracy

_LOG = logging.getLogger(__name__)
_BLOCKS = "blocks"
_VERSION = 1


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
        ValueError: a transfer attack without a reference; a missing package; more than the test split asked for.
    """
    previous = _previous(output)
    evaluate_shard(model, prepared, config, output, seed=seed, reference=reference)
    result = merge(model, prepared, config, output, seed=seed, reference=reference)
    if config.audit.budget == "off":
        return result
    digests = {name: model_digest(other) for name, other in (matched or {}).items()}
    same = previous is not None and previous.model_copy(update={"audit": None}) == result
    if previous is not None and same and previous.audit is not None and previous.audit.matched == digests:
        report = previous.audit
    else:
        count = min(config.audit.resolved_num_examples, result.n)
        x, y = first_examples(prepared, count, _device(model))
        report = audit(model, x, y, config.threat, config.audit.budget, seed=seed, reference=reference, matched=matched)
    result = result.model_copy(update={"audit": report})
    result.save(output)
    return result


def _previous(output: Path) -> Evaluation | None:
    try:
        return Evaluation.load(output)
    except ValueError:
        return None


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
    if not 0 <= shard < num_shards:
        raise ValueError(f"expected 0 <= shard < num_shards, got shard {shard} of {num_shards}")
    directory = _block_directory(model, prepared, config, output, seed=seed, reference=reference)
    judged = []
    for block, x, y in _blocks(prepared, config):
        path = directory / f"block-{block:05d}.npz"
        if block % num_shards != shard or load_arrays(path) is not None:
            continue
        device = _device(model)
        found = judge_block(model, x.to(device), y.to(device), config, seed=seed, block=block, reference=reference)
        save_arrays(path, found)
        judged.append(block)
        _LOG.info("judged block %d (%d images)", block, len(y))
    return judged


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
    directory = _block_directory(model, prepared, config, output, seed=seed, reference=reference)
    arrays = _joined(directory, prepared, config)
    warnings = arrays.pop("warnings")
    save_arrays(output / ARRAYS, arrays)
    result = Evaluation(
        dataset=prepared.name,
        data_digest=prepared.digest,
        model_digest=model_digest(model),
        reference_digest=None if reference is None else model_digest(reference),
        seed=seed,
        config=config,
        n=len(arrays["y"]),
        clean=_accuracy(arrays, "clean"),
        attacks=_attack_results(arrays, config.threat, [a.name for a in config.attacks], ""),
        union=_accuracy(arrays, "union"),
        other_threats=tuple(
            result
            for threat in config.other_threats
            for result in _attack_results(arrays, threat, [a.name for a in OTHER_ATTACKS], f"{threat.label}/")
        ),
        curve=_curve(arrays, config),
        per_class=_per_class(arrays, prepared.class_names),
        warnings=tuple(sorted(set(warnings.tolist()))),
        arrays_sha256=digest_file(output / ARRAYS).sha256,
    )
    result.save(output)
    return result


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _block_directory(
    model: nn.Module,
    prepared: PreparedData,
    config: EvaluationConfig,
    output: Path,
    *,
    seed: int,
    reference: nn.Module | None,
) -> Path:
    """Blocks of another model, config or seed are in another directory, so that none is ever taken for one of these."""
    settings = config.model_dump(mode="json", exclude={"audit"})
    models = [model_digest(model), None if reference is None else model_digest(reference)]
    return (
        output
        / _BLOCKS
        / fingerprint({"v": _VERSION, "config": settings, "data": prepared.digest, "models": models, "seed": seed})[:16]
    )


def _num_examples(prepared: PreparedData, config: EvaluationConfig) -> int:
    available = prepared.splits["test"].count
    if config.num_examples is not None and config.num_examples > available:
        raise ValueError(f"expected evaluation.num_examples <= {available} (the test split), got {config.num_examples}")
    return config.num_examples or available


def _blocks(prepared: PreparedData, config: EvaluationConfig) -> Iterator[tuple[int, Tensor, Tensor]]:
    left = _num_examples(prepared, config)
    with open_split(prepared, "test", batch_size=config.block_size) as loader:
        for block, (x, y) in enumerate(loader):
            if left <= 0:
                return
            yield block, x[:left], y[:left]
            left -= len(y)


def first_examples(prepared: PreparedData, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first `count` test images (B, C, H, W) and labels (B,), fewer where the split is smaller."""
    config = EvaluationConfig(block_size=min(count, 256))
    batches = list(itertools.islice(_blocks(prepared, config), -(-count // config.block_size)))
    x, y = torch.cat([batch[1] for batch in batches]), torch.cat([batch[2] for batch in batches])
    return x[:count].to(device), y[:count].to(device)


def _joined(directory: Path, prepared: PreparedData, config: EvaluationConfig) -> Arrays:
    num_blocks = -(-_num_examples(prepared, config) // config.block_size)
    blocks = [load_arrays(directory / f"block-{block:05d}.npz") for block in range(num_blocks)]
    missing = [i for i, block in enumerate(blocks) if block is None]
    if missing:
        raise ValueError(
            f"expected {num_blocks} blocks in {directory}, missing or damaged: {missing}: run their shards again"
        )
    found = [block for block in blocks if block is not None]
    joined = {name: np.concatenate([block[name] for block in found]) for name in found[0]}
    chosen = diverse(joined["picture/y"], np.arange(len(joined["picture/y"])), config.num_pictures)
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


def _curve(arrays: Arrays, config: EvaluationConfig) -> tuple[CurvePoint, ...]:
    if not config.curve.multiples:
        return ()
    n = len(arrays["curve/0"])
    clean = CurvePoint(eps=0.0, accuracy=Accuracy.of(int(arrays["correct/clean"][:n].sum()), n))
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
