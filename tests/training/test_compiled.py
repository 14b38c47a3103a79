"""torch.compile on the CPU: attack and training step come to the same as eagerly, up to rounding. Takes minutes."""

from functools import partial

import pytest
import torch

from pipeline.config.model import ActivationConfig
from pipeline.config.training import AttackConfig, PGDATConfig, TrainingConfig
from pipeline.training import Context, train
from pipeline.training.fold import FoldedShadow
from pipeline.training.methods import build_method
from pipeline.training.network import Forward
from tests.training.conftest import SmallNet


def trained_for_three_steps(*, compiled: bool) -> tuple[SmallNet, list[float]]:
    """The composition of a training step, on a small network without dropout."""
    torch.manual_seed(0)
    net = SmallNet().train()
    net.drop.p = 0.0
    draws = torch.Generator().manual_seed(1)
    x, y = torch.rand(6, 3, 8, 8, generator=draws), torch.arange(6) % 5
    folded = FoldedShadow(net, x)
    attacked, live = Forward(folded, "fp32", compiled=compiled), Forward(net, "fp32", compiled=compiled)
    method = build_method(TrainingConfig(method=PGDATConfig(attack=AttackConfig(steps=2))))
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(3):
        folded.refresh()
        x_adv = method.perturb(attacked, x, y, 1.0, draws)
        loss = method.terms(live, x, x_adv, y).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, losses


def test_every_training_of_a_process_is_compiled(make_job, monkeypatch, caplog):
    """torch counts what it keeps of all networks of a process, and stops at its limit without an error."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counts = torch._dynamo.utils.counters["stats"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for number, name in enumerate(["relu", "silu", "gelu"]):
            before = counts["unique_graphs"]
            job = make_job(str(number), epochs=1, compile="on", activation=ActivationConfig(name=name))
            train(job, Context())
            assert counts["unique_graphs"] - before == 4  # two batch sizes, each attacked and trained on
    assert "recompile_limit" not in caplog.text


@pytest.mark.extended
def test_compiled_steps_come_to_the_weights_of_eager_ones():
    eager, expected = trained_for_three_steps(compiled=False)
    compiled, losses = trained_for_three_steps(compiled=True)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.extended
def test_compiled_training_comes_to_the_result_of_the_eager_one(make_job):
    """A whole training of ResNet-8, also its last, smaller batch."""
    eager = train(make_job("eager", epochs=1), Context()).history[0]
    compiled = train(make_job("compiled", epochs=1, compile="on"), Context()).history[0]
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=1e-3)
    assert compiled.val_clean == pytest.approx(eager.val_clean, abs=0.05)
