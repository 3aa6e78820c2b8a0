"""Outside oracles: mamba_ssm's reference scan and its module, with shared weights, odd lengths."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from flexbench.kernels import selective_scan
from flexbench.models.mamba import Mamba

pytestmark = pytest.mark.filterwarnings("ignore:.*custom_(f|b)wd:FutureWarning")


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Imports a module of mamba_ssm's Python part.

    The package itself imports every model it has, and an extension that only a CUDA build makes:
    empty modules stand in for the two.
    """
    found = find_spec("mamba_ssm")
    if found is None:
        pytest.skip("mamba-ssm is not installed: run scripts/install-oracles")
    package = ModuleType("mamba_ssm")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))

    def load(name):
        try:
            return importlib.import_module(f"mamba_ssm.{name}")
        except ImportError as error:
            pytest.skip(f"this mamba-ssm needs more than its Python part ({error})")

    yield load
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        del sys.modules[name]


def assert_same(ours, theirs, names):
    for name, a, b in zip(names, ours, theirs, strict=True):
        a, b = a.detach(), b.detach()
        try:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("length", "dim", "state"), [(1, 3, 1), (37, 13, 16), (129, 17, 5)])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "gated"])
def test_selective_scan(mamba_ssm, backend, length, dim, state, plain):
    reference = mamba_ssm("ops.selective_scan_interface").selective_scan_ref
    torch.manual_seed(length)
    batch = 2
    inputs = {
        "u": torch.randn(batch, length, dim),
        "delta": torch.rand(batch, length, dim) if plain else torch.randn(batch, length, dim),
        "A": -torch.rand(dim, state) * 4,
        "B": torch.randn(batch, length, state),
        "C": torch.randn(batch, length, state),
    }
    if not plain:
        inputs["D"] = torch.randn(dim)
        inputs["z"] = torch.randn(batch, length, dim)
        inputs["delta_bias"] = torch.randn(dim)
    for tensor in inputs.values():
        tensor.requires_grad_()
    outer = {key: t.mT if t.dim() == 3 else t for key, t in inputs.items()}
    theirs, their_state = reference(**outer, delta_softplus=not plain, return_last_state=True)
    ours, our_state = selective_scan(
        **inputs, delta_softplus=not plain, return_last_state=True, backend=backend
    )
    assert_same((ours, our_state), (theirs.mT, their_state), ("y", "last state"))

    dy, dstate = torch.randn_like(ours), torch.randn_like(our_state)
    gradients = [
        torch.autograd.grad((y, last), list(inputs.values()), (d, dstate))
        for y, last, d in ((ours, our_state, dy), (theirs, their_state, dy.mT))
    ]
    assert_same(*gradients, inputs)


def load_mamba(mamba_ssm, monkeypatch):
    module = mamba_ssm("modules.mamba_simple")
    interface = mamba_ssm("ops.selective_scan_interface")
    monkeypatch.setattr(module, "selective_scan_fn", interface.selective_scan_ref)
    monkeypatch.setattr(module, "causal_conv1d_fn", None)
    return module.Mamba


OPTIONS = [
    {},
    {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4},
    {"conv_bias": False, "bias": True, "d_conv": 2, "dt_init": "constant", "dt_scale": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "sizes", "biases"])
@pytest.mark.parametrize("length", [1, 3, 61])
def test_mamba_module(mamba_ssm, monkeypatch, options, length):
    theirs = load_mamba(mamba_ssm, monkeypatch)(18, **options)
    ours = Mamba(18, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, length, 18)
    dy = torch.randn(2, length, 18)
    outputs, gradients = [], []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        outputs.append(module(leaf))
        gradients.append(torch.autograd.grad(outputs[-1], [leaf, *module.parameters()], dy))
    assert_same(outputs[:1], outputs[1:], ["y"])
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    assert_same(*gradients, ["x", *names])


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "sizes", "biases"])
def test_mamba_initialisation(mamba_ssm, monkeypatch, options):
    theirs, ours = {}, {}
    for made, state in ((load_mamba(mamba_ssm, monkeypatch), theirs), (Mamba, ours)):
        torch.manual_seed(3)
        state |= made(18, **options).state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_state_dict_goes_back(mamba_ssm, monkeypatch):
    theirs = load_mamba(mamba_ssm, monkeypatch)(18)
    ours = Mamba(18)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 7, 18)
    torch.testing.assert_close(theirs(x), ours(x))
