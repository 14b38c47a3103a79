"""The network of a job, and the views of it that a training step calls.

A shadow is a copy of the modules that shares every parameter and buffer with the original, asks for no parameter
gradients and has modes of its own. Attacks and validation call shadows: nothing that they do can reach the gradients,
modes or running statistics of the network in training, and the backward pass of an attack skips all weights.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data import PreparedData
from pipeline.training.job import TrainJob
from pipeline.training.model_io import ModelMeta, freeze_activations
from pipeline.training.seeds import derive_seed
from sparta_models import ActivationBank


def build_network(job: TrainJob, prepared: PreparedData, bank: ActivationBank | None) -> tuple[nn.Module, ModelMeta]:
    """The job's network with initial weights from its seed, the bank applied and frozen if there is one; without one
    and with `activation_lr_factor` 0 its own activations are frozen as they start.

    Raises:
        ValueError: for a bank that does not fit.
    """
    meta = ModelMeta(
        name=job.model.name,
        options=dict(job.model.options),
        activation=job.model.activation.spec(),
        num_classes=prepared.num_classes,
        in_channels=prepared.channels,
        mean=tuple(prepared.mean),
        std=tuple(prepared.std),
        image_size=prepared.image_size,
        dataset=prepared.name,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(job.seed, "weights"))
        model = meta.build()
        if bank is not None:
            bank.apply_to(model, freeze=True, adapt=job.adapt)
            meta = meta.model_copy(update={"activation": bank.spec.mapping(), "frozen": True})
        elif job.training.optimizer.activation_lr_factor == 0:
            freeze_activations(model)
            meta = meta.model_copy(update={"frozen": True})
    return model, meta


def load_bank(job: TrainJob) -> ActivationBank:
    """The job's bank.

    Raises:
        ValueError: for damaged files, or another digest than the job expects.
    """
    assert job.bank is not None
    bank = ActivationBank.load(job.bank)
    if job.bank_digest is not None and bank.digest != job.bank_digest:
        raise ValueError(f"expected a bank with digest {job.bank_digest} in {job.bank}, got {bank.digest}")
    return bank


def shadow(model: nn.Module, *, bn: str = "eval") -> nn.Module:
    """A copy in eval mode that shares all tensors; bn="train": batch norms use the batch's statistics, unrecorded."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, dict(shared))
    for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
        for name, parameter in theirs._parameters.items():
            if parameter is not None:
                ours._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        if bn == "train" and isinstance(ours, _BatchNorm) and ours.training:
            ours.track_running_stats = False
        else:
            ours.training = False
    return twin


class Forward(nn.Module):
    """A network in a precision: images (B, C, H, W) of any float type -> float32 logits (B, num_classes).

    Compiled, a CUDA device replays it as graphs, one for every batch size that comes (two in a training: the full batch
    and the last of an epoch).
    """

    def __init__(self, network: nn.Module, precision: str, *, compiled: bool = False) -> None:
        super().__init__()
        self.network, self.precision, self.training = network, precision, network.training
        self._call: Callable[[Tensor], Tensor] = network
        self.replays = compiled and any(p.is_cuda for p in network.parameters())
        if compiled:
            self._call = torch.compile(network, dynamic=False, mode="reduce-overhead" if self.replays else None)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, in bfloat16 arithmetic where it is safe if the precision is bf16."""
        z = self._run(self._call, x)
        return z.clone() if self.replays else z  # the next replay writes into the same memory

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """Logits without a graph and without compilation, for the odd look in between."""
        return self._run(self.network, x)

    def _run(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z = call(x)
        return z.float()


def forward_flops(model: nn.Module, x: Tensor) -> float:
    """Floating-point operations of convolutions and linear layers in a forward pass over one image of x."""
    counter = FlopCounterMode(display=False)
    # In float64, which no compiled kernel of an activation takes: the counter sees torch's operators alone.
    with counter, torch.no_grad():
        copy.deepcopy(model).double().eval()(x[:1].double())
    return float(counter.get_total_flops())
