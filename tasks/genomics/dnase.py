"""DNase sites of four cell types, as the DNA-Diffusion project selected them from ENCODE."""

from __future__ import annotations

import io
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import zip_member
from flexbench.tasks.arrays import TokenSplit
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.genomics.bases import LETTERS, EitherStrand, encode
from flexbench.tasks.store import PipWheel, Raw, Resource, Source, Store

DNASE = Resource(
    name="dnase",
    task="dnase-cells",
    sources=(
        Source(
            "pip",
            "package",
            (
                PipWheel(
                    name="dnadiffusion-0.0.0.dev0-py3-none-any.whl",
                    sha256="d97becfde9c1cc2fcae3a5bd7584da2224d072ebf15194fdb25b85840d7f484c",
                    size=19_077_418,
                    package="dnadiffusion",
                    version="0.0.0.dev0",
                ),
            ),
        ),
    ),
)
TABLE = "dnadiffusion/data/K562_hESCT0_HepG2_GM12878_12k_sequences_per_group.txt"
LENGTH = 200
SPLITS = {"train": "training", "validation": "validation", "test": "test"}


@registry.register("dnase-cells")
class DNaseCells(Task):
    """In which cell type is this stretch of chromatin open? 200 bases in, one of four types out."""

    suite = "genomics"
    summary = "cell type of ENCODE DNase sites, 200 bases"
    chance = 0.25
    license = "ENCODE: free to use with citation; selected by the DNA-Diffusion project"
    resources = (DNASE,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=8,
            training=TrainingConfig(
                steps=1000,
                batch_size=32,
                learning_rates=(3e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            l0=8,
            options={"reverse_complement": True},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(
                steps=12_000,
                batch_size=64,
                learning_rates=(1e-3, 2e-3, 4e-3),
                evaluations=12,
                validation_examples=4053,
            ),
        ),
        "paper": Preset(
            l0=8,
            options={"reverse_complement": True},
            stack=StackConfig(d_model=256, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=30_000,
                batch_size=128,
                learning_rates=(1e-3, 2e-3),
                evaluations=30,
                validation_examples=4053,
            ),
        ),
    }

    reverse_complement: bool = Field(
        False, description="train on either strand at random; it costs no time"
    )

    def prepare(self, store: Store) -> None:
        store.convert(self.name, self.version, {}, DNASE, _build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})
        splits = {
            name: TokenSplit(prepared[f"{name}_bases"], prepared[f"{name}_labels"])
            for name in SPLITS
        }
        train = splits["train"]
        return TaskData(
            ProblemSpec("tokens", classes=4, max_length=LENGTH, vocab_size=len(LETTERS)),
            train=EitherStrand(train) if self.reverse_complement else train,
            validation=splits["validation"],
            test=splits["test"],
            source=prepared.source,
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on base counts": trivial.linear(data),
        }


def _build(folder: Path, raw: Raw) -> None:
    table = pd.read_csv(
        io.BytesIO(zip_member(raw.paths[0], TABLE)),
        sep="\t",
        usecols=["sequence", "TAG", "data_label"],
    )
    cells = sorted(table["TAG"].unique())
    for seed, (name, mark) in enumerate(SPLITS.items()):
        part = table[table["data_label"] == mark]
        part = part.iloc[np.random.default_rng(seed).permutation(len(part))]
        bases = encode("".join(part["sequence"]).encode()).reshape(-1, LENGTH)
        np.save(folder / f"{name}_bases.npy", bases)
        labels = [cells.index(cell) for cell in part["TAG"]]
        np.save(folder / f"{name}_labels.npy", np.array(labels, dtype=np.uint8))
