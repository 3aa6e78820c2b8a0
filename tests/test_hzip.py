"""HZip-Mamba against its formulas, step by step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexbench.config import StackConfig
from flexbench.errors import UserError
from flexbench.interface import Batch, ProblemSpec
from flexbench.kernels.fuse import hzip_fuse
from flexbench.models import (
    HZipMamba,
    backbone_parameters,
    build,
    is_matched,
    match_width,
    resolve,
)
from flexbench.models.flexblock import build_guide_map
from flexbench.models.flexblock.merge import build_tree
from flexbench.models.hzip.blocks import BlockStructure
from flexbench.tasks.base import registry as tasks

F64 = torch.float64
ROOT = Path(__file__).parent.parent
DYNAMIC = ((1, 1), (3, 1), (3, 2))
LEAN: dict[str, Any] = {"fusion_at": "inner", "form": "lean", "gate_norm": True}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"share": "projections", "gate_norm": True, "gate_form": "softmax"},
    {"gate_form": "scalar", "context_kernel": 5, "gradient_window": 3, "gradient_smoothing": 3},
    {"gate_form": "input", "gate_rank": 5},
    {"context_kernel": 0, "gradient_side": "centred", "gradient_window": 2},
    {"gradient_window": 0},
    {"dynamic_kernels": DYNAMIC},
    {"block_gating": 2, "merge_threshold": 0.0},
    LEAN,
    {**LEAN, "share": "projections", "gate_norm": False},
    {**LEAN, "gate_form": "scalar", "gradient_window": 0},
    {**LEAN, "context_kernel": 0, "gate_form": "softmax"},
    {**LEAN, "dynamic_kernels": DYNAMIC, "block_gating": 2},
    {**LEAN, "fusion_at": "model"},
    {**LEAN, "form": "dense"},
    {**LEAN, "form": "diag"},
    {**LEAN, "form": "diag", "fusion_at": "model", "gate_form": "softmax", "gradient_window": 2},
    *(
        {**LEAN, "gate_form": form}
        for form in ("sum", "mean", "constant", "concat-linear", "input")
    ),
]
each_variant = pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())) or "note"
)


def mixer(d_model: int = 6, **options: Any) -> HZipMamba:
    """In float64, at evaluation, away from the initialisation at which every gate is ½."""
    torch.manual_seed(0)
    made = HZipMamba(d_model, 4, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def readings(made: HZipMamba, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """y_f, y_b and z of one sequence, (length, dim) each, by the scanners alone."""
    forward, reverse = made.mamba_fwd, made.mamba_rev
    if made.fusion_at == "model":
        return forward(x)[0], reverse(x)[0], None
    u, z = forward.project(x)
    u_r = u if made.share == "projections" else reverse.in_proj(x)
    return forward.scan(u, None)[0], reverse.scan(u_r, None)[0], z[0]


def by_the_map(blocks: BlockStructure, context: Tensor) -> Tensor:
    """The structure of one sequence's steps: the map's rows and the tree's nodes, one at a time."""
    lengths = torch.tensor([len(context)])
    found = blocks.scorer(context[None], lengths)
    tree = build_tree(found, lengths, blocks.l0)
    guide = build_guide_map(found, lengths, l0=blocks.l0, merge_threshold=blocks.merge_threshold)
    rows = []
    for start, length, level, kind in zip(
        *(column.tolist() for column in (guide.start, guide.length, guide.level, guide.type)),
        strict=True,
    ):
        node, here = start // blocks.l0 // 2**level, tree[level]
        for place in range(length):
            said = [here.homogeneity, here.reverse, here.bidirectional]
            numbers = [each[0, node].item() for each in said]
            numbers += [float(kind == each) for each in range(3)]
            numbers += [math.log2(length), place / length]
            rows.append(torch.cat([here.summary[0, node], torch.tensor(numbers, dtype=F64)]))
    return torch.stack(rows)


def by_the_formulas(made: HZipMamba, x: Tensor, options: dict[str, Any]) -> Tensor:
    """One sequence, one step at a time."""
    fusion = made.fusion
    y_f, y_b, z = readings(made, x)
    length, dim = y_f.shape
    window = options.get("gradient_window", 1)
    smoothing = options.get("gradient_smoothing", 1)
    centred = options.get("gradient_side") == "centred"
    form, gate_form = options.get("form", "dense"), options.get("gate_form", "vector")

    def rate(y: Tensor, t: int, side: int) -> Tensor:
        steps = [side * j for j in range(1, window + 1)]
        steps += [-step for step in steps] if centred else []
        there = [t + step for step in steps if 0 <= t + step < length]
        return sum(((y[t] - y[o]).abs() for o in there), torch.zeros(dim, dtype=F64)) / max(
            len(there), 1
        )

    def smooth(y: Tensor, t: int, side: int) -> Tensor:
        near = [t + o for o in range(-(smoothing // 2), smoothing // 2 + 1) if 0 <= t + o < length]
        return sum(rate(y, o, side) for o in near) / len(near)

    def context(t: int) -> Tensor:
        if fusion.context is None:  # grouped: the channel's two readings
            kernels, shapes, bias = [fusion.taps.permute(2, 0, 1)], [(0, 1)], fusion.taps_bias
            grouped = True
        else:
            kernels, shapes = list(fusion.context.taps), fusion.context.shapes
            bias, grouped = fusion.context.bias, fusion.context.grouped
        mixture = [torch.ones(())]
        if len(kernels) > 1:
            first, _, last = fusion.context.controller
            hidden = F.silu(first(torch.cat([x[0, t], y_f[t], y_b[t]])))
            mixture = last(hidden).softmax(0)
        total = bias
        for m, taps, (_, dilation) in zip(mixture, kernels, shapes, strict=True):
            for k, tap in enumerate(taps):
                at = t + (k - len(taps) // 2) * dilation
                if 0 <= at < length:
                    if grouped:
                        seen = tap[:, 0] * y_f[at] + tap[:, 1] * y_b[at]
                    else:
                        seen = tap @ torch.cat([y_f[at], y_b[at]])
                    total = total + m * seen
        return F.silu(total)

    structure = None
    if fusion.blocks is not None:
        contexts = torch.stack([context(t) for t in range(length)])
        structure = by_the_map(fusion.blocks, contexts)
    out = []
    for t in range(length):
        if gate_form in ("sum", "mean"):
            y = (y_f[t] + y_b[t]) * (1.0 if gate_form == "sum" else 0.5)
        elif gate_form == "concat-linear":
            y = fusion.linear.weight @ torch.cat([y_f[t], y_b[t]])
        else:
            features = []
            if gate_form not in ("constant", "input"):
                if options.get("context_kernel", 3) or fusion.context:
                    features.append(context(t))
                if window:
                    features += [smooth(y_f, t, -1), smooth(y_b, t, 1)]
            if options.get("gate_norm"):
                features = [f / (f.square().mean() + 1e-5).sqrt() for f in features]
            logits = [fusion.bias[0], fusion.bias[1]]
            if gate_form == "input":
                features = [x[0, t]]
            if features and form == "diag":
                for g in range(2):
                    for f, feature in enumerate(features):
                        logits[g] = logits[g] + fusion.diagonal[g, f] * feature
            elif features:
                if fusion.blocks is not None:
                    features.insert(1, structure[t])
                parts = [] if fusion.told is None else [fusion.told.weight]
                parts += [] if fusion.down is None else list(fusion.down.unbind(1))
                hidden = torch.cat(parts, 1) @ torch.cat(features) + fusion.hidden_bias
                halves = F.silu(hidden).chunk(2)
                logits = [logits[g] + fusion.up[g] @ halves[g] for g in range(2)]
            if gate_form == "softmax":
                g_f, g_b = torch.stack(logits).softmax(0)
            else:
                g_f, g_b = (logit.sigmoid() for logit in logits)
            y = g_f * y_f[t] + g_b * y_b[t]
        out.append(y if z is None else y * F.silu(z[t]))
    y = torch.stack(out)[None]
    return y if z is None else made.mamba_fwd.out_proj(y)


@each_variant
@pytest.mark.parametrize("length", [1, 2, 7])
def test_step_by_step(options, length):
    made = mixer(**options)
    x = torch.randn(1, length, 6, dtype=F64)
    torch.testing.assert_close(made(x), by_the_formulas(made, x, options))


@each_variant
def test_gates_start_at_a_half_and_both_directions_learn(options):
    torch.manual_seed(0)
    made = HZipMamba(6, **options)
    made.trace = {}
    x = torch.randn(2, 9, 6)
    y = made(x)
    if options.get("gate_form") != "sum":
        mean = HZipMamba(
            6, **{**options, "gate_form": "mean", "dynamic_kernels": (), "block_gating": 0}
        )
        mean.load_state_dict(made.state_dict(), strict=False)
        torch.testing.assert_close(y, mean(x))
    for name in ("forward gate", "backward gate"):
        if name in made.trace:
            assert (made.trace[name] == 0.5).all()
    y.square().sum().backward()
    for direction in (made.mamba_fwd, made.mamba_rev):
        assert all(p.grad.abs().sum() > 0 for p in direction.parameters())


@pytest.mark.parametrize("options", [{}, {"dynamic_kernels": DYNAMIC}, LEAN])
def test_gradcheck(options):
    made = mixer(2, **options, expand=1, dt_rank=1)
    x = torch.randn(1, 4, 2, dtype=F64, requires_grad=True)
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    names = [name for name, _ in made.named_parameters() if name.startswith("fusion")]
    leaves = [dict(made.named_parameters())[name] for name in names]

    def run(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(made, given, (x, bounds))

    assert torch.autograd.gradcheck(run, (x, *leaves))


@each_variant
def test_packed_sequences_are_what_they_are_alone(options):
    made = mixer(**options)
    lengths = [5, 1, 11, 2]
    x = torch.randn(1, sum(lengths), 6, dtype=F64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    alone = [made(part) for part in x.split(lengths, 1)]
    torch.testing.assert_close(made(x, bounds), torch.cat(alone, 1))


def test_a_padded_batch_s_fusion_is_each_sequence_s_own_to_the_bit():
    made = HZipMamba(16, **LEAN)
    for parameter in made.fusion.parameters():
        torch.nn.init.normal_(parameter)
    dim = made.mamba_fwd.d_inner
    x, y_f, y_b, z = (torch.randn(1, 50, n) for n in (16, dim, dim, dim))
    bounds = torch.tensor([0, 7, 50], dtype=torch.int32)
    together = made.fusion(x, y_f, y_b, z, bounds, None)
    alone = [
        made.fusion(*(t[:, s:e] for t in (x, y_f, y_b, z)), None, None)
        for s, e in [(0, 7), (7, 50)]
    ]
    assert torch.equal(together, torch.cat(alone, 1))


def test_trace_leaves_gates_and_mixture_of_every_step():
    made = mixer(**{**LEAN, "dynamic_kernels": DYNAMIC})
    x = torch.randn(2, 9, 6, dtype=F64)
    y = made(x)
    made.trace = {}
    assert torch.equal(made(x), y)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.trace.items()}
    inner = made.mamba_fwd.d_inner
    assert shapes == {
        "forward gate": (2, 9, inner),
        "backward gate": (2, 9, inner),
        "kernel mixture": (2, 9, 3),
    }
    torch.testing.assert_close(made.trace["kernel mixture"].sum(-1), torch.ones(2, 9, dtype=F64))
    assert not any(tensor.requires_grad for tensor in made.trace.values())
    assert made.trace["kernel mixture"].std() > 0


def test_the_mixture_starts_uniform_and_learns():
    torch.manual_seed(0)
    made = HZipMamba(6, **{**LEAN, "dynamic_kernels": DYNAMIC})
    torch.nn.init.normal_(made.fusion.up)
    made.trace = {}
    made(torch.randn(1, 9, 6)).square().sum().backward()
    torch.testing.assert_close(made.trace["kernel mixture"], torch.full((1, 9, 3), 1 / 3))
    assert made.fusion.context.controller[-1].weight.grad.abs().sum() > 0


def test_block_gating_tells_the_gates_of_blocks_that_the_scorer_learns():
    torch.manual_seed(0)
    made = HZipMamba(6, **{**LEAN, "block_gating": 4, "merge_threshold": 0.0})
    torch.nn.init.normal_(made.fusion.up)
    made.trace = {}
    made(torch.randn(2, 30, 6)).square().sum().backward()
    guide = made.trace["guide map"]
    guide.validate()
    assert guide.lengths.tolist() == [30, 30]
    assert int(guide.level.max()) > 0
    scorer = made.fusion.blocks.scorer
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scorer.parameters())
    # One row each for summary, REV, both directions and types: all of them learn.
    assert (scorer.output.weight.grad.abs().sum(1) > 0).all()


def test_mamba_ssm_s_arguments_come_first():
    made = HZipMamba(32, 8, 3, 3, 4, form="lean")
    for direction in (made.mamba_fwd, made.mamba_rev):
        assert (direction.d_state, direction.d_conv, direction.d_inner) == (8, 3, 96)
        assert direction.dt_rank == 4
    assert not made.mamba_fwd.reverse
    assert made.mamba_rev.reverse


def test_hzip_is_the_note_to_the_letter():
    made = resolve("hzip").parse({}).build(32, layer=0, n_layers=1)
    context, fusion = made.fusion.context, made.fusion
    assert made.fusion_at == "model"
    assert [tuple(taps.shape) for taps in context.taps] == [(3, 32, 64)]
    assert fusion.told.weight.shape == (2 * 32, 32)
    assert fusion.down.shape == (2 * 32, 2, 32)
    assert fusion.up.shape == (2, 32, 32)
    shared = {id(p) for p in made.mamba_fwd.parameters()} & {
        id(p) for p in made.mamba_rev.parameters()
    }
    assert not shared


def test_the_lean_form_runs_on_the_kernel_alone(monkeypatch):
    """One call, and nothing wider than a reading goes in but parameters."""
    seen = []

    def spy(*args, **options):
        seen.append((args, options))
        return hzip_fuse(*args, **options)

    monkeypatch.setattr("flexbench.kernels.hzip_fuse", spy)
    made = HZipMamba(16, **LEAN)
    made(torch.randn(2, 9, 16))
    (args, options) = seen[0]
    dim = made.mamba_fwd.d_inner
    timed = [
        t for t in (*args, *options.values()) if isinstance(t, Tensor) and t.shape[:2] == (2, 9)
    ]
    assert [tuple(t.shape) for t in timed] == [(2, 9, dim)] * 3


@pytest.mark.parametrize("name", ["hzip", "hzip-lean"])
@pytest.mark.parametrize("preset", ["quick", "small"])
def test_a_width_exists_at_every_stack_of_the_suites(name, preset):
    stacks = {
        tasks.get(task).presets[preset].stack
        for task in tasks.names()
        if preset in tasks.get(task).presets
    }
    for stack in stacks:
        target = backbone_parameters(resolve("mamba").parse({}), stack)
        matched = match_width(resolve(name).parse({}), stack, target)
        assert matched.d_inner > stack.d_model // 4
        if stack.d_model >= 64:
            assert is_matched(backbone_parameters(matched, stack), target)


def test_flops_count_the_fusion():
    spec = ProblemSpec("tokens", classes=2, max_length=64, vocab_size=8)
    stack = StackConfig(d_model=16, n_layers=1)
    lean = resolve("hzip-lean").parse({"d_inner": 24})
    mean = resolve("hzip-lean").parse({"d_inner": 24, "gate_form": "mean"})
    gated, plain = (build(spec, stack, m).flops_per_token(64) for m in (lean, mean))
    weights = 24 * 2 * 3 + 16 * 3 * 24 + 2 * 24 * 8
    assert gated - plain == pytest.approx(2 * weights)


def test_a_model_of_ragged_batches():
    spec = ProblemSpec("tokens", classes=3, max_length=20, vocab_size=8)
    for name in ("hzip", "hzip-lean"):
        torch.manual_seed(0)
        made = build(spec, StackConfig(d_model=16, n_layers=2), resolve(name).parse({})).eval()
        x, lengths = torch.randint(0, 8, (3, 20)), torch.tensor([20, 3, 9])
        labels = torch.zeros(3, dtype=torch.int64)
        together = made(Batch(x, labels, lengths))
        alone = [made(Batch(x[i : i + 1, :n], labels[:1])) for i, n in enumerate(lengths)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_kernel": 4}, "odd widths"),
        ({"gradient_smoothing": 2}, "must be odd"),
        ({"context_kernel": 0, "gradient_window": 0}, "no gate is left but 'constant'"),
        ({"dynamic_kernels": [[3, 1], [5, 1]]}, "three different"),
        ({"dynamic_kernels": [[3, 1], [5, 1], [4, 1]]}, "odd widths"),
        ({"dynamic_kernels": DYNAMIC, "gate_form": "input"}, "read the context"),
        ({"form": "diag", "gate_form": "scalar"}, "cannot be 'scalar'"),
        ({"form": "diag", "block_gating": 16}, "block_gating needs"),
        ({"gate_form": "vectr"}, "vector"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        resolve("hzip").parse(options)


def test_the_readings_are_scaled_for_depth_once():
    torch.manual_seed(0)
    one = resolve("hzip-lean").parse({}).build(16, layer=0, n_layers=1)
    torch.manual_seed(0)
    four = resolve("hzip-lean").parse({}).build(16, layer=0, n_layers=4)
    ratio = one.mamba_fwd.out_proj.weight / four.mamba_fwd.out_proj.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(4)))


def test_the_page_quotes_the_table():
    """Every accuracy and difference in docs/hzip.md's table stands in the derived one."""
    derived = (ROOT / "results/scripts/fusions.md").read_text().replace("-", "−")
    page = (ROOT / "docs/hzip.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "(+" in line]
    rows += [line for line in page.splitlines() if line.startswith("| ") and "(−" in line]
    assert len(rows) >= 9
    for row in rows:
        for cell in row.strip("| ").split(" | ")[1:]:
            assert f" {cell} " in derived, row
