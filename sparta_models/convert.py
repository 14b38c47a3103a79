"""Turn any torch CNN into one with activation sites: a user's own, torchvision's, timm's.

The network is traced with torch.fx down to torch's own modules. Every call of a rectifier-like activation on a map,
module or function, becomes a site of its own, also where the author calls one nn.ReLU in many places. A forward pass
on the meta device tells channels and resolutions, which with the modules around a call say where it stands.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sparta_models.activations import Activation
from sparta_models.calls import KINDS, Call, is_written_out
from sparta_models.models.common import Normalize
from sparta_models.places import places
from sparta_models.sites import ActivationSpec, Site, install, unwrap


@dataclass(frozen=True)
class Replacement:
    """One call of an activation: its kind, the module or function that was called, its input's shape, and the name of
    the site that stands there now, None where the call was kept.
    """

    kind: str
    was: str
    shape: tuple[int, ...]
    site: str | None


class Converted(fx.GraphModule):
    """A traced network that knows, as its copies and pickles do, what was replaced in it and what stands at its
    sites."""

    replacements: list[Replacement]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, super().__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Converted":
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Converted)
        # fx copies the graph and the modules alone.
        for name in _REMEMBERED & set(self.__dict__):
            object.__setattr__(twin, name, copy.copy(self.__dict__[name]))
        return twin


_REMEMBERED = {"replacements", "_activation_spec", "_architecture"}


def _restored(make: Callable[..., fx.GraphModule], arguments: tuple[Any, ...]) -> Converted:
    """Of the plain GraphModule that fx restores, the converted network that it was."""
    plain = make(*arguments)
    network = Converted(plain, plain.graph, type(plain).__name__)
    for name in _REMEMBERED & set(plain.__dict__):
        object.__setattr__(network, name, plain.__dict__[name])
    if "shared_activations" in plain._modules:  # the graph calls sites only
        network.shared_activations = plain.shared_activations
    return network


def convert(
    model: nn.Module,
    activation: str | Mapping[str, Any] | ActivationSpec = "sparta",
    *,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    only: Collection[str] | None = None,
) -> Converted:
    """Return a copy of a CNN whose activations are sites, filled with the named activation.

    Weights, their names and each module's train or eval mode are kept; what registers a module or a tensor twice has
    one name in the copy, and hooks are not in it. Activations on vectors, or on maps of one pixel
    as in squeeze-and-excitation, have no positions and are kept, and so are rectifiers that are part of a gate (the
    relu6 of a hard sigmoid) and activations of this library that stand there without a site. `model.replacements` lists
    every call, replaced or kept. The copy wants the images that the network wanted: nn.Sequential(Normalize(3, mean,
    std), model) takes [0, 1]. An in-place call counts as one on its input's own name: a view that was taken before
    keeps what it was. What forward does not call is not in the copy; a module without children whose forward asks for
    its mode (DropPath) is not looked into.

    Args:
        model: the network, x (B, C, H, W) -> anything; what wraps it (DistributedDataParallel, torch.compile's) is left
            behind.
        activation: a name in `ACTIVATIONS`, or a mapping as in `build_model`.
        input_shape: (C, H, W) of an image; it decides the resolutions and so the stages.
        only: kinds to replace, values of `KINDS`, or one of them; None for all.

    Raises:
        ValueError: for a network that torch.fx can't trace, one whose graph depends on the training mode, one that
            switches gradients or autocast in its forward, one with lazy parameters, one that refuses the input shape,
            one without activations to replace, one that has sites already, or an unknown kind or activation.
    """
    if any(isinstance(module, Site) for module in model.modules()):
        raise ValueError(
            "expected a network without activation sites, got one that has them; sparta_models.install changes what "
            "stands there"
        )
    only = {only} if isinstance(only, str) else only
    unknown = sorted(set(only or ()) - set(KINDS.values()))
    if unknown:
        raise ValueError(f"unknown kinds {unknown}; known: {', '.join(sorted(set(KINDS.values())))}")
    network = unwrap(model)
    graph_module = _trace(copy.deepcopy(network))
    _keep_buffers(graph_module, set(network.state_dict()))
    _propagate(graph_module, input_shape)
    calls = [call for node in graph_module.graph.nodes if (call := Call.of(graph_module, node, only))]
    if not any(call.replaced for call in calls):
        raise ValueError("expected a CNN with activations on (B, C, H, W) maps, got none to replace")
    replacements = _replace(graph_module, calls)
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
    install(graph_module, activation)
    object.__setattr__(graph_module, "replacements", replacements)
    object.__setattr__(graph_module, "_architecture", type(network).__name__)
    return graph_module


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own, those of this library, and those whose training mode a graph would freeze
    (DropPath)."""

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace, and refuse what a graph has no place for."""
        self._modes = _autograd_modes()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note a call; fx would forget the `with torch.no_grad()` around it."""
        if _autograd_modes() != self._modes:
            raise ValueError(
                "its forward switches gradients or autocast, which a graph cannot hold; put that around the call of "
                "the network, detach() the tensor, or move that part into a module of torch.nn"
            )
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        code = getattr(type(m).forward, "__code__", None)
        modal = code is not None and "training" in code.co_names
        alone = isinstance(m, _BatchNorm) or not list(m.children())
        return (
            isinstance(m, Normalize | Activation)
            or is_written_out(m)
            or (modal and alone)
            or super().is_leaf_module(m, module_qualified_name)
        )


def _autograd_modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, devices)


def _trace(model: nn.Module) -> Converted:
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("expected a network with all its parameters, got lazy ones; call it on an image first")
    try:
        # Of copies: a trace leaves the constants of a forward behind, and the next one gives its own other names.
        in_training, in_eval = (str(_Tracer().trace(copy.deepcopy(model).train(mode))) for mode in (True, False))
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"expected a network that torch.fx can trace, got {type(model).__name__}: {error}; take control flow that "
            "depends on data out of its forward, or give it sites of its own (sparta_models.Site) and call install"
        ) from error
    if in_training != in_eval:
        raise ValueError(
            f"expected the same graph in train and eval mode, got two of {type(model).__name__}; put what depends on "
            "self.training into a module without children, such as nn.Dropout"
        )
    return Converted(model, graph, type(model).__name__)


def _keep_buffers(graph_module: fx.GraphModule, kept: set[str]) -> None:
    """Leave out of the state_dict what the network has not in its own: fx makes buffers of plain tensors."""
    for prefix, module in graph_module.named_modules():
        names = {name for name in module._buffers if (f"{prefix}.{name}" if prefix else name) not in kept}
        module._non_persistent_buffers_set |= names


def _propagate(graph_module: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Note each node's shape, by a forward pass of a copy on the meta device in eval mode."""
    twin = copy.deepcopy(graph_module).to("meta").eval()
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    try:
        # What it prints of an error is in the one that is raised.
        with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(twin).propagate(torch.empty(2, *input_shape, dtype=dtype))
    except Exception as error:
        cause = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"expected a network for images of shape {tuple(input_shape)}, got: {cause}; pass the shape of its images "
            "as input_shape=(C, H, W)"
        ) from error
    for own, other in zip(graph_module.graph.nodes, twin.graph.nodes, strict=True):
        shape = getattr(other.meta.get("tensor_meta"), "shape", ())
        own.meta["shape"] = tuple(shape)


def _replace(graph_module: fx.GraphModule, calls: list[Call]) -> list[Replacement]:
    # What is read from the graph is read before the first change to it.
    shapes = [call.shape for call in calls]
    replaced = [call.replaced for call in calls]
    where = iter(places([call for call, yes in zip(calls, replaced, strict=True) if yes]))
    taken = {str(call.node.target) for call, yes in zip(calls, replaced, strict=True) if not yes}
    replacements = []
    for call, shape, yes in zip(calls, shapes, replaced, strict=True):
        name = _free_name(call, taken) if yes else None
        if name is not None:
            graph_module.add_submodule(name, Site(shape[1], **next(where)._asdict()))
            if call.inside is None:
                _rewire(graph_module.graph, call, name)
        replacements.append(Replacement(call.kind, call.was, shape, name))
    return replacements


def _free_name(call: Call, taken: set[str]) -> str:
    """Name the site as the module that it replaces, with a number where that one is called again."""
    base = call.inside or (str(call.node.target) if call.node.op == "call_module" else f"sites.{call.node.name}")
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _rewire(graph: fx.Graph, call: Call, name: str) -> None:
    """Put a call of the site in the place of the activation's."""
    node, source, there, back = call.node, call.source, call.to_map, call.from_map
    moved = there != (0, 1, 2, 3)
    with graph.inserting_before(node):
        x = graph.call_method("permute", (source, *there)) if moved else source
        y = graph.call_module(name, (x,))
        out = graph.call_method("permute", (y, *back)) if moved else y
    if call.inplace:
        # Whoever reads the input after an in-place call reads the output.
        order = {n: i for i, n in enumerate(graph.nodes)}
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, out)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
