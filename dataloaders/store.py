"""Opens an atlas store and reads from it: rows, codes, names, keys; every byte that is read is checked.

A store is a zarr v3 AnnData group that `anndata.read_zarr` opens (see `scarcade.dataloaders.writer`). What is
held in memory for each cell is the number of its counts as a small integer; everything else is read when asked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scarcade.dataloaders.array_reader import ArrayReader
from scarcade.dataloaders.remote import RemoteFiles, remote_manifest
from scarcade.dataloaders.scalars import read_scalar
from scarcade.dataloaders.shard_cache import shard_cache
from scarcade.dataloaders.stored_files import LocalFiles, read_checked
from scarcade.dataloaders.stored_obs import StoredObs
from scarcade.dataloaders.writer import (
    FORMAT,
    PROTEIN_COUNTS,
    PROTEIN_MEASURED,
    CellBlock,
    StoreWriter,
)
from scarcade.engine.download import over_http
from scarcade.engine.errors import CategoryError, CorruptError, CsrError, LimitError, OpenError, UsageError
from scarcade.engine.folder import MANIFEST, problems, read_manifest
from scarcade.engine.schema import Schema
from scarcade.engine.storage import is_url, shown

if TYPE_CHECKING:
    import anndata as ad

__all__ = ["CellBlock", "Store", "StoreWriter", "is_store", "open_store"]

LIMIT_CELLS, LIMIT_GENES = 1 << 36, 1 << 22
_COARSE = 1024  # cells between two remembered places in X


def open_store(path: str | Path, cache: tuple[str | None, float | None] = (None, None)) -> "Store":
    """The store at `path`, a folder or a URL; manifest, sizes and schema checked (shards are when they are read).

    `cache` says where shards of a store at a URL are kept, and how many gigabytes: what `shard_cache` takes.

    Raises:
        OpenError: not a store of ours, or of a newer format. CorruptError, MissingChunkError: files that are not
        those of the manifest. CsrError: row pointers that do not ascend. LimitError: impossible sizes.
    """
    return Store(path, cache)


def is_store(data: Any) -> bool:
    """Whether `data` is the path or the URL of a store of ours.

    Raises:
        StorageError: a URL whose store does not answer, or refuses.
    """
    if isinstance(data, str) and is_url(data):
        found = None if over_http(data) else remote_manifest(data)
        return found is not None and found.get("kind") == "store"
    if not isinstance(data, str | Path) or not (Path(data) / MANIFEST).is_file():
        return False
    return bool(read_manifest(Path(data)).get("kind") == "store")


class Store:
    """Cells of an atlas on disk, in the order of their keys. Use `open_store`."""

    def __init__(self, path: str | Path, cache: tuple[str | None, float | None] = (None, None)) -> None:
        self.place = str(path)  # its folder or its URL, as `open_store` takes it
        self.where = shown(self.place)  # for people
        self.cache = cache  # where and how large that of its shards is, if it lies at a URL
        self._files, self._manifest = self._opened()
        if self._manifest.get("kind") != "store":
            raise OpenError(f"{self.where}: {MANIFEST} is not that of a store")
        if self._manifest.get("format") != FORMAT:
            raise OpenError(
                f"{self.where}: format {self._manifest.get('format')}, this version reads {FORMAT}; ingest again"
            )
        found = self._problems(deep=False)
        if found:
            self._raise(found)
        if isinstance(self._files, RemoteFiles):
            self._files.fetch_small()
        ours = {name: self._value(f"uns/scarcade/{name}") for name in ("schema", "seed", "sources")}
        self.schema = Schema.from_dict(json.loads(ours["schema"]))
        self.seed = int(ours["seed"])
        self.sources: list[dict[str, Any]] = json.loads(ours["sources"])
        self.fingerprint: str = hashlib.sha256(json.dumps(self._manifest, sort_keys=True).encode()).hexdigest()
        self.x_indices = ArrayReader(self._files, "X/indices", self._manifest)
        self.x_data = ArrayReader(self._files, "X/data", self._manifest)
        self._keys = ArrayReader(self._files, "uns/scarcade/keys", self._manifest)
        self.n_cells, self.n_genes = len(self._keys), self.schema.n_genes
        self.nnz = len(self.x_data)
        self._obs = StoredObs(self._files, self._manifest, self.schema, self.n_cells, self.where)
        self._check_sizes()
        self._load_lengths()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.place, self.cache)

    @property
    def path(self) -> Path:
        """The folder of a store on this disk."""
        if is_url(self.place):
            raise UsageError(f"{self.where}: is not a folder of this disk; `place` is where it lies")
        return Path(self.place)

    def __repr__(self) -> str:
        return f"<Store {self.where}: {self.n_cells} cells x {self.n_genes} genes>"

    def _opened(self) -> tuple[LocalFiles | RemoteFiles, dict[str, Any]]:
        if is_url(self.place):
            manifest = remote_manifest(self.place)
            if manifest is None:
                raise OpenError(
                    f"{self.where}: there is no store (no {MANIFEST}); `scarcade ingest --out URL` makes one"
                )
            return RemoteFiles(self.place, manifest, shard_cache(*self.cache)), manifest
        if self.path.is_file():
            raise OpenError(f"{self.path}: is a file and not a store; `scarcade ingest` makes one of .h5ad files")
        if not self.path.is_dir():
            raise OpenError(f"{self.path}: there is no such folder; a store is made by `scarcade ingest` or `simulate`")
        return LocalFiles(self.path), read_manifest(self.path)

    def _problems(self, *, deep: bool) -> list[str]:
        if isinstance(self._files, RemoteFiles):
            return self._files.problems(deep=deep)
        return problems(self.path, deep=deep)

    def _raise(self, found: Sequence[str]) -> None:
        from scarcade.engine.errors import MissingChunkError

        kind = MissingChunkError if any(problem.endswith(": missing") for problem in found) else CorruptError
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise kind(f"{self.where}: {'; '.join(found[:3])}{more}")

    def _check_sizes(self) -> None:
        declared = tuple(self._manifest.get(name) for name in ("n_cells", "n_genes", "nnz"))
        if self.n_cells > LIMIT_CELLS or self.n_genes > LIMIT_GENES:
            raise LimitError(f"{self.where}: {self.n_cells} cells x {self.n_genes} genes are beyond any real atlas")
        if declared != (self.n_cells, self.n_genes, self.nnz) or len(self.x_indices) != self.nnz:
            raise CorruptError(
                f"{self.where}: the manifest speaks of {declared} cells, genes and counts; the arrays hold "
                f"{(self.n_cells, self.n_genes, self.nnz)} and {len(self.x_indices)} column indices"
            )
        if self.x_indices.dtype.kind != "u" or self.x_indices.chunk_rows != self.x_data.chunk_rows:
            raise CorruptError(f"{self.where}: X/indices is not unsigned, or cut differently from X/data")

    def _load_lengths(self) -> None:
        """Counts per cell (smallest type), and the place in X of every 1024th cell."""
        indptr = ArrayReader(self._files, "X/indptr", self._manifest)
        if len(indptr) != self.n_cells + 1:
            raise CorruptError(f"{self.where}: X/indptr has {len(indptr)} entries for {self.n_cells} cells")
        self.lengths = np.empty(self.n_cells, np.uint16 if self.n_genes < 1 << 16 else np.uint32)
        self._coarse = np.empty(self.n_cells // _COARSE + 1, np.int64)
        before, row = 0, 0
        for piece in indptr.pieces():
            steps = np.diff(piece, prepend=before)
            if (row == 0 and piece[0] != 0) or steps.min() < 0 or steps.max() > self.n_genes:
                raise CsrError(f"{self.where}: X/indptr does not ascend from 0 by at most {self.n_genes} a cell")
            some = piece[(-row) % _COARSE :: _COARSE]
            first = -(-row // _COARSE)
            self._coarse[first : first + len(some)] = some
            self.lengths[max(row - 1, 0) : row - 1 + len(piece)] = steps[1:] if row == 0 else steps
            before, row = int(piece[-1]), row + len(piece)
        if before != self.nnz:
            raise CsrError(f"{self.where}: X/indptr ends at {before}, there are {self.nnz} counts")

    def start_of(self, row: int) -> int:
        """Where the counts of `row` begin in X/data (`n_cells`: where they end)."""
        block = row // _COARSE
        return int(self._coarse[block]) + int(self.lengths[block * _COARSE : row].sum(dtype=np.int64))

    def _value(self, name: str) -> Any:
        """A number or a string."""
        value = read_scalar(self._files, name, self._manifest)
        return self._element(name) if value is None else value

    def _element(self, name: str) -> Any:
        """A small element (var, schema, truth) by anndata, its bytes checked before."""
        import anndata as ad
        import zarr
        from zarr.buffer import default_buffer_prototype

        files = [file for file in self._manifest["files"] if file.startswith(f"{name}/")]
        if not files:
            raise CorruptError(f"{self.where}: {name} is not in the manifest")
        as_buffer = default_buffer_prototype().buffer.from_bytes  # so that what is decoded is what was checked
        content = {
            file.removeprefix(f"{name}/"): as_buffer(read_checked(self._files, file, self._manifest)) for file in files
        }
        return ad.io.read_elem(zarr.open(zarr.storage.MemoryStore(content), mode="r"))

    # ---- rows

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64, gene index, count) of the rows [start, stop), checked.

        Raises:
            MissingChunkError, CorruptError: what is on disk is not what was written. CsrError: a column beyond
            the genes.
        """
        self._check_range(start, stop)
        indptr = np.zeros(stop - start + 1, np.int64)
        np.cumsum(self.lengths[start:stop], out=indptr[1:])
        first = self.start_of(start)
        indices = self.x_indices.rows(first, first + int(indptr[-1]))
        data = self.x_data.rows(first, first + int(indptr[-1]))
        if len(indices) and int(indices.max()) >= self.n_genes:
            raise CsrError(f"{self.where}: rows {start} to {stop} name gene {indices.max()} of {self.n_genes}")
        return indptr, indices, data

    def ahead(self, runs: Sequence[tuple[int, int]], *, proteins: bool = True) -> None:
        """These ranges of rows will be read soon: of a store at a URL, what they need begins to come."""
        if not isinstance(self._files, RemoteFiles):
            return
        self._files.next_turn()
        counts = [(self.start_of(start), self.start_of(stop)) for start, stop in runs]
        self.x_indices.ahead(counts)
        self.x_data.ahead(counts)
        for reader in self._protein_readers if proteins and self._manifest.get("proteins") else ():
            reader.ahead(runs)

    def proteins(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(counts, measured) of the rows [start, stop), each (n, P); None in a store without proteins."""
        self._check_range(start, stop)
        if not self._manifest.get("proteins"):
            return None
        counts, measured = self._protein_readers
        return counts.rows(start, stop), measured.rows(start, stop)

    @cached_property
    def _protein_readers(self) -> tuple[ArrayReader, ArrayReader]:
        counts = ArrayReader(self._files, f"obsm/{PROTEIN_COUNTS}", self._manifest)
        measured = ArrayReader(self._files, f"obsm/{PROTEIN_MEASURED}", self._manifest)
        wanted = (self.n_cells, len(self.schema.proteins))
        if counts.shape != wanted or measured.shape != wanted:
            raise CorruptError(f"{self.where}: proteins of shape {counts.shape}, {wanted} were declared")
        return counts, measured

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_cells:
            raise UsageError(f"{self.where}: rows {start} to {stop} were asked for, there are {self.n_cells}")

    def keys(self, start: int, stop: int) -> np.ndarray:
        """uint64 keys of the rows [start, stop), ascending."""
        self._check_range(start, stop)
        return self._keys.rows(start, stop)

    def n_before(self, fraction: float) -> int:
        """Number of rows with key < fraction * 2**64: the validation prefix."""
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"a fraction of {fraction} of the cells; it must lie in 0 .. 1")
        if fraction == 1.0:
            return self.n_cells
        bound = np.uint64(fraction * 2.0**64)
        low, high = 0, self.n_cells  # bisection by pieces: a few chunks are read, however many cells there are
        while high - low > 4096:
            middle = (low + high) // 2
            if self._keys.rows(middle, middle + 1)[0] < bound:
                low = middle
            else:
                high = middle
        return low + int(np.searchsorted(self._keys.rows(low, high), bound, side="left"))

    # ---- obs

    def codes(self, column: str) -> np.ndarray:
        """As `StoredObs.codes`."""
        return self._obs.codes(column)

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of the cells [start, stop), an object array of str."""
        self._check_range(start, stop)
        return self._obs.names(start, stop)

    def obs(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """obs of the rows [start, stop) as it was written; index: the cells' names."""
        stop = self.n_cells if stop is None else stop
        self._check_range(start, stop)
        return self._obs.frame(start, stop)

    def var(self) -> pd.DataFrame:
        """var as it was written; index: the genes."""
        frame: pd.DataFrame = self._element("var")
        return frame

    def truth(self) -> Mapping[str, Any] | None:
        """What made data were made from (`simulate`); None for real data."""
        if not any(file.startswith("uns/scarcade/truth/") for file in self._manifest["files"]):
            return None
        truth: Mapping[str, Any] = self._element("uns/scarcade/truth")
        return truth

    def verify(self) -> list[str]:
        """Every byte against the manifest; [] if the store is intact, else what is wrong with which file."""
        return self._problems(deep=True)

    def to_anndata(self, batches: Sequence[str] | None = None) -> "ad.AnnData":
        """The cells of some batches (or all) in memory as an AnnData with float32 CSR counts.

        Raises:
            CategoryError: a batch that the store does not have.
        """
        import anndata as ad
        import scipy.sparse as sp

        known = self.schema.batch.codes()
        for value in batches or ():
            if value not in known:
                raise CategoryError(f"{self.where}: no batch '{value}'; there are {', '.join(known)}")
        wanted = None if batches is None else [known[value] for value in batches]
        keep = np.ones(self.n_cells, bool) if wanted is None else np.isin(self.codes(self.schema.batch.name), wanted)
        matrices, frames, proteins = [], [], []
        for start in range(0, self.n_cells, 1 << 16):
            stop = min(start + (1 << 16), self.n_cells)
            mask = keep[start:stop]
            if not mask.any():
                continue
            indptr, indices, data = self.read(start, stop)
            block = sp.csr_matrix(
                (data.astype(np.float32), indices.astype(np.int32), indptr), (stop - start, self.n_genes)
            )
            matrices.append(block[mask])
            frames.append(self.obs(start, stop)[mask])
            both = self.proteins(start, stop)
            if both is not None:
                proteins.append((both[0][mask], both[1][mask]))
        if not matrices:
            raise CategoryError(f"{self.where}: no cell in the batches {batches}")
        out = ad.AnnData(sp.vstack(matrices, format="csr"), obs=pd.concat(frames), var=self.var())
        if proteins:
            names = list(self.schema.proteins)
            out.obsm[PROTEIN_COUNTS] = pd.DataFrame(np.concatenate([c for c, _ in proteins]), out.obs_names, names)
            out.obsm[PROTEIN_MEASURED] = pd.DataFrame(np.concatenate([m for _, m in proteins]), out.obs_names, names)
        return out
