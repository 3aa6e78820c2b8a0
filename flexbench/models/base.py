"""What a model is to the harness: a typed mixer config that builds the layers of the stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import PositiveInt
from torch import nn
from typing_extensions import Self

from flexbench.config import Preset, StrictModel
from flexbench.registry import Registry


class MixerConfig(StrictModel, ABC):
    """Options of a sequence mixer. `build` makes one layer's module.

    A mixer maps x to a tensor of the same shape. Where its `forward` takes `cu_seqlens`
    (int32, (sequences + 1,)), x is (1, total, d_model), several sequences packed without padding;
    else it is called with x (batch, length, d_model), right-padded, and with `lengths` if it takes
    that. A mixer or router may have `after_step(progress, loss)`, called after each training step
    with the share of the training done and the step's mean loss; `diagnostics()`, floats by name
    for the record; `begin_calibration()` and `end_calibration()`, called around passes over
    training data before an evaluation; `settled`, False while a schedule keeps it from what its
    options ask for, so that a checkpoint of then is kept only if there is no other; and `trace`,
    which, when it is a dict, the next forward pass fills with what `flexbench inspect` draws.

    Class attributes:
        version: raised whenever the same options would compute something else.
        summary: one line for `flexbench ls models`.
        causal: whether output t depends on inputs up to t alone.
        has_width: whether `d_inner` can be solved to match parameters.
    """

    name: ClassVar[str]
    version: ClassVar[int | str] = 1
    summary: ClassVar[str]
    causal: ClassVar[bool]
    has_width: ClassVar[bool] = True

    d_inner: PositiveInt | None = None
    """Inner width; None: `expand` * d_model. The harness solves it to match parameters."""

    @abstractmethod
    def build(self, d_model: int, *, layer: int, n_layers: int) -> nn.Module:
        """The mixer of layer `layer` (from 0) of `n_layers`."""

    @classmethod
    def for_preset(cls, preset: Preset) -> Self:
        """The options a preset runs the mixer with: its own, and the preset's smallest block."""
        return cls.parse({"l0": preset.l0} if "l0" in cls.model_fields else {})

    def build_router(self, d_model: int) -> nn.Module | None:
        """What is made once from the embedded input and handed to every layer as `guide`, if
        anything: a module that is called as a mixer is."""
        return None

    @abstractmethod
    def state_size(self, d_model: int) -> int | None:
        """Floats of recurrent state carried from step to step by one layer; None: unknown."""


C = TypeVar("C", bound=Callable[..., Any])


def untraced(function: C) -> C:
    """The function, run between two graphs of torch.compile: what it finds has a size that depends
    on data, such as the number of blocks or of real steps."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


registry: Registry[type[MixerConfig]] = Registry("model", "flexbench.models", "flexbench.models")
