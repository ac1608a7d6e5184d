"""Reads a few numbers of every step without making a GPU wait for its host.

On the CPU they are read at once. On a GPU they are copied to pinned memory and read one step later, when
they have long arrived: a read in the same step would drain the queue of kernels each time.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class _Pending(Generic[T]):
    slot: "_Slot"
    tag: T

    def read(self) -> tuple[list[float], T]:
        self.slot.copied.synchronize()
        return self.slot.host.tolist(), self.tag


class _Slot:
    """Pinned memory for some numbers, and when they have arrived there."""

    def __init__(self, like: Tensor) -> None:
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self.copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]


class Readback(Generic[T]):
    """Hands back the numbers of this step (CPU) or of the step before (GPU), with the tag they came with."""

    def __init__(self, device: torch.device) -> None:
        self.deferred = device.type == "cuda"
        self._pending: _Pending[T] | None = None
        self._free: list[_Slot] = []

    def exchange(self, numbers: Tensor, tag: T) -> tuple[list[float], T] | None:
        """Give this step's numbers, float32, as many in each step; get the newest that can be read without waiting."""
        if not self.deferred:
            return numbers.tolist(), tag
        slot = self._free.pop() if self._free else _Slot(numbers)
        slot.host.copy_(numbers, non_blocking=True)
        slot.copied.record()
        before, self._pending = self._pending, _Pending(slot, tag)
        return self._read(before)

    def drain(self) -> tuple[list[float], T] | None:
        """The numbers that were given and not handed back yet, if any; waits for them."""
        before, self._pending = self._pending, None
        return self._read(before)

    def _read(self, pending: _Pending[T] | None) -> tuple[list[float], T] | None:
        if pending is None:
            return None
        found = pending.read()
        self._free.append(pending.slot)
        return found
