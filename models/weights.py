"""A folder of weights: safetensors, JSON, a card for people, and a manifest over all of them; read only if intact.

Nothing here knows what the tensors are of; `saved` makes models and deltas of them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scarcade.engine.errors import CorruptError, ModelFileError, OpenError, StorageError, UnsafeFileError
from scarcade.engine.folder import MANIFEST, committed, read_manifest, sha256, write_bytes

JSON_LIMIT = 256 << 20  # bytes; the names of a million genes are 20 MB
MODEL, DELTA = "model", "delta"
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib", ".npy")


def write_weights(
    folder: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    card: str,
    *,
    replace: bool,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write the folder, complete or not at all.

    Args:
        kind: `MODEL` or `DELTA`, the name of the two files. card: its README.md.
        beside: is given the unfinished folder, to write more files that are to stand in its manifest.

    Raises:
        StorageError: the folder exists and `replace` is not set, or cannot be written.
        ModelFileError: a weight is not finite.
    """
    folder = Path(folder)
    _check_finite(tensors, folder)
    # keys keep their order, for it means something: gene programs are the dimensions of a latent
    content = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
    extra: dict[str, Any] = {"kind": kind}
    with committed(folder, extra=extra, replace=replace) as work:
        try:
            save_file(dict(tensors), work / f"{kind}.safetensors")
        except SafetensorError as error:  # its way of telling that the disk is full
            raise StorageError(f"{folder}: cannot be written ({error})") from error
        write_bytes(work / f"{kind}.json", content)
        write_bytes(work / "README.md", card.encode())
        if beside is not None:
            beside(work)
        extra["fingerprint"] = content_fingerprint(work, kind)


def read_weights(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, JSON and fingerprint of a folder whose every byte is as it was written.

    Raises:
        UnsafeFileError: a pickle, which could run code. OpenError: not a folder of ours.
        CorruptError: a byte differs from what was written. ModelFileError: intact, but not of this `kind`, or no
            finite weights.
    """
    if not (folder / MANIFEST).is_file():
        candidates = [folder] if folder.is_file() else sorted(folder.glob("*"))
        if found := [path for path in candidates if path.suffix.lower() in PICKLES]:
            raise UnsafeFileError(
                f"{found[0]}: is a pickle, which can run code when it is read; convert a model of scvi-tools or "
                f"scArches with `scarcade import {folder} --out MODEL`"
            )
    if not folder.is_dir():
        raise OpenError(f"{folder}: not a {kind} folder ({'a file' if folder.exists() else 'no such folder'})")
    if not (folder / MANIFEST).is_file() and (folder / MODEL / MANIFEST).is_file():
        raise OpenError(f"{folder}: is a run; its model is in {folder / MODEL}")
    names = (f"{kind}.safetensors", f"{kind}.json")
    manifest = read_manifest(folder)
    if lacking := [name for name in names if name not in manifest["files"]]:
        other = kind_of(folder)
        hint = "; it is what a query added: load its reference with delta=FOLDER" if other == DELTA else ""
        raise ModelFileError(f"{folder}: not a {kind} folder (its manifest has no {lacking[0]}){hint}")
    # what lies beside the model (a latent store of gigabytes) is checked by who reads it
    wanted = {**manifest, "files": {name: manifest["files"][name] for name in names}}
    if wrong := _problems(folder, wanted):
        raise CorruptError(f"{folder}: {'; '.join(wrong)}; copy the folder again from where it came")
    found_fingerprint = content_fingerprint(folder, kind)
    if manifest.get("fingerprint") != found_fingerprint:
        raise CorruptError(f"{folder}: its fingerprint differs from the one in {MANIFEST}")
    path = folder / names[1]
    if path.stat().st_size > JSON_LIMIT:
        raise ModelFileError(f"{path}: larger than {JSON_LIMIT} bytes")
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ModelFileError(f"{path}: not a JSON object")
        tensors = load_file(folder / names[0])
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not JSON ({error})") from error
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{folder / names[0]}: not safetensors ({error})") from error
    _check_finite(tensors, folder)
    return tensors, raw, found_fingerprint


def fingerprint(folder: str | Path) -> str:
    """sha256 over weights and JSON of the model or delta in `folder`, as its manifest gives it.

    Raises:
        OpenError, CorruptError: there is no manifest of ours.
    """
    value = read_manifest(Path(folder)).get("fingerprint")
    if not isinstance(value, str):
        raise ModelFileError(f"{folder}: its {MANIFEST} names no fingerprint; it is not a model or delta of ours")
    return value


def kind_of(folder: str | Path) -> str | None:
    """ "model" or "delta" by the files in `folder`, or None."""
    for kind in (MODEL, DELTA):
        if (Path(folder) / f"{kind}.json").is_file():
            return kind
    return None


def content_fingerprint(folder: Path, kind: str) -> str:
    """The fingerprint by the files themselves, whatever the manifest says."""
    names = (f"{kind}.safetensors", f"{kind}.json")
    return hashlib.sha256("".join(f"{name} {sha256(folder / name)}\n" for name in names).encode()).hexdigest()


def _problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    found = []
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
            found.append(f"{name}: its content is not what was written")
    return found


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelFileError(f"{folder}: weight {name} is not finite")
