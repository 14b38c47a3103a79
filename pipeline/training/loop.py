"""The training loop: `train` is the whole of it, `train_step` what it does to a batch."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.data import PreparedData
from pipeline.training.context import Context
from pipeline.training.epoch import end_epoch, finish, finished
from pipeline.training.errors import NonFiniteLossError, TrainingStopped
from pipeline.training.files import save_tensors
from pipeline.training.job import TrainedModel, TrainJob
from pipeline.training.memory import explain_out_of_memory
from pipeline.training.methods import Terms
from pipeline.training.mix import mix_batch
from pipeline.training.monitor import Monitor
from pipeline.training.network import load_bank
from pipeline.training.optim import set_learning_rate
from pipeline.training.run import Run, open_run
from pipeline.training.seeds import derive_seed, generator_for, on_host


def train(job: TrainJob, context: Context) -> TrainedModel:
    """Train the job's network, or go on with it; returns at once what is already finished. Call it on every rank.

    Raises:
        ValueError: for a job that cannot be carried out as it is configured.
        NonFiniteLossError: on all ranks, before the step that would have spoilt the weights.
        OutOfMemoryError: with the settings to turn.
        TrainingStopped: when the context asked for it; the checkpoint is written.
    """
    prepared = PreparedData.load(job.data)
    bank = None if job.bank is None else load_bank(job)
    fingerprint = job.fingerprint(prepared.digest, bank.digest if bank else None)
    if (done := finished(job, fingerprint, context)) is not None:
        return done
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices), explain_out_of_memory(job, context) as settled:
        run = open_run(job, context, prepared, bank, fingerprint)
        settled.precision = run.trained.precision
        with run.loader, run.val_loader, Monitor(run) as monitor:
            while run.state.epoch < job.training.epochs and run.state.stopped_early is None:
                train_epoch(run, monitor)
                end_epoch(run, monitor)
            return finish(run, monitor)


def train_epoch(run: Run, monitor: Monitor) -> None:
    """Do what is left of the epoch under way."""
    state, every = run.state, run.job.training.checkpoint.every_steps
    run.loader.set_epoch(state.epoch, state.batch)
    stop = False
    for x, y in monitor.watched(run.loader):
        begin, images = time.perf_counter(), state.images
        stop = train_step(run, x, y) or stop
        monitor.step(time.perf_counter() - begin, state.images - images)
        if not run.loader.may_pause(state.batch):
            continue  # to the next step, after which any number of workers can go on
        if stop or (every and state.step % every == 0):
            run.save()
        if stop:
            raise TrainingStopped(f"stopped on request after step {state.step}; the same job goes on from there")


def train_step(run: Run, x: Tensor, y: Tensor) -> bool:
    """Attack, forward, backward, collective, optimizer step. Returns whether any rank was asked to stop.

    x (B, C, H, W) in [0, 1], y (B,): this rank's share of the batch.
    """
    config, state, context = run.job.training, run.state, run.context
    draws = generator_for(context.device, run.job.seed, "step", state.step, context.rank)
    torch.manual_seed(derive_seed(run.job.seed, "dropout", state.step, context.rank))
    x = x.contiguous(memory_format=torch.channels_last)
    if config.mix:
        x, y = mix_batch(config.mix, x, y, num_classes=run.prepared.num_classes, generator=on_host(draws))

    if run.folded is not None:
        run.folded.refresh()
    x_adv = run.method.perturb(run.attacked, x, y, run.strength, draws)
    with run.perturbed_weights(x, x_adv, y):
        terms = run.method.terms(run.trained, x, x_adv, y)
        torch.autograd.backward(terms.loss.sum())
    if terms.clean is None:
        terms = replace(terms, clean=run.clean_look(x))
    counts = run.reduce(_counts(terms, y, stop=context.stop_requested()))
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None])
    *sums, stops, grad_norm = torch.cat((counts, norm[None])).tolist()  # the step's one wait for the device

    if not (math.isfinite(sums[1]) and math.isfinite(grad_norm)):
        raise _not_finite(run, x, x_adv, y, loss=sums[1] / sums[0], grad_norm=grad_norm)
    if config.optimizer.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(run.parameters, config.optimizer.clip_norm, norm)
    set_learning_rate(run.optimizer, run.learning_rate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(state.step)
    state.advance(sums)
    return bool(stops)


def _counts(terms: Terms, y: Tensor, *, stop: bool) -> Tensor:
    """Number of examples, sum of losses, right and counted for robust and for clean, requests to stop."""
    labels = y if y.dim() == 1 else y.argmax(1)
    size, zero = terms.loss.new_full((), len(y)), terms.loss.new_zeros(())
    counts = [size, terms.loss.detach().sum()]
    for z in (terms.adv, terms.clean):
        counts += [zero, zero] if z is None else [(z.detach().argmax(1) == labels).sum().to(zero), size]
    return torch.stack([*counts, zero + stop])


def _not_finite(run: Run, x: Tensor, x_adv: Tensor, y: Tensor, *, loss: float, grad_norm: float) -> Exception:
    path: Path = run.job.output / f"nonfinite-step{run.state.step}-rank{run.context.rank}.safetensors"
    save_tensors(path, {"x": x, "x_adv": x_adv, "y": y})
    return NonFiniteLossError(
        f"expected a finite loss, got loss {loss} and gradient norm {grad_norm} at step {run.state.step}; the step "
        f"was not taken, the batch is in {path}. Lower optimizer.lr, or set optimizer.clip_norm or precision=fp32"
    )
