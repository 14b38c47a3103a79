"""What more workers make of a training: a cost model of one epoch, from figures that can be measured on one worker.

    step   = max(compute + all-reduce, loader)
    epoch  = steps * step + validation + checkpoints

compute      batch per worker / images per second of one worker
all-reduce   alpha-beta model of a ring (Thakur et al. 2005): 2 (W - 1) alpha + 2 (W - 1) / W * bytes / beta. Over
             several nodes in two levels: inside a node, and between nodes with the node's share of the bytes. The
             training makes one collective per step, after the backward pass: none of it hides behind computation.
loader       batch per worker / images per second that one worker's CPUs decode; runs beside the step
validation   forward passes of the selection, shared by the workers
checkpoints  written by rank 0 while the others wait

What it leaves out: stragglers, a shared filesystem that slows down, the start of workers (docs/scale.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError
from pipeline.plan.sizes import DataSize, expected_size
from pipeline.plan.work import Network, network_of, step_passes, three_digits


@dataclass(frozen=True)
class Link:
    """How messages travel."""

    alpha: float
    """Seconds per message."""
    beta: float
    """Bytes per second."""

    def all_reduce(self, num_bytes: float, workers: int) -> float:
        """Seconds of a ring over so many workers."""
        return 2 * (workers - 1) * self.alpha + 2 * (workers - 1) / workers * num_bytes / self.beta


@dataclass(frozen=True)
class Machine:
    """One worker and what it hangs on. Every figure is the user's: measured, or from a data sheet."""

    images_per_second: float
    """Training images of one worker alone, attack included."""
    decoded_per_second: float
    """Images that the loader of one worker delivers."""
    workers_per_node: int
    inside: Link
    """Between workers of a node."""
    between: Link
    """Between nodes."""
    disk: float
    """Bytes per second that a checkpoint is written with."""

    def all_reduce(self, num_bytes: float, workers: int) -> float:
        """Seconds of one sum over all workers."""
        if workers <= self.workers_per_node:
            return self.inside.all_reduce(num_bytes, workers)
        nodes = -(-workers // self.workers_per_node)
        share = num_bytes / self.workers_per_node
        return self.inside.all_reduce(num_bytes, self.workers_per_node) + self.between.all_reduce(share, nodes)


@dataclass(frozen=True)
class Training:
    """What of a training the model needs to know."""

    epochs: int
    images: int
    forward_equivalents: float
    """Forward passes of a training step, per image."""
    validation_passes: float
    """Forward passes of one epoch's validations, all images together."""
    gradient_bytes: float
    checkpoint_bytes: float
    checkpoints_per_epoch: float
    """At the ends of epochs."""
    steps_per_checkpoint: int | None
    """Inside an epoch; None: there are none."""


@dataclass(frozen=True)
class Scaled:
    """A training on so many workers; seconds."""

    workers: int
    batch: int
    """Of all workers together."""
    steps: int
    """In an epoch."""
    compute: float
    unfilled: float
    """Computing of an epoch for the part of its last batch that no image fills."""
    all_reduce: float
    loader: float
    validation: float
    checkpoints: float
    hours: float
    efficiency: float
    """Images per second and worker, over those of one worker alone."""

    @property
    def bound(self) -> str:
        """What an epoch spends most of its time on, besides computing."""
        waits = {
            "all-reduce": self.steps * self.all_reduce,
            "loader": self.steps * max(0.0, self.loader - self.compute - self.all_reduce),
            "validation": self.validation,
            "checkpoints": self.checkpoints,
            "unfilled batch": self.unfilled,
        }
        return max(waits, key=lambda name: waits[name])


def scale(training: Training, machine: Machine, workers: int, batch_per_worker: int) -> Scaled:
    """The training on so many workers, each with the same share of the batch."""
    steps = -(-training.images // (workers * batch_per_worker))
    compute = batch_per_worker / machine.images_per_second
    reduce = machine.all_reduce(training.gradient_bytes, workers)
    loader = batch_per_worker / machine.decoded_per_second
    passes_per_second = machine.images_per_second * training.forward_equivalents
    validation = training.validation_passes / (workers * passes_per_second)
    every = training.steps_per_checkpoint
    num_checkpoints = training.checkpoints_per_epoch + (steps // every if every else 0)
    checkpoints = num_checkpoints * training.checkpoint_bytes / machine.disk
    epoch = steps * max(compute + reduce, loader) + validation + checkpoints
    return Scaled(
        workers=workers,
        batch=workers * batch_per_worker,
        steps=steps,
        compute=compute,
        unfilled=steps * compute - training.images / (workers * machine.images_per_second),
        all_reduce=reduce,
        loader=loader,
        validation=validation,
        checkpoints=checkpoints,
        hours=training.epochs * epoch / 3600,
        efficiency=training.images / (epoch * workers * machine.images_per_second),
    )


def training_of(config: ChainConfig) -> Training:
    """The source's training. Raises ConfigError when the size of its data is not known."""
    data = expected_size(config.data, config.plan)
    if data is None:
        raise ConfigError("expected data of known size, got none; set plan.num_images and plan.num_classes")
    return _training(config, data, network_of(config.model, data))


def _training(config: ChainConfig, data: DataSize, network: Network) -> Training:
    training = config.training
    selection = training.selection
    passes = data.val + selection.num_judged(data.val) * 2 * selection.attack.steps * selection.attack.restarts
    state = network.state_bytes * (2 if training.ema else 1) + 4 * network.parameters
    return Training(
        epochs=training.epochs,
        images=data.train,
        forward_equivalents=step_passes(training),
        validation_passes=passes / selection.every,
        gradient_bytes=4 * network.parameters,
        checkpoint_bytes=state,
        checkpoints_per_epoch=1 / training.checkpoint.every_epochs,
        steps_per_checkpoint=training.checkpoint.every_steps,
    )


def table(rows: Sequence[Scaled]) -> list[str]:
    """A Markdown table."""
    lines = [
        "| workers | batch | steps / epoch | compute ms | all-reduce ms | loader ms | validation s | checkpoints s "
        "| hours | efficiency | waits most for |",
        "|" + "---:|" * 10 + "---|",
    ]
    for r in rows:
        times = [1e3 * r.compute, 1e3 * r.all_reduce, 1e3 * r.loader, r.validation, r.checkpoints]
        shown = " | ".join(f"{value:,.1f}" for value in times)
        counts = f"{r.workers} | {r.batch} | {r.steps}"
        lines.append(f"| {counts} | {shown} | {three_digits(r.hours)} | {100 * r.efficiency:.0f} % | {r.bound} |")
    return lines
