"""An AnnData file that somebody else wrote (.h5ad, .zarr of version 2 or 3) or an AnnData in memory, read by blocks.

anndata reads whole matrices and trusts them. Here obs and var are read through anndata, and matrices by blocks of
cells that are checked (`counts`) before anything indexes with them; memory does not depend on the number of cells.
"""

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import pandas as pd

from scarcade.dataloaders import limits
from scarcade.dataloaders.content import Stamp, content_hash, stamp
from scarcade.dataloaders.counts import Csr, Place, check_indptr, checked, dense_to_csr
from scarcade.dataloaders.frames import plain_frame
from scarcade.dataloaders.inflated import inflated
from scarcade.dataloaders.probe import probe
from scarcade.engine.errors import CsrError, LimitError, MissingChunkError, OpenError, ScarcadeError
from scarcade.engine.quiet import quiet

BLOCK = 1 << 22  # values of a block: 16 MB of indices, 16 to 32 MB of values
_POINTERS = 1 << 16  # cells whose row pointers are read at once
_MAX_NAME = 1024  # bytes of a cell's name
_REMEMBERED = 10_000  # files
_sound: dict[Stamp, None] = {}  # .h5ad files that this process looked through and found in order; the oldest first
T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """One matrix of cells x genes as it lies in a file; `indices` and `indptr` only where it is sparse."""

    where: str
    layout: str  # "dense", "csr" or "csc"
    shape: tuple[int, int]
    data: Any
    indices: Any = None
    indptr: Any = None

    @property
    def n_stored(self) -> int:
        return int(np.prod(self.shape)) if self.layout == "dense" else int(self.data.shape[0])


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
            self.root: Any = _attempt(self.where, self._open_zarr)
        else:
            self.kind = "h5ad"
            self.root = _attempt(self.where, self._open_h5)
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

        return _attempt(f"{self.where}: {key}", read)

    def _check_text_chunks(self, key: str) -> None:
        """Zarr reads missing chunks of text as empty names; that is an error here (see also `_present`)."""
        if self.kind != "zarr":
            return
        import zarr

        node = self.root[key]
        if isinstance(node, zarr.Array):
            if node.dtype.kind not in "iufb":
                _present(node, f"{self.where}: {key}")
            return
        for name in node:
            self._check_text_chunks(f"{key}/{name}")

    def frame(self, key: str) -> pd.DataFrame:
        """`obs`, `var` or `raw/var` as a table with text as its index."""
        value = _attempt(f"{self.where}: {key}", lambda: plain_frame(self.root[key]))
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
        found = _attempt(where, lambda: self.stored_matrix(key, where))
        n_obs = self.n_cells
        if found.shape[0] != n_obs:
            raise OpenError(f"{where}: has {found.shape[0]} cells where obs has {n_obs}")
        self._matrices[layer] = found
        return found

    @property
    def n_cells(self) -> int:
        return _attempt(f"{self.where}: obs", lambda: _length(self.root["obs"]))

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
            _present(node["data"], f"{where} data")
            if shape[1] > 1:  # with one gene every index is 0, and zarr leaves out chunks of zeros
                _present(node["indices"], f"{where} indices")
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


def blocks(
    matrix: Matrix, place: Place, *, integer: bool = True, size: int = BLOCK, workspace: Path | None = None
) -> Iterator[tuple[int, Csr]]:
    """Every cell of `matrix` in order, as (first cell, checked counts) of at most about `size` values each.

    CSC is turned into rows through files in `workspace` (a temporary folder if None is given).

    Raises:
        CsrError, CountsError: as `counts.checked`. OpenError: the file's bytes cannot be decoded.
    """
    if matrix.layout == "dense":
        yield from _dense_blocks(matrix, place, integer, size)
    elif matrix.layout == "csr":
        yield from _csr_blocks(matrix, place, integer, size)
    else:
        from scarcade.dataloaders.transpose import csc_blocks

        yield from csc_blocks(matrix, place, integer, size, workspace)


def _dense_blocks(matrix: Matrix, place: Place, integer: bool, size: int) -> Iterator[tuple[int, Csr]]:
    n_cells, n_genes = matrix.shape
    step = max(1, size // max(n_genes, 1))
    chunks = getattr(matrix.data, "chunks", None)
    if chunks and step > chunks[0]:
        step -= step % chunks[0]
    for first in range(0, n_cells, step):
        values = piece(matrix.data, first, min(first + step, n_cells), matrix.where)
        yield first, dense_to_csr(values, _at(place, first), integer=integer)


def _csr_blocks(matrix: Matrix, place: Place, integer: bool, size: int) -> Iterator[tuple[int, Csr]]:
    n_cells, n_genes = matrix.shape
    check_parts(matrix, n_cells)
    for start in range(0, n_cells, _POINTERS):
        stop = min(start + _POINTERS, n_cells)
        raw = piece(matrix.indptr, start, stop + 1, f"{matrix.where}: indptr")
        pointers = check_indptr(raw, matrix.n_stored, n_genes, _at(place, start))
        first = start
        while first < stop:
            begin = pointers[first - start]
            last = start + int(np.searchsorted(pointers, begin + size, side="right")) - 1
            last = min(max(last, first + 1), stop)
            end = pointers[last - start]
            indices = piece(matrix.indices, begin, end, f"{matrix.where}: indices")
            data = piece(matrix.data, begin, end, f"{matrix.where}: data")
            own = pointers[first - start : last - start + 1] - begin
            yield first, checked(own, indices, data, n_genes, _at(place, first), integer=integer)
            first = last


def check_parts(matrix: Matrix, n_major: int) -> None:
    """The lengths of a sparse matrix's three arrays and the ends of its pointers.

    Raises:
        CsrError: they do not agree.
    """
    for name, part in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
        if not hasattr(part, "shape") or len(part.shape) != 1:
            raise CsrError(f"{matrix.where}: {name} is not a list of numbers")
    if matrix.data.shape != matrix.indices.shape:
        raise CsrError(f"{matrix.where}: {matrix.data.shape[0]} values but {matrix.indices.shape[0]} indices")
    if matrix.indptr.shape[0] != n_major + 1:
        raise CsrError(
            f"{matrix.where}: indptr has {matrix.indptr.shape[0]} entries; "
            f"wanted {n_major + 1} for shape {matrix.shape}"
        )
    ends = [int(piece(matrix.indptr, at, at + 1, f"{matrix.where}: indptr")[0]) for at in (0, n_major)]
    if ends != [0, matrix.n_stored]:
        raise CsrError(f"{matrix.where}: indptr runs from {ends[0]} to {ends[1]}; wanted 0 to {matrix.n_stored}")


def piece(array: Any, start: int, stop: int, where: str) -> np.ndarray:
    """``array[start:stop]`` in memory.

    Raises:
        OpenError: its bytes cannot be decoded.
    """
    if stop <= start:
        return np.empty((0, *array.shape[1:]), array.dtype)
    return _attempt(where, lambda: np.asarray(array[int(start) : int(stop)]))


def _at(place: Place, first: int) -> Place:
    return Place(place.where, place.cells, place.genes, first)


def _length(frame: Any) -> int:
    """Rows of a stored table, from its metadata."""
    if hasattr(frame, "shape"):
        return int(frame.shape[0])
    index = dict(frame.attrs).get("_index", "_index")
    node = frame[index.decode() if isinstance(index, bytes) else str(index)]
    return int((node if hasattr(node, "shape") else node["values" if "values" in node else "codes"]).shape[0])


def _present(array: Any, where: str) -> None:
    """Whether every chunk of a zarr array is on the disk and not empty: zarr reads those that are not as zeros.

    Raises:
        MissingChunkError: how many are not.
    """
    folder = Path(str(array.store.root)) / array.path if hasattr(array.store, "root") else None
    if 0 in array.shape or folder is None:
        return
    held = sum(
        1
        for parent, _, files in os.walk(folder)
        for name in files
        if name not in {"zarr.json", ".zarray", ".zattrs"} and os.path.getsize(os.path.join(parent, name)) > 0
    )
    unit = array.shards or array.chunks
    wanted = int(np.prod([-(-side // part) for side, part in zip(array.shape, unit, strict=True)]))
    if held < wanted:
        raise MissingChunkError(f"{where}: {wanted - held} of {wanted} chunks are missing or empty")


def _attempt(where: str, read: Callable[[], T]) -> T:
    """The result of `read`; what h5py, zarr, anndata and their codecs raise on broken bytes becomes an OpenError."""
    try:
        with quiet():  # anndata's and zarr's advice is for those who wrote the file
            return read()
    except ScarcadeError:
        raise
    except MemoryError as error:
        raise LimitError(f"{where}: is too large to be read ({error})") from error
    except Exception as error:  # broken bytes raise anything, from KeyError to zlib's own
        if "filter returned failure" in str(error):  # HDF5 could not unpack a chunk
            raise OpenError(
                f"{where}: its bytes are damaged ({str(error)[:200]}); copy or download the file again"
            ) from error
        raise OpenError(f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]})") from error
