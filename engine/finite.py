"""Whether all gradients are numbers, and how large they are.

Shapes: N numbers of all gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 1 << 14  # numbers of a gradient from which on it is not copied beside others


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm(gradients)


def finite_where(gradients: Sequence[Tensor]) -> Tensor:
    """A scalar that is finite where the norm of all gradients is, for who wants no more of it.

    On a CPU by products of vectors with themselves, which take half the time of torch's norm of a list: that goes over
    each gradient on one thread, and a small one costs it as much as several thousand numbers do.
    """
    if not gradients or gradients[0].device.type != "cpu":
        return total_norm(gradients)
    large = [gradient for gradient in gradients if gradient.numel() >= LARGE]
    small = [gradient.reshape(-1) for gradient in gradients if gradient.numel() < LARGE]
    flat = [gradient.reshape(-1) for gradient in large]
    if small:
        flat.append(torch.cat(small))
    return torch.stack([torch.dot(one_N, one_N) for one_N in flat]).sum()
