"""Splice sites and promoters of human chromosome 22, with as much context as one likes."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import Batch, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import zip_member
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.genomics.bases import COMPLEMENT, LETTERS, EitherStrand, encode
from flexbench.tasks.store import PipWheel, Raw, Resource, Source, Store

CHROMOSOME = Resource(
    name="chromosome22",
    task="splice",
    sources=(
        Source(
            "pip",
            "package",
            (
                PipWheel(
                    name="snakealtpromoter-1.0.5-py3-none-any.whl",
                    sha256="9e177a156609c3ddf4c9d2efdb21a29ebd30a5eadac0277f7e21d2d0c9f88226",
                    size=20_392_705,
                    package="snakealtpromoter",
                    version="1.0.5",
                ),
            ),
        ),
    ),
)
FASTA, ANNOTATION = "snakealtpromoter/data/hg38.fa", "snakealtpromoter/data/hg38.gtf"

LONGEST = 16_384
BORDERS = {
    "train": (0, 37_500_000),
    "validation": (37_500_000, 41_000_000),
    "test": (41_000_000, None),
}
"""Places in the chromosome of each split; a window never reaches across a border."""

SPACING = 500
"""Of two starts of transcription nearer than this only one is a promoter."""

CLEAR = 1000
"""No start of transcription is so near to background."""

FORWARD, BACKWARD = 0, 1
A, G, T = (LETTERS.index(letter) for letter in "AGT")


@dataclass(frozen=True)
class Transcript:
    """A transcript's exons as (start, stop), 0-based and half-open, ascending."""

    strand: int
    exons: list[tuple[int, int]]

    @property
    def start(self) -> int:
        """The first base transcribed."""
        return self.exons[0][0] if self.strand == FORWARD else self.exons[-1][1] - 1

    @property
    def span(self) -> slice:
        return slice(self.exons[0][0], self.exons[-1][1])


@dataclass(frozen=True)
class Sites:
    """Places to look at, one strand each.

    Attributes:
        places: (n,) int64, 0-based: the base at the middle of a window, on the forward strand.
        strands: (n,) uint8, FORWARD or BACKWARD.
        labels: (n,) uint8.
    """

    places: np.ndarray
    strands: np.ndarray
    labels: np.ndarray

    def __getitem__(self, which: np.ndarray) -> Sites:
        return Sites(self.places[which], self.strands[which], self.labels[which])

    @classmethod
    def join(cls, parts: list[Sites]) -> Sites:
        names = ("places", "strands", "labels")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Windows:
    """`context` bases around each site, read along its strand.

    The site's base is step context // 2 (from 0). What lies outside of the chromosome is N.
    """

    def __init__(self, bases: np.ndarray, sites: Sites, context: int) -> None:
        self.bases = bases
        self.sites = sites
        self.context = context

    def __len__(self) -> int:
        return len(self.sites.places)

    def batch(self, indices: np.ndarray) -> Batch:
        sites = self.sites[np.asarray(indices)]
        windows = around(self.bases, sites, self.context)
        return Batch(
            inputs=torch.from_numpy(windows.astype(np.int64)),
            labels=torch.from_numpy(sites.labels.astype(np.int64)),
        )


def around(bases: np.ndarray, sites: Sites, context: int) -> np.ndarray:
    """(n, context) uint8 ids of the bases around n sites, as `Windows`."""
    steps = np.arange(context) - context // 2
    back = (sites.strands == BACKWARD)[:, None]
    places = sites.places[:, None] + np.where(back, -steps, steps)
    inside = (places >= 0) & (places < len(bases))
    found = np.where(inside, bases[places.clip(0, len(bases) - 1)], 0)
    return np.where(back, COMPLEMENT[found], found)


class _Chromosome(Task):
    """A task on windows of chromosome 22, split by place."""

    suite = "genomics"
    license = "GRCh38 and GENCODE: free to use with citation"
    resources = (CHROMOSOME,)

    context: int = Field(512, ge=200, le=LONGEST, description="bases around the site")

    @staticmethod
    @abstractmethod
    def sites(bases: np.ndarray, transcripts: list[Transcript]) -> Sites:
        """All examples, from the chromosome's ids and its transcripts."""

    def prepare(self, store: Store) -> None:
        def build(folder: Path, raw: Raw) -> None:
            bases = read_fasta(zip_member(raw.paths[0], FASTA))
            np.save(folder / "bases.npy", bases)
            sites = self.sites(bases, read_transcripts(zip_member(raw.paths[0], ANNOTATION)))
            for seed, (name, (low, high)) in enumerate(BORDERS.items()):
                first = low + LONGEST // 2
                last = (high or len(bases) + LONGEST) - LONGEST // 2
                inside = np.flatnonzero((sites.places >= first) & (sites.places < last))
                part = sites[np.random.default_rng(seed).permutation(inside)]
                np.save(folder / f"{name}_places.npy", part.places)
                np.save(folder / f"{name}_strands.npy", part.strands)
                np.save(folder / f"{name}_labels.npy", part.labels)

        store.convert(self.name, self.version, {}, CHROMOSOME, build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})

        def split(name: str) -> Windows:
            parts = (prepared[f"{name}_{part}"] for part in ("places", "strands", "labels"))
            return Windows(prepared["bases"], Sites(*parts), self.context)

        classes = round(1 / self.chance)
        spec = ProblemSpec("tokens", classes, max_length=self.context, vocab_size=len(LETTERS))
        return TaskData(
            spec, split("train"), split("validation"), split("test"), source=prepared.source
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on base counts": trivial.linear(data),
        }


def read_fasta(content: bytes) -> np.ndarray:
    """Ids of the bases of a FASTA file of one sequence.

    Raises:
        UserError: it holds none, or more than one.
    """
    if not content.startswith(b">") or content.count(b">") != 1:
        raise UserError(f"{FASTA} is not one sequence in FASTA; fetch it again")
    _, _, sequence = content.partition(b"\n")
    return encode(sequence.replace(b"\n", b"").replace(b"\r", b""))


def read_transcripts(content: bytes) -> list[Transcript]:
    """The transcripts of a GTF file of one chromosome, in order of their names."""
    named = re.compile(rb'transcript_id "([^"]+)"')
    exons: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    strands: dict[bytes, int] = {}
    for line in content.splitlines():
        fields = line.split(b"\t")
        if len(fields) == 9 and fields[2] == b"exon" and (name := named.search(fields[8])):
            exons[name[1]].append((int(fields[3]) - 1, int(fields[4])))
            strands[name[1]] = FORWARD if fields[6] == b"+" else BACKWARD
    return [Transcript(strands[name], sorted(exons[name])) for name in sorted(exons)]


def transcribed(transcripts: list[Transcript], strand: int, size: int) -> np.ndarray:
    """(size,) bool: what lies inside of a transcript of the strand."""
    inside = np.zeros(size, dtype=bool)
    for transcript in transcripts:
        if transcript.strand == strand:
            inside[transcript.span] = True
    return inside


def _sites(places: list[int] | np.ndarray, strand: int, label: int) -> Sites:
    found = np.asarray(places, dtype=np.int64)
    constant = (np.full(len(found), value, dtype=np.uint8) for value in (strand, label))
    return Sites(found, *constant)


@registry.register("splice")
class Splice(_Chromosome):
    """Does an intron begin here (GT), end here (AG), or is it neither? Three classes.

    The middle base is the G of either. Neither: a GT or an AG inside of a transcript, on its
    strand, at which none of the annotated ones is spliced.
    """

    summary = "splice donors and acceptors of chromosome 22 against decoys"
    chance = 1 / 3
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=8,
            options={"context": 200},
            training=TrainingConfig(
                steps=1000,
                batch_size=32,
                learning_rates=(3e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            options={"context": 1024},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=8000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            options={"context": LONGEST},
            stack=StackConfig(d_model=256, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=20_000, batch_size=32, learning_rates=(1e-3, 2e-3), evaluations=20
            ),
        ),
    }

    @staticmethod
    def sites(bases: np.ndarray, transcripts: list[Transcript]) -> Sites:
        rng = np.random.default_rng(0)
        parts = []
        for strand in (FORWARD, BACKWARD):
            introns = {
                (left[1], right[0] - 1)
                for each in transcripts
                if each.strand == strand
                for left, right in pairwise(each.exons)
            }
            real = [sorted({intron[end] for intron in introns}) for end in (0, 1)]
            if strand == BACKWARD:
                real.reverse()
            inside = transcribed(transcripts, strand, len(bases))
            for label, (places, motif) in enumerate(zip(real, motifs(bases, strand), strict=True)):
                spliced = np.zeros(len(bases), dtype=bool)
                spliced[places] = True
                kept = np.flatnonzero(spliced & motif)
                decoys = np.flatnonzero(inside & motif & ~spliced)
                parts.append(_sites(kept, strand, label))
                parts.append(_sites(rng.choice(decoys, len(kept) // 2, replace=False), strand, 2))
        return Sites.join(parts)


def motifs(bases: np.ndarray, strand: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the G of a GT, and where that of an AG, is on the strand: (length,) bool each."""
    padded = np.pad(bases, 1)
    if strand == FORWARD:
        before, here, after = padded[:-2], padded[1:-1], padded[2:]
    else:
        before, here, after = COMPLEMENT[padded[2:]], COMPLEMENT[bases], COMPLEMENT[padded[:-2]]
    return (here == G) & (after == T), (here == G) & (before == A)


@registry.register("promoter")
class Promoter(_Chromosome):
    """Does transcription start in the middle? Two classes.

    Background is as many places inside of transcripts, on their strand, a thousand bases or more
    from every annotated start.
    """

    summary = "starts of transcription on chromosome 22 against the inside of genes"
    chance = 0.5
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=16,
            options={"context": 256},
            training=TrainingConfig(
                steps=800,
                batch_size=32,
                learning_rates=(3e-3,),
                evaluations=5,
                validation_examples=1000,
            ),
        ),
        "small": Preset(
            options={"context": 2048, "reverse_complement": True},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=4000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            options={"context": LONGEST, "reverse_complement": True},
            stack=StackConfig(d_model=256, n_layers=6, dropout=0.1),
            training=TrainingConfig(
                steps=10_000, batch_size=32, learning_rates=(1e-3, 2e-3), evaluations=20
            ),
        ),
    }

    reverse_complement: bool = Field(False, description="train on either strand at random")

    def load(self, store: Store) -> TaskData:
        data = super().load(store)
        return replace(data, train=EitherStrand(data.train)) if self.reverse_complement else data

    @staticmethod
    def sites(bases: np.ndarray, transcripts: list[Transcript]) -> Sites:
        rng = np.random.default_rng(0)
        clear = np.ones(len(bases), dtype=bool)
        for transcript in transcripts:
            clear[max(0, transcript.start - CLEAR) : transcript.start + CLEAR] = False
        parts = []
        for strand in (FORWARD, BACKWARD):
            starts: list[int] = []
            for start in sorted({each.start for each in transcripts if each.strand == strand}):
                if not starts or start - starts[-1] >= SPACING:
                    starts.append(start)
            inside = np.flatnonzero(transcribed(transcripts, strand, len(bases)) & clear)
            parts.append(_sites(starts, strand, 1))
            parts.append(_sites(rng.choice(inside, len(starts), replace=False), strand, 0))
        return Sites.join(parts)
