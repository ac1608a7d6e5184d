"""A trained model as its users know it: every output for an AnnData, a file, or a store of any size.

Method names are those of scvi-tools. Cells are streamed through the model in batches; what comes back is as
large as it is. Draws are a function of `seed`, the batch size and a cell's place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from scarcade.engine.config import checked
from scarcade.engine.contracts import Batch, Noise
from scarcade.engine.errors import CategoryError, GenesError, UsageError
from scarcade.jobs.cells import Cells, MemoryCells, StoreCells, cells_of, refuse_unknown
from scarcade.jobs.differential import DifferentialConfig, Draws, Groups, compare, fdr_calls, groups_of, raw_statistics
from scarcade.models import outputs, protein_outputs
from scarcade.models.distributions import draw
from scarcade.models.model import AtlasModel
from scarcade.models.outputs import OBSERVED
from scarcade.models.saved import read, read_delta
from scarcade.models.scvi import Scvi
from scarcade.models.totalvi import Totalvi

BATCH_SIZE = 1024


def load(path: str | Path, *, delta: str | Path | None = None) -> "Trained":
    """The trained model in a folder (``runs/NAME/model``); with `delta` as surgery left it for a query.

    Args:
        delta: a folder ``NAME.delta`` of a mapping onto this model.

    Raises:
        OpenError, CorruptError, ModelFileError, UnsafeFileError: as `models.saved.read`.
    """
    model = read(path)
    return Trained(model if delta is None else read_delta(delta, model), Path(path))


class Trained:
    """A model in evaluation mode and, where it was read from disk, its folder.

    All methods take `data`: an AnnData, the path of an .h5ad or .zarr, a store or its path; `batch_key` and
    `layer` say where an AnnData has its batches and counts (default: as in training, or found out).

    Raises (all of them):
        CategoryError: cells of a batch that the model does not know, where that matters.
        GenesError: genes that are not the model's.
    """

    def __init__(self, model: AtlasModel, folder: Path | None = None) -> None:
        self.model = model.eval()
        self.folder = folder

    def __repr__(self) -> str:
        schema = self.model.schema
        return f"Trained({self.model.name}: {schema.n_genes} genes, {len(schema.batch)} batches, from {self.folder})"

    @property
    def _scvi(self) -> Scvi:
        """The model, for outputs that scVI's decoder defines."""
        if isinstance(self.model, Scvi):
            return self.model
        there_are = f"; a {self.model.name} model has output({', '.join(map(repr, self.model.outputs))})"
        raise UsageError(f"only scvi models and their kin have this{there_are if self.model.outputs else ''}")

    def output(
        self,
        name: str,
        data: Any,
        *,
        n_samples: int = 0,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        **settings: Any,
    ) -> pd.DataFrame:
        """One of ``model.outputs`` for every cell, (n, its columns).

        Args:
            n_samples: draws of the latent that are averaged; 0 takes the latent's mean.
            settings: of that output.

        Raises:
            UsageError: the model has no such output.
        """
        if name not in self.model.outputs:
            there_are = f"there are {', '.join(self.model.outputs)}" if self.model.outputs else "it has none"
            raise UsageError(f"a {self.model.name} model has no output {name!r}; {there_are}")
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        output = self.model.outputs[name]

        @torch.no_grad()
        def of_batch(batch: Batch) -> list[Tensor]:
            draws = [output.of(self.model, batch, noise, **settings) for noise in self._noises(batch, seed, n_samples)]
            return [torch.stack(draws).mean(0) if len(draws) > 1 else draws[0]]

        (found,) = self._each(cells, of_batch, batch_size, decoding=output.decodes)
        return pd.DataFrame(found, index=cells.names(), columns=list(output.columns(self.model)))

    def predict(
        self,
        data: Any,
        *,
        soft: bool = False,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> np.ndarray | pd.DataFrame:
        """The label of every cell by the model's own classifier (n,); or the probabilities (n, classes) with `soft`.

        Raises:
            UsageError: the model has no classifier.
        """
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        (found,) = self._each(cells, lambda batch: [self.model.predict_labels(batch)], batch_size, decoding=False)
        values = np.array(self.model.schema.labels[0].values, dtype=object)
        if soft:
            return pd.DataFrame(found, index=cells.names(), columns=values)
        named: np.ndarray = values[found.argmax(1)]
        return named

    def get_latent_representation(
        self,
        data: Any,
        *,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The latent of every cell, float32 (n, L): its mean, or a draw; or (mean, variance) with `return_dist`."""
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)

        def of_batch(batch: Batch) -> list[Tensor]:
            if give_mean or return_dist:
                return list(self.model.embed(batch))
            noise = self._noise(batch, seed)
            if not isinstance(self.model, Scvi):
                return [draw(*self.model.embed(batch), noise)]
            with torch.no_grad():
                q = self.model.encode(batch.counts.dense(self.model.device), batch)
                z_BL, _ = outputs.draw_latent(q, noise)
                return [self.model.shape_latent(z_BL)]

        found = self._each(cells, of_batch, batch_size, decoding=False)
        return (found[0], found[1]) if return_dist else found[0]

    def get_normalized_expression(
        self,
        data: Any,
        *,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_mean: bool = True,
        return_numpy: bool = False,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray:
        """Decoded expression of every cell, (n, genes).

        Args:
            transform_batch: decode as if every cell were of this batch; of several, their average.
            gene_list: these genes only (frequencies are still over all genes).
            library_size: what the frequencies of a cell are multiplied by; "latent": its own library size.
            n_samples: draws of the latent that are averaged; 0 decodes the latent's mean.
            return_mean: False returns an array (n_samples, n, genes).
        """
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        codes, genes = self._batch_codes(transform_batch), self._genes(gene_list)

        def of_batch(batch: Batch) -> list[Tensor]:
            draws = [
                outputs.normalised_expression(
                    self._scvi, batch, noise, transform_batch=codes, library_size=library_size
                )[:, genes]
                for noise in self._noises(batch, seed, n_samples)
            ]
            return [torch.stack(draws).mean(0)] if return_mean else draws

        found = self._each(cells, of_batch, batch_size, decoding=codes == OBSERVED)
        if not return_mean:
            return np.stack(found)
        names = [self.model.schema.genes[i] for i in genes]
        return found[0] if return_numpy else pd.DataFrame(found[0], index=cells.names(), columns=names)

    def get_likelihood_parameters(
        self,
        data: Any,
        *,
        n_samples: int = 1,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """``mean``, ``dispersions`` and (zinb) ``dropout`` of every count, each (n, G); averaged over draws."""
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        keys: list[str] = []

        def of_batch(batch: Batch) -> list[Tensor]:
            draws = [
                outputs.likelihood_parameters(self._scvi, batch, noise)
                for noise in self._noises(batch, seed, n_samples)
            ]
            keys[:] = list(draws[0])
            return [torch.stack([draw[key] for draw in draws]).mean(0) for key in keys]

        found = self._each(cells, of_batch, batch_size, decoding=True)
        return dict(zip(keys, found, strict=True))

    def get_reconstruction_error(
        self, data: Any, *, return_mean: bool = True, batch_size: int = BATCH_SIZE, seed: int = 0, **where: Any
    ) -> dict[str, float | np.ndarray]:
        """``{"reconstruction_loss": -log p(x | z)}`` with one draw of z: the mean over cells, or of each cell."""
        found = self._terms(data, "reconstruction", batch_size, seed, where)
        return {"reconstruction_loss": float(found.mean()) if return_mean else found}

    def get_elbo(
        self, data: Any, *, return_mean: bool = True, batch_size: int = BATCH_SIZE, seed: int = 0, **where: Any
    ) -> float | np.ndarray:
        """The evidence lower bound (higher is better), the mean over cells or of each cell."""
        found = -self._terms(data, "elbo", batch_size, seed, where)
        return float(found.mean()) if return_mean else found

    def get_marginal_ll(
        self,
        data: Any,
        *,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> float | np.ndarray:
        """log p(x) (totalvi: of genes and proteins) by importance sampling, the mean over cells or of each cell."""
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)

        def of_batch(batch: Batch) -> list[Tensor]:
            noise = self._noise(batch, seed)
            if isinstance(self.model, Totalvi):
                return [protein_outputs.marginal_log_likelihood(self.model, batch, noise, n_mc_samples)]
            return [outputs.marginal_log_likelihood(self._scvi, batch, noise, n_mc_samples)]

        (found,) = self._each(cells, of_batch, batch_size, decoding=True)
        return float(found.mean()) if return_mean else found

    def posterior_predictive_sample(
        self,
        data: Any,
        *,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> Any:
        """Counts drawn from the model for every cell: scipy CSR (n, genes), or a list of `n_samples` of them."""
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        genes = self._genes(gene_list)
        parts: list[list[sparse.csr_matrix]] = [[] for _ in range(n_samples)]
        for batch in self._batches(cells, batch_size, decoding=True):
            for i in range(n_samples):
                noise = self._noise(batch, seed, i)
                generator = torch.Generator(self.model.device).manual_seed(_seed_of(batch, seed, i))
                x_BG = outputs.predictive_sample(self._scvi, batch, noise, generator)[:, genes]
                parts[i].append(sparse.csr_matrix(x_BG.cpu().numpy()))
        drawn = [sparse.vstack(part, format="csr") for part in parts]
        return drawn[0] if n_samples == 1 else drawn

    def get_latent_library_size(
        self,
        data: Any,
        *,
        give_mean: bool = True,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> np.ndarray:
        """Library size of every cell (n, 1): its posterior's mean; exp of the centre (or observed) without."""
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        found = self._each(
            cells,
            lambda batch: [outputs.library_size(self._scvi, batch, mean=give_mean)[:, None]],
            batch_size,
            decoding=False,
        )
        return found[0]

    def differential_expression(
        self,
        data: Any,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        *,
        idx1: np.ndarray | None = None,
        idx2: np.ndarray | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        **settings: Any,
    ) -> pd.DataFrame:
        """Genes that differ between two sets of cells; see `jobs.differential` for the method and the columns.

        Args:
            groupby: obs column; each of `group1` (default: every value) against `group2` (default: the rest).
            idx1, idx2: rows or masks instead of a column; `idx2` defaults to the rest.
            settings: fields of `DifferentialConfig` (mode, delta, batch_correction, fdr_target, ...).
        """
        config = checked(DifferentialConfig, settings)
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)
        tables = []
        for groups in groups_of(
            cells.n_cells, cells.column, groupby=groupby, group1=group1, group2=group2, idx1=idx1, idx2=idx2
        ):
            table = self._compared(cells, groups, config, batch_size, seed)
            if groups.name1 is not None:
                table["comparison"] = f"{groups.name1} vs {groups.name2}"
                table["group1"], table["group2"] = groups.name1, groups.name2
            tables.append(table)
        return pd.concat(tables)

    def _compared(
        self, cells: Cells, groups: Groups, config: DifferentialConfig, batch_size: int, seed: int
    ) -> pd.DataFrame:
        """One pair of sets of cells."""
        raw = raw_statistics(cells.batches(batch_size), self.model.schema.n_genes, (groups.rows1, groups.rows2))
        drawn: list[Draws] = []
        for side, (rows, named) in enumerate(((groups.rows1, config.batchid1), (groups.rows2, config.batchid2))):
            values = list(named or self.model.schema.batch.values) if config.batch_correction else [None]
            n = max(2, config.n_samples_overall // len(values))
            scales: list[np.ndarray] = []
            for value in values:
                rng = np.random.default_rng((seed, side, len(scales)))
                chosen = cells.take(rng.choice(rows, n))
                codes = OBSERVED if value is None else self._batch_codes(value)

                def scale(batch: Batch, codes: tuple[int | None, ...] = codes, i: int = len(scales)) -> list[Tensor]:
                    noise = self._noise(batch, seed, i)
                    return [outputs.normalised_expression(self._scvi, batch, noise, transform_batch=codes)]

                scales += self._each(chosen, scale, batch_size, decoding=codes == OBSERVED)
            drawn.append(Draws(np.concatenate(scales), np.repeat(np.array(values, dtype=object), n)))
        rng = np.random.default_rng((seed, 2))
        table = compare(drawn[0], drawn[1], raw, config, rng)
        table.index = pd.Index(self.model.schema.genes)
        if config.all_stats:
            table = pd.concat([table, raw.table(table.index)], axis=1)
        table = table.sort_values("proba_de" if config.mode == "change" else "bayes_factor", ascending=False)
        if config.mode == "change":
            calls = fdr_calls(table["proba_de"].to_numpy(), config.fdr_target)
            table[f"is_de_fdr_{config.fdr_target}"] = calls
        return table

    def _terms(self, data: Any, term: str, batch_size: int, seed: int, where: dict[str, Any]) -> np.ndarray:
        cells = cells_of(data, self.model, **where)

        def of_batch(batch: Batch) -> list[Tensor]:
            return [outputs.loss_terms(self._scvi, batch, self._noise(batch, seed))[term]]

        return self._each(cells, of_batch, batch_size, decoding=True)[0]

    def _batches(self, cells: Cells, batch_size: int, *, decoding: bool) -> Iterator[Batch]:
        matters = refuse_unknown(cells, self.model, decoding=decoding)
        for batch in cells.batches(batch_size):
            if not matters:
                batch = replace(batch, batch=torch.zeros_like(batch.batch))
            yield batch.to(self.model.device)

    def _each(
        self, cells: Cells, of_batch: Callable[[Batch], list[Tensor]], batch_size: int, *, decoding: bool
    ) -> list[np.ndarray]:
        """Each output of `of_batch` for all cells, in their order."""
        parts: list[list[np.ndarray]] = []
        for batch in self._batches(cells, batch_size, decoding=decoding):
            parts.append([tensor.cpu().numpy() for tensor in of_batch(batch)])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _noise(self, batch: Batch, seed: int, draw: int = 0) -> Noise:
        return Noise([((seed, draw, batch.position.step, batch.position.epoch), len(batch))], self.model.device)

    def _noises(self, batch: Batch, seed: int, n_samples: int) -> list[Noise | None]:
        return [self._noise(batch, seed, i) for i in range(n_samples)] or [None]

    def _batch_codes(self, values: str | Sequence[str] | None) -> tuple[int | None, ...]:
        if values is None:
            return OBSERVED
        codes = self.model.schema.batch.codes()
        named = [values] if isinstance(values, str) else list(values)
        for value in named:
            if value not in codes:
                raise CategoryError(
                    f"transform_batch: the model does not know the batch {value!r}; it knows {', '.join(codes)}"
                )
        if not named:
            raise UsageError("transform_batch: no batch is named; give one or more, or None for each cell's own")
        return tuple(codes[value] for value in named)

    def _genes(self, names: Sequence[str] | None) -> list[int]:
        places = {gene: i for i, gene in enumerate(self.model.schema.genes)}
        if names is None:
            return list(places.values())
        if unknown := [name for name in names if name not in places]:
            raise GenesError(f"gene_list: the model has no gene {', '.join(map(repr, unknown[:5]))}")
        return [places[name] for name in names]


def _seed_of(batch: Batch, seed: int, draw: int) -> int:
    words = np.random.SeedSequence((seed, draw, batch.position.step, batch.position.epoch, 1))
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


__all__ = ["MemoryCells", "StoreCells", "Trained", "load"]
