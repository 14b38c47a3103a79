import copy
import math
import os
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import (
    AuditConfig,
    AutoAttack,
    CurveConfig,
    EvaluationConfig,
    FGSMAttack,
    NoiseAttack,
    PGDAttack,
    SquareAttack,
    TargetedAttack,
    TransferAttack,
)
from pipeline.evaluation import AuditReport, Check, Evaluation, evaluate, evaluate_shard, merge
from pipeline.evaluation.attacks import run_attack, worst_of
from pipeline.evaluation.audit.planted import Lambda
from pipeline.evaluation.blocks import load_arrays, save_arrays
from pipeline.evaluation.judged_model import attackable, evaluating, model_digest, predict
from sparta_models import build_model

CONFIG = EvaluationConfig(
    threat=ThreatModel(eps=0.1),
    attacks=(
        NoiseAttack(num_draws=2),
        FGSMAttack(),
        PGDAttack(steps=5),
        PGDAttack(steps=5, restarts=2, loss="margin"),
        TargetedAttack(steps=5, num_targets=2),
        SquareAttack(num_queries=20),
    ),
    other_threats=(ThreatModel(norm="l2", eps=0.5),),
    curve=CurveConfig(multiples=(0.5, 1.0, 3.0), steps=5, num_examples=100),
    num_examples=150,
    block_size=32,
    save_adversarial=True,
    audit=AuditConfig(budget="off"),
)
ALL_ATTACKS = (*CONFIG.attacks, TransferAttack(steps=5))


@pytest.fixture(scope="module")
def finished(robust, prepared, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation")
    return evaluate(robust, prepared, CONFIG, output, seed=0), output


def test_every_number_can_be_counted_again_from_the_arrays(finished):
    result, output = finished
    arrays = result.arrays(output)
    assert result.n == 150 == len(arrays["y"])
    assert result.clean.correct == (arrays["predicted"] == arrays["y"]).sum()
    for attack in result.attacks:
        assert attack.accuracy.correct == arrays[f"correct/{attack.name}"].sum()
    robust = [c.robust.correct for c in result.per_class]
    assert sum(robust) == result.union.correct == arrays["correct/union"].sum()
    assert sum(c.clean.n for c in result.per_class) == 150


def test_only_what_is_still_correct_goes_on(finished):
    result, _ = finished
    left = result.clean.correct
    for attack in result.attacks:
        assert attack.attacked == left
        left -= attack.fooled
        assert attack.accuracy.correct == left
    assert result.union.correct == left < result.clean.correct


def test_saved_adversarial_images_give_the_recorded_union(finished, robust):
    result, output = finished
    arrays = result.arrays(output)
    x, x_adv, y = (torch.from_numpy(arrays[name]) for name in ("x", "x_adv", "y"))
    with torch.no_grad():
        correct = (robust(x_adv).argmax(1) == y) & (robust(x).argmax(1) == y)
    assert torch.equal(correct, torch.from_numpy(arrays["correct/union"]))
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


def rows(arrays) -> list[int]:
    """Where the pictures are among the images that were judged."""
    return [arrays["index"].tolist().index(position) for position in arrays["picture/index"]]


def test_pictures_are_fooled_images_of_different_classes(finished):
    result, output = finished
    arrays = result.arrays(output)
    assert len(arrays["picture/y"]) == CONFIG.num_pictures
    assert len(set(arrays["picture/y"])) >= min(8, 10) - 2
    assert (arrays["picture/predicted"] != arrays["picture/y"]).all()
    assert arrays["correct/clean"][rows(arrays)].all()
    assert (arrays["picture/x"] != arrays["picture/x_adv"]).any(axis=(1, 2, 3)).all()
    assert np.array_equal(arrays["picture/x"], arrays["x"][rows(arrays)])
    assert np.array_equal(arrays["picture/x_adv"], arrays["x_adv"][rows(arrays)])


def test_where_few_were_fooled_pictures_of_images_that_withstood_come_after_them(robust, prepared, tmp_path):
    weak = {"threat": ThreatModel(eps=0.03), "attacks": (PGDAttack(steps=5),), "num_pictures": 40}
    result = evaluate(robust, prepared, CONFIG.model_copy(update=weak), tmp_path, seed=0)
    arrays = result.arrays(tmp_path)
    fooled = arrays["picture/predicted"] != arrays["picture/y"]
    assert 0 < fooled.sum() == result.clean.correct - result.union.correct < 40
    assert fooled[: fooled.sum()].all()
    assert arrays["correct/clean"][rows(arrays)].all()
    assert len(fooled) == 40


def test_the_curve_starts_clean_and_falls(finished):
    result, _ = finished
    assert [point.eps for point in result.curve] == pytest.approx([0, 0.05, 0.1, 0.3])
    values = [point.accuracy.value for point in result.curve]
    assert values == sorted(values, reverse=True)
    assert all(point.accuracy.n == 100 for point in result.curve)


def test_the_other_threat_starts_from_the_clean_images(finished):
    result, _ = finished
    assert [r.name for r in result.other_threats] == ["pgd-ce-20x1", "pgd-margin-50x1"]
    assert result.other_threats[0].attacked == result.clean.correct
    assert result.other_threats[0].threat.norm == "l2"


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_results_are_the_same_for_any_number_of_shards(finished, robust, prepared, tmp_path, num_shards):
    for shard in reversed(range(num_shards)):
        evaluate_shard(robust, prepared, CONFIG, tmp_path, shard=shard, num_shards=num_shards, seed=0)
    assert merge(robust, prepared, CONFIG, tmp_path, seed=0) == finished[0]


def test_a_killed_evaluation_goes_on_with_the_missing_blocks(finished, robust, prepared, tmp_path):
    assert evaluate_shard(robust, prepared, CONFIG, tmp_path, shard=0, num_shards=2, seed=0) == [0, 2, 4]
    victim = next(tmp_path.rglob("block-00002.npz"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"missing or damaged: \[1, 2, 3\]"):
        merge(robust, prepared, CONFIG, tmp_path, seed=0)
    assert evaluate_shard(robust, prepared, CONFIG, tmp_path, seed=0) == [1, 2, 3]
    assert merge(robust, prepared, CONFIG, tmp_path, seed=0) == finished[0]


def test_blocks_of_other_weights_are_not_taken_for_these(finished, prepared, tmp_path, gated, robust):
    evaluate_shard(robust, prepared, CONFIG, tmp_path, seed=0)
    with pytest.raises(ValueError, match="missing or damaged"):
        merge(gated, prepared, CONFIG, tmp_path, seed=0)


def test_another_seed_draws_other_numbers(finished, robust, prepared, tmp_path):
    small = CONFIG.model_copy(update={"num_examples": 32, "attacks": (PGDAttack(steps=1),)})
    first, second = (evaluate(robust, prepared, small, tmp_path / str(s), seed=s) for s in (0, 1))
    assert not np.array_equal(first.arrays(tmp_path / "0")["x_adv"], second.arrays(tmp_path / "1")["x_adv"])


def test_the_record_survives_its_file(finished):
    result, output = finished
    assert Evaluation.load(output) == result


def test_altered_arrays_are_refused(finished, robust, prepared, tmp_path):
    small = CONFIG.model_copy(update={"num_examples": 32})
    result = evaluate(robust, prepared, small, tmp_path, seed=0)
    (tmp_path / "evaluation.npz").write_bytes(b"other")
    with pytest.raises(ValueError, match="missing or altered"):
        result.arrays(tmp_path)


def test_a_missing_or_malformed_record_is_a_readable_error(tmp_path):
    with pytest.raises(ValueError, match="found none: evaluate the model first"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an evaluation"):
        Evaluation.load(tmp_path)


def test_a_record_of_another_schema_is_refused(finished, tmp_path):
    result, _ = finished
    result.save(tmp_path)
    record = tmp_path / "evaluation.json"
    record.write_text(record.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    message = "is not an evaluation: schema_version: expected schema 2, got 1; evaluate the model again"
    with pytest.raises(ValueError, match=message):
        Evaluation.load(tmp_path)


def test_figures_that_are_no_numbers_survive_the_file(finished, tmp_path):
    result, _ = finished
    check = Check(
        number=8, name="gradient_census", verdict="fail", figure=math.nan, warn_above=0.02, fail_above=0.2, summary="",
        details={"share": math.nan, "norms": [math.inf, 1.0, math.nan]},
    )  # fmt: skip
    report = AuditReport(budget="quick", n=1, threat=CONFIG.threat, model_digest="m", checks=(check,))
    result.model_copy(update={"audit": report}).save(tmp_path)
    audit = Evaluation.load(tmp_path).audit
    assert audit is not None
    (found,) = audit.checks
    assert math.isnan(found.figure or 0)
    assert math.isnan(found.details["share"])
    assert found.details["norms"][:2] == [math.inf, 1.0]
    assert math.isnan(found.details["norms"][2])


def test_a_gradient_that_is_not_a_number_is_named(robust, prepared, tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return robust(x) + torch.sqrt(0 * x).flatten(1).sum(1, keepdim=True)  # 0, and its gradient 0 * infinity

    l2 = {"threat": ThreatModel(norm="l2", eps=0.5), "attacks": (PGDAttack(steps=1),)}  # the sign of NaN is 0
    config = CONFIG.model_copy(update={"num_examples": 32, **l2})
    with pytest.raises(ValueError, match=r"attack pgd-ce-1x1, got values that are not finite in \d+ of \d+"):
        evaluate(Broken(), prepared, config, tmp_path, seed=0)


def test_more_examples_than_there_are_is_refused(robust, prepared, tmp_path):
    config = CONFIG.model_copy(update={"num_examples": 100_000})
    with pytest.raises(ValueError, match="num_examples <= "):
        evaluate(robust, prepared, config, tmp_path, seed=0)


def test_a_shard_out_of_range_is_refused(robust, prepared, tmp_path):
    with pytest.raises(ValueError, match="got shard 3 of 3"):
        evaluate_shard(robust, prepared, CONFIG, tmp_path, shard=3, num_shards=3, seed=0)


def test_a_transfer_attack_without_reference_is_left_out_and_said_so(robust, gated, prepared, tmp_path):
    config = CONFIG.model_copy(update={"num_examples": 32, "attacks": (FGSMAttack(), TransferAttack(steps=5))})
    without = evaluate(robust, prepared, config, tmp_path, seed=0)
    assert [attack.name for attack in without.attacks] == ["fgsm"]
    assert without.warnings == ("transfer-margin-5: skipped, there is no reference model",)
    with_one = evaluate(robust, prepared, config, tmp_path, seed=0, reference=gated)
    assert [attack.name for attack in with_one.attacks] == ["fgsm", "transfer-margin-5"]
    assert with_one.reference_digest is not None


def test_clean_accuracy_is_not_called_robust_where_no_attack_can_run(robust, prepared, tmp_path):
    config = CONFIG.model_copy(update={"attacks": (TransferAttack(steps=5),)})
    with pytest.raises(ValueError, match=r"expected a reference model for the transfer attack, got none: give one, or"):
        evaluate(robust, prepared, config, tmp_path, seed=0)


def test_a_reference_in_training_mode_is_asked_in_eval_mode_and_left_as_it_was(robust, prepared, tmp_path):
    twin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).train()
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    attacks = (NoiseAttack(num_draws=1), TransferAttack(steps=2))
    config = CONFIG.model_copy(update={"attacks": attacks, "audit": AuditConfig(budget="quick", num_examples=16)})
    evaluate(robust, prepared, config, tmp_path, seed=0, reference=twin)
    assert twin.training
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())


class _Peculiar(nn.Module):
    """Keeps a grid that it makes when it is first asked, and has a `train` that returns nothing."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("grid", None, persistent=False)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.zeros_like(x[:1])
        return self.model(x + self.grid)


def test_what_a_network_makes_when_it_is_first_asked_does_not_make_it_another_one(robust, prepared, tmp_path):
    audit = AuditConfig(budget="quick", num_examples=16)
    config = CONFIG.model_copy(update={"attacks": (FGSMAttack(),), "num_examples": 32, "audit": audit})
    result = evaluate(_Peculiar(robust), prepared, config, tmp_path, seed=0)
    assert result.audit.model_digest == result.model_digest
    assert {check.name for check in result.audit.checks if check.verdict == "skip"}.isdisjoint({"finite_difference"})


def test_logits_that_are_no_numbers_are_no_right_answer(robust, digits):
    def overflows(x):
        z = robust(x)
        return torch.where(z == z.amax(1, keepdim=True), torch.nan, z)

    assert set(predict(overflows, digits.test_x[:8]).tolist()) == {-1}
    assert worst_of(overflows, digits.test_x[:2], digits.test_y[:2], [digits.test_x[2:4], digits.test_x[4:6]]).equal(
        digits.test_x[2:4]
    )


def test_a_model_that_looks_at_company_is_attackable_where_any_gradient_is_there(robust, digits):
    class Detaches(nn.Module):
        def forward(self, x):
            return robust(x if len(x) == 1 else x.detach())

    x, y = digits.test_x[:4], digits.test_y[:4]
    x_adv, _ = run_attack(PGDAttack(steps=2), attackable(Detaches(), x), x, y, ThreatModel(eps=0.1), seed=0)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_a_reference_without_input_gradient_fools_nobody(robust, digits):
    attack, x, y = TransferAttack(steps=2), digits.test_x[:8], digits.test_y[:8]
    detached = Lambda(robust, before=lambda x: x.detach())
    x_adv, _ = run_attack(attack, robust, x, y, ThreatModel(eps=0.1), seed=0, reference=detached)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_evaluation_leaves_model_and_random_state_alone(robust, prepared, tmp_path):
    model = nn.Sequential(copy.deepcopy(robust), nn.Dropout(0.5)).train()
    model[0].requires_grad_(requires_grad=True)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    small = {"num_examples": 32, "audit": AuditConfig(budget="quick", num_examples=16)}
    evaluate(model, prepared, CONFIG.model_copy(update={**small, "attacks": (AutoAttack(),)}), tmp_path, seed=0)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_convolutions_are_judged_in_full_float32():
    cudnn = torch.backends.cudnn
    before = (cudnn.allow_tf32, cudnn.deterministic)
    with evaluating(nn.Identity()):
        assert (cudnn.allow_tf32, cudnn.deterministic) == (False, True)
    assert (cudnn.allow_tf32, cudnn.deterministic) == before


def test_a_second_call_does_no_work_twice(robust, prepared, tmp_path, monkeypatch):
    config = CONFIG.model_copy(update={"num_examples": 32, "audit": AuditConfig(budget="quick", num_examples=16)})
    first = evaluate(robust, prepared, config, tmp_path, seed=0)

    def fail(*_, **__):
        raise AssertionError("worked again")

    monkeypatch.setattr("pipeline.evaluation.suite.judge_block", fail)
    monkeypatch.setattr(import_module("pipeline.evaluation.audit.subject"), "attacked", fail)
    assert evaluate(robust, prepared, config, tmp_path, seed=0) == first
    with pytest.raises(AssertionError, match="worked again"):  # another network beside it is another audit
        evaluate(robust, prepared, config, tmp_path, seed=0, matched={"twin": robust})
    assert load_arrays(tmp_path / "evaluation.npz") is not None


def test_networks_that_differ_in_a_buffer_that_is_not_saved_are_two():
    def network(scale):
        made = nn.Linear(2, 2)
        made.register_buffer("scale", torch.tensor(scale), persistent=False)
        return made

    torch.manual_seed(0)
    first = network(1.0)
    second = network(0.0)
    second.load_state_dict(first.state_dict())
    assert model_digest(first) != model_digest(second)
    second.scale.fill_(1.0)
    assert model_digest(first) == model_digest(second)


def test_networks_that_differ_in_a_setting_alone_are_two(prepared):
    one, two = (build_model("resnet8", activation={"name": "sparta", "dilation": d}, width=4) for d in (1, 2))
    two.load_state_dict(one.state_dict())
    assert model_digest(one) != model_digest(two)
    assert model_digest(one) == model_digest(copy.deepcopy(one))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ALL_ATTACKS, ids=lambda attack: attack.name)
def test_every_attack_stays_in_ball_and_box_and_repeats(attack, norm, robust, gated, digits):
    threat = ThreatModel(norm=norm, eps=0.15)
    x, y = digits.test_x[:40], digits.test_y[:40]
    first, second = (run_attack(attack, robust, x, y, threat, seed=3, reference=gated)[0] for _ in range(2))
    delta = (first - x).flatten(1)
    size = delta.abs().amax() if norm == "linf" else delta.norm(dim=1).max()
    assert size <= 0.15 + 1e-5
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, second)


def test_a_transfer_attack_needs_a_reference(robust, digits):
    with pytest.raises(ValueError, match="expected a reference model"):
        run_attack(TransferAttack(), robust, digits.test_x[:2], digits.test_y[:2], ThreatModel(eps=0.1), seed=0)


def test_a_missing_package_is_named_with_the_remedy(robust, digits, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyautoattack", None)
    with pytest.raises(ValueError, match="pip install pyautoattack"):
        run_attack(SquareAttack(), robust, digits.test_x[:2], digits.test_y[:2], ThreatModel(eps=0.1), seed=0)


def test_a_model_without_input_gradient_is_evaluated_and_fails_the_audit(robust, prepared, tmp_path):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = robust

        def forward(self, x):
            return self.inner(x.detach())

    config = CONFIG.model_copy(update={"num_examples": 64, "audit": AuditConfig(budget="quick", num_examples=64)})
    result = evaluate(Detached(), prepared, config, tmp_path, seed=0)
    assert result.audit is not None
    assert not result.audit.passed


def test_a_block_is_readable_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        save_arrays(tmp_path / "block.npz", {"y": np.arange(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "block.npz").stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [tmp_path / "block.npz"]
