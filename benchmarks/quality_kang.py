"""Cells before and after interferon beta (Kang 2018): responses that scGen predicts, programs that expiMap finds.

scGen: the stimulated cells of one type are left out of training and predicted from its control cells. R2 is the squared
correlation of mean expression, predicted and measured, over all genes and over the 50 genes that rise and the 50 that
fall most (Wilcoxon); "unchanged" takes the control cells themselves for the prediction. Genes, normalisation, settings
and cells are those of the baseline: 2,000 highly variable genes of the normalised data, conditions apart; a type is the
author's label, else the transferred one.

expiMap: trained on the donors as batches with Reactome's programs; the row says which programs differ most between
stimulated and control cells, by |Bayes factor|. Everything goes through the functions behind `scarcade ingest` and
`train`, and the public ones of `jobs`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TASK, SCGEN, EXPIMAP, ORIGINAL = "kang", "scarcade scgen", "scarcade expimap", "scArches scGen"
TYPES = ("CD4 Naive T", "CD14 Mono", "B")
PROGRAMS = "programs"
"""The split of expiMap: all cells."""
CONDITION, CONTROL, STIMULATED, LABEL = "condition", "ctrl", "stim", "type"
SIZE = "size"
GENES, CHANGED, MIN_CELLS = 2000, 50, 10
SCGEN_SETTINGS = {
    "model": {"hidden_layer_sizes": (256, 128), "n_latent": 10},
    "optim": {"early_stopping": False},
    "data": {"batch_size": 32},
}
SCGEN_EPOCHS = 50
EXPIMAP_SETTINGS = {
    "model": {"hidden_layer_sizes": (256, 256, 256), "min_program_genes": 12, "alpha": 0.7},
    "optim": {"kl_max": 0.5, "kl_epochs": 100.0},
}
EXPIMAP_EPOCHS = 60
COLUMNS = ("r2", "r2_changed", "r2_variance", "r2_unchanged", "r2_changed_unchanged", "cpu_s")
"""Numbers of a row of scGen."""


@dataclass(frozen=True)
class Data:
    """Kang's cells: counts and normalised expression, of the highly variable genes."""

    counts: Any  # AnnData
    normalised: Any

    def group(self, of: Any, label: str, condition: str) -> Any:
        chosen = (self.counts.obs[LABEL] == label) & (self.counts.obs[CONDITION] == condition)
        return of[chosen.to_numpy()]


@cache
def read(h5ad: Path) -> Data:
    import anndata as ad
    import scanpy as sc

    cells = ad.read_h5ad(h5ad)
    cells.obs = (
        cells.obs[["batch", CONDITION]]
        .astype(str)
        .assign(
            **{
                LABEL: np.where(
                    cells.obs["cell_type"] == "unlabelled", cells.obs["cell_type_transferred"], cells.obs["cell_type"]
                )
            }
        )
    )
    sc.pp.filter_genes(cells, min_cells=MIN_CELLS)
    cells.obs[SIZE] = np.asarray(cells.X.sum(1)).ravel()
    normalised = cells.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    variable = sc.pp.highly_variable_genes(normalised, n_top_genes=GENES, batch_key=CONDITION, inplace=False)
    chosen = variable["highly_variable"].to_numpy()
    return Data(cells[:, chosen].copy(), normalised[:, chosen].copy())


def predicted(data: Data, label: str, seed: int, folder: Path) -> dict[str, Any]:
    """scGen's row of one held-out type."""
    import scarcade as sca
    from scarcade.jobs.arithmetic import predict_response

    obs = data.counts.obs
    seen = ~((obs[LABEL] == label) & (obs[CONDITION] == STIMULATED)).to_numpy()
    store = ingested(data.counts[seen], folder, seed, size_factor=SIZE)
    began = time.process_time()
    run = sca.train(
        store,
        "scgen",
        out=folder / "run",
        epochs=SCGEN_EPOCHS,
        seed=seed,
        workers=0,
        threads=1,
        settings=SCGEN_SETTINGS,
        progress=lambda line: None,
    )
    cpu_s = time.process_time() - began
    found, _ = predict_response(
        run.model,
        store,
        condition_key=CONDITION,
        control=CONTROL,
        stimulated=STIMULATED,
        label_key=LABEL,
        target_label=label,
    )
    truth, control = (data.group(data.normalised, label, one) for one in (STIMULATED, CONTROL))
    changed = most_changed(data, label)
    genes = list(data.normalised.var_names)
    places = [genes.index(gene) for gene in changed]
    expression = found[genes].to_numpy(np.float64)
    mean, was = (np.asarray(one.X.mean(0), np.float64).ravel() for one in (truth, control))
    return {
        "r2": r2(expression.mean(0), mean),
        "r2_changed": r2(expression.mean(0)[places], mean[places]),
        "r2_variance": r2(expression.var(0), truth.X.toarray().astype(np.float64).var(0)),
        "r2_unchanged": r2(was, mean),
        "r2_changed_unchanged": r2(was[places], mean[places]),
        "cpu_s": cpu_s,
    }


def most_changed(data: Data, label: str) -> list[str]:
    """The genes of a type that rise most, and those that fall most."""
    import anndata as ad
    import scanpy as sc

    cells = ad.concat([data.group(data.normalised, label, one) for one in (CONTROL, STIMULATED)])
    cells.obs[CONDITION] = cells.obs[CONDITION].astype("category")
    sc.tl.rank_genes_groups(cells, CONDITION, groups=[STIMULATED], reference=CONTROL, method="wilcoxon", n_genes=GENES)
    ranked = list(cells.uns["rank_genes_groups"]["names"][STIMULATED])
    return ranked[:CHANGED] + ranked[-CHANGED:]


def r2(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def enriched(data: Data, gmt: Path, seed: int, folder: Path) -> dict[str, Any]:
    """expiMap's row: the strongest programs, and the rank of each that names interferon."""
    import scarcade as sca
    from scarcade.dataloaders.programs import read_programs
    from scarcade.jobs.programs import enrichment, program_table

    names = list(data.counts.var_names)
    kept = read_programs([gmt], names, min_genes=EXPIMAP_SETTINGS["model"]["min_program_genes"]).programs
    inside = {gene for program in kept.values() for gene in program}
    store = ingested(data.counts[:, [gene for gene in names if gene in inside]], folder, seed)
    began = time.process_time()
    run = sca.train(
        store,
        "expimap",
        out=folder / "run",
        programs=[gmt],
        epochs=EXPIMAP_EPOCHS,
        seed=seed,
        workers=0,
        threads=1,
        settings=EXPIMAP_SETTINGS,
        progress=lambda line: None,
    )
    cpu_s = time.process_time() - began
    found = enrichment(run.model, store, CONDITION, STIMULATED)
    ranks = {name: place for place, name in enumerate(found.index, 1)}
    return {
        "n_programs": len(kept),
        "n_active": int(program_table(run.model)["active"].sum()),
        "strongest": {name: round(float(factor), 2) for name, factor in found["bayes_factor"].head(10).items()},
        "interferon": {name: ranks.get(name) for name in kept if "INTERFERON" in name},  # None: switched off
        "cpu_s": cpu_s,
    }


def ingested(cells: Any, folder: Path, seed: int, **settings: Any) -> Any:
    """The store of these cells."""
    import scarcade as sca

    folder.mkdir(parents=True, exist_ok=True)
    store, file = folder / "atlas.zarr", folder / "cells.h5ad"
    if store.exists():
        return sca.open_store(store)
    cells.copy().write_h5ad(file)
    told: dict[str, Any] = {"batch_key": "batch", "label_keys": [LABEL], "seed": seed}
    return sca.ingest([file], store, **told, **settings, report=lambda line: None)


def rows(
    options: argparse.Namespace, have: set[tuple[str, str, str, int]], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure what `have` lacks, seed by seed, and `keep` each row as it is done."""
    if options.data is None or options.gmt is None:
        raise SystemExit("kang: give --data FOLDER and --gmt FILE")
    for seed in options.seeds:
        for split in (*TYPES, PROGRAMS):
            method = EXPIMAP if split == PROGRAMS else SCGEN
            if (TASK, split, method, seed) in have or split not in (options.only or (*TYPES, PROGRAMS)):
                continue
            if options.methods and method not in options.methods:
                continue
            data = read(options.data / "kang_ifnb_full.h5ad")
            folder = options.work / f"kang-{split.replace(' ', '-')}-{seed}"
            row = (
                enriched(data, options.gmt, seed, folder) if split == PROGRAMS else predicted(data, split, seed, folder)
            )
            keep({"task": TASK, "split": split, "method": method, **row, "seed": seed})


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, each type's original above ours; then the strongest programs of each seed."""
    lines = [f"| held out | method | seeds | {' | '.join(COLUMNS)} |", "|" + "---|" * (3 + len(COLUMNS))]
    for label in TYPES:
        for method in (ORIGINAL, SCGEN):
            found = [row for row in rows if (row["split"], row["method"]) == (label, method)]
            if found:
                cells = [f"{np.mean([row[column] for row in found]):.3f}" for column in COLUMNS]
                lines.append(f"| {label} | {method} | {len(found)} | {' | '.join(cells)} |")
    lines += ["", "| expimap, seed | active | ten strongest programs, stimulated against control |", "|---|---|---|"]
    for row in rows:
        if row["split"] == PROGRAMS:
            told = ", ".join(f"{name} {factor:+.1f}" for name, factor in row["strongest"].items())
            lines.append(f"| {row['seed']} | {row['n_active']} of {row['n_programs']} | {told} |")
    return "\n".join(lines)
