"""Pictures of snakes (dashed curves), by the procedure of Linsley et al. (arXiv 1805.08315).

The rules are those of `snakes2.py` in github.com/drewlinsley/pathfinder, from which the LRA
Pathfinder sets were made. There one picture is drawn at a time, and hundreds of pairs of snakes are
begun for each that fits. Here many are grown in lockstep and the failures dropped, which keeps the
same distribution; and since orientations come from a finite set, every paddle is drawn once.

Coordinates are (row, column). A *heading* is an index into the finite set of orientations: first
the 360 whole degrees of a snake's first paddle, then the points of the ring on which the next
paddle's far end (its *tip*) is chosen, seen from the *pivot* at the ring's centre.
"""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from flexbench.config import StrictModel
from flexbench.errors import UserError

DEGREES = 360
FINER = 2
"""Lines and discs are drawn so many times finer, then reduced."""
PADDING = 1
"""Width of the border that snakes keep out of."""
BLOCKED = 76
"""A cell whose mask is above this cannot hold a first paddle (0.3 of 255)."""
CLASH = 459
"""Two masks that add up to this collide (1.8 of 255)."""
DEAD_END = 1e-4
PADDLE_TRIES = 3
DISTRACTOR_TRIES = 5
LEAST_FREE = 0.01
PAIRS_AT_ONCE = 128
BARREN = 200
"""So many batches of `PAIRS_AT_ONCE` pairs without one that fits, and none will."""


class Picture(StrictModel):
    """What is drawn. Lengths are in pixels; the defaults are LRA's Pathfinder at 32 x 32.

    Contrasts are relative to the discs', which is 1; the brightest is stretched to 255.
    """

    size: int = Field(32, ge=8, le=512, description="side of the image")
    contour_length: int = Field(14, ge=2, description="paddles in each of the two long snakes")
    continuity: float = Field(1.0, gt=0.0, description="the higher, the straighter")
    paddle_length: PositiveInt = 2
    paddle_thickness: float = Field(0.5, gt=0.0)
    paddle_margins: tuple[PositiveInt, ...] = Field((1,), min_length=1)
    seed_distance: PositiveInt = Field(7, description="between the first tips of the two snakes")
    marker_radius: float = Field(1.5, gt=0.0)
    distractors: NonNegativeInt = 5
    distractor_length: PositiveInt = 4
    target_contrast: float = Field(1.5, gt=0.0)
    distractor_contrast: float = Field(2.0, gt=0.0)

    @field_validator("paddle_thickness")
    @classmethod
    def _whole_when_finer(cls, value: float) -> float:
        if value * FINER != round(value * FINER):
            raise ValueError(f"must be a multiple of {1 / FINER}")
        return value

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.size <= 4 * self.seed_distance:
            raise ValueError("size must be more than four times seed_distance")
        return self


def _turn_round(angle: np.ndarray) -> np.ndarray:
    return np.where(angle < 0, angle + np.pi, angle - np.pi)


def _displacement(angle: np.ndarray, distance: float) -> np.ndarray:
    """(..., 2) floats, free of the last bits by which platforms differ."""
    return np.round(distance * np.stack([np.sin(angle), np.cos(angle)], -1), 9)


def _whole_displacement(angle: np.ndarray, distance: float) -> np.ndarray:
    return np.ceil(_displacement(angle, distance)).astype(np.int64)


def _disc(radius: int) -> np.ndarray:
    """(cells, 2): displacements at most `radius` long."""
    row, column = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    inside = row**2 + column**2 <= radius**2
    return np.stack([row[inside], column[inside]], axis=1)


def _meets_every_quadrant(cells: np.ndarray) -> bool:
    return all((cells * signs >= 0).all(axis=1).any() for signs in product((1, -1), repeat=2))


def _reduce(fine: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(fine).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def marker(picture: Picture, center: np.ndarray) -> np.ndarray:
    """(size, size) uint8: the anti-aliased disc around `center`."""
    row, column = np.ogrid[: picture.size * FINER, : picture.size * FINER]
    square = (row - center[0] * FINER) ** 2 + (column - center[1] * FINER) ** 2
    inside = square <= (picture.marker_radius * FINER) ** 2
    return _reduce(np.where(inside, 255, 0).astype(np.uint8), picture.size)


class Stamps:
    """Small pictures, one a heading, as lists of their lit cells.

    Args:
        pictures: (headings, 2 * reach + 1, 2 * reach + 1) uint8.
        side: of the square canvases that the stamps go on.

    Attributes:
        offsets: (headings, cells) from the centre's cell; all lit ones, and dark ones to fill up.
        values: (headings, cells) uint8.
    """

    def __init__(self, pictures: np.ndarray, side: int) -> None:
        reach = pictures.shape[1] // 2
        steps = np.arange(-reach, reach + 1)
        window = (steps[:, None] * side + steps).ravel()
        flat = pictures.reshape(len(pictures), -1).astype(np.int16)
        most = int((flat > 0).sum(axis=1).max())
        brightest = np.argsort(-flat, axis=1, kind="stable")[:, :most]
        self.offsets = window[brightest]
        self.values = np.take_along_axis(flat, brightest, axis=1).astype(np.uint8)

    def press(self, canvases: np.ndarray, center: np.ndarray, heading: np.ndarray) -> None:
        """Take the maximum with a stamp around each cell of `center`, into `canvases` (flat)."""
        cells = center[:, None] + self.offsets[heading]
        canvases[cells] = np.maximum(canvases[cells], self.values[heading])

    def collide(self, canvases: np.ndarray, center: np.ndarray, heading: np.ndarray) -> np.ndarray:
        """Whether canvas and stamp add up to `CLASH` anywhere: (centers,) bool."""
        taken = canvases[center[:, None] + self.offsets[heading]].astype(np.int16)
        return (taken + self.values[heading]).max(axis=1) >= CLASH


class Grower:
    """Grows snakes with paddles of one margin; all geometry is in tables made once.

    A *mask* is a (side * side) uint8 picture of what is taken, with a rim of 255 around the image
    so wide that no step needs a bounds check.
    """

    def __init__(self, picture: Picture, margin: int) -> None:
        self.picture = picture
        length = picture.paddle_length
        self.margin = margin
        self.reach = length + math.ceil(picture.paddle_thickness) + margin
        self.rim = self.reach + 2 * (length + 2 * margin)
        self.side = picture.size + 2 * self.rim

        degrees = np.deg2rad(np.arange(-180, 180))
        radius = length + margin
        around = np.deg2rad(np.arange(0, 360, 360 / (2 * np.pi * radius)))
        ring = np.floor(_displacement(around, radius)).astype(np.int64)
        self.ring = np.unique(ring, axis=0)
        ahead = np.arctan2(self.ring[:, 0], self.ring[:, 1])
        headings = np.concatenate([degrees, ahead])

        # From its tip, a first paddle is drawn forwards and every later one back to its pivot.
        drawn = np.concatenate([degrees, _turn_round(ahead)])
        stamps = [self._paddle(angle) for angle in drawn]
        masks = np.stack([mask for _, mask in stamps])
        self.lines = Stamps(np.stack([line for line, _ in stamps]), self.side)
        self.masks = Stamps(masks, self.side)

        turn = np.abs(headings[:, None] - ahead)
        turn = np.minimum(turn, 2 * np.pi - turn) * picture.continuity
        liking = np.cos(np.minimum(turn, np.pi / 2)) ** 2
        liking[liking < 1e-12] = 0.0
        most = int((liking > 0).sum(axis=1).max())
        self.options = np.sort(np.argsort(-liking, axis=1, kind="stable")[:, :most], axis=1)
        self.liking = np.take_along_axis(liking, self.options, axis=1)

        self.stride = _whole_displacement(headings, length + 2 * margin)
        back = _turn_round(degrees)
        self.head = _whole_displacement(degrees, length)
        self.pivot = self.head + _whole_displacement(back, length + margin)

        self.near = self._offsets(_disc(margin))
        self.ring_offsets = self._offsets(self.ring)

        taken = np.full((self.side, self.side), 255, np.uint8)
        edge = self.rim + PADDING
        taken[edge:-edge, edge:-edge] = 0
        self.empty = taken.ravel()

        self.footprints = [self._footprint(mask) for mask in masks[:DEGREES]]
        # The original gives up on a heading whose whole footprint falls outside the image for a
        # cell in some corner (its dilation is negative there). Thin paddles lose most headings.
        self.usable = np.array([_meets_every_quadrant(cells) for cells in self.footprints])
        middle = taken.copy()
        edge = self.rim + 2 * picture.seed_distance
        middle[:edge] = middle[-edge:] = 255
        middle[:, :edge] = middle[:, -edge:] = 255
        starts = {
            int(degree): self._free(middle > BLOCKED, int(degree))
            for degree in np.flatnonzero(self.usable)
        }
        self.starts = {degree: cells for degree, cells in starts.items() if len(cells)}
        if not self.starts:
            raise UserError(
                f"no first paddle of length {length} and margin {margin} fits the middle of "
                f"{picture.size} x {picture.size} pixels; lower seed_distance"
            )

    def _offsets(self, displacement: np.ndarray) -> np.ndarray:
        return displacement[..., 0] * self.side + displacement[..., 1]

    def _cell(self, canvas: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
        """Index of a coordinate in canvases laid end to end, `canvas` being which of them."""
        return canvas * self.side**2 + self._offsets(coordinate + self.rim)

    def _fits_inside(self, tip: np.ndarray, heading: np.ndarray) -> np.ndarray:
        """Whether a first paddle's head and pivot lie in the image."""
        ends = np.stack([tip + self.head[heading], tip + self.pivot[heading]])
        return np.all((ends >= 0) & (ends < self.picture.size), axis=(0, -1))

    def _paddle(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The line from the centre at `angle`, and its mask: the line widened by the margin."""
        center = self.reach * FINER
        row, column = _whole_displacement(angle, self.picture.paddle_length * FINER)
        image = Image.new("L", (2 * center + 1, 2 * center + 1))
        ImageDraw.Draw(image).line(
            [(center, center), (center + int(column), center + int(row))],
            fill=255,
            width=round(self.picture.paddle_thickness * FINER),
        )
        line = np.array(image)
        cells = (np.argwhere(line)[:, None] + _disc(self.margin * FINER)).reshape(-1, 2)
        cells = cells[((cells >= 0) & (cells < len(line))).all(axis=1)]
        mask = np.zeros_like(line)
        mask[cells[:, 0], cells[:, 1]] = 255
        side = 2 * self.reach + 1
        return _reduce(line, side), _reduce(mask, side)

    def _footprint(self, mask: np.ndarray) -> np.ndarray:
        """Displacements from a first paddle's tip that must be free.

        One cell off the mask's own, towards larger coordinates, as in the original.
        """
        cells = np.argwhere(mask == 255) - self.reach + 1
        limit = self.picture.paddle_length + self.margin
        return cells[(np.abs(cells) <= limit).all(axis=1)]

    def _free(self, blocked: np.ndarray, degree: int) -> np.ndarray:
        """(cells, 2): where a first paddle can have its tip. `blocked` is (side, side) bool."""
        start, stop = self.rim, self.rim + self.picture.size
        taken = np.zeros((self.picture.size, self.picture.size), bool)
        for row, column in self.footprints[degree]:
            taken |= blocked[start + row : stop + row, start + column : stop + column]
        return np.argwhere(~taken)

    def _extend(
        self,
        rng: np.random.Generator,
        masks: np.ndarray,
        rows: np.ndarray,
        pivot: np.ndarray,
        heading: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One more paddle for each snake: whether there was room, new pivot, heading and tip."""
        pivot = pivot + self.stride[heading]
        options = self.options[heading]
        cells = self._cell(rows, pivot)[:, None] + self.ring_offsets[options]
        crowding = masks[cells[:, :, None] + self.near].max(axis=-1)
        weight = ((1 - crowding / 255) * self.liking[heading]).cumsum(axis=1)
        fits = np.zeros(len(rows), bool)
        chosen = np.zeros(len(rows), np.int64)
        trying = np.flatnonzero(weight[:, -1] >= DEAD_END)
        for _ in range(PADDLE_TRIES):
            level = rng.random(len(trying)) * weight[trying, -1]
            pick = (weight[trying] > level[:, None]).argmax(axis=1)
            chosen[trying] = options[trying, pick]
            clash = self.masks.collide(masks, cells[trying, pick], DEGREES + chosen[trying])
            fits[trying[~clash]] = True
            trying = trying[clash]
        return fits, pivot, DEGREES + chosen, pivot + self.ring[chosen]

    def _pairs(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of `PAIRS_AT_ONCE` pairs of long snakes that grow to their length.

        Returns:
            masks (pairs, side * side); tips (pairs, paddles, 2 snakes, 2) and headings
            (pairs, paddles, 2 snakes).
        """
        picture, count = self.picture, PAIRS_AT_ONCE
        headings_a = rng.choice(np.array(list(self.starts)), size=count)
        headings_b = rng.integers(DEGREES, size=count)
        heading = np.stack([headings_a, headings_b], axis=1)
        tip_a = np.stack([rng.choice(self.starts[int(degree)]) for degree in headings_a])
        bearing = np.deg2rad(rng.integers(360, size=count))
        away = np.round(_displacement(bearing, picture.seed_distance)).astype(np.int64)
        tip = np.stack([tip_a, tip_a + away], axis=1)
        rows = np.flatnonzero(self._fits_inside(tip, heading).all(axis=1))
        masks = np.tile(self.empty, len(tip))
        pivot = tip + self.pivot[heading]
        tips, headings = [tip], [heading]
        for _ in range(picture.contour_length - 1):
            tip, heading, pivot = tip.copy(), heading.copy(), pivot.copy()
            for snake in range(2):
                old = tip[rows, snake], heading[rows, snake]
                fits, *new = self._extend(rng, masks, rows, pivot[rows, snake], old[1])
                pivot[rows, snake], heading[rows, snake], tip[rows, snake] = new
                rows = rows[fits]
                self.masks.press(masks, self._cell(rows, old[0][fits]), old[1][fits])
            tips.append(tip)
            headings.append(heading)
        # The original leaves the first snake's last paddle out of the mask.
        self.masks.press(masks, self._cell(rows, tip[rows, 1]), heading[rows, 1])
        return (
            masks.reshape(len(tip), -1)[rows],
            np.stack(tips, axis=1)[rows],
            np.stack(headings, axis=1)[rows],
        )

    def _first_paddles(
        self, rng: np.random.Generator, masks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where a distractor can begin in each mask: whether it can, its tip and its heading."""
        count, size = len(masks), self.picture.size
        heading = rng.integers(DEGREES, size=count)
        share = rng.random(count)
        tip = np.zeros((count, 2), np.int64)
        fits = np.zeros(count, bool)
        for index, taken in enumerate(masks):
            blocked = taken.reshape(self.side, self.side) > BLOCKED
            free = self.side**2 - np.count_nonzero(blocked)
            if free < LEAST_FREE * size**2 or not self.usable[heading[index]]:
                continue
            cells = self._free(blocked, heading[index])
            if len(cells):
                tip[index] = cells[int(share[index] * len(cells))]
                fits[index] = True
        return fits & self._fits_inside(tip, heading), tip, heading

    def _distract(self, rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
        """Add distractors to the masks, as many as fit; returns their lines, (n, side * side)."""
        lines = np.zeros_like(masks)
        for _ in range(self.picture.distractors):
            waiting = np.arange(len(masks))
            for _ in range(DISTRACTOR_TRIES):
                trial = masks[waiting]
                fits, tip, heading = self._first_paddles(rng, trial)
                rows = np.flatnonzero(fits)
                tip, heading = tip[rows], heading[rows]
                pivot = tip + self.pivot[heading]
                paddles = [(tip, heading)]
                for _ in range(self.picture.distractor_length - 1):
                    fits, *new = self._extend(rng, trial.reshape(-1), rows, pivot, heading)
                    self.masks.press(trial.reshape(-1), self._cell(rows, tip), heading)
                    rows = rows[fits]
                    pivot, heading, tip = (column[fits] for column in new)
                    paddles = [(a[fits], b[fits]) for a, b in paddles] + [(tip, heading)]
                self.masks.press(trial.reshape(-1), self._cell(rows, tip), heading)
                masks[waiting[rows]] = trial[rows]
                for tip, heading in paddles:
                    self.lines.press(lines.reshape(-1), self._cell(waiting[rows], tip), heading)
                waiting = np.delete(waiting, rows)
        return lines

    def draw(self, rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One picture a label: images (n, size, size) uint8 and markers (n, 2, 2)."""
        count = len(labels)
        found: list[tuple[np.ndarray, ...]] = []
        have = barren = 0
        while have < count:
            found.append(self._pairs(rng))
            grown = len(found[-1][0])
            have += grown
            barren = 0 if grown else barren + 1
            if barren == BARREN:
                raise UserError(
                    f"two snakes of {self.picture.contour_length} paddles do not fit "
                    f"{self.picture.size} x {self.picture.size} pixels; lower contour_length"
                )
        masks, tips, headings = (
            np.concatenate(column)[:count] for column in zip(*found, strict=True)
        )
        targets = np.zeros_like(masks)
        everyone = np.arange(count)
        for paddle in range(self.picture.contour_length):
            for snake in range(2):
                tip, heading = tips[:, paddle, snake], headings[:, paddle, snake]
                self.lines.press(targets.reshape(-1), self._cell(everyone, tip), heading)
        others = self._distract(rng, masks)
        start = rng.integers(2, size=count)
        end = np.where(labels == 1, start, 1 - start)
        markers = np.stack([tips[everyone, 0, start], tips[everyone, -1, end]], axis=1)
        return self._compose(targets, others, markers), markers

    def _compose(self, targets: np.ndarray, others: np.ndarray, markers: np.ndarray) -> np.ndarray:
        picture, inner = self.picture, slice(self.rim, self.rim + self.picture.size)
        shape = (len(targets), self.side, self.side)
        image = targets.reshape(shape)[:, inner, inner] * picture.target_contrast
        light = others.reshape(shape)[:, inner, inner] * picture.distractor_contrast
        np.maximum(image, light, out=image)
        for index, pair in enumerate(markers):
            for center in pair:
                np.maximum(image[index], marker(picture, center), out=image[index])
        brightest = image.max(axis=(1, 2), keepdims=True)
        return np.round(image * (255 / brightest)).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def grower(picture: Picture, margin: int) -> Grower:
    """The tables for one margin, made once a process."""
    return Grower(picture, margin)


class Drawing(NamedTuple):
    """Pictures.

    images (count, size * size) uint8; labels (count,) uint8, 1 where one snake joins the two discs;
    markers (count, 4) uint16, row and column of the disc at a first tip, then of that at a last.
    """

    images: np.ndarray
    labels: np.ndarray
    markers: np.ndarray


def draw(picture: Picture, count: int, seed: np.random.SeedSequence) -> Drawing:
    """`count` pictures, half of each label, in random order; the same for the same arguments."""
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = rng.permutation(np.arange(count) % 2).astype(np.uint8)
    margin = rng.integers(len(picture.paddle_margins), size=count)
    images = np.empty((count, picture.size**2), np.uint8)
    markers = np.empty((count, 4), np.uint16)
    for index, width in enumerate(picture.paddle_margins):
        members = np.flatnonzero(margin == index)
        if not len(members):
            continue
        drawn, ends = grower(picture, width).draw(rng, labels[members])
        images[members] = drawn.reshape(len(members), -1)
        markers[members] = ends.reshape(len(members), -1)
    return Drawing(images, labels, markers)
