"""What "auto" means for precision and compilation on a given device."""

import torch

COMPILE_STEPS = 2000
"""Training steps from which torch.compile is taken to pay for the minutes it needs, on a GPU."""


def resolve_precision(setting: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; auto takes bf16 where the device has matrix instructions for it.

    Those are AMX on x86 processors and the tensor cores of GPUs since Ampere. AVX512-BF16 alone gains no more than the
    conversions around it cost in small networks, see benchmarks/at_step.md, and so stays with fp32.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def resolve_compile(setting: str, device: torch.device, steps: int) -> bool:
    """Whether to compile; auto does so on a GPU for trainings of at least COMPILE_STEPS steps."""
    if setting != "auto":
        return setting == "on"
    return device.type == "cuda" and steps >= COMPILE_STEPS
