"""Random numbers without a state to save: every draw comes from a generator seeded by what it is for.

A resumed run thus draws what the uninterrupted one would have drawn, and adding a draw somewhere changes no other.
"""

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "attack", step, rank)."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator_for(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator on `device` (the CPU, if it has none of its own kind) seeded by the key."""
    kind = device if device.type == "cuda" else torch.device("cpu")
    return torch.Generator(kind).manual_seed(derive_seed(*key))


def on_host(generator: torch.Generator) -> torch.Generator:
    """The generator itself if it is the CPU's, else one of the CPU with its seed.

    For draws whose values the host needs: those of a GPU's generator it would have to wait for.
    """
    return generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
