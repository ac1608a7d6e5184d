"""A trained model as its users know it: every output for an AnnData, a file, or a store of any size.

Method names are those of scvi-tools. Cells are streamed through the model in batches; what comes back is as
large as it is, and `write` puts it on disk batch by batch instead. Draws are a function of `seed`, the batch size and
a cell's place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from scarcade.engine.contracts import Batch
from scarcade.engine.errors import GenesError, UsageError
from scarcade.engine.published import published
from scarcade.engine.storage import is_url
from scarcade.jobs.asked import asked_of, batches_of, noise_of, noises_of
from scarcade.jobs.cells import Cells, MemoryCells, StoreCells, cells_of
from scarcade.jobs.contrast import contrasted
from scarcade.jobs.embed import Progress, embed
from scarcade.jobs.update import save_as
from scarcade.models import outputs
from scarcade.models.model import AtlasModel, Where
from scarcade.models.saved import read, read_delta
from scarcade.models.scvi import Scvi

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
        """The model, for what scVI's decoder alone defines."""
        if isinstance(self.model, Scvi):
            return self.model
        there_are = f"; {self.model.name} has output({', '.join(map(repr, self.model.offered))})"
        raise UsageError(f"only scvi models and their kin have this{there_are if self.model.offered else ''}")

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
        (asked,) = asked_of(self.model, [name], settings)
        cells = cells_of(data, self.model, batch_key=batch_key, layer=layer)

        def of_batch(batch: Batch) -> list[np.ndarray]:
            return [asked.values(self.model, batch, noises_of(batch, self.model, seed, n_samples))]

        (found,) = self._each(cells, of_batch, batch_size, decoding=asked.decodes)
        return pd.DataFrame(found, index=cells.names(), columns=list(asked.columns))

    def annotate(
        self,
        adata: Any,
        outputs: Sequence[str] = (),
        *,
        n_samples: int = 0,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        """Put latent (obsm, under the model's key) and `outputs` of the cells of an AnnData into it.

        Genes come to ``layers["<model>_<output>"]`` (if its genes are the model's, in any order), labels to obs
        besides, the rest as tables to ``obsm["<model>_<output>"]``: the names under which `write` puts them on disk.

        Raises:
            UsageError: the model has no such output or setting. GenesError: a layer would not fit.
        """
        asked = asked_of(self.model, outputs, settings)
        if any(one.output.genes for one in asked) and set(adata.var_names) != set(self.model.schema.genes):
            raise GenesError(
                f"the AnnData has {adata.n_vars} genes, the model {self.model.schema.n_genes}: expression does not fit "
                "into its layers; take output() or write()"
            )
        cells = cells_of(adata, self.model, batch_key=batch_key, layer=layer)

        def of_batch(batch: Batch) -> list[Tensor | np.ndarray]:
            noises = noises_of(batch, self.model, seed, n_samples)
            return [self.model.embed(batch)[0], *(one.values(self.model, batch, noises) for one in asked)]

        latent, *found = self._each(cells, of_batch, batch_size, decoding=any(one.decodes for one in asked))
        adata.obsm[self.model.obsm_key] = latent
        for one, values in zip(asked, found, strict=True):
            table = pd.DataFrame(values, index=adata.obs_names, columns=list(one.columns))
            if one.output.genes:
                adata.layers[one.key] = table[list(adata.var_names)].to_numpy()
                continue
            adata.obsm[one.key] = table
            if one.categories is not None:
                codes = table.to_numpy().argmax(axis=1) if len(table) else np.zeros(0, np.int64)
                adata.obs[one.key] = pd.Categorical.from_codes(codes, categories=pd.Index(one.columns))

    def write(
        self,
        out: str | Path,
        data: Any,
        outputs: Sequence[str] = (),
        *,
        n_samples: int = 0,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        replace: bool = False,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Path | str:
        """Write latent and `outputs` of all cells to the folder `out`, batch by batch (see `jobs.embed.embed`)."""
        return embed(
            self.model,
            data,
            out,
            outputs=outputs,
            settings=settings,
            n_samples=n_samples,
            batch_key=batch_key,
            layer=layer,
            batch_size=batch_size,
            seed=seed,
            replace=replace,
            progress=progress,
        )

    def save(
        self,
        out: str | Path,
        data: Any = None,
        *,
        batch_key: str | None = None,
        layer: str | None = None,
        batch_size: int = BATCH_SIZE,
        replace: bool = False,
    ) -> Path | str:
        """Write the model to the folder, or URL, `out`.

        With a delta it becomes a reference that knows the query's batches.

        Args:
            data: the query's cells; their latent comes behind that of the reference's cells, which surgery left as it
                was.

        Raises:
            UsageError: surgery added latent dimensions, which the reference's cells have no values for.
            StorageError: `out` exists (without `replace`).
        """
        with published(out, replace=replace) as target:
            save_as(
                self.model,
                self.folder,
                target,
                None if data is None else cells_of(data, self.model, batch_key=batch_key, layer=layer),
                batch_size=batch_size,
                replace=replace,
            )
        return str(out) if is_url(out) else Path(out)

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
            return [self.model.draw(batch, noise_of(batch, self.model, seed))]

        found = self._each(cells, of_batch, batch_size, decoding=False)
        return (found[0], found[1]) if return_dist else found[0]

    def get_normalized_expression(
        self,
        data: Any,
        *,
        transform_batch: Where = None,
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
        given = {"transform_batch": transform_batch, "library_size": None if library_size == 1 else library_size}
        (asked,) = asked_of(self.model, ["expression"], given)
        cells, genes = cells_of(data, self.model, batch_key=batch_key, layer=layer), self._genes(gene_list)

        def of_batch(batch: Batch) -> list[np.ndarray]:
            noises = noises_of(batch, self.model, seed, n_samples)
            each = [noises] if return_mean else [[noise] for noise in noises]
            return [asked.values(self.model, batch, some)[:, genes] for some in each]

        found = self._each(cells, of_batch, batch_size, decoding=asked.decodes)
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
                for noise in noises_of(batch, self.model, seed, n_samples)
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
            noise = noise_of(batch, self.model, seed)
            return [self.model.marginal_log_likelihood(batch, noise, n_mc_samples)]

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
        for batch in batches_of(cells, self.model, batch_size, decoding=True):
            for i in range(n_samples):
                noise = noise_of(batch, self.model, seed, i)
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
        return contrasted(
            self.model,
            cells_of(data, self.model, batch_key=batch_key, layer=layer),
            groupby=groupby,
            group1=group1,
            group2=group2,
            idx1=idx1,
            idx2=idx2,
            settings=settings,
            batch_size=batch_size,
            seed=seed,
        )

    def _terms(self, data: Any, term: str, batch_size: int, seed: int, where: dict[str, Any]) -> np.ndarray:
        cells = cells_of(data, self.model, **where)

        def of_batch(batch: Batch) -> list[Tensor]:
            return [outputs.loss_terms(self.model, batch, noise_of(batch, self.model, seed))[term]]

        return self._each(cells, of_batch, batch_size, decoding=True)[0]

    def _each(
        self,
        cells: Cells,
        of_batch: Callable[[Batch], Sequence[Tensor | np.ndarray]],
        batch_size: int,
        *,
        decoding: bool,
    ) -> list[np.ndarray]:
        """Each output of `of_batch` for all cells, in their order."""
        parts: list[list[np.ndarray]] = []
        for batch in batches_of(cells, self.model, batch_size, decoding=decoding):
            parts.append([np.asarray(one.cpu() if isinstance(one, Tensor) else one) for one in of_batch(batch)])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

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
