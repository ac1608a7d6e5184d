"""Sums the gradients of all workers, in buckets, while the backward pass is still at work.

DistributedDataParallel does the same, and three things that training here cannot have. It lays its buckets
out anew after the first step of a process, so a run that was killed adds in another order than one that was
not, and ends with other bits on three workers and more. It takes the mean over workers, where batches that
differ by a cell want the sum. And it does not carry the loss, a request to stop, or the running statistics
of batch norm, each of which would be a collective of its own. Here the layout is fixed by the order of the
parameters, and those few numbers ride in the tail of the last bucket. Workers of one machine sum through memory
that they share (`engine.shared_sum`), others over the process group. (Decision 004.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from scarcade.engine.world import World

if TYPE_CHECKING:
    from scarcade.engine.shared_sum import SharedSums

_LEAST, _MOST = 256 << 10, 25 << 20  # bytes of a bucket


def bucket_bytes_for(model_bytes: int) -> int:
    """How full a bucket is sent: a quarter of a small model, whose last layers travel while the first are at work."""
    return min(max(model_bytes // 4, _LEAST), _MOST)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running mean and variance of every batch norm in `model` that moves them, torch's own or not.

    One with momentum 0 is frozen (surgery): a weighted sum over workers would change the last bits of a reference.
    """
    return [
        buffer
        for module in model.modules()
        if getattr(module, "momentum", None) != 0.0
        for name in ("running_mean", "running_var")
        if isinstance(buffer := getattr(module, name, None), Tensor)
    ]


class _Bucket:
    """A flat buffer, and the parameters whose gradients lie in it."""

    def __init__(self, parameters: Sequence[nn.Parameter], n_tail: int) -> None:
        self.parameters = parameters
        first = parameters[0]
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes) + n_tail, dtype=first.dtype, device=first.device)
        self._sizes = [*sizes, n_tail]
        *self.views, self.tail = self.cut(self.flat)
        self.filled = [False] * len(parameters)

    def cut(self, flat: Tensor) -> list[Tensor]:
        """The gradients in a buffer like this one's, and its tail."""
        *pieces, tail = torch.split(flat, self._sizes)
        return [*(piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)), tail]


class GroupSums:
    """Sums over the process group, with the methods of `SharedSums`: in the buffers where they end."""

    TURNS = 1
    turn = 0

    def __init__(self, world: World, flats: Sequence[Tensor]) -> None:
        self._world, self._flats = world, flats
        self._pending: dict[int, Any] = {}

    def buffers(self, turn: int) -> Sequence[Tensor]:
        return self._flats

    def send(self, number: int) -> None:
        self._pending[number] = self._world.sum_later(self._flats[number])

    def finish(self, number: int, out: Tensor) -> None:
        assert out is self._flats[number]
        self._pending.pop(number).wait()

    def next_step(self) -> None: ...

    def close(self) -> None: ...


class GradientSum:
    """Makes ``.grad`` of every parameter the sum over all workers; in a world of one it does nothing.

    Args:
        model: whose trainable parameters are summed, and whose batch norm statistics are averaged.
        signals: how many float32 numbers are summed with them in each step.
        bucket_bytes: how full a bucket is sent (default: `bucket_bytes_for` the parameters).
    """

    def __init__(self, model: nn.Module, world: World, signals: int, *, bucket_bytes: int | None = None) -> None:
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._signals = signals
        self._statistics = running_statistics(model)
        self._buckets: list[_Bucket] = []
        self._hooks: list[Any] = []
        self._next = 0
        self._held = False
        self._sums: SharedSums | GroupSums | None = None
        self._pieces: list[list[list[Tensor]]] = []  # what this worker writes to: by turn, bucket and parameter
        if world.size > 1:
            n_bytes = sum(p.numel() * p.element_size() for p in self._parameters)
            self._lay_out(bucket_bytes or bucket_bytes_for(n_bytes))

    def _lay_out(self, bucket_bytes: int) -> None:
        """Buckets in the order in which a backward pass reaches them: from the last parameter to the first."""
        groups: list[list[nn.Parameter]] = [[]]
        held = 0
        for parameter in reversed(self._parameters):
            if groups[-1] and (held >= bucket_bytes or parameter.dtype != groups[-1][-1].dtype):
                groups.append([])
                held = 0
            groups[-1].append(parameter)
            held += parameter.numel() * parameter.element_size()
        tail = self._signals + sum(buffer.numel() for buffer in self._statistics)
        for group in groups:
            self._buckets.append(_Bucket(group, tail if group is groups[-1] else 0))
        parts = [(len(one.flat), one.flat.dtype) for one in self._buckets]
        self._sums = self._world.shared_sums(parts) or GroupSums(self._world, [one.flat for one in self._buckets])
        for turn in range(self._sums.TURNS):
            flats = self._sums.buffers(turn)
            self._pieces.append([one.cut(flat) for one, flat in zip(self._buckets, flats, strict=True)])
        for number, bucket in enumerate(self._buckets):
            for place, parameter in enumerate(bucket.parameters):
                # weakly: a parameter that held on to this would be held itself, in a circle that nobody breaks
                arrived = WeakMethod(self._arrived)

                def hook(p: Tensor, number: int = number, place: int = place, arrived: Any = arrived) -> None:
                    if (arrive := arrived()) is not None:
                        arrive(p, number, place)

                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    @contextmanager
    def held(self) -> Iterator[None]:
        """For a backward pass that is not the last one of its step: gradients stay with their parameters."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _arrived(self, parameter: Tensor, number: int, place: int) -> None:
        if self._held:
            return
        bucket = self._buckets[number]
        assert parameter.grad is not None
        self._target(number, place).copy_(parameter.grad)
        parameter.grad = bucket.views[place]
        bucket.filled[place] = True
        self._send(len(self._buckets) - 1)  # the last bucket waits for its tail

    def _target(self, number: int, place: int) -> Tensor:
        """Where this worker's gradient goes; the tail comes after the last."""
        assert self._sums is not None
        return self._pieces[self._sums.turn][number][place]

    def _send(self, stop: int) -> None:
        """Begin the sums of full buckets, always in the same order: collectives must meet on all workers."""
        assert self._sums is not None
        while self._next < stop and all(self._buckets[self._next].filled):
            self._sums.send(self._next)
            self._next += 1

    def finish(self, signals: Tensor, share: float) -> Tensor:
        """Complete the sums after ``backward()``.

        A parameter that no cell of the batch touched gets a gradient of zeros, on one worker as on many.

        Args:
            signals: float32 (signals,), this worker's.
            share: this worker's share of the cells of the global batch; batch norm statistics weigh so.

        Returns:
            The signals summed over all workers, on their device.
        """
        if self._world.size == 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return signals
        assert self._sums is not None, "it was closed"
        for number, bucket in enumerate(self._buckets):
            for place, (parameter, view) in enumerate(zip(bucket.parameters, bucket.views, strict=True)):
                if not bucket.filled[place]:
                    if parameter.grad is None:
                        self._target(number, place).zero_()
                    else:  # by a part of the batch that was not the last
                        self._target(number, place).copy_(parameter.grad)
                    parameter.grad = view
                    bucket.filled[place] = True
        last = self._buckets[-1]
        pieces = [signals, *(buffer.flatten() * share for buffer in self._statistics)]
        self._target(len(self._buckets) - 1, -1).copy_(torch.cat(pieces))
        self._send(len(self._buckets))
        for number, bucket in enumerate(self._buckets):
            self._sums.finish(number, bucket.flat)
            bucket.filled = [False] * len(bucket.filled)
        self._sums.next_step()
        self._next = 0
        start = self._signals
        for buffer in self._statistics:
            buffer.copy_(last.tail[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()
        return last.tail[: self._signals]

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._pieces = []
        if self._sums is not None:
            self._sums.close()
            self._sums = None
