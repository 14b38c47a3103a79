"""Exponential moving average of a network: weights and batch-norm statistics, in tensors of its own."""

import copy

import torch
from torch import Tensor, nn

from pipeline.config.training import EMAConfig


class EMA:
    """m <- d m + (1 - d) theta after every step n, d = decay, or min(decay, (1 + n) / (10 + n)) with warm-up.

    `model` is the averaged network. Integer buffers are copied; frozen parameters, which are equal on both sides, and
    buffers of frozen modules are left alone.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for ours, theirs in zip(self.model.modules(), model.modules(), strict=True):
            self._pair(ours, theirs)

    def _pair(self, ours: nn.Module, theirs: nn.Module) -> None:
        for name, parameter in theirs._parameters.items():
            average = ours._parameters[name]
            if parameter is not None and average is not None and parameter.requires_grad:
                self._pairs.append((average.data, parameter.data))
        for name, buffer in theirs._buffers.items():
            own = ours._buffers[name]
            if buffer is not None and own is not None and theirs.training:
                (self._pairs if buffer.is_floating_point() else self._copied).append((own, buffer))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step` (from 0)."""
        decay = min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay
        averages, values = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)
