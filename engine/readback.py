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
    host: Tensor
    copied: Any  # torch.cuda.Event
    tag: T

    def read(self) -> tuple[list[float], T]:
        self.copied.synchronize()
        return self.host.tolist(), self.tag


class Readback(Generic[T]):
    """Hands back the numbers of this step (CPU) or of the step before (GPU), with the tag they came with."""

    def __init__(self, device: torch.device) -> None:
        self.deferred = device.type == "cuda"
        self._pending: _Pending[T] | None = None

    def exchange(self, numbers: Tensor, tag: T) -> tuple[list[float], T] | None:
        """Give this step's numbers, float32 (n,); get the newest that can be read without waiting."""
        if not self.deferred:
            return numbers.tolist(), tag
        before = self._pending
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._pending = _Pending(host, copied, tag)
        return before.read() if before else None

    def drain(self) -> tuple[list[float], T] | None:
        """The numbers that were given and not handed back yet, if any; waits for them."""
        before, self._pending = self._pending, None
        return before.read() if before else None
