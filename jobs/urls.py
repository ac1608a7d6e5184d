"""Queries at URLs: which files a URL stands for. Nothing is fetched here but lists of names.

``s3://bucket/a.h5ad`` is a file, ``.../b.zarr`` a folder that is one query, and anything else a prefix that holds many
(or, with * in its last part, a pattern). ``https://`` has no lists: there each file is named.
"""

import fnmatch
from collections.abc import Sequence
from urllib.parse import quote, urlsplit, urlunsplit

from scarcade.engine.download import over_http
from scarcade.engine.errors import OpenError
from scarcade.engine.storage import Mirror, parted, shown

ENDINGS = (".h5ad", ".zarr")


def stem(url: str) -> str:
    """What a query at `url` is called: the last part, without its ending."""
    name = parted(url)[1]
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def expand_url(url: str) -> list[str]:
    """The URLs of the queries that `url` means, sorted.

    Raises:
        OpenError: there is none. StorageError: the store cannot be reached.
    """
    parent, last = parted(url)
    pattern = "*" in last or "[" in last
    if last.endswith(ENDINGS) and not pattern:
        return [url]
    if over_http(url):
        raise OpenError(f"{shown(url)}: a web server has no list of files; name each, one .h5ad a URL")
    folder = parent if pattern else url
    found = [
        _below(folder, name)
        for name, is_file in Mirror(folder, tries=1).entries()
        if name.endswith(".h5ad" if is_file else ".zarr")
        and (fnmatch.fnmatch(name, last) if pattern else not name.startswith("."))
    ]
    if not found:
        check_stores([url])
        raise OpenError(f"{shown(url)}: no .h5ad or .zarr is there")
    return found


def check_stores(urls: Sequence[str]) -> None:
    """Ask each store once: wrong credentials are told before anything starts, and not by every query.

    Raises:
        StorageError, OpenError: it refuses, or is not there. (A file that is not there is its query's failure.)
    """
    asked: set[tuple[str, str, str]] = set()
    for url in urls:
        parts = urlsplit(url)
        if over_http(url) or (place := (parts.scheme, parts.netloc, parts.query)) in asked:
            continue
        asked.add(place)
        parent, name = parted(url)
        if Mirror(parent, tries=1).exists(name):  # (the libraries of stores try three times themselves)
            continue
        bucket = urlunsplit(parts._replace(path=""))
        if parts.netloc and not Mirror(bucket, tries=1).is_there():
            raise OpenError(f"{shown(url)}: there is no bucket {parts.netloc.rpartition('@')[2]!r} in the store")


def _below(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
