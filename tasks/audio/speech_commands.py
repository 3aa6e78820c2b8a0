"""Speech Commands v0.02 (Warden 2018) as raw waveforms: ten words, and all thirty-five."""

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
from flexbench.tasks.archives import tar_members
from flexbench.tasks.arrays import hold_out
from flexbench.tasks.audio.waves import WaveSplit, moments, read_wave, write_samples
from flexbench.tasks.base import FurtherTest, Task, TaskData, registry
from flexbench.tasks.store import Raw, Resource, Source, Store, Url

SPEECH_COMMANDS = Resource(
    name="speech-commands",
    task="sc35",
    sources=(
        Source(
            "official",
            "official",
            (
                Url(
                    name="speech_commands_v0.02.tar.gz",
                    sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
                    size=2_428_923_189,
                    url="https://storage.googleapis.com/download.tensorflow.org/data/"
                    "speech_commands_v0.02.tar.gz",
                ),
            ),
        ),
    ),
)
RATE = 16_000
LISTS = {"validation_list.txt": "validation", "testing_list.txt": "test"}
TEN = frozenset(["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"])

Names = dict[str, list[int]]


class _SpeechCommands(Task):
    """A second of raw speech; tested at every second sample too, by models that never saw that."""

    suite = "audio"
    license = "Speech Commands v0.02, Warden 2018: CC BY 4.0"
    resources = (SPEECH_COMMANDS,)
    omitted: ClassVar[dict[str, str]] = {
        "quick": "needs the official archive of 2.4 GB: run it at small or paper"
    }
    words: ClassVar[int]

    patch: PositiveInt = Field(1, description="samples that make up one step")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (RATE // 2) % self.patch:
            raise ValueError(f"needs a divisor of {RATE // 2}")
        return self

    @staticmethod
    def keeps(word: str, samples: int) -> bool:
        """Whether a recording of a word, so many samples long, is used."""
        return True

    @staticmethod
    def split(labels: np.ndarray, listed: Names) -> Names:
        """Rows of each split; `listed` has those of the official lists."""
        raise NotImplementedError

    def prepare(self, store: Store) -> None:
        def build(folder: Path, raw: Raw) -> None:
            names: list[str] = []
            lists: dict[str, str] = {}

            def recordings() -> Iterator[np.ndarray]:
                for name, content in tar_members(raw.paths[0]):
                    if not isinstance(content, bytes):
                        continue
                    if name in LISTS:
                        lists.update(dict.fromkeys(content.decode().split(), LISTS[name]))
                    word = Path(name).parent.name
                    if name.endswith(".wav") and not word.startswith("_"):
                        samples, _ = read_wave(content, name)
                        if self.keeps(word, len(samples)):
                            names.append(f"{word}/{Path(name).name}")
                            yield samples

            offsets = write_samples(folder, recordings(), self.name)
            words = sorted({name.partition("/")[0] for name in names})
            if len(words) != self.words or not lists:
                raise UserError(f"{raw.paths[0]} lacks words or lists; fetch it again")
            labels = np.array([words.index(name.partition("/")[0]) for name in names])
            order = sorted(range(len(names)), key=names.__getitem__)
            listed: Names = {"train": [], "validation": [], "test": []}
            for row in np.random.default_rng(0).permutation(order).tolist():
                listed[lists.get(names[row], "train")].append(row)
            bounds = np.stack([offsets[:-1], offsets[1:]], axis=1)
            np.save(folder / "bounds.npy", bounds)
            np.save(folder / "labels.npy", labels.astype(np.uint8))
            for split, rows in self.split(labels, listed).items():
                np.save(folder / f"{split}_rows.npy", np.array(rows, dtype=np.int64))
            samples = np.load(folder / "samples.npy", mmap_mode="r")
            train = np.load(folder / "train_rows.npy")
            np.save(folder / "moments.npy", moments(samples, bounds[train]))

        store.convert(self.name, self.version, {}, SPEECH_COMMANDS, build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})
        mean, deviation = prepared["moments"].tolist()

        def split(name: str, every: int = 1) -> WaveSplit:
            rows = prepared[f"{name}_rows"]
            bounds = prepared["bounds"][rows]
            return WaveSplit(
                prepared["samples"],
                bounds[:, 0],
                bounds,
                prepared["labels"][rows],
                length=RATE,
                every=every,
                patch=self.patch,
                mean=mean,
                deviation=deviation,
            )

        steps = RATE // self.patch
        return TaskData(
            ProblemSpec("values", self.words, max_length=steps, channels=self.patch),
            train=split("train"),
            validation=split("validation"),
            test=split("test"),
            source=prepared.source,
            further={"8 kHz": FurtherTest(split("test", every=2), steps // 2)},
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on a histogram": trivial.linear(data),
        }


def presets(steps: int) -> dict[str, Preset]:
    """Small, and the S4 protocol with so many steps."""
    return {
        "small": Preset(
            options={"patch": 8},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=10_000, batch_size=16, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=128, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=steps,
                batch_size=16,
                learning_rates=(1e-2,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=40,
                evaluation_batch_size=16,
                validation_examples=10_000,
            ),
        ),
    }


@registry.register("sc35")
class SC35(_SpeechCommands):
    """All thirty-five words, the official lists; a shorter clip is silent to the end."""

    summary = "Speech Commands: 35 words, raw 16 kHz; tested at 8 kHz too"
    words = 35
    chance = 1 / 35
    published: ClassVar[dict[str, float]] = {"s4": 96.08, "s4d": 95.83, "s5": 96.52}
    published_source = "arXiv 2208.04933, at 16 kHz"
    presets: ClassVar[dict[str, Preset]] = presets(40 * 5302)

    @staticmethod
    def split(labels: np.ndarray, listed: Names) -> Names:
        return listed


@registry.register("sc10")
class SC10(_SpeechCommands):
    """Ten words, clips of exactly one second, split 70 / 15 / 15 with each word in proportion."""

    summary = "Speech Commands: ten words, raw 16 kHz; tested at 8 kHz too"
    words = 10
    chance = 0.1
    presets: ClassVar[dict[str, Preset]] = presets(40 * 1530)

    @staticmethod
    def keeps(word: str, samples: int) -> bool:
        return word in TEN and samples == RATE

    @staticmethod
    def split(labels: np.ndarray, listed: Names) -> Names:
        order = np.concatenate([np.array(rows, dtype=np.int64) for rows in listed.values()])
        train, rest = hold_out(labels[order], 0.3, seed=0)
        validation, test = hold_out(labels[order[rest]], 0.5, seed=0)
        parts = {"train": train, "validation": rest[validation], "test": rest[test]}
        shuffled = np.random.default_rng(0)
        return {name: shuffled.permutation(order[part]).tolist() for name, part in parts.items()}
