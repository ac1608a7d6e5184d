"""The decoded cells of a window in the memory of a GPU.

A window is copied once, by the thread that decoded it, while the window before is consumed: from page-locked memory, on
a stream of its own. So no batch waits for the bus; it is made dense where it is used.
Only the counts that are there cross the bus, in the types in which they lie on disk.

Shapes: n cells, N counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.gpu import compiles_for

_ALIGNED = 16  # bytes between which arrays begin
_UNSIGNED = {torch.uint16: (torch.int16, 0xFFFF), torch.uint32: (torch.int32, 0xFFFFFFFF)}


@dataclass(frozen=True, slots=True)
class OnGpu:
    """Cell i has ``lengths[i]`` of the counts from ``starts[i]`` on, as in `superbatch.Superbatch`."""

    indices: Tensor  # (N,) of the store's kind
    data: Tensor  # (N,)
    starts: Tensor  # int64 (n,)
    lengths: Tensor  # int32 (n,)

    def dense(self, start: int, stop: int, n_genes: int) -> Tensor:
        """float32 (stop - start, n_genes)."""
        out = torch.empty(stop - start, n_genes, device=self.data.device)
        self.into(start, out)
        return out

    def into(self, start: int, out: Tensor) -> None:
        """Put the cells from `start` on into the rows of `out`, float32 and contiguous."""
        out.zero_()
        (_by_triton if compiles_for(out.device) else _by_torch)(self, start, out)

    def of_cells(self, places: np.ndarray) -> "OnGpu":
        """The cells at some places."""
        return OnGpu(self.indices, self.data, *chosen((self.starts, self.lengths), places))

    def fetched(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64 (n + 1,), gene index, value) of some cells, in the memory of this machine."""
        places, _ = self._places(start, stop)
        indptr = np.zeros(stop - start + 1, np.int64)
        np.cumsum(self.lengths[start:stop].cpu().numpy(), out=indptr[1:])
        genes, values = (
            _picked(one, places).cpu().numpy().astype(one[:0].cpu().numpy().dtype) for one in (self.indices, self.data)
        )
        return indptr, genes, values

    def _places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Where the counts of some cells stand, and which of these cells each belongs to."""
        starts, lengths = self.starts[start:stop], self.lengths[start:stop].long()
        rows = torch.repeat_interleave(torch.arange(stop - start, device=starts.device), lengths)
        before = lengths.cumsum(0) - lengths
        return torch.arange(len(rows), device=starts.device) + (starts - before)[rows], rows


def _by_triton(counts: OnGpu, first: int, out: Tensor) -> None:
    """Put the counts of the cells from `first` on into rows of zeros."""
    from scarcade.dataloaders import scatter_triton as kernel

    given = counts.indices, counts.data, counts.starts, counts.lengths, first, out.shape[1], out
    kernel.scatter[(len(out),)](*given, BLOCK=kernel.BLOCK)


def _by_torch(counts: OnGpu, first: int, out: Tensor) -> None:
    """The same where there is no Triton, in more passes."""
    places, rows = counts._places(first, first + len(out))
    genes = _picked(counts.indices, places).long()
    out.view(-1)[rows * out.shape[1] + genes] = _picked(counts.data, places).to(torch.float32)


def _picked(values: Tensor, places: Tensor) -> Tensor:
    """Those at some places; of the unsigned kinds, of which torch picks none out, as int64."""
    if values.dtype not in _UNSIGNED:
        return values[places]
    signed, mask = _UNSIGNED[values.dtype]
    return values.view(signed)[places].long() & mask


def pinned(n: int, kind: np.dtype) -> np.ndarray:
    """Page-locked memory for `n` numbers."""
    return torch.empty(n * kind.itemsize, dtype=torch.uint8, pin_memory=True).numpy().view(kind)


def moved(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The same on `device`. The copy has ended when this returns; the caller's thread alone waits for it."""
    given = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type != "cuda":
        return [one.to(device) for one in given]
    there: list[Tensor] = [torch.empty(0)] * len(given)
    consumer = torch.cuda.current_stream(device)
    with _beside(device):
        few = []
        for number, one in enumerate(given):
            if one.is_pinned():
                there[number] = one.to(device, non_blocking=True)
            else:
                few.append(number)
        for number, one in zip(few, _together([given[number] for number in few], device), strict=True):
            there[number] = one
    for one in there:
        one.record_stream(consumer)  # its memory is free again only when what was asked of it there is done
    return there


def _together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Begin to copy them in one piece of page-locked memory; views of a piece of memory on `device`."""
    sizes = [one.numel() * one.element_size() for one in tensors]
    begins = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]).tolist()
    host = torch.empty(max(begins[-1], 1), dtype=torch.uint8, pin_memory=True)
    together = host.numpy()  # by numpy: torch would wake a team of threads for this one
    for one, begin, size in zip(tensors, begins, sizes, strict=False):
        together[begin : begin + size] = one.numpy().reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[begin : begin + size].view(one.dtype).view(one.shape)
        for one, begin, size in zip(tensors, begins, sizes, strict=False)
    ]


def columns_on(columns: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The small tensors of a window's cells, on `device`."""
    return dict(zip(columns, moved([column.numpy() for column in columns.values()], device), strict=True))


def copied(pairs: Sequence[tuple[np.ndarray, Tensor]], device: torch.device) -> None:
    """Put arrays into tensors on `device`, which nobody reads meanwhile. That has ended when this returns."""
    with _beside(device):
        for array, out in pairs:
            out.copy_(torch.from_numpy(array), non_blocking=True)


def chosen(tensors: Sequence[Tensor], places: np.ndarray) -> list[Tensor]:
    """The entries of tensors on a GPU at some places, as by `moved`."""
    device = tensors[0].device
    (there,) = moved([places], device)
    with _beside(device):
        found = [one[there] for one in tensors]
    if device.type == "cuda":
        for one in found:
            one.record_stream(torch.cuda.current_stream(device))
    return found


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """What is asked of a GPU within the block is done on a stream of its own, and has ended behind it.

    The caller's thread alone waits for it.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_copies(device)):
        yield
        done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
    done.synchronize()


def settled(device: torch.device) -> None:
    """Wait until `device` has done what this thread asked of it, as windows are copied beside that."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@cache
def _copies(device: torch.device) -> Any:
    """The stream on which windows are copied."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
