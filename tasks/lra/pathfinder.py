"""Pathfinder and Path-X: does one dashed curve join the two discs? Regenerated; see `snakes`."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.arrays import ValueSplit
from flexbench.tasks.base import Split, Task, TaskData, registry
from flexbench.tasks.lra import PUBLISHED_SOURCE
from flexbench.tasks.lra.snakes import Drawing, Picture, draw
from flexbench.tasks.store import DataSource, Store, create_array

SHARD = 250
"""Pictures drawn from one random stream; fixes the data, whatever the number of processes."""


class MarkedSplit(ValueSplit):
    """Pictures as values in [-1, 1], row by row, and where their two discs are.

    Args:
        images: (pictures, length) uint8; may be memory-mapped.
        markers: (pictures, 4): row and column of one disc, then of the other.
        labels: (pictures,) integers.
    """

    def __init__(self, images: np.ndarray, markers: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(images, labels, scale=2 / 255, shift=-1.0)
        self.markers = markers

    def distances(self) -> np.ndarray:
        """(pictures,) between the discs' centres, in pixels."""
        first, second = np.split(np.asarray(self.markers, np.float64), 2, axis=1)
        return np.hypot(*(first - second).T)


@registry.register("pathfinder")
class Pathfinder(Picture, Task):
    """Two-way classification of pictures. Options are the generator's."""

    view: ClassVar[Literal["sequence", "image"]] = "image"
    suite: ClassVar[str] = "lra"
    summary: ClassVar[str] = "are the two discs on one dashed curve? 32 x 32 pixels in a row"
    chance: ClassVar[float] = 0.5
    license: ClassVar[str] = "generated; procedure of drewlinsley/pathfinder (MIT)"
    published: ClassVar[dict[str, float]] = {
        "transformer": 71.40,
        "s4": 94.20,
        "s4d": 93.06,
        "s5": 95.33,
        "mega": 96.01,
        "mamba": 69.26,
        "mamba2": 75.45,
        "b2s6": 95.93,
    }
    published_source: ClassVar[str] = PUBLISHED_SOURCE
    presets: ClassVar[dict[str, Preset]] = {
        "small": Preset(
            l0=32,
            options={"train": 50_000, "validation": 2000, "test": 5000},
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(
                steps=15_000,
                batch_size=64,
                learning_rates=(1e-3, 2e-3, 4e-3),
                ssm_learning_rate=1e-3,
            ),
        ),
        "paper": Preset(
            l0=32,
            stack=StackConfig(d_model=256, n_layers=6),
            training=TrainingConfig(
                steps=200 * 2500,
                batch_size=64,
                learning_rates=(4e-3,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=100,
                validation_examples=20_000,
            ),
        ),
    }

    omitted: ClassVar[dict[str, str]] = {
        "quick": "even 10 x 10 pixels and two paddles a curve are not learnt in minutes on a CPU"
    }

    train: PositiveInt = Field(160_000, description="training examples")
    validation: PositiveInt = 20_000
    test: PositiveInt = 20_000
    data_seed: NonNegativeInt = 0

    def prepare(self, store: Store) -> None:
        store.prepare(self.name, self.version, self.model_dump(mode="json"), self._build)

    def _build(self, folder: Path) -> DataSource:
        total = self.train + self.validation + self.test
        picture = Picture(**{key: getattr(self, key) for key in Picture.model_fields})
        images = create_array(folder / "images.npy", (total, self.size**2), np.uint8)
        markers = create_array(folder / "markers.npy", (total, 4), np.uint16)
        labels = create_array(folder / "labels.npy", (total,), np.uint8)
        done = 0
        bar = tqdm(total=total, desc=self.name, unit=" pictures", leave=False, disable=None)
        with bar:
            for drawing in _shards(picture, total, self.data_seed):
                rows = slice(done, done + len(drawing.labels))
                images[rows] = drawing.images
                markers[rows] = drawing.markers
                labels[rows] = drawing.labels
                done = rows.stop
                bar.update(len(drawing.labels))
        return DataSource("regenerated", f"procedure of snakes2.py, seed {self.data_seed}")

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, self.model_dump(mode="json"))
        images, markers, labels = (prepared[name] for name in ("images", "markers", "labels"))

        def split(start: int, size: int) -> MarkedSplit:
            rows = slice(start, start + size)
            return MarkedSplit(images[rows], markers[rows], labels[rows])

        return TaskData(
            spec=ProblemSpec(input="values", channels=1, classes=2, max_length=self.size**2),
            train=split(0, self.train),
            validation=split(self.train, self.validation),
            test=split(self.train + self.validation, self.test),
            source=prepared.source,
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "distance of the discs": threshold_on_distance(data.train, data.test),
            "linear on pixel statistics": trivial.linear(data),
        }


@registry.register("pathx")
class PathX(Pathfinder):
    """Pathfinder on 128 x 128 pixels, LRA's Path-X."""

    summary: ClassVar[str] = "Pathfinder at 128 x 128 pixels, a sequence of 16,384"
    published: ClassVar[dict[str, float]] = {
        "s4": 96.35,
        "s4d": 91.95,
        "s5": 98.58,
        "mega": 97.98,
        "mamba": 67.32,
        "mamba2": 69.07,
        "b2s6": 97.90,
    }
    presets: ClassVar[dict[str, Preset]] = {
        "small": Preset(
            l0=128,
            options={"train": 10_000, "validation": 1000, "test": 2000},
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(
                steps=5000,
                batch_size=16,
                learning_rates=(3e-4, 1e-3, 3e-3),
                ssm_learning_rate=1e-3,
                evaluation_batch_size=32,
            ),
        ),
        "paper": Preset(
            l0=128,
            stack=StackConfig(d_model=256, n_layers=6),
            training=TrainingConfig(
                steps=50 * 10_000,
                batch_size=16,
                learning_rates=(1e-3,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=50,
                evaluation_batch_size=32,
                validation_examples=20_000,
            ),
        ),
    }
    omitted: ClassVar[dict[str, str]] = {
        "quick": "16,384 steps a picture are too many for minutes on two cores"
    }

    size: int = Field(128, ge=8, le=512)
    continuity: float = Field(1.8, gt=0.0)
    paddle_length: PositiveInt = 5
    paddle_thickness: float = Field(1.5, gt=0.0)
    paddle_margins: tuple[PositiveInt, ...] = Field((2, 3), min_length=1)
    seed_distance: PositiveInt = 20
    marker_radius: float = Field(3.0, gt=0.0)
    distractors: NonNegativeInt = 8
    target_contrast: float = Field(0.9, gt=0.0)
    distractor_contrast: float = Field(0.9, gt=0.0)


def _shards(picture: Picture, total: int, seed: int) -> Iterator[Drawing]:
    """Drawings of `SHARD` pictures each, in order, by as many processes as there are cores."""
    counts = [min(SHARD, total - start) for start in range(0, total, SHARD)]
    seeds = [np.random.SeedSequence(seed, spawn_key=(shard,)) for shard in range(len(counts))]
    workers = min(len(counts) // 4, _cores())
    if workers < 2:
        yield from map(draw, repeat(picture), counts, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(draw, repeat(picture), counts, seeds)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threshold_on_distance(train: Split, test: Split) -> float:
    """Test accuracy of the best rule "connected iff the discs are nearer (or farther) than t"."""
    assert isinstance(train, MarkedSplit)
    assert isinstance(test, MarkedSplit)
    distances = train.distances()
    order = np.argsort(distances, kind="stable")
    ones = np.cumsum(train.labels[order] == 1)
    at_most = np.arange(1, len(order) + 1)
    # Right answers of "1 above the threshold" with the threshold at each distance in turn.
    right = (at_most - ones) + (ones[-1] - ones)
    last_of_equals = np.append(np.diff(distances[order]) > 0, True)
    best_above = np.where(last_of_equals, right, -1).argmax()
    best_below = np.where(last_of_equals, len(order) - right, -1).argmax()
    above = right[best_above] >= len(order) - right[best_below]
    threshold = distances[order[best_above if above else best_below]]
    connected = (test.distances() > threshold) == above
    return float((connected == (test.labels == 1)).mean())
