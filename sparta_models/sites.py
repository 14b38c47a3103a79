"""Sites: the places of a network where an activation is called, and how activations are put there.

A network is built with empty sites; `install` then fills them. So the convolutions of a seed are the same whatever the
activation, and putting in a transferred bank is the same operation as building.

Sharing: "site" gives every site its own function; "stage" one function to all sites of a resolution stage; "network"
one to all. A function that is bound to a width is shared, under "stage", by the stage's sites of that width
(bottlenecks have two). A shared function is registered once, as `model.shared_activations.<key>`; its sites refer to
it without registering it again, so that state_dict holds every tensor once and DDP sees one parameter.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparta_models.activations import ACTIVATIONS, Activation, build_activation

SHARINGS = ("site", "stage", "network")
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
_SPEC = "_activation_spec"
"""Attribute of a network that `install` has filled."""


class Site(nn.Module):
    """A call site of an activation, x (B, C, H, W) -> (B, C, H, W).

    Args:
        num_channels: C.
        stage: resolution stage: 0 is the stem, 1 the first stage of blocks.
        block: number of the block within the stage.
        position: order within the block; sites of the same position are in the order of their registration.
    """

    def __init__(self, num_channels: int, *, stage: int, block: int, position: int = 0) -> None:
        super().__init__()
        self.num_channels, self.stage, self.block, self.position = num_channels, stage, block, position
        self.key: str | None = None
        """Key of the shared function that stands here, None for an own one."""

    @property
    def function(self) -> Activation:
        """The activation that stands here."""
        own = self._modules.get("activation")
        activation = own if own is not None else self.__dict__.get("_shared")
        if activation is None:
            raise RuntimeError("this site is empty; call sparta_models.install(model, activation) first")
        return cast(Activation, activation)

    def fill(self, activation: Activation, key: str | None = None) -> None:
        """Put an activation here: an own one, or with a key a shared one that the network's root registers."""
        self._modules.pop("activation", None)
        self.__dict__.pop("_shared", None)
        self.key = key
        if key is None:
            self.activation = activation
        else:
            # Past nn.Module.__setattr__: a reference that isn't registered.
            self.__dict__["_shared"] = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation that stands here."""
        return cast(Tensor, self.function(x))

    def _replicate_for_data_parallel(self) -> "Site":
        if self.key is not None:
            raise RuntimeError(
                "expected sharing='site' under nn.DataParallel, whose replicas would all use the first one's shared "
                "activations; use DistributedDataParallel"
            )
        return cast(Site, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Show where the site is, and what it shares."""
        shared = f", shared={self.key}" if self.key else ""
        return f"{self.num_channels}, stage={self.stage}, block={self.block}{shared}"


@dataclass(frozen=True)
class SiteInfo:
    """Where a site is: its module's name, its stage, its depth (index in the stage), its block, its position in it,
    and C."""

    name: str
    stage: int
    depth: int
    block: int
    position: int
    channels: int
    key: str
    """Whose function stands here: the shared key, or the site's own name."""


@dataclass(frozen=True)
class ActivationSpec:
    """An activation's name, its sharing and its constructor's options."""

    name: str
    sharing: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.sharing not in SHARINGS:
            raise ValueError(f"expected sharing among {', '.join(SHARINGS)}, got {self.sharing!r}")

    @classmethod
    def parse(cls, activation: "str | Mapping[str, Any] | ActivationSpec") -> "ActivationSpec":
        """Read a name, or a mapping {"name": ..., "sharing": ..., **options}.

        Options that aren't named get their defaults, so that what is saved outlives a change of defaults.

        Raises:
            ValueError: for what is no name and no mapping, a mapping without a name, or an unknown sharing.
        """
        if isinstance(activation, ActivationSpec):
            return activation
        if not isinstance(activation, str | Mapping):
            raise ValueError(f'expected the name of an activation or a mapping with "name", got {activation!r}')
        spec = cls.saved({"name": activation} if isinstance(activation, str) else activation)
        return replace(spec, options=_defaults(spec.name) | dict(spec.options))

    @classmethod
    def saved(cls, mapping: Mapping[str, Any]) -> "ActivationSpec":
        """Read a mapping as it was saved: an option that came later is no part of a digest.

        Raises:
            ValueError: as `parse`.
        """
        options = dict(mapping)
        if "name" not in options:
            raise ValueError(f'expected a name or a mapping with "name", got keys {sorted(options)}')
        return cls(options.pop("name"), options.pop("sharing", "site"), options)

    def build(self, num_channels: int) -> Activation:
        """Build one activation."""
        return build_activation(self.name, num_channels, **self.options)

    def mapping(self) -> dict[str, Any]:
        """The mapping that `parse` reads."""
        return {"name": self.name, "sharing": self.sharing, **self.options}

    def any_width(self) -> bool:
        """Whether the tensors have the same shapes at every width."""
        with torch.device("meta"):
            shapes = [{k: v.shape for k, v in self.build(c).state_dict().items()} for c in (8, 16)]
        return shapes[0] == shapes[1]


def _defaults(name: str) -> dict[str, Any]:
    """Options of an activation's constructor; none for a name that isn't known, which `build` refuses."""
    if name not in ACTIVATIONS:
        return {}
    parameters = inspect.signature(ACTIVATIONS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def named_sites(model: nn.Module) -> list[tuple[str, Site]]:
    """List (name, site) by stage, block and position; in the networks of `MODELS` registration gives the position."""
    found = [(name, module) for name, module in unwrap(model).named_modules() if isinstance(module, Site)]
    return sorted(found, key=lambda pair: (pair[1].stage, pair[1].block, pair[1].position))


def sites(model: nn.Module) -> list[SiteInfo]:
    """List where the sites of a network are."""
    depths: dict[int, int] = {}
    positions: dict[tuple[int, int], int] = {}
    infos = []
    for name, site in named_sites(model):
        place = (site.stage, site.block)
        depth, position = depths.get(site.stage, 0), positions.get(place, 0)
        depths[site.stage], positions[place] = depth + 1, position + 1
        infos.append(SiteInfo(name, site.stage, depth, site.block, position, site.num_channels, site.key or name))
    return infos


@torch.inference_mode(False)
def install(
    model: nn.Module,
    activation: str | Mapping[str, Any] | ActivationSpec,
    make: Callable[[Site], Activation] | None = None,
) -> None:
    """Fill every site of a network, replacing what stood there. Build optimizers after this, not before.

    Args:
        model: a network with sites.
        activation: name, mapping or spec.
        make: builds the activation for a site (once per shared function); by default from the spec.

    Raises:
        ValueError: for a network without sites, an unknown activation, or sharing="network" with a function that is
            bound to a width in a network of several widths.
    """
    root, spec = unwrap(model), ActivationSpec.parse(activation)
    places = [site for _, site in named_sites(root)]
    if not places:
        raise ValueError("expected a network with activation sites, got none; use build_model or convert first")
    make = make or (lambda site: like(root, spec.build(site.num_channels)))
    keys: list[str | None] = [None] * len(places) if spec.sharing == "site" else list(_shared_keys(places, spec))
    shared: dict[str, Activation] = {}
    # All are built before the first is put in, so that a failure leaves the network as it was.
    functions = []
    for site, key in zip(places, keys, strict=True):
        functions.append(shared.get(key or "") or make(site))
        if key is not None:
            shared[key] = functions[-1]
    for module in root.modules():  # networks in this one that were filled by themselves, too
        module._modules.pop("shared_activations", None)
        module.__dict__.pop(_SPEC, None)
    if shared:
        root.shared_activations = nn.ModuleDict(shared)
    for site, function, key in zip(places, functions, keys, strict=True):
        site.fill(function, key)
    object.__setattr__(root, _SPEC, spec)


def _shared_keys(places: list[Site], spec: ActivationSpec) -> Iterator[str]:
    any_width = spec.any_width()
    widths = sorted({site.num_channels for site in places})
    if spec.sharing == "network" and not any_width and len(widths) > 1:
        raise ValueError(
            f'expected for sharing="network" a function that fits every width of the network ({widths}), got '
            f'{spec.name!r} with one set of parameters per channel; use sharing="stage", or an activation whose '
            'parameters all channels share (for "sparta": variant="shared")'
        )
    for site in places:
        name = "network" if spec.sharing == "network" else f"stage{site.stage}"
        yield name if any_width else f"{name}_c{site.num_channels}"


def first_weight(root: nn.Module) -> nn.Parameter | None:
    """The first parameter that is no integer: its device and type are the network's."""
    return next((parameter for parameter in root.parameters() if parameter.is_floating_point()), None)


def like(root: nn.Module, activation: Activation) -> Activation:
    """Move an activation to the network's device, type and mode."""
    first = first_weight(root)
    if first is not None:
        activation.to(first.device, first.dtype)
    return activation.train(root.training)


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside what torch wraps around one; a user's own wrapper may compute something and stays.

    Raises:
        TypeError: for what is no module: a name, a class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network, a torch.nn.Module, got {model!r}")
    # torch.compile's is known by its child: its class is slow to import.
    while isinstance(model, _WRAPPERS) or set(model._modules.keys()) == {"_orig_mod"}:
        model = next(model.children())
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers such as DistributedDataParallel, AveragedModel, torch.compile's, or one of a
    user's own around a network of build_model or convert (a Sequential with a normalisation in front)."""
    model = bare(model)
    filled = filled_networks(model)
    alone = len(filled) == 1 and _count_sites(filled[0]) == _count_sites(model)
    return filled[0] if alone else model


def filled_networks(model: nn.Module) -> list[nn.Module]:
    """The networks in a model, maybe itself, that `install` has filled, each by itself."""
    return [module for module in model.modules() if _SPEC in module.__dict__]


def _count_sites(model: nn.Module) -> int:
    return sum(isinstance(module, Site) for module in model.modules())


def activation_spec(model: nn.Module) -> ActivationSpec:
    """Return what `install` put into a network.

    Raises:
        ValueError: for a network without installed activations.
    """
    spec = getattr(unwrap(model), _SPEC, None)
    if not isinstance(spec, ActivationSpec):
        there = _count_sites(model)
        got = f"{there} sites that were not filled as one network's" if there else "one without activation sites"
        raise ValueError(f"expected a network made by build_model or convert, or filled by install, got {got}")
    return spec
