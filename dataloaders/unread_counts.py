"""A query's counts before they are read: where they are, what is wanted of them, and how large they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scarcade.dataloaders.counts import Csr, Place, take_rows
from scarcade.dataloaders.matrix import Matrix, blocks

BYTES_HELD = 8  # in memory, of a count: int32 gene and uint32 value


@dataclass(frozen=True)
class Unread:
    """A query's counts before they are read."""

    matrix: Matrix
    place: Place
    columns: np.ndarray  # int32: place of each gene of the file among the model's, -1 if it is not wanted
    n_genes: int  # of the model
    integer: bool
    store: Path | None = None  # the store of ours that the matrix is the X of

    @property
    def n_cells(self) -> int:
        return self.matrix.shape[0]

    @property
    def n_bytes(self) -> int:
        """What they take in memory at the most, by the file's metadata."""
        return BYTES_HELD * self.matrix.n_stored

    def blocks(self, workspace: Path | None = None) -> Iterator[tuple[int, Csr]]:
        """(first cell, checked counts in the file's genes), in the order of the file."""
        return blocks(self.matrix, self.place, integer=self.integer, workspace=workspace)

    def taken(self, block: Csr) -> Csr:
        """A block in the model's genes."""
        return take_rows(block, np.arange(block.n_cells), self.columns, self.n_genes)
