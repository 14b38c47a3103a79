"""The calls of activations in a traced network: which there are, of what kind, and on what shapes."""

import inspect
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparta_models.activations import ACTIVATIONS, Activation

KINDS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((nn.PReLU, F.prelu, torch.prelu), "prelu"),
    **dict.fromkeys((nn.RReLU, F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), "rrelu"),
    **dict.fromkeys((nn.ELU, F.elu, F.elu_), "elu"),
    **dict.fromkeys((nn.SELU, F.selu, F.selu_, torch.selu, torch.selu_), "selu"),
    **dict.fromkeys((nn.CELU, F.celu, F.celu_, torch.celu, torch.celu_), "celu"),
    **dict.fromkeys((nn.GELU, F.gelu), "gelu"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Mish, F.mish), "mish"),
    **dict.fromkeys((nn.Softplus, F.softplus), "softplus"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
}
"""Module class or function -> kind of activation that is replaced. A gate such as Sigmoid is none."""

_NAMES = {kind: kind for kind in KINDS.values()} | {"swish": "silu", "gelutanh": "gelu", "quickgelu": "gelu"}
"""Name of a class, in small letters -> kind: activations that others write out by hand, such as timm's Mish."""

_METHODS = {"relu": "relu", "relu_": "relu", "prelu": "prelu"}
_CLAMP_METHODS = {name for verb in ("clamp", "clamp_min", "clip") for name in (verb, f"{verb}_")}
_CLAMPS = _CLAMP_METHODS | {getattr(torch, name) for name in _CLAMP_METHODS}
_CLIPS: tuple[tuple[Collection[Any], tuple[str, str]], ...] = (
    (_CLAMPS, ("min", "max")),
    ((F.hardtanh, F.hardtanh_), ("min_val", "max_val")),
    ((F.threshold, torch.threshold, torch.threshold_), ("threshold", "value")),
)
_CLAMPED: dict[tuple[Any, ...], str] = {(0, None): "relu", (0, 6): "relu6"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", "multiply_"}
_QUOTIENTS = {operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_"}
_SQUASHES = {torch.tanh, torch.sigmoid, F.tanh, F.sigmoid, "tanh", "tanh_", "sigmoid", "sigmoid_"}
_ELEMENTWISE = _SUMS | _PRODUCTS | _QUOTIENTS | _SQUASHES | _CLAMPS
_PERMUTATION_METHODS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
_PERMUTATIONS = _PERMUTATION_METHODS | {getattr(torch, name) for name in _PERMUTATION_METHODS}
_PARTS = {torch.split, torch.chunk, torch.tensor_split, "split", "chunk", "tensor_split", operator.getitem}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_KEEP_AXES = _ELEMENTWISE | _PARTS | _CONCATENATIONS | {F.pad}
"""What changes a map's shape at most, and keeps the order of its axes."""
JOINS = _SUMS | _CONCATENATIONS
"""What adds or concatenates tensors."""


@dataclass
class Call:
    """A call of an activation in the graph, whose nodes know their shapes."""

    node: fx.Node
    kind: str
    was: str
    inside: str | None
    """Name of the activation in a leaf that calls it last (timm's BatchNormAct2d)."""
    inplace: bool
    chosen: bool

    @classmethod
    def of(cls, graph_module: fx.GraphModule, node: fx.Node, only: Collection[str] | None) -> "Call | None":
        """The call that a node is; None where it calls no activation."""
        # Python's functions of torch hand it over by name, however it was given.
        target, inside, inplace, kind = node.target, None, bool(node.kwargs.get("inplace")), None
        if node.op == "call_module":
            module = graph_module.get_submodule(str(target))
            act = getattr(module, "act", None)
            if isinstance(module, _BatchNorm) and isinstance(act, nn.Module):
                module, inside = act, f"{target}.act"
            kind = _module_kind(module)
            was = f"{target} ({type(module).__name__})"
            if isinstance(module, Activation):
                # The user's own choice, and maybe trained: it is told of and kept.
                return cls(node, kind or type(module).__name__, was, inside, inplace=False, chosen=False)
            inplace = kind is not None and _writes(module)
        elif node.op == "call_method":
            kind, was = _METHODS.get(str(target)) or _clip_kind(node), f"Tensor.{target}"
        else:
            was = _name(node)
            if node.op == "call_function":
                kind = KINDS.get(target) or _clip_kind(node)
        if kind is None:
            return None
        inplace = inplace or was.endswith("_") or "out" in node.kwargs
        call = cls(node, kind, was, inside, inplace and inside is None, only is None or kind in only)
        elsewhere = node.kwargs.get("out", call.source) is not call.source
        if elsewhere or _is_gate(node, call.source, kind):
            call.chosen = False
        return call

    @property
    def source(self) -> fx.Node:
        """The activation's input; the leaf's own node where it is inside one."""
        if self.inside:
            return self.node
        given = (self.node.kwargs.get("input"), *self.node.args, *self.node.kwargs.values())
        return next(argument for argument in given if isinstance(argument, fx.Node))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input as (B, C, H, W), or as it is when that isn't a map."""
        shape = self.source.meta["shape"]
        return tuple(shape[axis] for axis in self.to_map) if len(shape) == 4 else shape

    @cached_property
    def to_map(self) -> tuple[int, ...]:
        """Axes of the input as a map has them: (0, 1, 2, 3), or (0, 3, 1, 2) behind the linear layers of a ConvNeXt.
        Found once, before the graph is changed."""
        channels = self.source.meta["channels"]
        return (0, channels, *(axis for axis in (1, 2, 3) if axis != channels))

    @property
    def from_map(self) -> tuple[int, ...]:
        """The way back from `to_map`."""
        return tuple(self.to_map.index(axis) for axis in range(4))

    @property
    def replaced(self) -> bool:
        """Whether a site comes here."""
        return self.chosen and is_map(self.shape)


def note_channel_axes(graph: fx.Graph) -> None:
    """Note, for each node, the axis of its value (4 axes) along which its channels lie: 3 behind a linear layer or a
    layer norm, another one behind a permutation, and 1 wherever nothing else is known."""
    for node in graph.nodes:  # inputs come first
        node.meta["channels"] = _channel_axis(node)


def _channel_axis(node: fx.Node) -> int:
    if _is_linear(node):
        return 3
    # What split returns has no shape.
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and len(n.meta["shape"]) in (0, 4)]
    order = _permutation(node)
    if not inputs or not (order or _calls(node, _KEEP_AXES) or inputs[0].meta["shape"] == node.meta["shape"]):
        return 1
    axis: int = inputs[0].meta["channels"]
    # The batch stays in front: a permutation that moves it makes no map.
    return (order.index(axis) or 1) if order else axis


def _is_linear(node: fx.Node) -> bool:
    """Whether a node calls what mixes the last axis of a map."""
    linear = isinstance(_module(node), nn.Linear | nn.LayerNorm) or _calls(node, (F.linear, F.layer_norm))
    return linear and len(node.meta["shape"]) == 4


def _permutation(node: fx.Node) -> list[int] | None:
    """Where a permutation of four axes takes each output axis from; None for any other node."""
    if not _calls(node, _PERMUTATIONS) or len(node.meta["shape"]) != 4 or len(node.all_input_nodes) != 1:
        return None
    options = {name: value for name, value in node.kwargs.items() if name != "input"}
    marked = torch.empty(10, 11, 12, 13, device="meta")
    return [size - 10 for size in getattr(marked, _name(node))(*node.args[1:], **options).shape]


def is_map(shape: Sequence[int]) -> bool:
    """Whether a shape is that of a map with more than one position."""
    return len(shape) == 4 and shape[2] * shape[3] > 1


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is an activation by its name, of one input, and holds nothing: one call, whatever its forward
    is made of."""
    bare = not list(module.children()) and not list(module.parameters()) and not list(module.buffers())
    if not bare or type(module).__name__.lower() not in _NAMES:
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    return len(parameters) == 1 and all(p.kind is not p.VAR_POSITIONAL for p in parameters)


def _module_kind(module: nn.Module) -> str | None:
    kinds = {**KINDS, **{known: name for name, known in ACTIVATIONS.items()}}
    kind = next((k for known, k in kinds.items() if isinstance(known, type) and isinstance(module, known)), None)
    if kind is not None:
        return kind
    if is_written_out(module):
        return _NAMES[type(module).__name__.lower()]
    if isinstance(module, nn.Hardtanh):
        return _CLAMPED.get((module.min_val, module.max_val))
    if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
        return "relu"
    return None


def _writes(module: nn.Module) -> bool:
    """Whether an activation changes its input in place. What its author wrote out is tried, not asked."""
    if not is_written_out(module):
        return bool(getattr(module, "inplace", False))
    x = torch.ones(1, 1, 2, 2)
    before = x._version
    module(x)
    return x._version != before


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _is_gate(node: fx.Node, source: fx.Node, kind: str) -> bool:
    """Whether a call is part of a gate and no activation: the relu6(x + 3) of a hard sigmoid; or one that, by functions
    of one element, comes from a map and is multiplied by it, as in x tanh(softplus(x))."""
    if kind == "relu6" and _calls(source, _SUMS) and any(isinstance(value, int | float) for value in source.args):
        return True
    behind = [source]
    while _is_elementwise(behind[-1]):
        behind.append(behind[-1].all_input_nodes[0])
    ahead = [node]
    for reached in ahead:
        for user in reached.users:
            if _calls(user, _PRODUCTS) and not set(behind).isdisjoint(user.all_input_nodes):
                return True
            if _is_elementwise(user):
                ahead.append(user)
    return False


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a node is a function of each element of one tensor."""
    if len(node.all_input_nodes) != 1:
        return False
    return isinstance(_module(node), nn.Tanh | nn.Sigmoid) or _calls(node, _ELEMENTWISE)


def _module(node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None where it calls something else."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def _calls(node: fx.Node, targets: Collection[Any]) -> bool:
    """Whether a node calls one of some functions and methods; a module may have the name of a method."""
    return node.op in ("call_function", "call_method") and node.target in targets


def _clip_kind(node: fx.Node) -> str | None:
    """clamp(min=0) and threshold(0, 0) are ReLUs; clamp(0, 6) and hardtanh(0, 6) ReLU6s."""
    names = next((names for functions, names in _CLIPS if _calls(node, functions)), None)
    if names is None:
        return None
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    bounds = tuple(given.get(name) for name in names)
    if "threshold" in names:
        return "relu" if bounds == (0, 0) else None
    return _CLAMPED.get(bounds)
