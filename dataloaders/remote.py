"""The files of a store at a URL, read as those of a folder are: shards from a cache on the local disk, or by ranges.

A shard that the cache has room for is fetched once, whole, compared with the manifest's hash and read from the disk
ever after. A store larger than the cache has as many shards in it as fit, always the same ones: with every cell wanted
once an epoch, throwing out what was used longest ago would leave nothing that is wanted next. The other shards are read
by ranges, only what is needed of them; like all that is decoded, that is checked by the crc32c of each chunk.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import wait
from functools import partial
from typing import Any

from scarcade.dataloaders.coming import Coming
from scarcade.dataloaders.fetchers import Fetchers
from scarcade.dataloaders.shard_cache import ShardCache
from scarcade.dataloaders.stored_files import read_all
from scarcade.engine.errors import CorruptError, MissingChunkError, OpenError
from scarcade.engine.folder import MANIFEST, MANIFEST_LIMIT, manifest_in
from scarcade.engine.storage import Mirror, bucket_of, shown

_AT_ONCE = 16  # requests on their way; a store answers many as fast as one
_PART_BYTES = 8 << 20  # of a whole file that come with one request
_SMALL_BYTES = 1 << 16  # files up to here are fetched together when the store is opened


def remote_manifest(url: str) -> dict[str, Any] | None:
    """The manifest at `url`; None if there is none.

    Raises:
        OpenError: there is no such bucket. StorageError: the store does not answer, or refuses. CorruptError: not ours.
    """
    mirror = Mirror(url)
    where = f"{shown(url)}/{MANIFEST}"
    try:
        content = mirror.content(MANIFEST, MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        if (bucket := bucket_of(url)) and not Mirror(bucket).is_there():
            raise OpenError(f"{shown(url)}: there is no such bucket in the store") from None
        return None
    if len(content) > MANIFEST_LIMIT:
        raise CorruptError(f"{where}: larger than {MANIFEST_LIMIT} bytes")
    return manifest_in(content, where)


class RemoteFiles:
    """Files below a URL (`scarcade.dataloaders.stored_files.Files`). Safe to use from several threads."""

    def __init__(self, url: str, manifest: Mapping[str, Any], cache: ShardCache | None) -> None:
        self.where = shown(url)
        self._mirror = Mirror(url)
        self._listed: Mapping[str, Any] = manifest["files"]
        self._cache = cache
        self._whole = _fitting(self._listed, cache.budget) if cache is not None else frozenset()
        self._fetchers: Fetchers[Any] = Fetchers(_AT_ONCE)
        self._coming = Coming()

    @property
    def retried(self) -> int:
        """How many requests were made again."""
        return self._mirror.retried

    def size(self, name: str) -> int:
        """As the manifest has it; what comes is compared with that."""
        return int(self._entry(name)["bytes"])

    def problems(self, *, deep: bool) -> list[str]:
        """What is wrong with the store by its manifest, as `engine.folder.problems` says it."""
        there = self._mirror.sizes()
        found = []
        for name, wanted in self._listed.items():
            if name not in there:
                found.append(f"{name}: missing")
            elif there[name] != wanted["bytes"]:
                found.append(f"{name}: {there[name]} bytes where {wanted['bytes']} were written")
            elif deep and self._streamed(name, None) != wanted["sha256"]:
                found.append(f"{name}: its content is not what was written")
        return found

    def handle(self, name: str) -> int | None:
        """Of a file that is cached, fetched if need be."""
        return self._cached(name)

    def fetch_small(self) -> None:
        """Have the many small files come at once: one after the other they would take longer than the large ones."""
        wanted = [name for name, one in self._listed.items() if one["bytes"] <= _SMALL_BYTES and name in self._whole]
        wait([self._fetchers.submit(partial(self._fetch, name)) for name in wanted])  # readers tell failures

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        if (handle := self._cached(name)) is not None:
            try:
                read_all(handle, offset, out, f"{self.where}: {name}")
            finally:
                os.close(handle)
            return
        for start, stop in self._coming.take(name, offset, out):
            out[start:stop] = self._range(name, offset + start, stop - start)

    def next_turn(self) -> None:
        """What is told by `ahead` from now on belongs to the next window (see `Coming`)."""
        self._coming.next_turn()

    def ahead(self, name: str, offset: int, n_bytes: int) -> bool:
        if name in self._whole:
            assert self._cache is not None
            if not self._cache.holds(self._entry(name)["sha256"]):
                self._fetchers.submit(partial(self._fetch, name))  # a failure is told by the reader, who tries again
            return True
        if n_bytes:
            fetch = partial(self._range, name, offset, n_bytes)
            self._coming.tell(name, offset, n_bytes, lambda: self._fetchers.submit(fetch))
        return False

    def _entry(self, name: str) -> Mapping[str, Any]:
        if name not in self._listed:
            raise MissingChunkError(f"{self.where}: {name} is not in the manifest")
        found: Mapping[str, Any] = self._listed[name]
        return found

    def _cached(self, name: str) -> int | None:
        """A handle of the whole file on this disk, fetched if need be; None: it is read by ranges."""
        if name not in self._whole or self._cache is None:
            return None
        wanted = self._entry(name)

        def fill(handle: int) -> None:
            for last in (False, True):  # a second time, for what the way may have done to it
                if self._streamed(name, handle) == wanted["sha256"]:
                    return
                if last:
                    raise CorruptError(
                        f"{self.where}: {name} is not what was written (its sha256 differs from the manifest)"
                    )

        return self._cache.filled(wanted["sha256"], wanted["bytes"], fill)

    def _fetch(self, name: str) -> None:
        if (handle := self._cached(name)) is not None:
            os.close(handle)

    def _streamed(self, name: str, handle: int | None) -> str:
        """sha256 of the file at the URL, written to `handle` on the way."""
        digest, size = hashlib.sha256(), self.size(name)
        for offset in range(0, size, _PART_BYTES):
            part = self._range(name, offset, min(_PART_BYTES, size - offset))
            digest.update(part)
            if handle is not None:
                os.pwrite(handle, part, offset)
        self._mirror.done_with(name)
        return digest.hexdigest()

    def _range(self, name: str, offset: int, n_bytes: int) -> bytes:
        try:
            return self._mirror.read(name, offset, n_bytes)
        except FileNotFoundError as error:
            raise MissingChunkError(f"{self.where}: {name} is missing (restore the store, or ingest again)") from error


def _fitting(listed: Mapping[str, Any], budget: int) -> frozenset[str]:
    """The files that are cached: all of them, or those with the smallest hashes, small ones first."""
    chosen: list[str] = []
    for name in sorted(listed, key=lambda name: (listed[name]["bytes"] > _SMALL_BYTES, listed[name]["sha256"])):
        budget -= listed[name]["bytes"]
        if budget < 0:
            break
        chosen.append(name)
    return frozenset(chosen)
