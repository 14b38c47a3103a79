"""What "auto" means for precision and compilation on a given device, and what the bits of a step depend on."""

from typing import Self

import torch
from pydantic import BaseModel, ConfigDict

COMPILE_STEPS = 2000
"""Training steps from which torch.compile is taken to pay for the minutes it needs, on a GPU."""

BF16_FLOPS = 10e6
"""Operations of a forward pass over one image from which bf16 is faster on a processor that has it."""


def resolve_precision(setting: str, device: torch.device, forward_flops: float) -> str:
    """ "fp32" or "bf16". forward_flops: floating-point operations of a forward pass over one image.

    auto takes bf16 where the device multiplies faster in it (GPUs since Ampere, processors with AMX or AVX512-BF16), on
    a processor only for networks large enough to pay for the conversions, see benchmarks/at_step.md. It is a rule and
    no timing, so that the same job gives the same bits every time.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if able and forward_flops >= BF16_FLOPS else "fp32"


def resolve_compile(setting: str, device: torch.device, steps: int) -> bool:
    """Whether to compile; auto does so on a GPU for trainings of at least COMPILE_STEPS steps."""
    if setting != "auto":
        return setting == "on"
    return device.type == "cuda" and steps >= COMPILE_STEPS


class Arithmetic(BaseModel):
    """What the bits of a step depend on besides the job. Elsewhere a training goes on correctly, to other bits."""

    model_config = ConfigDict(frozen=True)

    precision: str
    compiled: bool
    device: str
    """Kind of the device, and what it can do."""
    threads: int
    """Of the processor; 0 on a GPU, where they compute nothing."""

    @classmethod
    def on(cls, device: torch.device, *, precision: str, compiled: bool) -> Self:
        """The arithmetic of this process on `device`."""
        if device.type == "cuda":
            return cls(precision=precision, compiled=compiled, device=torch.cuda.get_device_name(device), threads=0)
        kind = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        return cls(precision=precision, compiled=compiled, device=kind, threads=torch.get_num_threads())

    def difference(self, before: Self) -> str:
        """What is not as it was, in words: "precision bf16 instead of fp32, threads 1 instead of 2"."""
        pairs = ((name, getattr(self, name), getattr(before, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {now} instead of {then}" for name, now, then in pairs if now != then)
