"""The whole training in a plain process: the same seed gives the same bits, also across a kill, and it ends well."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.data import AugmentConfig
from pipeline.config.model import ActivationConfig
from pipeline.config.training import (
    AttackConfig,
    AWPConfig,
    CheckpointConfig,
    ConstantConfig,
    EarlyStoppingConfig,
    EMAConfig,
    FGSMRSConfig,
    MARTConfig,
    MixConfig,
    OneCycleConfig,
    OptimizerConfig,
    PGDATConfig,
    SelectionConfig,
    StandardConfig,
    TRADESConfig,
)
from pipeline.data import PreparedData, open_split
from pipeline.training import (
    Context,
    NonFiniteLossError,
    OutOfMemoryError,
    TrainedModel,
    TrainingStopped,
    load_model,
    train,
)
from pipeline.training import epoch as epoch_module
from pipeline.training import files as files_module
from pipeline.training import loop as loop_module
from pipeline.training import monitor as monitor_module
from pipeline.training import run as run_module
from pipeline.training.errors import FrozenChangedError
from pipeline.training.files import read_directory
from pipeline.training.methods import Terms
from pipeline.training.network import Forward, build_network, shadow
from sparta_models import ActivationBank, build_model

RICH = {
    "ema": EMAConfig(decay=0.9),
    "augment": AugmentConfig(pad_crop=1, flip=False),
    "checkpoint": CheckpointConfig(every_steps=1),
}


class Killed(BaseException):
    """Stands for a kill -9: nothing may catch it and tidy up."""


def newest_tensors(output):
    """All tensors of the newest state: weights, average, momentum."""
    slots = [output / "checkpoints" / slot for slot in "ab"]
    states = [read_directory(slot, record="state.json") for slot in slots if slot.exists()]
    groups, _ = max(states, key=lambda state: state[1]["progress"]["step"])
    return {f"{g}/{n}": t for g, values in groups.items() for n, t in values.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def outcome(trained):
    """What must be equal in two runs of the same job: all but speeds."""
    return trained.model_dump(exclude={"images_per_second", "share_of_floor"})


def train_until(job, step, monkeypatch):
    """Train, and die in the middle of a step."""
    real = loop_module.train_step

    def dying(run, x, y):
        if run.state.step == step:
            raise Killed
        return real(run, x, y)

    monkeypatch.setattr(loop_module, "train_step", dying)
    with pytest.raises(Killed):
        train(job, Context())
    monkeypatch.setattr(loop_module, "train_step", real)


def test_same_seed_same_bits_and_another_seed_other_bits(make_job):
    jobs = [make_job("first", **RICH), make_job("again", **RICH), make_job("other", seed=1, **RICH)]
    first, again, other = (train(job, Context()) for job in jobs)
    assert outcome(first) == outcome(again)
    assert same(newest_tensors(jobs[0].output), newest_tensors(jobs[1].output))
    assert first.weights_sha256 != other.weights_sha256


@pytest.mark.parametrize("kill_at", [3, 4])  # at the start of the second epoch, and inside it
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted(kill_at, make_job, monkeypatch):
    whole, broken = make_job("whole", **RICH), make_job("broken", **RICH)
    expected = train(whole, Context())
    train_until(broken, kill_at, monkeypatch)
    assert outcome(train(broken, Context())) == outcome(expected)
    assert same(newest_tensors(whole.output), newest_tensors(broken.output))
    steps = [json.loads(line)["step"] for line in (broken.output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6]


def test_four_epochs_are_two_and_kill_and_two(make_job, monkeypatch):
    """Without checkpoints inside the epoch: what was done of the third epoch is done again."""
    options = {
        "epochs": 4,
        "ema": EMAConfig(),
        "awp": AWPConfig(),
        "method": TRADESConfig(attack=AttackConfig(steps=1)),
    }
    whole, broken = make_job("whole", **options), make_job("broken", **options)
    expected = train(whole, Context())
    train_until(broken, 8, monkeypatch)
    assert outcome(train(broken, Context())) == outcome(expected)
    assert same(newest_tensors(whole.output), newest_tensors(broken.output))


def test_resumed_on_another_number_of_threads_says_it_is_not_bit_exact(make_job, monkeypatch, caplog):
    job = make_job(**RICH)
    train_until(job, 4, monkeypatch)
    torch.set_num_threads(2)
    try:
        assert not train(job, Context()).bit_exact
    finally:
        torch.set_num_threads(1)
    assert "resumed with threads 2 instead of 1: correct, but no longer bit-exact" in caplog.text


def test_resumed_where_auto_is_another_precision_says_it_is_not_bit_exact(make_job, monkeypatch, caplog):
    job = make_job(**RICH)
    monkeypatch.setattr(run_module, "resolve_precision", lambda *args: "fp32")
    train_until(job, 4, monkeypatch)
    monkeypatch.setattr(run_module, "resolve_precision", lambda *args: "bf16")
    trained = train(job, Context())
    assert (trained.bit_exact, trained.precision) == (False, "bf16")
    assert "resumed with precision bf16 instead of fp32: correct, but no longer bit-exact" in caplog.text


def test_resumed_where_other_workers_are_on_another_machine_says_it_is_not_bit_exact(make_job, monkeypatch, caplog):
    job = make_job(**RICH)
    train_until(job, 4, monkeypatch)
    real = run_module._taken_up

    def of_two(saved, context, arithmetic):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "sum_over_ranks", lambda values, world_size: values + 1)
            return real(saved, context, arithmetic)

    monkeypatch.setattr(run_module, "_taken_up", of_two)
    assert not train(job, Context()).bit_exact
    assert "resumed with 1 of its workers on another kind of machine: correct, but no longer bit-exact" in caplog.text


@pytest.mark.parametrize(("votes", "agreed"), [(1.0, "fp32"), (2.0, "bf16")])
def test_auto_takes_the_precision_that_all_workers_would(votes, agreed, monkeypatch):
    monkeypatch.setattr(run_module, "sum_over_ranks", lambda values, world_size: torch.full_like(values, votes))
    assert run_module._agreed("bf16", Context(world_size=2)) == agreed


def test_a_disk_that_does_not_answer_costs_no_checkpoint(make_job, monkeypatch):
    job = make_job(**RICH)
    train_until(job, 4, monkeypatch)
    real = files_module.sha256_of

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(files_module, "sha256_of", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        train(job, Context())
    monkeypatch.setattr(files_module, "sha256_of", real)
    steps = []
    real_step = loop_module.train_step
    monkeypatch.setattr(
        loop_module, "train_step", lambda run, x, y: steps.append(run.state.step) or real_step(run, x, y)
    )
    train(job, Context())
    assert steps == [4, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"method": StandardConfig()},
        {"method": TRADESConfig(attack=AttackConfig(steps=1, loss="kl", start="normal", bn="train"))},
        {"method": MARTConfig(attack=AttackConfig(steps=1)), "awp": AWPConfig(warmup_epochs=1)},
        {"method": FGSMRSConfig(), "eps_warmup_epochs": 1, "label_smoothing": 0.1},
        {"mix": MixConfig(kind="cutmix"), "optimizer": OptimizerConfig(clip_norm=0.5)},
        {"precision": "bf16", "ema": EMAConfig()},
        {"activation": ActivationConfig(name="frelu", sharing="stage")},
    ],
    ids="-".join,
)
def test_every_kind_of_training_learns(options, make_job):
    trained = train(make_job(epochs=3, **options), Context())
    losses = [record.train_loss for record in trained.history]
    assert losses[-1] < losses[0]


def test_adversarial_weights_leave_running_statistics_to_the_training_pass(make_job):
    job = make_job(epochs=2, awp=AWPConfig())
    train(job, Context())
    tensors = newest_tensors(job.output)
    batches = [t.item() for name, t in tensors.items() if name.endswith("num_batches_tracked")]
    assert set(batches) == {6}


def group(output, name):
    """One group of tensors of the newest state."""
    return {key.partition("/")[2]: t for key, t in newest_tensors(output).items() if key.startswith(f"{name}/")}


def test_kept_network_is_the_average_of_the_selected_epoch(make_job, monkeypatch):
    fake_accuracies(monkeypatch, [0.1, 0.2, 0.3])
    job = make_job(epochs=3, **RICH)
    assert train(job, Context()).selected_epoch == 3
    kept = load_model(job.output / "model").state_dict()
    assert same(kept, group(job.output, "ema"))
    assert not same(kept, group(job.output, "model"))


def test_of_equal_epochs_the_first_is_kept(make_job, monkeypatch):
    fake_accuracies(monkeypatch, [0.1, 0.3, 0.3])
    job = make_job(epochs=3, **RICH)
    trained = train(job, Context())
    assert (trained.selected_epoch, trained.val_robust) == (2, 0.3)
    assert not same(load_model(job.output / "model").state_dict(), group(job.output, "ema"))
    assert [p.name for p in (job.output / "checkpoints").glob("best-*")] == ["best-0002"]


def test_finished_training_is_returned_and_a_changed_one_is_redone(make_job, monkeypatch):
    job = make_job(epochs=1)
    trained = train(job, Context())
    assert json.loads((job.output / "trained.json").read_text()) == json.loads(trained.model_dump_json())
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", None)
        assert train(job, Context()) == trained
    changed = job.model_copy(update={"seed": 5})
    assert train(changed, Context()).fingerprint != trained.fingerprint
    (job.output / "model" / "model.safetensors").write_bytes(b"")
    assert outcome(train(changed, Context()))["weights_sha256"] != trained.weights_sha256


def test_a_disk_that_does_not_answer_says_nothing_about_a_finished_training(make_job, monkeypatch):
    job = make_job(epochs=1)
    trained = train(job, Context())

    def no_answer(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", no_answer)
        with pytest.raises(OSError, match="Input/output error"):
            train(job, Context())
    assert train(job, Context()) == trained


def test_a_network_whose_description_was_altered_is_written_anew(make_job):
    job = make_job(epochs=1)
    trained = train(job, Context())
    path = job.output / "model" / "model.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "mean": [0.9]}))
    assert outcome(train(job, Context())) == outcome(trained)
    assert path.read_text() == before


def test_a_record_from_before_the_description_had_a_digest_is_still_one(make_job, monkeypatch):
    job = make_job(epochs=1)
    trained = train(job, Context()).model_copy(update={"record_sha256": None})
    (job.output / "trained.json").write_text(trained.model_dump_json())
    monkeypatch.setattr(loop_module, "train_step", None)
    assert train(job, Context()) == trained


def test_a_damaged_best_network_costs_what_it_stood_for_and_no_more(make_job, monkeypatch, caplog):
    whole, job = make_job("whole", epochs=2), make_job(epochs=2)
    expected = train(whole, Context())
    train_until(job, 4, monkeypatch)  # in the second epoch
    (best,) = (job.output / "checkpoints").glob("best-*")
    (best / "model.safetensors").write_bytes(b"x")
    assert train(job, Context()).weights_sha256 == expected.weights_sha256
    assert "its best network is damaged" in caplog.text


def test_frozen_bank_is_the_same_after_training(make_job, tmp_path):
    torch.manual_seed(3)
    source = build_model("resnet8", activation="frelu", in_channels=1, width=4)
    bank = ActivationBank.from_model(source)
    bank.save(tmp_path / "bank")
    options = {"bank": tmp_path / "bank", "ema": EMAConfig(decay=0.5), "awp": AWPConfig()}
    job = make_job(bank_digest=bank.digest, **options)
    trained = train(job, Context())
    kept = load_model(job.output / "model")
    assert trained.bank_digest == bank.digest
    assert trained.activation_digest == trained.activation_digest_before == ActivationBank.from_model(kept).digest
    assert all(
        torch.equal(a.function.weight, b.function.weight)
        for a, b in zip(sites_of(kept), sites_of(source), strict=True)
        if hasattr(a.function, "weight")
    )


@pytest.mark.parametrize("name", ["sparta", "frelu"])
def test_an_activation_without_a_learning_rate_stays_as_it_starts(name, make_job):
    optimizer = OptimizerConfig(lr=0.1, clip_norm=1.0, activation_lr_factor=0, activation_weight_decay=0.1)
    options = {"activation": ActivationConfig(name=name), "ema": EMAConfig(decay=0.5), "awp": AWPConfig()}
    job = make_job(optimizer=optimizer, **options)
    start = ActivationBank.from_model(build_network(job, PreparedData.load(job.data), None)[0])
    trained = train(job, Context())
    assert trained.activation_digest == trained.activation_digest_before == start.digest
    kept = load_model(job.output / "model")
    assert not any(parameter.requires_grad for site in sites_of(kept) for parameter in site.parameters())


def sites_of(model):
    from sparta_models import named_sites

    return [site for _, site in named_sites(model)]


def test_bank_of_another_digest_is_refused(make_job, tmp_path):
    bank = ActivationBank.from_model(build_model("resnet8", in_channels=1, width=4))
    bank.save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"expected a bank with digest 0000 in .*bank, got"):
        train(make_job(bank=tmp_path / "bank", bank_digest="0000"), Context())


def test_a_frozen_activation_that_changed_is_found(make_job, tmp_path, monkeypatch):
    """A defect planted in the step moves a frozen parameter; the digest after the training tells."""
    bank = ActivationBank.from_model(build_model("resnet8", in_channels=1, width=4))
    bank.save(tmp_path / "bank")
    real = loop_module.train_step

    def leaking(run, x, y):
        with torch.no_grad():
            next(p for p in run.model.parameters() if not p.requires_grad).add_(0.1)
        return real(run, x, y)

    monkeypatch.setattr(loop_module, "train_step", leaking)
    with pytest.raises(FrozenChangedError, match="the frozen activations changed in training"):
        train(make_job(bank=tmp_path / "bank", epochs=1), Context())


def poisoned(monkeypatch, step, make_loss):
    """Let the loss of one step be what make_loss makes of it."""
    real = loop_module.train_step

    def step_with(run, x, y):
        method = run.method

        class Poisoned:
            perturb, cost = method.perturb, method.cost

            def terms(self, *args):
                terms = method.terms(*args)
                return Terms(make_loss(terms.loss), terms.adv, terms.clean)

        run.method = Poisoned() if run.state.step == step else method
        return real(run, x, y)

    monkeypatch.setattr(loop_module, "train_step", step_with)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_before_the_step_and_keeps_the_batch(value, make_job, monkeypatch):
    job = make_job(**RICH)
    poisoned(monkeypatch, 4, lambda loss: loss * value)
    with pytest.raises(NonFiniteLossError, match=r"at step 4; the step was not taken, the batch is in"):
        train(job, Context())
    assert all(t.isfinite().all() for t in newest_tensors(job.output).values())
    from safetensors.torch import load_file

    batch = load_file(job.output / "nonfinite-step4-rank0.safetensors")
    assert batch["x"].shape == batch["x_adv"].shape == (32, 1, 8, 8)
    monkeypatch.undo()
    assert train(job, Context()).epochs == 2  # the last good checkpoint goes on


def test_out_of_memory_names_numbers_and_settings(make_job, monkeypatch):
    def full(run, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop_module, "train_step", full)
    with pytest.raises(OutOfMemoryError, match=r"32 images per worker .* 2.00 GiB.*lower training.batch_size=32"):
        train(make_job(), Context())


def test_out_of_memory_of_the_processor_is_explained_too(make_job, monkeypatch):
    monkeypatch.setattr(loop_module, "train_step", lambda run, x, y: torch.empty(2**50))  # beyond any address space
    with pytest.raises(
        OutOfMemoryError, match=r"does not fit on cpu: .*DefaultCPUAllocator.*lower training.batch_size"
    ):
        train(make_job(), Context())


def test_out_of_memory_of_a_validation_names_its_own_batch_size(make_job, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(epoch_module, "validate", full)
    message = "256 validation images per worker does not fit .*; lower training.selection.batch_size=256 and begin anew"
    with pytest.raises(OutOfMemoryError, match=message) as caught:
        train(make_job(), Context())
    assert "training.batch_size" not in str(caught.value)


@pytest.mark.parametrize("resolved", ["fp32", "bf16"])
def test_out_of_memory_offers_bf16_only_where_it_is_not_in_use(resolved, make_job, monkeypatch):
    def full(run, x, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop_module, "train_step", full)
    monkeypatch.setattr(run_module, "resolve_precision", lambda *args: resolved)
    with pytest.raises(OutOfMemoryError) as caught:
        train(make_job(precision="auto"), Context())
    assert ('set training.precision="bf16"' in str(caught.value)) == (resolved == "fp32")


def test_stop_request_checkpoints_and_the_job_goes_on_from_there(make_job):
    asked = iter([False, False, False, True])
    job, whole = make_job("stopped", ema=EMAConfig()), make_job("whole", ema=EMAConfig())
    with pytest.raises(TrainingStopped, match="after step 4"):
        train(job, replace(Context(), stop_requested=lambda: next(asked)))
    assert outcome(train(job, Context())) == outcome(train(whole, Context()))


def fake_accuracies(monkeypatch, values):
    accuracies = iter(values)
    monkeypatch.setattr(epoch_module, "validate", lambda *args, **kwargs: (0.9, next(accuracies)))


def test_stopped_after_the_last_step_of_an_epoch_only_the_validation_is_left(make_job):
    asked = iter([False] * 5 + [True])
    job = make_job()
    with pytest.raises(TrainingStopped, match="after step 6"):
        train(job, replace(Context(), stop_requested=lambda: next(asked)))
    trained = train(job, Context())
    assert outcome(trained) == outcome(train(make_job("whole"), Context()))
    assert trained.flops_per_step > 0


def test_early_stopping_ends_after_its_patience(make_job, monkeypatch):
    fake_accuracies(monkeypatch, [0.3, 0.5, 0.45, 0.4, 0.9])
    trained = train(make_job(epochs=5, early_stopping=EarlyStoppingConfig(patience=2)), Context())
    assert (trained.epochs, trained.selected_epoch, trained.val_robust) == (4, 2, 0.5)
    assert trained.stopped_early == "no better robust accuracy in 2 validations"


def test_catastrophic_overfitting_ends_the_training_with_the_best_epoch(make_job, monkeypatch):
    fake_accuracies(monkeypatch, [0.5, 0.6, 0.1, 0.1])
    trained = train(make_job(epochs=4, method=FGSMRSConfig()), Context())
    assert (trained.epochs, trained.selected_epoch) == (3, 2)
    assert "catastrophic overfitting in epoch 3: validation robust accuracy fell from 0.600 to 0.100" in (
        trained.stopped_early
    )


@pytest.mark.parametrize(
    ("accuracies", "epochs"),
    [
        ([0.12, 0.15, 0.0, 0.0], 3),  # by less than collapse_drop, but all there was
        ([0.05, 0.09, 0.0, 0.0], 4),  # ten classes: nothing was learnt yet
        ([0.3, 0.5, 0.31, 0.29], 4),  # by more than collapse_drop in the last epoch only
    ],
)
def test_a_collapse_is_noticed_from_any_accuracy_above_chance(accuracies, epochs, make_job, monkeypatch):
    fake_accuracies(monkeypatch, accuracies)
    trained = train(make_job(epochs=4, method=FGSMRSConfig()), Context())
    assert trained.epochs == epochs
    assert trained.selected_epoch == 2
    assert ("catastrophic overfitting" in (trained.stopped_early or "")) == (accuracies[1] > 0.1)


def test_patience_begins_anew_after_the_fall_back(make_job, monkeypatch):
    """Without it the epoch of the collapse, the second without a better one, would be the last."""
    fake_accuracies(monkeypatch, [0.6, 0.59, 0.1, 0.2, 0.3, 0.4])
    method = FGSMRSConfig(on_collapse="pgd_at", fallback=AttackConfig(steps=1))
    trained = train(make_job(epochs=6, method=method, early_stopping=EarlyStoppingConfig(patience=2)), Context())
    assert (trained.epochs, trained.selected_epoch) == (5, 1)
    assert trained.stopped_early == "no better robust accuracy in 2 validations"


@pytest.mark.parametrize("kill_at", [None, 10])
def test_catastrophic_overfitting_falls_back_to_pgd_from_the_best_epoch(kill_at, make_job, monkeypatch):
    method = FGSMRSConfig(on_collapse="pgd_at", fallback=AttackConfig(steps=3))
    seen = []
    real = loop_module.train_step

    def watching(run, x, y):
        if run.state.step == 9:  # the first step after the collapse starts from the best network
            best = load_model(run.checkpoints.best(2)).state_dict()
            assert same(best, run.model.state_dict())
            assert not run.optimizer.state
        seen.append(run.method.cost.attack_steps)
        if run.state.step == kill_at and len(seen) == kill_at + 1:
            raise Killed
        return real(run, x, y)

    monkeypatch.setattr(loop_module, "train_step", watching)
    fake_accuracies(monkeypatch, [0.5, 0.6, 0.1, 0.2])
    job = make_job(epochs=4, method=method, checkpoint=CheckpointConfig(every_steps=1))
    if kill_at is not None:
        with pytest.raises(Killed):
            train(job, Context())
    trained = train(job, Context())
    assert (trained.epochs, trained.selected_epoch, trained.stopped_early) == (4, 2, None)
    assert [steps for i, steps in enumerate(seen) if i != kill_at] == [1] * 9 + [3] * 3


def test_clean_accuracy_selects_when_asked(make_job, monkeypatch):
    accuracies = iter([(0.7, 0.5), (0.9, 0.1)])
    monkeypatch.setattr(epoch_module, "validate", lambda *args, **kwargs: next(accuracies))
    assert train(make_job(selection=SelectionConfig(metric="clean")), Context()).selected_epoch == 2


def test_validation_is_due_every_so_many_epochs_and_at_the_end(make_job):
    selection = SelectionConfig(attack=AttackConfig(steps=1), every=2, max_samples=10)
    trained = train(make_job(epochs=3, selection=selection), Context())
    assert [record.epoch for record in trained.history] == [2, 3]
    assert trained.val_clean * 10 == pytest.approx(round(trained.val_clean * 10))


def test_every_epoch_is_reported_and_journaled(make_job):
    reports, journal = [], []
    context = Context(
        report=lambda metrics, checkpoint: reports.append((dict(metrics), checkpoint)),
        log=lambda metrics, step: journal.append((step, dict(metrics))),
    )
    job = make_job(method=TRADESConfig(attack=AttackConfig(steps=1)))
    train(job, context)
    assert [metrics["epoch"] for metrics, _ in reports] == [1, 2]
    assert {checkpoint.name for _, checkpoint in reports} == {"a", "b"}
    assert [step for step, _ in journal] == [3, 6]
    expected = {"train_loss", "train_clean", "train_robust", "val_clean", "val_robust", "lr"}
    expected |= {"images_per_second", "flops_per_step", "share_of_floor", "loader_wait_share", "overhead_share"}
    assert expected <= journal[0][1].keys() & reports[0][0].keys()
    assert not (job.output / "metrics.jsonl").exists()


def test_speed_is_of_the_images_that_came(make_job):
    """90 an epoch, in batches of 32, 32 and 26."""
    reports = []
    train(make_job(), Context(report=lambda metrics, _: reports.append(metrics)))
    for metrics in reports:
        assert metrics["images_per_second"] * 3 * metrics["step_ms"] / 1000 == pytest.approx(90)


def test_validation_is_printed_here_unless_a_launcher_is_told(make_job, capsys):
    train(make_job("alone"), Context())
    assert capsys.readouterr().out.count("val robust") == 2
    train(make_job("launched"), Context(report=lambda metrics, checkpoint: None))
    assert "val robust" not in capsys.readouterr().out


def floors(monkeypatch):
    """Forward passes of the steps whose floor is measured."""
    measured, real = [], monitor_module.floor_seconds

    def measuring(attacked, trained, x, cost):
        measured.append(cost.forward_equivalents)
        return real(attacked, trained, x, cost, repeats=1)

    monkeypatch.setattr(monitor_module, "floor_seconds", measuring)
    return measured


def test_floor_and_operations_are_those_of_the_epochs_steps(make_job, monkeypatch):
    """Adversarial weights set in with the second epoch and cost the pass of 3 again."""
    measured, reports = floors(monkeypatch), []
    job = make_job(epochs=3, awp=AWPConfig(warmup_epochs=1))
    trained = train(job, Context(report=lambda metrics, _: reports.append(metrics)))
    assert measured == [2 * 2 + 3, 2 * 2 + 6]
    flops = [metrics["flops_per_step"] for metrics in reports]
    assert flops == [flops[0], flops[0] / 7 * 10, flops[0] / 7 * 10]
    assert trained.flops_per_step == flops[-1]


def test_floor_is_measured_again_after_the_fall_back(make_job, monkeypatch):
    measured = floors(monkeypatch)
    fake_accuracies(monkeypatch, [0.6, 0.1, 0.2])
    train(make_job(epochs=3, method=FGSMRSConfig(on_collapse="pgd_at", fallback=AttackConfig(steps=3))), Context())
    assert measured == [5, 9]


def test_clean_images_are_looked_at_in_eval_mode_also_where_attacks_are_not(make_job, digits):
    job = make_job(method=PGDATConfig(attack=AttackConfig(steps=1, bn="train")))
    run = run_module.open_run(job, Context(), digits, None, "look")
    with run.loader, run.val_loader:
        x, _ = next(iter(run.loader))
    z, expected = run.clean_look(x), shadow(run.model)(x).detach()
    torch.testing.assert_close(z, expected)
    assert not torch.allclose(run.attacked.look(x), expected, atol=0.01)


@pytest.mark.parametrize("method", [PGDATConfig(attack=AttackConfig(steps=1)), FGSMRSConfig()])
def test_clean_accuracy_of_adversarial_training_is_that_of_the_network_before_the_step(method, make_job, digits):
    """All images in one batch, one step: the look at the clean ones is at the initial network."""
    job = make_job(epochs=1, batch_size=90, method=method)
    record = train(job, Context()).history[0]
    model, _ = build_network(job, digits, None)
    with open_split(digits, "train", batch_size=90) as loader:
        x, y = next(iter(loader))
    with torch.no_grad():
        right = model.eval()(x).argmax(1) == y
    assert record.train_clean == right.double().mean().item()
    assert record.train_robust is not None


def test_clean_accuracy_is_looked_at_now_and_then(make_job, monkeypatch):
    looks = []
    real = Forward.look
    monkeypatch.setattr(Forward, "look", lambda self, x: looks.append(len(x)) or real(self, x))
    monkeypatch.setattr(run_module, "CLEAN_LOOK", 2)
    train(make_job(), Context())
    assert looks == [32, 26] * 2  # the first and the third of three batches
    looks.clear()
    train(make_job("trades", method=TRADESConfig(attack=AttackConfig(steps=1))), Context())
    assert looks == []  # it sees the clean images anyway


def test_flops_are_those_of_the_passes(make_job):
    """(2 K + 3) forward passes over the batch; a forward's operations are twice its multiplications."""
    from pipeline.training.network import forward_flops

    job = make_job(epochs=1)
    model = build_model("resnet8", activation="relu", in_channels=1, width=4)
    macs = 64 * 9 * (1 * 4 + 2 * 4 * 4) + 16 * (9 * (4 * 8 + 8 * 8) + 4 * 8) + 4 * (9 * (8 * 16 + 16 * 16) + 8 * 16)
    assert forward_flops(model, torch.rand(3, 1, 8, 8)) == pytest.approx(2 * macs, rel=0.1)
    relu = make_job("relu", epochs=1, activation=ActivationConfig(name="relu"))
    assert train(relu, Context()).flops_per_step == 7 * 32 * forward_flops(model, torch.rand(1, 1, 8, 8))
    assert isinstance(TrainedModel.model_validate_json(train(job, Context()).model_dump_json()), TrainedModel)


@pytest.mark.parametrize("schedule", [OneCycleConfig(), ConstantConfig(warmup_epochs=1)])
def test_a_training_of_one_step_with_a_learning_rate_of_zero_is_refused(schedule, make_job):
    with pytest.raises(ValueError, match="begins with a learning rate of 0, and this training has one step"):
        train(make_job(epochs=1, batch_size=512, schedule=schedule), Context())


def test_batch_that_is_too_small_for_its_workers_is_refused(make_job, monkeypatch):
    monkeypatch.setattr(loop_module, "finished", lambda *args: None)  # which would ask the other workers
    with pytest.raises(ValueError, match="batch_size=32 is less than two images for each of 17 workers"):
        train(make_job(), Context(world_size=17))
