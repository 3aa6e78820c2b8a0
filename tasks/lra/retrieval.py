"""Retrieval: do two papers cite one another? (LRA; ACL Anthology Network, Radev et al. 2013.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from pydantic import Field
from tqdm import tqdm

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.arrays import Crop, Ragged, TokenSplit
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.characters import END, PRINTABLE, SPECIAL, encode
from flexbench.tasks.lra import PUBLISHED_SOURCE
from flexbench.tasks.store import Raw, Resource, Store, create_array

SPLITS = {"train": "train", "validation": "eval", "test": "test"}

AAN = Resource(
    name="aan",
    task="retrieval",
    local=tuple(
        f"lra_release/lra_release/tsv_data/new_aan_pairs.{suffix}.tsv" for suffix in SPLITS.values()
    ),
)

STORED_LENGTH = 4000
CHUNK = 2000


@registry.register("retrieval")
class Retrieval(Task):
    """Does one paper cite the other? Two texts by characters in, one of two classes out."""

    suite = "lra"
    summary = "citations among ACL papers (AAN), by characters, two towers"
    chance = 0.5
    license = "ACL Anthology Network: for research; from a local copy of the LRA release"
    published: ClassVar[dict[str, float]] = {
        "transformer": 57.46,
        "s4": 90.90,
        "s4d": 89.46,
        "s5": 91.40,
        "mega": 91.25,
        "mamba": 72.14,
        "mamba2": 79.23,
        "b2s6": 91.44,
    }
    published_source = PUBLISHED_SOURCE
    resources = (AAN,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            options={"max_length": 256},
            l0=16,
            training=TrainingConfig(
                steps=800, batch_size=16, learning_rates=(5e-3,), validation_examples=1000
            ),
        ),
        "small": Preset(
            options={"max_length": 1024},
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(steps=10_000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=256, n_layers=6),
            training=TrainingConfig(
                steps=46_000,
                batch_size=64,
                learning_rates=(1e-2,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=20,
                validation_examples=18_090,
            ),
        ),
    }

    max_length: int = Field(
        STORED_LENGTH, ge=16, le=STORED_LENGTH, description="characters, the end mark included"
    )
    crop: Crop = Field("head", description="which part of a longer text is kept")

    def prepare(self, store: Store) -> None:
        store.convert(self.name, self.version, {}, AAN, _build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})

        def split(name: str) -> TokenSplit:
            labels = prepared[f"{name}_labels"]
            return TokenSplit(
                Ragged(prepared[f"{name}_tokens"], prepared[f"{name}_offsets"]),
                labels,
                np.arange(2 * len(labels)).reshape(-1, 2),
                max_length=self.max_length,
                crop=self.crop,
                end=END,
            )

        spec = ProblemSpec(
            input="tokens",
            classes=2,
            max_length=self.max_length,
            vocab_size=SPECIAL + len(PRINTABLE),
            towers=2,
        )
        return TaskData(
            spec, split("train"), split("validation"), split("test"), source=prepared.source
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on character counts": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw) -> None:
    for name, path in zip(SPLITS, raw.paths, strict=True):
        labels: list[np.ndarray] = []
        lengths: list[int] = []
        spool = folder / "spool"
        with (
            spool.open("wb") as out,
            tqdm(desc=f"aan {name}", unit=" pairs", leave=False, disable=None) as bar,
        ):
            for pairs in _read_pairs(path):
                labels.append(pairs["label"].to_numpy(np.float64).astype(np.uint8))
                for pair in zip(pairs["text1"], pairs["text2"], strict=True):
                    for text in pair:
                        tokens = encode(text[:STORED_LENGTH], PRINTABLE)
                        lengths.append(len(tokens))
                        out.write(tokens.tobytes())
                bar.update(len(pairs))
        flat = create_array(folder / f"{name}_tokens.npy", (sum(lengths),), np.uint8)
        flat[:] = np.memmap(spool, dtype=np.uint8, mode="r")
        spool.unlink()
        np.save(folder / f"{name}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
        np.save(folder / f"{name}_labels.npy", np.concatenate(labels))


def _read_pairs(path: Path) -> Iterator[pd.DataFrame]:
    """Chunks of a file of label, two paper ids and two texts, separated by tabs, without a header.

    Raises:
        UserError: it is not such a file.
    """
    columns = ["label", "id1", "id2", "text1", "text2"]
    types = dict.fromkeys(range(len(columns)), str) | {0: float}
    try:
        with pd.read_csv(
            path, sep="\t", header=None, dtype=types, keep_default_na=False, chunksize=CHUNK
        ) as chunks:
            for pairs in chunks:
                if pairs.shape[1] != len(columns) or not pairs[0].isin([0, 1]).all():
                    raise ValueError("a row is not a label of 0 or 1, two ids and two texts")
                pairs.columns = pd.Index(columns)
                yield pairs
    except ValueError as error:
        raise UserError(f"{path} is not a table of AAN pairs ({error}); get it again") from error
