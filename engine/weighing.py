"""What the loss of one cell weighs in the loss of a step, for the time of a block.

The engine takes the mean over the cells of the global batch. Who makes gradients in the forward pass (a last layer with
its likelihood) makes them of the right size with this, where it would multiply them all again on the way back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_share: ContextVar[float] = ContextVar("share", default=1.0)


def share_of_a_cell() -> float:
    """What to expect; a pass back that brings another weight must still be right."""
    return _share.get()


@contextmanager
def a_cell_weighs(share: float) -> Iterator[None]:
    """Within the block, the loss of each cell is to weigh `share`."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)
