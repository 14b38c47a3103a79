"""A shadow for attacks whose batch norms are folded into the convolutions before them.

In eval mode BN(conv(x)) = conv'(x) with w' = w s and b' = (b - mu) s + beta, s = gamma / sqrt(var + eps) per channel:
one affine map less, forward and backward, at every norm and every attack step. The weights move once per training step,
and so does the fold. Which norm follows which convolution is seen in a forward pass, and folding is kept only if a copy
with random statistics gives the same logits with it, so a network of any shape is safe.
"""

import copy
import logging
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.training.distributed import SyncBatchNorm
from pipeline.training.network import shadow

_log = logging.getLogger(__name__)


class _Fold(NamedTuple):
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    folded: nn.Conv2d


class FoldedShadow(nn.Module):
    """Images -> logits of `model` in eval mode, as of the last `refresh`; asks for no parameter gradient.

    probe: a few images (B, C, H, W). dtype: of the folded weights; bfloat16 spares autocast the casting in every pass.
    """

    def __init__(self, model: nn.Module, probe: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.training = False
        self.network, self._folds = shadow(model), []
        pairs = _pairs(self.network, probe)
        if not _agrees(model, pairs, probe):
            _log.info("batch norms of %s are not folded for attacks: the logits would change", type(model).__name__)
            return
        self._folds = [_install(model, self.network, conv, norm) for conv, norm in pairs]
        for fold in self._folds:
            fold.folded.to(dtype)
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights and statistics that the model has now."""
        _refresh(self._folds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images x (B, C, H, W)."""
        z: Tensor = self.network(x)
        return z


def _pairs(network: nn.Module, probe: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and norms such that every output of the one goes into the other, and nothing else does."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    calls: Counter[str] = Counter()
    links: Counter[tuple[str, str]] = Counter()

    def made(name: str, z: Tensor) -> None:
        outputs[id(z)] = (name, z)  # held, so that no id is given twice
        calls[name] += 1

    def taken(name: str, x: Tensor) -> None:
        calls[name] += 1
        if id(x) in outputs:
            links[outputs[id(x)][0], name] += 1

    handles = []
    for name, module in network.named_modules():
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(lambda _m, _x, z, n=name: made(n, z)))
        elif isinstance(module, nn.BatchNorm2d | SyncBatchNorm) and module.running_mean is not None and module.affine:
            handles.append(module.register_forward_pre_hook(lambda _m, x, n=name: taken(n, x[0])))
    with torch.no_grad():
        network(probe)
    for handle in handles:
        handle.remove()
    return [pair for pair, count in links.items() if count == calls[pair[0]] == calls[pair[1]]]


@torch.no_grad()
def _agrees(model: nn.Module, pairs: list[tuple[str, str]], probe: Tensor) -> bool:
    """Whether a copy gives the same logits folded, with random statistics: fresh ones would hide an error."""
    trial = copy.deepcopy(model)
    draws = torch.Generator().manual_seed(0)
    for _, name in pairs:
        norm = trial.get_submodule(name)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert isinstance(tensor, Tensor)
            tensor.copy_(torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=draws))
    plain, folded = shadow(trial), shadow(trial)
    _refresh([_install(trial, folded, conv, norm) for conv, norm in pairs])
    return torch.allclose(folded(probe), plain(probe), rtol=1e-2, atol=1e-3)


def _install(model: nn.Module, twin: nn.Module, conv_name: str, norm_name: str) -> _Fold:
    """Give the twin's convolution weights of its own, with a bias, and drop the twin's norm."""
    conv, norm, folded = (
        model.get_submodule(conv_name),
        model.get_submodule(norm_name),
        twin.get_submodule(conv_name),
    )
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(folded, nn.Conv2d)
    folded.weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=False)
    folded.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
    parent, _, leaf = norm_name.rpartition(".")
    setattr(twin.get_submodule(parent), leaf, nn.Identity())
    return _Fold(conv, norm, folded)  # type: ignore[arg-type]


@torch.no_grad()
def _refresh(folds: list[_Fold]) -> None:
    for conv, norm, folded in folds:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert folded.bias is not None
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        folded.weight.copy_(conv.weight * scale.reshape(-1, 1, 1, 1))
        folded.bias.copy_(torch.addcmul(norm.bias, bias, scale))
