"""Speed on a GPU: our kernels, the official ones, the references and a computed floor, in one run.

Inputs are as under autocast: bfloat16 readings, float32 parameters. Contestants take turns and are
timed by the device's own clock; times are medians. The floor of a pass is the larger of two times:
its bytes (each input read once, each output written once) at the bandwidth that a copy reaches in
the same run, and its exponentials at the rate that a kernel of nothing else reaches.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from flexbench.bench import Follow, Step, forward_backward
from flexbench.config import StackConfig
from flexbench.errors import UserError, did_you_mean
from flexbench.harness.environment import environment, machine
from flexbench.kernels import causal_conv1d, hzip_fuse, selective_scan
from flexbench.kernels.conv import official as official_conv
from flexbench.kernels.gpu import INSTALLED as TRITON
from flexbench.kernels.scan import official as official_scan
from flexbench.models import MixerConfig, backbone_parameters, match_width, resolve
from flexbench.models.flexblock import BlockType, GuideMap, Route, Router
from flexbench.models.stack import Backbone
from flexbench.records import write_atomic, write_json

SECONDS = 0.4
"""What the repetitions of a contestant may take; at least `FEWEST` are made."""
FEWEST, MOST, TURN, WARM_UP = 5, 50, 3, 3
TOKENS, DIM, STATE, D_MODEL, N_LAYERS = 16384, 2048, 16, 1024, 4
LENGTHS = tuple(1024 * 2**i for i in range(7))
STEP_LENGTHS = (2048, 16384)
LONGEST_LOOP = 1024
"""The reference of the scan is a loop over steps, and keeps the state at each."""
CLAIMED = (2048, 16384)
"""Lengths of which something is claimed: they are measured first."""
ALIGNED = 32
"""What widths are rounded to: at others products of bfloat16 matrices are slow, whoever asks."""
HALF = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Pass:
    """What one pass through memory must do at least."""

    bytes: float
    exponentials: float


@dataclass(frozen=True)
class Case:
    """One comparison: what makes each contestant's step, "ours" first.

    `passes` are what the floor is made of; `ahead` is as of `milliseconds`.
    """

    name: str
    shape: str
    contestants: Mapping[str, Callable[[], Step]]
    passes: tuple[Pass, ...] = ()
    ahead: bool = True


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each contestant, medians, and of the floor where one is computed."""

    name: str
    shape: str
    milliseconds: dict[str, float]
    floor: float | None
    repetitions: dict[str, int]


@dataclass(frozen=True)
class Rates:
    """What this device reaches: bytes and exponentials a second."""

    bytes: float
    exponentials: float | None

    def floor(self, passes: tuple[Pass, ...]) -> float | None:
        """Milliseconds that the passes take at least; None without passes."""
        if not passes:
            return None
        seconds = 0.0
        for each in passes:
            arithmetic = each.exponentials / self.exponentials if self.exponentials else 0.0
            seconds += max(each.bytes / self.bytes, arithmetic)
        return seconds * 1e3


def shapes(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(batch, length) of about `TOKENS` tokens, at least one sequence."""
    for length in lengths:
        yield max(1, TOKENS // length), length


def scan_case(batch: int, length: int, backward: bool, device: str) -> Case:
    """selective_scan as Mamba calls it: softplus, D, z; A = -(1 .. state), Δ near 0.05."""
    kind = torch.bfloat16
    rows = partial(torch.randn, dtype=kind, device=device)
    inputs = {
        "u": rows(batch, length, DIM),
        "delta": rows(batch, length, DIM),
        "A": -torch.arange(1.0, STATE + 1, device=device).repeat(DIM, 1),
        "B": rows(batch, length, STATE),
        "C": rows(batch, length, STATE),
        "D": torch.ones(DIM, device=device),
        "z": rows(batch, length, DIM),
        "delta_bias": torch.full((DIM,), -3.0, device=device),
    }
    ours = partial(selective_scan, delta_softplus=True)
    contestants: dict[str, Callable[[], Step]] = {"ours": partial(run, ours, inputs, backward)}
    if official_scan.INSTALLED:

        def official() -> Step:
            interface = import_module("mamba_ssm.ops.selective_scan_interface")
            theirs = {
                k: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for k, t in inputs.items()
            }
            peer = partial(interface.selective_scan_fn, delta_softplus=True)
            return run(peer, theirs, backward)

        contestants["official"] = official
    if length <= LONGEST_LOOP:
        reference = partial(ours, backend="reference")
        contestants["reference"] = partial(run, reference, inputs, backward)
    elements = batch * length * DIM
    wide, narrow = elements * HALF, batch * length * STATE * HALF
    passes = [Pass(4 * wide + 2 * narrow, elements * STATE)]
    if backward:
        passes.append(Pass(7 * wide + 4 * narrow, elements * STATE))
    name = f"selective_scan, forward{' + backward' if backward else ''}"
    return Case(name, described(batch, length), contestants, tuple(passes))


def conv_case(batch: int, length: int, device: str) -> Case:
    """causal_conv1d of width 4 with bias and SiLU, forward and backward."""
    x = torch.randn(batch, length, DIM, dtype=torch.bfloat16, device=device)
    weight, bias = torch.randn(DIM, 4, device=device), torch.randn(DIM, device=device)
    inputs = {"x": x, "weight": weight, "bias": bias}
    ours = partial(causal_conv1d, activation="silu")
    contestants: dict[str, Callable[[], Step]] = {"ours": partial(run, ours, inputs, True)}
    if official_conv.INSTALLED:

        def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            package = import_module("causal_conv1d")
            y: Tensor = package.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")
            return y.transpose(1, 2)

        contestants["official"] = partial(run, peer, inputs, True)
    contestants["reference"] = partial(run, partial(ours, backend="reference"), inputs, True)
    wide = x.numel() * HALF
    passes = (Pass(2 * wide, x.numel()), Pass(3 * wide, x.numel()))
    name = "causal_conv1d + SiLU, forward + backward"
    return Case(name, described(batch, length), contestants, passes)


def fuse_case(batch: int, length: int, device: str) -> Case:
    """hzip_fuse as hzip-lean calls it, forward and backward."""
    rank = 8
    rows = [torch.randn(batch, length, DIM, dtype=torch.bfloat16, device=device) for _ in range(3)]
    inputs = dict(zip(("y_f", "y_b", "z"), rows, strict=True)) | {
        "taps": torch.randn(DIM, 2, 3, device=device),
        "taps_bias": torch.zeros(DIM, device=device),
        "down": torch.randn(2 * rank, 3, DIM, device=device) / DIM**0.5,
        "hidden_bias": torch.zeros(2 * rank, device=device),
        "up": torch.randn(2, DIM, rank, device=device),
        "bias": torch.zeros(2, DIM, device=device),
    }
    ours = partial(hzip_fuse, window=1)
    contestants: dict[str, Callable[[], Step]] = {"ours": partial(run, ours, inputs, True)}
    if batch * length <= TOKENS:
        contestants["reference"] = partial(run, partial(ours, backend="reference"), inputs, True)
    elements = batch * length * DIM
    wide = elements * HALF
    # Gates need every channel of a step: the readings are read twice in either direction.
    passes = (
        *(Pass(2 * wide, elements), Pass(4 * wide, 3 * elements)),
        *(Pass(4 * wide, 3 * elements), Pass(7 * wide, 4 * elements)),
    )
    return Case("hzip_fuse, forward + backward", described(batch, length), contestants, passes)


def step_case(batch: int, length: int, device: str) -> Case:
    """A whole training step of each family, "ours" being mamba's.

    bimamba and hzip-lean at mamba's number of parameters, as near as widths of whole `ALIGNED`
    come. flexblock at mamba's width, a third of its tokens computed: by a map from outside, every
    third block and every other one of them in reverse, or by one that its router makes of every
    batch, with the router's own training.
    """
    stack = StackConfig(d_model=D_MODEL, n_layers=N_LAYERS)
    mamba = resolve("mamba").parse({})
    target = backbone_parameters(mamba, stack)
    mixers = {"ours": mamba} | {
        name: rounded(match_width(resolve(name).parse({}), stack, target))
        for name in ("bimamba", "hzip-lean")
    }
    l0 = 64
    options = {"l0": l0, "target_ratio": 1 / 3, "reduced_share": 0.0, "rev": "off"}
    models = {name: Backbone(stack, mixer) for name, mixer in mixers.items()}
    third, routed = (Backbone(stack, resolve("flexblock").parse(options)) for _ in range(2))
    models |= {"flexblock, a third": third, "flexblock, a third by its router": routed}
    assert isinstance(routed.router, Router)
    routed.router.after_step(1.0, 0.0)
    guide = GuideMap.uniform(batch, torch.tensor(length, device=device), l0)
    leaf = torch.arange(len(guide), device=device)
    kind = torch.where(leaf % 3 == 0, BlockType.FULL, BlockType.IDENTITY)
    guide = replace(guide, type=kind, flags=leaf // 3 % 2)
    third.router = Follow(Route.by_hand(guide, row_length=length))
    x = torch.randn(batch, length, D_MODEL, device=device)
    contestants = {
        name: partial(training_step, model.to(device).train(), x, device)
        for name, model in models.items()
    }
    shape = f"batch {batch}, length {length}, d_model {D_MODEL}, {N_LAYERS} layers"
    return Case("training step of mamba", shape, contestants, ahead=False)


def rounded(mixer: MixerConfig) -> MixerConfig:
    """The mixer at the nearest width that is aligned."""
    width = max(1, round((mixer.d_inner or 0) / ALIGNED)) * ALIGNED
    return mixer.override({"d_inner": width}) if mixer.d_inner is not None else mixer


def training_step(model: nn.Module, x: Tensor, device: str) -> Step:
    """bfloat16 autocast on a GPU, as the harness trains."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        precision: AbstractContextManager[Any] = nullcontext()
        if device == "cuda":
            precision = torch.autocast("cuda", torch.bfloat16)
        with precision:
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()

    return step


def run(function: Callable[..., Any], inputs: dict[str, Tensor], backward: bool) -> Step:
    if not backward:
        return lambda: function(**inputs)
    return forward_backward(
        function, {name: t.detach().requires_grad_() for name, t in inputs.items()}
    )


def described(batch: int, length: int) -> str:
    return f"batch {batch}, length {length}, dim {DIM}"


MEASUREMENTS: dict[str, tuple[tuple[int, ...], Callable[[int, int, str], Case]]] = {
    "scan-forward": (LENGTHS, lambda batch, length, d: scan_case(batch, length, False, d)),
    "scan": (LENGTHS, lambda batch, length, d: scan_case(batch, length, True, d)),
    "conv": (LENGTHS, conv_case),
    "fuse": (LENGTHS, fuse_case),
    "step": (STEP_LENGTHS, step_case),
}


def milliseconds(step: Step, device: str, ahead: bool = True) -> float:
    """One repetition, by the device's clock.

    Args:
        ahead: keep the device busy until all is enqueued, so that a kernel is not charged for
            Python. Otherwise it waits for Python wherever training would.
    """
    if device != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(4_000_000)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def warm_up(case: Case, device: str) -> tuple[dict[str, Step], list[str]]:
    """The contestants, ready to be timed, and what became of others. Ours must not fail."""
    ready: dict[str, Step] = {}
    failed = []
    for name, make in case.contestants.items():
        try:
            step = make()
            for _ in range(WARM_UP):
                milliseconds(step, device)
            ready[name] = step
        except Exception as error:
            if name == "ours":
                raise
            failed.append(f"{case.name}, {case.shape}, {name}: {said(error)}")
    return ready, failed


def said(error: Exception) -> str:
    """A line of it; all of it goes to the log."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def take_turns(
    contestants: dict[str, Step], device: str, ahead: bool = True
) -> dict[str, list[float]]:
    """Milliseconds of the repetitions of each; a turn begins with one that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    spent = dict.fromkeys(contestants, 0.0)
    while waiting := [
        name
        for name, times in taken.items()
        if len(times) < FEWEST or (len(times) < MOST and spent[name] < SECONDS)
    ]:
        for name in waiting:
            began = time.perf_counter()
            step = contestants[name]
            milliseconds(step, device, ahead)
            taken[name] += [milliseconds(step, device, ahead) for _ in range(TURN)]
            spent[name] += time.perf_counter() - began
    return taken


def rates(device: str) -> Rates:
    """Measured now: a copy of a gigabyte, and exponentials alone."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(take_turns({"copy": lambda: target.copy_(source)}, device)["copy"])
    exponentials = None
    if device == "cuda" and TRITON:
        kernels = import_module("flexbench.kernels.device")
        step, count = kernels.only_exponentials(device)
        exponentials = count / statistics.median(take_turns({"": step}, device)[""]) * 1e3
    return Rates(2 * size / copy * 1e3, exponentials)


def main(device: str, only: list[str], output: Path | None) -> None:
    """Measure (all, or what is named), print the table; write it as JSON and, beside, Markdown.

    Raises:
        UserError: an unknown measurement.
    """
    for name in only:
        if name not in MEASUREMENTS:
            raise UserError(f"unknown measurement '{name}'{did_you_mean(name, MEASUREMENTS)}")
    torch.manual_seed(0)
    reached, where = rates(device), environment(device)
    found: dict[int, Timing] = {}
    failed: list[str] = []
    plan = [
        (key, prepare, *shape)
        for key, (lengths, prepare) in MEASUREMENTS.items()
        if not only or key in only
        for shape in shapes(lengths)
    ]

    def write() -> str:
        timings = [found[i] for i in sorted(found)]
        text = report(timings, reached, device, failed)
        if output is not None:
            facts: dict[str, Any] = {
                "machine": machine(device),
                "environment": where,
                "rates": asdict(reached),
                "measurements": [asdict(timing) for timing in timings],
                "failed": failed,
            }
            write_json(output, facts)
            write_atomic(output.with_suffix(".md"), f"{text}\n".encode())
        return text

    # Claims first, and written at once: a run that is cut off leaves what it has.
    order = sorted(range(len(plan)), key=lambda i: not claimed(plan[i][0], plan[i][3]))
    with tqdm(order, unit="measurement", file=sys.stderr, leave=False) as bar:
        for i in bar:
            key, prepare, batch, length = plan[i]
            bar.set_description(key)
            try:
                found[i], lost = measure(prepare, batch, length, device, reached)
                failed += lost
            except Exception as error:  # what fails must not cost the rest
                failed.append(f"{key}, batch {batch}, length {length}: {said(error)}")
            write()
    print(write())


def measure(
    prepare: Callable[[int, int, str], Case], batch: int, length: int, device: str, reached: Rates
) -> tuple[Timing, list[str]]:
    """One comparison, and what became of contestants that failed."""
    case = prepare(batch, length, device)
    contestants, lost = warm_up(case, device)
    taken = take_turns(contestants, device, case.ahead)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    counts = {name: len(times) for name, times in taken.items()}
    return Timing(case.name, case.shape, medians, reached.floor(case.passes), counts), lost


def claimed(key: str, length: int) -> bool:
    return key in ("scan", "step") and length in CLAIMED


def report(found: list[Timing], reached: Rates, device: str, failed: list[str]) -> str:
    """The tables: kernels against the official ones and the floor, and training steps."""
    kernels: list[tuple[str, ...]] = []
    steps: list[tuple[str, ...]] = []
    for timing in found:
        ours = timing.milliseconds["ours"]
        if timing.floor is None:
            steps += [
                (name if name != "ours" else "mamba", timing.shape, f"{ms:.3g}", f"{ms / ours:.2f}")
                for name, ms in timing.milliseconds.items()
            ]
            continue
        official, reference = (timing.milliseconds.get(k) for k in ("official", "reference"))
        kernels.append(
            (
                *(timing.name, timing.shape, f"{ours:.3g}"),
                "" if official is None else f"{official:.3g}",
                "" if reference is None else f"{reference:.3g}",
                f"{timing.floor:.3g}",
                f"{ours / timing.floor:.2f}",
                "" if official is None else f"{official / ours:.2f}",
            )
        )
    rate = f"{reached.bytes / 1e12:.3g} TB/s copied, read and written"
    if reached.exponentials:
        rate += f", {reached.exponentials / 1e12:.3g} T exponentials/s"
    lines = [f"{machine(device)}, torch {torch.__version__}; {rate}; medians, milliseconds", ""]
    headers = (
        *("kernel", "shape", "ours", "official", "reference", "floor"),
        *("ours / floor", "times as fast as official"),
    )
    if kernels:
        lines += [tabulate(kernels, headers, tablefmt="github", disable_numparse=True), ""]
    if steps:
        titles = ("training step", "shape", "milliseconds", "of mamba's")
        lines += [tabulate(steps, titles, tablefmt="github", disable_numparse=True), ""]
    return "\n".join([*lines, *failed]).rstrip()
