"""One training under way: everything a step needs, built from a job or restored from its checkpoint."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.training import FGSMRSConfig, StandardConfig, TrainingConfig
from pipeline.data import Loader, PreparedData, open_split
from pipeline.data.sample import sample
from pipeline.training.attacks import attack_mode
from pipeline.training.awp import perturbed_weights
from pipeline.training.checkpoint import Checkpoints, gather, restore
from pipeline.training.context import Context
from pipeline.training.distributed import StepReducer, broadcast_module, sum_over_ranks, synchronise_batch_norms
from pipeline.training.ema import EMA
from pipeline.training.fold import FoldedShadow
from pipeline.training.job import TrainJob
from pipeline.training.methods import Cost, Method, build_method, step_cost
from pipeline.training.model_io import ModelMeta
from pipeline.training.network import Forward, build_network, forward_flops, shadow
from pipeline.training.optim import build_optimizer, schedule_factor
from pipeline.training.precision import Arithmetic, resolve_compile, resolve_precision
from pipeline.training.progress import Progress
from sparta_models import ActivationBank

_log = logging.getLogger(__name__)
CLEAN_LOOK = 50
"""Methods that train on adversarial images alone have their clean training accuracy taken on the first batch of an
epoch and every so many after it: one forward pass, 0.1 % of the arithmetic of PGD-10 and 0.4 % of FGSM-RS."""


@dataclass
class Run:
    """The parts of a training. `state` and the tensors of model, optimizer and ema are all that changes."""

    job: TrainJob
    context: Context
    prepared: PreparedData
    fingerprint: str
    loader: Loader
    val_loader: Loader
    model: nn.Module
    meta: ModelMeta
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    state: Progress
    checkpoints: Checkpoints
    trained: Forward
    """The network in training, in the training's precision."""
    attacked: Forward
    """Its shadow, for the attack; `folded` keeps it up to date where its batch norms are folded."""
    folded: FoldedShadow | None
    judged: Forward
    """Shadow of the network that is validated and kept, in float32."""
    reduce: StepReducer
    method: Method
    bank: ActivationBank | None
    forward_flops: float
    """Floating-point operations of a forward pass over one image."""
    frozen_digest: str | None
    """Digest of the network's activations before the training, where they are frozen."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.job.training.epochs * len(self.loader)

    @property
    def now(self) -> float:
        """Time since the start, in epochs."""
        return self.state.epoch + self.state.batch / len(self.loader)

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        config = self.job.training
        return config.optimizer.lr * schedule_factor(config.schedule, self.now, config.epochs)

    @property
    def strength(self) -> float:
        """Strength of the attack of the step to come, in (0, 1]."""
        warmup = self.job.training.eps_warmup_epochs
        return min(1.0, (self.now + 1 / len(self.loader)) / warmup) if warmup else 1.0

    @property
    def cost(self) -> Cost:
        """Of the steps of the epoch under way; after the end, of the last one."""
        config = self.job.training
        return step_cost(config, epoch=min(self.state.epoch, config.epochs - 1), collapsed=self.state.collapsed)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in training."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the average if there is one."""
        return self.model if self.ema is None else self.ema.model

    def perturbed_weights(self, x: Tensor, x_adv: Tensor, y: Tensor) -> AbstractContextManager[None]:
        """Adversarial weights while the loss is computed and differentiated, where the job asks for them."""
        awp = self.job.training.awp
        if awp is None or self.state.epoch < awp.warmup_epochs:
            return nullcontext()

        def loss() -> Tensor:
            return self.method.terms(self.trained, x, x_adv, y).loss.sum()

        return perturbed_weights(self.model, loss, gamma=awp.gamma, world_size=self.context.world_size)

    def clean_look(self, x: Tensor) -> Tensor | None:
        """Logits of the clean images in eval mode, on one batch in CLEAN_LOOK: for methods that never see them."""
        if self.state.batch % CLEAN_LOOK:
            return None
        with attack_mode(self.attacked):  # of attack.bn="train", batch norms are in training mode
            return self.attacked.look(x)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.context.world_size > 1:
            dist.barrier()

    def save(self) -> None:
        """Write a checkpoint, on rank 0; every rank holds the same state."""
        if self.context.rank == 0:
            self.checkpoints.save(gather(self.model, self.optimizer, self.ema), self.state)

    def fall_back(self, weights: dict[str, Tensor]) -> None:
        """Go on from other weights by the method that follows a collapse; momentum, average, patience start afresh."""
        self.model.load_state_dict(weights)
        broadcast_module(self.model, self.context.world_size)
        if self.ema is not None:
            self.ema.model.load_state_dict(self.model.state_dict())
        self.optimizer.state.clear()
        self.state.collapsed, self.state.validations_since_best = True, 0
        self.method = build_method(self.job.training, collapsed=True)


def open_run(
    job: TrainJob, context: Context, prepared: PreparedData, bank: ActivationBank | None, fingerprint: str
) -> Run:
    """Build the run, restored from the newest good checkpoint of the same job if there is one.

    Raises:
        ValueError: for a batch size that is too small for the workers, or a bank that does not fit.
    """
    config, device = job.training, context.device
    if context.world_size > 1 and config.batch_size < 2 * context.world_size:
        raise ValueError(
            f"training.batch_size={config.batch_size} is less than two images for each of {context.world_size} "
            "workers; raise it, or lower scaling.num_workers"
        )
    model, meta = build_network(job, prepared, bank)
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    broadcast_module(model, context.world_size)
    if config.batch_norm == "sync" and context.world_size > 1:
        synchronise_batch_norms(model)
    optimizer = build_optimizer(model, config.optimizer)
    ema = EMA(model, config.ema) if config.ema else None
    checkpoints = Checkpoints(job.output / "checkpoints", fingerprint)
    saved = _restored(checkpoints, context, model, optimizer, ema)
    loader, val_loader = _loaders(job, context, prepared)
    if config.epochs * len(loader) == 1 and schedule_factor(config.schedule, 0, config.epochs) == 0:
        raise ValueError(
            f"training.schedule.kind={config.schedule.kind} begins with a learning rate of 0, and this training has "
            "one step; lower training.batch_size, raise training.epochs, or take a schedule that begins at its peak"
        )
    compiled = resolve_compile(config.compile, device, config.epochs * len(loader))
    if compiled:  # what torch keeps of the networks before this one in a process counts against the number it compiles
        torch.compiler.reset()
    side = prepared.image_size
    probe = torch.rand((2, prepared.channels, side, side), generator=torch.Generator().manual_seed(0)).to(device)
    flops = forward_flops(model, probe)
    precision = _agreed(resolve_precision(config.precision, device, flops), context)
    state = _taken_up(saved, context, Arithmetic.on(device, precision=precision, compiled=compiled))
    folded = None
    if _attack_bn(config) == "eval":
        folded = FoldedShadow(model, probe, torch.bfloat16 if precision == "bf16" else torch.float32)
    return Run(
        job=job,
        context=context,
        prepared=prepared,
        fingerprint=fingerprint,
        loader=loader,
        val_loader=val_loader,
        model=model,
        meta=meta,
        optimizer=optimizer,
        ema=ema,
        state=state,
        checkpoints=checkpoints,
        trained=Forward(model, precision, compiled=compiled),
        attacked=Forward(folded or shadow(model, bn="train"), precision, compiled=compiled),
        folded=folded,
        judged=Forward(shadow(model if ema is None else ema.model), "fp32"),
        reduce=StepReducer(model, [p for g in optimizer.param_groups for p in g["params"]], context.world_size),
        method=build_method(config, collapsed=state.collapsed),
        bank=bank,
        forward_flops=flops,
        frozen_digest=ActivationBank.from_model(model).digest if meta.frozen else None,
    )


def _agreed(precision: str, context: Context) -> str:
    """What all ranks can: they may be on different machines, and "auto" is each one's own opinion."""
    return "bf16" if num_ranks(precision == "bf16", context) == context.world_size else "fp32"


def num_ranks(condition: bool, context: Context) -> int:
    """On how many ranks it holds."""
    votes = torch.tensor(float(condition), dtype=torch.float64, device=context.device)
    return int(sum_over_ranks(votes, context.world_size).item())


def _attack_bn(config: TrainingConfig) -> str:
    """Mode of batch norms in the training attack, also in the one that follows a collapse."""
    match config.method:
        case StandardConfig():
            return "none"
        case FGSMRSConfig(bn=bn, fallback=fallback):
            return "eval" if (bn, fallback.bn) == ("eval", "eval") else "train"
        case method:
            return method.attack.bn


def _loaders(job: TrainJob, context: Context, prepared: PreparedData) -> tuple[Loader, Loader]:
    config, rank, world_size = job.training, context.rank, context.world_size
    train = open_split(
        prepared,
        "train",
        batch_size=config.batch_size,
        joint=True,
        seed=job.seed,
        shuffle=True,
        augment=job.augment,
        rank=rank,
        world_size=world_size,
        device=str(context.device),
    )
    wanted = config.selection.max_samples
    val = open_split(
        prepared,
        "val",
        batch_size=config.selection.batch_size,
        positions=None if wanted is None else sample(prepared.splits["val"].count, max(wanted, world_size)),
        rank=rank,
        world_size=world_size,
        device=str(context.device),
    )
    return train, val


def _restored(
    checkpoints: Checkpoints,
    context: Context,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> Progress:
    found = checkpoints.load()
    step = torch.tensor([0 if found is None else found[1].step], dtype=torch.float64, device=context.device)
    if sum_over_ranks(step.clone(), context.world_size).item() != step.item() * context.world_size:
        raise ValueError(
            f"expected the same checkpoint on every worker, rank {context.rank} found step {int(step.item())} in "
            f"{checkpoints.directory}; put the output on a filesystem that all nodes share"
        )
    if found is None:
        return Progress(world_size=context.world_size)
    groups, progress = found
    restore(groups, model, optimizer, ema)
    return progress


def _taken_up(saved: Progress, context: Context, arithmetic: Arithmetic) -> Progress:
    """The saved state as this process goes on with it; rank 0 says so if it will come to other bits."""
    begun = saved.arithmetic
    others = num_ranks(begun not in (None, arithmetic), context)
    state = saved.resumed_by(context.world_size, arithmetic, alike=not others)
    if context.rank == 0 and state.world_size != saved.world_size:
        _log.warning(
            "resumed with %d workers a training begun with %d: correct, but no longer bit-exact",
            state.world_size,
            saved.world_size,
        )
    if context.rank == 0 and begun is not None and others:
        what = arithmetic.difference(begun) or f"{others} of its workers on another kind of machine"
        _log.warning("resumed with %s: correct, but no longer bit-exact", what)
    return state
