"""Streams of random numbers, one for each lane of a batch: counted ones, on a GPU by Triton; else torch's own."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.gpu import compiles_for

Kind = Literal["normal", "uniform"]


class CountedStreams:
    """On a CPU: numbers that are computed from where they stand (`engine.philox`)."""

    def __init__(self, seeds: Sequence[Sequence[int]], sizes: Sequence[int], device: torch.device) -> None:
        from scarcade.engine import philox  # numba, which not every command that knows a `Noise` wants

        self._philox, self._keys = philox, philox.keys_of(seeds)
        self._bounds = np.fromiter(accumulate(sizes, initial=0), np.int64)
        self._drawn = 0

    def fill(self, kind: Kind, out: Tensor) -> Tensor:
        """The next draw of each stream, into the rows of its own."""
        draw = getattr(self._philox, kind)
        draw(self._keys, self._bounds * math.prod(out.shape[1:]), self._drawn, out.view(-1).numpy())
        self._drawn += 1
        return out


def words_of(seeds: Sequence[Sequence[int]], sizes: Sequence[int]) -> np.ndarray:
    """What a GPU must know of L lanes, int64: their keys (L, 2), then where they begin and end, in cells (L + 1)."""
    from scarcade.engine import philox

    words = np.empty(3 * len(seeds) + 1, np.int64)
    words[: 2 * len(seeds)] = philox.keys_of(seeds).reshape(-1)
    words[2 * len(seeds)] = 0
    np.cumsum(sizes, out=words[2 * len(seeds) + 1 :])
    return words


class GpuStreams:
    """On a GPU: the same numbers, by the same function of where they stand (`engine.philox_triton`)."""

    def __init__(self, seeds: Sequence[Sequence[int]], sizes: Sequence[int], device: torch.device) -> None:
        words = torch.from_numpy(words_of(seeds, sizes))
        there = words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words.to(device)
        self._begin(there, len(seeds))

    @classmethod
    def of_lanes(cls, lanes: Tensor, n_lanes: int) -> "GpuStreams":
        """Those whose words (`words_of`) stand in `lanes` when the numbers are drawn."""
        streams = object.__new__(cls)
        streams._begin(lanes, n_lanes)
        return streams

    def _begin(self, lanes: Tensor, n_lanes: int) -> None:
        from scarcade.engine import philox_triton

        self._kernels, self._lanes, self._n_lanes, self._drawn = philox_triton, lanes, n_lanes, 0

    def fill(self, kind: Kind, out: Tensor) -> Tensor:
        """The next draw of each stream, into the rows of its own."""
        n = out.numel()
        if n:
            given = self._lanes, self._n_lanes, math.prod(out.shape[1:]), self._drawn, n, out
            computed, block = n, self._kernels.BLOCK
            if kind == "uniform":  # four at a time, and one time more at the end of each lane
                computed, block = n // 4 + self._n_lanes, block // 4
            getattr(self._kernels, kind)[(-(-computed // block),)](*given, BLOCK=block)
        self._drawn += 1
        return out


class TorchStreams:
    """On a GPU without Triton: a generator of torch for each stream, which draws other numbers."""

    def __init__(self, seeds: Sequence[Sequence[int]], sizes: Sequence[int], device: torch.device) -> None:
        self._sizes = list(sizes)
        self._generators = [
            torch.Generator(device).manual_seed(
                int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
            )
            for words in seeds
        ]

    def fill(self, kind: Kind, out: Tensor) -> Tensor:
        """The next draw of each stream, into the rows of its own."""
        for part, generator in zip(torch.split(out, self._sizes), self._generators, strict=True):
            (part.normal_ if kind == "normal" else part.uniform_)(generator=generator)
        return out


Streams = CountedStreams | GpuStreams | TorchStreams


def streams_on(device: torch.device) -> type[Streams]:
    """Those for tensors on `device`."""
    if device.type == "cpu":
        return CountedStreams
    return GpuStreams if compiles_for(device) else TorchStreams
