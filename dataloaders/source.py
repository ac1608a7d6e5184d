"""An AnnData file that somebody else wrote (.h5ad, .zarr of version 2 or 3), or an AnnData in memory.

anndata reads whole matrices and trusts them. Here obs and var are read through anndata; a matrix is found and looked
through, and read by blocks (`matrix`).
"""

import errno
import fnmatch
import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from scarcade.dataloaders import limits
from scarcade.dataloaders.content import Stamp, content_hash, stamp
from scarcade.dataloaders.frames import plain_frame
from scarcade.dataloaders.inflated import inflated
from scarcade.dataloaders.matrix import Matrix
from scarcade.dataloaders.probe import probe
from scarcade.dataloaders.reading import attempt, check_present
from scarcade.engine.errors import LimitError, OpenError

_MAX_NAME = 1024  # bytes of a cell's name
_REMEMBERED = 10_000  # files
_sound: dict[Stamp, None] = {}  # .h5ad files that this process looked through and found in order; the oldest first


class AnnDataFile:
    """The parts of an AnnData file, opened after its metadata were checked; close it, or use it in a `with`.

    Raises:
        OpenError: not there, truncated, not AnnData. LimitError: sizes beyond any real file.
    """

    def __init__(self, path: str | Path, where: str | None = None) -> None:
        self.path = Path(path)
        self.where = where or str(path)  # in messages
        self.name = self.path.stem
        self._closing: Callable[[], None] = lambda: None
        self._matrices: dict[str, Matrix] = {}  # kept open: HDF5 forgets the chunks it decoded with an array's handle
        if not self.path.exists():
            raise OpenError(f"{path}: there is no such file or folder")
        if self.path.is_dir():
            self.kind = "zarr"
            self.root: Any = attempt(self.where, self._open_zarr)
        else:
            self.kind = "h5ad"
            self.root = attempt(self.where, self._open_h5)
        try:
            self._check_parts()
        except BaseException:
            self.close()
            raise

    def _open_h5(self) -> h5py.File:
        if not self.path.is_file():
            raise OpenError(f"{self.where}: is neither a file nor a folder")
        now = stamp(self.path)  # before it is looked through: what is written meanwhile makes it another file
        known = now in _sound
        wrong = None if known else probe(self.path)
        if wrong is not None:
            raise OpenError(f"{self.where}: is damaged in a way on which the HDF5 library {wrong}; copy it again")
        try:
            file = h5py.File(self.path, "r", rdcc_nbytes=16 << 20)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise OpenError(f"{self.where}: cannot be read (permission denied)") from error
            if "truncated file" in str(error):
                raise OpenError(f"{self.where}: the file is truncated; copy or download it again") from error
            raise OpenError(f"{self.where}: is not a readable .h5ad file ({error})") from error
        self._closing = file.close
        if not known:  # a query is validated, and read again when its turn comes
            limits.check_h5(file)
            _sound[now] = None
            if len(_sound) > _REMEMBERED:
                del _sound[next(iter(_sound))]
        return file

    def _open_zarr(self) -> Any:
        import zarr

        if not any((self.path / name).is_file() for name in ("zarr.json", ".zgroup")):
            raise OpenError(f"{self.where}: is a folder, but not a zarr store (no zarr.json or .zgroup in it)")
        limits.check_zarr(self.path)
        return zarr.open_group(str(self.path), mode="r", use_consolidated=False)

    def _check_parts(self) -> None:
        missing = [part for part in ("obs", "var") if part not in self.root]
        if missing:
            raise OpenError(f"{self.where}: is not AnnData: it has no {' and no '.join(missing)}")

    def __enter__(self) -> "AnnDataFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing()

    def layers(self) -> list[str]:
        """The matrices that could hold counts: "X", "raw.X" and the names of layers."""
        found = ["X"] if "X" in self.root else []
        if ("raw" in self.root and "X" in self.root["raw"]) or "raw.X" in self.root:  # the latter before anndata 0.7
            found.append("raw.X")
        if "layers" in self.root:
            found += sorted(str(name) for name in self.root["layers"])
        return found

    def element(self, key: str) -> Any:
        """One element (a frame, an array, a mapping) through anndata.

        Raises:
            OpenError: it cannot be read.
        """
        import anndata

        def read() -> Any:
            self._check_text_chunks(key)
            return anndata.io.read_elem(self.root[key])

        return attempt(f"{self.where}: {key}", read)

    def _check_text_chunks(self, key: str) -> None:
        """Zarr reads missing chunks of text as empty names; that is an error here (see also `check_present`)."""
        if self.kind != "zarr":
            return
        import zarr

        node = self.root[key]
        if isinstance(node, zarr.Array):
            if node.dtype.kind not in "iufb":
                check_present(node, f"{self.where}: {key}")
            return
        for name in node:
            self._check_text_chunks(f"{key}/{name}")

    def frame(self, key: str) -> pd.DataFrame:
        """`obs`, `var` or `raw/var` as a table with text as its index."""
        value = attempt(f"{self.where}: {key}", lambda: plain_frame(self.root[key]))
        if value is None:
            value = self.element(key)
        if isinstance(value, np.ndarray) and value.dtype.names:  # files of anndata before 0.7
            value = pd.DataFrame.from_records(value)
            first = "index" if "index" in value.columns else value.columns[0]
            value = value.set_index(first)
            value = value.map(lambda one: one.decode() if isinstance(one, bytes) else one)
            value.index = value.index.map(lambda one: one.decode() if isinstance(one, bytes) else one)
        if not isinstance(value, pd.DataFrame):
            raise OpenError(f"{self.where}: {key} is not a table")
        value.index = value.index.astype(str)
        return value

    def obs(self) -> pd.DataFrame:
        frame = self.frame("obs")
        if len(frame) and int(frame.index.str.len().max()) > _MAX_NAME:
            raise LimitError(f"{self.where}: a cell's name is longer than {_MAX_NAME} characters")
        return frame

    def var(self, layer: str) -> pd.DataFrame:
        """The genes of `layer` (raw.X has its own)."""
        if layer != "raw.X":
            return self.frame("var")
        return self.frame("raw/var" if "raw" in self.root else "raw.var")

    def matrix(self, layer: str) -> Matrix:
        """The matrix "X", "raw.X" or a layer.

        Raises:
            OpenError: there is none of that name. CsrError: its parts do not agree. LimitError: as `check_shape`.
        """
        if layer not in self.layers():
            raise OpenError(f"{self.where}: has no layer {layer!r}; it has {', '.join(self.layers()) or 'none'}")
        if layer in self._matrices:
            return self._matrices[layer]
        key = {"X": "X", "raw.X": "raw/X" if "raw" in self.root else "raw.X"}.get(layer, f"layers/{layer}")
        where = f"{self.where}: layer {layer!r}"
        found = attempt(where, lambda: self.stored_matrix(key, where))
        n_obs = self.n_cells
        if found.shape[0] != n_obs:
            raise OpenError(f"{where}: has {found.shape[0]} cells where obs has {n_obs}")
        self._matrices[layer] = found
        return found

    @property
    def n_cells(self) -> int:
        return attempt(f"{self.where}: obs", lambda: _length(self.root["obs"]))

    def stored_matrix(self, key: str, where: str) -> Matrix:
        """The matrix under `key`, dense or sparse, whatever version of anndata wrote it."""
        node = self.root[key]
        if hasattr(node, "shape"):
            if len(node.shape) != 2:
                raise OpenError(f"{where}: has {len(node.shape)} axes; wanted cells x genes")
            limits.check_shape(where, node.shape)
            return Matrix(where, "dense", tuple(node.shape), node)
        attributes = dict(node.attrs)
        layout = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))[:3]
        raw = attributes.get("shape", attributes.get("h5sparse_shape"))
        if layout not in {"csr", "csc"} or raw is None:
            raise OpenError(f"{where}: is neither a dense array nor CSR nor CSC")
        shape = tuple(int(side) for side in raw)
        if len(shape) != 2:
            raise OpenError(f"{where}: has {len(shape)} axes; wanted cells x genes")
        limits.check_shape(where, (shape[0], shape[1]))
        if self.kind == "zarr":
            check_present(node["data"], f"{where} data")
            if shape[1] > 1:  # with one gene every index is 0, and zarr leaves out chunks of zeros
                check_present(node["indices"], f"{where} indices")
        data, indices = inflated(node["data"]), inflated(node["indices"])
        return Matrix(where, layout, (shape[0], shape[1]), data, indices, node["indptr"])

    def content_hash(self) -> tuple[int, str]:
        """As `content.content_hash`."""
        return content_hash(self.path)


class InMemory:
    """An AnnData object behind the same interface as `AnnDataFile`."""

    kind = "memory"

    def __init__(self, adata: Any, name: str = "query") -> None:
        self.adata = adata.to_memory() if adata.isbacked else adata
        self.where, self.name, self.n_cells = f"AnnData {name!r}", name, int(adata.n_obs)

    def __enter__(self) -> "InMemory":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def layers(self) -> list[str]:
        found = ["X"] if self.adata.X is not None else []
        return found + (["raw.X"] if self.adata.raw is not None else []) + sorted(map(str, self.adata.layers))

    def obs(self) -> pd.DataFrame:
        return self.adata.obs.copy()  # type: ignore[no-any-return]

    def var(self, layer: str) -> pd.DataFrame:
        return (self.adata.raw.var if layer == "raw.X" else self.adata.var).copy()  # type: ignore[no-any-return]

    def element(self, key: str) -> Any:
        part, _, name = key.partition("/")
        found = getattr(self.adata, part)
        return found[name] if name else found

    def matrix(self, layer: str) -> Matrix:
        import scipy.sparse as sp

        if layer not in self.layers():
            raise OpenError(f"{self.where}: has no layer {layer!r}; it has {', '.join(self.layers()) or 'none'}")
        value = {"X": lambda: self.adata.X, "raw.X": lambda: self.adata.raw.X}.get(
            layer, lambda: self.adata.layers[layer]
        )()
        where = f"{self.where}: layer {layer!r}"
        if sp.issparse(value):
            value = value if value.format in {"csr", "csc"} else value.tocsr()
            return Matrix(where, value.format, value.shape, value.data, value.indices, value.indptr)
        return Matrix(where, "dense", value.shape, np.asarray(value))


Source = AnnDataFile | InMemory


def opened(source: Any, name: str | None = None, where: str | None = None) -> Source:
    """A path as an `AnnDataFile`, an AnnData as `InMemory`; `where` is what messages call the file."""
    return AnnDataFile(source, where) if isinstance(source, str | Path) else InMemory(source, name or "query")


def expand(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths, folders (every .h5ad and .zarr in them) and globs -> the files, each once, sorted within a folder.

    Raises:
        OpenError: one of them means no file.
    """
    found: list[Path] = []
    for given in [files] if isinstance(files, str | Path) else files:
        path = Path(given)
        if path.is_dir() and not any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
            try:
                inside = sorted(
                    p for p in path.iterdir() if fnmatch.fnmatch(p.name, "[!.]*.h5ad") or p.suffix == ".zarr"
                )
            except OSError as error:
                raise OpenError(f"{given}: cannot be read ({error.strerror})") from error
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(one) for one in sorted(glob.glob(str(given)))]
        if not inside:
            raise OpenError(f"{given}: no .h5ad or .zarr is there")
        found += inside
    unique = {os.path.realpath(path): path for path in found}
    return list(unique.values())


def _length(frame: Any) -> int:
    """Rows of a stored table, from its metadata."""
    if hasattr(frame, "shape"):
        return int(frame.shape[0])
    index = dict(frame.attrs).get("_index", "_index")
    node = frame[index.decode() if isinstance(index, bytes) else str(index)]
    return int((node if hasattr(node, "shape") else node["values" if "values" in node else "codes"]).shape[0])
