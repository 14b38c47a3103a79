"""Shadows share tensors and nothing else; precision and compilation are decided as said; logits are float32."""

import pytest
import torch
from torch import nn

from pipeline.training.attacks import pgd
from pipeline.training.network import Forward, shadow
from pipeline.training.precision import BF16_FLOPS, COMPILE_STEPS, resolve_compile, resolve_precision
from sparta_models import ACTIVATIONS, ActivationBank, build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def network(activation="sparta", **others):
    torch.manual_seed(0)
    return build_model("resnet8", activation=activation, in_channels=1, width=4, **others).train()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_shadow_follows_every_update_and_asks_for_no_gradient(name):
    model = network(name)
    twin = shadow(model)
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(4, 1, 8, 8)
    model(x).square().sum().backward()
    optimizer.step()
    assert model.training
    assert torch.equal(twin(x), model.eval()(x))
    model.load_state_dict(network(name).state_dict())
    assert torch.equal(twin(x), model.eval()(x))


def test_shadow_keeps_shared_activations_shared():
    model = network({"name": "sparta", "sharing": "network", "variant": "shared"})
    twin = shadow(model)
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    live = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())} == live


def test_shadow_with_batch_statistics_records_none():
    model = network("frelu")
    ActivationBank.from_model(network("frelu")).apply_to(model)
    twin = shadow(model.train(), bn="train")
    before = {n: b.clone() for n, b in model.named_buffers()}
    x = torch.rand(4, 1, 8, 8)
    out = twin(x)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    torch.testing.assert_close(out, model(x))  # batch statistics, but for the frozen activation's own
    assert not torch.equal(out, model.eval()(x))


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_attack_on_the_shadow_is_the_attack_on_the_network(bn):
    model = network()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    options = {"eps": 0.1, "step_size": 0.05, "steps": 3, "random_start": False, "bn": bn}
    torch.testing.assert_close(pgd(shadow(model, bn=bn), x, y, **options), pgd(model, x, y, **options))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_and_gradients_are_float32(precision):
    model = network()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    z = Forward(model, precision)(x)
    z.sum().backward()
    assert z.dtype == x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    reference = model(x)
    assert torch.equal(z, reference) == (precision == "fp32")
    torch.testing.assert_close(z, reference, rtol=0.05, atol=0.05)


def test_settings_other_than_auto_are_taken_at_their_word():
    assert resolve_precision("bf16", CPU, 1) == "bf16"
    assert resolve_precision("fp32", CPU, 1e9) == "fp32"
    assert resolve_compile("on", CPU, 1)
    assert not resolve_compile("off", GPU, 10**6)


def test_auto_decides_by_what_the_device_has(monkeypatch):
    for amx, avx, flops, expected in (
        (True, False, 2 * BF16_FLOPS, "bf16"),
        (False, True, 2 * BF16_FLOPS, "bf16"),
        (True, True, BF16_FLOPS / 2, "fp32"),
        (False, False, 2 * BF16_FLOPS, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx: has)
        assert resolve_precision("auto", CPU, flops) == expected
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_precision("auto", GPU, 1) == expected
    assert resolve_compile("auto", GPU, COMPILE_STEPS)
    assert not resolve_compile("auto", GPU, COMPILE_STEPS - 1)


class Dropping(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=self.training)


def test_shadow_is_in_eval_mode_whatever_the_network_is_switched_to():
    model = nn.Sequential(Dropping()).train()
    twin = shadow(model)
    model.train()
    x = torch.ones(8)
    assert torch.equal(twin(x), x)
