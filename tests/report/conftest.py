import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipeline.artifacts import digest_file
from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import EvaluationConfig
from pipeline.evaluation import CHECKS
from pipeline.evaluation.records import (
    ARRAYS,
    AttackResult,
    AuditReport,
    Check,
    ClassResult,
    CurvePoint,
    Evaluation,
)
from pipeline.evaluation.stats import Accuracy
from pipeline.report import ModelCard, ReportInputs, Trial
from pipeline.training.job import EpochRecord, TrainedModel
from sparta_models import build_model

NUM_IMAGES = 240
EPS = 0.1
CHECK_NAMES = [check.__module__.rpartition(".")[2] for check in CHECKS]
SWEPT = Path(__file__).parents[2] / "docs" / "images" / "sweep_coordinates.png"


def network(activation: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet8", activation=activation, in_channels=1, num_classes=5, width=4).eval()


def make_check(number: int, name: str, verdict: str) -> Check:
    figure = None if verdict == "skip" else {"pass": 0.001 * number, "warn": 0.03, "fail": 0.7}[verdict]
    return Check(
        number=number,
        name=name,
        verdict=verdict,  # type: ignore[arg-type]
        figure=figure,
        warn_above=0.02,
        fail_above=0.05,
        summary=f"3 of 64 examples by which {name} differs; the figure is the lower end of the interval of this share",
        details={},
    )


def make_card(
    root: Path,
    label: str,
    *,
    role: str,
    target: str,
    robust: float,
    activation: str = "sparta",
    dataset: str = "digits04",
    class_names: tuple[str, ...] = ("zero", "one", "two", "three", "four"),
) -> ModelCard:
    directory = root / "evaluate" / label
    directory.mkdir(parents=True)
    generator = np.random.default_rng(sum(map(ord, label)))
    clean = generator.random(NUM_IMAGES) < 0.97
    union = clean & (generator.random(NUM_IMAGES) < robust)
    images = (load_digits().images[:6, None] / 16).astype(np.float32)
    arrays = {
        "correct/clean": clean,
        "correct/union": union,
        "picture/index": np.arange(6),
        "picture/x": images,
        "picture/x_adv": (images + EPS * generator.choice([-1, 1], images.shape)).clip(0, 1).astype(np.float32),
        "picture/y": np.array([0, 1, 2, 3, 4, 0]),
        "picture/predicted": np.array([1, 2, 2, 4, 0, 3]),
    }
    np.savez(directory / ARRAYS, **arrays)  # type: ignore[arg-type]
    counts = {name: Accuracy.of(int(arrays[f"correct/{name}"].sum()), NUM_IMAGES) for name in ("clean", "union")}
    threat = ThreatModel(eps=EPS)
    curve = [(m, Accuracy.of(int(counts["clean"].correct * (1 - m / 4) ** 1.5), NUM_IMAGES)) for m in (0, 1, 2, 3, 4)]
    verdicts = {"eps_curve": "warn", "frozen": "skip"} | ({"gate_saturation": "fail"} if label == "wider" else {})
    checks = tuple(make_check(i, name, verdicts.get(name, "pass")) for i, name in enumerate(CHECK_NAMES, start=1))
    evaluation = Evaluation(
        dataset=dataset,
        data_digest="d" * 64,
        model_digest="e" * 64,
        reference_digest=None,
        seed=0,
        config=EvaluationConfig(threat=threat),
        n=NUM_IMAGES,
        split_size=NUM_IMAGES,
        clean=counts["clean"],
        attacks=(
            AttackResult(name="pgd-ce-20x1", threat=threat, attacked=230, fooled=40, accuracy=counts["union"]),
            AttackResult(name="square-200", threat=threat, attacked=190, fooled=0, accuracy=counts["union"]),
            AttackResult(name="autoattack", threat=threat, attacked=190, fooled=0, accuracy=counts["union"]),
        ),
        union=counts["union"],
        other_threats=(),
        curve=tuple(CurvePoint(eps=m * EPS / 2, accuracy=accuracy) for m, accuracy in curve),
        per_class=tuple(ClassResult(name=n, clean=counts["clean"], robust=counts["union"]) for n in class_names),
        warnings=(),
        arrays_sha256=digest_file(directory / ARRAYS).sha256,
        audit=AuditReport(budget="quick", n=64, threat=threat, model_digest="e" * 64, checks=checks),
    )
    history = tuple(
        EpochRecord(
            epoch=e,
            train_loss=2 / e,
            train_clean=None,
            train_robust=None,
            val_clean=0.97 * (1 - 0.7**e),
            val_robust=robust * (1 - 0.75**e),
        )
        for e in range(1, 13)
    )
    trained = TrainedModel(
        fingerprint="f" * 64,
        weights_sha256="e" * 64,
        activation_digest="b" * 64,
        epochs=12,
        selected_epoch=11,
        val_clean=0.95,
        val_robust=robust,
        history=history,
        images_per_second=3456.7,
        flops_per_step=1.2e9,
        precision="float32",
        world_size=2,
    )
    return ModelCard(
        label=label,
        target=target,
        role=role,  # type: ignore[arg-type]
        activation=activation,
        architecture="resnet8",
        dataset=dataset,
        class_names=class_names,
        num_parameters=12345,
        num_validation=179,
        trained=trained,
        evaluation=evaluation,
        evaluation_directory=directory,
        model_directory=Path(activation),
    )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    return make_inputs(tmp_path_factory.mktemp("evaluations"))


def make_inputs(tmp_path: Path) -> ReportInputs:
    cards = (
        make_card(tmp_path, "source", role="source", target="source", robust=0.82),
        make_card(tmp_path, "source-control", role="control", target="source", robust=0.70, activation="relu"),
        make_card(tmp_path, "wider", role="transfer", target="wider", robust=0.80),
        make_card(tmp_path, "wider-control", role="control", target="wider", robust=0.78, activation="relu"),
        make_card(tmp_path, "digits59", role="transfer", target="digits59", robust=0.62, dataset="digits59"),
        make_card(
            tmp_path,
            "digits59-control",
            role="control",
            target="digits59",
            robust=0.8,
            activation="relu",
            dataset="digits59",
        ),
    )
    trials = tuple(
        Trial(
            name=f"trial{i}", clean=0.9 - 0.03 * i, robust=0.5 + 0.04 * (i % 4), settings={"lr": 0.1 * i}, best=i == 3
        )
        for i in range(6)
    )
    swept = tmp_path / "search_coordinates.png"
    shutil.copyfile(SWEPT, swept)
    return ReportInputs(
        title="demo",
        models=cards,
        trials=trials,
        sweep_pictures=(swept,),
        reference="sparta-activation/1",
        lineage="sparta-activation/1 (candidate)\n  run freeze\n    pretrain: digits04",
        facts={"commit": "a" * 40},
    )


def load(directory: Path) -> torch.nn.Module:
    return network(directory.name)
