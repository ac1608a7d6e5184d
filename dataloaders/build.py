"""One run of ingest: survey every file, read each once, choose genes, write the cells in the order of their keys."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade.dataloaders import merge
from scarcade.dataloaders.counts import raise_to
from scarcade.dataloaders.genes import GeneHistograms, most_variable, normalised_variance
from scarcade.dataloaders.prefetch import Prefetch
from scarcade.dataloaders.reused import reusing
from scarcade.dataloaders.schema import DataWarning
from scarcade.dataloaders.shuffle import Dealer, bits_for, buckets
from scarcade.dataloaders.store import CellBlock, StoreWriter, open_store
from scarcade.dataloaders.survey import IngestConfig, Survey, counts_of, survey, survey_store
from scarcade.engine.errors import InputError, StorageError, UsageError
from scarcade.engine.schema import Categories, Schema

Progress = Callable[[int, int, str], None]
"""(done, in all, stage): the stage "survey" is counted in files, "read" and "write" in cells."""
Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""(function, its arguments for each file) -> (number, result) as they are done."""


@dataclass(frozen=True)
class Dealt:
    """What reading one file told."""

    largest: np.ndarray  # for each gene the largest count
    histograms: Path | None


def deal(
    found: Survey,
    path: str | Path,
    columns: np.ndarray,
    n_genes: int,
    bits: int,
    config: IngestConfig,
    progress: Progress | None = None,
) -> Dealt:
    """Read a file once: check, rename genes, deal into buckets, tally."""
    keys = np.load(found.folder / "keys.npy", mmap_mode="r")
    batch = found.columns[config.needed()[0]]
    largest = np.zeros(n_genes, np.float64)
    histograms = None if config.hvg is None else GeneHistograms(len(batch.categories), n_genes)
    codes = np.load(found.folder / f"column-{batch.place}.npy", mmap_mode="r")
    counts = counts_of(found, path, integer=not config.allow_noninteger, workspace=found.folder)
    # what comes next is read and checked while this is dealt
    # (a task of Ray is a process of its own, and has to say for itself that it uses memory again)
    with reusing(), closing(counts), Dealer(found.folder, bits) as dealer, closing(Prefetch(counts)) as blocks:
        for first, csr in blocks:
            here = slice(first, first + csr.n_cells)
            dealt, order = dealer.deal(csr, np.asarray(keys[here]), columns, n_genes, first)
            raise_to(largest, dealt)
            if histograms is not None:
                histograms.add(dealt, np.asarray(codes[here])[order])
            if progress is not None:
                progress(first + csr.n_cells, found.n_cells, "read")
            del csr, dealt
    if histograms is None:
        return Dealt(largest, None)
    saved = found.folder / "histograms.npz"
    histograms.save(saved)
    return Dealt(largest, saved)


@dataclass(frozen=True)
class Build:
    """One run: what it was asked for, and how it speaks to its caller."""

    config: IngestConfig
    target: Path
    old: str | Path | None  # the store that grows, or its URL
    each: Each
    parallel: bool  # whether `each` runs in other processes
    progress: Progress
    tell: Callable[[str], None]

    def make(self, paths: Sequence[Path]) -> None:
        """Survey, deal, choose genes, write."""
        names = [path.stem for path in paths]
        twice = sorted({name for name in names if names.count(name) > 1})
        if self.config.batch_key is None and twice:
            raise UsageError(f"several files are named {', '.join(twice)}; give --batch-key, or rename them")
        try:
            work = Path(tempfile.mkdtemp(prefix=f".tmp-{self.target.name}-", dir=self.target.parent))
        except OSError as error:
            raise StorageError(f"{self.target}: cannot be written ({error.strerror})") from error
        try:
            with reusing():
                self._make(list(paths), work)
        except OSError as error:
            raise StorageError(f"{self.target}: cannot be written ({error.strerror or error})") from error
        finally:
            merge.forget()
            shutil.rmtree(work, ignore_errors=True)

    def _make(self, paths: list[Path], work: Path) -> None:
        surveys = self._surveys(paths, work)
        by_name = sorted(range(len(surveys)), key=lambda i: (not surveys[i].is_store, *_identity(surveys[i])))
        surveys = [surveys[i] for i in by_name]
        places: list[str | Path] = [*([self.old] if self.old else []), *paths]
        self._tell_surveys(surveys)
        wanted: str | Sequence[str] = self.config.genes
        if self.old is not None and (self.config.hvg is not None or not isinstance(wanted, str)):
            wanted = open_store(self.old).schema.genes
        plan = merge.plan_genes(surveys, wanted)
        self._tell_genes(surveys, plan)
        table = merge.gene_table(surveys, plan)
        n_cells = sum(one.n_cells for one in surveys)
        if n_cells == 0:
            raise InputError(f"{', '.join(one.where for one in surveys)}: there are no cells")
        bits = bits_for(sum(one.n_values for one in surveys), n_cells)
        dealt = self._dealt(surveys, [places[i] for i in by_name], plan, bits)
        kept = self._chosen(surveys, dealt, plan)
        columns = np.full(len(plan.genes), -1, np.int32)
        columns[kept] = np.arange(len(kept), dtype=np.int32)
        largest = np.max([one.largest[kept] for one in dealt], axis=0, initial=0)
        value_type = np.float32 if self.config.allow_noninteger else np.min_scalar_type(int(largest.max(initial=0)))
        obs, others = merge.plan_obs(surveys, self.config)
        if others:
            self.tell(f"obs columns that not all files have are left out: {', '.join(others)}")
        schema = self._schema(surveys, [plan.genes[i] for i in kept], obs)
        sources = sorted((s for one in surveys for s in one.sources), key=lambda s: (s["name"], s["xxh3_128"]))
        sources = [{**one, "settings": self.config.recorded()} for one in sources]
        types = np.min_scalar_type(max(len(kept) - 1, 0)), np.dtype(value_type)
        with StoreWriter(
            self.target,
            schema=schema,
            var=table.iloc[kept],
            index_dtype=types[0],
            value_dtype=types[1],
            seed=self.config.seed,
            sources=sources,
            replace=self.target.exists(),
        ) as writer:
            for block in self._blocks(surveys, bits, columns, schema, obs, types):
                writer.append(block)
                self.progress(writer.n_cells, n_cells, "write")

    def _surveys(self, paths: Sequence[Path], work: Path) -> list[Survey]:
        jobs = [(path, self.config, work / str(i)) for i, path in enumerate(paths)]
        found: list[Survey | None] = [None] * len(jobs)
        for done, (i, one) in enumerate(self.each(survey, jobs)):
            found[i] = one
            self.progress(done + 1, len(jobs), "survey")
        store = [survey_store(self.old, self.config, work / "store")] if self.old is not None else []
        return store + [one for one in found if one is not None]

    def _dealt(
        self, surveys: list[Survey], paths: Sequence[str | Path], plan: merge.GenePlan, bits: int
    ) -> list[Dealt]:
        total = sum(one.n_cells for one in surveys)
        jobs = [
            (one, path, columns, len(plan.genes), bits, self.config)
            for one, path, columns in zip(surveys, paths, plan.columns, strict=True)
        ]
        out: dict[int, Dealt] = {}
        if self.parallel and len(jobs) > 1:
            done = 0
            for i, result in self.each(deal, jobs):
                out[i] = result
                done += surveys[i].n_cells
                self.progress(done, total, "read")
        else:
            before = 0
            for i, job in enumerate(jobs):
                at = before
                out[i] = deal(*job, progress=lambda n, _, stage, at=at: self.progress(at + n, total, stage))  # type: ignore[misc]
                before += surveys[i].n_cells
        return [out[i] for i in range(len(jobs))]

    def _chosen(self, surveys: Sequence[Survey], dealt: Sequence[Dealt], plan: merge.GenePlan) -> np.ndarray:
        """Places in the plan's genes that the store keeps."""
        if self.config.hvg is None or self.old is not None:
            return np.arange(len(plan.genes))
        parts: dict[str, list[tuple[GeneHistograms, int]]] = {}
        for one, result in zip(surveys, dealt, strict=True):
            if result.histograms is not None:
                histograms = GeneHistograms.load(result.histograms)
                for code, value in enumerate(one.columns[self.config.needed()[0]].categories):
                    parts.setdefault(value, []).append((histograms, code))
        variances = np.stack([normalised_variance(parts[batch]) for batch in sorted(parts)])
        return most_variable(variances, self.config.hvg)

    def _schema(self, surveys: Sequence[Survey], genes: Sequence[str], obs: Sequence[merge.ObsColumn]) -> Schema:
        by_name = {column.name: Categories(column.name, column.categories) for column in obs}
        layers = sorted({one.layer for one in surveys})
        return Schema(
            genes=tuple(genes),
            batch=by_name[self.config.needed()[0]],
            labels=tuple(by_name[key] for key in self.config.label_keys),
            categorical=tuple(by_name[key] for key in self.config.categorical),
            continuous=self.config.continuous,
            proteins=merge.plan_proteins(surveys),
            size_factor=self.config.size_factor,
            counts_from=layers[0] if len(layers) == 1 else ", ".join(layers),
            unlabelled=self.config.unlabelled,
        )

    def _blocks(
        self,
        surveys: list[Survey],
        bits: int,
        columns: np.ndarray,
        schema: Schema,
        obs: Sequence[merge.ObsColumn],
        types: tuple[Any, Any],
    ) -> Iterator[CellBlock]:
        repeated, example = 0, ""
        for bucket in buckets([one.folder for one in surveys], bits, columns, schema.n_genes, types):
            frame = pd.DataFrame(
                {column.name: column.values(surveys, bucket) for column in obs}, index=merge.cell_names(surveys, bucket)
            )
            proteins = merge.protein_values(surveys, schema.proteins, bucket) if schema.proteins else (None, None)
            if bucket.repeated and not example:
                example = str(frame.index[np.flatnonzero(bucket.keys[1:] == bucket.keys[:-1])[0]])
            repeated += bucket.repeated
            yield CellBlock(*bucket.csr, bucket.keys, frame, *proteins)
        if repeated:
            warnings.warn(
                f"{repeated} cells have the batch and name of a cell in another file (as {example!r}); if they are the "
                "same cells, leave one of the files out",
                DataWarning,
                stacklevel=2,
            )

    def _tell_surveys(self, surveys: Sequence[Survey]) -> None:
        content = [s["xxh3_128"] for one in surveys for s in one.sources]
        twice = [s["name"] for one in surveys for s in one.sources if content.count(s["xxh3_128"]) > 1]
        if twice:
            raise UsageError(f"files of the same content: {', '.join(sorted(twice))}; give each once")
        for one in surveys:
            for line in one.messages:
                self.tell(line)
            for line in one.warnings:
                warnings.warn(line, DataWarning, stacklevel=2)
            for key, values in one.look_alikes.items():
                warnings.warn(
                    f"{one.where}: obs column {key!r} has the values {', '.join(map(repr, values))}, which look like "
                    "no label; name them by --unlabelled if they are",
                    DataWarning,
                    stacklevel=2,
                )

    def _tell_genes(self, surveys: Sequence[Survey], plan: merge.GenePlan) -> None:
        if len(surveys) > 1:
            self.tell(f"{len(plan.genes)} genes, matched {plan.how}")
        for one, n in zip(surveys, plan.unmeasured, strict=True):
            if n and not one.is_store:
                warnings.warn(
                    f"{one.where}: does not measure {n} of the store's {len(plan.genes)} genes; its cells hold zeros "
                    "for them that nobody counted (--genes intersection leaves such genes out)",
                    DataWarning,
                    stacklevel=2,
                )


def _identity(found: Survey) -> tuple[str, str]:
    return str(found.sources[0]["name"]), str(found.sources[0]["xxh3_128"])
