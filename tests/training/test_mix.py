"""Mixtures: images and labels share one number, and both distributions are the papers'."""

import pytest
import torch

from pipeline.config.training import MixConfig
from pipeline.training.mix import mix_batch
from pipeline.training.seeds import on_host


def batch():
    """Image i is the constant i / 8, so that a pixel tells its origin."""
    y = torch.arange(8)
    return (y / 8).reshape(8, 1, 1, 1).expand(8, 2, 6, 6).clone(), y


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(kind):
    x, y = batch()
    for seed in range(20):
        mixed, soft = mix_batch(
            MixConfig(kind=kind), x, y, num_classes=8, generator=torch.Generator().manual_seed(seed)
        )
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ (torch.arange(8) / 8))
        assert (soft > 0).sum(1).max() <= 2


def test_cutmix_pastes_whole_pixels():
    x, y = batch()
    mixed, _ = mix_batch(MixConfig(kind="cutmix"), x, y, num_classes=8, generator=torch.Generator().manual_seed(1))
    assert set(mixed.unique().tolist()) <= set((y / 8).tolist())
    assert not torch.equal(mixed, x)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_share_follows_the_beta_distribution(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    x, y = torch.stack((torch.zeros(1, 1, 1), torch.ones(1, 1, 1))), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    shares = []
    while len(shares) < 2000:
        mixed, _ = mix_batch(MixConfig(kind="mixup", alpha=alpha), x, y, num_classes=2, generator=generator)
        if mixed[0].item() not in (0.0,):  # the permutation was not the identity
            shares.append(mixed[1].item())
    shares = torch.tensor(shares)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.04)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_a_generator_of_the_cpu_is_the_hosts_own():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    assert on_host(generator) is generator


def test_generator_decides_the_mixture():
    x, y = batch()
    first, again = (
        mix_batch(MixConfig(kind="mixup"), x, y, num_classes=8, generator=torch.Generator().manual_seed(2))[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)
