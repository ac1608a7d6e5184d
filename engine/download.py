"""One file from a web server, whole or not at all; tried again where that may help."""

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from scarcade import __version__
from scarcade.engine.errors import OpenError, StorageError
from scarcade.engine.storage import shown

_TRIES = 4
_PATIENCE_S = 30.0  # without a byte
_LATER = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one next time


def over_http(url: str) -> bool:
    """Whether `url` is that of a web server."""
    return url.lower().startswith(("http://", "https://"))


def download(url: str, target: Path, headers: Mapping[str, str] | None = None, *, limit: int | None = None) -> None:
    """Write what is at the http(s) `url` to `target`, not more than `limit` bytes of it.

    Raises:
        OpenError: there is nothing, more than the limit, or it may not be read.
        StorageError: the server did not answer after several tries.
    """
    problem: Any = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            _get(url, target, headers or {}, limit)
            return
        except urllib.error.HTTPError as error:
            if error.code not in _LATER:
                raise OpenError(f"{shown(url)}: the server says {error.code} {error.reason}") from error
            problem = error
        except ValueError as error:
            raise OpenError(f"{shown(url)}: is not a URL ({error})") from error
        except (OSError, HTTPException) as error:
            problem = error
    raise StorageError(f"{shown(url)}: the server did not answer after {_TRIES} tries ({problem})")


def _get(url: str, target: Path, headers: Mapping[str, str], limit: int | None) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": f"scarcade/{__version__}"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a key is not handed on to whoever a server sends us to
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer, open(target, "wb") as out:
        while piece := answer.read(8 << 20):
            out.write(piece)
            if limit is not None and out.tell() > limit:
                raise OpenError(f"{shown(url)}: the server sends more than {limit} bytes")
        wanted = answer.headers.get("Content-Length")
        if wanted is not None and out.tell() != int(wanted):
            raise OSError(f"{out.tell()} of {wanted} bytes came")
