"""What a user should know of how a query was mapped."""

from collections.abc import Mapping

import numpy as np

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.schema import Query
from scarcade.jobs.latent import LATENT
from scarcade.jobs.query_settings import QuerySurgery
from scarcade.jobs.reference import Reference


def notes_of(
    reference: Reference, query: Query, new: Mapping[str, tuple[str, ...]], surgery: QuerySurgery, grew: bool
) -> list[str]:
    """What a user should know of how this query was mapped; `grew`: surgery added something that could be trained."""
    notes = list(query.warnings)
    known = sorted(set(query.batch) & set(reference.schema.batch.values))
    if known:
        shown = ", ".join(map(repr, known[:5])) + (", ..." if len(known) > 5 else "")
        notes.append(f"batch {shown} is the reference's own: its rows were used as they are")
    if isinstance(query.counts, Csr) and (empty := int(np.count_nonzero(np.diff(query.counts.indptr) == 0))):
        notes.append(
            f"{empty} of {query.n_cells} cells have no counts in the reference's genes: their place says nothing"
        )
    if query.n_cells and not new and not surgery.model:
        notes.append("the query has no new batch: nothing was trained")
    if new and (told := reference.model.surgery_notice):
        left = grew and not surgery.train_decoder
        notes.append(f"{told}; the decoder was left alone (--surgery.train-decoder)" if left else told)
    if reference.transfer is None:
        notes.append(f"{reference.path / LATENT} is not there: no labels were transferred")
    for column, n_cells in reference.contradicted.items():
        if n_cells:
            notes.append(f"{n_cells} cells of the reference did not vote: their neighbours have another {column}")
    if reference.transfer is not None:
        for column, n_cells in reference.transfer.few.items():
            notes.append(
                f"--transfer.k {reference.transfer.k}: all of the {n_cells} cells of the reference with a label in "
                f"{column} vote on each cell; a smaller k asks its neighbours"
            )
    if reference.transfer is not None and reference.transfer.skipped:
        notes.append(f"no cell of the reference has a label in {', '.join(reference.transfer.skipped)}")
    return notes
