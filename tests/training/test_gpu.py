"""What only a CUDA device can show: the same mathematics there, bf16, compilation, memory, nccl."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from test_attacks import ATTACKS, run
from test_methods import METHODS, config_of
from torch._dynamo.utils import counters

from pipeline.config.training import AttackConfig, AWPConfig, EMAConfig, MixConfig, TRADESConfig
from pipeline.training import Context, OutOfMemoryError, load_model, train
from pipeline.training.attacks import pgd
from pipeline.training.distributed import StepReducer
from pipeline.training.fold import FoldedShadow
from pipeline.training.methods import build_method
from pipeline.training.mix import mix_batch
from pipeline.training.network import Forward, shadow
from pipeline.training.seeds import generator_for, on_host
from sparta_models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)


def network():
    torch.manual_seed(0)
    return build_model("resnet8", in_channels=1, width=8)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_never_wait_for_the_device(name, small_net, images):
    net, x, y = small_net.to(GPU).train(), images[0].to(GPU), images[1].to(GPU)
    targets = {key: value.to(GPU) for key, value in ATTACKS[name].items() if key == "targets"}
    run(name, net, x, y, **targets)  # the libraries' own preparations
    with no_synchronisation():
        x_adv = run(name, net, x, y, **targets)
    assert not torch.equal(x_adv, x)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_never_wait_for_the_device(name, precision):
    model = network().to(GPU).train()
    x, y = torch.rand(16, 1, 8, 8, device=GPU), torch.arange(16, device=GPU) % 10
    folded = FoldedShadow(model, x[:2], torch.bfloat16 if precision == "bf16" else torch.float32)
    attacked, trained, method = Forward(folded, precision), Forward(model, precision), build_method(config_of(name))

    def step() -> torch.Tensor:
        folded.refresh()
        x_adv = method.perturb(attacked, x, y, 0.5, generator_for(GPU, 0))
        return method.terms(trained, x, x_adv, y).loss.sum()

    step()
    with no_synchronisation():
        loss = step()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixtures_never_wait_for_the_device_and_are_the_processors(kind):
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    expected = mix_batch(MixConfig(kind=kind), x, y, num_classes=10, generator=torch.Generator().manual_seed(3))
    on_gpu = x.to(GPU), y.to(GPU)
    draws = on_host(torch.Generator(GPU).manual_seed(3))
    with no_synchronisation():
        found = mix_batch(MixConfig(kind=kind), *on_gpu, num_classes=10, generator=draws)
    torch.testing.assert_close([t.cpu() for t in found], list(expected))


def test_the_mean_of_gradients_never_waits_for_the_device():
    model = network().to(GPU).train()
    model(torch.rand(4, 1, 8, 8, device=GPU)).square().sum().backward()
    expected = [p.grad / 4 for p in model.parameters()]
    counts = torch.tensor([4.0, 1.0], device=GPU)
    with no_synchronisation():
        StepReducer(model, list(model.parameters()), world_size=1)(counts)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_stays_in_ball_and_agrees_with_the_cpu(norm):
    """In float64, where a sign is decided the same way on both."""
    model, eps = network().double(), 0.1
    x, y = torch.rand(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    options = {"eps": eps, "step_size": 0.03, "steps": 5, "norm": norm, "random_start": False}
    expected = pgd(model, x, y, **options)
    found = pgd(model.to(GPU), x.to(GPU), y.to(GPU), **options).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_attack_leaves_the_devices_random_state():
    model, x = network().to(GPU), torch.rand(4, 1, 8, 8, device=GPU)
    before = torch.cuda.get_rng_state(GPU)
    pgd(model, x, torch.arange(4, device=GPU), eps=0.1, step_size=0.1, steps=1)
    assert torch.equal(torch.cuda.get_rng_state(GPU), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_the_gpu_learns_and_loads_on_the_cpu(precision, make_job):
    job = make_job(epochs=3, precision=precision, ema=EMAConfig(), method=TRADESConfig(attack=AttackConfig(steps=2)))
    trained = train(job, Context(device=GPU))
    assert trained.history[-1].train_loss < trained.history[0].train_loss
    assert trained.precision == precision
    assert next(load_model(job.output / "model").parameters()).device.type == "cpu"


def test_compiled_attack_is_the_eager_one():
    model = network().to(GPU)
    x, y = torch.rand(16, 1, 8, 8, device=GPU), torch.arange(16, device=GPU) % 10
    options = {"eps": 0.1, "step_size": 0.1, "steps": 1, "random_start": False}
    eager = pgd(Forward(shadow(model), "fp32"), x, y, **options)
    compiled = pgd(Forward(shadow(model), "fp32", compiled=True), x, y, **options)
    # A sign may turn where the gradient is at the rounding's size.
    assert (eager - compiled).abs().gt(1e-6).double().mean() < 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    [{}, {"method": TRADESConfig(attack=AttackConfig(steps=2, loss="kl", start="normal")), "awp": AWPConfig()}],
    ids=["pgd_at", "trades-awp"],
)
def test_training_with_replayed_graphs_comes_to_the_result_of_the_eager_one(options, make_job):
    """Batches of two sizes, the look at clean images in between, gradients and averages of what the graphs write."""
    skipped = counters["inductor"]["cudagraph_skips"]
    eager = train(make_job("eager", compile="off", ema=EMAConfig(), **options), Context(device=GPU)).history[-1]
    graphs = train(make_job("graphs", compile="on", ema=EMAConfig(), **options), Context(device=GPU)).history[-1]
    assert counters["inductor"]["cudagraph_skips"] == skipped
    assert graphs.train_loss == pytest.approx(eager.train_loss, rel=0.02)
    assert graphs.val_clean == pytest.approx(eager.val_clean, abs=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eps_is_kept_exactly_whatever_the_precision_of_the_network(precision):
    model, x = network().to(GPU), torch.rand(8, 1, 8, 8, device=GPU)
    y = torch.arange(8, device=GPU)
    x_adv = pgd(Forward(shadow(model), precision), x, y, eps=8 / 255, step_size=2 / 255, steps=5)
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max().item() <= 8 / 255 + 1e-7
    assert 0 <= x_adv.min().item() <= x_adv.max().item() <= 1


def test_an_attack_holds_the_graph_of_one_step_only():
    model, x = network().to(GPU), torch.rand(64, 1, 32, 32, device=GPU)
    y, attacked = torch.arange(64, device=GPU) % 10, Forward(shadow(model), "fp32")

    def peak(steps):
        torch.cuda.reset_peak_memory_stats(GPU)
        pgd(attacked, x, y, eps=0.1, step_size=0.01, steps=steps)
        return torch.cuda.max_memory_allocated(GPU)

    peak(1)  # the library's own workspaces
    assert peak(10) <= 1.05 * peak(2)


def test_memory_does_not_grow_over_steps(make_job):
    job = make_job("first", epochs=2)
    train(job, Context(device=GPU))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(GPU)
    train(make_job("second", epochs=6), Context(device=GPU))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(GPU) <= before + 2**20


def test_out_of_memory_gives_the_devices_numbers(make_job, monkeypatch):
    from pipeline.training import loop

    def greedy(run, x, y):
        torch.empty(2**46, device=GPU)

    monkeypatch.setattr(loop, "train_step", greedy)
    with pytest.raises(OutOfMemoryError, match=r"GiB free\).*lower training.batch_size"):
        train(make_job(), Context(device=GPU))


def test_nccl_carries_the_steps_collective(tmp_path):
    """One rank in the group, told that there are two: the flat all-reduce runs, and must leave the values right."""
    model = network().to(GPU).train()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        reduce = StepReducer(model, list(model.parameters()), world_size=2)
        model(torch.rand(4, 1, 8, 8, device=GPU)).square().sum().backward()
        expected = [p.grad / 4 for p in model.parameters()]
        statistics = [s.clone() for s in reduce.statistics]
        assert reduce(torch.tensor([4.0, 1.0], device=GPU)).tolist() == [4, 1]
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    torch.testing.assert_close(reduce.statistics, statistics)
