"""Whether all gradients are numbers.

Shapes: N numbers of some gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from scarcade.engine.pool import alone, together

LARGE = 1 << 14  # numbers of a gradient from which on it is not copied beside others
SHARED = 1 << 19  # and from which on threads share it


def finite_where(gradients: Sequence[Tensor]) -> Tensor:
    """A scalar that is finite where the norm of all gradients is, for who wants no more of it.

    On a CPU by products of vectors with themselves, which take half the time of torch's norm of a list: that goes over
    each gradient on one thread, and a small one costs it as much as several thousand numbers do.
    """
    if not gradients or gradients[0].device.type != "cpu":
        return get_total_norm(gradients)
    flat = [gradient.reshape(-1) for gradient in gradients]
    few = [one_N for one_N in flat if len(one_N) < LARGE]
    vectors = [one_N for one_N in flat if len(one_N) >= LARGE] + ([torch.cat(few)] if few else [])
    found = []
    for one_N in vectors:
        with together() if len(one_N) >= SHARED else alone():
            found.append(torch.dot(one_N, one_N))
    return torch.stack(found).sum()
