"""Which queries there are: paths, URLs, tables or AnnData objects -> named tasks, each with a hash of its content.

Names. A query is called after its file, without the ending, or as its table or mapping says. Where several files have
the same name (upper and lower case count as the same, because some file systems say so) the first keeps it, and the
next are NAME-2, NAME-3, in the order in which they were given; folders and globs give theirs sorted.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.content import content_hash
from scarcade.dataloaders.source import expand
from scarcade.engine.errors import OpenError, UsageError
from scarcade.engine.storage import is_url, shown
from scarcade.jobs.manifest import Row, is_manifest, rows_of
from scarcade.jobs.urls import ENDINGS, check_stores, expand_url, stem

LIMIT_NAME = 120  # characters; file systems allow 255 bytes, and endings are added


@dataclass(frozen=True)
class Task:
    """One query to map."""

    name: str
    source: Any  # a path, a URL, or an AnnData
    batch_key: str | None = None
    label_keys: tuple[str, ...] | None = None
    layer: str | None = None
    url: str | None = None  # what was fetched, if `source` is a copy of it

    @property
    def path(self) -> str:
        """Where it comes from, for people."""
        if self.url is not None:
            return self.url
        return shown(str(self.source)) if isinstance(self.source, str | Path) else "(in memory)"

    def content_hash(self) -> str:
        """Changes with any byte of the query. (One at a URL is fetched first, see `jobs.fetched`.)

        Raises:
            OpenError, LimitError: it cannot be read.
        """
        if isinstance(self.source, str | Path):
            return content_hash(Path(self.source))[1]
        return _hash_of(self.source)


@dataclass(frozen=True)
class Options:
    """The columns and layer of a query, of its own or of the command."""

    batch_key: str | None
    label_keys: tuple[str, ...] | None
    layer: str | None


@dataclass(frozen=True)
class _Found:
    """A query before names are settled; `name` is its own if `told`, else that of its file."""

    name: str
    told: bool
    source: Any
    options: Options


def tasks_of(
    queries: Any,
    *,
    batch_key: str | None = None,
    label_keys: Sequence[str] | None = None,
    layer: str | None = None,
) -> list[Task]:
    """One task for each query.

    Args:
        queries: a path, URL or AnnData, a sequence of them, or a mapping from names to them. A folder (or the prefix of
            an object store) stands for the .h5ad and .zarr in it; a pattern with * ? [ for the files that match; a
            .csv or .tsv for the queries in its rows, whose own options go before those given here.

    Raises:
        UsageError: none at all, or a table that cannot be meant. OpenError: a path, folder or pattern that is not there
            or means no file. StorageError: a store of a URL that cannot be reached.
    """
    options = Options(batch_key, tuple(label_keys) if label_keys else None, layer)
    found: list[_Found] = []
    if isinstance(queries, Mapping):
        found = [_Found(str(name), False, source, options) for name, source in queries.items()]
    else:
        one = isinstance(queries, str | Path) or hasattr(queries, "obs_names")
        for given in [queries] if one else list(queries):
            found += _found(given, options)
    found = _once(found)
    if not found:
        raise UsageError("no query was given")
    told = [one.name for one in found if one.told]
    names = iter(distinct([one.name for one in found if not one.told], taken=map(safe, told)))
    own = iter(distinct(told))
    return [
        Task(
            next(own) if one.told else next(names),
            one.source,
            one.options.batch_key,
            one.options.label_keys,
            one.options.layer,
        )
        for one in found
    ]


def _found(given: Any, options: Options) -> Iterator[_Found]:
    """What one argument means."""
    if not isinstance(given, str | Path):
        yield _Found("query", False, given, options)
    elif is_manifest(given):
        for row in rows_of(given):
            yield from _of_row(row, options)
    elif is_url(given):
        urls = expand_url(str(given))
        check_stores(urls)
        for url in urls:
            yield _Found(stem(url), False, url, options)
    else:
        for path in expand([given]):
            yield _Found(_stem(path), False, path, options)


def _of_row(row: Row, options: Options) -> Iterator[_Found]:
    """The query of a row, or those of its folder or pattern; what is not there is a query too, which will fail."""
    own = Options(row.batch_key or options.batch_key, row.label_keys or options.label_keys, row.layer or options.layer)
    if is_url(row.path) or Path(row.path).is_file():
        inside: list[Any] = [row.path if is_url(row.path) else Path(row.path)]
    else:
        try:
            inside = list(expand([row.path]))
        except OpenError:
            inside = [Path(row.path)]
    if len(inside) > 1 and row.name is not None:
        raise UsageError(
            f"line {row.line} of the table: {row.path} stands for {len(inside)} files, which cannot all be {row.name!r}"
        )
    for source in inside:
        name = stem(source) if isinstance(source, str) else _stem(source)
        yield _Found(row.name or name, row.name is not None, source, own)


def distinct(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Names that are file names, none of `taken`, and differ even where upper and lower case do not."""
    found: list[str] = []
    used = {name.casefold() for name in taken}
    for given in names:
        name = safe(given)
        candidate, number = name, 1
        while candidate.casefold() in used:
            number += 1
            candidate = f"{name}-{number}"
        used.add(candidate.casefold())
        found.append(candidate)
    return found


def safe(name: str) -> str:
    """`name` as a file name: no separators, no control characters, no dot in front, not too long."""
    cleaned = re.sub(r"[\x00-\x1f\x7f/\\:*?\"<>|]+", "_", name).strip().lstrip(".")
    return cleaned.encode()[:LIMIT_NAME].decode(errors="ignore") or "query"


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in ENDINGS else path.name


def _once(found: Sequence[_Found]) -> list[_Found]:
    """The same file is one query, however often it was given; with another name or column of batches it is another."""
    kept: dict[Any, _Found] = {}
    for one in found:
        source = one.source
        if isinstance(source, str | Path):
            place: Any = str(source) if is_url(source) else str(Path(source).resolve())
        else:
            place = id(source)
        kept.setdefault((place, one.name if one.told else None, one.options), one)
    return list(kept.values())


def _hash_of(adata: Any) -> str:
    """sha256 over counts, genes, obs and obsm of an AnnData in memory."""
    digest = hashlib.sha256()
    raw = () if adata.raw is None else (adata.raw.X,)
    beside = (adata.obsm[name] for name in sorted(adata.obsm))
    for matrix in (adata.X, *(adata.layers[name] for name in sorted(adata.layers)), *raw, *beside):
        if matrix is None:
            continue
        if hasattr(matrix, "to_csv"):
            digest.update(matrix.to_csv().encode())
            continue
        parts = (matrix.data, matrix.indices, matrix.indptr) if hasattr(matrix, "indptr") else (np.asarray(matrix),)
        for part in parts:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
    digest.update("\n".join(map(str, adata.var_names)).encode())
    digest.update(adata.obs.to_csv().encode())
    return digest.hexdigest()
