"""ListOps against an evaluator and a generator written the plain, recursive way."""

import hashlib
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.errors import DataUnavailable, UserError
from flexbench.tasks.base import registry
from flexbench.tasks.lra.listops import (
    EOS,
    VOCABULARY,
    ListOps,
    TreeBounds,
    evaluate,
    generate,
    grow,
    majority_by_root,
)
from flexbench.tasks.store import Store

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SMALL = TreeBounds(min_length=20, max_length=100, max_depth=4, max_args=5)


def parse(words):
    """(value, depth, most arguments) of an expression, eaten from the front of `words`."""
    word = words.pop(0)
    if word not in OPERATORS:
        return int(word), 1, 0
    parts = []
    while words[0] != "]":
        parts.append(parse(words))
    words.pop(0)
    values, depths, widths = zip(*parts, strict=True)
    return OPERATORS[word](values), 1 + max(depths), max(len(parts), *widths)


def plain_tree(rng, depth, bounds):
    """The published recursion, as words."""
    if depth == bounds.max_depth or rng.random() > 0.25:
        return [str(rng.randrange(10))]
    words = [rng.choice(list(OPERATORS))]
    for _ in range(rng.randint(2, bounds.max_args)):
        words += plain_tree(rng, depth + 1, bounds)
    return [*words, "]"]


def words_of(forest, index):
    start, stop = forest.sequences.offsets[index : index + 2]
    return [VOCABULARY[token] for token in forest.sequences.flat[start:stop]]


@pytest.mark.parametrize("bounds", [TreeBounds(), SMALL], ids=["published", "small"])
def test_expressions_are_well_formed_and_have_the_values_given(bounds):
    forest = generate(300, bounds, seed=3)
    assert len(forest.values) == 300
    deepest = widest = 0
    for index, value in enumerate(forest.values):
        words = words_of(forest, index)
        assert bounds.min_length < len(words) < bounds.max_length
        found, depth, width = parse(words)
        assert not words
        assert found == value
        deepest, widest = max(deepest, depth), max(widest, width)
    assert deepest == bounds.max_depth
    assert widest == bounds.max_args


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.integers(5, 300),
    st.integers(2, 6),
    st.integers(2, 12),
)
def test_any_bounds_hold(seed, min_length, extra, max_depth, max_args):
    values = {"min_length": min_length, "max_length": min_length + extra}
    values |= {"max_depth": max_depth, "max_args": max_args}
    try:
        bounds = TreeBounds.parse(values)
    except UserError:
        return
    levels = grow(np.random.default_rng(seed), bounds, roots=200)
    values, sizes = evaluate(levels)
    assert len(levels) <= max_depth
    assert ((values >= 0) & (values <= 9)).all()
    assert ((sizes[0] > bounds.min_length) & (sizes[0] < bounds.max_length)).all()
    assert sum(len(level.token) + (level.arity > 0).sum() for level in levels) == sizes[0].sum()


def test_published_acceptance_and_mean_length():
    rng = np.random.default_rng(5)
    lengths = np.concatenate([evaluate(grow(rng, TreeBounds()))[1][0] for _ in range(10)])
    assert len(lengths) / (10 * 8192) == pytest.approx(0.083, abs=0.004)
    assert lengths.mean() == pytest.approx(1040, abs=25)


def test_same_distribution_as_the_plain_recursion():
    rng = random.Random(1)
    plain = [plain_tree(rng, 1, SMALL) for _ in range(60_000)]
    kept = [words for words in plain if SMALL.min_length < len(words) < SMALL.max_length]
    levels = [grow(np.random.default_rng(seed), SMALL, roots=10_000) for seed in range(6)]
    ours = [evaluate(forest) for forest in levels]
    lengths = np.concatenate([sizes[0] for _, sizes in ours])
    values = np.concatenate([values for values, _ in ours])
    share = len(kept) / 60_000
    spread = (share * (1 - share) / 30_000) ** 0.5
    assert len(lengths) / 60_000 == pytest.approx(share, abs=4 * spread)
    mean = statistics.mean(map(len, kept))
    assert lengths.mean() == pytest.approx(mean, abs=4 * lengths.std() * (2 / len(kept)) ** 0.5)
    plain_values = np.bincount([parse(list(words))[0] for words in kept], minlength=10) / len(kept)
    found = np.bincount(values, minlength=10) / len(values)
    assert found == pytest.approx(plain_values, abs=0.02)


def test_same_seed_same_bits_on_every_platform():
    forest = generate(200, TreeBounds(), seed=0)
    again = generate(200, TreeBounds(), seed=0)
    other = generate(200, TreeBounds(), seed=1)
    assert np.array_equal(forest.sequences.flat, again.sequences.flat)
    assert not np.array_equal(forest.sequences.flat[:100], other.sequences.flat[:100])
    assert forest.sequences.flat.dtype == np.uint8
    assert hashlib.sha256(forest.sequences.flat.tobytes()).hexdigest()[:16] == "ba8248e4398f612e"


def test_expressions_are_distinct_and_running_out_is_said():
    tiny = TreeBounds(min_length=3, max_length=5, max_depth=2, max_args=2)
    forest = generate(400, tiny, seed=0)
    assert len({tuple(words_of(forest, index)) for index in range(400)}) == 400
    with pytest.raises(UserError, match="only 400 of 401"):
        generate(401, tiny, seed=0)


@pytest.mark.parametrize(
    "values",
    [
        {"min_length": 500, "max_length": 500},
        {"max_length": -1},
        {"max_depth": 2, "max_args": 5, "min_length": 20, "max_length": 40},
        {"max_dept": 3},
    ],
)
def test_bad_options_are_refused_in_a_sentence(values):
    with pytest.raises(UserError):
        ListOps.parse(values)


def test_the_task_end_to_end(tmp_path):
    store = Store(cache=tmp_path)
    task = registry.get("listops")(
        **{**SMALL.model_dump(), "train": 3000, "validation": 200, "test": 500}
    )
    with pytest.raises(DataUnavailable):
        task.load(store)
    task.prepare(store)
    data = task.load(store)
    assert [len(data.train), len(data.validation), len(data.test)] == [3000, 200, 500]
    assert data.source.kind == "regenerated"

    batch = data.test.batch(np.array([7, 2, 300]))
    for row, length, label in zip(batch.inputs, batch.lengths, batch.labels, strict=True):
        assert row[length - 1] == EOS
        assert (row[length:] == 0).all()
        assert parse([VOCABULARY[token] for token in row[: length - 1]])[0] == label
    assert batch.inputs.max() < data.spec.vocab_size
    assert batch.inputs.shape[1] <= data.spec.max_length

    trivial = task.trivial_predictors(data)
    assert 0.05 < trivial["majority class"] < 0.2
    assert 0.18 < trivial["majority given the root operator"] < 0.32


def test_majority_by_root_is_the_best_constant_for_each_operator(tmp_path):
    task = ListOps(**SMALL.model_dump(), train=4000, validation=1, test=1000)
    forest = generate(5001, SMALL, seed=0)
    roots = [words_of(forest, index)[0] for index in range(5001)]
    best = {
        root: statistics.mode(
            value
            for value, other in zip(forest.values[:4000], roots, strict=False)
            if other == root
        )
        for root in set(roots)
    }
    right = [
        best[root] == value for root, value in zip(roots[4001:], forest.values[4001:], strict=True)
    ]
    store = Store(cache=tmp_path)
    task.prepare(store)
    data = task.load(store)
    assert majority_by_root(data.train, data.test) == pytest.approx(np.mean(right))


@pytest.mark.parametrize("preset", ["quick", "small", "paper"])
def test_presets_are_valid(preset):
    chosen = ListOps.presets[preset]
    task = ListOps.parse(chosen.options)
    assert task.max_length <= 2000
    assert chosen.training.steps * chosen.training.batch_size >= 0.8 * task.train
