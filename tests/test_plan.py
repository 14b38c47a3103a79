"""The estimate of a dry run: counted by hand, by the training's own count, and against what is really written."""

import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import run
from pipeline.chain import Chain
from pipeline.config.data import DataConfig, SplitLimits
from pipeline.config.evaluation import CurveConfig, EvaluationConfig, PGDAttack
from pipeline.config.load import ConfigError, load_config
from pipeline.config.model import ModelConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.training import (
    AttackConfig,
    AWPConfig,
    PGDATConfig,
    SelectionConfig,
    TRADESConfig,
    TrainingConfig,
)
from pipeline.data import prepare
from pipeline.data.build import _storage
from pipeline.plan import estimate, table
from pipeline.plan.__main__ import main
from pipeline.plan.scale import Link, Machine, Training, scale
from pipeline.plan.sizes import DataSize, expected_size, prepared_size
from pipeline.plan.work import Network, evaluation_flops, network_of, training_flops
from pipeline.stages.graph import head, tail
from pipeline.training.network import forward_flops
from sparta_models import build_model

pytestmark = pytest.mark.usefixtures("own_root")
DATA = DataSize(train=100, val=20, test=30, side=8, channels=1, num_classes=5, bytes_per_image=64)
NETWORK = Network(flops=10.0, parameters=7, state_bytes=40)


def test_training_is_counted_as_by_hand() -> None:
    training = TrainingConfig(
        epochs=3,
        method=PGDATConfig(attack=AttackConfig(steps=5)),
        selection=SelectionConfig(attack=AttackConfig(steps=2), every=2, max_samples=10),
    )
    steps = 3 * 100 * (5 * 2 + 3)
    validations = 2 * (20 + 10 * 2 * 2)  # after epochs 2 and 3
    assert training_flops(NETWORK, training, DATA) == 10 * (steps + validations)


def test_adversarial_weights_cost_the_methods_training_passes_again() -> None:
    training = TrainingConfig(
        epochs=3,
        method=TRADESConfig(attack=AttackConfig(steps=5)),
        awp=AWPConfig(warmup_epochs=1),
        selection=SelectionConfig(attack=AttackConfig(steps=1), every=3),
    )
    steps = 100 * (3 * (5 * 2 + 6) + 2 * 6)
    assert training_flops(NETWORK, training, DATA) == pytest.approx(10 * (steps + 20 * (1 + 2)))


def test_evaluation_is_counted_as_by_hand() -> None:
    config = EvaluationConfig(
        attacks=(PGDAttack(steps=20, restarts=2),), curve=CurveConfig(multiples=(1.0, 2.0), steps=5), num_examples=25
    )
    assert evaluation_flops(NETWORK, config, DATA) == 10 * (25 * (1 + 80) + 25 * 2 * 2 * 5)


@pytest.mark.parametrize("name", ["resnet8", "vgg16_bn", "mobilenet_v2"])
def test_a_network_costs_what_its_training_counts(name: str) -> None:
    model = ModelConfig.model_validate({"name": name, "activation": {"name": "relu"}})
    size = DATA._replace(side=32, channels=3)
    real = build_model(name, activation="relu", num_classes=5, in_channels=3)
    planned = network_of(model, size)
    assert planned.flops == forward_flops(real, torch.rand(2, 3, 32, 32))
    assert planned.parameters == sum(p.numel() for p in real.parameters())


def test_a_network_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resnet8 .* cannot be built"):
        network_of(ModelConfig(name="resnet8", options={"width": -3}), DATA)


@pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")
@pytest.mark.parametrize("classes", [None, (0, 1, 2, 3, 4)])
def test_data_come_out_as_large_as_expected(
    classes: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
    config = DataConfig(dataset="digits", classes=classes, limit=SplitLimits(val=50))
    expected, real = expected_size(config, PlanConfig()), prepared_size(prepare(config, tmp_path, seed=0))
    assert expected is not None
    assert expected.val == real.val == 50
    assert expected._replace(bytes_per_image=0, val=0)[3:6] == real[3:6]
    for got, wanted in ((expected.train, real.train), (expected.test, real.test)):
        assert got == pytest.approx(wanted, rel=0.02)
    assert expected.num_bytes == pytest.approx(real.num_bytes, rel=0.15)


def test_an_npz_is_measured_by_its_headers_and_a_folder_by_what_one_is_told(tmp_path: Path) -> None:
    arrays = {"train_images": np.zeros((90, 12, 12, 3), np.uint8), "train_labels": np.arange(90) % 4}
    arrays |= {"test_images": np.zeros((20, 12, 12, 3), np.uint8), "test_labels": np.arange(20) % 4}
    np.savez(tmp_path / "x.npz", **arrays)
    size = expected_size(DataConfig(dataset="npz", path=str(tmp_path / "x.npz")), PlanConfig())
    assert size == DataSize(81, 9, 20, 12, 3, 4, 12 * 12 * 3)
    np.savez(tmp_path / "x.npz", **(arrays | {"train_images": np.zeros(4, np.uint8)}))
    assert expected_size(DataConfig(dataset="npz", path=str(tmp_path / "x.npz")), PlanConfig()) is None
    folder = DataConfig(dataset="folder", path="nowhere")
    assert expected_size(folder, PlanConfig()) is None
    told = expected_size(folder, PlanConfig(num_images=1000, num_classes=10))
    assert told is not None
    assert (told.train, told.side, told.num_classes) == (720, 224, 10)


@pytest.mark.parametrize(
    "settings",
    [{"channels": 1}, {"loader": "memory"}, {"image_size": 64}, {"storage": "raw"}, {}, {"storage": "jpeg"}],
    ids=str,
)
def test_a_folder_is_counted_as_jpeg_where_it_is_stored_as_jpeg(settings: dict[str, object]) -> None:
    config = DataConfig.model_validate({"dataset": "folder", "path": "nowhere", **settings})
    size = expected_size(config, PlanConfig(num_images=1000, num_classes=10))
    assert size is not None
    jpeg = _storage(config, size.side, size.channels, ".beton") == "jpeg"
    assert jpeg == (settings in ({}, {"storage": "jpeg"}))
    assert (size.bytes_per_image == size.side**2 * size.channels) == (not jpeg)


def test_hours_follow_from_the_images_per_second_of_the_source() -> None:
    config = load_config("demo", ["plan.images_per_second=100", "training.selection.every=1000"])
    nodes = [*head(config), *tail(config)]
    estimates, speed = estimate(nodes, config, {})
    source = next(e for e in estimates if e.key == "pretrain:source")
    deeper = next(e for e in estimates if e.key == "transfer:deeper")
    assert speed is not None
    assert source.flops is not None
    assert deeper.flops is not None
    assert deeper.flops > source.flops
    images = 16 * expected_size(config.data, config.plan).train  # type: ignore[union-attr]
    assert source.flops / speed == pytest.approx(images / 100, rel=0.2)  # the last validation comes on top
    lines = table(estimates, speed)
    assert any(line.startswith("total") for line in lines)
    assert lines[1].split() == ["estimate", "TFLOP", "checkpoints", "data", "hours"]


def test_dry_run_prints_the_estimate_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", "search.enabled=true"]) == 0
    printed = capsys.readouterr().out
    assert "search: of trials like the training" in printed
    assert "set plan.images_per_second" in printed
    assert not (tmp_path / "runs").exists()


def test_imagenet_is_planned_without_its_data_and_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.process_time()
    assert run.main(["imagenet", "--dry-run"]) == 0
    assert time.process_time() - begin < 60
    printed = capsys.readouterr().out
    assert "not there yet" in printed
    assert "pretrain:source" in printed.partition("estimate")[2]


def test_the_estimate_of_checkpoints_is_what_a_training_writes(tmp_path: Path) -> None:
    from pipeline.training.checkpoint import Checkpoints, gather
    from pipeline.training.optim import build_optimizer
    from pipeline.training.progress import Progress

    config = load_config("demo")
    estimates, _ = estimate([*head(config), *tail(config)], config, {})
    expected = next(e.checkpoint_bytes for e in estimates if e.key == "pretrain:source")
    model = build_model("resnet8", activation=config.model.activation.spec(), num_classes=5, in_channels=1, width=16)
    optimizer = build_optimizer(model, config.training.optimizer)
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, "f")
    for step in (1, 2):
        checkpoints.save(gather(model, optimizer, None), Progress(step=step))
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    networks = 2 * (4 * sum(t.numel() for t in model.state_dict().values()))
    assert expected == pytest.approx(written + networks, rel=0.05)
    assert json.loads((tmp_path / "a" / "state.json").read_text())


def test_a_finished_source_gives_its_own_speed(tmp_path: Path) -> None:
    from pipeline.artifacts import StageRecord
    from pipeline.stages.node import Finished

    config = load_config("demo")
    payload = {"images_per_second": 500.0, "world_size": 2}
    record = StageRecord(
        stage="pretrain", branch="source", fingerprint="", inputs={}, payload=payload, outputs={}, output_digest=""
    )
    _, speed = estimate([*head(config), *tail(config)], config, {"pretrain:source": Finished(tmp_path, record)})
    _, told = estimate(
        [*head(config), *tail(config)], config.model_copy(update={"plan": PlanConfig(images_per_second=250)}), {}
    )
    assert speed == told
    assert Chain(tmp_path).done == {}


# --- more workers ----------------------------------------------------------------------------------------------------

ONE_EPOCH = Training(
    epochs=1, images=6400, forward_equivalents=9, validation_passes=900, gradient_bytes=1e6, checkpoint_bytes=5e6,
    checkpoints_per_epoch=1, steps_per_checkpoint=None,
)  # fmt: skip
NODE = Machine(
    images_per_second=100, decoded_per_second=1000, workers_per_node=4, inside=Link(1e-5, 1e9), between=Link(1e-4, 1e8),
    disk=1e9,
)  # fmt: skip


def test_one_worker_does_what_it_does_alone() -> None:
    alone = scale(ONE_EPOCH, NODE, 1, 64)
    assert alone.all_reduce == 0
    assert alone.hours * 3600 == pytest.approx(64 + 900 / 900 + 5e6 / 1e9)


def test_a_ring_is_counted_as_by_hand_inside_a_node_and_between_nodes() -> None:
    assert scale(ONE_EPOCH, NODE, 4, 64).all_reduce == pytest.approx(2 * 3 * 1e-5 + 2 * 3 / 4 * 1e6 / 1e9)
    between = 2 * 1 * 1e-4 + 2 * 1 / 2 * 2.5e5 / 1e8
    assert scale(ONE_EPOCH, NODE, 8, 64).all_reduce == pytest.approx(6e-5 + 1.5e-3 + between)


def test_more_workers_are_faster_and_less_efficient_and_a_slow_loader_is_named() -> None:
    rows = [scale(ONE_EPOCH, NODE, workers, 64) for workers in (1, 2, 4, 8, 16)]
    hours, efficiencies = [row.hours for row in rows], [row.efficiency for row in rows]
    assert hours == sorted(hours, reverse=True)
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert all(0 < efficiency <= 1 for efficiency in efficiencies)
    slow = scale(ONE_EPOCH, replace(NODE, decoded_per_second=50), 4, 64)
    assert slow.bound == "loader"
    assert slow.efficiency < 0.51


SCALE = Path(__file__).parents[1] / "docs" / "scale.md"
_TABLE = re.compile(r"^python -m pipeline\.plan (?P<arguments>.+)\n```\n(?:(?!```|\|).*\n)*(?P<rows>(?:\|.*\n)+)", re.M)


def test_the_tables_of_the_guide_are_what_their_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    text = SCALE.read_text(encoding="utf-8")
    tables = list(_TABLE.finditer(text))
    assert len(tables) == text.count("| workers |") == 3
    for shown in tables:
        assert main(shlex.split(shown["arguments"])) == 0
        assert capsys.readouterr().out == shown["rows"], shown["arguments"]


def test_the_command_prints_a_row_for_every_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imagenet", "--images-per-second", "600", "--workers", "8", "512"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| 8 | 512 |")
    assert main(["imagenet", "plan.num_images=null", "--images-per-second", "600"]) == 2
    assert "set plan.num_images" in capsys.readouterr().err
