"""Folders that are complete or not there: written under a temporary name, committed by one rename.

Models, checkpoints, deltas and stores are such folders. A ``MANIFEST.json`` in each lists every file with
its size and sha256, so that a missing, cut or flipped file is found before it is used.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scarcade.engine.errors import CorruptError, OpenError, StorageError

MANIFEST = "MANIFEST.json"
MANIFEST_LIMIT = 256 << 20  # bytes; a manifest beyond it is refused unread
_TEMPORARY = ".tmp-"
_MOVED_ASIDE = re.compile(r"-old-[a-z0-9_]{8}$")  # as `tempfile` names it; a target may itself be called x-old-y


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON under `path`, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`content` under `path`, whole or not at all."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def committed(target: Path, *, extra: Mapping[str, Any] | None = None, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    The manifest is written last; `extra` stands in it beside the files. With `replace` an older
    `target` is moved aside first and removed after, so that one of the two is always there.

    Raises:
        StorageError: `target` exists and `replace` is not set, or the disk is full.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise StorageError(f"{target}: exists already")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent))
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        work.chmod(0o755)  # mkdtemp gives 0700; the result is as readable as any other folder
        yield work
        write_manifest(work, extra or {})
        for folder, _, names in os.walk(work):
            for name in names:
                os.chmod(Path(folder) / name, 0o644)  # safetensors makes its files readable by their owner alone
            sync(Path(folder))
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(work, target)
        sync(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(folder: Path, extra: Mapping[str, Any]) -> None:
    """``MANIFEST.json`` over every file below `folder`, each synced to the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {**extra, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`.

    Raises:
        OpenError: there is none. CorruptError: it is not what we write.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise CorruptError(f"{path}: larger than {MANIFEST_LIMIT} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise OpenError(f"{folder}: has no readable {MANIFEST} ({error.strerror})") from error
    return manifest_in(content, str(path))


def manifest_in(content: bytes, where: str) -> dict[str, Any]:
    """The manifest that a file holds.

    Raises:
        CorruptError: it is not what we write.
    """
    try:
        manifest = json.loads(content)
        files = manifest["files"]
        if not all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values()):
            raise TypeError("files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{where}: not a manifest of ours ({error})") from error
    return dict(manifest)


def problems(folder: Path, *, deep: bool = True) -> list[str]:
    """What is wrong with `folder` by its manifest; empty if it is intact. `deep` reads every byte.

    Raises:
        OpenError, CorruptError: as `read_manifest`.
    """
    found = []
    for name, wanted in read_manifest(folder)["files"].items():
        path = Path(folder) / name
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            found.append(f"{name}: lies outside of the folder")
        elif not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != wanted["bytes"]:
            found.append(f"{name}: {path.stat().st_size} bytes where {wanted['bytes']} were written")
        elif deep and sha256(path) != wanted["sha256"]:
            found.append(f"{name}: its content is not what was written")
    return found


def sweep(parent: Path) -> None:
    """Remove what a killed `committed` left in `parent`. Only call it where no other process writes.

    A folder that was moved aside by a replacement that never finished is put back first.
    """
    for left in sorted(Path(parent).glob(f"{_TEMPORARY}*")):
        for moved in left.iterdir() if left.is_dir() and _MOVED_ASIDE.search(left.name) else ():
            home = Path(parent) / moved.name
            if not home.exists():
                os.replace(moved, home)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
