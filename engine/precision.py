"""In which kind of number the large products are computed, for the time of a block: float32, or bfloat16 by option.

Only products over all genes ask for it (the first layer of an encoder, the last of a decoder), which are nearly all of
the arithmetic. What is small, and every sum, softmax and loss, stays in float32, so that an option of the engine does
not change what a model means.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_kind: ContextVar[torch.dtype] = ContextVar("products", default=torch.float32)


def products() -> torch.dtype:
    """The kind of number for products over all genes."""
    return _kind.get()


def slow_in_bfloat16() -> bool:
    """Whether this processor is known to have no units for bfloat16: then a product takes many times as long in it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    given: Any = torch.cpu
    return not (given._is_avx512_bf16_supported() or given._is_amx_tile_supported())


@contextmanager
def products_in(kind: torch.dtype) -> Iterator[None]:
    """Within the block, products over all genes are computed in `kind`."""
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)
