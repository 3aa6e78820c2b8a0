"""GenomicBenchmarks (Grešová et al. 2023) and the Nucleotide Transformer's downstream tasks
(Dalla-Torre et al. 2023), from local copies of the authors' files.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field
from tqdm import tqdm

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.arrays import Ragged, TokenSplit, hold_out
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.genomics.bases import LETTERS, EitherStrand, encode
from flexbench.tasks.store import Raw, Resource, Store, create_array

VALIDATION_SHARE = 0.1


def presets(training: int, either_strand: bool = True) -> dict[str, Preset]:
    """Small and paper for about so many training sequences: paper is ten epochs."""
    epochs, batch_size = 10, 128
    steps = max(1, round((1 - VALIDATION_SHARE) * training / batch_size))
    options = {"reverse_complement": either_strand}
    return {
        "small": Preset(
            l0=8,
            options=options,
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(
                steps=min(5000, epochs * steps),
                batch_size=batch_size,
                learning_rates=(1e-3, 2e-3, 4e-3),
                validation_examples=4000,
            ),
        ),
        "paper": Preset(
            l0=8,
            options=options,
            stack=StackConfig(d_model=128, n_layers=4),
            training=TrainingConfig(
                steps=epochs * steps,
                batch_size=batch_size,
                learning_rates=(1e-3, 2e-3),
                evaluations=epochs,
                validation_examples=14_000,
            ),
        ),
    }


Example = tuple[str, bytes]


class _Official(Task):
    """A task whose training and test sequences are read from files only a user can have."""

    suite = "genomics"
    omitted: ClassVar[dict[str, str]] = {
        "quick": "needs a local copy of the official files: run it at small or paper"
    }
    chance = 0.5
    length: ClassVar[int]
    classes: ClassVar[int] = 2

    reverse_complement: bool = Field(False, description="train on either strand at random")

    def prepare(self, store: Store) -> None:
        (resource,) = self.resources

        def build(folder: Path, raw: Raw) -> None:
            for split in ("train", "test"):
                count = _write(folder, split, self.read(raw, split), self.classes)
                if count == 0:
                    names = " and ".join(path.name for path in raw.paths)
                    raise UserError(f"{names} hold no {split} sequences of '{self.name}'")
            kept, held = hold_out(np.load(folder / "train_labels.npy"), VALIDATION_SHARE, seed=0)
            np.save(folder / "train_rows.npy", kept)
            np.save(folder / "validation_rows.npy", np.random.default_rng(0).permutation(held))

        store.convert(self.name, self.version, {}, resource, build)

    @staticmethod
    def read(raw: Raw, split: str) -> Iterator[Example]:
        """Class and sequence of every example of "train" or "test"."""
        raise NotImplementedError

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})

        def split(name: str, which: str | None = None) -> TokenSplit:
            labels = prepared[f"{name}_labels"]
            rows = np.arange(len(labels)) if which is None else prepared[which]
            return TokenSplit(
                Ragged(prepared[f"{name}_bases"], prepared[f"{name}_offsets"]),
                labels[rows],
                rows,
                max_length=self.length,
            )

        train = split("train", "train_rows")
        return TaskData(
            ProblemSpec("tokens", self.classes, max_length=self.length, vocab_size=len(LETTERS)),
            train=EitherStrand(train) if self.reverse_complement else train,
            validation=split("train", "validation_rows"),
            test=split("test"),
            source=prepared.source,
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "linear on base counts": trivial.linear(data),
        }


def _write(folder: Path, split: str, examples: Iterator[Example], classes: int) -> int:
    """Spool sequences to disk, so that no split is ever in memory. Returns how many.

    Raises:
        UserError: they are of another number of classes.
    """
    names: list[str] = []
    lengths: list[int] = []
    spool = folder / "spool"
    with (
        spool.open("wb") as out,
        tqdm(examples, desc=split, unit=" sequences", leave=False, disable=None) as bar,
    ):
        for name, sequence in bar:
            bases = encode(sequence)
            names.append(name)
            lengths.append(len(bases))
            out.write(bases.tobytes())
    found = sorted(set(names))
    if names and len(found) != classes:
        raise UserError(f"the {split} sequences are of {len(found)} classes, not {classes}")
    flat = create_array(folder / f"{split}_bases.npy", (sum(lengths),), np.uint8)
    if flat.size:
        flat[:] = np.memmap(spool, dtype=np.uint8, mode="r")
    spool.unlink()
    numbers = {name: number for number, name in enumerate(found)}
    np.save(folder / f"{split}_offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(
        folder / f"{split}_labels.npy", np.array([numbers[name] for name in names], dtype=np.uint8)
    )
    return len(names)


# -- GenomicBenchmarks ---------------------------------------------------------------------------


def archive(task: str, name: str) -> tuple[Resource]:
    return (Resource(name, task, local=(f"genomic_benchmarks/{name}.zip",)),)


def figures(cnn: float, mamba: float, caduceus: float) -> dict[str, float]:
    return {"cnn": cnn, "mamba": mamba, "caduceus-ph": caduceus}


class _GenomicBenchmark(_Official):
    """Classes are numbered in alphabetical order, as the authors do."""

    license = "GenomicBenchmarks: Apache-2.0; from a local copy"
    published_source = "arXiv 2403.03234, table 1: pre-trained, but for the CNN"

    @staticmethod
    def read(raw: Raw, split: str) -> Iterator[Example]:
        """A zip of `<data set>/<split>/<class>/<number>.txt`, each file one sequence."""
        layout = re.compile(rf"(?:.*/)?{split}/([^/]+)/[^/]+\.txt")
        try:
            with zipfile.ZipFile(raw.paths[0]) as members:
                for name in sorted(members.namelist()):
                    if match := layout.fullmatch(name):
                        yield match[1], members.read(name).strip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise UserError(f"{raw.paths[0]} is damaged ({error}); get it again") from error


@registry.register("mouse-enhancers")
class MouseEnhancers(_GenomicBenchmark):
    summary = "GenomicBenchmarks: mouse enhancers (Ensembl)"
    resources = archive("mouse-enhancers", "dummy_mouse_enhancers_ensembl")
    length = 1024
    published: ClassVar[dict[str, float]] = figures(71.5, 74.3, 75.4)
    presets: ClassVar[dict[str, Preset]] = presets(968)


@registry.register("coding")
class Coding(_GenomicBenchmark):
    summary = "GenomicBenchmarks: coding or intergenomic"
    resources = archive("coding", "demo_coding_vs_intergenomic_seqs")
    length = 200
    published: ClassVar[dict[str, float]] = figures(89.2, 90.4, 91.5)
    presets: ClassVar[dict[str, Preset]] = presets(75000)


@registry.register("human-or-worm")
class HumanOrWorm(_GenomicBenchmark):
    summary = "GenomicBenchmarks: human or worm"
    resources = archive("human-or-worm", "demo_human_or_worm")
    length = 200
    published: ClassVar[dict[str, float]] = figures(94.2, 96.7, 97.3)
    presets: ClassVar[dict[str, Preset]] = presets(75000)


@registry.register("enhancers-cohn")
class EnhancersCohn(_GenomicBenchmark):
    summary = "GenomicBenchmarks: human enhancers (Cohn)"
    resources = archive("enhancers-cohn", "human_enhancers_cohn")
    length = 500
    published: ClassVar[dict[str, float]] = figures(70.2, 73.2, 74.7)
    presets: ClassVar[dict[str, Preset]] = presets(20843)


@registry.register("enhancers-ensembl")
class EnhancersEnsembl(_GenomicBenchmark):
    summary = "GenomicBenchmarks: human enhancers (Ensembl)"
    resources = archive("enhancers-ensembl", "human_enhancers_ensembl")
    length = 512
    published: ClassVar[dict[str, float]] = figures(74.4, 86.2, 89.3)
    presets: ClassVar[dict[str, Preset]] = presets(123872)


@registry.register("regulatory")
class Regulatory(_GenomicBenchmark):
    summary = "GenomicBenchmarks: enhancer, promoter or open chromatin"
    resources = archive("regulatory", "human_ensembl_regulatory")
    length = 512
    published: ClassVar[dict[str, float]] = figures(87.2, 81.4, 87.2)
    presets: ClassVar[dict[str, Preset]] = presets(231348)
    classes = 3
    chance = 1 / 3


@registry.register("nontata-promoters")
class NonTATAPromoters(_GenomicBenchmark):
    summary = "GenomicBenchmarks: human promoters without TATA box"
    resources = archive("nontata-promoters", "human_nontata_promoters")
    length = 251
    published: ClassVar[dict[str, float]] = figures(86.1, 93.3, 94.6)
    presets: ClassVar[dict[str, Preset]] = presets(27097)


@registry.register("open-chromatin")
class OpenChromatin(_GenomicBenchmark):
    summary = "GenomicBenchmarks: human open chromatin (Ensembl)"
    resources = archive("open-chromatin", "human_ocr_ensembl")
    length = 512
    published: ClassVar[dict[str, float]] = figures(69.8, 81.5, 82.8)
    presets: ClassVar[dict[str, Preset]] = presets(139804)


# -- Nucleotide Transformer ----------------------------------------------------------------------


def pair(task: str, name: str) -> tuple[Resource]:
    folder = f"nucleotide_transformer_downstream_tasks/{name}"
    local = (f"{folder}/train.fna", f"{folder}/test.fna")
    return (Resource(f"nucleotide-transformer-{name}", task, local=local),)


class _NucleotideTransformer(_Official):
    """Classes are the numbers in the files."""

    license = "Nucleotide Transformer downstream tasks: CC BY-NC-SA 4.0; from a local copy"
    metric = "mcc"

    @staticmethod
    def read(raw: Raw, split: str) -> Iterator[Example]:
        """FASTA files of training and test sequences; a header ends in `|` and the class."""
        path = raw.paths[("train", "test").index(split)]
        label, parts = "", list[bytes]()
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.startswith(b">"):
                    parts.append(line.strip())
                    continue
                if parts:
                    yield label, b"".join(parts)
                _, bar, mark = line.decode("ascii", "replace").strip().rpartition("|")
                if not (bar and mark.isdecimal()):
                    raise UserError(f"{path}, line {number}: no class after the last '|'")
                label, parts = mark, []
        if parts:
            yield label, b"".join(parts)


@registry.register("nt-h3")
class H3(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3 in yeast"
    resources = pair("nt-h3", "H3")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(13468)


@registry.register("nt-h3k14ac")
class H3K14ac(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K14ac in yeast"
    resources = pair("nt-h3k14ac", "H3K14ac")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(29743)


@registry.register("nt-h3k36me3")
class H3K36me3(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K36me3 in yeast"
    resources = pair("nt-h3k36me3", "H3K36me3")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(31392)


@registry.register("nt-h3k4me1")
class H3K4me1(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K4me1 in yeast"
    resources = pair("nt-h3k4me1", "H3K4me1")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(28509)


@registry.register("nt-h3k4me2")
class H3K4me2(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K4me2 in yeast"
    resources = pair("nt-h3k4me2", "H3K4me2")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(27614)


@registry.register("nt-h3k4me3")
class H3K4me3(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K4me3 in yeast"
    resources = pair("nt-h3k4me3", "H3K4me3")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(33119)


@registry.register("nt-h3k79me3")
class H3K79me3(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K79me3 in yeast"
    resources = pair("nt-h3k79me3", "H3K79me3")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(25953)


@registry.register("nt-h3k9ac")
class H3K9ac(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H3K9ac in yeast"
    resources = pair("nt-h3k9ac", "H3K9ac")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(25003)


@registry.register("nt-h4")
class H4(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H4 in yeast"
    resources = pair("nt-h4", "H4")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(13140)


@registry.register("nt-h4ac")
class H4ac(_NucleotideTransformer):
    summary = "Nucleotide Transformer: histone mark H4ac in yeast"
    resources = pair("nt-h4ac", "H4ac")
    length = 500
    presets: ClassVar[dict[str, Preset]] = presets(30685)


@registry.register("nt-enhancers")
class Enhancers(_NucleotideTransformer):
    summary = "Nucleotide Transformer: enhancer or not"
    resources = pair("nt-enhancers", "enhancers")
    length = 200
    presets: ClassVar[dict[str, Preset]] = presets(14968)


@registry.register("nt-enhancers-types")
class EnhancersTypes(_NucleotideTransformer):
    summary = "Nucleotide Transformer: strong, weak or no enhancer"
    resources = pair("nt-enhancers-types", "enhancers_types")
    length = 200
    presets: ClassVar[dict[str, Preset]] = presets(14968)
    classes = 3
    chance = 1 / 3


@registry.register("nt-promoter-all")
class PromoterAll(_NucleotideTransformer):
    summary = "Nucleotide Transformer: promoter or not"
    resources = pair("nt-promoter-all", "promoter_all")
    length = 300
    presets: ClassVar[dict[str, Preset]] = presets(53276)
    metric = "f1"


@registry.register("nt-promoter-no-tata")
class PromoterNoTATA(_NucleotideTransformer):
    summary = "Nucleotide Transformer: promoter without TATA box or not"
    resources = pair("nt-promoter-no-tata", "promoter_no_tata")
    length = 300
    presets: ClassVar[dict[str, Preset]] = presets(47767)
    metric = "f1"


@registry.register("nt-promoter-tata")
class PromoterTATA(_NucleotideTransformer):
    summary = "Nucleotide Transformer: promoter with TATA box or not"
    resources = pair("nt-promoter-tata", "promoter_tata")
    length = 300
    presets: ClassVar[dict[str, Preset]] = presets(5509)
    metric = "f1"


@registry.register("nt-splice-sites-all")
class SpliceSitesAll(_NucleotideTransformer):
    summary = "Nucleotide Transformer: donor, acceptor or neither"
    resources = pair("nt-splice-sites-all", "splice_sites_all")
    length = 400
    presets: ClassVar[dict[str, Preset]] = presets(27000, either_strand=False)
    metric = "accuracy"
    classes = 3
    chance = 1 / 3


@registry.register("nt-splice-sites-acceptors")
class SpliceSitesAcceptors(_NucleotideTransformer):
    summary = "Nucleotide Transformer: splice acceptor or not"
    resources = pair("nt-splice-sites-acceptors", "splice_sites_acceptors")
    length = 600
    presets: ClassVar[dict[str, Preset]] = presets(19961, either_strand=False)
    metric = "f1"


@registry.register("nt-splice-sites-donors")
class SpliceSitesDonors(_NucleotideTransformer):
    summary = "Nucleotide Transformer: splice donor or not"
    resources = pair("nt-splice-sites-donors", "splice_sites_donors")
    length = 600
    presets: ClassVar[dict[str, Preset]] = presets(19775, either_strand=False)
    metric = "f1"
