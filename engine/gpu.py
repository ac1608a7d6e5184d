"""What a GPU computes with beside torch's own operations."""

from functools import cache
from importlib.util import find_spec

import torch


def compiles_for(device: torch.device) -> bool:
    """Whether our kernels can be compiled for `device`: a GPU of NVIDIA or AMD, whose torch brings Triton."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
