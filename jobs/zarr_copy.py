"""An AnnData in zarr written as .h5ad, element by element and matrices by blocks of rows: memory of one block.

`anndata` would read the whole of it first.
"""

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from scarcade.dataloaders.reading import piece
from scarcade.dataloaders.source import AnnDataFile
from scarcade.jobs.storable import storable

_PARTS = ("X", "layers", "raw", "obsm", "varm", "obsp", "varp", "uns")
BLOCK = 16 << 20  # bytes
_SPARSE = {"csr": "csr_matrix", "csc": "csc_matrix"}


def zarr_to_h5ad(source: Path, path: Path, *, block: int = BLOCK) -> None:
    """The AnnData in the folder `source`, of either version of zarr, as the .h5ad `path`.

    Raises:
        OpenError, LimitError: the folder cannot be read. OSError: `path` cannot be written.
    """
    with AnnDataFile(source) as file, h5py.File(path, "w") as out:
        _encoded(out, "anndata")
        for name in ("obs", "var"):
            ad.io.write_elem(out, name, storable(file.frame(name)))
        for name in _PARTS:
            if name in file.root:
                _copy(file, name, out, block)


def _copy(file: AnnDataFile, key: str, out: h5py.Group, block: int) -> None:
    """The element `key` of the file, under the same key."""
    node = file.root[key]
    attributes = dict(node.attrs)
    kind = str(attributes.get("encoding-type", ""))
    where = f"{file.where}: {key}"
    if hasattr(node, "shape"):
        if node.ndim and node.dtype.kind in "iufb" and kind in {"", "array"}:
            _rows(node, out, key, where, block)
            _encoded(out[key], "array", "0.2.0")
            return
    elif kind[:3] in _SPARSE or "h5sparse_format" in attributes:
        matrix = file.stored_matrix(key, where)
        group = out.create_group(key)
        for name, part in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            _rows(part, group, name, f"{where}: {name}", block, signed=name != "data")
        _encoded(group, _SPARSE[matrix.layout])
        group.attrs["shape"] = np.array(matrix.shape, np.int64)
        return
    elif key == "raw" or (kind in {"", "dict"} and key != "uns" and not key.startswith("uns/")):
        _encoded(out.create_group(key), kind or ("raw" if key == "raw" else "dict"))
        for name in node:
            _copy(file, f"{key}/{name}", out, block)
        return
    value = file.frame(key) if key == "raw/var" else file.element(key)
    ad.io.write_elem(out, key, storable(value) if isinstance(value, pd.DataFrame) else value)


def _rows(array: Any, out: h5py.Group, name: str, where: str, block: int, *, signed: bool = False) -> None:
    """An array of numbers, block by block; places that are unsigned, as in our stores, as scipy wants them."""
    step = max(1, block // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
    kind = array.dtype.newbyteorder("=")
    if signed and kind.kind == "u":
        kind = np.dtype(np.int32 if kind.itemsize < 4 else np.int64)
    copy = out.create_dataset(name, shape=array.shape, dtype=kind)
    for start in range(0, array.shape[0], step):
        stop = min(start + step, array.shape[0])
        copy[start:stop] = piece(array, start, stop, where)


def _encoded(node: Any, kind: str, version: str = "0.1.0") -> None:
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, version
