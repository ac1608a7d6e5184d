"""Puts a model where others find it, and fetches one: a folder, an object store, Hugging Face.

What comes is what went: all files that the manifest lists, to the last byte, and no others. Both ends are the whole
model or none: the manifest comes last, or the folder by one rename.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scarcade.engine.download import over_http
from scarcade.engine.errors import CorruptError, OpenError, StorageError, UsageError
from scarcade.engine.folder import MANIFEST, committed, problems, read_manifest
from scarcade.engine.lock import sole_writer
from scarcade.engine.replaceable import check_replaceable
from scarcade.engine.storage import Mirror, is_url, parted, shown
from scarcade.jobs.elsewhere import Elsewhere

KINDS = ("model", "delta")


def push(model: str | Path, url: str | Path, *, replace: bool = False) -> Path | str:
    """Copy the model (or delta) in the folder `model` to `url`, a folder or a URL; returns where it is.

    A push that was stopped is finished by the next one. The same model that is there already is left as it is.

    Raises:
        OpenError: `model` is none. CorruptError: it is damaged. UsageError: something else is at `url`, and is not to
            be replaced, or is nothing to be replaced; it cannot be written to. StorageError: the store does not work.
    """
    source = Path(model)
    manifest = _ours(source)
    if not is_url(url):
        return _copied(source, manifest, Path(url), replace=replace)
    place = str(url).rstrip("/")
    if over_http(place) or place.startswith("hf://"):
        raise UsageError(
            f"{shown(place)}: cannot be written to from here; `huggingface-cli upload REPOSITORY {source}` puts the "
            "folder on Hugging Face, and hf://USER/REPOSITORY fetches it"
        )
    parent, name = parted(place)
    if not name:
        raise UsageError(f"{shown(place)}: is a whole bucket; name a folder in it")
    mirror, content = Mirror(parent), (source / MANIFEST).read_bytes()
    sizes = Mirror(place).sizes()
    if MANIFEST in sizes:
        if sizes[MANIFEST] == len(content) and mirror.content(f"{name}/{MANIFEST}", len(content)) == content:
            if _complete(sizes, manifest):
                return shown(place)
        elif not replace:
            raise UsageError(f"{shown(place)}: another one is there; --force replaces it")
        check_replaceable(place, _kind(manifest))
        mirror.remove(name)
    elif foreign := sorted(set(sizes) - set(manifest["files"])):  # else a push was stopped
        raise UsageError(f"{shown(place)}: holds {foreign[0]!r}, which is not of this model; choose another place")
    mirror.push(source, name, only=[*manifest["files"], MANIFEST])
    if not _complete(Mirror(place).sizes(), manifest):
        raise StorageError(f"{shown(place)}: not all that was written is there; run the same command again")
    return shown(place)


def pull(url: str | Path, model: str | Path, *, replace: bool = False) -> Path:
    """Copy the model (or delta) at `url`, a URL or a folder, to the folder `model`; every byte is checked.

    Raises:
        OpenError: there is none. CorruptError: it is damaged. UsageError: something else is in `model`, and is not to
            be replaced. StorageError: the store does not work, or the folder cannot be written.
    """
    target = Path(model)
    if not is_url(url):
        return _copied(Path(url), _ours(Path(url)), target, replace=replace)
    place = Elsewhere(str(url))
    with sole_writer(target):
        with tempfile.TemporaryDirectory() as scratch:
            manifest = place.manifest(Path(scratch) / MANIFEST)
            content = (Path(scratch) / MANIFEST).read_bytes()
        _check_kind(manifest, place.where)
        if not _is_it(target, content):
            _check_target(target, manifest, replace or _claims_it(target, content))
            with committed(target, extra=_extra(manifest), replace=True) as work:
                place.fetch(manifest, work)
    return target


def _copied(source: Path, manifest: Mapping[str, Any], target: Path, *, replace: bool) -> Path:
    """`source` as a folder `target` of this machine."""
    content = (source / MANIFEST).read_bytes()
    with sole_writer(target):
        if _is_it(target, content):
            return target
        _check_target(target, manifest, replace or _claims_it(target, content), source)
        with committed(target, extra=_extra(manifest), replace=True) as work:
            for name in manifest["files"]:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, work / name)
    if (target / MANIFEST).read_bytes() != content:
        raise CorruptError(f"{target}: is not what was read from {source}; run the same command again with --force")
    return target


def _ours(folder: Path) -> dict[str, Any]:
    """The manifest of a model or delta of this machine, every byte of which is as it was written.

    Raises:
        OpenError, CorruptError: it is none, or damaged.
    """
    if not folder.is_dir():
        raise OpenError(f"{folder}: there is no such folder")
    if (folder / "config.toml").is_file() and (folder / "model" / MANIFEST).is_file():
        raise OpenError(f"{folder}: is a run; the model to give is {folder / 'model'}")
    manifest = read_manifest(folder)
    _check_kind(manifest, str(folder))
    if wrong := problems(folder):
        raise CorruptError(f"{folder}: {wrong[0]}")
    return manifest


def _check_kind(manifest: Mapping[str, Any], where: str) -> None:
    if _kind(manifest) not in KINDS:
        raise OpenError(f"{where}: is a {_kind(manifest)}; what is shared is a model, or the delta of a query")


def _check_target(target: Path, manifest: Mapping[str, Any], replace: bool, *inputs: Path) -> None:
    if target.exists() and not replace:
        raise UsageError(f"{target}: exists already; --force replaces it")
    check_replaceable(target, _kind(manifest), inputs)


def _claims_it(target: Path, content: bytes) -> bool:
    """Whether the folder has this manifest: if it is damaged, it is mended."""
    path = target / MANIFEST
    return path.is_file() and path.read_bytes() == content


def _is_it(target: Path, content: bytes) -> bool:
    """Whether the folder is there already, whole."""
    return _claims_it(target, content) and not problems(target)


def _complete(sizes: Mapping[str, int], manifest: Mapping[str, Any]) -> bool:
    return MANIFEST in sizes and all(sizes.get(name) == one["bytes"] for name, one in manifest["files"].items())


def _extra(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "files"}


def _kind(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("kind"))
