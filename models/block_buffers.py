"""Memory for the rows of a block of cells, used again by every call of a thread.

A (cells x genes) matrix that is made anew in each step is given back to the system and cleared again by it, page by
page, which costs about as much as a pass over it.
"""

import threading

import torch
from torch import Tensor


class BlockBuffers:
    """A buffer for each thread, use, width and kind of number.

    By the number of the thread, and not as `threading.local`: a thread of OpenMP is a new one to Python in each call.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def rows(self, use: str, n: int, width: int, kind: torch.dtype = torch.float32) -> Tensor:
        """(n, width), with whatever was in it."""
        key = threading.get_ident(), use, width, kind
        have = self._kept.get(key)
        if have is None or len(have) < n:
            have = self._kept[key] = torch.empty(n, width, dtype=kind)
        return have[:n]
