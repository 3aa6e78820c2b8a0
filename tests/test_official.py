"""The official CUDA kernels: what they are asked for, how, and what they are never asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kernels import bounds, scan_inputs
from torch import Tensor

from flexbench.kernels import causal_conv1d, selective_scan
from flexbench.kernels.conv import official as official_conv
from flexbench.kernels.scan import official as official_scan


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official_scan, "INSTALLED", True)
    monkeypatch.setattr(official_conv, "INSTALLED", True)


def test_named_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(official_scan, "INSTALLED", False)
    monkeypatch.setattr(official_conv, "INSTALLED", False)
    with pytest.raises(ValueError, match="mamba-ssm is not installed"):
        selective_scan(**scan_arguments(), backend="mamba_ssm")
    with pytest.raises(ValueError, match="causal-conv1d is not installed"):
        causal_conv1d(torch.zeros(1, 8, 16), torch.zeros(16, 4), backend="causal_conv1d")


def scan_arguments(**changes: Any) -> dict[str, Any]:
    made = scan_inputs(2, 8, 4, 3)
    del made["initial_state"]
    return {name: tensor.float() for name, tensor in made.items()} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": bounds([8])}, "does not pack"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "state of zero"),
        ({"repeats": torch.ones(2, 8, dtype=torch.int64)}, "no repeats"),
        ({"reverse": True}, "left to right"),
        ({"return_last_state": True, "D": torch.ones(4, requires_grad=True)}, "no gradient flows"),
        ({"z": torch.zeros(2, 8, 4, dtype=torch.bfloat16)}, "share a type"),
        ({"D": torch.ones(4, dtype=torch.bfloat16)}, "must be float32"),
        ({"A": -torch.ones(4, 257), "B": torch.ones(2, 8, 257), "C": torch.ones(2, 8, 257)}, "256"),
        ({}, "not all on a GPU"),
    ],
)
def test_scan_is_not_asked_for_what_it_cannot_do(installed, change, message):
    given = scan_arguments(**change)
    if "cu_seqlens" in change:
        given = {
            k: v[:1] if isinstance(v, Tensor) and v.dim() == 3 else v for k, v in given.items()
        }
    with pytest.raises(ValueError, match=f"'mamba_ssm' cannot serve this call: .*{message}"):
        selective_scan(**given, delta_softplus=True, backend="mamba_ssm")


def test_scan_arguments_and_layout(installed, monkeypatch):
    """A stand-in with the official layout, steps last, that computes by the reference."""
    asked = {}

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, **options):
        rows = (u, delta, B, C, z)
        asked.update(options, shapes=[t.shape for t in rows])
        assert all(t.is_contiguous() for t in rows)
        u, delta, B, C, z = (t.transpose(1, 2) for t in rows)
        made = selective_scan(
            *(u, delta, A, B, C, D, z), delta_bias=delta_bias, **options, backend="reference"
        )
        return (made[0].transpose(1, 2), made[1])

    name = "mamba_ssm.ops.selective_scan_interface"
    stand_in = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(official_scan, "on_gpu", lambda tensors: True)
    given = scan_arguments()
    options = {"delta_softplus": True, "return_last_state": True}
    got = selective_scan(**given, **options, backend="mamba_ssm")
    wanted = selective_scan(**given, **options, backend="reference")
    torch.testing.assert_close(got, wanted)
    wide, narrow = (2, 4, 8), (2, 3, 8)
    assert asked == options | {"shapes": [wide, wide, narrow, narrow, wide]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": bounds([8])}, "pack"),
        ({"reverse": True}, "left to right"),
        ({"bias": torch.zeros(16, dtype=torch.bfloat16)}, "share a type"),
        ({"x": torch.zeros(1, 8, 16).double()}, "32 and 16 bits"),
        ({"x": torch.zeros(1, 0, 16)}, "at least"),
        ({"x": torch.zeros(1, 16, 8).transpose(1, 2)}, "side by side"),
        ({"x": torch.zeros(1, 8, 20)[..., :16]}, "multiples of 8"),
        ({}, "not all on a GPU"),
    ],
)
def test_conv_is_not_asked_for_what_it_cannot_do(installed, change, message):
    given = {"x": torch.zeros(1, 8, 16), "weight": torch.zeros(16, 4), "bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=f"'causal_conv1d' cannot serve this call: .*{message}"):
        causal_conv1d(**(given | change), backend="causal_conv1d")


def test_conv_arguments_and_layout(installed, monkeypatch):
    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert x.shape == (2, 16, 5)
        assert x.stride(1) == 1
        assert activation == "silu"
        y = F.conv1d(x, weight[:, None], bias, padding=3, groups=16)
        return F.silu(y[..., :5])

    stand_in = SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", stand_in)
    monkeypatch.setattr(official_conv, "on_gpu", lambda tensors: True)
    given = {"x": torch.randn(2, 5, 16), "weight": torch.randn(16, 4), "bias": torch.randn(16)}
    got = causal_conv1d(**given, activation="silu", backend="causal_conv1d")
    torch.testing.assert_close(got, causal_conv1d(**given, activation="silu", backend="reference"))
