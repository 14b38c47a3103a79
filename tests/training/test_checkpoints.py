"""Checkpoints and models on disk: whole or refused, and the one before is taken when the newest is damaged."""

import json
import shutil

import pytest
import torch

from pipeline.config.training import EMAConfig, OptimizerConfig
from pipeline.training import ModelMeta, load_model, save_model
from pipeline.training.checkpoint import Checkpoints, gather, restore
from pipeline.training.ema import EMA
from pipeline.training.files import DamagedFilesError
from pipeline.training.optim import build_optimizer
from pipeline.training.progress import Progress
from sparta_models import ActivationBank, ActivationSpec, build_model

META = ModelMeta(
    name="resnet8",
    options={"width": 4},
    activation=ActivationSpec.parse({"name": "sparta", "sharing": "stage"}).mapping(),
    num_classes=5,
    in_channels=1,
    mean=(0.3,),
    std=(0.4,),
    image_size=8,
    dataset="digits",
)


def state(seed):
    """A network after one step, with momentum and average."""
    torch.manual_seed(seed)
    model = META.build().to(memory_format=torch.channels_last).train()
    optimizer, ema = build_optimizer(model, OptimizerConfig()), EMA(model, EMAConfig())
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    ema.update(0)
    return model, optimizer, ema


def tensors(parts):
    return {f"{group}/{name}": t for group, values in gather(*parts).items() for name, t in values.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_restored_state_is_the_saved_one_bit_for_bit(tmp_path):
    saved, fresh = state(0), state(1)
    Checkpoints(tmp_path, "job").save(gather(*saved), Progress(step=7, epoch=2, best_metric=0.5))
    groups, progress = Checkpoints(tmp_path, "job").load()
    restore(groups, *fresh)
    assert same(tensors(saved), tensors(fresh))
    assert (progress.step, progress.epoch, progress.best_metric) == (7, 2, 0.5)
    assert any(name.startswith("optimizer/") for name in tensors(fresh))


def test_newest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path, "job")
    for step in (1, 2, 3):
        checkpoints.save(gather(*state(step)), Progress(step=step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert Checkpoints(tmp_path, "job").load()[1].step == 3


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "record", "step", "empty"])
def test_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, "job")
    for step in (1, 2):
        newest = checkpoints.save(gather(*state(step)), Progress(step=step))
    weights = newest / "model.safetensors"
    content = weights.read_bytes()
    match damage:
        case "truncate":
            weights.write_bytes(content[:-10])
        case "alter":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "remove":
            weights.unlink()
        case "record":
            (newest / "state.json").write_text("{")
        case "step":
            record = newest / "state.json"
            record.write_text(record.read_text().replace('"step": 2', '"step": 3'))
        case "empty":
            shutil.rmtree(newest)
            newest.mkdir()
    again = Checkpoints(tmp_path, "job")
    assert again.load()[1].step == 1
    assert "is damaged and passed over" in caplog.text
    assert again.save(gather(*state(3)), Progress(step=2)) == newest  # the good one is not overwritten


@pytest.mark.parametrize("older", [1, 2])
def test_checkpoint_whose_best_network_is_damaged_gives_way_to_the_one_before(older, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, "job")
    for step, best in ((1, older), (2, 2)):
        save_model(checkpoints.best(best), META.build(), META)
        checkpoints.save(gather(*state(step)), Progress(step=step, best_epoch=best))
    (checkpoints.best(2) / "model.safetensors").write_bytes(b"x")
    found = Checkpoints(tmp_path, "job").load()
    assert (found and found[1].step) == (1 if older == 1 else None)
    assert "its best network is damaged" in caplog.text


def test_checkpoint_of_other_settings_is_passed_over(tmp_path, caplog):
    Checkpoints(tmp_path, "job").save(gather(*state(0)), Progress(step=1))
    assert Checkpoints(tmp_path, "other").load() is None
    assert "belongs to other settings" in caplog.text


def test_leftovers_of_a_crash_while_writing_do_no_harm(tmp_path):
    checkpoints = Checkpoints(tmp_path, "job")
    checkpoints.save(gather(*state(0)), Progress(step=1))
    for name in (".b.123", ".best-0002.123", ".a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path, "job").load()[1].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_states_at_one_step_the_later_epoch_is_loaded(tmp_path):
    """The last step of an epoch, and the end of that epoch with its validation."""
    checkpoints = Checkpoints(tmp_path, "job")
    checkpoints.save(gather(*state(1)), Progress(step=3, epoch=0, batch=3))
    end = checkpoints.save(gather(*state(2)), Progress(step=3, epoch=1))
    again = Checkpoints(tmp_path, "job")
    assert again.load()[1].epoch == 1
    assert again.newest == end


def test_newest_is_never_another_jobs(tmp_path):
    others = Checkpoints(tmp_path, "other")
    for step in (1, 2):
        others.save(gather(*state(step)), Progress(step=step))
    checkpoints = Checkpoints(tmp_path, "job")
    assert checkpoints.load() is None
    assert checkpoints.newest is None
    written = checkpoints.save(gather(*state(3)), Progress(step=1))
    assert checkpoints.newest == written


@pytest.mark.parametrize("frozen", [False, True])
def test_model_round_trip_gives_the_same_outputs(frozen, tmp_path):
    torch.manual_seed(0)
    model = META.build()
    if frozen:
        ActivationBank.from_model(META.build()).apply_to(model)
    save_model(tmp_path / "m", model, META.model_copy(update={"frozen": frozen}))
    loaded = load_model(tmp_path / "m")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))
    assert not loaded.training
    assert any(not p.requires_grad for p in loaded.parameters()) == frozen
    assert ActivationBank.from_model(loaded) == ActivationBank.from_model(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "expected a complete directory"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "the file was altered"),
        (lambda d: edit(d, name="resnet9"), "unknown model"),
        (lambda d: edit(d, num_classes=7), "size mismatch"),
        (lambda d: edit(d, format=99), "expected format 1"),
        (lambda d: edit(d, extra=1), "extra: extra inputs are not permitted, got 1"),
        (lambda d: edit(d, activation={"name": None}), "unknown activation None"),
        (lambda d: edit(d, activation={}), 'expected a name or a mapping with "name"'),
        (lambda d: edit(d, mean=[]), "expected 1 values of mean"),
    ],
)
def test_model_files_that_do_not_fit_are_refused(change, message, tmp_path):
    save_model(tmp_path, META.build(), META)
    change(tmp_path)
    with pytest.raises(DamagedFilesError, match=message):
        load_model(tmp_path)


def edit(directory, **changes):
    path = directory / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_model_is_named(tmp_path):
    with pytest.raises(DamagedFilesError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_nothing_is_pickled(tmp_path):
    Checkpoints(tmp_path / "c", "job").save(gather(*state(0)), Progress())
    save_model(tmp_path / "m", build_model("resnet8", in_channels=1, num_classes=5, width=4), META)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_a_frozen_network_comes_back_with_the_options_that_its_bank_was_saved_with(tmp_path):
    older = {"name": "sparta", "sharing": "site", "variant": "depthwise"}  # of before its other options were there
    meta = META.model_copy(update={"activation": older, "frozen": True})
    model = meta.build()
    bank = ActivationBank.from_model(model)
    save_model(tmp_path / "model", model, meta)
    assert ActivationBank.from_model(load_model(tmp_path / "model")).digest == bank.digest
    assert bank.spec.mapping() == older
