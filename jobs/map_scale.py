"""How many workers map queries and what each is given; a query that cannot fit is refused before it is read.

A limit of memory is kept twice: what a query needs at least is estimated from its sizes, which are known from metadata,
and a worker process is held to the limit by the kernel (`engine/memory`). In the user's own process only the first
applies.
"""

from typing import Any

import numpy as np
from pydantic import Field, field_validator

from scarcade.dataloaders.matrix import Matrix
from scarcade.dataloaders.source import opened
from scarcade.engine.config import HIDDEN
from scarcade.engine.errors import MemoryLimitError
from scarcade.engine.memory import bytes_of, size_text
from scarcade.engine.scale import Scale
from scarcade.engine.schema import Schema

PROCESS = 500_000_000  # bytes that a worker takes with its libraries and a small reference, before the first query
_A_VALUE = 8  # bytes of a stored count: its gene and its number
_A_CELL = 200  # bytes: its name, a few columns of obs, its place among the counts, its latent
_FULL = 0.05  # share of a dense matrix that is not zero, at the least


class MapScale(Scale):
    """How many workers map queries, and what each of them is given."""

    workers: int = Field(0, ge=0, description="Ray tasks at a time; 0: map in this process, without Ray.")
    gpus: bool = Field(False, description="Queries are mapped on processors.", json_schema_extra=HIDDEN)
    memory_per_worker: str | None = Field(
        None,
        description="Memory of each worker (4GB, 800MB): reserved in Ray, and a query that needs more fails alone. "
        "Default: no limit.",
    )
    max_failures: int = Field(
        3, ge=-1, description="How often queries are begun anew because their node was lost; -1: no limit."
    )

    @field_validator("memory_per_worker")
    @classmethod
    def _a_size(cls, text: str | None) -> str | None:
        if text is not None and bytes_of(text) < PROCESS:
            raise ValueError(f"a worker takes {size_text(PROCESS)} before its first query")
        return text

    @property
    def memory(self) -> int | None:
        """`memory_per_worker` in bytes."""
        return None if self.memory_per_worker is None else bytes_of(self.memory_per_worker)


def check_memory(source: Any, reference: Schema, scale: MapScale, *, stream_above: int, beside: int = 0) -> None:
    """Refuse a query that does not fit into a worker, from its metadata; what is streamed takes no more than that.

    Args:
        beside: bytes that a worker holds whatever the query is.

    Raises:
        MemoryLimitError: with what it needs. OpenError, LimitError: it cannot be opened.
    """
    if scale.memory is None:
        return
    with opened(source) as file:
        needed, where = need(file, reference, stream_above) + beside, file.where
    if needed > scale.memory:
        raise MemoryLimitError(too_large(where, needed, scale))


def too_large(where: str, needed: int, scale: MapScale) -> str:
    """What to tell of a query that needs `needed` bytes."""
    return (
        f"{where}: needs about {size_text(needed)} of memory, and a worker may have {scale.memory_per_worker}; raise "
        "--scale.memory-per-worker, or split the file"
    )


def need(file: Any, reference: Schema, stream_above: int) -> int:
    """Bytes that a worker needs to map this file, at the least: of the reference's genes only, nothing of the training.

    Counts that take more than `stream_above` bytes are streamed.

    Raises:
        OpenError, CsrError, LimitError: the file's matrices are not what they should be.
    """
    matrices = [file.matrix(name) for name in file.layers()]
    n_values = min((_n_values(matrix, reference.n_genes) for matrix in matrices), default=0.0)
    counts = 2 * min(int(_A_VALUE * n_values), stream_above)  # twice: in parts, and joined
    return PROCESS + counts + _A_CELL * int(file.n_cells)


def _n_values(matrix: Matrix, n_genes: int) -> float:
    """Counts that are kept of a matrix, if the genes that the reference has are like the others."""
    stored = float(np.prod(matrix.shape)) * _FULL if matrix.layout == "dense" else float(matrix.n_stored)
    return stored * min(1.0, n_genes / max(1, matrix.shape[1]))
