"""Speed of the kernels and of a training step, each as a ratio to a named peer in the same run.

Both sides of a measurement get the same inputs and threads and take turns, so that a busy machine
slows both; the ratio is that of the medians. The process is an ordinary one: trials also keep freed
memory (`harness/allocator.py`), from which both sides would gain.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from flexbench.config import StackConfig
from flexbench.errors import UserError, did_you_mean
from flexbench.harness.environment import environment, machine
from flexbench.harness.sweep import choose_device
from flexbench.kernels import causal_conv1d, selective_scan
from flexbench.models import backbone_parameters, match_width, resolve
from flexbench.models.flexblock import BlockType, GuideMap, Route, Router
from flexbench.models.stack import Backbone
from flexbench.records import write_json

SECONDS = 10.0
"""What a measurement may take; at least `FEWEST` repetitions are made."""
FEWEST, MOST, TURN = 9, 60, 3

Step = Callable[[], object]


class PeerMissing(Exception):
    """A peer is not installed; the message is the command that installs it."""


@dataclass(frozen=True)
class Measurement:
    """One comparison. Seconds are medians; `ratio` is how many times as fast as the peer."""

    name: str
    shape: str
    peer: str
    seconds: float
    peer_seconds: float
    repetitions: int
    ratio: float


def scan_inputs() -> dict[str, Tensor]:
    """Inputs as Mamba makes them at initialisation: A = -(1 .. state), Δ below 0.1."""
    batch, length, dim, state = 4, 1024, 128, 16
    inputs = {
        "u": torch.randn(batch, length, dim),
        "delta": torch.rand(batch, length, dim) * 0.1,
        "A": -torch.arange(1.0, state + 1).repeat(dim, 1),
        "B": torch.randn(batch, length, state),
        "C": torch.randn(batch, length, state),
        "D": torch.ones(dim),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def forward_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Step:
    leaves = list(inputs.values())
    gradient = torch.randn_like(function(**inputs))
    return lambda: torch.autograd.grad(function(**inputs), leaves, gradient)


def scan_against_mambapy() -> tuple[str, str, Step, Step]:
    """selective_scan, forward and backward, against mambapy's parallel scan."""
    block = _import("mambapy.mamba", "pip install mambapy").MambaBlock
    inputs = scan_inputs()

    def peer(u: Tensor, delta: Tensor, **rest: Tensor) -> Tensor:
        return block.selective_scan(None, u, delta, **rest)

    ours, theirs = (forward_backward(f, inputs) for f in (selective_scan, peer))  # type: ignore[arg-type]
    return "batch 4, length 1024, dim 128, state 16", "mambapy, parallel scan", ours, theirs


def scan_against_reference() -> tuple[str, str, Step, Step]:
    """selective_scan, forward alone, against mamba_ssm's selective_scan_ref."""
    with _python_part_of_mamba_ssm():
        interface = _import("mamba_ssm.ops.selective_scan_interface", "scripts/install-oracles")
    inputs = {name: tensor.detach() for name, tensor in scan_inputs().items()}
    first = {n: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for n, t in inputs.items()}
    return (
        "batch 4, length 1024, dim 128, state 16",
        "mamba_ssm, selective_scan_ref",
        lambda: selective_scan(**inputs),  # type: ignore[arg-type]
        lambda: interface.selective_scan_ref(**first),
    )


def conv_against_torch() -> tuple[str, str, Step, Step]:
    """causal_conv1d with SiLU, forward and backward, against torch's depthwise Conv1d."""
    batch, length, dim, width = 8, 1024, 128, 4
    x, weight, bias = torch.randn(batch, length, dim), torch.randn(dim, width), torch.randn(dim)
    ours = {"x": x, "weight": weight, "bias": bias}
    theirs = {"x": x.transpose(1, 2).contiguous(), "weight": weight[:, None].clone(), "bias": bias}

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu")

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(x, weight, bias, padding=width - 1, groups=dim)
        return F.silu(y[..., :length])

    for inputs in (ours, theirs):
        inputs.update({name: t.clone().requires_grad_() for name, t in inputs.items()})
    shape = f"batch {batch}, length {length}, dim {dim}"
    peer = "torch, depthwise Conv1d + SiLU"
    return shape, peer, forward_backward(fused, ours), forward_backward(plain, theirs)


def training_step(model: nn.Module, x: Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def stack_against_mambapy() -> tuple[str, str, Step, Step]:
    """A training step of the mamba stack against mambapy's model of the same shape."""
    peer = _import("mambapy.mamba", "pip install mambapy")
    d_model, n_layers = 64, 4
    stack = StackConfig(d_model=d_model, n_layers=n_layers)
    ours = Backbone(stack, resolve("mamba").parse({}))
    theirs = peer.Mamba(peer.MambaConfig(d_model=d_model, n_layers=n_layers))
    x = torch.randn(8, 1024, d_model)
    shape = f"{n_layers} layers, d_model {d_model}, batch 8, length 1024"
    return shape, "mambapy, Mamba", training_step(ours, x), training_step(theirs, x)


def hzip_against_bimamba(model: str, d_model: int) -> tuple[str, str, Step, Step]:
    """A training step of HZip-Mamba against bimamba's sum of two readings, at equal parameters."""
    stack = StackConfig(d_model=d_model, n_layers=2)
    target = backbone_parameters(resolve("mamba").parse({}), stack)
    mixers = [match_width(resolve(name).parse({}), stack, target) for name in (model, "bimamba")]
    x = torch.randn(8, 1024, d_model)
    ours, theirs = (training_step(Backbone(stack, mixer), x) for mixer in mixers)
    widths = " and ".join(str(mixer.d_inner) for mixer in mixers)
    shape = f"2 layers, d_model {d_model}, d_inner {widths}, batch 8, length 1024"
    return shape, "bimamba, fusion add", ours, theirs


class Follow(nn.Module):
    """In a router's place: the same route, whatever comes."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Route:
        return self.route


def flexblock_against_mamba(
    batch: int, length: int, computed: float, routed: bool = False
) -> tuple[str, str, Step, Step]:
    """A training step of flexblock against mamba's at the same inner width.

    By a map fixed by hand: half of the blocks reversed, every leaf computed, or one in
    1 / `computed` and nothing of the others. Or, `routed`, by maps that the router scores, merges
    and packs anew for every batch, at the same ratio and with its own training.
    """
    d_model, n_layers, l0 = 128, 4, 64
    stack = StackConfig(d_model=d_model, n_layers=n_layers)
    options = {"l0": l0, "target_ratio": computed, "reduced_share": 0.0, "rev": "off"}
    ours = Backbone(stack, resolve("flexblock").parse(options)).train()
    theirs = Backbone(stack, resolve("mamba").parse({})).train()
    assert isinstance(ours.router, Router)
    if routed:
        ours.router.after_step(1.0, 0.0)
    else:
        guide = GuideMap.uniform(batch, length, l0)
        leaf = torch.arange(len(guide))
        kind = torch.where(leaf % round(1 / computed) == 0, BlockType.FULL, BlockType.IDENTITY)
        guide = replace(guide, type=kind, flags=leaf // round(1 / computed) % 2)
        ours.router = Follow(Route.by_hand(guide, row_length=length))
    x = torch.randn(batch, length, d_model)
    shape = f"{n_layers} layers, d_model {d_model}, batch {batch}, length {length}"
    return shape, "mamba", training_step(ours, x), training_step(theirs, x)


MEASUREMENTS = {
    "scan": ("selective_scan, forward + backward", scan_against_mambapy),
    "scan-forward": ("selective_scan, forward", scan_against_reference),
    "conv": ("causal_conv1d + SiLU, forward + backward", conv_against_torch),
    "step": ("training step of mamba", stack_against_mambapy),
    "flexblock": (
        "flexblock, half of the blocks reversed",
        lambda: flexblock_against_mamba(4, 4096, 1.0),
    ),
    "flexblock-third": (
        "flexblock, a third of the tokens",
        lambda: flexblock_against_mamba(4, 4096, 1 / 3),
    ),
    "flexblock-routed": (
        "flexblock, a third by its router",
        lambda: flexblock_against_mamba(4, 4096, 1 / 3, routed=True),
    ),
    "flexblock-16k": (
        "flexblock, half of the blocks reversed",
        lambda: flexblock_against_mamba(1, 16384, 1.0),
    ),
    "flexblock-third-16k": (
        "flexblock, a third of the tokens",
        lambda: flexblock_against_mamba(1, 16384, 1 / 3),
    ),
    "flexblock-routed-16k": (
        "flexblock, a third by its router",
        lambda: flexblock_against_mamba(1, 16384, 1 / 3, routed=True),
    ),
    "hzip-lean-64": ("hzip-lean", lambda: hzip_against_bimamba("hzip-lean", 64)),
    "hzip-lean-128": ("hzip-lean", lambda: hzip_against_bimamba("hzip-lean", 128)),
    "hzip-64": ("hzip", lambda: hzip_against_bimamba("hzip", 64)),
    "hzip-128": ("hzip", lambda: hzip_against_bimamba("hzip", 128)),
}


def main(device: str, only: list[str], output: Path | None) -> None:
    """Run the measurements (all, or those named), print their table, write them as JSON if asked.

    Raises:
        UserError: an unknown measurement or device.
    """
    if choose_device(device) == "cuda":
        from flexbench import bench_gpu

        bench_gpu.main("cuda", only, output)
        return
    for name in only:
        if name not in MEASUREMENTS:
            raise UserError(f"unknown measurement '{name}'{did_you_mean(name, MEASUREMENTS)}")
    torch.manual_seed(0)
    found: list[Measurement] = []
    missing: list[str] = []
    chosen = {k: v for k, v in MEASUREMENTS.items() if not only or k in only}
    with tqdm(chosen.items(), unit="measurement", file=sys.stderr, leave=False) as bar:
        for key, (name, prepare) in bar:
            bar.set_description(key)
            try:
                shape, peer, ours, theirs = prepare()
            except PeerMissing as error:
                missing.append(f"{key}: its peer is not installed; {error}")
                continue
            mine, other, repetitions = _take_turns(ours, theirs)
            ratio = other / mine
            found.append(Measurement(name, shape, peer, mine, other, repetitions, ratio))
    where = machine("cpu")
    rows = [
        (m.name, m.shape, f"{m.seconds * 1e3:.2f}", m.peer, f"{m.peer_seconds * 1e3:.1f}",
         f"{m.ratio:.3g}", m.repetitions)
        for m in found
    ]  # fmt: skip
    headers = ("what", "shape", "ms", "peer", "peer ms", "times as fast", "repetitions")
    print(f"{where}; {torch.get_num_threads()} threads; medians of alternating repetitions")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    for line in missing:
        print(line)
    if output is not None:
        facts: dict[str, Any] = {
            "machine": where,
            "threads": torch.get_num_threads(),
            "environment": environment("cpu"),
            "measurements": [asdict(m) for m in found],
        }
        write_json(output, facts)


def _take_turns(ours: Step, theirs: Step) -> tuple[float, float, int]:
    """Median seconds of both and the number of repetitions of each.

    The sides take turns; a turn begins with a repetition that is not timed, which finds the caches
    as the other side left them.
    """
    mine: list[float] = []
    other: list[float] = []
    began = time.perf_counter()
    while len(mine) < FEWEST or (len(mine) < MOST and time.perf_counter() - began < SECONDS):
        for step, seconds in ((ours, mine), (theirs, other)):
            step()
            for _ in range(TURN):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
    return statistics.median(mine), statistics.median(other), len(mine)


def _import(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(f"install it with: {install}") from error


@contextmanager
def _python_part_of_mamba_ssm() -> Iterator[None]:
    """Lets `mamba_ssm.ops` be imported without CUDA.

    The package itself imports every model it has, and an extension that only a CUDA build makes:
    empty modules stand in for the two.
    """
    found = find_spec("mamba_ssm")
    before = dict(sys.modules)
    if found is not None and found.submodule_search_locations:
        package = ModuleType("mamba_ssm")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["mamba_ssm"] = package
        sys.modules.setdefault("selective_scan_cuda", ModuleType("selective_scan_cuda"))
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda"):
                del sys.modules[name]
