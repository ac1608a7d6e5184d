"""The prior of the log library size of each batch, from one pass over the cells.

Sums over cells are all that is kept, so the pass can be shared out among workers and added up.
Shapes: B cells, K batches.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch


class LibraryPrior(nn.Module):
    """Normal prior of the log library size of each batch; a batch without cells keeps mean 0 and variance 1."""

    mean: Tensor
    variance: Tensor
    new_mean: Tensor | None
    new_variance: Tensor | None

    def __init__(self, n_batches: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_batches))
        self.register_buffer("variance", torch.ones(n_batches))
        self.register_buffer("new_mean", None)
        self.register_buffer("new_variance", None)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every batch, (K,) each."""
        if self.new_mean is None or self.new_variance is None:
            return self.mean, self.variance
        return torch.cat([self.mean, self.new_mean]), torch.cat([self.variance, self.new_variance])

    @torch.no_grad()
    def sums(self, batches: Iterable[Batch]) -> Tensor:
        """Of each batch (K, 3): cells, sum of the log library size, sum of its square; float64, additive.

        An empty cell counts as a log of 0.
        """
        sums_K3 = torch.zeros(len(self.parts()[0]), 3, dtype=torch.float64)
        for batch in batches:
            library_B = batch.counts.dense(torch.device("cpu")).sum(-1).double()
            log_B = torch.where(library_B > 0, library_B.log(), 0.0)
            sums_K3.index_add_(0, batch.batch.cpu(), torch.stack([torch.ones_like(log_B), log_B, log_B**2], -1))
        return sums_K3

    @torch.no_grad()
    def fill(self, sums_K3: Tensor) -> None:
        """Set mean and variance of the batches that have cells; after surgery of the new ones alone."""
        n_K, log_K, squares_K = sums_K3.unbind(-1)
        mean_K = log_K / n_K.clamp(min=1)
        variance_K = (squares_K / n_K.clamp(min=1) - mean_K**2).clamp(min=0)
        old_mean_K, old_variance_K = self.parts()
        seen_K = (n_K > 0).to(old_mean_K.device)
        first = 0 if self.new_mean is None else len(self.mean)
        prefix = "new_" if first else ""
        setattr(self, f"{prefix}mean", torch.where(seen_K, mean_K.to(old_mean_K), old_mean_K)[first:])
        setattr(self, f"{prefix}variance", torch.where(seen_K, variance_K.to(old_variance_K), old_variance_K)[first:])

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        self.settle()
        if n := len(new.get("batch", ())):
            mean, variance = self.parts()
            self.new_mean, self.new_variance = mean.new_zeros(n), variance.new_ones(n)

    def settle(self) -> None:
        self.mean, self.variance = self.parts()
        self.new_mean = self.new_variance = None
