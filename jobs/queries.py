"""Which queries there are: paths, folders, globs or AnnData objects -> named tasks, each with a hash of its content.

Names. A query is called after its file, without the ending. Where several files have the same name (upper and lower
case count as the same, because some file systems say so) the first keeps it, and the next are NAME-2, NAME-3, in the
order in which they were given; folders and globs give theirs sorted.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.content import content_hash
from scarcade.dataloaders.source import expand
from scarcade.engine.errors import UsageError

_ENDINGS = (".h5ad", ".zarr")
LIMIT_NAME = 120  # characters; file systems allow 255 bytes, and endings are added


@dataclass(frozen=True)
class Task:
    """One query to map."""

    name: str
    source: Any  # a path, or an AnnData
    batch_key: str | None = None
    label_keys: tuple[str, ...] | None = None
    layer: str | None = None

    @property
    def path(self) -> str:
        """Where it comes from, for people."""
        return str(self.source) if isinstance(self.source, str | Path) else "(in memory)"

    def content_hash(self) -> str:
        """Changes with any byte of the query.

        Raises:
            OpenError, LimitError: it cannot be read.
        """
        if isinstance(self.source, str | Path):
            return content_hash(Path(self.source))[1]
        return _hash_of(self.source)


def tasks_of(
    queries: Any,
    *,
    batch_key: str | None = None,
    label_keys: Sequence[str] | None = None,
    layer: str | None = None,
) -> list[Task]:
    """One task for each query.

    Args:
        queries: a path or an AnnData, a sequence of them, or a mapping from names to them. A folder stands for the
            .h5ad and .zarr in it; a pattern with * ? [ for the files that match.

    Raises:
        UsageError: none at all. OpenError: a path, folder or pattern that is not there or means no file.
    """
    named: list[tuple[str, Any]] = []
    if isinstance(queries, Mapping):
        named = [(str(name), source) for name, source in queries.items()]
    else:
        given = [queries] if isinstance(queries, str | Path) or hasattr(queries, "obs_names") else list(queries)
        for one in given:
            if isinstance(one, str | Path):
                named += [(_stem(path), path) for path in expand([one])]
            else:
                named.append(("query", one))
    named = _once(named)
    if not named:
        raise UsageError("no query was given")
    keys = tuple(label_keys) if label_keys else None
    names = distinct([name for name, _ in named])
    return [Task(name, source, batch_key, keys, layer) for name, (_, source) in zip(names, named, strict=True)]


def distinct(names: Iterable[str]) -> list[str]:
    """Names that are file names, and differ even where upper and lower case do not."""
    found: list[str] = []
    taken: set[str] = set()
    for given in names:
        name = safe(given)
        candidate, number = name, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{name}-{number}"
        taken.add(candidate.casefold())
        found.append(candidate)
    return found


def safe(name: str) -> str:
    """`name` as a file name: no separators, no control characters, no dot in front, not too long."""
    cleaned = re.sub(r"[\x00-\x1f\x7f/\\:*?\"<>|]+", "_", name).strip().lstrip(".")
    return cleaned.encode()[:LIMIT_NAME].decode(errors="ignore") or "query"


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.suffix in _ENDINGS else path.name


def _once(named: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The same file is one query, however often it was given."""
    found: dict[Any, tuple[str, Any]] = {}
    for name, source in named:
        key = str(Path(source).resolve()) if isinstance(source, str | Path) else id(source)
        found.setdefault(key, (name, source))
    return list(found.values())


def _hash_of(adata: Any) -> str:
    """sha256 over counts, genes and obs of an AnnData in memory."""
    digest = hashlib.sha256()
    for matrix in (adata.X, *(adata.layers[name] for name in sorted(adata.layers))):
        if matrix is None:
            continue
        parts = (matrix.data, matrix.indices, matrix.indptr) if hasattr(matrix, "indptr") else (np.asarray(matrix),)
        for part in parts:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
    digest.update("\n".join(map(str, adata.var_names)).encode())
    digest.update(adata.obs.to_csv().encode())
    return digest.hexdigest()
