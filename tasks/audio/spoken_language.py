"""Spoken language of volunteers' clips: the names of Tux Paint's stamps in nine languages."""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import soundfile  # type: ignore[import-untyped]
from pydantic import Field, PositiveInt, model_validator
from scipy.signal import resample_poly
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import deb_members
from flexbench.tasks.audio.waves import WaveSplit, read_wave, write_samples
from flexbench.tasks.base import FurtherTest, Task, TaskData, registry
from flexbench.tasks.store import DebianPackage, Raw, Resource, Source, Store


def _prompts(language: str, size: int, sha256: str) -> DebianPackage:
    package = f"asterisk-core-sounds-{language}-wav"
    return DebianPackage(f"{package}_1.6.1-1_all.deb", sha256, size, package, "1.6.1-1")


CLIPS = Resource(
    name="spoken-language",
    task="spoken-language",
    sources=(
        Source(
            "debian",
            "package",
            (
                DebianPackage(
                    name="tuxpaint-stamps-default_2022.06.04-1_all.deb",
                    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
                    size=160_880_444,
                    package="tuxpaint-stamps-default",
                    version="2022.06.04-1",
                ),
                _prompts(
                    "es",
                    23_767_256,
                    "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
                ),
                _prompts(
                    "fr",
                    18_516_060,
                    "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
                ),
                _prompts(
                    "ru",
                    18_788_860,
                    "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
                ),
            ),
        ),
    ),
)
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
PROMPTS = ("es", "fr", "ru")
RATES = (8000, 16_000)
LOUDNESS = 0.1
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

Clip = tuple[np.ndarray, int]


@registry.register("spoken-language")
class SpokenLanguage(Task):
    """Which of nine languages is spoken? The middle of a clip of about a second, raw.

    All clips are brought to one loudness. Few people, with a microphone each, speak a language, so
    that voice and channel tell it too; the further test, telephone prompts of other speakers in
    three of the languages, shows how far.
    """

    suite = "audio"
    summary = "nine languages, volunteers' clips of a word or two; tested on telephone prompts too"
    chance = 1 / len(LANGUAGES)
    license = "tuxpaint-stamps: GPL-2; asterisk-core-sounds: CC BY-SA 3.0, Russian CC BY 3.0"
    resources = (CLIPS,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=16,
            options={"rate": 8000, "patch": 16},
            training=TrainingConfig(
                steps=400,
                batch_size=16,
                learning_rates=(3e-3,),
                evaluations=4,
                validation_examples=600,
            ),
        ),
        "small": Preset(
            options={"rate": 8000, "patch": 4},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=4000, batch_size=16, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=128, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=11_000,
                batch_size=16,
                learning_rates=(1e-3, 2e-3),
                weight_decay=0.05,
                evaluations=40,
            ),
        ),
    }

    rate: Literal[8000, 16_000] = Field(16_000, description="samples a second")
    patch: PositiveInt = Field(1, description="samples that make up one step")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rate % self.patch:
            raise ValueError(f"needs a divisor of {self.rate}")
        return self

    def prepare(self, store: Store) -> None:
        options = {"rate": self.rate}

        def build(folder: Path, raw: Raw) -> None:
            _build(folder, raw, self.rate)

        store.convert(self.name, self.version, options, CLIPS, build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {"rate": self.rate})
        offsets = prepared["offsets"]
        bounds = np.stack([offsets[:-1], offsets[1:]], axis=1)
        starts = (bounds.sum(1) - self.rate) // 2

        def split(name: str) -> WaveSplit:
            rows = prepared[f"{name}_rows"]
            return WaveSplit(
                prepared["samples"],
                starts[rows],
                bounds[rows],
                prepared["labels"][rows],
                length=self.rate,
                patch=self.patch,
                deviation=LOUDNESS * 2**15,
            )

        steps = self.rate // self.patch
        return TaskData(
            ProblemSpec("values", len(LANGUAGES), max_length=steps, channels=self.patch),
            train=split("train"),
            validation=split("validation"),
            test=split("test"),
            source=prepared.source,
            further={"prompts": FurtherTest(split("prompts"), steps)},
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on a histogram": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw, rate: int) -> None:
    """Clips end to end at `rate`, one loudness; labels; rows of each split and of the prompts."""
    stamps: list[str] = []
    labels: list[int] = []

    def recordings() -> Iterator[np.ndarray]:
        for stamp, language, clip in clips(raw.paths[0]):
            stamps.append(stamp)
            labels.append(LANGUAGES.index(language))
            yield level(*decode(clip, stamp), rate)
        for language, path in zip(PROMPTS, raw.paths[1:], strict=True):
            for name, content in deb_members(path):
                if name.endswith(".wav") and isinstance(content, bytes):
                    labels.append(LANGUAGES.index(language))
                    samples, source = read_wave(content, name)
                    yield level(samples / 2**15, source, rate)

    offsets = write_samples(folder, recordings(), "spoken-language")
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "labels.npy", np.array(labels, dtype=np.uint8))
    np.save(folder / "prompts_rows.npy", np.arange(len(stamps), len(labels)))
    order = np.random.default_rng(0).permutation(sorted(set(stamps)))
    cuts = np.cumsum([round(share * len(order)) for share in SHARES.values()])[:-1]
    for seed, (split, part) in enumerate(zip(SHARES, np.split(order, cuts), strict=True)):
        rows = np.flatnonzero(np.isin(stamps, part))
        np.save(folder / f"{split}_rows.npy", np.random.default_rng(seed).permutation(rows))


def clips(package: Path) -> Iterator[tuple[str, str, bytes]]:
    """Stamp, language and Ogg file of each clip; of clips that are the same bytes the first, and
    none where they pass for two languages.
    """
    layout = re.compile(r"(.*)_desc_([a-z]{2})\.ogg")
    languages = defaultdict(set)
    for name, content in deb_members(package):
        if (match := layout.fullmatch(name)) and isinstance(content, bytes):
            languages[hashlib.md5(content).digest()].add(match[2])
    for name, content in deb_members(package):
        if (match := layout.fullmatch(name)) and isinstance(content, bytes):
            known = languages.pop(hashlib.md5(content).digest(), ())
            if match[2] in LANGUAGES and len(known) == 1:
                yield match[1], match[2], content


def decode(content: bytes, name: str) -> Clip:
    """Samples in [-1, 1], the mean of the channels, and rate of an Ogg Vorbis file.

    Raises:
        UserError: it is damaged.
    """
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float64", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{name} cannot be decoded ({error}); fetch it again") from error
    return samples.mean(1), rate


def level(samples: np.ndarray, source: int, rate: int) -> np.ndarray:
    """At another rate, at a root mean square of `LOUDNESS`, clipped: (length,) int16."""
    common = gcd(source, rate)
    resampled = resample_poly(samples, rate // common, source // common)
    size = np.sqrt(np.square(resampled).mean()) if len(resampled) else 0.0
    loud = resampled * (LOUDNESS / max(size, 1e-6))
    return np.rint(loud.clip(-1, 1) * (2**15 - 1)).astype(np.int16)
