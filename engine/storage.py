"""Files and folders at a URL: folders are written on the local disk and copied there, the manifest last.

An object store has no rename, so the commit of a folder is its MANIFEST.json: a folder without one, or with
files that differ from it, was never finished. Any URL that Ray and pyarrow take is fine (``s3://bucket/runs``,
``gs://``, ``file://``).
"""

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from scarcade.engine.errors import OpenError, StorageError
from scarcade.engine.folder import MANIFEST
from scarcade.engine.patience import TRIES, Patience

T = TypeVar("T")
_AT_ONCE = 8  # files of a folder that are fetched at the same time
_GCS_PATIENCE_S = 5
_ATTEMPTS = 4  # of the library below, for each request, a few tenths of a second apart


def is_url(place: str | Path) -> bool:
    """Whether `place` names something other than a path of this machine."""
    return "://" in str(place)


def parted(url: str) -> tuple[str, str]:
    """(URL of the folder, name in it) of a file or folder at `url`; the query of the URL stays with the folder's."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder or "/" * (not parts.netloc))), unquote(name)


def shown(url: str) -> str:
    """`url` for people and records: without a key before the @ of its host, or a signature behind its ?."""
    parts = urlsplit(url)
    secret, at, host = parts.netloc.rpartition("@")
    if at and secret:
        parts = parts._replace(netloc=f"***@{host}")
    if parts.query and parts.scheme in ("http", "https"):
        parts = parts._replace(query="***")
    return urlunsplit(parts) if parts != urlsplit(url) else url


def bucket_of(url: str) -> str | None:
    """The URL of the bucket that `url` lies in; None where there are no buckets (file://)."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path="")) if parts.netloc else None


class Mirror:
    """Files and folders below one URL.

    Raises (every method):
        StorageError: the store did not answer after several tries, or refuses.
    """

    def __init__(self, url: str, *, tries: int = TRIES) -> None:
        from pyarrow import ArrowException, fs

        self.url = shown(url.rstrip("/"))
        if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in url:  # whose default is a quarter hour
            url += f"{'&' if '?' in url else '?'}retry_limit_seconds={_GCS_PATIENCE_S}"
        try:
            self.filesystem, self.root = fs.FileSystem.from_uri(url.rstrip("/"))
        except ValueError as error:
            known = "known are s3://, gs://, abfs://CONTAINER@ACCOUNT.dfs.core.windows.net, hdfs:// and file://"
            raise OpenError(f"{self.url}: not a URL of a store that can be reached ({error}); {known}") from error
        except OSError as error:  # S3 is asked where its bucket lies
            raise StorageError(
                f"{self.url}: the store does not answer ({error}); check the name of the bucket, its region "
                "(AWS_REGION) and the address (endpoint_override, AWS_ENDPOINT_URL)"
            ) from error
        if isinstance(self.filesystem, fs.S3FileSystem):
            # By itself pyarrow asks again for six seconds where nobody listens, and not at all after a 503. Each of
            # the many requests of an upload has to be tried again by itself: all in a row would never get through.
            _, (options,) = self.filesystem.__reduce__()
            again = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
            options["allow_delayed_open"] = True  # small files go up by one request instead of three
            self.filesystem = fs.S3FileSystem(**options, retry_strategy=again)
        self._has_folders = not isinstance(self.filesystem, fs.S3FileSystem)  # else names merely look like paths
        self._patience = Patience((OSError, ArrowException), tries)
        self._info = fs.FileSelector, fs.FileType
        self._open: dict[str, Any] = {}  # files that are read by ranges: each is asked for its size once

    @property
    def retried(self) -> int:
        """How many requests were made again."""
        return self._patience.retried

    def push(self, folder: Path, name: str, only: Iterable[str] | None = None) -> None:
        """Copy the committed `folder` to ``<url>/<name>`` ("": to the URL itself); its manifest comes last.

        `only`: files of it, by their names.
        """
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if only is None else [folder / one for one in only]
        below = f"{name}/" if name else ""

        def push(path: Path) -> None:
            self.push_file(path, below + path.relative_to(folder).as_posix())

        last = [path for path in files if path == folder / MANIFEST]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(push, [path for path in files if path not in last]):
                pass
        for path in last:
            push(path)

    def push_file(self, path: Path, name: str) -> None:
        """Copy one file to ``<url>/<name>``."""

        def copy() -> None:
            target = f"{self.root}/{name}"
            if self._has_folders:
                self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
            with open(path, "rb") as source, self.filesystem.open_output_stream(target) as out:
                shutil.copyfileobj(source, out, 8 << 20)

        self._tried(copy, name)

    def pull(self, name: str, target: Path) -> None:
        """Copy the folder ``<url>/<name>`` to `target`, which must not be there.

        Raises:
            OpenError: a file's name in the store leads out of the folder.
        """
        inside = self._tried(lambda: self._files(name), name)
        for inner in inside:
            if ".." in PurePosixPath(inner).parts or inner.startswith("/"):
                raise OpenError(f"{self.url}/{name}: its file {inner!r} lies outside of the folder")
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # an object store answers many as fast as one
            for _ in pool.map(lambda inner: self.pull_file(f"{name}/{inner}", target / inner), inside):
                pass

    def pull_file(self, name: str, target: Path) -> bool:
        """Copy one file to `target`; False if the store has none of that name."""

        def copy() -> bool:
            found = self.filesystem.get_file_info(f"{self.root}/{name}")
            if not found.is_file:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 8 << 20)
            if found.size is not None and target.stat().st_size != found.size:
                raise OSError(f"{target.stat().st_size} of {found.size} bytes came")
            return True

        return self._tried(copy, name)

    def content(self, name: str, limit: int) -> bytes:
        """A small file, not more than `limit` bytes of it.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._patience.tried(lambda: self._read(name, 0, limit), self._where(name))

    def read(self, name: str, offset: int, n_bytes: int) -> bytes:
        """Exactly these bytes of a file, by one request.

        Raises:
            FileNotFoundError: there is no such file. StorageError: also if it is shorter.
        """

        def part() -> bytes:
            found = self._read(name, offset, n_bytes)
            if len(found) != n_bytes:
                raise OSError(f"{len(found)} of {n_bytes} bytes came")
            return found

        return self._patience.tried(part, self._where(name))

    def done_with(self, name: str) -> None:
        """A file that was read by ranges is not read any more."""
        self._open.pop(name, None)

    def _read(self, name: str, offset: int, n_bytes: int) -> bytes:
        try:
            handle = self._open[name] = self._open.get(name) or self.filesystem.open_input_file(f"{self.root}/{name}")
            found: bytes = handle.read_at(n_bytes, offset)
        except BaseException:
            self._open.pop(name, None)
            raise
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL."""

        def found() -> dict[str, int]:
            selector, _ = self._info
            infos = self.filesystem.get_file_info(selector(self.root, allow_not_found=True, recursive=True))
            return {info.path.removeprefix(f"{self.root}/"): int(info.size) for info in infos if info.is_file}

        return self._tried(found, "")

    def entries(self, below: str = "") -> list[tuple[str, bool]]:
        """(name, whether it is a file) of what lies directly below ``<url>/<below>``, sorted."""

        def found() -> list[tuple[str, bool]]:
            selector, _ = self._info
            place = f"{self.root}/{below}".rstrip("/")
            infos = self.filesystem.get_file_info(selector(place, allow_not_found=True))
            return sorted((info.base_name, bool(info.is_file)) for info in infos)

        return self._tried(found, below)

    def names(self, below: str) -> list[str]:
        """Names of the folders directly below ``<url>/<below>``, sorted."""

        def found() -> list[str]:
            selector, kinds = self._info
            infos = self.filesystem.get_file_info(selector(f"{self.root}/{below}", allow_not_found=True))
            return sorted(info.base_name for info in infos if info.type == kinds.Directory)

        return self._tried(found, below)

    def exists(self, name: str) -> bool:
        """Whether ``<url>/<name>`` is a file."""
        return self._tried(lambda: bool(self.filesystem.get_file_info(f"{self.root}/{name}").is_file), name)

    def is_there(self) -> bool:
        """Whether the URL itself is a file, a folder or a bucket."""
        return self._tried(lambda: bool(self.filesystem.get_file_info(self.root).type != self._info[1].NotFound), "")

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first, so that half of it is never taken for the whole."""

        def gone() -> None:
            manifest = f"{self.root}/{name}/{MANIFEST}"
            if self.filesystem.get_file_info(manifest).is_file:
                self.filesystem.delete_file(manifest)
            found = self.filesystem.get_file_info(f"{self.root}/{name}")
            if found.type == self._info[1].Directory:
                self.filesystem.delete_dir(f"{self.root}/{name}")

        self._tried(gone, name)

    def remove_file(self, name: str) -> None:
        """Remove one file, if it is there."""

        def gone() -> None:
            if self.filesystem.get_file_info(f"{self.root}/{name}").is_file:
                self.filesystem.delete_file(f"{self.root}/{name}")

        self._tried(gone, name)

    def _files(self, name: str) -> list[str]:
        selector, _ = self._info
        base = f"{self.root}/{name}/"
        infos = self.filesystem.get_file_info(selector(base.rstrip("/"), allow_not_found=True, recursive=True))
        return [info.path.removeprefix(base) for info in infos if info.is_file]

    def _tried(self, action: Callable[[], T], name: str) -> T:
        try:
            return self._patience.tried(action, self._where(name))
        except FileNotFoundError as error:
            raise OpenError(f"{self._where(name)}: is not there ({error})") from error

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")
