"""Files from the network: pinned by digest, resumed where a connection broke, whole or absent."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from mmalign.runtime.files import digest_of, make_directory, storage_errors
from mmalign.runtime.log import say


class DownloadError(OSError):
    """A file that could not be fetched, or is not what was expected; says what to do instead."""

    def __str__(self) -> str:
        return str(self.args[-1])


def fetch(
    url: str,
    path: str | Path,
    sha256: str | None,
    *,
    accept: Collection[str] = (),
    retries: int = 3,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> str:
    """Fetch ``url`` to ``path``; nothing is asked of the network where the file is there already.

    What has arrived is kept beside ``path`` (``.part``) and continued by a Range request, in this
    call and in the next. ``path`` appears only after its digest was checked.

    Args:
        url: the pinned place.
        path: where the file goes.
        sha256: its digest; ``None`` where nobody could tell it in advance.
        accept: digests the user has looked at and takes for such a file.
        retries: how often a broken connection is taken up again.
        timeout: seconds without a byte after which a connection counts as broken.
        pause: seconds before the first retry, doubled each time.

    Returns:
        the digest of the file.

    Raises:
        DownloadError: refused by the server, broken off too often, or another digest.
        StorageError: the disk says no.
    """
    path = Path(path)
    if path.is_file():
        return _verified(path, path, url, sha256, accept)
    make_directory(path.parent)
    part = path.with_name(path.name + ".part")
    for attempt in range(retries + 1):
        resumed = part.exists()
        try:
            with storage_errors(path):
                _transfer(url, part, timeout)
        except _BrokenError as error:
            if attempt == retries:
                size = part.stat().st_size if part.exists() else 0
                raise DownloadError(
                    f"{url}: {error} ({retries + 1} attempts). {size:,} bytes are kept; the same "
                    "command goes on. Without network: fetch the file by hand, use --data PATH"
                ) from error
            say(f"{url}: {error}; trying again")
            time.sleep(pause * 2**attempt)
            continue
        if resumed and sha256 is not None and digest_of(part) != sha256 and attempt < retries:
            part.unlink()  # the first half may be of another version of the file
            continue
        break
    found = _verified(part, path, url, sha256, accept)
    os.replace(part, path)
    return found


class _BrokenError(Exception):
    """A connection that may work another time."""


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Append to ``part`` until it is whole."""
    import httpx

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    options = {"headers": headers, "timeout": timeout, "follow_redirects": True}
    try:
        with httpx.stream("GET", url, **options) as reply:  # type: ignore[arg-type]
            if reply.status_code == 416 and _size_of(reply.headers) == have:
                return  # everything had arrived before
            if reply.status_code == 416:
                part.unlink(missing_ok=True)
                raise _BrokenError("the file has become shorter; starting again")
            _refuse(reply.status_code, url)
            with part.open("ab" if reply.status_code == 206 else "wb") as file:
                for block in reply.iter_raw():  # as they come: a chunk held back would be lost
                    file.write(block)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise DownloadError(f"{url!r} is no address that can be fetched: {error}") from error
    except httpx.HTTPError as error:
        raise _BrokenError(f"the connection broke ({type(error).__name__}: {error})") from error


def _size_of(headers: object) -> int | None:
    """The whole file's size, of a reply that there is nothing left (``bytes */1234``)."""
    found = re.fullmatch(r"bytes \*/(\d+)", str(headers.get("content-range", "")))  # type: ignore[attr-defined]
    return int(found[1]) if found else None


def _refuse(status: int, url: str) -> None:
    if status in (200, 206):
        return
    if status in (408, 429) or status >= 500:
        raise _BrokenError(f"the server answered {status}")
    raise DownloadError(
        f"{url}: the server answered {status}. The file may have moved: fetch it by hand and use "
        "--data PATH"
    )


def _verified(file: Path, path: Path, url: str, sha256: str | None, accept: Collection[str]) -> str:
    """The digest of ``file``, where it is the expected one, or one the user takes."""
    found = digest_of(file)
    if found == sha256 or (sha256 is None and found in accept):
        return found
    if sha256 is None:
        if file == path:  # it was accepted when it was fetched
            return found
        raise DownloadError(
            f"{url}: its digest is not known in advance. {file} has sha256 {found}: look at it, "
            f"then take it with --accept-sha256 {found}"
        )
    if file != path:
        file.unlink()
    raise DownloadError(
        f"{url}: expected sha256 {sha256}, {file} has {found}. The file has changed, or was "
        "damaged on the way: delete it and try again, or use --data PATH with a copy you trust"
    )
