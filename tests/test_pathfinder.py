"""Pathfinder against a plain, one-picture-at-a-time reading of the published procedure."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from flexbench.errors import DataUnavailable, UserError
from flexbench.tasks.base import registry
from flexbench.tasks.lra import pathfinder, snakes
from flexbench.tasks.lra.pathfinder import MarkedSplit, PathX, threshold_on_distance
from flexbench.tasks.lra.snakes import Grower, Picture, draw, marker
from flexbench.tasks.store import Store

TINY = {"size": 12, "contour_length": 2, "seed_distance": 2, "distractors": 0}
LARGE = Picture(
    size=64,
    contour_length=3,
    continuity=1.8,
    paddle_length=5,
    paddle_thickness=1.5,
    paddle_margins=(2,),
    seed_distance=10,
    marker_radius=3,
)


def step(start, angle, distance):
    row = start[0] + round(distance * math.sin(angle), 9)
    column = start[1] + round(distance * math.cos(angle), 9)
    return math.ceil(row), math.ceil(column)


def opposite(angle):
    return angle + math.pi if angle < 0 else angle - math.pi


def plain_mask(picture, margin, shape, start, angle):
    """The mask of a paddle in an image of `shape`: floats in [0, 1]."""
    reach = picture.paddle_length + math.ceil(picture.paddle_thickness) + margin
    side, center = 2 * reach + 1, 2 * reach
    fine = Image.new("L", (2 * center + 1, 2 * center + 1))
    row, column = step((center, center), angle, 2 * picture.paddle_length)
    width = round(2 * picture.paddle_thickness)
    ImageDraw.Draw(fine).line([(center, center), (column, row)], fill=255, width=width)
    row, column = np.ogrid[-2 * margin : 2 * margin + 1, -2 * margin : 2 * margin + 1]
    disc = row**2 + column**2 <= 4 * margin**2
    wide = ndimage.grey_dilation(np.array(fine), footprint=disc, mode="constant")
    small = np.array(Image.fromarray(wide).resize((side, side), Image.Resampling.LANCZOS)) / 255
    mask = np.zeros(shape)
    top, left = start[0] - reach, start[1] - reach
    rows = slice(max(top, 0), min(top + side, shape[0]))
    columns = slice(max(left, 0), min(left + side, shape[1]))
    mask[rows, columns] = small[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    return mask


def plain_extend(rng, picture, margin, mask, pivot, angle):
    """(mask of the new paddle, pivot, angle, tip), or None where there is no room."""
    size, radius = picture.size, picture.paddle_length + margin
    pivot = step(pivot, angle, radius + margin)
    around = np.deg2rad(np.arange(0, 360, 360 / (2 * np.pi * radius)))
    cells = np.stack([pivot[0] + radius * np.sin(around), pivot[1] + radius * np.cos(around)], 1)
    cells = cells[((cells >= 0) & (cells < size)).all(axis=1)].astype(int)
    cells = np.unique(cells, axis=0)
    if not len(cells):
        return None
    angles = np.arctan2(*(cells - pivot).T)
    turn = np.minimum(abs(angles - angle), 2 * np.pi - abs(angles - angle))
    liking = np.cos(np.minimum(turn * picture.continuity, np.pi / 2)) ** 2
    row, column = np.ogrid[-margin : margin + 1, -margin : margin + 1]
    disc = row**2 + column**2 <= margin**2
    crowding = ndimage.grey_dilation(mask, footprint=disc, mode="constant")
    weights = (1 - crowding[cells[:, 0], cells[:, 1]]) * liking
    if weights.sum() < 1e-4:
        return None
    for _ in range(3):
        chosen = rng.choice(len(cells), p=weights / weights.sum())
        tip = tuple(cells[chosen])
        paddle = plain_mask(picture, margin, mask.shape, tip, opposite(angles[chosen]))
        if (mask + paddle).max() < 1.8:
            return paddle, pivot, angles[chosen], tip
    return None


def plain_pair(rng, picture, margin):
    """First and last tips of two snakes, [(first, last), (first, last)].

    [] where they ran out of room, None where the first paddle already did.
    """
    size, length, apart = picture.size, picture.paddle_length, picture.seed_distance
    mask = np.pad(np.zeros((size - 2, size - 2)), 1, constant_values=1.0)
    lined = np.pad(np.zeros((size - 4 * apart,) * 2), 2 * apart, constant_values=1.0)
    limit = length + margin
    angle = np.deg2rad(rng.integers(-180, 180))
    shape = (2 * limit + 1, 2 * limit + 1)
    struct = plain_mask(picture, margin, shape, (limit + 1, limit + 1), angle) == 1
    room = np.pad(lined, limit, constant_values=-np.inf)
    taken = np.max([room[r : r + size, c : c + size] for r, c in np.argwhere(struct)], axis=0)
    if taken.min() < 0:
        return None
    free = np.argwhere(np.ceil(taken - 0.3) <= 0)
    if not len(free):
        return None
    first = tuple(rng.choice(free))
    bearing = np.deg2rad(rng.integers(360))
    second = (
        round(first[0] + apart * math.sin(bearing)),
        round(first[1] + apart * math.cos(bearing)),
    )
    pair = []
    for tip, direction in ((first, angle), (second, np.deg2rad(rng.integers(-180, 180)))):
        head = step(tip, direction, length)
        back = direction + np.pi if direction < 0 else direction - np.pi
        pivot = step(head, back, length + margin)
        paddle = plain_mask(picture, margin, mask.shape, tip, direction)
        pair.append((paddle, pivot, direction, tip))
    for _ in range(picture.contour_length - 1):
        for index, (paddle, pivot, direction, _) in enumerate(pair):
            grown = plain_extend(rng, picture, margin, mask, pivot, direction)
            if grown is None:
                return []
            mask = np.maximum(mask, paddle)
            pair[index] = grown
    return [(first, pair[0][3]), (second, pair[1][3])]


@pytest.mark.parametrize(
    ("picture", "attempts"),
    [(Picture(contour_length=6), 3000), (LARGE, 150)],
    ids=["as at 32", "as at 128"],
)
def test_snakes_grow_as_in_the_plain_procedure(picture, attempts):
    margin = picture.paddle_margins[0]
    rng = np.random.default_rng(0)
    plain = [plain_pair(rng, picture, margin) for _ in range(attempts)]
    begun = [pair for pair in plain if pair is not None]
    grown = [pair for pair in begun if pair]
    attempts, share = len(begun), len(grown) / len(begun)
    assert 0.1 < share < 0.9

    grower = Grower(picture, margin)
    batches = [grower._pairs(rng) for _ in range(10)]
    tips = np.concatenate([tips for _, tips, _ in batches])
    ours = len(tips) / (10 * snakes.PAIRS_AT_ONCE)
    assert ours == pytest.approx(share, abs=4 * (share * (1 - share) / attempts) ** 0.5)

    plain_reach = np.array([math.dist(*ends) for pair in grown for ends in pair])
    reach = np.hypot(*np.moveaxis(tips[:, -1] - tips[:, 0], -1, 0)).ravel()
    error = plain_reach.std() * (2 / len(grown)) ** 0.5
    assert reach.mean() == pytest.approx(plain_reach.mean(), abs=4 * error)
    assert reach.std() == pytest.approx(plain_reach.std(), abs=4 * error)


@pytest.mark.parametrize("picture", [Picture(), LARGE], ids=["as at 32", "as at 128"])
def test_paddles_are_drawn_as_in_the_plain_procedure(picture):
    margin = picture.paddle_margins[0]
    grower = Grower(picture, margin)
    center = grower.side // 2
    for degree in (0, 37, 180, 270, 301):
        ours = np.zeros(grower.side**2, np.uint8)
        grower.masks.press(ours, np.array([center * (grower.side + 1)]), np.array([degree]))
        angle = np.deg2rad(degree - 180)
        plain = plain_mask(picture, margin, (grower.side,) * 2, (center, center), angle)
        assert np.array_equal(ours.reshape(plain.shape), np.round(plain * 255))


def test_snakes_keep_their_distance_and_stay_inside():
    picture = Picture()
    _, tips, _ = Grower(picture, 1)._pairs(np.random.default_rng(0))
    assert tips.shape[1:] == (picture.contour_length, 2, 2)
    assert tips[:, 1:].min() >= 2
    assert tips[:, 1:].max() <= picture.size - 3
    gaps = np.hypot(*np.moveaxis(np.diff(tips, axis=1), -1, 0))
    assert gaps.min() > 1
    assert gaps.max() <= 2 * (picture.paddle_length + 2) + 1
    apart = np.hypot(*np.moveaxis(tips[:, 0, 0] - tips[:, 0, 1], -1, 0))
    assert apart == pytest.approx(picture.seed_distance, abs=0.75)


def test_labels_say_whether_one_snake_joins_the_discs():
    # Two short snakes far apart: the discs are near each other only when on one snake.
    picture = Picture(size=64, contour_length=2, seed_distance=15, distractors=2)
    drawing = draw(picture, 60, np.random.SeedSequence(4))
    ends = drawing.markers.astype(int)
    distance = np.hypot(ends[:, 0] - ends[:, 2], ends[:, 1] - ends[:, 3])
    assert (distance[drawing.labels == 1] < 8).all()
    assert (distance[drawing.labels == 0] > 8).all()
    assert drawing.labels.sum() == 30


@pytest.mark.parametrize("contrasts", [(1.5, 2.0), (0.5, 0.25)])
def test_discs_and_lines_have_their_contrasts(contrasts):
    picture = Picture(target_contrast=contrasts[0], distractor_contrast=contrasts[1])
    drawing = draw(picture, 20, np.random.SeedSequence(0))
    brightest = max(1.0, *contrasts)
    assert drawing.images.dtype == np.uint8
    assert (drawing.images.max(axis=1) == 255).all()
    assert (drawing.images.min(axis=1) == 0).all()
    for image, ends in zip(drawing.images.reshape(-1, 32, 32), drawing.markers, strict=True):
        for center in ends.reshape(2, 2).astype(int):
            disc = marker(picture, center) / brightest
            assert (image >= np.floor(disc)).all()
            assert image[tuple(center)] >= round(255 / brightest)


def test_distractors_are_added_and_never_cross_the_border():
    with_none = draw(Picture(distractors=0), 30, np.random.SeedSequence(1))
    with_five = draw(Picture(), 30, np.random.SeedSequence(1))
    lit = (with_five.images > 0).sum() - (with_none.images > 0).sum()
    paddles_lit = lit / 30 / (5 * 4)
    assert 1 < paddles_lit < 12


def test_the_same_pictures_whatever_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(pathfinder, "SHARD", 10)
    picture = Picture(**TINY)

    def pictures(cores):
        monkeypatch.setattr(pathfinder, "_cores", lambda: cores)
        shards = list(pathfinder._shards(picture, 85, 7))
        assert [len(shard.labels) for shard in shards] == [10] * 8 + [5]
        return [np.concatenate(column) for column in zip(*shards, strict=True)]

    alone, together = pictures(1), pictures(2)
    for ours, theirs in zip(alone, together, strict=True):
        assert np.array_equal(ours, theirs)
    assert len(np.unique(alone[0], axis=0)) > 80


def test_the_task_end_to_end(tmp_path):
    store = Store(cache=tmp_path)
    sizes = {"train": 300, "validation": 40, "test": 60}
    task = registry.get("pathfinder")(**TINY, **sizes)
    with pytest.raises(DataUnavailable):
        task.load(store)
    task.prepare(store)
    data = task.load(store)
    assert [len(data.train), len(data.validation), len(data.test)] == [300, 40, 60]
    batch = data.test.batch(np.array([5, 3]))
    assert batch.inputs.shape == (2, data.spec.max_length, 1) == (2, 144, 1)
    assert batch.lengths is None
    assert batch.inputs.min() == -1
    assert batch.inputs.max() == 1
    assert set(task.trivial_predictors(data)) == {
        "majority class",
        "distance of the discs",
        "linear on pixel statistics",
    }
    assert data.source.kind == "regenerated"


@pytest.mark.parametrize("farther", [False, True])
def test_threshold_on_distance_finds_the_best_rule(farther):
    rng = np.random.default_rng(0)
    markers = np.concatenate([np.zeros((400, 2)), rng.integers(0, 20, (400, 2))], axis=1)
    distance = np.hypot(markers[:, 2], markers[:, 3])
    labels = ((distance > 9) == farther).astype(np.uint8)
    labels[::10] ^= 1
    images = np.zeros((400, 4), np.uint8)
    split = MarkedSplit(images, markers, labels)
    best = max(np.mean(((distance > t) == up) == (labels == 1)) for t in distance for up in (0, 1))
    assert threshold_on_distance(split, split) == pytest.approx(best)
    assert best >= 0.9


@pytest.mark.parametrize(
    "values",
    [
        {"size": 16, "seed_distance": 4},
        {"paddle_thickness": 0.3},
        {"paddle_margins": []},
        {"contour_length": -14},
        {"countour_length": 9},
        {"paddle_margins": "wide"},
    ],
)
def test_bad_options_are_refused_in_a_sentence(values):
    with pytest.raises(UserError):
        registry.get("pathfinder").parse(values)


def test_what_cannot_be_drawn_is_said(monkeypatch):
    monkeypatch.setattr(snakes, "BARREN", 5)
    with pytest.raises(UserError, match="lower contour_length"):
        draw(Picture(**{**TINY, "contour_length": 30}), 2, np.random.SeedSequence(0))


@pytest.mark.parametrize("name", ["pathfinder", "pathx"])
def test_presets_are_valid(name):
    task = registry.get(name)
    for chosen in task.presets.values():
        task.parse(chosen.options)
    assert set(task.presets) | set(task.omitted) == {"quick", "small", "paper"}


def test_pathx_is_drawn_with_the_published_parameters():
    task = PathX()
    assert (task.size, task.paddle_margins, task.seed_distance) == (128, (2, 3), 20)
    drawing = draw(
        Picture(**{key: getattr(task, key) for key in Picture.model_fields}),
        2,
        np.random.SeedSequence(0),
    )
    assert drawing.images.shape == (2, 16_384)
