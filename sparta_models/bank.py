"""The bank: the trained activations of a network, apart from its convolutions, to be frozen into other networks.

On disk a bank is a directory with bank.safetensors (the tensors) and bank.json (what they are). Nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparta_models.activations import Activation
from sparta_models.files import read_bank, write_bank
from sparta_models.sites import (
    ActivationSpec,
    Site,
    SiteInfo,
    activation_spec,
    filled_networks,
    install,
    like,
    named_sites,
    sites,
    unwrap,
)
from sparta_models.transfer import adapt_tensors, match

PRETRAINED = Path(__file__).with_name("pretrained")
"""Banks that ship with the package, a folder each, with a card.md that says what they are and aren't."""


@dataclass(frozen=True)
class Entry:
    """One function of a bank: the first site where it stood, and its tensors (parameters and buffers) by name."""

    site: SiteInfo
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class ActivationBank:
    """Trained activations by key (site name, or key of the shared function). Immutable; equality is that of the digest.

    Attributes:
        spec: the activation's name, sharing and options.
        entries: the functions, by key.
        sites: every site of the source network.
        architecture: name of the source network.
        source: free text on where it comes from, e.g. {"dataset": ..., "threat_model": ...}; not part of the digest.
    """

    spec: ActivationSpec
    entries: Mapping[str, Entry]
    sites: tuple[SiteInfo, ...]
    architecture: str
    source: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: nn.Module, *, source: Mapping[str, str] | None = None) -> "ActivationBank":
        """Copy the activations out of a network.

        Raises:
            ValueError: for a network without installed activations, on the meta device, or with others put at its sites
                since (by hand, by pruning).
        """
        root = unwrap(model)
        _expect_values(root)
        spec, infos = activation_spec(model), sites(model)
        entries: dict[str, Entry] = {}
        for info, (_, site) in zip(infos, named_sites(model), strict=True):
            if info.key not in entries:
                tensors = {k: v.detach().cpu().clone() for k, v in site.function.state_dict().items()}
                entries[info.key] = Entry(info, tensors)
        _expect_shapes(spec, entries)
        architecture = str(getattr(root, "_architecture", type(root).__name__))
        return cls(spec, entries, tuple(infos), architecture, {} if source is None else source)

    @classmethod
    def pretrained(cls, name: str) -> "ActivationBank":
        """Load a bank that ships with the package.

        Raises:
            ValueError: for a name that isn't among `pretrained_banks()`.
        """
        if name not in pretrained_banks():
            raise ValueError(f"expected a name among {', '.join(pretrained_banks())}, got {name!r}")
        return cls.load(PRETRAINED / name)

    def __post_init__(self) -> None:
        given = self.source
        if not isinstance(given, Mapping) or not all(isinstance(text, str) for pair in given.items() for text in pair):
            raise ValueError(f"expected source to be a mapping of names to texts, got {given!r}")
        object.__setattr__(self, "source", dict(given))  # what becomes of the caller's own is none of the bank's

    def __repr__(self) -> str:
        """Say what it is; the tensors would fill the screen."""
        return (
            f"ActivationBank({self.spec.mapping()}, {len(self.entries)} functions of {self.architecture}, "
            f"digest {self.digest[:12]}, source={dict(self.source)})"
        )

    @property
    def digest(self) -> str:
        """sha256 over the spec, the keys and every tensor's name, type, shape and bytes."""
        digest = hashlib.sha256(json.dumps(self.spec.mapping(), sort_keys=True).encode())
        for key, entry in sorted(self.entries.items()):
            if not entry.tensors:
                digest.update(f"{key}/".encode())
            for name, tensor in sorted(entry.tensors.items()):
                digest.update(f"{key}/{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActivationBank) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def apply_to(self, model: nn.Module, freeze: bool = True, adapt: str | None = None) -> nn.Module:
        """Put the activations into a network, in place, replacing those at its sites; build the optimizer afterwards.

        Args:
            model: a network with sites, of build_model or convert.
            freeze: pin them: no gradient, eval mode for good.
            adapt: rule for a site of another width than its source's, see `sparta_models.transfer.ADAPT`.

        Raises:
            ValueError: for a network without sites, several networks in one, a network on the meta device, and for a
            width mismatch without a rule, naming both widths.
        """
        if not isinstance(freeze, bool):
            raise ValueError(f"expected freeze to be True or False, got {freeze!r}; a rule for other widths is adapt=")
        target, root = sites(model), unwrap(model)
        networks = len(filled_networks(root))
        if networks > 1:
            raise ValueError(f"expected one network, got {networks} in one; apply the bank to each of them")
        _expect_values(root)
        plan = match(target, list(self.sites))
        by_site = {id(site): info for info, (_, site) in zip(target, named_sites(model), strict=True)}

        def make(site: Site) -> Activation:
            info = by_site[id(site)]
            entry = self.entries[plan[info.name].key]
            activation = self.spec.build(site.num_channels)
            tensors = adapt_tensors(entry.tensors, activation.state_dict(), entry.site, info, adapt)
            activation.load_state_dict(tensors)
            like(root, activation)
            return activation.freeze() if freeze else activation

        install(model, self.spec, make)
        return model

    def save(self, directory: str | Path) -> Path:
        """Write the bank into a directory, each file by temporary name, check and rename. Returns the directory."""
        tensors = {f"{key}/{name}": t for key, e in self.entries.items() for name, t in e.tensors.items()}
        meta = {
            "activation": self.spec.mapping(),
            "architecture": self.architecture,
            "source": dict(self.source),
            "sites": [asdict(info) for info in self.sites],
            "digest": self.digest,
        }
        return write_bank(Path(directory), tensors, meta)

    @classmethod
    def load(cls, directory: str | Path) -> "ActivationBank":
        """Read a bank and check it against its digests.

        Raises:
            ValueError: for files that are missing, truncated, altered, of another schema, or that hold values that
            aren't finite.
        """
        tensors, meta = read_bank(Path(directory))
        try:
            spec = ActivationSpec.saved(meta["activation"])
            infos = tuple(SiteInfo(**info) for info in meta["sites"])
            bank = cls(spec, _entries(spec, infos, tensors), infos, meta["architecture"], meta["source"])
            digest = bank.digest
        # Sizes that no tensor can have are a RuntimeError or an OverflowError of torch.
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{directory}: expected sites and tensors of one activation, got: {said}") from error
        if digest != meta["digest"]:
            raise ValueError(
                f"expected a bank with digest {meta['digest']}, got {digest}; the files don't belong together"
            )
        return bank


def pretrained_banks() -> list[str]:
    """Names of the banks that ship with the package, for `ActivationBank.pretrained`."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/bank.json"))


def _entries(spec: ActivationSpec, infos: tuple[SiteInfo, ...], tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Group tensors by key and compare them with what the activation holds."""
    entries: dict[str, Entry] = {}
    for info in infos:
        own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == info.key}
        entries.setdefault(info.key, Entry(info, own))
    _expect_shapes(spec, entries)
    strangers = sorted(k for k in tensors if k.rpartition("/")[0] not in entries)
    if strangers:
        raise ValueError(f"tensors that belong to no site: {', '.join(strangers)}")
    return entries


def _expect_values(root: nn.Module) -> None:
    if any(parameter.is_meta for parameter in root.parameters()):
        raise ValueError("expected a network with values, got one on the meta device; give it some first: to_empty")


def _expect_shapes(spec: ActivationSpec, entries: Mapping[str, Entry]) -> None:
    for key, entry in entries.items():
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in spec.build(entry.site.channels).state_dict().items()}
        got = {k: tuple(v.shape) for k, v in entry.tensors.items()}
        if got != wanted:
            raise ValueError(f"expected under {key!r} what {spec.name!r} has, {wanted}, got {got}")


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the frozen activations, by their names in `model.named_parameters()`; they belong in no
    optimizer."""
    pinned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Activation) and module.frozen
        for parameter in module.parameters()
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in pinned}
