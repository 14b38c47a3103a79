"""Validation: the same numbers whatever the batch; what is misclassified is not attacked; what it prints."""

import io

import numpy as np
import pytest
import torch

from pipeline.config.base import ThreatModel
from pipeline.config.data import DataConfig
from pipeline.config.training import AttackConfig, SelectionConfig
from pipeline.data import open_split, prepare
from pipeline.training import Context
from pipeline.training.network import shadow
from pipeline.training.progress import Progress, Sums
from pipeline.training.reporter import Reporter
from pipeline.training.run import open_run
from pipeline.training.validation import validate
from sparta_models import build_model

EXACT = AttackConfig(steps=3, start="none")


@pytest.fixture
def judged(digits):
    """A network that has learnt the digits a little, on clean images."""
    torch.manual_seed(0)
    model = build_model("resnet8", activation="relu", in_channels=1, width=4, mean=digits.mean, std=digits.std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with open_split(digits, "train", batch_size=90) as loader:
        for _ in range(15):
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    return shadow(model)


def run(model, digits, *, batch_size=30, eps=0.1, **selection):
    config = SelectionConfig(**{"attack": EXACT, "batch_size": batch_size, **selection})
    with open_split(digits, "val", batch_size=config.batch_size) as loader:
        return validate(model, loader, ThreatModel(eps=eps), config, seed=0, context=Context())


def test_accuracies_are_counted_over_all_images(judged, digits):
    from pipeline.training.attacks import pgd

    with open_split(digits, "val", batch_size=30) as loader:
        x, y = next(iter(loader))
    right = judged(x).argmax(1) == y
    x_adv = pgd(judged, x, y, eps=0.1, step_size=0.25 / 3, steps=3, random_start=False)
    robust = right & (judged(x_adv).argmax(1) == y)
    expected = (right.double().mean().item(), robust.double().mean().item())
    assert run(judged, digits) == pytest.approx(expected)
    assert run(judged, digits, batch_size=7) == pytest.approx(expected)
    assert 0 < expected[1] < expected[0]


def test_only_the_right_ones_are_attacked(judged, digits):
    sizes = []
    judged.register_forward_hook(lambda _m, args, _z: sizes.append(len(args[0])))
    clean, _ = run(judged, digits)
    assert sizes == [30] + [round(30 * clean)] * 4  # three steps and the verdict


def test_random_starts_are_the_same_every_time(judged, digits):
    attack = AttackConfig(steps=1)
    assert run(judged, digits, attack=attack) == run(judged, digits, attack=attack)


@pytest.mark.parametrize("wanted", [5, None])
def test_of_a_split_that_is_sorted_by_class_all_classes_are_judged(wanted, make_job, tmp_path):
    labels = np.repeat(np.arange(5), 40)
    images = np.random.default_rng(0).integers(0, 256, (220, 8, 8), dtype=np.uint8)
    arrays = {"train_images": images[:200], "train_labels": labels}
    np.savez(tmp_path / "sorted.npz", **arrays, test_images=images[200:], test_labels=labels[::10])
    config = DataConfig(dataset="npz", path=str(tmp_path / "sorted.npz"), loader="memory", val_fraction=0.5)
    data = prepare(config, tmp_path / "data", seed=0)
    selection = SelectionConfig(attack=EXACT, max_samples=None if wanted is None else 10 * wanted)
    job = make_job(selection=selection).model_copy(update={"data": data.directory})
    run = open_run(job, Context(), data, None, "")
    with run.loader, run.val_loader as loader:
        y = torch.cat([y for _, y in loader])
    assert len(y) == 10 * (wanted or 10)
    assert set(y.tolist()) == set(range(5))


def state(step, *, robust_count=0.0):
    sums = Sums(count=64, loss=128.0, robust=32.0 if robust_count else 0.0, robust_count=robust_count)
    return Progress(step=step, sums=sums, seconds=2.0, images=1000.0)


def test_off_a_terminal_fixed_fields_are_printed_at_the_ends():
    stream = io.StringIO()
    with Reporter(200, rank=0, stream=stream) as reporter:
        for step in range(1, 201):
            reporter.step(state(step, robust_count=64), lr=0.1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first step and the last; the ten seconds between lines have not passed
    assert lines[0].startswith("step   1/200   0%  loss  2.0000  clean    --   robust  50.0%  lr 0.10000")
    assert lines[1].startswith("step 200/200 100%")
    assert "500 img/s  eta     0 s" in lines[1]
    assert len(lines[0]) == len(lines[1])


@pytest.mark.parametrize("epochs", [True, False])
def test_off_a_terminal_the_line_of_an_epoch_is_printed_unless_a_launcher_does(epochs):
    stream = io.StringIO()
    with Reporter(10, rank=0, epochs=epochs, stream=stream) as reporter:
        reporter.epoch("epoch 1/2  val robust 50.0%")
    assert stream.getvalue() == ("epoch 1/2  val robust 50.0%\n" if epochs else "")


def test_ranks_above_zero_are_silent():
    stream = io.StringIO()
    with Reporter(1, rank=1, stream=stream) as reporter:
        reporter.step(state(1), lr=0.1)
        reporter.epoch("epoch 1/2  val robust 50.0%")
    assert stream.getvalue() == ""


def test_on_a_terminal_a_bar_is_drawn():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Reporter(10, rank=0, stream=stream) as reporter:
        reporter.step(state(5, robust_count=64), lr=0.1)
        reporter.epoch("epoch 1/2  val robust 50.0%")
    assert "epoch 1/2  val robust 50.0%" in stream.getvalue()
