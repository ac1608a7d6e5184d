"""Draws cells of two sets, decodes them, and compares their expression: the passes of differential expression.

What is done with the draws is in `jobs.differential`. Any model with an output "expression" can be asked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scarcade.engine.config import checked
from scarcade.jobs.asked import asked_of, batches_of, noise_of
from scarcade.jobs.cells import Cells
from scarcade.jobs.differential import (
    DifferentialConfig,
    Draws,
    Groups,
    RawStatistics,
    compare,
    fdr_calls,
    groups_of,
    raw_statistics,
)
from scarcade.models.model import AtlasModel


def contrasted(
    model: AtlasModel,
    cells: Cells,
    *,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: np.ndarray | None,
    idx2: np.ndarray | None,
    settings: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """One table below the other for each pair of sets; see `Trained.differential_expression`."""
    config = checked(DifferentialConfig, settings)
    pairs = groups_of(cells.n_cells, cells.column, groupby=groupby, group1=group1, group2=group2, idx1=idx1, idx2=idx2)
    statistics = raw_statistics(cells.batches(batch_size), model.schema.n_genes, pairs)
    tables = []
    for groups, raw in zip(pairs, statistics, strict=True):
        table = _compared(model, cells, groups, raw, config, batch_size, seed)
        if groups.name1 is not None:
            table["comparison"] = f"{groups.name1} vs {groups.name2}"
            table["group1"], table["group2"] = groups.name1, groups.name2
        tables.append(table)
    return pd.concat(tables)


def _compared(
    model: AtlasModel,
    cells: Cells,
    groups: Groups,
    raw: RawStatistics,
    config: DifferentialConfig,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """One pair of sets of cells."""
    drawn: list[Draws] = []
    for side, (rows, named) in enumerate(((groups.rows1, config.batchid1), (groups.rows2, config.batchid2))):
        values = list(named or model.schema.batch.values) if config.batch_correction else [None]
        n = max(2, config.n_samples_overall // len(values))
        scales: list[np.ndarray] = []
        for number, value in enumerate(values):
            rng = np.random.default_rng((seed, side, number))
            (asked,) = asked_of(model, ["expression"], {"transform_batch": value})
            parts = [
                asked.values(model, batch, [noise_of(batch, model, seed, number)])
                for batch in batches_of(cells.take(rng.choice(rows, n)), model, batch_size, decoding=asked.decodes)
            ]
            scales.append(np.concatenate(parts))
        drawn.append(Draws(np.concatenate(scales), np.repeat(np.array(values, dtype=object), n)))
    table = compare(drawn[0], drawn[1], raw, config, np.random.default_rng((seed, 2)))
    table.index = pd.Index(model.schema.genes)
    if config.all_stats:
        table = pd.concat([table, raw.table(table.index)], axis=1)
    table = table.sort_values("proba_de" if config.mode == "change" else "bayes_factor", ascending=False)
    if config.mode == "change":
        table[f"is_de_fdr_{config.fdr_target}"] = fdr_calls(table["proba_de"].to_numpy(), config.fdr_target)
    return table
