"""Where a model and its test images come from: a directory, the registry, or a function of the user's own."""

import hashlib
import importlib
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from pipeline.artifacts import runs_root
from pipeline.config.base import one_line
from pipeline.config.data import DataConfig, DatasetName
from pipeline.config.tracking import TrackingConfig
from pipeline.data import PreparedData, prepare
from pipeline.data.sidecar import RECORD_NAME
from pipeline.evaluation.judged_model import CODE
from pipeline.tracking.registry import Registry
from pipeline.training.model_io import load_model
from sparta_models import ActivationBank

_REFERENCE = re.compile(r"[^/:@\s]+(@[A-Za-z][\w-]*|/[1-9]\d*)")
FORMS = (
    "a directory with model.json (or a run's directory with model/ in it), NAME@ALIAS or NAME/VERSION of the registry, "
    "or module:function that returns a torch model of images in [0, 1]"
)


def open_model(
    source: str, *, network: Path | None = None, registry_root: Path | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """A model in eval mode.

    Args:
        source: a directory; a registered activation, NAME@ALIAS or NAME/VERSION; or module:function.
        network: with a registered activation, the directory of the network that was trained with it.
        registry_root: where the registry's default database lies; None: where chains keep it, `runs_root`.
        device: where the model goes.

    Raises:
        ValueError: nothing of that form is there, or what is there does not fit.
    """
    _require_device(device)
    if Path(source).is_dir():
        return load_model(source, device)
    if ":" in source:
        return _from_function(source).eval().to(device)
    if _REFERENCE.fullmatch(source):
        return _registered(source, network, registry_root or runs_root(), device)
    raise ValueError(f"expected {FORMS}; got {source!r}, which is none of these")


def open_data(source: str, directory: Path, *, seed: int) -> PreparedData:
    """Prepared data: a directory that holds it, or an .npz file or a data set's name, which are prepared first.

    Raises:
        ValueError: it is none of these, or cannot be prepared.
    """
    path = Path(source)
    if path.is_dir() and not (path / RECORD_NAME).is_file():
        raise ValueError(
            f"expected prepared data in {path}, got no {RECORD_NAME} there; a folder of images is prepared by "
            f"python -m pipeline.run data.dataset=folder data.path={path} --until prepare"
        )
    if path.is_dir():
        return PreparedData.load(path)
    if path.suffix == ".npz":
        return prepare(DataConfig.model_validate({"dataset": "npz", "path": source}), directory, seed=seed)
    named = [name for name in get_args(DatasetName) if name not in ("npz", "folder")]
    if source not in named:
        raise ValueError(
            f"expected a directory of prepared data, an .npz file, or one of {', '.join(named)}, got {source!r}"
        )
    return prepare(DataConfig.model_validate({"dataset": source}), directory, seed=seed)


def _require_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, no driver, no CUDA in this torch
        raise ValueError(f"expected a device that is here, got {device}: {one_line(error)}") from error


def _from_function(source: str) -> nn.Module:
    module_name, _, function_name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected a function {source!r} that can be imported from here, got: {error}") from error
    model = function() if callable(function) and not isinstance(function, nn.Module) else function
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected {source!r} to return a torch.nn.Module, got {type(model).__name__}")
    setattr(model, CODE, _code_sha256(model, {module_name, getattr(function, "__module__", module_name)}))
    return model


def _code_sha256(model: nn.Module, modules: set[str]) -> str:
    """Digest of the files of `modules` and of the model's classes, and of the model in print."""
    own = modules | {type(part).__module__ for part in model.modules()}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in own if name.partition(".")[0] != "torch"}
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # where an object lies in memory says nothing about it
    parts = [printed.encode(), *(Path(file).read_bytes() for file in sorted(filter(None, files)))]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _registered(source: str, network: Path | None, root: Path, device: torch.device | str) -> nn.Module:
    """What is registered is an activation; what is judged is the network that was trained with it."""
    if network is None:
        raise ValueError(
            f"expected --network DIRECTORY beside {source!r}: the registry holds an activation, and robustness is a "
            "property of the network that was trained with it"
        )
    model = load_model(network, device)
    require_activation(model, network, Registry(TrackingConfig(), root), source)
    return model


def require_activation(model: nn.Module, network: Path, registry: Registry, reference: str) -> None:
    """Raise ValueError unless `model`, of the directory `network`, holds exactly the registered activation."""
    with tempfile.TemporaryDirectory() as scratch:
        found = registry.pull(reference, Path(scratch) / "bank")
        bank = ActivationBank.load(Path(scratch) / "bank")
    own = ActivationBank.from_model(model)
    if own != bank:
        raise ValueError(
            f"expected a network trained with {found.reference} in {network}, got one with another activation "
            f"({own.digest[:12]}, not {bank.digest[:12]}): train one with it by the transfer stage"
        )
