"""Files in a folder or in a bucket, by one small set of verbs (pyarrow.fs)."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from pyarrow import fs

from sdar_verl.errors import SdarError
from sdar_verl.untrusted import parse_json, shorten

SCHEMES = ("s3", "gs", "az", "file")
_CHUNK = 8 * 1024 * 1024


class StoreError(SdarError):
    """A folder or a bucket cannot be read or written; names it, and says what to look at."""


class DamagedError(StoreError):
    """A file can be read, and is not what it should be."""


class Store:
    """Files below one place; names are relative, with ``/`` between folders.

    Args:
        place: ``s3://bucket/path``, ``gs://``, ``az://container/path``, ``file:///path`` or a folder's path. S3 and its
            kin take credentials, region and ``AWS_ENDPOINT_URL`` from the environment, Azure ``AZURE_STORAGE_ACCOUNT``.

    Attributes:
        place: as given.
        folder: its absolute path, links resolved, on this machine's disks; None for a bucket.

    Raises:
        StoreError: another scheme, or no bucket of that name.
    """

    def __init__(self, place: str | Path):
        self.place = str(place) if str(place).endswith("://") else str(place).rstrip("/")
        try:
            self._fs, root = _open(self.place)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.place}: {_explain(error)}") from error
        self._root = root.rstrip("/")
        self.folder = Path(self._root).resolve() if isinstance(self._fs, fs.LocalFileSystem) else None

    def names(self, folder: str = "", *, unfinished: bool = False) -> dict[str, int]:
        """Name -> bytes of every file below ``folder``; empty when there is none.

        Args:
            folder: ``""`` for all.
            unfinished: also what writes into a folder left that were broken off.
        """
        selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)
        with self._told(f"list {folder or 'all files'}"):
            found = self._fs.get_file_info(selector)
        return {
            info.path[len(self._root) + 1 :]: info.size
            for info in found
            if info.type == fs.FileType.File and (unfinished or not info.path.endswith(_PARTIAL))
        }

    def read(self, name: str) -> bytes | None:
        """Content of a file; None when there is none."""
        with self._told(f"read {name}"):
            try:
                with self._fs.open_input_stream(self._path(name)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """An object written by :meth:`write_json`; None when there is no such file.

        Raises:
            DamagedError: it is no JSON object.
        """
        content = self.read(name)
        try:
            value = None if content is None else parse_json(content)
        except ValueError as error:
            raise DamagedError(f"{self.place}/{name} is damaged ({error})") from error
        if value is not None and not isinstance(value, dict):
            raise DamagedError(f"{self.place}/{name} is damaged: it holds {shorten(value)}, not an object")
        return value

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole: a reader sees the old content or the new one."""
        with self._told(f"write {name}"), self._output(name) as stream:
            stream.write(content)

    def write_json(self, name: str, value: Any) -> None:
        """The same for a JSON value, on one line."""
        self.write(name, (json.dumps(value) + "\n").encode())

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens when there is none."""
        with self._told(f"delete {name}"), suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it."""
        with self._told(f"delete {folder}"), suppress(FileNotFoundError):
            self._fs.delete_dir(self._path(folder))

    def upload(self, path: Path, name: str) -> dict[str, Any]:
        """Write the file at ``path`` as ``name``; returns its ``size`` and ``sha256``."""
        with self._told(f"write {name}"), path.open("rb") as source, self._output(name) as target:
            return _copy(source, target)

    def download(self, name: str, path: Path) -> dict[str, Any] | None:
        """Write ``name`` to ``path``, whose folders are made.

        Returns:
            Its ``size`` and ``sha256``; None when there is no such file.
        """
        with self._told(f"read {name}"):
            try:
                source = self._fs.open_input_stream(self._path(name))
            except FileNotFoundError:
                return None
            with source:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    return _copy(source, target)

    def check(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StoreError: one of these does not work.
        """
        name = f".sdar_check_{uuid.uuid4().hex}"
        self.write(name, b"sdar")
        found = self.read(name)
        self.delete(name)
        if found != b"sdar":
            raise StoreError(f"{self.place} does not give back what was written to it")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _output(self, name: str) -> Iterator[IO[bytes]]:
        path = self._path(name)
        if self.folder is None:  # an object appears when its stream is closed; one that is broken off never does
            with self._fs.open_output_stream(path) as stream:
                yield stream
            return
        self._fs.create_dir(os.path.dirname(path), recursive=True)
        partial = f"{path}.{uuid.uuid4().hex}{_PARTIAL}"
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.place}: cannot {what}: {_explain(error)}") from error


_PARTIAL = ".partial"
_GCS_RETRIES_S = 30


def _open(place: str) -> tuple[Any, str]:
    scheme, separator, rest = place.partition("://")
    if not separator:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    path, query, options = rest.partition("?")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme}://; known: {', '.join(f'{name}://' for name in SCHEMES)}")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError("a file:// place is an absolute path, with three slashes: file:///mnt/mirror")
    if scheme == "file":
        return fs.LocalFileSystem(), unquote(rest)
    if "#" in rest:
        raise ValueError("a bucket's place must not hold #, behind which nothing counts in an address")
    if not path.strip("/"):
        raise ValueError(f"no bucket is named; write {scheme}://BUCKET/PATH")
    if scheme == "az":
        account = os.environ.get("AZURE_STORAGE_ACCOUNT")
        if not account:
            raise ValueError("set AZURE_STORAGE_ACCOUNT to the storage account's name")
        if query:
            raise ValueError("az:// takes no options behind ?")
        return fs.AzureFileSystem(account_name=account), rest
    if scheme == "gs" and not query:
        query, options = "?", f"retry_limit_seconds={_GCS_RETRIES_S}"  # else a quarter of an hour
    return fs.FileSystem.from_uri(f"{scheme}://{quote(path, safe='/%:@')}{query}{options}")


def _copy(source: IO[bytes], target: IO[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


_CAUSES = (
    (("NO_SUCH_BUCKET", "NoSuchBucket", "Bucket not found", "HTTP 404", "HTTP status 404"), "there is no such bucket"),
    (("ACCESS_DENIED", "AccessDenied", "Forbidden", "HTTP 403", "HTTP status 403"), "no permission"),
    (("NETWORK_CONNECTION", "curlCode", "Could not connect", "Couldn't resolve"), "it cannot be reached"),
    (("No space left",), "the disk is full"),
)


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    for words, cause in _CAUSES:
        if any(word in text for word in words):
            return f"{cause} ({shorten(text) if len(text) > 400 else text})"
    return text
