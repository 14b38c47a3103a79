"""Turn any torch CNN into one with activation sites: a user's own, torchvision's, timm's.

The network is traced with torch.fx down to torch's own modules. Every call of a rectifier-like activation on a map,
module or function, becomes a site of its own, also where the author calls one nn.ReLU in many places. A forward pass
on the meta device tells channels and resolutions, which with the modules around a call say where it stands.
"""

import contextlib
import copy
import inspect
import io
import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from sparta_models.activations import Activation
from sparta_models.calls import KINDS, Call, is_written_out, note_channel_axes
from sparta_models.models.common import Normalize
from sparta_models.places import places
from sparta_models.sites import ActivationSpec, Site, bare, first_weight, install


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

    def __copy__(self) -> "Converted":
        return _twin(self)

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
    return _twin(make(*arguments))


def _twin(plain: fx.GraphModule) -> Converted:
    """A converted network of a GraphModule's modules, graph and memory."""
    network = Converted(plain, plain.graph, type(plain).__name__)
    for name in _REMEMBERED & set(plain.__dict__):
        object.__setattr__(network, name, plain.__dict__[name])
    if "shared_activations" in plain._modules:  # the graph calls sites only
        network.shared_activations = plain.shared_activations
    return network


@torch.inference_mode(False)
@torch.enable_grad()
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
        model: the network, x (B, C, H, W) -> anything; its forward's other arguments have their defaults in the copy.
            What torch wraps around it (DistributedDataParallel, AveragedModel, torch.compile's) is left behind.
        activation: a name in `ACTIVATIONS`, or a mapping as in `build_model`.
        input_shape: (C, H, W) of an image; it decides the resolutions and so the stages.
        only: kinds to replace, values of `KINDS`, or one of them; None for all.

    Raises:
        TypeError: for what is no network: a name, a class.
        ValueError: for a network that cannot be copied or that torch.fx can't trace, one that computes something else
            than its trace (it asks for types, counts its calls, draws by numpy), one whose graph depends on the
            training mode, one that in its forward switches gradients or autocast, draws random numbers or changes a
            buffer in a way that a graph cannot hold, one with lazy parameters, one that refuses the input shape, one
            without activations to replace, one that has sites already, a scripted one, or an unknown kind or
            activation.
    """
    network = bare(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ValueError(
            "expected a network of Python, got a ScriptModule or one with it; convert, then script or trace"
        )
    if "forward" in vars(network):
        raise ValueError("expected the forward of the network's class, got one on the instance; put it in a subclass")
    if not (isinstance(input_shape, Sequence) and len(input_shape) == 3):
        raise ValueError(f"expected input_shape (C, H, W), got {input_shape!r}")
    if any(isinstance(module, Site) for module in network.modules()):
        raise ValueError(
            "expected a network without activation sites, got one that has them; sparta_models.install changes what "
            "stands there"
        )
    only = {only} if isinstance(only, str) else only
    unknown = sorted(set(only or ()) - set(KINDS.values()))
    if unknown:
        raise ValueError(f"unknown kinds {unknown}; known: {', '.join(sorted(set(KINDS.values())))}")
    graph_module = _trace(_bare_copy(network))
    _keep_buffers(graph_module, set(network.state_dict()))
    _propagate(graph_module, input_shape)
    _expect_the_same(network, graph_module, input_shape)
    note_channel_axes(graph_module.graph)
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


_OWN_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks by which torch.nn.utils makes a module's weight: part of the network."""


def _bare_copy(network: nn.Module) -> nn.Module:
    """Copy a network without the hooks that a user put there: they would run in the trace, and again in the copy."""
    try:
        twin = copy.deepcopy(network)
    except Exception as error:
        raise ValueError(
            f"expected a network that can be copied, got {type(network).__name__}: {error}; of weight_norm, "
            "spectral_norm and pruning take those of torch.nn.utils.parametrizations, or make the weights permanent"
        ) from error
    for module in twin.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        for key, hook in list(module._forward_pre_hooks.items()):
            if not isinstance(hook, _OWN_HOOKS):
                del module._forward_pre_hooks[key]
    return twin


class _Tracer(fx.Tracer):
    """Goes into every module but torch's own, those of this library, and those whose training mode a graph would freeze
    (DropPath)."""

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace, and refuse what a graph has no place for."""
        self._modes = _autograd_modes()
        root: nn.Module = args[0]
        drawn, held = _random_state(), _buffers(root)
        graph = super().trace(*args, **kwargs)
        if _buffers(root) != held:
            raise ValueError(
                "its forward puts another value in a buffer's place, or one that does not depend on its input, which a "
                "graph cannot hold; change buffers by their methods (self.mean.lerp_(now, 0.1)), leave counters out"
            )
        if _random_state() != drawn:
            raise ValueError(
                "its forward draws random numbers that do not depend on its input, which a graph would keep; use "
                "torch.randn_like(x) and the like, or a module of torch.nn such as nn.Dropout"
            )
        return graph

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Give forward its first argument alone; fx would give the others, whose defaults then never hold."""
        _, first = list(inspect.signature(root_fn).parameters.values())[:2]
        name = "x" if first.kind is first.VAR_POSITIONAL else first.name
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

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


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def _buffers(model: nn.Module) -> list[tuple[str, int, int]]:
    """Each buffer's name, object, and number of changes."""
    return [(name, id(buffer), buffer._version) for name, buffer in model.named_buffers()]


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
    first = first_weight(twin)
    dtype = torch.float32 if first is None else first.dtype
    try:
        # What it prints of an error is in the one that is raised.
        with torch.no_grad(), torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(twin).propagate(torch.empty(2, *input_shape, dtype=dtype))
    except Exception as error:
        cause = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"expected a network for images of shape {tuple(input_shape)}, got: {cause}; pass the shape of its images "
            "as input_shape=(C, H, W), or take out of its forward what depends on values (.item(), x[x > 0])"
        ) from error
    for own, other in zip(graph_module.graph.nodes, twin.graph.nodes, strict=True):
        shape = getattr(other.meta.get("tensor_meta"), "shape", ())
        own.meta["shape"] = tuple(shape)


def _expect_the_same(network: nn.Module, graph_module: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Refuse a graph that computes something else than its network: a trace sees no types, no values and no numpy.

    Nothing is compared on the meta device, nor where the network cannot run (in half precision on a CPU, say).
    """
    weight = first_weight(network)
    first = torch.empty(0) if weight is None else weight
    if first.is_meta:
        return
    with torch.random.fork_rng([first.device] if first.is_cuda else []):
        x = torch.rand(2, *input_shape, dtype=first.dtype, device=first.device)
        for gradients in (True, False):  # a network for inference alone has none
            with torch.set_grad_enabled(gradients), contextlib.suppress(Exception):  # which it raises by itself
                expected = _two_answers(_bare_copy(network), x.requires_grad_(gradients))
                break
        else:
            return
        with torch.set_grad_enabled(gradients):
            found = _two_answers(copy.deepcopy(graph_module), x)
    if len(expected) != len(found) or not all(map(_close, expected, found)):
        raise ValueError(
            f"expected a network that its torch.fx trace computes, got {type(network).__name__}, whose outputs or "
            "gradients differ from it; of what a trace cannot hold take out: asking for types (torch.is_tensor(x)), "
            "numbers that change from call to call, random numbers of numpy or of an own generator, an own "
            "autograd.Function"
        )


def _two_answers(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the network gives in eval mode; the second time tells counters and generators of its own."""
    network.eval()
    return [*_outputs(network, x), *_outputs(network, x)]


def _outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors that the network returns, and the gradient at x of a weighted sum of them where there is one."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every device, and no fork holds all of them
    if x.is_cuda:
        with torch.cuda.device(x.device):
            torch.cuda.manual_seed(0)
    found = [leaf for leaf in tree_leaves(network(x.clone())) if isinstance(leaf, Tensor)]
    weighted = [
        (y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in found if y.requires_grad
    ]
    gradients = torch.autograd.grad(weighted, x, allow_unused=True) if weighted else ()
    return [*(y.detach() for y in found), *(gradient for gradient in gradients if gradient is not None)]


def _close(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not (a.is_floating_point() or a.is_complex()) or not a.numel():
        return torch.equal(a, b)
    share = max(1e-3, 8 * torch.finfo(a.dtype).eps)  # a GPU adds in no fixed order
    return torch.allclose(a, b, rtol=share, atol=share * float(a.abs().nanmean().nan_to_num()), equal_nan=True)


def _replace(graph_module: fx.GraphModule, calls: list[Call]) -> list[Replacement]:
    # What is read from the graph is read before the first change to it.
    shapes = [call.shape for call in calls]
    replaced = [call.replaced for call in calls]
    where = iter(places([call for call, yes in zip(calls, replaced, strict=True) if yes]))
    names = _names(graph_module, calls, replaced)
    replacements = []
    for call, shape, name in zip(calls, shapes, names, strict=True):
        if name is not None:
            place = next(where)
            # A leaf that is called again has its site already.
            if call.inside is None or not isinstance(graph_module.get_submodule(name), Site):
                graph_module.add_submodule(name, Site(shape[1], **place._asdict()))
            if call.inside is None:
                _rewire(graph_module.graph, call, name)
        replacements.append(Replacement(call.kind, call.was, shape, name))
    return replacements


def _names(graph_module: fx.GraphModule, calls: list[Call], replaced: list[bool]) -> list[str | None]:
    """A name for the site of each call, None where the call is kept: that of the module which it replaces, with a
    number where that one is called again; no other module, parameter or buffer has it."""
    freed = {_own_name(call) for call, yes in zip(calls, replaced, strict=True) if yes}
    kept = {str(call.node.target) for call, yes in zip(calls, replaced, strict=True) if not yes}
    held = (graph_module.named_modules(), graph_module.named_parameters(), graph_module.named_buffers())
    taken = {name for named in held for name, _ in named} - freed | kept
    functions = _free("sites", taken)
    names: list[str | None] = []
    for call, yes in zip(calls, replaced, strict=True):
        name = None
        if yes:
            name = call.inside or _free(_own_name(call) or f"{functions}.{call.node.name}", taken)
            taken.add(name)
        names.append(name)
    return names


def _own_name(call: Call) -> str | None:
    """Name of the module whose call it is; None of a function."""
    return call.inside or (str(call.node.target) if call.node.op == "call_module" else None)


def _free(base: str, taken: Collection[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is not taken."""
    return next(name for n in itertools.count(1) if (name := base if n == 1 else f"{base}_{n}") not in taken)


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
