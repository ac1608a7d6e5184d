"""What a command may take the place of: a folder of ours of the same kind, and none of its inputs.

`--force` says that an older result is not wanted any more. It does not say so of a folder with files of a user in it,
nor of the data that the command is to read.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scarcade.engine.errors import CorruptError, OpenError, UsageError
from scarcade.engine.folder import MANIFEST, MANIFEST_LIMIT, manifest_in, read_manifest
from scarcade.engine.published import is_there
from scarcade.engine.storage import Mirror, is_url, parted, shown

FOLDER_OF = {"store": "a store", "latent": "a latent", "model": "a model", "delta": "a delta", "export": "an export"}


def check_replaceable(out: str | Path, kind: str, inputs: Iterable[Any] = ()) -> None:
    """Pass if nothing is lost by writing a folder of this kind to `out`, whatever is there.

    Args:
        kind: as its manifest names it, of `FOLDER_OF`.
        inputs: files and folders, or URLs, that are read; what is neither is passed over.

    Raises:
        UsageError: `out` is, holds or lies in an input; or what is there is not a folder of ours of this kind.
    """
    for one in inputs:
        if isinstance(one, str | Path) and _meet(out, one):
            raise UsageError(f"{_named(out)}: is, holds or lies in {_named(one)}, which is read; choose another --out")
    if is_there(out) and (there := _lost(out, kind)):
        raise UsageError(
            f"{_named(out)}: {there}, and --force puts {FOLDER_OF[kind]} in the place of such a one alone; choose "
            "another --out, or remove it yourself"
        )


def _meet(out: str | Path, other: str | Path) -> bool:
    if is_url(out) or is_url(other):
        a, b = str(out).rstrip("/"), str(other).rstrip("/")
        return a == b or a.startswith(f"{b}/") or b.startswith(f"{a}/")
    mine, its = Path(out).resolve(), Path(other).resolve()
    return mine == its or mine in its.parents or its in mine.parents


def _lost(out: str | Path, kind: str) -> str | None:
    """What would be lost; None of a folder of ours of this kind, of a damaged one, and of one that is empty."""
    if not is_url(out) and Path(out).is_dir() and not any(Path(out).iterdir()):
        return None
    try:
        found = _manifest(out).get("kind", kind)
    except CorruptError:
        return None
    except OpenError:
        return "was not made by scarcade"
    return None if found == kind else f"is {FOLDER_OF.get(found, f'of another kind ({found})')}"


def _manifest(out: str | Path) -> dict[str, Any]:
    """That of the folder at a path or URL.

    Raises:
        OpenError: there is none. CorruptError: it is not what we write.
    """
    if not is_url(out):
        return read_manifest(Path(out))
    folder, name = parted(str(out))
    try:
        return manifest_in(Mirror(folder).content(f"{name}/{MANIFEST}", MANIFEST_LIMIT), _named(out))
    except FileNotFoundError as error:
        raise OpenError(f"{_named(out)}: has no {MANIFEST}") from error


def _named(place: str | Path) -> str:
    return shown(str(place))
