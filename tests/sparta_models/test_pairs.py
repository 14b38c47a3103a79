"""Every network with every activation; and what compilers and exporters make of them."""

import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from sparta_models import ACTIVATIONS, MODELS, Sparta, build_activation, build_model
from sparta_models.activations.gates import GATES

SPECS = {name: {"name": name} for name in ACTIVATIONS} | {
    f"sparta-{v}": {"name": "sparta", "variant": v} for v in GATES if v != "smoothmax"
}
SMALL = {
    "mobilenet_v2": {"width_mult": 0.1},
    "wideresnet28_10": {"width": 4, "widen": 1},
    "wideresnet34_10": {"width": 4, "widen": 1},
}


def small(name, spec):
    torch.manual_seed(0)
    model = build_model(name, activation=spec, num_classes=3, **SMALL.get(name, {"width": 4}))
    for module in model.modules():
        if isinstance(module, Sparta):
            # At the start the neighbours count for nothing.
            torch.nn.init.normal_(module.gate.weight, std=0.2)
    return model


@pytest.mark.parametrize("activation", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_every_pair_runs_trains_a_step_and_round_trips(name, activation):
    model, twin = small(name, SPECS[activation]), small(name, SPECS[activation])
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert loss.isfinite()
    # The input layer of a dead branch may get a zero gradient, but no parameter may be out of the graph.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    # Deep networks on maps of one pixel have wild gradients at the start.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), logits := model.eval()(x))
    assert logits.isfinite().all()


def example(activation):
    torch.manual_seed(0)
    module = build_activation(**{"num_channels": 4, **SPECS[activation]}).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module, torch.randn(2, 4, 5, 5)


@pytest.mark.parametrize("activation", SPECS)
def test_every_activation_compiles_without_a_graph_break(activation):
    module, x = example(activation)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(own), module(other)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(y.sum(), own), torch.autograd.grad(expected.sum(), other), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", SPECS)
def test_every_activation_exports_to_torch_export_and_onnx(activation, tmp_path):
    module, x = example(activation)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (x,), dynamic_shapes=(batch,))
    # Another batch size than the example's.
    x = torch.cat([x, -x])
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(program.module()(x), expected, atol=1e-6, rtol=1e-5)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "activation.onnx")
    torch.testing.assert_close(run_onnx(tmp_path / "activation.onnx", x), expected, atol=1e-5, rtol=1e-4)


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("resnet32", "resnet56", "wideresnet34_10")])
def test_every_kind_of_network_exports_with_sparta(name):
    model = small(name, "sparta").eval()
    x = torch.rand(2, 3, 8, 8)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-4)


# One network of each kind of block. The others repeat these blocks, deeper.
KINDS = ["resnet8", "resnet18", "resnet50", "preactresnet18", "vgg16_bn", "mobilenet_v2"]


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("activation", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_every_pair_compiles_whole_and_exports(name, activation, tmp_path):
    model, first_of_kind = small(name, SPECS[activation]).eval(), name in KINDS
    own, other = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected = model(other)
    program = torch.export.export(model, (own.detach(),))
    torch.testing.assert_close(program.module()(own.detach()), expected, atol=1e-5, rtol=1e-4)
    # The compiler's own backward pass takes most of the time: the first network of a kind stands for it.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if first_of_kind else "eager", dynamic=False)
    y = compiled(own)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    got, want = torch.autograd.grad(y.sum(), own)[0], torch.autograd.grad(expected.sum(), other)[0]
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-3)
    torch.compiler.reset()
    # Unoptimised: onnxruntime optimises what it loads anyway.
    torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).save(tmp_path / "model.onnx")
    y = run_onnx(tmp_path / "model.onnx", own.detach())
    # Untrained, a deep network may blow rounding up (ResNet-50 with Meta-ACON: to 0.008 in logits of 100). Other
    # operators may round as much as torch's do, a few times over.
    exact = model.double()(own.detach().double())
    rounding = (expected - exact).abs().max().item()
    torch.testing.assert_close(y, expected.detach(), atol=1e-5 + 4 * rounding, rtol=1e-4)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("activation", ["sparta", "sparta-attention", "frelu"])
def test_a_network_trains_by_inductors_code_as_without(activation, tmp_path, monkeypatch):
    # A cache of its own: one that a killed run left half a library in would fail here.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, twin = (small("resnet8", SPECS[activation]).train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="inductor", dynamic=False)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    for network, run in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
    for (key, got), want in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("sharing", ["site", "stage"])
def test_a_network_of_sparta_exports_to_onnx_for_every_batch_size(sharing, tmp_path):
    model = small("resnet8", {"name": "sparta", "sharing": sharing}).eval()
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, (torch.rand(2, 3, 8, 8),), dynamo=True, verbose=False, dynamic_shapes=(batch,)).save(
        tmp_path / "model.onnx"
    )
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["site", "stage"])
def test_a_network_of_sparta_compiles_whole_and_trains(sharing):
    model = small("resnet8", {"name": "sparta", "sharing": sharing}).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    model.train()
    F.cross_entropy(compiled(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.compiler.reset()
