"""`--models package.module:Class`: a mixer of one's own."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from flexbench.config import StackConfig
from flexbench.errors import UserError
from flexbench.interface import Batch, ProblemSpec
from flexbench.models import backbone_parameters, build, is_matched, match_width, resolve

STACK = StackConfig(d_model=32, n_layers=2)
SPEC = ProblemSpec("tokens", classes=3, max_length=16, vocab_size=7)

SOURCE = '''
import torch
from torch import nn
from flexbench.kernels import selective_scan


class Wide(nn.Module):
    """A gated running mean."""

    causal = True

    def __init__(self, d_model, d_inner=8, gain=1.0):
        super().__init__()
        self.gain = gain
        self.state_size = d_inner
        self.up = nn.Linear(d_model, 2 * d_inner)
        self.down = nn.Linear(d_inner, d_model)

    def forward(self, x):
        u, z = self.up(x).chunk(2, -1)
        mean = u.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.gain * self.down(mean * torch.sigmoid(z))


class Fixed(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.linear(x)


class Packed(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, x, cu_seqlens=None):
        self.seen = x.shape, None if cu_seqlens is None else cu_seqlens.tolist()
        return super().forward(x)


class Narrow(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, d_model - 1)


class Failing(nn.Module):
    def __init__(self, d_model, width=3):
        raise ValueError("no such width")


class Stubborn(nn.Module):
    """Needs real tensors to initialise itself and to run."""

    def __init__(self, d_model, d_inner):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model, d_inner))
        self.scale = self.weight.abs().max().item()

    def forward(self, x):
        assert x.abs().max().item() >= 0
        return (x @ self.weight) @ self.weight.T


class Plain:
    pass


class Open(nn.Identity):
    def __init__(self, d_model, **options):
        super().__init__()
        self.options = options
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "my_mixers.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("my_mixers", None)
    importlib.invalidate_caches()


def mixer(name, **options):
    return resolve(f"my_mixers:{name}").parse(options)


def logits(config, lengths=None):
    torch.manual_seed(0)
    made = build(SPEC, STACK, config)
    batch = Batch(torch.randint(0, 7, (3, 16)), torch.zeros(3, dtype=torch.int64), lengths)
    return made, made(batch)


def test_a_class_in_the_current_directory_is_a_model():
    config = mixer("Wide", gain=2.0)
    assert (config.name, config.summary) == ("my_mixers:Wide", "A gated running mean.")
    assert config.causal
    made, y = logits(config)
    assert y.shape == (3, 3)
    assert [layer.mixer.gain for layer in made.backbone.layers] == [2.0, 2.0]
    assert made.state_size() == 2 * 8
    d = 32
    assert made.flops_per_token(16) == 2 * 2 * (d * 16 + 8 * d) + 2 * d * 3 / 16
    assert not mixer("Fixed").causal
    assert logits(mixer("Fixed"))[0].state_size() is None


def test_options_survive_json_and_reach_the_class():
    config = mixer("Wide", gain=2.0)
    stored = config.model_dump(mode="json")
    assert resolve("my_mixers:Wide").parse(stored) == config
    assert mixer("Open", anything=[1, 2]).build(8, layer=0, n_layers=1).options == {
        "anything": [1, 2]
    }


def test_the_width_is_matched_where_there_is_one():
    target = backbone_parameters(resolve("mamba")(), STACK)
    for name in ("Wide", "Stubborn"):
        matched = match_width(mixer(name), STACK, target)
        assert is_matched(backbone_parameters(matched, STACK), target), name
        assert build(SPEC, STACK, matched).backbone_parameters() == backbone_parameters(
            matched, STACK
        )
    fixed = mixer("Fixed")
    assert match_width(fixed, STACK, target) is fixed
    assert not is_matched(backbone_parameters(fixed, STACK), target)


def test_a_mixer_that_needs_real_tensors_is_counted_all_the_same():
    made, _ = logits(mixer("Stubborn", d_inner=5))
    assert made.flops_per_token(16) == 2 * 2 * 2 * 32 * 5 + 2 * 32 * 3 / 16


def test_ragged_batches_are_packed_for_those_that_take_it():
    lengths = torch.tensor([16, 2, 5])
    made, _ = logits(mixer("Packed"), lengths)
    assert made.backbone.layers[0].mixer.seen == ((1, 23, 32), [0, 16, 18, 23])
    made, y = logits(mixer("Wide"), lengths)
    assert torch.isfinite(y).all()


def test_the_example_in_the_documentation_works(here):
    docs = Path(__file__).parents[1] / "docs" / "models.md"
    code = docs.read_text().partition("```python\n")[2].partition("```")[0]
    (here / "my_mixers.py").write_text(code)
    target = backbone_parameters(resolve("mamba")(), STACK)
    config = match_width(mixer("GatedMean"), STACK, target)
    assert config.causal
    assert is_matched(backbone_parameters(config, STACK), target)
    assert torch.isfinite(logits(config, torch.tensor([16, 2, 5]))[1]).all()


def test_an_edit_is_another_version(here):
    before = mixer("Wide").version
    assert mixer("Wide").version == before
    with open(here / "my_mixers.py", "a") as file:
        file.write("\n# an edit\n")
    sys.modules.pop("my_mixers")
    assert mixer("Wide").version != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Mixer", "cannot import 'no_such_module'"),
        ("my_mixers:Wyde", "no class 'Wyde' in my_mixers; did you mean 'Wide'"),
        ("my_mixers:Plain", "is no torch.nn.Module class"),
        ("my_mixers:SOURCE", "no class 'SOURCE'"),
        ("my_mixers:", "write package.module:Class"),
        (":Wide", "write package.module:Class"),
        (".my_mixers:Wide", "cannot import"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name, message):
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_a_module_with_a_syntax_error_is_one_sentence(here):
    (here / "my_mixers.py").write_text("def oops(:\n")
    with pytest.raises(UserError, match=r"cannot import 'my_mixers' .*SyntaxError"):
        resolve("my_mixers:Wide")


def test_a_class_that_cannot_be_used_is_one_sentence():
    with pytest.raises(UserError, match=r"Failing\(32\) fails with ValueError: no such width"):
        logits(mixer("Failing"))
    with pytest.raises(UserError, match=r"Failing\(32, width=4\) fails"):
        logits(mixer("Failing", width=4))
    with pytest.raises(UserError, match=r"Narrow must map .*, but maps .* to \(2, 8, 31\)"):
        logits(mixer("Narrow"))
    with pytest.raises(UserError, match=r"Stubborn\(32\) fails with TypeError: .*d_inner"):
        logits(mixer("Stubborn"))


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown key 'gian'; did you mean 'gain'"):
        mixer("Wide", gian=1.0)
    with pytest.raises(UserError, match=r"unknown key 'model\.d_inner'"):
        resolve("my_mixers:Fixed").parse({"d_inner": 4}, where="model")
    with pytest.raises(UserError, match="d_inner"):
        mixer("Wide", d_inner=-1)
