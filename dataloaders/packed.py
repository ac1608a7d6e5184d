"""Counts of a batch, packed until a device wants them: a view into a superbatch, and what they are unpacked into."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.dataloaders import kernels
from scarcade.dataloaders.superbatch import Superbatch
from scarcade.engine.pool import run

_LOG1P = np.log1p(np.arange(1024)).astype(np.float32)  # of counts up to 1,023, which nearly all are
_TABLES = {
    torch.float32: _LOG1P,
    torch.bfloat16: torch.from_numpy(_LOG1P).to(torch.bfloat16).view(torch.uint16).numpy(),
}
_SHARED = 1 << 19  # entries from which on threads share the rows


class DenseRing:
    """Buffers used in turn, two for each use: a fresh one costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, str, int], Tensor] = {}
        self.turn = 0

    def rows(self, use: str, turn: int, n: int, n_genes: int, kind: torch.dtype = torch.float32) -> Tensor:
        """The first `n` rows of a buffer."""
        have = self._buffers.get((kind, use, turn))
        if have is None or have.shape[0] < n or have.shape[1] != n_genes:
            have = self._buffers[kind, use, turn] = torch.empty(n, n_genes, dtype=kind)
        return have[:n]


class PackedCounts:
    """Counts of a batch, packed until a device wants them (`scarcade.engine.contracts.Counts`)."""

    __slots__ = ("_n_genes", "_ring", "_slot", "_start", "_stop", "_superbatch")

    def __init__(self, superbatch: Superbatch, start: int, stop: int, n_genes: int, ring: DenseRing) -> None:
        self._superbatch = superbatch
        self._start, self._stop = start, stop
        self._n_genes = n_genes
        self._ring = ring
        self._slot = ring.turn
        ring.turn ^= 1

    @property
    def shape(self) -> tuple[int, int]:
        return self._stop - self._start, self._n_genes

    def dense(self, device: torch.device) -> Tensor:
        """float32 (B, G); on the CPU a buffer that is reused from the next batch but one on."""
        if device.type != "cpu":
            return self.unpacked(device)
        found = self._ring.rows("counts", self._slot, *self.shape)
        self._scatter(kernels.scatter, found.numpy())
        return found

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        """ln(1 + count), (B, G): of the counts that are there, in a buffer of its own beside `dense`."""
        if device.type != "cpu":
            return self.unpacked(device).log1p_().to(kind)
        found = self._ring.rows("logs", self._slot, *self.shape, kind)
        out = found if kind == torch.float32 else found.view(torch.uint16)
        self._scatter(kernels.scatter_log1p, out.numpy(), _TABLES[kind])
        return found

    def _scatter(self, kernel: Any, out: np.ndarray, *table: np.ndarray) -> None:
        """Let `kernel` fill the rows of `out`, on threads if they are many."""
        indices, data, starts, lengths, in_order = self._superbatch.here(self._start, self._stop)

        def of(a: int, b: int) -> None:
            kernel(indices, data, starts[a:b], lengths[a:b], in_order, *table, out[a:b])

        if out.size < _SHARED:
            of(0, len(out))
        else:
            run(len(out), of)

    def part(self, start: int, stop: int) -> "PackedCounts":
        """Those of the cells [start, stop), in the same buffers."""
        found = object.__new__(PackedCounts)
        found._superbatch, found._n_genes = self._superbatch, self._n_genes
        found._ring, found._slot = self._ring, self._slot
        found._start, found._stop = self._start + start, self._start + stop
        return found

    def unpacked(self, device: torch.device) -> Tensor:
        """float32 (B, G), made dense on `device`: only the counts that are there cross the bus, window by window."""
        return self._superbatch.on(device).dense(self._start, self._stop, self._n_genes)

    def into(self, out_BG: Tensor) -> None:
        """As `unpacked`, into memory on a GPU."""
        self._superbatch.on(out_BG.device).into(self._start, out_BG)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64 (B + 1,), gene index, value): views where the cells stand in order, so to be read alone."""
        return self._superbatch.csr(self._start, self._stop)
