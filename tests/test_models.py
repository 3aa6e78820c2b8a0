"""Mixers, the stack around them, and the matching of their sizes."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from flexbench import kernels
from flexbench.bench import Follow
from flexbench.config import StackConfig
from flexbench.errors import UserError
from flexbench.interface import Batch, ProblemSpec
from flexbench.models import (
    backbone_parameters,
    build,
    is_matched,
    match_width,
    registry,
    resolve,
)
from flexbench.models.bimamba import BiMamba
from flexbench.models.flexblock import GuideMap, Route
from flexbench.models.flexblock.readings import TwoReadings
from flexbench.models.mamba import Mamba
from flexbench.models.stack import ResidualLayer

VARIANTS = [
    ("mamba", {}),
    ("alternating", {}),
    *(
        ("bimamba", {"fusion": fusion, "share": share})
        for fusion in ("add", "concat", "gate")
        for share in ("none", "projections")
    ),
    ("flexblock", {"rev": "all", "router_gradient": "soft"}),
    ("flexblock", {"l0": "8", "scope": "layer", "gate_form": "leaf-channel"}),
    ("hzip", {}),
    ("hzip-lean", {}),
]
TOKENS = ProblemSpec("tokens", classes=5, max_length=64, vocab_size=11)
STACK = StackConfig(d_model=16, n_layers=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share, and threads that wait for each other are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


each_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values())
)


def mixer(name, options):
    return resolve(name).parse(options)


def model(name="mamba", options=None, *, spec=TOKENS, seed=0, **stack):
    torch.manual_seed(seed)
    made = build(spec, STACK.override(stack), mixer(name, options or {})).eval()
    with torch.no_grad():  # away from an initialisation at which fusions and gates are symmetric
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(*shape):
    return torch.randint(0, TOKENS.vocab_size, shape)


def labels(rows):
    return torch.zeros(rows, dtype=torch.int64)


@each_variant
def test_causality_is_what_the_model_declares(name, options):
    spec = ProblemSpec("tokens", classes=5, max_length=64, vocab_size=11, output="token")
    made = model(name, options, spec=spec)
    x = tokens(2, 33)
    changed = x.clone()
    changed[:, 20] = (x[:, 20] + 1) % TOKENS.vocab_size
    with torch.no_grad():
        before, after = made(Batch(x, x)), made(Batch(changed, x))
    assert not torch.equal(before[:, 20], after[:, 20])
    if registry.get(name).causal:
        assert torch.equal(before[:, :20], after[:, :20])
    else:
        assert not torch.equal(before[:, :20], after[:, :20])


def test_reverse_is_flip_mamba_flip():
    forward, backward = Mamba(12), Mamba(12, reverse=True)
    backward.load_state_dict(forward.state_dict())
    x = torch.randn(3, 29, 12)
    torch.testing.assert_close(backward(x), forward(x.flip(1)).flip(1))
    bounds = torch.tensor([0, 5, 6, 29], dtype=torch.int32)
    one = x[:1]
    alone = [backward(one[:, s:e]) for s, e in [(0, 5), (5, 6), (6, 29)]]
    torch.testing.assert_close(backward(one, bounds), torch.cat(alone, 1))


@pytest.mark.parametrize("share", ["none", "projections"])
def test_bimamba_fuses_two_readings(share):
    x = torch.randn(2, 17, 8)
    made = {
        fusion: BiMamba(8, fusion, share, d_state=4, bias=True)
        for fusion in ("add", "concat", "gate")
    }
    for bimamba in made.values():
        bimamba.load_state_dict(made["add"].state_dict(), strict=False)
        y_f, y_r = bimamba.mamba_fwd(x), bimamba.mamba_rev(x)
        if bimamba.fusion != "add":
            bimamba.fuse.weight.data.normal_()
            fused = bimamba.fuse(torch.cat([y_f, y_r], -1))
        if bimamba.fusion == "add":
            expected = y_f + y_r
        elif bimamba.fusion == "concat":
            expected = fused
        else:
            g = torch.sigmoid(fused)
            expected = g * y_f + (1 - g) * y_r
        torch.testing.assert_close(bimamba(x), expected)


def test_concat_starts_as_the_sum_and_gate_as_the_mean():
    x = torch.randn(2, 17, 8)
    for fusion, scale in (("concat", 1.0), ("gate", 0.5)):
        made = BiMamba(8, fusion)
        expected = scale * (made.mamba_fwd(x) + made.mamba_rev(x))
        torch.testing.assert_close(made(x), expected)


def test_shared_projections_are_one_and_the_rest_is_each_direction_s_own():
    made = BiMamba(16, share="projections")
    shared = {
        name
        for (name, a), (_, b) in zip(
            made.mamba_fwd.named_parameters(), made.mamba_rev.named_parameters(), strict=True
        )
        if a is b
    }
    assert shared == {"in_proj.weight", "out_proj.weight"}


@each_variant
def test_a_padded_batch_gives_each_sequence_what_it_has_alone(name, options):
    lengths = [23, 1, 64, 7]
    x = tokens(len(lengths), max(lengths))
    for pool in ("mean", "last", "max"):
        made = model(name, options, pool=pool)
        together = made(Batch(x, labels(4), torch.tensor(lengths)))
        alone = [made(Batch(row[None, :n], labels(1))) for row, n in zip(x, lengths, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_padding_reaches_neither_logits_nor_gradients():
    lengths = torch.tensor([9, 20])
    spec = ProblemSpec("values", classes=3, max_length=20, channels=2, output="token")
    made = model("bimamba", {}, spec=spec)
    x = torch.randn(2, 20, 2)
    poisoned = x.clone()
    poisoned[0, 9:] = torch.nan
    gradients = []
    for inputs in (x, poisoned):
        logits = made(Batch(inputs, labels(2), lengths))
        assert logits.shape == (2, 20, 3)
        made.zero_grad()
        logits[0, :9].sum().backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
        assert all(torch.isfinite(grad).all() for grad in gradients[-1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Padded(nn.Module):
    """A mixer that cannot be packed."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x, lengths=None):
        self.seen = x, lengths
        return self.linear(x).cumsum(1)


def test_a_mixer_that_cannot_be_packed_sees_zeros_and_lengths():
    made = model(norm="layer")
    padded = Padded(STACK.d_model)
    made.backbone.layers[0] = ResidualLayer(padded, STACK)
    lengths = torch.tensor([3, 8])
    x = tokens(2, 8)
    together = made(Batch(x, labels(2), lengths))
    seen, given = padded.seen
    assert torch.equal(given, lengths)
    assert not seen[0, 3:].any()
    assert seen[0, :3].all()
    torch.testing.assert_close(together[:1], made(Batch(x[:1, :3], labels(1))))
    assert padded.seen[1] is None


@each_variant
def test_the_same_batch_gives_the_same_bits(name, options):
    made = model(name, options).train()
    batch = Batch(tokens(5, 64), labels(5), torch.tensor([64, 3, 40, 41, 1]))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        logits = made(batch)
        runs.append([logits, *torch.autograd.grad(logits.square().sum(), made.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_two_towers_pair_adjacent_rows():
    spec = ProblemSpec("tokens", classes=2, max_length=32, vocab_size=11, towers=2)
    made = model(spec=spec)
    x, lengths = tokens(6, 32), torch.tensor([32, 5, 9, 9, 30, 31])
    logits = made(Batch(x, labels(3), lengths))
    assert logits.shape == (3, 2)
    alone = [made(Batch(x[i : i + 2], labels(1), lengths[i : i + 2])) for i in (0, 2, 4)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="towers"):
        build(
            ProblemSpec("tokens", 2, 32, vocab_size=11, towers=2, output="token"),
            STACK,
            mixer("mamba", {}),
        )


@each_variant
def test_a_state_dict_makes_the_round_trip(name, options, tmp_path):
    one, other = model(name, options, seed=1), model(name, options, seed=2)
    batch = Batch(tokens(2, 12), labels(2))
    assert not torch.equal(one(batch), other(batch))
    torch.save(one.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(one(batch), other(batch))


@each_variant
def test_every_parameter_gets_a_gradient(name, options):
    made = model(name, options).train()
    made(Batch(tokens(2, 64), labels(2), torch.tensor([64, 5]))).square().sum().backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_mamba_s_initialisation():
    torch.manual_seed(0)
    mamba = Mamba(64, d_state=8, dt_min=0.01, dt_max=0.1)
    assert mamba.dt_rank == 4
    assert torch.equal(mamba.A_log.exp().round(), torch.arange(1, 9.0).expand(128, 8))
    step = F.softplus(mamba.dt_proj.bias)
    assert 0.0099 < step.min() < 0.012
    assert 0.08 < step.max() < 0.1001
    assert mamba.dt_proj.weight.abs().max() <= 0.5
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(8, dt_init="zeros")


def test_out_proj_is_scaled_down_with_depth():
    torch.manual_seed(0)
    for name, options in VARIANTS:
        deep = build(TOKENS, STACK.override({"n_layers": 4}), mixer(name, options))
        for key, weight in deep.named_parameters():
            if key.endswith("out_proj.weight"):
                bound = 1 / math.sqrt(weight.shape[1]) / 2
                assert 0.9 * bound < weight.abs().max() <= bound


def test_a_single_channel_s_magnitude_survives_the_first_norm():
    made = build(
        ProblemSpec("values", classes=2, max_length=8, channels=1), STACK, mixer("mamba", {})
    )
    normed = made.backbone.layers[0].norm(made.encoder(torch.tensor([[[0.5], [1.0]]])))
    assert not torch.allclose(normed[0, 0], normed[0, 1], atol=1e-2)


def test_parameters_are_marked_for_the_optimiser():
    made = build(TOKENS, STACK, mixer("bimamba", {}))

    def marked(flag):
        names = (key for key, p in made.named_parameters() if getattr(p, flag, False))
        return {".".join(key.split(".")[5:]) for key in names}

    assert marked("_no_weight_decay") == {"A_log", "D", "dt_proj.bias"}
    assert marked("_ssm") == {"A_log", "dt_proj.weight", "dt_proj.bias"}


def same_traced(made, backend, *inputs, **options):
    """Compiled, outputs and gradients are the same."""

    def run(module):
        torch.manual_seed(0)
        y = module(*inputs)
        parameters = list(made.parameters())
        return y, *torch.autograd.grad(y.square().sum(), parameters, materialize_grads=True)

    state = deepcopy(made.state_dict())
    expected = run(made)
    made.load_state_dict(state)  # running statistics move with every batch
    torch.testing.assert_close(run(torch.compile(made, backend=backend, **options)), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {}),
        ("alternating", {}),
        ("bimamba", {"fusion": "gate"}),
        ("bimamba", {"share": "projections"}),
        ("hzip", {}),
        ("hzip-lean", {}),
    ],
)
def test_the_model_compiles_into_one_graph(name, options, fresh_compiler):
    batch = Batch(tokens(2, 13), labels(2))
    same_traced(model(name, options).train(), "aot_eager", batch, fullgraph=True)


@pytest.mark.parametrize("twice", [False, True])
def test_flexblock_compiles_into_one_graph_where_its_route_is_given(twice, fresh_compiler):
    made = model("flexblock", {"l0": 4}).backbone.train()
    guide = GuideMap.uniform(2, 13, 4)
    block = torch.arange(len(guide))
    guide = replace(guide, type=block % 3, flags=block % 2)
    route = Route.by_hand(guide, row_length=13)
    if twice:
        readings = TwoReadings(guide, route.packing, block % 4 < 2, 4, "block", 13)
        route = replace(route, readings=readings, reversal=torch.rand(len(guide)))
    made.router = Follow(route)
    same_traced(made, "aot_eager", torch.randn(2, 13, 16), fullgraph=True)


@pytest.mark.parametrize(
    ("name", "options", "lengths", "graphs"),
    [
        ("mamba", {}, [13, 6], 2),
        ("flexblock", {"l0": 4, "rev": "off"}, None, 4),  # whoever called the router has a rest
        ("hzip", {"block_gating": 4}, None, 10),
    ],
)
def test_what_depends_on_data_is_found_between_graphs(
    name, options, lengths, graphs, fresh_compiler
):
    made = model(name, options, n_layers=1).train()
    counter = CompileCounterWithBackend("aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        given = None if lengths is None else torch.tensor(lengths)
        same_traced(made, counter, Batch(tokens(2, 13), labels(2), given))
        assert counter.frame_count <= graphs


@each_variant
def test_autocast_keeps_the_residual_in_float32(name, options):
    made = model(name, options).train()
    batch = Batch(tokens(2, 40), labels(2), torch.tensor([40, 11]))
    torch.manual_seed(0)
    exact = made(batch)
    torch.manual_seed(0)
    seen = []
    made.backbone.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(batch)
        logits.float().square().sum().backward()
    assert seen == [torch.float32]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_the_stack_in_float64():
    made = model().double()
    spec = ProblemSpec("values", classes=3, max_length=9, channels=1)
    assert made(Batch(tokens(2, 9), labels(2))).dtype == torch.float64
    assert (
        build(spec, STACK, mixer("mamba", {}))
        .double()(Batch(torch.randn(2, 9, 1).double(), labels(2)))
        .dtype
        == torch.float64
    )


@settings(max_examples=15, deadline=None)
@given(
    d_model=st.integers(32, 320),
    n_layers=st.integers(1, 2),
    d_state=st.sampled_from([4, 16]),
    # a step of hzip's width, gates and all, is more than 2 %
    variant=st.sampled_from([variant for variant in VARIANTS if variant[0] != "hzip"]),
)
def test_widths_are_solved_to_two_percent(d_model, n_layers, d_state, variant):
    name, options = variant
    stack = StackConfig(d_model=d_model, n_layers=n_layers)
    target = backbone_parameters(mixer("mamba", {"d_state": d_state}), stack)
    matched = match_width(mixer(name, {**options, "d_state": d_state}), stack, target)
    parameters = backbone_parameters(matched, stack)
    assert abs(parameters - target) <= 0.02 * target
    assert is_matched(parameters, target)
    nearby = [matched.override({"d_inner": matched.d_inner + step}) for step in (-1, 1)]
    assert all(
        abs(backbone_parameters(other, stack) - target) >= abs(parameters - target)
        for other in nearby
    )
    if name in ("mamba", "alternating"):
        assert matched.d_inner == 2 * d_model


def test_a_count_on_paper_is_the_model_s():
    for name, options in VARIANTS:
        made = model(name, options)
        assert made.backbone_parameters() == backbone_parameters(mixer(name, options), STACK)
        apart = {*made.encoder.parameters(), *made.decoder.parameters()}
        total = sum(p.numel() for p in made.parameters())
        assert made.backbone_parameters() == total - sum(p.numel() for p in apart)


def test_counting_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    backbone_parameters(mixer("bimamba", {}), STACK)
    match_width(mixer("bimamba", {}), STACK, 10_000)
    assert torch.equal(torch.rand(3), expected)


def test_a_width_set_by_hand_is_kept():
    by_hand = mixer("bimamba", {"d_inner": 7})
    assert match_width(by_hand, STACK, 10_000) is by_hand
    assert not is_matched(backbone_parameters(by_hand, STACK), 10_000)


def test_state_size():
    assert model().state_size() == 2 * 32 * (16 + 3)
    assert model("bimamba", {"d_inner": 10, "d_state": 4}).state_size() == 2 * 2 * 10 * (4 + 3)


@pytest.mark.parametrize("length", [64, 1000])
def test_flops_are_those_counted_by_hand(length):
    d, inner, rank, state, layers = 16, 32, 1, 16, 2
    per_layer = 2 * (
        d * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * d + inner * 4
    )
    expected = layers * (per_layer + 7 * inner * state) + 2 * d * TOKENS.classes / length
    assert model().flops_per_token(length) == pytest.approx(expected)
    towers = ProblemSpec("values", classes=2, max_length=64, channels=3, towers=2)
    head = 2 * (4 * d * d + d * 2)
    expected = layers * (per_layer + 7 * inner * state) + 2 * 3 * d + head / (2 * length)
    assert model(spec=towers).flops_per_token(length) == pytest.approx(expected)


def test_shared_projections_cost_less():
    apart, shared = (
        model("bimamba", {"share": share, "d_inner": 32}).flops_per_token(64)
        for share in ("none", "projections")
    )
    assert apart - shared == 2 * 2 * (16 * 2 * 32 + 32 * 16)


def test_a_wrong_shape_is_one_sentence():
    made = model()
    made.backbone.layers[1].mixer = nn.Linear(16, 8)
    with pytest.raises(
        UserError, match=r"Linear must return .* \(1, 4, 16\), but returned \(1, 4, 8\)"
    ):
        made(Batch(tokens(1, 4), labels(1)))


def test_no_diagnostics_of_ordinary_models():
    made = model()
    assert made.diagnostics() == {}
    for layer, ratio in zip(made.backbone.layers, (0.2, 0.6), strict=True):
        layer.mixer.diagnostics = lambda ratio=ratio: {"computed_token_ratio": ratio}
    assert made.diagnostics() == {"computed_token_ratio": pytest.approx(0.4)}


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(UserError, match="unknown model 'bimambo'; did you mean 'bimamba'"):
        resolve("bimambo")
    with pytest.raises(UserError, match="unknown key 'fussion'; did you mean 'fusion'"):
        resolve("bimamba").parse({"fussion": "add"})
    with pytest.raises(UserError, match="d_conv"):
        resolve("mamba").parse({"d_conv": 7})


def test_the_models_run_on_the_public_kernels(monkeypatch):
    """The mixer's only sequence operations are the kernels', in the direction it declares."""
    seen = []
    for name in ("selective_scan", "causal_conv1d"):
        plain = getattr(kernels, name)

        def spy(*args, plain=plain, **options):
            seen.append(options["reverse"])
            return plain(*args, **options)

        monkeypatch.setattr(kernels, name, spy)
    Mamba(8, reverse=True)(torch.randn(1, 4, 8))
    BiMamba(8)(torch.randn(1, 4, 8))
    assert seen == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["mamba", "bimamba", "alternating"])
def test_the_model_learns_to_remember_a_token(name):
    torch.manual_seed(0)
    made = build(TOKENS, STACK.override({"pool": "last", "d_model": 64}), mixer(name, {}))
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(80):
        remembered = torch.randint(0, TOKENS.classes, (16,))
        x = torch.full((16, 12), TOKENS.classes)
        x[:, 1] = remembered
        logits = made(Batch(x, remembered, torch.randint(4, 13, (16,))))
        loss = F.cross_entropy(logits, remembered)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2 * math.log(TOKENS.classes)
