"""Which images are judged where not all are; on data sorted by class, as folders of images are read."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import AuditConfig, CurveConfig, EvaluationConfig, NoiseAttack
from pipeline.data import PreparedData, open_split, prepare
from pipeline.data.sample import sample
from pipeline.evaluation import evaluate

CONFIG = EvaluationConfig(
    threat=ThreatModel(eps=0.1),
    attacks=(NoiseAttack(num_draws=1),),
    curve=CurveConfig(multiples=(1.0,), steps=1, num_examples=100),
    block_size=64,
    save_adversarial=True,
    audit=AuditConfig(budget="off"),
)


@pytest.fixture(scope="module")
def by_class(tmp_path_factory) -> PreparedData:
    digits = load_digits()
    order = np.argsort(digits.target, kind="stable")
    images, labels = (digits.images[order] * 15).astype(np.uint8), digits.target[order]
    path = tmp_path_factory.mktemp("sorted") / "digits.npz"
    arrays = {"train_images": images[::2], "train_labels": labels[::2]}
    np.savez(path, **arrays, test_images=images[1::2], test_labels=labels[1::2])
    config = DataConfig(dataset="npz", path=str(path), loader="memory")
    return prepare(config, tmp_path_factory.mktemp("prepared"), seed=0)


@pytest.fixture(scope="module")
def split(by_class) -> tuple[torch.Tensor, torch.Tensor]:
    with open_split(by_class, "test", batch_size=10_000) as loader:
        ((x, y),) = loader
    assert torch.equal(y, y.sort().values)
    return x, y


class Zero(nn.Module):
    """Says class 0 whatever it sees."""

    def forward(self, x):
        return 0 * x.flatten(1)[:, :10] + torch.eye(10)[0]


def test_a_sample_has_every_class_and_knows_where_its_images_are(by_class, split, robust, tmp_path):
    config = CONFIG.model_copy(update={"num_examples": 100})
    result = evaluate(robust, by_class, config, tmp_path, seed=0)
    arrays = result.arrays(tmp_path)
    assert (result.n, result.split_size) == (100, len(split[1]))
    assert set(arrays["y"]) == set(range(10))
    assert torch.equal(torch.from_numpy(arrays["x"]), split[0][arrays["index"]])
    assert torch.equal(torch.from_numpy(arrays["y"]), split[1][arrays["index"]])
    assert torch.equal(torch.from_numpy(arrays["picture/x"]), split[0][arrays["picture/index"]])


def test_every_model_and_seed_is_judged_on_the_same_images(by_class, robust, gated, tmp_path):
    config = CONFIG.model_copy(update={"num_examples": 70})
    found = [
        evaluate(model, by_class, config, tmp_path / str(seed), seed=seed).arrays(tmp_path / str(seed))
        for seed, model in enumerate((robust, gated))
    ]
    assert np.array_equal(found[0]["index"], found[1]["index"])
    assert np.array_equal(found[0]["x"], found[1]["x"])


def test_a_curve_over_fewer_images_is_over_every_class(by_class, tmp_path):
    result = evaluate(Zero(), by_class, CONFIG, tmp_path, seed=0)
    assert result.clean.value == pytest.approx(0.1, abs=0.01)
    assert result.curve[0].accuracy.n == 100
    assert result.curve[0].accuracy.value == pytest.approx(0.1, abs=0.06)
    assert result.curve[1].accuracy == result.curve[0].accuracy  # it cannot be fooled


def test_the_audit_looks_at_every_class(by_class, robust, tmp_path, monkeypatch):
    seen = []

    def audit(model, x, y, *_, **__):
        seen.append(y)
        raise RuntimeError("seen enough")

    monkeypatch.setattr("pipeline.evaluation.suite.audit", audit)
    config = CONFIG.model_copy(update={"audit": AuditConfig(budget="quick")})
    with pytest.raises(RuntimeError, match="seen enough"):
        evaluate(robust, by_class, config, tmp_path, seed=0)
    assert len(seen[0]) == 128
    assert set(seen[0].tolist()) == set(range(10))


def test_a_whole_split_is_judged_in_its_own_order(by_class, split, robust, tmp_path):
    result = evaluate(robust, by_class, CONFIG, tmp_path, seed=0)
    arrays = result.arrays(tmp_path)
    assert np.array_equal(arrays["index"], np.arange(len(split[1])))
    assert torch.equal(torch.from_numpy(arrays["x"]), split[0])


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    assert np.array_equal(sample(1000, 10), sample(1000, 100)[:10])
    assert len(set(sample(1000, 100))) == 100
    assert np.array_equal(sample(7, 7), np.arange(7))
    assert np.array_equal(sample(7, None), np.arange(7))
