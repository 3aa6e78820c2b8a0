"""Bring your own: any importable `nn.Module` class as a mixer, named `package.module:Class`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from typing_extensions import Self

from flexbench.errors import UserError, did_you_mean
from flexbench.models.base import MixerConfig

_RESERVED = ("self", "d_model", "d_inner")


class ExternalConfig(MixerConfig):
    """A mixer class from outside; its options are the arguments of its `__init__` by name.

    The class is called as `Class(d_model, **options)`, with `d_inner` among them where its
    `__init__` takes one and a width was given or solved. The class may have an attribute `causal`
    (else it counts as seeing the future); its instances may have `state_size`, the floats carried
    from step to step (else it is unknown).
    """

    model_config = ConfigDict(extra="allow")

    mixer: ClassVar[type[nn.Module]]

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "") -> Self:
        parameters = inspect.signature(cls.mixer.__init__).parameters
        known = [name for name in parameters if name not in _RESERVED]
        if cls.has_width:
            known.append("d_inner")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for key in values:
                if key not in known and not (key == "d_inner" and values[key] is None):
                    path = f"{where}.{key}" if where else key
                    raise UserError(f"unknown key '{path}'{did_you_mean(key, known)}")
        return super().parse(values, where=where)

    def build(self, d_model: int, *, layer: int, n_layers: int) -> nn.Module:
        options = dict(self.model_extra or {})
        if self.d_inner is not None:
            options["d_inner"] = self.d_inner
        try:
            module = self.mixer(d_model, **options)
        except Exception as error:
            given = "".join(f", {key}={value!r}" for key, value in options.items())
            call = f"{self.mixer.__name__}({d_model}{given})"
            raise UserError(f"{call} fails with {_first_line(error)}") from error
        if layer == 0:
            self._check_shape(module, d_model)
        return module

    def _check_shape(self, module: nn.Module, d_model: int) -> None:
        """Refuse a wrong output shape before anything is trained, where the meta device tells."""
        try:
            with torch.no_grad():
                y = deepcopy(module).to("meta")(torch.empty(2, 8, d_model, device="meta"))
        except Exception:
            return
        if not isinstance(y, Tensor) or y.shape != (2, 8, d_model):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UserError(
                f"{self.mixer.__name__} must map (batch, length, {d_model}) to the same shape, "
                f"but maps (2, 8, {d_model}) to {got}"
            )

    def state_size(self, d_model: int) -> int | None:
        with torch.random.fork_rng():
            module = self.build(d_model, layer=0, n_layers=1)
        size = getattr(module, "state_size", None)
        return size if isinstance(size, int) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def external(name: str) -> type[ExternalConfig]:
    """The config class of `package.module:Class`, importable from the current directory too.

    Its `version` is the digest of the file that defines the class, so that an edit retrains.

    Raises:
        UserError: the module cannot be imported, or has no such `nn.Module` class.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise UserError(f"'{name}' names no class; write package.module:Class")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"cannot import '{module_name}' ({_first_line(error)}); "
            "install it, or run from its directory"
        ) from error
    mixer = getattr(module, class_name, None)
    if mixer is None:
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(
            f"no class '{class_name}' in {module_name}{did_you_mean(class_name, classes)}"
        )
    if not (inspect.isclass(mixer) and issubclass(mixer, nn.Module)):
        raise UserError(f"'{name}' is no torch.nn.Module class")
    return _config_class(mixer, name)  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _config_class(mixer: type[nn.Module], name: str) -> type[ExternalConfig]:
    source = Path(inspect.getfile(mixer)).read_bytes()
    doc = (vars(mixer).get("__doc__") or name).strip()
    return type(
        mixer.__name__,
        (ExternalConfig,),
        {
            "__module__": __name__,
            "name": name,
            "version": hashlib.sha256(source).hexdigest()[:12],
            "summary": doc.partition("\n")[0],
            "causal": bool(getattr(mixer, "causal", False)),
            "mixer": mixer,
            "has_width": "d_inner" in inspect.signature(mixer.__init__).parameters,
        },
    )
