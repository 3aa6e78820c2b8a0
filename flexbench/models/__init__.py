"""Sequence models: a stack shared by all, and the mixers that are compared."""

from flexbench.config import StackConfig
from flexbench.interface import ProblemSpec
from flexbench.models.base import MixerConfig, registry
from flexbench.models.bimamba import BiMamba
from flexbench.models.external import external
from flexbench.models.hzip import HZipMamba
from flexbench.models.mamba import Mamba
from flexbench.models.matching import backbone_parameters, is_matched, match_width
from flexbench.models.stack import SequenceModel

__all__ = [
    "BiMamba",
    "HZipMamba",
    "Mamba",
    "MixerConfig",
    "SequenceModel",
    "backbone_parameters",
    "build",
    "is_matched",
    "match_width",
    "registry",
    "resolve",
]


def resolve(name: str) -> type[MixerConfig]:
    """The config class of a registered model, or of `package.module:Class`.

    Raises:
        UserError: no such model, module or class.
    """
    return external(name) if ":" in name else registry.get(name)


def build(spec: ProblemSpec, stack: StackConfig, mixer: MixerConfig) -> SequenceModel:
    """The model for a task, on the default device, initialised from torch's global generator.

    Raises:
        UserError: a mixer of one's own cannot be built, or returns a wrong shape.
    """
    return SequenceModel(spec, stack, mixer)
