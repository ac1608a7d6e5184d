"""The latent of many cells on disk: mean, variance, batch and labels of each; written as it comes, read as a whole.

``latent.zarr`` is a zarr v3 AnnData group without X, which `anndata.read_zarr` and scanpy open: obsm[KEY] holds the
means, obsm[KEY + "_variance"] the variances, obs the codes, uns["scarcade_latent"] what it was made from. Every byte
stands under a checksum, and it is committed by one rename. Beside a model it holds no cell names: a model that is
shared must not carry barcodes or donors along.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.array_reader import ArrayReader, StringReader
from scarcade.dataloaders.stored_files import LocalFiles
from scarcade.engine.errors import CorruptError, OpenError
from scarcade.engine.folder import read_manifest
from scarcade.engine.schema import Categories
from scarcade.jobs.table import TableWriter

FORMAT = 1
KIND = "latent"
LATENT = "latent.zarr"  # its name beside a model
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


def latent_writer(
    path: Path,
    *,
    obsm_key: str,
    columns: Sequence[Categories],
    about: Mapping[str, Any],
    tables: Sequence[str] = (),
    uns: Mapping[str, Any] | None = None,
    genes: Sequence[str] = (),
    replace: bool = False,
) -> TableWriter:
    """A writer of ``latent.zarr``, whose `append` is given what `latent_arrays` returns.

    Args:
        columns: the columns of obs and their categories.
        about: what it was made from (JSON), for uns["scarcade_latent"].
        tables: further arrays ("layers/NAME", "obsm/NAME") beside the latent, and what `uns` says of them.
    """
    return TableWriter(
        path,
        arrays=(*_places(obsm_key), *tables),
        columns=columns,
        genes=genes,
        uns={"scarcade_latent": {"about": json.dumps(dict(about), sort_keys=True)}, **(uns or {})},
        extra={"kind": KIND, "format": FORMAT, "obsm_key": obsm_key, "about": dict(about)},
        replace=replace,
    )


def latent_arrays(obsm_key: str, mean: np.ndarray, variance: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and variance (n, L) under their names in the folder."""
    return dict(zip(_places(obsm_key), (mean, variance), strict=True))


def _places(obsm_key: str) -> tuple[str, str]:
    return f"obsm/{obsm_key}", f"obsm/{obsm_key}{VARIANCE}"


class LatentReader:
    """A ``latent.zarr`` on disk, checked as it is read.

    Raises:
        OpenError: not one of ours. CorruptError, MissingChunkError: not the bytes that were written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise OpenError(f"{path}: there is no such folder; `scarcade embed` makes it")
        manifest = read_manifest(self.path)
        if manifest.get("kind") != KIND or manifest.get("format") != FORMAT:
            raise OpenError(f"{path}: is not a latent of ours (kind {manifest.get('kind')!r})")
        files = LocalFiles(self.path)
        try:
            self.obsm_key, self.n_cells = str(manifest["obsm_key"]), int(manifest["n_cells"])
            self.about: dict[str, Any] = dict(manifest["about"])
            names = [str(name) for name in manifest["columns"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path}: its manifest is incomplete ({error!r})") from error
        self._arrays = [ArrayReader(files, name, manifest) for name in _places(self.obsm_key)]
        self._codes = [ArrayReader(files, f"obs/{name}/codes", manifest) for name in names]
        self.columns: list[Categories] = []
        for name in names:
            categories = StringReader(files, f"obs/{name}/categories", manifest)
            self.columns.append(Categories(name, tuple(str(v) for v in categories.rows(0, len(categories)))))
        for reader in (*self._arrays, *self._codes):
            if len(reader) != self.n_cells:
                raise CorruptError(
                    f"{reader.name}: {len(reader)} rows where the manifest speaks of {self.n_cells} cells"
                )
        shapes = [reader.shape for reader in self._arrays]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise CorruptError(f"{path}: means {shapes[0]} and variances {shapes[1]} do not belong together")

    @property
    def n_latent(self) -> int:
        return self._arrays[0].shape[1]

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Mean and variance (n, L) of the cells [start, stop), and their codes (n,) in each of `columns`."""
        mean, variance = (reader.rows(start, stop) for reader in self._arrays)
        codes = [reader.rows(start, stop) for reader in self._codes]
        for column, values in zip(self.columns, codes, strict=True):
            if len(values) and (int(values.min()) < -1 or int(values.max()) >= len(column)):
                raise CorruptError(f"{self.path}: obs/{column.name} has codes beyond its {len(column)} categories")
        return mean, variance, codes


def read_latent(path: str | Path) -> Latent:
    """The whole of a ``latent.zarr`` in memory, checked.

    Raises:
        OpenError, CorruptError, MissingChunkError: as `LatentReader`.
    """
    reader = LatentReader(path)
    mean, variance, codes = reader.rows(0, reader.n_cells)
    return Latent(reader.obsm_key, mean, variance, tuple(zip(reader.columns, codes, strict=True)), reader.about)
