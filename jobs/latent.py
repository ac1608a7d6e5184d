"""The latent of many cells on disk: mean, variance, batch and labels of each; written as it comes, read as a whole.

``latent.zarr`` is a zarr v3 AnnData group without X, which `anndata.read_zarr` and scanpy open: obsm[KEY] holds the
means, obsm[KEY + "_variance"] the variances, obs the codes, uns["scarcade_latent"] what it was made from. Every byte
stands under a checksum, and it is committed by one rename. Beside a model it holds no cell names: a model that is
shared must not carry barcodes or donors along.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from scarcade.dataloaders.arrays import ArrayReader, ArrayWriter, LocalFiles, StringReader, StringWriter
from scarcade.dataloaders.writer import smallest_codes
from scarcade.engine.contracts import Categories
from scarcade.engine.errors import CategoryError, CorruptError, OpenError
from scarcade.engine.folder import committed, read_manifest

FORMAT = 1
KIND = "latent"
VARIANCE = "_variance"


@dataclass(frozen=True)
class Latent:
    """What `read_latent` returns: N cells in L dimensions."""

    obsm_key: str
    mean: np.ndarray  # float32 (N, L)
    variance: np.ndarray  # float32 (N, L)
    columns: tuple[tuple[Categories, np.ndarray], ...]  # of obs: codes (N,), -1 where there is no value
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.mean)

    def column(self, name: str) -> tuple[Categories, np.ndarray] | None:
        """The categories and codes of one column of obs, or None."""
        return next(((c, codes) for c, codes in self.columns if c.name == name), None)


class LatentWriter:
    """Context manager: `append` runs of cells; the folder is there when the block ends without an error.

    Args:
        columns: the columns of obs and their categories; `append` gives their codes in this order.
        about: what it was made from (JSON), for uns["scarcade_latent"].

    Raises:
        StorageError: `path` exists (without `replace`), or the disk is full.
        CategoryError: the name of a column leads out of the folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        obsm_key: str,
        columns: Sequence[Categories],
        about: Mapping[str, Any],
        replace: bool = False,
    ) -> None:
        self.path = Path(path)
        self.n_cells = 0
        for name in (obsm_key, *(column.name for column in columns)):
            if not name or name.startswith((".", "_")) or "/" in name or "\0" in name:
                raise CategoryError(f"{path}: {name!r} is not a name that a column can have")
        self._obsm_key, self._columns, self._about, self._replace = obsm_key, tuple(columns), dict(about), replace
        self._stack = ExitStack()
        self._extra: dict[str, Any] = {"kind": KIND, "format": FORMAT, "obsm_key": obsm_key}
        self._arrays: tuple[ArrayWriter, ArrayWriter] | None = None

    def __enter__(self) -> Self:
        self._folder = self._stack.enter_context(committed(self.path, extra=self._extra, replace=self._replace))
        for name in ("obs", "obsm"):
            (self._folder / name).mkdir()
        self._names = StringWriter(self._folder / "obs" / "_index")
        self._codes = [
            ArrayWriter(self._folder / "obs" / column.name / "codes", smallest_codes(len(column)))
            for column in self._columns
        ]
        return self

    def append(
        self, mean: np.ndarray, variance: np.ndarray, codes: Sequence[np.ndarray], names: Iterable[str] | None = None
    ) -> None:
        """Add n cells: mean and variance (n, L), codes (n,) of each column; without names they are numbered."""
        if self._arrays is None:
            width = mean.shape[1]
            self._arrays = (
                ArrayWriter(self._folder / "obsm" / self._obsm_key, np.float32, width=width),
                ArrayWriter(self._folder / "obsm" / (self._obsm_key + VARIANCE), np.float32, width=width),
            )
        for array, values in zip(self._arrays, (mean, variance), strict=True):
            array.append(np.ascontiguousarray(values, np.float32))
        for writer, values in zip(self._codes, codes, strict=True):
            writer.append(values.astype(writer.dtype, copy=False))
        self._names.append(names if names is not None else map(str, range(self.n_cells, self.n_cells + len(mean))))
        self.n_cells += len(mean)

    def _finish(self) -> None:
        import anndata as ad
        import zarr

        if self._arrays is None:  # no cells: arrays of no rows are still arrays
            self.append(*(np.zeros((0, 1), np.float32),) * 2, [np.zeros(0, np.int8) for _ in self._columns], [])
        for array in (*(self._arrays or ()), *self._codes):
            array.close()
        self._names.close()
        for column in self._columns:
            folder = self._folder / "obs" / column.name
            categories = StringWriter(folder / "categories", chunk=len(column))
            categories.append(column.values)
            categories.close()
            _group(folder, "categorical", "0.2.0", ordered=False)
        order = [column.name for column in self._columns]
        _group(self._folder / "obs", "dataframe", "0.2.0", _index="_index", **{"column-order": order})
        _group(self._folder / "obsm", "dict", "0.1.0")
        _group(self._folder, "anndata", "0.1.0")
        root = zarr.open_group(self._folder, mode="r+")
        with ad.settings.override(auto_shard_zarr_v3=False):
            for name in ("layers", "obsp", "varm", "varp"):
                ad.io.write_elem(root, name, {})
            ad.io.write_elem(root, "var", ad.AnnData(np.zeros((1, 0), np.float32)).var)
            ad.io.write_elem(root, "uns", {"scarcade_latent": {"about": json.dumps(self._about, sort_keys=True)}})
        with warnings.catch_warnings():  # consolidated, so that readers need not list (and wonder at our manifest)
            warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
            zarr.consolidate_metadata(root.store)
        self._extra.update(n_cells=self.n_cells, columns=order, about=self._about)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is None:
            try:
                self._finish()
            except BaseException as problem:
                if self._stack.__exit__(type(problem), problem, problem.__traceback__):
                    return True
                raise
        return self._stack.__exit__(kind, error, trace)


def read_latent(path: str | Path) -> Latent:
    """The whole of a ``latent.zarr`` in memory, checked.

    Raises:
        OpenError: not one of ours. CorruptError, MissingChunkError: not the bytes that were written.
    """
    path = Path(path)
    if not path.is_dir():
        raise OpenError(f"{path}: there is no such folder; `scarcade embed` makes it")
    manifest = read_manifest(path)
    if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
        raise OpenError(f"{path}: is not a latent of ours (kind {manifest.get('kind')!r})")
    files = LocalFiles(path)
    try:
        key, n_cells, about = str(manifest["obsm_key"]), int(manifest["n_cells"]), dict(manifest["about"])
        names = [str(name) for name in manifest["columns"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path}: its manifest is incomplete ({error!r})") from error
    mean, variance = (_rows(ArrayReader(files, f"obsm/{name}", manifest), n_cells) for name in (key, key + VARIANCE))
    columns = []
    for name in names:
        categories = StringReader(files, f"obs/{name}/categories", manifest)
        values = tuple(str(value) for value in categories.rows(0, len(categories)))
        codes = _rows(ArrayReader(files, f"obs/{name}/codes", manifest), n_cells)
        if len(codes) and (int(codes.min()) < -1 or int(codes.max()) >= len(values)):
            raise CorruptError(f"{path}: obs/{name} has codes beyond its {len(values)} categories")
        columns.append((Categories(name, values), codes))
    if mean.shape != variance.shape or mean.ndim != 2:
        raise CorruptError(f"{path}: means {mean.shape} and variances {variance.shape} do not belong together")
    return Latent(key, mean, variance, tuple(columns), about)


def _rows(reader: ArrayReader, n_cells: int) -> np.ndarray:
    if len(reader) != n_cells:
        raise CorruptError(f"{reader.name}: {len(reader)} rows where the manifest speaks of {n_cells} cells")
    return reader.rows(0, n_cells)


def _group(folder: Path, kind: str, version: str, **attributes: Any) -> None:
    """``zarr.json`` of a group of AnnData's."""
    meta = {
        "attributes": {"encoding-type": kind, "encoding-version": version, **attributes},
        "zarr_format": 3,
        "node_type": "group",
    }
    (folder / "zarr.json").write_text(json.dumps(meta, indent=1))
