"""Who we are among the workers, and the few collectives that training needs.

Rank and size become plain numbers once; everything above takes a `World` as an argument, and a world of
one does nothing at all. This is the only file that speaks to torch.distributed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from scarcade.engine.schema import Shard

if TYPE_CHECKING:
    from scarcade.engine.shared_sum import SharedSums

_MEETING_S = 60  # how long one process waits for the place where all of them meet
_COLLECTIVE_S = 600  # how long a collective waits for a process that lives and does nothing


@dataclass(frozen=True)
class World:
    """Rank, number of workers and device of this process; the default is one process on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def joined(cls, device: torch.device | None = None) -> "World":
        """The world of the process group that is already there (Ray Train makes it), or a world of one."""
        device = device or torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def shard(self) -> Shard:
        return Shard(self.rank, self.size)

    @property
    def first(self) -> bool:
        """Whether this is the one worker that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_later(self, values: Tensor) -> dist.Work | None:
        """Begin to sum `values` in place; ``wait()`` on what is returned (None in a world of one)."""
        return dist.all_reduce(values, async_op=True) if self.size > 1 else None

    def shared_sums(self, parts: Sequence[tuple[int, torch.dtype]]) -> "SharedSums | None":
        """Sums through memory, which is faster than `sum_later`; None where the workers share none (`SharedSums`)."""
        from scarcade.engine.shared_sum import SharedSums  # numba, which a world of one does not want

        return SharedSums.among(self, parts) if self.size > 1 else None

    def sizes(self, n: int) -> list[int]:
        """The `n` of every worker, by rank."""
        each = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        each[self.rank] = n
        return [int(size) for size in self.sum(each).tolist()]

    def gathered(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all workers, rank by rank; `sizes` says how many each has. Without a gradient."""
        if self.size == 1:
            return rows
        most = max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` in place with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def say(self, value: Mapping[str, Any] | None) -> Any:
        """What rank 0 gave as `value` (anything JSON can hold), on every worker."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.cpu().numpy()))

    def leave(self) -> None:
        """Go away from the others in the middle of things: what they wait for fails instead of hanging."""
        if self.size > 1 and dist.is_initialized():
            from scarcade.engine.shared_sum import leave

            leave()
            dist.destroy_process_group()


@contextmanager
def gathered(rank: int, size: int, meeting: Path, *, timeout_s: float = 60) -> Iterator[World]:
    """A gloo process group of `size` processes that meet over the file `meeting`: workers without Ray.

    For benchmarks and tests; jobs get their group from `launch.py`, trials of a search from `met`.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield World.joined()
    finally:
        dist.destroy_process_group()


def meeting_place(host: str, size: int) -> Any:
    """Where `size` processes meet: kept by this one, the first of them, on a free ``port`` of this machine, `host`."""
    return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def met(rank: int, size: int, place: Any, device: torch.device) -> World:
    """The world of `size` processes that all come to the meeting `place` (to the others: its host and port).

    A process that is in a group already leaves that one first.

    Raises:
        RuntimeError: somebody did not come.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if isinstance(place, tuple):
        (host, port), waits = place, timedelta(seconds=_MEETING_S)
        place = dist.TCPStore(host, port, size, is_master=False, timeout=waits)  # type: ignore[attr-defined]
    backend = "gloo" if device.type == "cpu" else "nccl"
    waits = timedelta(seconds=_COLLECTIVE_S)
    dist.init_process_group(backend, store=place, rank=rank, world_size=size, timeout=waits)
    return World.joined(device)


def use_threads(n: int) -> None:
    """Let torch and numba compute with `n` threads in this process.

    More threads than free cores spin and cost a factor of sixty, so every worker is held to its grant.
    """
    import numba

    n = max(1, n)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(n)  # for libraries that are loaded later, and for child processes
    # numba first: the first call starts its pool, which sets the threads of the OpenMP that torch computes with
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(n)
