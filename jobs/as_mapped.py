"""The cells of a mapped query with the batches that its mapping gave them, to stand beside those of the reference.

A mapping without --batch-key makes a query one batch, named after its file; read again for a merge, the same file may
have another name, or a column with batches that the mapping did not look at.
"""

from dataclasses import replace

import numpy as np

from scarcade.dataloaders.schema import FILE_COLUMN
from scarcade.engine.errors import CategoryError
from scarcade.engine.schema import Categories
from scarcade.jobs.cells import Cells, MemoryCells
from scarcade.models.model import AtlasModel
from scarcade.models.weights import DELTA

_SHOWN = 5


def as_mapped(cells: Cells, model: AtlasModel) -> Cells:
    """`cells` with codes of `model`: those of their batches, or the one batch of a query mapped without --batch-key.

    Raises:
        CategoryError: a batch that the model does not know, or that the mapped query did not have.
    """
    record = model.record or {}
    mapping = record.get("training", {}) if record.get("kind") == DELTA else {}
    key, mapped = mapping.get("batch_key"), mapping.get("batches")
    if key == FILE_COLUMN and mapped is not None and len(mapped) == 1:
        return _of_one_batch(cells, model.schema.batch, mapped[0])
    known = model.schema.batch.values if mapped is None else mapped
    if wrong := [value for value in _batches(cells) if value not in known]:
        if mapped is None:
            told = (
                f"the model does not know the batch {_shown(wrong)}; name the column of batches by --batch-key, or map "
                "such cells first (`scarcade map`)"
            )
        else:
            told = (
                f"the batch {_shown(wrong)} is not one of the mapped query, which had {_shown(mapped)} from "
                f"--batch-key {key}; give its cells, and the same --batch-key"
            )
        raise CategoryError(f"{cells.where}: {told}")
    return cells


def _batches(cells: Cells) -> list[str]:
    """The batches that occur among the cells."""
    if isinstance(cells, MemoryCells):
        values, codes = cells.schema.batch.values, cells.columns.batch
    else:
        values, codes = cells.view.schema.batch.values, cells.view.codes(cells.view.batch)
    return [values[code] for code in np.unique(codes)]


def _of_one_batch(cells: Cells, known: Categories, batch: str) -> Cells:
    code = known.codes()[batch]
    if isinstance(cells, MemoryCells):
        columns = replace(cells.columns, batch=np.full(cells.n_cells, code, np.int64))
        return replace(cells, columns=columns, schema=replace(cells.schema, batch=known), unknown_batches=())
    view = cells.view
    recoded = replace(view.batch, table=np.full_like(view.batch.table, code))
    return replace(
        cells, view=replace(view, schema=replace(view.schema, batch=known), batch=recoded), unknown_batches=()
    )


def _shown(values: list[str]) -> str:
    return ", ".join(map(repr, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
