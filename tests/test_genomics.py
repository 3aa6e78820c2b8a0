"""Bases and strands, sites of a small chromosome against plain loops, loaders on tiny files."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data_lra import pinned

from flexbench.config import PRESETS
from flexbench.errors import DataUnavailable, UserError
from flexbench.tasks.arrays import TokenSplit, to_ragged
from flexbench.tasks.base import registry, suites
from flexbench.tasks.genomics import chromosome, dnase
from flexbench.tasks.genomics.bases import LETTERS, EitherStrand, encode, reverse_complement
from flexbench.tasks.genomics.official import _GenomicBenchmark, _NucleotideTransformer
from flexbench.tasks.store import Store

sequences = st.lists(st.text(LETTERS, min_size=1, max_size=12), min_size=1, max_size=6)


def split_of(texts: list[str]) -> TokenSplit:
    return TokenSplit(to_ragged([encode(text.encode()) for text in texts]), np.zeros(len(texts)))


def read(row: torch.Tensor) -> str:
    return "".join(LETTERS[token] for token in row.tolist())


def other_strand(text: str) -> str:
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


# -- bases -----------------------------------------------------------------------------------------


def test_letters_of_either_case_and_nothing_else_are_bases():
    assert encode(b"NACGTnacgtRX-").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0, 0]


@given(sequences)
def test_the_other_strand_of_ragged_sequences(texts):
    turned = reverse_complement(split_of(texts).batch(np.arange(len(texts))))
    for row, length, text in zip(turned.inputs, turned.lengths.tolist(), texts, strict=True):
        assert read(row[:length]) == other_strand(text)
        assert not row[length:].any()


def test_half_of_a_batch_is_turned_as_its_indices_say():
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("ACGT"), 9)) + "A" * (i % 3) for i in range(200)]
    split = EitherStrand(split_of(texts))
    assert len(split) == 200
    indices = np.arange(200)
    batch = split.batch(indices)
    found = [
        read(row[:length]) for row, length in zip(batch.inputs, batch.lengths.tolist(), strict=True)
    ]
    turned = [one != other for one, other in zip(found, texts, strict=True)]
    assert found == [
        other_strand(text) if turn else text for text, turn in zip(texts, turned, strict=True)
    ]
    assert 70 < sum(turned) < 130
    assert torch.equal(batch.inputs, split.batch(indices).inputs)
    again = split.batch(indices[::-1].copy())
    assert not torch.equal(batch.inputs, again.inputs.flip(0))


# -- chromosome 22 ---------------------------------------------------------------------------------

SIZE = 12_000
EXONS = {
    "t1": ("+", [(1000, 1200), (1500, 1700), (2100, 2300)]),
    "t2": ("+", [(1000, 1200), (1500, 1650), (2100, 2300)]),
    "t3": ("-", [(5000, 5200), (5600, 5700), (6100, 6400)]),
    "t4": ("+", [(9000, 9300)]),
    "t5": ("-", [(10_000, 10_200), (11_000, 11_500)]),
}


def a_chromosome() -> str:
    """Random bases, every intron but the last with a GT and an AG at its ends on its strand."""
    bases = list("".join(np.random.default_rng(1).choice(list("ACGT"), SIZE)))
    for name, (strand, exons) in EXONS.items():
        for (_, left), (right, _) in pairwise(exons):
            first, last = ("GT", "AG") if strand == "+" else ("CT", "AC")
            if name == "t5":
                first = last = "TT"
            bases[left : left + 2] = first
            bases[right - 2 : right] = last
    return "".join(bases)


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Store:
    """A wheel in the package's layout; the splits' borders scaled to it."""
    text = a_chromosome()
    lines = ["# a comment"]
    for name, (strand, exons) in EXONS.items():
        spans = [("transcript", exons[0][0], exons[-1][1]), *(("exon", *exon) for exon in exons)]
        for kind, start, stop in spans:
            fields = ["chr22", "X", kind, str(start + 1), str(stop), ".", strand, "."]
            lines.append("\t".join([*fields, f'gene_id "g"; transcript_id "{name}";']))
    path = tmp_path / "chromosome.whl"
    with zipfile.ZipFile(path, "w") as archive:
        rows = "\n".join(text[i : i + 60] for i in range(0, SIZE, 60))
        archive.writestr(chromosome.FASTA, f">chr22\n{rows}\n")
        archive.writestr(chromosome.ANNOTATION, "\n".join(lines))
    monkeypatch.setattr(chromosome, "CHROMOSOME", pinned({"pip": (path,)}, chromosome.CHROMOSOME))
    borders = {"train": (0, 4000), "validation": (4000, 8000), "test": (8000, None)}
    monkeypatch.setattr(chromosome, "BORDERS", borders)
    monkeypatch.setattr(chromosome, "LONGEST", 1000)
    return Store(tmp_path / "cache", data_dir=tmp_path, offline=True)


def windows(text: str, strand: str, place: int, context: int) -> str:
    """What stands around a place, by a plain loop."""
    found = ""
    for step in range(-(context // 2), context - context // 2):
        where = place + step if strand == "+" else place - step
        base = text[where] if 0 <= where < len(text) else "N"
        found += base if strand == "+" else other_strand(base)
    return found


def test_splice_sites_are_those_of_the_annotation(wheel):
    text = a_chromosome()
    wanted: dict[int, set[str]] = {0: set(), 1: set()}
    for strand, exons in EXONS.values():
        for (_, left), (right, _) in pairwise(exons):
            ends = (left, right - 1) if strand == "+" else (right - 1, left)
            for label, place in enumerate(ends):
                around = windows(text, strand, place, 200)
                if around[100:102] == "GT" if label == 0 else around[99:101] == "AG":
                    wanted[label].add(around)
    assert (len(wanted[0]), len(wanted[1])) == (5, 4)
    chromosome.Splice().prepare(wheel)
    data = chromosome.Splice(context=200).load(wheel)
    found: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for split in (data.train, data.validation, data.test):
        batch = split.batch(np.arange(len(split)))
        for row, label in zip(batch.inputs, batch.labels.tolist(), strict=True):
            found[label].append(read(row))
    assert {label: set(found[label]) for label in (0, 1)} == wanted
    assert len(found[0]) == 5
    motifs = [row[100:102] == "GT" or row[99:101] == "AG" for row in found[2]]
    assert all(motifs)
    assert not set(found[2]) & (wanted[0] | wanted[1])


def test_promoters_start_transcripts_and_background_is_far_from_them(wheel):
    text = a_chromosome()
    chromosome.Promoter().prepare(wheel)
    data = chromosome.Promoter(context=201).load(wheel)
    starts = {windows(text, "+", place, 201) for place in (1000, 9000)}
    starts |= {windows(text, "-", place, 201) for place in (6399, 11_499)}
    found: dict[int, list[str]] = {0: [], 1: []}
    for split in (data.train, data.validation, data.test):
        if len(split):
            batch = split.batch(np.arange(len(split)))
            for row, label in zip(batch.inputs, batch.labels.tolist(), strict=True):
                found[label].append(read(row))
    assert set(found[1]) == starts
    assert len(found[1]) == 4


def test_windows_beyond_the_chromosome_are_n():
    text = "ACGTA"
    sites = chromosome.Sites(np.array([0, 4, 0]), np.array([0, 0, 1]), np.zeros(3, np.uint8))
    found = chromosome.around(encode(text.encode()), sites, 6)
    expected = [windows(text, strand, place, 6) for strand, place in (("+", 0), ("+", 4), ("-", 0))]
    assert [read(torch.from_numpy(row)) for row in found] == expected


def test_splits_keep_their_distance(wheel):
    chromosome.Splice().prepare(wheel)
    prepared = wheel.load("splice", chromosome.Splice.version, {})
    for name, (low, high) in chromosome.BORDERS.items():
        places = prepared[f"{name}_places"]
        assert (places >= low + 500).all()
        assert high is None or (places < high - 500).all()
    assert len(prepared["train_places"]) > 0
    assert len(prepared["validation_places"]) > 0


@pytest.mark.parametrize("content", [b"ACGT\n", b">a\nAC\n>b\nGT\n", b""])
def test_what_is_not_one_sequence_is_refused(content):
    with pytest.raises(UserError, match="not one sequence"):
        chromosome.read_fasta(content)


# -- DNase sites -----------------------------------------------------------------------------------


def test_dnase_sites_keep_their_splits(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    rows = [
        ("".join(generator.choice(list("ACGT"), 200)), cell, part)
        for part, count in (("training", 12), ("validation", 8), ("test", 4))
        for cell in ("b", "d", "a", "c")
        for _ in range(count // 4)
    ]
    table = pd.DataFrame(rows, columns=["sequence", "TAG", "data_label"])
    path = tmp_path / "dnase.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(dnase.TABLE, table.to_csv(sep="\t", index=False))
    monkeypatch.setattr(dnase, "DNASE", pinned({"pip": (path,)}, dnase.DNASE))
    store = Store(tmp_path / "cache", data_dir=tmp_path, offline=True)
    dnase.DNaseCells().prepare(store)
    data = dnase.DNaseCells(reverse_complement=True).load(store)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 8, 4]
    assert isinstance(data.train, EitherStrand)
    known = {(text, "abcd".index(cell)) for text, cell, part in rows if part == "test"}
    batch = data.test.batch(np.arange(4))
    found = {(read(r), label) for r, label in zip(batch.inputs, batch.labels.tolist(), strict=True)}
    assert found == known


# -- official files --------------------------------------------------------------------------------

OFFICIAL = [
    registry.get(name)
    for name in suites()["genomics"]
    if issubclass(registry.get(name), (_GenomicBenchmark, _NucleotideTransformer))
]


def official_files(task, folder: Path, classes: int | None = None) -> dict[str, list[str]]:
    """Thirty training and ten test sequences, of different lengths, in the authors' layout."""
    generator = np.random.default_rng(0)
    classes = classes or task.classes
    texts = {
        split: ["".join(generator.choice(list("ACGT"), 20 + i)) for i in range(count)]
        for split, count in (("train", 30), ("test", 12))
    }
    (local,) = [resource.local for resource in task.resources]
    for name in local:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if len(local) == 1:
        root = Path(local[0]).stem
        with zipfile.ZipFile(folder / local[0], "w") as archive:
            for split, rows in texts.items():
                for i, text in enumerate(rows):
                    archive.writestr(f"{root}/{split}/class{i % classes}/{i:03}.txt", text)
            archive.writestr("__MACOSX/._x", "junk")
    else:
        for name, rows in zip(local, texts.values(), strict=True):
            records = [f">x{i}|{i % classes}\n{t[:15]}\n{t[15:]}\n" for i, t in enumerate(rows)]
            (folder / name).write_text("".join(records))
    return texts


def test_all_official_tasks_are_here():
    assert len(OFFICIAL) == 8 + 18
    assert sum(task.classes == 3 for task in OFFICIAL) == 1 + 2


@pytest.mark.parametrize("task", OFFICIAL, ids=lambda task: task.name)
def test_official_files_are_read(task, tmp_path):
    texts = official_files(task, tmp_path / "mine")
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine", offline=True)
    task().prepare(store)
    data = task(reverse_complement=False).load(store)
    assert len(data.train) + len(data.validation) == 30
    assert data.spec.classes == task.classes == round(1 / task.chance)
    batch = data.test.batch(np.arange(12))
    found = {
        read(row[:length]): label
        for row, length, label in zip(
            batch.inputs, batch.lengths.tolist(), batch.labels.tolist(), strict=True
        )
    }
    assert found == {text: i % task.classes for i, text in enumerate(texts["test"])}
    assert data.source.kind == "local"
    assert set(task.presets) | set(task.omitted) == set(PRESETS)


def test_long_sequences_are_cut_to_the_published_length(tmp_path):
    task = registry.get("coding")
    official_files(task, tmp_path / "mine")
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine", offline=True)
    task().prepare(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "length", 25)
        assert task().load(store).test.batch(np.arange(12)).inputs.shape == (12, 25)


def test_without_the_files_the_next_step_is_named(tmp_path):
    with pytest.raises(DataUnavailable, match=r"put genomic_benchmarks/demo_human_or_worm.zip"):
        registry.get("human-or-worm")().prepare(Store(tmp_path, offline=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK", "damaged"), (None, "of 3 classes, not 2")],
)
def test_a_damaged_or_foreign_archive_is_one_sentence(tmp_path, content, message):
    task = registry.get("coding")
    official_files(task, tmp_path / "mine", classes=3)
    if content is not None:
        (tmp_path / "mine" / task.resources[0].local[0]).write_bytes(content)
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine", offline=True)
    with pytest.raises(UserError, match=message) as caught:
        task().prepare(store)
    assert "\n" not in str(caught.value)


def test_a_header_without_a_class_is_named_by_its_line(tmp_path):
    task = registry.get("nt-h3")
    official_files(task, tmp_path / "mine")
    (tmp_path / "mine" / task.resources[0].local[0]).write_text(">a|1\nACGT\n>b\nAC\n")
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine", offline=True)
    with pytest.raises(UserError, match=r"train\.fna, line 3: no class"):
        task().prepare(store)
