"""Sparta and its relatives: activations, CNNs to put them in, and banks that carry trained activations between CNNs."""

from sparta_models.activations import ACTIVATIONS, Activation, Cell, Sparta, build_activation
from sparta_models.bank import ActivationBank, frozen_parameters, pretrained_banks
from sparta_models.convert import Replacement, convert
from sparta_models.kernels import kernel_status
from sparta_models.models import MODELS, Normalize, build_model
from sparta_models.sites import ActivationSpec, Site, SiteInfo, install, named_sites, sites

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "Activation",
    "ActivationBank",
    "ActivationSpec",
    "Cell",
    "Normalize",
    "Replacement",
    "Site",
    "SiteInfo",
    "Sparta",
    "build_activation",
    "build_model",
    "convert",
    "frozen_parameters",
    "install",
    "kernel_status",
    "named_sites",
    "pretrained_banks",
    "sites",
]
