"""The first look at one file on its way into a store: its genes, columns, counts layer, and every cell's key.

What belongs to a cell and is not its counts (name, key, obs, proteins) is put beside the output as arrays that are
mapped, not loaded, when the cells are written in their new order; so memory does not grow with the number of cells.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash
from pydantic import Field

from scarcade.dataloaders.counts import Csr, Place
from scarcade.dataloaders.gene_names import GeneNames
from scarcade.dataloaders.layers import choose_layer
from scarcade.dataloaders.matrix import blocks
from scarcade.dataloaders.proteins import silent, silent_cells, spill_proteins
from scarcade.dataloaders.schema import FILE_COLUMN, column_of, complete_text, label_text, look_alikes, numbers, text_of
from scarcade.dataloaders.source import AnnDataFile
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.config import Section
from scarcade.engine.errors import CategoryError, UsageError

_MANY = 1000  # values of a column beyond which it may be a name (a barcode) and not a category
_STORE_BLOCK = 1 << 14  # cells of a store that are read at once


class IngestConfig(Section):
    """What a store is made with; recorded in it, and compared when more files are appended."""

    batch_key: str | None = Field(None, description="obs column of the batch; without it each file is a batch")
    label_keys: tuple[str, ...] = Field((), description="obs columns of labels; the first is the primary one")
    layer: str | None = Field(None, description='where the counts are: "X", "raw.X" or a layer; found out if not told')
    genes: str | tuple[str, ...] = Field("union", description="union, intersection, or a file with one name a line")
    hvg: int | None = Field(None, ge=1, description="keep this many highly variable genes (seurat_v3, per batch)")
    protein_key: str | None = Field(None, description="obsm key of protein counts (CITE-seq)")
    protein_measured_key: str | None = Field(None, description="obs column: False where proteins were not measured")
    categorical: tuple[str, ...] = Field((), description="obs columns of further categorical covariates")
    continuous: tuple[str, ...] = Field((), description="obs columns of continuous covariates")
    size_factor: str | None = Field(None, description="obs column of size factors, where a model should use them")
    unlabelled: tuple[str, ...] = Field((), description="label values that mean: no label")
    seed: int = Field(0, ge=0, lt=1 << 63, description="fixes the order of the cells and the validation split")
    allow_noninteger: bool = Field(False, description="take values that are no counts (for the gaussian likelihood)")

    def recorded(self) -> dict[str, Any]:
        """The settings as a store records them (a list of genes by its hash)."""
        raw = self.model_dump(mode="json")
        if not isinstance(self.genes, str):
            digest = xxhash.xxh3_128_hexdigest(chr(10).join(self.genes).encode())
            raw["genes"] = f"list of {len(self.genes)}: {digest}"
        return raw

    def needed(self) -> tuple[str, ...]:
        """The obs columns that the schema speaks of."""
        named = (self.batch_key or FILE_COLUMN, *self.label_keys, *self.categorical, *self.continuous)
        return (*named, self.size_factor) if self.size_factor else named


@dataclass(frozen=True)
class Column:
    """One obs column as it was put aside: codes of `categories` ("text"), or "names", "bool", "int", "float"."""

    kind: str
    place: int
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What is known of one file before its counts are read."""

    where: str
    name: str
    folder: Path  # where its cells' columns were put
    n_cells: int
    n_values: int  # an upper bound on its counts that are not zero
    layer: str
    genes: GeneNames
    columns: dict[str, Column]
    proteins: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]  # the record of the file, or those of a store
    messages: tuple[str, ...]
    warnings: tuple[str, ...]
    is_store: bool = False
    look_alikes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def survey(path: Path, config: IngestConfig, folder: Path) -> Survey:
    """Look at one file; put its cells' keys, names, columns and proteins into `folder`.

    Raises:
        InputError: the file cannot be used (its subclasses say why).
    """
    folder.mkdir(parents=True)
    with AnnDataFile(path) as file:
        obs = file.obs()
        layer = choose_layer(file, config.layer, integer=not config.allow_noninteger)
        matrix = file.matrix(layer.name)
        genes = GeneNames.of(file.var(layer.name), f"{file.where}: layer {layer.name!r}")
        if len(genes.index) != matrix.shape[1]:
            raise UsageError(f"{matrix.where}: {matrix.shape[1]} genes where var has {len(genes.index)}")
        messages = [layer.why]
        if layer.others:
            messages[0] += f"; {', '.join(layer.others)} would do as well (--layer)"
        columns = _columns(obs, config, file.where, file.name, folder, messages)
        keys = cell_keys(_batches(folder, columns[config.batch_key or FILE_COLUMN]), obs.index, config.seed)
        _put(folder, "keys", keys)
        _put(folder, "names", _bytes(obs.index.to_numpy(object)))
        proteins = spill_proteins(file, obs, config.protein_key, config.protein_measured_key, folder)
        n_bytes, content = file.content_hash()
        record = {
            "name": file.path.name,
            "bytes": n_bytes,
            "xxh3_128": content,
            "cells": len(obs),
            "counts_from": layer.name,
            "settings": config.recorded(),
        }
        return Survey(
            where=file.where,
            name=file.name,
            folder=folder,
            n_cells=len(obs),
            n_values=matrix.n_stored,
            layer=layer.name,
            genes=genes,
            columns=columns,
            proteins=proteins,
            sources=(record,),
            messages=tuple(messages),
            warnings=tuple(proteins_warning(proteins, config, file.where, folder)),
            look_alikes={
                key: found for key in config.label_keys if (found := tuple(look_alikes(columns[key].categories)))
            },
        )


def proteins_warning(proteins: Sequence[str], config: IngestConfig, where: str, folder: Path) -> Iterator[str]:
    """One line where proteins were asked for and the file has none, or cells have none but zeros."""
    if config.protein_key is None:
        return
    if not proteins:
        yield f"{where}: has no obsm[{config.protein_key!r}]; the proteins of its cells count as not measured"
        return
    counts, measured = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("proteins", "measured"))
    if n_silent := silent_cells(counts, measured):
        how = "name a column that says so by --protein-measured-key"
        yield f"{where}: obsm[{config.protein_key!r}]: {silent(n_silent)}, {how}"


def survey_store(path: str | Path, config: IngestConfig, folder: Path) -> Survey:
    """As `survey`, of a store that grows: its cells keep their keys."""
    folder.mkdir(parents=True)
    store = open_store(path)
    obs = store.obs()
    columns = {}
    for place, name in enumerate(map(str, obs.columns)):
        columns[name] = _put_column(obs[name], folder, place, names=obs[name].dtype == object)
    _put(folder, "keys", store.keys(0, store.n_cells))
    _put(folder, "names", _bytes(obs.index.to_numpy(object)))
    if store.schema.proteins:
        both = store.proteins(0, store.n_cells)
        if both is not None:
            _put(folder, "proteins", both[0])
            _put(folder, "measured", both[1])
    return Survey(
        where=store.where,
        name="",
        folder=folder,
        n_cells=store.n_cells,
        n_values=store.nnz,
        layer=store.schema.counts_from,
        genes=GeneNames.of(store.var(), store.where),
        columns=columns,
        proteins=store.schema.proteins,
        sources=tuple(store.sources),
        messages=(),
        warnings=(),
        is_store=True,
    )


def counts_of(
    found: Survey, path: str | Path, *, integer: bool, workspace: Path
) -> Generator[tuple[int, Csr], None, None]:
    """The checked counts of a surveyed file or store, in its own order of cells and genes."""
    if found.is_store:
        store: Store = open_store(path)
        for start in range(0, store.n_cells, _STORE_BLOCK):
            indptr, indices, data = store.read(start, min(start + _STORE_BLOCK, store.n_cells))
            wide = data.astype(np.uint32 if integer else np.float32, copy=False)
            yield start, Csr(indptr, indices.astype(np.int32), wide)
        return
    with AnnDataFile(path) as file:
        matrix = file.matrix(found.layer)
        place = Place(matrix.where, _Names(found.folder), found.genes.index)
        yield from blocks(matrix, place, integer=integer, workspace=workspace)


class _Names(Sequence[str]):
    """The names of a file's cells, read when a message needs them."""

    def __init__(self, folder: Path) -> None:
        self._names = np.load(folder / "names.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: Any) -> Any:
        return self._names[at].decode()


def cell_keys(batches: np.ndarray, names: pd.Index, seed: int) -> np.ndarray:
    """uint64 (n,): xxh3-64 of (seed, batch, name, n-th cell of that batch and name in its file); decision 001."""
    both = pd.DataFrame({"batch": batches, "name": names.to_numpy(object)})
    nth = both.groupby(["batch", "name"], sort=False, observed=True).cumcount().to_numpy()
    digest = xxhash.xxh3_64_intdigest
    texts = zip(both["batch"], both["name"], nth.tolist(), strict=True)
    return np.fromiter((digest(f"{b}\0{n}\0{i}".encode(), seed) for b, n, i in texts), np.uint64, len(both))


def _columns(
    obs: pd.DataFrame, config: IngestConfig, where: str, name: str, folder: Path, messages: list[str]
) -> dict[str, Column]:
    """Every obs column put aside under its place; those that the schema needs are checked."""
    obs = obs.copy(deep=False)
    if config.batch_key is None:
        if FILE_COLUMN in obs.columns:
            messages.append(f"{where}: obs column {FILE_COLUMN!r} is replaced by the file's name (no --batch-key)")
        obs[FILE_COLUMN] = pd.Categorical([name] * len(obs), categories=[name])
    for key in (config.batch_key, *config.categorical):
        if key is not None:
            obs[key] = complete_text(obs, key, where, "--batch-key" if key == config.batch_key else "--categorical")
    for key in config.label_keys:
        obs[key] = label_text(column_of(obs, key, where, "--label-key"), config.unlabelled)
    wanted_numbers = (*config.continuous, *([config.size_factor] if config.size_factor else []))
    numeric = numbers(obs, wanted_numbers, where)
    for i, key in enumerate(wanted_numbers):
        obs[key] = numeric[:, i].astype(np.float64)
    out, left = {}, []
    text_keys = {config.batch_key or FILE_COLUMN, *config.categorical, *config.label_keys}
    for place, key in enumerate(obs.columns):
        text = str(key)
        if not text or text.startswith(("_", ".")) or "/" in text or "\0" in text or text in out:
            if key in config.needed():
                raise CategoryError(f"{where}: obs column {text!r} has a name that a store cannot hold; rename it")
            left.append(text)
        else:
            out[text] = _put_column(obs[key], folder, place, names=None if key not in text_keys else False)
    if left:
        messages.append(f"{where}: obs columns with names that a store cannot hold are left out: {', '.join(left)}")
    return out


def _put_column(column: pd.Series, folder: Path, place: int, names: bool | None = None) -> Column:
    """`names`: whether text that differs from cell to cell is kept as such (None: found out)."""
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) else "O"
    if kind in "iufb":
        as_kind = {"b": ("bool", np.bool_), "f": ("float", np.float64)}.get(kind, ("int", np.int64))
        if column.dtype == np.uint64 and len(column) and column.max() > np.iinfo(np.int64).max:
            as_kind = ("float", np.float64)
        _put(folder, f"column-{place}", column.to_numpy().astype(as_kind[1]))
        return Column(as_kind[0], place)
    text = text_of(column)
    codes, values = pd.factorize(text, sort=True, use_na_sentinel=True)
    if names or (names is None and len(values) > max(_MANY, len(text) // 2)):
        _put(folder, f"column-{place}", _bytes(np.where(pd.isna(text), "", text)))
        return Column("names", place)
    _put(folder, f"column-{place}", codes.astype(np.int32))
    return Column("text", place, tuple(map(str, values)))


def _batches(folder: Path, column: Column) -> np.ndarray:
    codes = np.load(folder / f"column-{column.place}.npy")
    names: np.ndarray = np.array(column.categories, object)[codes]
    return names


def _put(folder: Path, name: str, values: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", values, allow_pickle=False)


def _bytes(text: np.ndarray) -> np.ndarray:
    """Text as UTF-8 of one length, which can be mapped."""
    if not len(text):
        return np.empty(0, "S1")
    return np.char.encode(np.asarray(text, dtype=str), "utf-8")
