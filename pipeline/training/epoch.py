"""What happens between epochs: validation, selection, early ends, checkpoint, report; and the end of a training."""

import logging

from pydantic import ValidationError

from pipeline.artifacts import MODEL, write_atomic
from pipeline.config.training import FGSMRSConfig
from pipeline.training.context import Context
from pipeline.training.errors import FrozenChangedError
from pipeline.training.files import DamagedFilesError, sweep
from pipeline.training.job import EpochRecord, TrainedModel, TrainJob
from pipeline.training.memory import explain_validation_memory
from pipeline.training.model_io import load_model, model_sha256, record_sha256, save_model
from pipeline.training.monitor import Monitor
from pipeline.training.reporter import percent
from pipeline.training.run import Run, num_ranks
from pipeline.training.validation import validate
from sparta_models import ActivationBank

_log = logging.getLogger(__name__)
RECORD = "trained.json"


def end_epoch(run: Run, monitor: Monitor) -> None:
    """Validate and select where it is due, then write a checkpoint and report; the state moves to the next epoch."""
    config, state = run.job.training, run.state
    number, lr = state.epoch + 1, run.learning_rate
    metrics: dict[str, float] = {"epoch": number, "train_loss": state.sums.mean_loss, "lr": lr}
    accuracies = {"train_clean": state.sums.clean_accuracy, "train_robust": state.sums.robust_accuracy}
    metrics |= {name: value for name, value in accuracies.items() if value is not None}
    if number % config.selection.every == 0 or number == config.epochs:
        record = _validated(run, number)
        metrics |= {"val_clean": record.val_clean, "val_robust": record.val_robust}
        state.history.append(record)
        with monitor.saving():
            _select(run, record)
        _perhaps_stop(run, record)
        monitor.reporter.epoch(
            f"epoch {number}/{config.epochs}  loss {record.train_loss:.4f}  "
            f"val clean {percent(record.val_clean)}  val robust {percent(record.val_robust)}  best {state.best_epoch}"
        )
    state.next_epoch()
    # Logged before they are checkpointed: a kill in between repeats the end of the epoch, which adds nothing to the
    # journal; the other way round it would lose the epoch's metrics.
    metrics |= monitor.times()
    monitor.log(metrics)
    if number % config.checkpoint.every_epochs == 0 or number == config.epochs or state.stopped_early:
        with monitor.saving():
            run.save()
    run.context.report(metrics, run.checkpoints.newest if run.context.rank == 0 else None)


def _validated(run: Run, number: int) -> EpochRecord:
    config, sums = run.job.training, run.state.sums
    with explain_validation_memory(run.job, run.context):
        clean, robust = validate(
            run.judged,
            run.val_loader,
            config.selection.threat or config.threat,
            config.selection,
            seed=run.job.seed,
            context=run.context,
        )
    return EpochRecord(
        epoch=number,
        train_loss=sums.mean_loss,
        train_clean=sums.clean_accuracy,
        train_robust=sums.robust_accuracy,
        val_clean=clean,
        val_robust=robust,
    )


def _select(run: Run, record: EpochRecord) -> None:
    """Keep the network if it is the best so far; ties stay with the earlier epoch.

    Any gain makes a network the kept one. For the patience of early stopping only one of more than min_delta over the
    kept one counts, so that small gains, each over the one before, are borne as none.
    """
    config, state = run.job.training, run.state
    metric = record.val_robust if config.metric == "robust" else record.val_clean
    min_delta = config.early_stopping.min_delta if config.early_stopping else 0.0
    improved = metric > state.best_metric + min_delta
    state.validations_since_best = 0 if improved else state.validations_since_best + 1
    if metric > state.best_metric:
        state.best_metric, state.best_epoch = metric, record.epoch
        if run.context.rank == 0:
            save_model(run.checkpoints.best(record.epoch), run.kept, run.meta)


def _perhaps_stop(run: Run, record: EpochRecord) -> None:
    """Answer the catastrophic overfitting of one-step training; end early against robust overfitting."""
    config, state = run.job.training, run.state
    if isinstance(config.method, FGSMRSConfig) and not state.collapsed:
        best = max(past.val_robust for past in state.history)
        if best - record.val_robust >= _fatal_fall(config.method, best, chance=1 / run.prepared.num_classes):
            _answer_collapse(run, config.method, best, record)
    patience = config.early_stopping.patience if config.early_stopping else None
    if patience and state.validations_since_best >= patience and state.stopped_early is None:
        state.stopped_early = f"no better {config.metric} accuracy in {patience} validations"


def _fatal_fall(method: FGSMRSConfig, best: float, *, chance: float) -> float:
    """The fall of validation robust accuracy from its best that is a collapse.

    A best below collapse_drop cannot fall by it, but by half. At chance nothing is learnt yet that could collapse.
    """
    return min(method.collapse_drop, best / 2) if best > chance else method.collapse_drop


def _answer_collapse(run: Run, method: FGSMRSConfig, best: float, record: EpochRecord) -> None:
    text = (
        f"catastrophic overfitting in epoch {record.epoch}: validation robust accuracy fell from {best:.3f} to "
        f"{record.val_robust:.3f} while the one-step training accuracy is {record.train_robust or 0:.3f}"
    )
    if method.on_collapse == "stop":
        run.state.stopped_early = text
        return
    if run.context.rank == 0:
        _log.warning("%s; going on with PGD training from epoch %d", text, run.state.best_epoch)
    run.barrier()  # rank 0 has written the best network
    run.fall_back(load_model(run.checkpoints.best(run.state.best_epoch)).state_dict())


def finish(run: Run, monitor: Monitor) -> TrainedModel:
    """Put the selected network and the record of the training into the output directory."""
    output, state = run.job.output, run.state
    run.barrier()  # the best network is written
    model = load_model(run.checkpoints.best(run.state.best_epoch))
    digest = ActivationBank.from_model(model).digest
    if run.frozen_digest is not None and not (digest == run.frozen_digest == _live_digest(run)):
        raise FrozenChangedError(
            f"the frozen activations changed in training: digest {run.frozen_digest} before, {digest} after"
        )
    if run.context.rank == 0:
        sweep(output, MODEL)
        save_model(output / MODEL, model, run.meta)
    run.barrier()
    chosen = next(record for record in state.history if record.epoch == state.best_epoch)
    trained = TrainedModel(
        fingerprint=run.fingerprint,
        weights_sha256=model_sha256(output / MODEL),
        record_sha256=record_sha256(output / MODEL),
        epochs=state.epoch,
        selected_epoch=state.best_epoch,
        val_clean=chosen.val_clean,
        val_robust=chosen.val_robust,
        history=tuple(state.history),
        stopped_early=state.stopped_early,
        bank_digest=run.bank.digest if run.bank else None,
        activation_digest_before=run.frozen_digest,
        activation_digest=digest,
        images_per_second=state.images / max(state.seconds, 1e-9),
        flops_per_step=monitor.flops_per_step,
        share_of_floor=monitor.share_of_floor,
        precision=run.trained.precision,
        world_size=state.world_size,
        bit_exact=state.bit_exact,
    )
    if run.context.rank == 0:
        write_atomic(output / RECORD, trained.model_dump_json(indent=1))
    run.barrier()
    return trained


def _live_digest(run: Run) -> str:
    return ActivationBank.from_model(run.model).digest


_NOT_THERE = FileNotFoundError, NotADirectoryError, IsADirectoryError


def finished(job: TrainJob, fingerprint: str, context: Context) -> TrainedModel | None:
    """The record of this very job, if it was finished and its network is still as it was written.

    Raises OSError when the disk does not answer, which says nothing about either.
    """
    try:
        trained = TrainedModel.model_validate_json((job.output / RECORD).read_bytes())
        load_model(job.output / MODEL)
        found = (model_sha256(job.output / MODEL), record_sha256(job.output / MODEL))
        expected = (trained.weights_sha256, trained.record_sha256 or found[1])
        whole = trained.fingerprint == fingerprint and found == expected
    except (*_NOT_THERE, ValidationError, DamagedFilesError):
        trained, whole = None, False
    return trained if num_ranks(whole, context) == context.world_size else None
