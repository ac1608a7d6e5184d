"""The parts that the models of scArches are built of (trVAE, expiMap): layers side by side, stacks, configuration.

Beside `models.layers`, which are those of scvi-tools: here a condition enters the first layer of a stack alone,
through a layer of its own (with its own first weights, even for a single condition), and the layers of a decoder
have no bias. Names of the configuration are those of scArches.

Shapes: B cells, I inputs, H outputs.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Noise
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models import layers
from scarcade.models.distributions import Path
from scarcade.models.layers import (
    Codes,
    ConditionRows,
    Dispersion,
    hidden_units,
    linear_with_rows,
    seeded,
    start_uniform,
)
from scarcade.models.model import AtlasModel
from scarcade.models.normal import Latent, latent, moments
from scarcade.models.products import product_of
from scarcade.models.sparse import Sparse, totals
from scarcade.models.sparse_product import SeenCounts, dense_of, without_zeros


def _split(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return value.replace(",", " ").split() if isinstance(value, str) else value


Width = Annotated[int, Field(ge=1, le=65536)]
Widths = Annotated[tuple[Width, ...], BeforeValidator(_split), Field(min_length=1, max_length=64)]
"""Units of each hidden layer; on a command line with commas."""


class ScarchesConfig(AtlasModel.Config):
    """What the models of scArches have in common."""

    dropout_rate: float = Field(0.05, ge=0, lt=1, description="dropout in encoder and decoder")
    norm: Literal["layer", "batch", "none"] = Field(
        "layer", description="normalisation of hidden layers; that of layers has no weights"
    )
    target_sum: float = Field(
        1e4, gt=0, description="counts of a cell are scaled to this sum before log1p, where they are normalised"
    )
    normalise_input: bool = Field(
        False, description="the encoder sees log1p of normalised and not of raw counts (mse always does)"
    )
    likelihood_path: Path = Field(
        "auto",
        description="how the likelihood is computed: fused (compiled), analytic (torch), eager (the plain "
        "formula); auto: fused where it can, else analytic; all agree to 1e-5",
    )


class BatchNorm(layers.BatchNorm):
    """Batch norm with the numbers of torch, as scArches has it."""

    MOMENTUM = 0.1
    EPS = 1e-5


class SplitLinear(nn.Module):
    """``W x (+ b) + sum over covariates of E[category]``: two layers side by side, as `CondLayers` of scArches.

    First weights are torch's default for each of the two layers alone. A category that is grown starts within the
    bound of the reference's layer.
    """

    bias: nn.Parameter | None

    def __init__(
        self, n_in: int, n_out: int, sizes: Mapping[str, int], generator: torch.Generator, *, bias: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_out)) if bias else None)
        for parameter in self.parameters():
            start_uniform(parameter, n_in**-0.5, generator)
        self.conditions = nn.ModuleDict({c: ConditionRows(c, k, n_out) for c, k in sizes.items()})
        self.bound = self._bound()
        for table in self.conditions.values():
            assert isinstance(table, ConditionRows)
            start_uniform(table.rows, self.bound, generator)

    def _bound(self) -> float:
        """torch's default for a layer whose inputs are the one-hot columns alone."""
        tables = [table for table in self.conditions.values() if isinstance(table, ConditionRows)]
        return float(max(sum(len(table.table()) for table in tables), 1) ** -0.5)

    def forward(
        self, x_BI: Tensor | None, codes: Codes, weight: Tensor | None = None, product_BH: Tensor | None = None
    ) -> Tensor:
        """(B, H) from (B, I) and the codes of all covariates; with another `weight` than its own, if given.

        Where the product of weight and x is known, x may be None.
        """
        weight = self.weight if weight is None else weight
        return linear_with_rows(x_BI, weight, self.bias, self.conditions, codes, product_BH)

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        for covariate, table in self.conditions.items():
            assert isinstance(table, ConditionRows)

            def start(value: str, covariate: str = covariate) -> Tensor:
                row = torch.empty(self.weight.shape[0])
                start_uniform(row, self.bound, seeded(seed, path, covariate, value))
                return row

            if values := new.get(covariate, ()):
                table.append(values, start)

    def settle(self) -> None:
        for table in self.conditions.values():
            assert isinstance(table, ConditionRows)
            table.settle()
        self.bound = self._bound()


class PlainLinear(nn.Module):
    """``W x``, a hidden layer of a decoder."""

    bias = None

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        start_uniform(self.weight, n_in**-0.5, generator)

    def forward(self, x_BI: Tensor) -> Tensor:
        return product_of(x_BI, self.weight)


class Stack(nn.Module):
    """Hidden layers, each linear, norm, ReLU, dropout; conditions enter the first. No bias but in encoders."""

    def __init__(
        self,
        widths: Sequence[int],
        sizes: Mapping[str, int],
        config: ScarchesConfig,
        generator: torch.Generator,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.dropout_rate, self.layer_norm = config.dropout_rate, config.norm == "layer"
        self.first = SplitLinear(widths[0], widths[1], sizes, generator, bias=bias)
        pairs = list(pairwise(widths[1:]))
        kind = layers.Linear if bias else PlainLinear
        self.hidden = nn.ModuleList(kind(n_in, n_out, generator) for n_in, n_out in pairs)
        self.norm = nn.ModuleList(BatchNorm(n) for n in widths[1:] if config.norm == "batch")

    def forward(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> Tensor:
        """(B, H) from (B, I), or from the first layer's product with it (see `first_product`)."""
        return self.rest(self.after_first(x_BI, codes, noise, product_BH), noise)

    def after_first(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> Tensor:
        """The output of the first layer."""
        return self._units(0, self.first, x_BI, codes, noise, product_BH)

    def first_product(self, x_BI: Tensor | SeenCounts) -> Tensor:
        """The first layer's weights times x, (B, H): what stays the same while they are frozen."""
        return F.linear(dense_of(x_BI), self.first.weight)

    def rest(self, h_BH: Tensor, noise: Noise | None) -> Tensor:
        """From the output of the first layer to that of the last."""
        for i, linear in enumerate(self.hidden, start=1):
            h_BH = self._units(i, linear, h_BH, {}, noise)
        return h_BH

    def _units(
        self,
        i: int,
        linear: nn.Module,
        x_BI: Tensor | SeenCounts | None,
        codes: Codes,
        noise: Noise | None,
        product_BH: Tensor | None = None,
    ) -> Tensor:
        return hidden_units(
            linear,
            x_BI,
            codes,
            norm=self.norm[i] if self.norm else None,  # type: ignore[arg-type]
            layer_norm=self.layer_norm,
            noise=noise if self.training else None,
            dropout_rate=self.dropout_rate,
            product_BH=product_BH,
        )


class StackEncoder(nn.Module):
    """Counts -> hidden layers -> mean and variance of a normal distribution; 1e-4 is added to the variance."""

    LEAST = 1e-4

    def __init__(self, trunk: Stack, n_hidden: int, n_latent: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean = layers.Linear(n_hidden, n_latent, generator)
        self.log_variance = layers.Linear(n_hidden, n_latent, generator)

    def forward(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return moments(self.trunk(x_BI, codes, noise, product_BH), self.mean, self.log_variance, self.LEAST)

    def latent(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> Latent:
        """The same with a draw, made by `noise` after the dropout, and its KL divergence."""
        return latent(self.trunk(x_BI, codes, noise, product_BH), self.mean, self.log_variance, noise, self.LEAST)


def covariate_sizes(schema: Schema, model: str) -> dict[str, int]:
    """Categories of the batch and of each further categorical covariate.

    Raises:
        UsageError: the data have continuous covariates, for which these models have no place.
    """
    if schema.continuous:
        raise UsageError(
            f"--model {model} has no place for continuous covariates ({', '.join(schema.continuous)}); ingest without "
            "them, or take --model scvi"
        )
    return {"batch": len(schema.batch)} | {f"categorical_{i}": len(c) for i, c in enumerate(schema.categorical)}


def covariate_codes(batch: Batch) -> dict[str, Tensor]:
    """The codes of every covariate of `covariate_sizes`."""
    codes = {"batch": batch.batch}
    if batch.categorical is not None:
        codes |= {f"categorical_{i}": code_B for i, code_B in enumerate(batch.categorical.unbind(-1))}
    return codes


def dispersion_by_batch(schema: Schema, generator: torch.Generator) -> Dispersion:
    """log theta of each gene in each batch; first values N(0, 1)."""
    table = Dispersion("batch", len(schema.batch), schema.n_genes)
    if not table.rows.is_meta:
        with torch.no_grad():
            table.rows.normal_(generator=generator)
    return table


def cell_sizes(x: Tensor | Sparse, batch: Batch, schema: Schema) -> Tensor:
    """The size of each cell (B,): the sum of its counts, or its size factor if the data have one.

    Raises:
        CategoryError: the model wants a size factor, and the cells have none.
    """
    if schema.size_factor is None:
        return totals(x)
    if batch.size_factor is None:
        raise CategoryError(f"the model needs the size factor '{schema.size_factor}' of every cell")
    return batch.size_factor


def log_normalised(x: Tensor | Sparse, size_B: Tensor, target_sum: float) -> Tensor:
    """log(1 + counts of a cell that sum to `target_sum`), (B, G); an empty cell stays 0."""
    scale_B = torch.where(size_B > 0, target_sum / size_B, 0.0)
    if isinstance(x, Sparse):
        return x.dense(torch.log1p(torch.from_numpy(x.values) * x.of_each(scale_B)))
    return torch.log1p(x * scale_B[:, None])


def encoder_input(
    size_B: Tensor,
    batch: Batch,
    config: ScarchesConfig,
    *,
    mse: bool,
    x: Tensor | Sparse | None = None,
    weight_HI: Tensor,
) -> Tensor | SeenCounts:
    """What the encoder sees of the counts, (B, G): their log1p, normalised first for mse or if it is asked for.

    Args:
        x: the counts, where they have been taken from the batch already.
        weight_HI: what they meet first.
    """
    normalised = mse or config.normalise_input
    device = size_B.device
    cells = None if normalised else without_zeros(batch.counts, x, weight_HI)
    if cells is not None:
        return SeenCounts.logs(cells)
    if not normalised:
        return batch.counts.log1p(device)
    return log_normalised(batch.counts.dense(device), size_B, config.target_sum)
