"""Phones of a Russian speaker, from the recordings behind Debian's voice `festvox-ru`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import deb_members
from flexbench.tasks.audio.waves import WaveSplit, moments, read_wave, write_samples
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.store import DebianPackage, Raw, Resource, Source, Store

FESTVOX = Resource(
    name="festvox-ru",
    task="phones",
    sources=(
        Source(
            "debian",
            "package",
            (
                DebianPackage(
                    name="festvox-ru_0.5+dfsg-6_all.deb",
                    sha256="21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4",
                    size=178_728_512,
                    package="festvox-ru",
                    version="0.5+dfsg-6",
                ),
            ),
        ),
    ),
)
RATE = 16_000
PHONES = 51
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@registry.register("phones")
class Phones(Task):
    """Which phone is spoken at the centre of a window of raw speech? 51 classes, the pause one."""

    suite = "audio"
    summary = "phone at the centre of a raw speech window, one Russian speaker, 16 kHz"
    chance = 1 / PHONES
    license = "festvox-ru, N. Shmyrev 2005: BSD-like"
    resources = (FESTVOX,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=8,
            options={"window": 2048, "patch": 16},
            training=TrainingConfig(
                steps=900,
                batch_size=64,
                learning_rates=(3e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            options={"window": 4096, "patch": 4},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=8000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=128, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=50_000,
                batch_size=32,
                learning_rates=(1e-3, 2e-3),
                weight_decay=0.05,
                evaluations=40,
                validation_examples=6000,
            ),
        ),
    }

    window: PositiveInt = Field(4096, description="samples, the phone's middle at its centre")
    patch: PositiveInt = Field(1, description="samples that make up one step")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.window % self.patch:
            raise ValueError(f"needs a window that is a multiple of {self.patch}")
        return self

    def prepare(self, store: Store) -> None:
        store.convert(self.name, self.version, {}, FESTVOX, _build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})
        mean, deviation = prepared["moments"].tolist()

        def split(name: str) -> WaveSplit:
            return WaveSplit(
                prepared["samples"],
                prepared[f"{name}_middles"] - self.window // 2,
                prepared[f"{name}_bounds"],
                prepared[f"{name}_labels"],
                length=self.window,
                patch=self.patch,
                mean=mean,
                deviation=deviation,
            )

        spec = ProblemSpec(
            input="values",
            classes=PHONES,
            max_length=self.window // self.patch,
            channels=self.patch,
        )
        return TaskData(
            spec, split("train"), split("validation"), split("test"), source=prepared.source
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on a histogram": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw) -> None:
    """Utterances end to end, and for each split the middles and labels of its segments."""
    segments: dict[str, list[tuple[float, float, str]]] = {}
    names: list[str] = []

    def recordings() -> Iterator[np.ndarray]:
        for path, content in deb_members(raw.paths[0]):
            file = Path(path)
            if file.match("wav/*.wav") and isinstance(content, bytes):
                samples, rate = read_wave(content, path)
                if rate != RATE:
                    raise UserError(f"{path} has {rate} samples a second, not {RATE}")
                names.append(file.stem)
                yield samples
            elif file.match("lab/*.lab") and isinstance(content, bytes):
                segments[file.stem] = read_labels(content.decode("ascii"))

    offsets = write_samples(folder, recordings(), "phones")
    phones = sorted({phone for found in segments.values() for *_, phone in found})
    if len(phones) != PHONES or sorted(names) != sorted(segments):
        raise UserError(f"{raw.paths[0]} does not hold the labelled recordings; fetch it again")
    place = {name: number for number, name in enumerate(names)}
    order = np.random.default_rng(0).permutation(sorted(names)).tolist()
    cuts = np.cumsum([round(share * len(order)) for share in SHARES.values()])[:-1]
    for seed, (split, part) in enumerate(zip(SHARES, np.split(np.array(order), cuts), strict=True)):
        rows = []
        for name in part.tolist():
            low, high = offsets[place[name]], offsets[place[name] + 1]
            for start, stop, phone in segments[name]:
                middle = low + round((start + stop) / 2 * RATE)
                rows.append((middle, low, high, phones.index(phone)))
        table = np.random.default_rng(seed).permutation(np.array(rows, dtype=np.int64))
        np.save(folder / f"{split}_middles.npy", table[:, 0])
        np.save(folder / f"{split}_bounds.npy", table[:, 1:3])
        np.save(folder / f"{split}_labels.npy", table[:, 3].astype(np.uint8))
        if split == "train":
            samples = np.load(folder / "samples.npy", mmap_mode="r")
            np.save(folder / "moments.npy", moments(samples, np.unique(table[:, 1:3], axis=0)))


def read_labels(text: str) -> list[tuple[float, float, str]]:
    """Segments (start, stop, phone), in seconds, of an xlabel file: after a line `#`, each line the
    segment's end, a colour and its name.
    """
    segments = []
    start = 0.0
    for line in text.partition("#\n")[2].splitlines():
        end, _, phone = line.split()
        segments.append((start, float(end), phone))
        start = float(end)
    return segments
