"""Proteins imputed by totalVI for a query of RNA alone, against what was measured: CITE-seq cells of PBMC.

Two designs of the baseline: "within" hides the proteins of a quarter of one library, "pbmc5k" maps another library of
which 200 cells have proteins that are compared. The same cells, genes and settings as the original had, through the
functions behind `scarcade ingest`, `train` and `map`. Imputed means: decoded as cells of the reference's batch, means
of 25 draws, with the background (as the counts that they are compared with have it); "foreground" is without it.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TASK, METHOD, ORIGINAL = "cite", "scarcade totalvi", "scvi-tools TOTALVI"
DESIGNS = ("within", "pbmc5k")
EPOCHS, DRAWS, BATCH = 60, 25, 256
PROTEINS, QUERY = "protein_counts", "query"
COLUMNS = ("pearson", "pearson_median", "spearman", "pearson_foreground", "rmse", "reference_cpu_s", "query_cpu_s")


@dataclass(frozen=True)
class Design:
    """The cells of a design, and its store and runs in the folder `work`."""

    name: str
    seed: int
    h5ad: Path
    split: Mapping[str, list[str]]  # genes, ref_obs, query_obs, truth_obs
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / f"cite-{self.name}-{self.seed}"

    def cells(self, names: str) -> Any:
        import anndata as ad

        data = ad.read_h5ad(self.h5ad)
        return data[self.split[names], self.split["genes"]].copy()


def measured(design: Design) -> dict[str, Any]:
    """Train, map, impute, compare: a row of the table."""
    import scarcade as sca

    design.folder.mkdir(parents=True, exist_ok=True)
    store, run, out = (design.folder / name for name in ("atlas.zarr", "run", "mapped"))
    if not store.exists():
        file = design.folder / "reference.h5ad"
        design.cells("ref_obs").write_h5ad(file)
        sca.ingest([file], store, batch_key="batch", protein_key=PROTEINS, seed=design.seed, report=lambda line: None)
    began = time.process_time()
    sca.train(
        store,
        "totalvi",
        out=run,
        recipe="scarches",
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=design.seed,
        workers=0,
        threads=1,
        progress=lambda line: None,
    )
    row: dict[str, Any] = {"reference_cpu_s": time.process_time() - began}

    query = design.cells("query_obs")
    known = sorted(set(design.cells("ref_obs").obs["batch"].astype(str)))
    query.obs["batch"] = QUERY
    del query.obsm[PROTEINS]
    began = time.process_time()
    sca.map_queries(
        run / "model",
        {QUERY: query},
        out,
        batch_key="batch",
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=design.seed,
        workers=0,
        threads=1,
        report={"picture": "pca"},
    ).raise_if_failed()
    row["query_cpu_s"] = time.process_time() - began

    mapped = sca.load(run / "model", delta=out / f"{QUERY}.delta")
    truth = np.log1p(np.asarray(design.cells("truth_obs").obsm[PROTEINS], np.float64))
    for name, background in (("", True), ("_foreground", False)):
        imputed = mapped.output(
            "proteins",
            query,
            batch_key="batch",
            n_samples=DRAWS,
            transform_batch=known,
            include_protein_background=background,
        )
        found = np.log1p(imputed.loc[design.split["truth_obs"]].to_numpy(np.float64))
        row |= {key + name: value for key, value in compared(truth, found).items()}
    return row


def compared(truth: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Correlations of each protein over cells, and the error over all values; both arrays log1p (cells, proteins)."""
    from scipy.stats import pearsonr, spearmanr

    pearson = [float(pearsonr(truth[:, p], found[:, p]).statistic) for p in range(truth.shape[1])]
    spearman = [float(spearmanr(truth[:, p], found[:, p]).statistic) for p in range(truth.shape[1])]
    return {
        "pearson": float(np.mean(pearson)),
        "pearson_median": float(np.median(pearson)),
        "spearman": float(np.mean(spearman)),
        "rmse": float(np.sqrt(np.mean((truth - found) ** 2))),
        "pearson_of_each": [round(value, 3) for value in pearson],
    }


def rows(
    options: argparse.Namespace, have: set[tuple[str, str, str, int]], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure what `have` lacks, seed by seed, and `keep` each row as it is done."""
    if options.data is None or options.splits is None:
        raise SystemExit("cite: give --data FOLDER and --splits FOLDER (with cite_within.json, cite_pbmc5k.json)")
    for seed in options.seeds:
        for name in options.only or DESIGNS:
            if name not in DESIGNS or (TASK, name, METHOD, seed) in have:
                continue
            if options.methods and METHOD not in options.methods:
                continue
            split = json.loads((options.splits / f"cite_{name}.json").read_text())
            design = Design(name, seed, options.data / "cite_pbmc10k_5k.h5ad", split, options.work)
            keep({"task": TASK, "split": name, "method": METHOD, **measured(design), "seed": seed})


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, each design's original above ours."""
    lines = [f"| design | method | seeds | {' | '.join(COLUMNS)} |", "|" + "---|" * (3 + len(COLUMNS))]
    for design in DESIGNS:
        for method in (ORIGINAL, METHOD):
            found = [row for row in rows if (row["split"], row["method"]) == (design, method)]
            if found:
                cells = [f"{np.mean([row[column] for row in found]):.3f}" for column in COLUMNS]
                lines.append(f"| {design} | {method} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)
