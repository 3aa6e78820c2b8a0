"""The cache: fetching from a server that misbehaves, sharing between processes, damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import flexbench.tasks.store as store_module
from flexbench.errors import DataUnavailable, UserError
from flexbench.tasks.store import DataSource, Resource, Source, Store, Url, create_array

CONTENT = bytes(range(256)) * 512


class Server(ThreadingHTTPServer):
    """Serves `CONTENT` at /good; /cut stops half-way, /flaky only the first time, /wrong alters a
    byte, /broken answers 500, the rest 404. `hits` counts requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: Counter[str] = Counter()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        cut = self.path == "/cut" or (self.path == "/flaky" and self.server.hits["/flaky"] == 1)
        content = CONTENT[:-1] + b"!" if self.path == "/wrong" else CONTENT
        if self.path == "/broken":
            self.send_error(500)
            return
        if not cut and self.path not in ("/good", "/flaky", "/wrong"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def file_at(url: str) -> Url:
    return Url("data.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), url)


def resource_at(*urls: str) -> Resource:
    sources = [
        Source(f"source{number}", "official", (file_at(url),)) for number, url in enumerate(urls)
    ]
    return Resource("thing", "text", tuple(sources))


def kept(store: Store) -> list[str]:
    """All files in the cache but locks."""
    found = (path for path in store.cache.rglob("*") if path.is_file())
    return sorted(path.name for path in found if path.suffix != ".lock")


def test_fetches_once_and_says_from_where(server, store, capsys):
    resource = resource_at(server.url("good"))
    raw = store.fetch(resource)
    assert raw.paths[0].read_bytes() == CONTENT
    assert raw.source.kind == "official"
    assert capsys.readouterr().err.count(f"thing: {server.url('good')}") == 1
    assert store.fetch(resource) == raw
    assert server.hits["/good"] == 1


@pytest.mark.parametrize(
    ("path", "reason", "tries"),
    [
        ("cut", "cut short", 2),
        ("wrong", "does not match its published SHA-256", 2),
        ("broken", "answered 500", 2),
        ("absent", "answered 404", 1),
    ],
)
def test_failed_download_names_the_next_step_and_leaves_nothing(server, store, path, reason, tries):
    with pytest.raises(DataUnavailable, match=f"{reason}.*flexbench data fetch text") as caught:
        store.fetch(resource_at(server.url(path)))
    assert "\n" not in str(caught.value)
    assert server.hits[f"/{path}"] == tries
    assert kept(store) == []


def test_cut_download_is_tried_again(server, store):
    assert store.fetch(resource_at(server.url("flaky"))).paths[0].read_bytes() == CONTENT
    assert server.hits["/flaky"] == 2


def test_next_source_serves_where_the_first_does_not(server, store):
    raw = store.fetch(resource_at(server.url("absent"), server.url("good")))
    assert raw.name == "source1"


def test_unreachable_host_is_a_reason(store):
    with pytest.raises(DataUnavailable, match="cannot be reached"):
        store.fetch(resource_at("http://127.0.0.1:9/nothing"))


def test_offline_asks_nobody(server, tmp_path):
    with pytest.raises(DataUnavailable, match="offline"):
        Store(tmp_path, offline=True).fetch(resource_at(server.url("good")))
    assert not server.hits


def test_local_copy_comes_first(server, tmp_path):
    (tmp_path / "mine" / "thing").mkdir(parents=True)
    (tmp_path / "mine" / "thing" / "data.bin").write_bytes(CONTENT)
    store = Store(tmp_path / "cache", data_dir=tmp_path / "mine", offline=True)
    assert store.fetch(resource_at(server.url("good"))).paths[0].read_bytes() == CONTENT
    assert not server.hits


def test_wrong_local_copy_is_refused(tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match="not the published file"):
        Store(tmp_path / "cache", data_dir=tmp_path).fetch(resource_at("http://127.0.0.1:9/"))


def test_corrupt_archive_is_one_sentence_with_the_remedy_and_force_mends_it(server, store):
    resource = resource_at(server.url("good"))
    path = store.fetch(resource).paths[0]
    path.write_bytes(b"!" + CONTENT[1:])
    assert [row.state for row in store.downloads(resource)] == ["corrupt"]
    with pytest.raises(UserError, match=r"corrupt.*data fetch text --force") as caught:
        store.fetch(resource)
    assert "\n" not in str(caught.value)
    Store(store.cache, force=True).fetch(resource)
    assert [row.state for row in store.downloads(resource)] == ["good"]
    assert store.fetch(resource).paths[0].read_bytes() == CONTENT


def test_stamp_spares_the_hash_until_the_file_changes(server, store, monkeypatch):
    resource = resource_at(server.url("good"))
    path = store.fetch(resource).paths[0]
    hashed: list[Path] = []
    original = store_module._sha256
    monkeypatch.setattr(store_module, "_sha256", lambda file: hashed.append(file) or original(file))
    store.fetch(resource)
    assert hashed == []
    os.utime(path, ns=(1, 1))
    store.fetch(resource)
    store.fetch(resource)
    assert hashed == [path]


def test_failed_force_keeps_the_good_copy(server, store):
    good = resource_at(server.url("good"))
    store.fetch(good)
    bad = dataclasses.replace(good, sources=resource_at(server.url("cut")).sources)
    with pytest.raises(DataUnavailable):
        Store(store.cache, force=True).fetch(bad)
    assert store.fetch(good).paths[0].read_bytes() == CONTENT


def _fetch_in_child(cache: Path, url: str, outcome: multiprocessing.Queue) -> None:
    outcome.put(len(Store(cache).fetch(resource_at(url)).paths[0].read_bytes()))


def test_two_processes_fetch_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    arguments = (tmp_path, server.url("good"), outcome)
    children = [context.Process(target=_fetch_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    sizes = [outcome.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert sizes == [len(CONTENT)] * 2
    assert server.hits["/good"] == 1


def write_numbers(folder: Path, value: int = 7) -> DataSource:
    np.save(folder / "numbers.npy", np.full(1000, value))
    return DataSource("synthetic", "numbers")


def test_prepared_arrays_are_mapped_and_made_once(store):
    store.prepare("toy", 1, {"a": 1}, write_numbers)
    store.prepare("toy", 1, {"a": 1}, partial(write_numbers, value=8))
    prepared = store.load("toy", 1, {"a": 1})
    assert isinstance(prepared["numbers"], np.memmap)
    assert prepared["numbers"][0] == 7
    assert prepared.source == DataSource("synthetic", "numbers")
    Store(store.cache, force=True).prepare("toy", 1, {"a": 1}, partial(write_numbers, value=8))
    assert store.load("toy", 1, {"a": 1})["numbers"][0] == 8


@pytest.mark.parametrize(("version", "options"), [(2, {"a": 1}), (1, {"a": 2}), (1, {})])
def test_other_version_or_options_are_other_data(store, version, options):
    store.prepare("toy", 1, {"a": 1}, write_numbers)
    with pytest.raises(DataUnavailable, match="data fetch toy"):
        store.load("toy", version, options)


def test_a_build_that_fails_leaves_nothing(store):
    def build(folder: Path) -> DataSource:
        write_numbers(folder)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        store.prepare("toy", 1, {}, build)
    assert kept(store) == []


def test_what_a_killed_build_left_is_cleared(store):
    left = store.folder("toy", 1, {})
    left = left.with_name(f".{left.name}.partial-killed")
    left.mkdir(parents=True)
    (left / "numbers.npy").write_bytes(b"half")
    store.prepare("toy", 1, {}, write_numbers)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "meta"])
def test_damaged_arrays_are_one_sentence_with_the_remedy(store, damage):
    store.prepare("toy", 1, {}, write_numbers)
    folder = store.folder("toy", 1, {})
    if damage == "truncated":
        os.truncate(folder / "numbers.npy", 500)
    elif damage == "missing":
        (folder / "numbers.npy").unlink()
    else:
        (folder / "meta.json").write_text("{")
    for attempt in (store.load, partial(store.prepare, build=write_numbers)):
        with pytest.raises(UserError, match="data fetch toy --force"):
            attempt("toy", 1, {})
    assert [row.state for row in store.prepared("toy")] == ["corrupt"]
    Store(store.cache, force=True).prepare("toy", 1, {}, write_numbers)
    assert [row.state for row in store.prepared("toy")] == ["good"]


def test_verify_finds_a_changed_byte_that_sizes_do_not_show(store):
    store.prepare("toy", 1, {}, write_numbers)
    path = store.folder("toy", 1, {}) / "numbers.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [row.state for row in store.prepared("toy")] == ["corrupt"]


def test_arrays_of_objects_are_never_unpickled(store):
    def build(folder: Path) -> DataSource:
        np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
        return DataSource("synthetic")

    store.prepare("toy", 1, {}, build)
    with pytest.raises(ValueError, match=r"[Pp]ython objects|pickle"):
        store.load("toy", 1, {})["objects"]


def test_create_array_is_an_npy_file(tmp_path):
    array = create_array(tmp_path / "a.npy", (3, 4), np.uint8)
    array[:] = 5
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 5).all()


def test_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="FLEXBENCH_CACHE"):
        Store(tmp_path / "cache").prepare("toy", 1, {}, write_numbers)


def test_full_disk_is_one_sentence_before_anything_is_fetched(server, store, monkeypatch):
    usage = SimpleNamespace(free=len(CONTENT))
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        store.fetch(resource_at(server.url("good")))
    assert not server.hits
    assert kept(store) == []


def test_cache_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXBENCH_CACHE", str(tmp_path / "elsewhere"))
    assert Store().cache == tmp_path / "elsewhere"


def test_meta_records_source_and_checksums(store):
    store.prepare("toy", 1, {"a": 1}, write_numbers)
    folder = store.folder("toy", 1, {"a": 1})
    meta = json.loads((folder / "meta.json").read_text())
    content = (folder / "numbers.npy").read_bytes()
    assert meta["files"]["numbers.npy"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert meta["source"] == {"kind": "synthetic", "detail": "numbers"}
