"""How the map is learned: the scorer, the schedule, every route's gradient, the thresholds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.config import StackConfig
from flexbench.interface import Batch, ProblemSpec
from flexbench.models import build, resolve
from flexbench.models.flexblock import Router, RouterOptions
from flexbench.models.flexblock.router import (
    SETTLED,
    share_thresholds,
    types_by_share,
    types_by_threshold,
)
from flexbench.models.flexblock.scorer import CONVOLUTIONS, Scorer

ROUTES = ("saliency", "ste", "gate", "soft", "random", "fixed", "uniform")


def router(seed: int = 0, *, warm: bool = True, **options) -> Router:
    torch.manual_seed(seed)
    options = {"l0": 4, "reduced_share": 0.0, "rev": "off", **options}
    made = Router(8, RouterOptions(**options))
    if warm:
        made.after_step(1.0, 0.0)
    return made


def calibrated(made: Router, x: torch.Tensor) -> Router:
    made.eval()
    made.begin_calibration()
    made(x)
    made.end_calibration()
    return made


# -- the scorer ------------------------------------------------------------------------------


def plain_scores(scorer: Scorer, x: torch.Tensor, l0: int) -> list[torch.Tensor]:
    """(mean, maximum, deviation) of the features of each leaf of one sequence, by loops."""
    x = x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
    x = scorer.project(x)
    features = []
    for (width, dilation), conv in zip(CONVOLUTIONS, scorer.convolutions, strict=True):
        out = conv.bias.repeat(len(x), 1)
        for t in range(len(x)):
            for k in range(width):
                s = t + (k - width // 2) * dilation
                if 0 <= s < len(x):
                    out[t] = out[t] + conv.weight[:, 0, k] * x[s]
        features.append(out.relu())
    features = torch.cat(features, 1)
    found = []
    for leaf in features.split(l0):
        deviation = (leaf.var(0, correction=0) + 1e-6).sqrt()
        found.append(torch.cat([leaf.mean(0), leaf.amax(0), deviation]))
    return found


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=3), st.integers(1, 6))
def test_the_scorer_equals_a_plain_loop(lengths, l0):
    torch.manual_seed(0)
    scorer = Scorer(8, l0).double().eval()
    scorer.running_mean.normal_()
    x = [torch.randn(n, 8, dtype=torch.float64) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
    got = scorer(padded, torch.tensor(lengths))
    for b, rows in enumerate(x):
        for leaf, pooled in enumerate(plain_scores(scorer, rows, l0)):
            raw = scorer.output(torch.nn.functional.gelu(scorer.hidden(pooled)))
            summary, reverse, both, logits = raw.split(scorer.sizes)
            summary = summary - scorer.running_mean
            assert torch.allclose(got.summary[b, leaf], summary / summary.norm(), atol=1e-6)
            assert torch.allclose(got.reverse[b, leaf], reverse.sigmoid(), atol=1e-6)
            assert torch.allclose(got.bidirectional[b, leaf], both.sigmoid(), atol=1e-6)
            assert torch.allclose(got.type_logits[b, leaf], logits, atol=1e-5)


def test_homogeneity_is_one_without_variance_and_statistics_freeze():
    scorer = Scorer(8, 4).train()
    x = torch.randn(3, 16, 8)
    x[0, 4:8] = x[0, 4]
    scorer(torch.cat([x, x]), torch.full((6,), 16))
    constant = x[:1, :1].expand(1, 32, 8)
    scorer.eval()
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    found = scorer(constant, torch.tensor([32]))
    assert torch.allclose(found.homogeneity[0, 2:-2], torch.ones(4), atol=1e-4)
    assert ((found.homogeneity >= 0) & (found.homogeneity <= 1)).all()
    assert all(torch.equal(before[name], value) for name, value in scorer.state_dict().items())
    assert scorer.batches == 1


# -- types -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(4, 40), st.floats(0.05, 0.95), st.floats(0, 1))
def test_types_by_share_meet_the_shares(batch, leaves, full, rest):
    torch.manual_seed(0)
    reduced = (1 - full) * rest
    score, tokens = torch.randn(batch, leaves), torch.full((batch, leaves), 8)
    types = types_by_share(score, tokens, full, reduced)
    share = torch.bincount(types.flatten(), minlength=3) / types.numel()
    assert abs(float(share[0]) - full) <= 1 / types.numel()
    assert abs(float(share[1]) - reduced) <= 1 / types.numel()
    by_type = [score[types == kind] for kind in range(3)]
    for better, worse in ((0, 1), (1, 2), (0, 2)):
        if len(by_type[better]) and len(by_type[worse]):
            assert by_type[better].min() >= by_type[worse].max()
    thresholds = share_thresholds(score.flatten(), tokens.flatten(), full, reduced)
    assert torch.equal(types_by_threshold(score, thresholds), types)


@pytest.mark.parametrize("route", [r for r in ROUTES if r not in ("ste", "uniform", "soft")])
@pytest.mark.parametrize("reduced", [0.0, 0.3])
def test_the_ratio_is_met_in_training_and_after_calibration(route, reduced):
    made = router(target_ratio=0.4, reduced_share=reduced, router_gradient=route, max_level=1)
    x = torch.randn(64, 128, 8)
    calibrated(made, x)
    # The controls treat every sequence alike: they can only do so many of 32 leaves.
    close = 0.01 if route in ("saliency", "gate") else 1 / 32
    assert float(len(made(x).packing)) / (64 * 128) == pytest.approx(0.4, abs=close)
    fresh = made(torch.randn(64, 128, 8))
    assert float(len(fresh.packing)) / (64 * 128) == pytest.approx(0.4, abs=0.05)
    made.train()
    if not reduced or route == "saliency":
        trained = float(len(made(x).packing)) / (64 * 128)
        assert trained == pytest.approx(0.4, abs=0.05 if reduced else close)


def test_uniform_reduces_everything_to_the_nearest_stride():
    made = router(target_ratio=0.35, router_gradient="uniform")
    assert len(made(torch.randn(2, 48, 8)).packing) == 2 * 48 / 3


def test_a_sequence_s_map_does_not_depend_on_its_batch_once_calibrated():
    for route in ROUTES:
        made = router(target_ratio=0.4, reduced_share=0.2, router_gradient=route, rev="learned")
        x = torch.randn(8, 64, 8)
        calibrated(made, x)
        together = made(x).guide.to_frame()
        for b in range(8):
            alone = made(x[b : b + 1]).guide.to_frame()
            wanted = together[together["batch"] == b].reset_index(drop=True)
            assert alone.drop(columns="batch").equals(wanted.drop(columns="batch")), route


# -- the schedule ----------------------------------------------------------------------------


def test_all_is_computed_until_the_loss_has_moved_then_the_ratio_falls():
    made = router(warm=False, target_ratio=0.4, router_hold=0.1, router_warmup=0.2)
    x = torch.randn(16, 64, 8)
    ratios = []
    for step in range(1, 101):
        ratios.append(len(made(x).packing) / (16 * 64))
        made.after_step(step / 100, 1.0 if step < 25 else 0.5)
    released = next(i for i, ratio in enumerate(ratios) if ratio < 1)
    assert 25 <= released <= 35
    assert all(ratio == 1 for ratio in ratios[:released])
    assert all(a >= b for a, b in itertools.pairwise(ratios))
    assert ratios[released + 25] == pytest.approx(0.4, abs=0.01)
    stuck = router(warm=False, target_ratio=0.4)
    for step in range(1, 61):
        stuck.after_step(step / 100, 1.0)
    assert stuck.ratio == pytest.approx(0.4)  # the hold has an end even so


def test_directions_are_random_until_then():
    made = router(warm=False, rev="learned")
    share = made(torch.randn(16, 64, 8)).guide.reverse.float().mean()
    assert 0.3 < share < 0.7
    made.after_step(1.0, 0.0)
    with torch.no_grad():
        made.scorer.output.bias[made.scorer.sizes[0]] = 9.0
    assert made(torch.randn(16, 64, 8)).guide.reverse.all()


# -- gradients -------------------------------------------------------------------------------


def model(**options):
    torch.manual_seed(0)
    mixer = resolve("flexblock").parse({"l0": 4, "d_inner": 16, "reduced_share": 0.0, **options})
    spec = ProblemSpec("tokens", classes=3, max_length=64, vocab_size=9)
    return build(spec, StackConfig(d_model=8, n_layers=2), mixer)


def batch(rows: int = 8) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return Batch(
        torch.randint(9, (rows, 64), generator=draw), torch.randint(3, (rows,), generator=draw)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"router_gradient": "saliency", "rev": "off"},
        {"router_gradient": "ste", "rev": "off"},
        {"router_gradient": "gate", "rev": "off"},
        {"router_gradient": "soft", "rev": "off"},
        {"router_gradient": "random", "rev": "learned"},
        {"router_gradient": "random", "rev": "learned", "rev_gate": "soft"},
        {"router_gradient": "random", "rev": "off", "gate_form": "tree-channel"},
        {"router_gradient": "random", "rev": "off", "gate_form": "leaf-scalar"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_every_route_reaches_the_scorer(options, scope):
    made = model(target_ratio=0.5, scope=scope, rev_share=1.0, **options)
    made.after_step(0.45, 1.0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "node_gate" in name:  # starts constant, and so deaf
                parameter.add_(torch.randn_like(parameter))
    data = batch()
    loss = torch.nn.functional.cross_entropy(made(data), data.labels)
    loss.backward()
    scorers = [m for m in made.modules() if isinstance(m, Scorer)]
    assert len(scorers) == (1 if scope == "model" else 2)
    for scorer in scorers:
        assert all(p.grad is not None and bool(p.grad.any()) for p in scorer.parameters())


def test_the_controls_do_not_learn():
    for route in ("random", "fixed", "uniform"):
        made = model(router_gradient=route, rev="off")
        data = batch()
        torch.nn.functional.cross_entropy(made(data), data.labels).backward()
        assert all(p.grad is None for p in made.backbone.router.parameters())


def test_the_factor_s_gradient_is_what_the_score_learns():
    made = router(router_gradient="saliency", rev="off")
    x = torch.randn(4, 32, 8)
    made.progress.zero_()
    made.release.fill_(torch.inf)
    route = made(x)
    route.factor.retain_grad()
    weight = torch.linspace(0.1, 3.0, route.factor.numel()).view_as(route.factor)
    score = made.scorer(x, torch.full((4,), 32)).type_logits
    score = score[..., 0] - score[..., 2]
    (route.factor * weight).sum().backward()
    target = torch.log(weight / weight.mean(1, keepdim=True) + 1e-4)
    wanted = made.scorer.output.weight.grad.clone()
    made.zero_grad()
    loss = torch.nn.functional.huber_loss(score, target)
    (0.1 * loss).backward()
    assert torch.allclose(wanted, made.scorer.output.weight.grad, atol=1e-6)


def test_the_router_learns_where_the_signal_is():
    """Only the third leaf matters: its score rises above the others', and the loss falls."""
    torch.manual_seed(0)
    made = router(warm=False, router_gradient="saliency")
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(16, 32, 8)
        x[:, 8:12, 0] += 4.0
        route = made(x)
        weight = torch.full((8,), 0.01)
        weight[2] = 1.0
        made.tally.zero_()
        (route.factor * weight).sum().backward()
        losses.append(made.diagnostics()["training_router_loss"] if made.tally[0, 1] else
                      float(made.tally[0, len(made.TALLIED)]))  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
    x = torch.randn(16, 32, 8)
    x[:, 8:12, 0] += 4.0
    made.trace = {}
    made.eval()(x)
    score = made.trace["leaf score"][:, ::4]
    assert bool((score.argmax(1) == 2).all())


def test_diagnostics_tell_training_and_evaluation_apart():
    made = model(target_ratio=0.5, rev="all", merge_threshold=-1.0)
    made.after_step(1.0, 0.0)
    made(batch())
    made.eval()
    made.calibrate([batch(16)])
    with torch.no_grad():
        made(batch(4))
    found = made.diagnostics()
    assert found["training_computed_token_ratio"] == pytest.approx(0.5, abs=0.02)
    assert found["computed_token_ratio"] == pytest.approx(0.5, abs=0.2)
    assert found["rev_share"] == found["training_rev_share"] == 1.0
    shares = [v for k, v in found.items() if k.startswith("level_")]
    assert sum(shares) == pytest.approx(1.0)
    assert found["mean_block_length"] > 4
    made.train()
    assert "training_computed_token_ratio" not in made.diagnostics()


def test_the_model_is_settled_once_its_ratio_is_at_the_target():
    made = model(target_ratio=0.5, router_hold=0.0, router_warmup=0.2)
    assert not made.settled
    for step in range(SETTLED + 1):
        made.after_step(step / 100, 1.0)
    assert any(isinstance(each, Router) and each.released for each in made.modules())
    assert not made.settled
    made.after_step(0.5, 1.0)
    assert made.settled
    assert model(router_gradient="uniform").settled
    whole = model(target_ratio=1.0)
    assert not whole.settled, "directions are random until the hold is over"
    whole.after_step(0.5, 1.0)
    assert whole.settled
