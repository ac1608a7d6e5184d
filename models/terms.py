"""Latent dimensions that expiMap learns beside its programs, as rows that surgery can append (Lotfollahi et al. 2023).

Shapes: B cells, G genes, H hidden units, E terms of one kind.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scarcade.models.layers import ConditionRows, seeded, start_uniform
from scarcade.models.products import product_of

FREE, CONSTRAINED = "free", "constrained"


class Terms(nn.Module):
    """New terms of one kind: for each a row of the two encoder heads and a row of gene weights.

    A row belongs to a term as a condition's rows do to a condition, so surgery appends terms as it does conditions.
    """

    mask: Tensor | None
    new_mask: Tensor | None

    def __init__(self, kind: str, n_hidden: int, n_genes: int) -> None:
        super().__init__()
        self.covariate = kind
        self.mean, self.log_variance = ConditionRows(kind, 0, n_hidden), ConditionRows(kind, 0, n_hidden)
        self.mean_bias, self.log_variance_bias = ConditionRows(kind, 0, 1), ConditionRows(kind, 0, 1)
        self.genes = ConditionRows(kind, 0, n_genes)
        self.register_buffer("mask", None)
        self.register_buffer("new_mask", None)

    def masks(self) -> Tensor | None:
        """(E, G); None if every gene may have a weight."""
        if self.mask is None or self.new_mask is None:
            return self.new_mask if self.mask is None else self.mask
        return torch.cat([self.mask, self.new_mask])

    def weight(self, *, masked: bool) -> Tensor:
        """Gene weights (E, G)."""
        mask_EG = self.masks()
        return self.genes.table() if mask_EG is None or not masked else self.genes.table() * mask_EG

    def encode(self, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each term, (B, E) each."""

        def head(weight: ConditionRows, bias: ConditionRows) -> Tensor:
            """Grown rows are a product of their own, so that those of the reference stay the same to the last bit."""
            known_BE = product_of(h_BH, weight.rows, bias.rows[:, 0])
            if weight.new is None or bias.new is None:
                return known_BE
            return torch.cat([known_BE, product_of(h_BH, weight.new, bias.new[:, 0])], 1)

        return head(self.mean, self.mean_bias), head(self.log_variance, self.log_variance_bias).exp() + 1e-4

    def add(self, names: Sequence[str], mask_EG: Tensor | None, words: Sequence[object]) -> None:
        """Append trainable rows; first weights are a function of (`words`, name of the term) and how many there are."""
        self.settle()
        heads = self.mean.rows.shape[1] ** -0.5
        parts = (
            *((self.mean, heads), (self.mean_bias, heads), (self.log_variance, heads), (self.log_variance_bias, heads)),
            (self.genes, max(len(names), 1) ** -0.5),
        )
        for number, (table, bound) in enumerate(parts):

            def start(name: str, table: ConditionRows = table, bound: float = bound, number: int = number) -> Tensor:
                row = torch.empty(table.rows.shape[1])
                start_uniform(row, bound, seeded(*words, number, name))
                return row

            table.append(names, start)
        if mask_EG is not None:
            self.new_mask = mask_EG.to(self.genes.rows)

    def settle(self) -> None:
        for table in (self.mean, self.mean_bias, self.log_variance, self.log_variance_bias, self.genes):
            table.settle()
        self.mask, self.new_mask = self.masks(), None

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        """Nothing: terms are added by `Expimap.extend`."""
