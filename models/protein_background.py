"""The background of protein counts: its prior in each batch, started from a few cells of that batch.

Antibodies stick to every cell, so a protein that a cell does not have still gives counts. totalVI has a
log-normal prior of that background for each protein and batch (Gayoso et al. 2021, Nat Methods 18, eq. 8),
and starts it from the lower of two normal components of log(1 + counts) over a cell's proteins.

Shapes: B cells, P proteins, K batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch
from scarcade.models.layers import ConditionRows

CELLS = 100
"""Cells of a batch that its prior is started from, at least: the last step is taken whole."""
LEAST_PROTEINS = 5
FLAT = (0.0, 0.05)
"""Mean and standard deviation where there is nothing to fit: a cell of equal counts, a batch without proteins."""


class BackgroundPrior(nn.Module):
    """Normal prior of the log background of each protein in each batch; mean and log standard deviation train."""

    START = (3.0, 0.0)

    def __init__(self, n_batches: int, n_proteins: int, *, empirical: bool) -> None:
        super().__init__()
        self.empirical = empirical
        self.mean = ConditionRows("batch", n_batches, n_proteins)
        self.log_sd = ConditionRows("batch", n_batches, n_proteins)
        with torch.no_grad():
            self.mean.rows.fill_(self.START[0])
            self.log_sd.rows.fill_(self.START[1])

    def forward(self, code_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (B, P) each."""
        return self.mean(code_B), self.log_sd(code_B).exp()

    @torch.no_grad()
    def fill(self, sums_K3: Tensor) -> None:
        """Start the prior of every batch from `sums`; after surgery that of the new batches alone.

        A batch whose cells have no proteins starts at `FLAT`, as in scvi-tools.
        """
        n_K, mean_K, variance_K = sums_K3.double().unbind(-1)
        some_K = n_K > 0
        n_K = n_K.clamp(min=1)
        mean_K = torch.where(some_K, mean_K / n_K, FLAT[0])
        # the standard error of the mean over `CELLS` cells, which is how sharp scvi-tools starts it: batches are read
        # whole, and the start must not depend on their size
        sd_K = torch.where(some_K, (variance_K / n_K / n_K.clamp(max=CELLS)).sqrt(), FLAT[1]).clamp(min=1e-3)
        for table, values_K in ((self.mean, mean_K), (self.log_sd, sd_K.log())):
            rows = table.rows if table.new is None else table.new
            rows.copy_(values_K[-len(rows) :, None].expand_as(rows))

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        for table, start in ((self.mean, self.START[0]), (self.log_sd, self.START[1])):
            first = torch.full((table.rows.shape[1],), start)
            table.append(new.get("batch", ()), dict.fromkeys(new.get("batch", ()), first).__getitem__)

    def settle(self) -> None:
        self.mean.settle()
        self.log_sd.settle()


class Efficiency(ConditionRows):
    """log efficiency of each protein in each batch. That of a new batch is 0 and stays so, as in scvi-tools:

    the decoder's row of the new batch says the same of its proteins, and denoised values leave the efficiency out.
    """

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        width = self.rows.shape[1]
        self.append(new.get("batch", ()), lambda _: torch.zeros(width))
        if self.new is not None:
            self.new.requires_grad_(False)


@torch.no_grad()
def sums(batch: Batch, n_batches: int, wanted_K: Tensor) -> Tensor:
    """Of each batch (K, 3), float64, additive: cells that were fitted, sums of their background's mean and variance.

    Args:
        wanted_K: bool; the cells of other batches are left out.
    """
    sums_K3 = torch.zeros(n_batches, 3, dtype=torch.float64)
    if batch.proteins is None:
        return sums_K3
    codes_B = batch.batch.cpu()
    y_BP = batch.proteins.detach().cpu().double()
    measured_BP = (
        torch.ones_like(y_BP, dtype=torch.bool) if batch.proteins_measured is None else batch.proteins_measured.cpu()
    )
    chosen_B = wanted_K[codes_B] & (measured_BP.sum(-1) >= LEAST_PROTEINS)
    if not chosen_B.any():
        return sums_K3
    mean_B, variance_B = lower_component(torch.log1p(y_BP[chosen_B]), measured_BP[chosen_B])
    return sums_K3.index_add_(0, codes_B[chosen_B], torch.stack([torch.ones_like(mean_B), mean_B, variance_B], -1))


def lower_component(
    x_BP: Tensor, measured_BP: Tensor, *, steps: int = 100, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Mean and variance (B,) of the lower of two normal components of each row, by expectation maximisation.

    All rows at once, with the starts, the floor of the variances (1e-6) and the stop of sklearn's GaussianMixture:
    two means, whose best cut of a sorted row is found by trying all of them. Rows without two values give `FLAT`.
    """
    weight_BP = measured_BP.double()
    n_B1 = weight_BP.sum(-1, keepdim=True)
    upper_BP = _best_cut(x_BP, weight_BP)
    resp_BP = upper_BP * weight_BP  # responsibility of the upper component
    active_B = torch.ones(len(x_BP), dtype=torch.bool)
    before_B = torch.full((len(x_BP),), -torch.inf, dtype=torch.float64)
    found = _moments(x_BP, weight_BP, resp_BP)
    for _ in range(steps):
        log_p = [
            torch.log(share_B1) - 0.5 * (torch.log(2 * torch.pi * variance_B1) + (x_BP - mean_B1) ** 2 / variance_B1)
            for share_B1, mean_B1, variance_B1 in found
        ]
        log_sum_BP = torch.logaddexp(*log_p)
        now_B = ((log_sum_BP * weight_BP).sum(-1, keepdim=True) / n_B1)[:, 0]
        resp_BP = torch.where(active_B[:, None], (log_p[1] - log_sum_BP).exp() * weight_BP, resp_BP)
        found = _moments(x_BP, weight_BP, resp_BP)
        active_B = active_B & ((now_B - before_B).abs() >= tolerance)
        before_B = now_B
        if not active_B.any():
            break
    (_, low_B1, low_variance_B1), (_, high_B1, high_variance_B1) = found
    swapped_B1 = low_B1 > high_B1
    mean_B = torch.where(swapped_B1, high_B1, low_B1)[:, 0]
    variance_B = torch.where(swapped_B1, high_variance_B1, low_variance_B1)[:, 0]
    masked = torch.where(measured_BP, x_BP, torch.nan)
    flat_B = masked.nan_to_num(-torch.inf).amax(-1) <= masked.nan_to_num(torch.inf).amin(-1)
    return torch.where(flat_B, FLAT[0], mean_B), torch.where(flat_B, FLAT[1] ** 2, variance_B)


def _moments(x_BP: Tensor, weight_BP: Tensor, resp_BP: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(share, mean, variance) of the lower and of the upper component, (B, 1) each."""
    parts = []
    for r_BP in (weight_BP - resp_BP, resp_BP):
        n_B1 = r_BP.sum(-1, keepdim=True) + 10 * torch.finfo(torch.float64).eps
        mean_B1 = (r_BP * x_BP).sum(-1, keepdim=True) / n_B1
        variance_B1 = (r_BP * (x_BP - mean_B1) ** 2).sum(-1, keepdim=True) / n_B1 + 1e-6
        parts.append((n_B1 / weight_BP.sum(-1, keepdim=True), mean_B1, variance_B1))
    return parts


def _best_cut(x_BP: Tensor, weight_BP: Tensor) -> Tensor:
    """1 for the upper of the two groups of a row that minimise the squares within groups, (B, P) float64."""
    order_BP = torch.where(weight_BP > 0, x_BP, torch.inf).argsort(-1)
    x, w = x_BP.gather(-1, order_BP), weight_BP.gather(-1, order_BP)
    n_BP, sum_BP = w.cumsum(-1), (x * w).cumsum(-1)
    rest_BP = n_BP[:, -1:] - n_BP
    gain_BP = sum_BP**2 / n_BP.clamp(min=1) + torch.where(
        rest_BP > 0, (sum_BP[:, -1:] - sum_BP) ** 2 / rest_BP.clamp(min=1), -torch.inf
    )
    cut_B1 = gain_BP.argmax(-1, keepdim=True)
    place_P = torch.arange(x_BP.shape[1])
    return torch.zeros_like(x_BP).scatter_(-1, order_BP, (place_P > cut_B1).double())
