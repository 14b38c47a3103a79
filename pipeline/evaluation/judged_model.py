"""A model under judgement: in eval mode, its random numbers seeded, known by its digest, within reach of a gradient."""

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.artifacts import canonical
from pipeline.training.seeds import derive_seed

CODE = "code_sha256"
"""Attribute of a model that is a user's own: the digest of its code, which its tensors do not show."""

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, its parameters out of every gradient and convolutions into full float32; then every
    submodule and parameter back to where it was.

    TF32, the default of CUDA convolutions, makes an image's logits depend on its batch in the third digit.
    """
    modes = {module: module.training for module in model.modules()}
    learning = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    cudnn = torch.backends.cudnn
    try:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (asks, grad) in learning.items():
            parameter.requires_grad_(asks)
            parameter.grad = grad


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Global random numbers that a model may draw come from `seed`; the caller's state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def model_digest(model: nn.Module) -> str:
    """sha256 over the class names, what the modules print of their settings (strides, dilations, slopes), CODE where it
    is set, and all tensors, non-persistent buffers last: name, dtype, shape and bytes."""
    state = hashlib.sha256("/".join(type(module).__qualname__ for module in model.modules()).encode())
    state.update(_ADDRESS.sub("", repr(model)).encode())
    state.update(str(getattr(model, CODE, "")).encode())
    saved = model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    for name, tensor in (*saved.items(), *unsaved.items()):
        state.update(canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def copied(model: nn.Module) -> nn.Module | None:
    """A copy, with whatever the model remembers; None of one that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # of a user's own
        return None


def short_seed(seed: int, *labels: object) -> int:
    """A 31-bit seed for one purpose, independent of all others: some attacks' libraries take no longer one."""
    return derive_seed(seed, *map(str, labels)) >> 32


class _Connected(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits + 0 * x.flatten(1).sum(1, keepdim=True)


def attackable(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` itself; or where no gradient reaches its input (a detach inside), the same function with a zero gradient.

    So gradient attacks come back empty-handed instead of raising, and black-box attacks and the audit can tell.
    """
    inner = x[:2].detach().requires_grad_()  # two: some look at an image's company
    with torch.enable_grad():
        total = model(inner).sum()
    if total.requires_grad and torch.autograd.grad(total, inner, allow_unused=True)[0] is not None:
        return model
    return _Connected(model)


def num_logits(model: nn.Module, x: Tensor) -> int:
    """How many classes a model tells apart, by its answer to x (1, C, H, W).

    Raises:
        ValueError: the answer is no tensor of logits (1, classes).
    """
    with evaluating(model), torch.no_grad():
        answer = model(x)
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != len(x):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"expected logits of shape ({len(x)}, classes) for {len(x)} image, got {got}")
    return answer.shape[1]


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted class (B,) of x (B, C, H, W); -1, right for no label, where a logit is no number.

    argmax takes what is no number for the largest: the class whose logit overflows, which is the right one.
    """
    with torch.no_grad():
        logits: Tensor = model(x)
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))
