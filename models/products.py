"""Products with weights, the large ones in the kind of number that is asked for (`engine.precision`).

Shapes: B cells, I inputs, H outputs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scarcade.engine.precision import products

WIDE = 1 << 16  # weights from which on a product is a large one: those over all genes, and between wide layers


def kind_of(weight_HI: Tensor) -> torch.dtype:
    """In which kind of number a product with these weights is computed."""
    return products() if weight_HI.numel() >= WIDE and weight_HI.dtype == torch.float32 else weight_HI.dtype


def product_of(x_BI: Tensor, weight_HI: Tensor, plus: Tensor | None = None) -> Tensor:
    """``x W^T + plus`` (B, H); a large product in the kind of number that is asked for, whatever the layer.

    Args:
        x_BI: may be of that kind already.
    """
    kind = kind_of(weight_HI)
    if kind != weight_HI.dtype:
        product_BH = F.linear(x_BI.to(kind), weight_HI.to(kind)).to(weight_HI.dtype)
        return product_BH if plus is None else product_BH + plus
    return F.linear(x_BI, weight_HI, plus) if plus is None or plus.dim() == 1 else torch.addmm(plus, x_BI, weight_HI.T)
