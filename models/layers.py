"""Conditional layers: linear maps with one learned row for each category, and the only code that grows one.

A condition (batch, donor, assay, ...) enters a layer by ``W x + b + E[category]``. It is the same function
as concatenating one-hot columns to x, costs a look-up instead of a wider product, and makes architecture
surgery an append: `grow` adds rows for new categories, which start as a pure function of (seed, layer,
covariate, category). So a category's first weights do not depend on which others are added with it.

Shapes: B cells, I inputs, H outputs, K categories.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.contracts import Noise
from scarcade.models.hidden import After, hidden
from scarcade.models.normal import Latent, latent, moments
from scarcade.models.products import kind_of, product_of, rows_of
from scarcade.models.sparse_product import SeenCounts, dense_of

Codes = Mapping[str, Tensor]
"""Covariate -> int64 (B,) category code of each cell."""

GROWN = "new"
"""Tensors that surgery adds are named ``new...`` within their module."""


@runtime_checkable
class Growable(Protocol):
    """A module with something that belongs to a category."""

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        """Add what the `new` categories (covariate -> values) need; `path` names this module in the model."""
        ...

    def settle(self) -> None:
        """Make what was added a part of the rest: the module is as if it had been built with it."""
        ...


def seeded(*words: object) -> torch.Generator:
    """A generator that is a pure function of `words`, on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def start_uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """U(-bound, bound) in place; nothing on the meta device, where there are no values."""
    if not tensor.is_meta:
        with torch.no_grad():
            tensor.uniform_(-bound, bound, generator=generator)


class ConditionRows(nn.Module):
    """A table of one row for each category of a covariate."""

    new: nn.Parameter | None

    def __init__(self, covariate: str, n_categories: int, width: int) -> None:
        super().__init__()
        self.covariate = covariate
        self.rows = nn.Parameter(torch.zeros(n_categories, width))
        self.register_parameter(GROWN, None)

    def table(self) -> Tensor:
        """(K, H): reference rows, then grown ones."""
        return self.rows if self.new is None else torch.cat([self.rows, self.new])

    def forward(self, code_B: Tensor) -> Tensor:
        """(B, H). Raises IndexError for a code that has no row."""
        return rows_of(self.table(), code_B)

    def append(self, values: Sequence[str], start: Callable[[str], Tensor]) -> None:
        """Trainable rows for new categories; ``start(value)`` gives the first weights (H,) of each."""
        self.settle()
        if values:
            self.new = nn.Parameter(torch.stack([start(value) for value in values]).to(self.rows))

    def settle(self) -> None:
        if self.new is not None:
            self.rows = nn.Parameter(self.table().detach().clone(), requires_grad=self.rows.requires_grad)
            self.new = None


class Dispersion(ConditionRows):
    """log theta of each gene in each category. A new category starts at the mean of the known ones and trains.

    (scvi-tools draws it at random and freezes it.)
    """

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        values = new.get(self.covariate, ())
        if values:
            mean_G = self.table().detach().mean(0)
            self.append(values, lambda _: mean_G)

    def of(self, codes: Codes) -> Tensor:
        """log theta of each cell, (B, G); (G,) where all cells share it."""
        found: Tensor = self.rows[0] if self.covariate in ("gene", "protein") else self(codes[self.covariate])
        return found


def condition_rows(layer: nn.Module, codes: Codes) -> tuple[Tensor | None, Tensor | None]:
    """What the conditions of `layer` add to a product: a table (K, H), and each cell's row in it; None without any."""
    conditions: dict[str, ConditionRows] = dict(getattr(layer, "conditions", {}).items())
    if not conditions:
        return None, None
    if len(conditions) == 1:
        ((covariate, rows),) = conditions.items()
        return rows.table(), codes[covariate]
    # a row for each cell
    table_BH = torch.stack([rows(codes[covariate]) for covariate, rows in conditions.items()]).sum(0)
    return table_BH, torch.arange(len(table_BH), device=table_BH.device)


def hidden_units(
    layer: nn.Module,
    x_BI: Tensor | SeenCounts | None,
    codes: Codes,
    *,
    norm: "BatchNorm | None",
    layer_norm: bool,
    slope: float = 0.0,
    noise: Noise | None = None,
    dropout_rate: float = 0.0,
    product_BH: Tensor | None = None,
) -> Tensor:
    """A hidden layer (B, H): `layer`, batch norm, layer norm, ReLU, dropout (with `noise`).

    Args:
        layer: a linear map, with conditions or without.
        slope: of the activation below zero.
        product_BH: what the weights have made of x, which may be None then.
    """
    given: Any = layer
    weight_HI = given.weight
    bias_H, drops = getattr(layer, "bias", None), noise is not None and dropout_rate > 0
    after = After(norm, layer_norm, slope, dropout_rate)
    if after.is_compiled(weight_HI):
        if noise is not None and drops:
            after = replace(after, uniform_BH=noise.uniform(len(weight_HI)))
        return hidden(x_BI, weight_HI, bias_H, *condition_rows(layer, codes), product_BH, after)
    x_BI = None if x_BI is None else dense_of(x_BI)
    h_BH = linear_with_rows(x_BI, weight_HI, bias_H, getattr(layer, "conditions", nn.ModuleDict()), codes, product_BH)
    if norm is not None:
        h_BH = norm(h_BH)
    if layer_norm:
        h_BH = F.layer_norm(h_BH, h_BH.shape[-1:])
    h_BH = F.relu(h_BH) if slope == 0 else F.leaky_relu(h_BH, slope)
    return noise.dropout(h_BH, dropout_rate) if noise is not None and drops else h_BH


def linear_with_rows(
    x_BI: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conditions: nn.ModuleDict,
    codes: Codes,
    product_BH: Tensor | None = None,
) -> Tensor:
    """``W x + b + sum over covariates of E[category]``, (B, H); where ``W x`` is known (`product_BH`) x may be None.

    The bias is added to the first table, and the product to its rows: two passes over (B, H) less, forward and back.
    """
    if not conditions and product_BH is None:
        assert x_BI is not None
        return product_of(x_BI, weight, bias)
    if not conditions:
        assert product_BH is not None
        return product_BH if bias is None else product_BH + bias
    rows_BH: Tensor | None = None
    for covariate, rows in conditions.items():
        assert isinstance(rows, ConditionRows)
        if rows_BH is not None:
            rows_BH = rows_BH + rows(codes[covariate])
        else:
            rows_BH = rows_of(rows.table() if bias is None else rows.table() + bias, codes[covariate])
    assert rows_BH is not None
    if product_BH is not None:
        return rows_BH + product_BH
    assert x_BI is not None
    return product_of(x_BI, weight, rows_BH)


class ConditionalLinear(nn.Module):
    """``W x + b + sum over covariates of E[category]``.

    A covariate with a single category has no table, as in scvi-tools. Surgery then makes one whose row for
    that category is zero, which is the same function (scvi-tools draws that row at random).
    """

    def __init__(self, n_in: int, n_out: int, sizes: Mapping[str, int], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.sizes = dict(sizes)
        self.conditions = nn.ModuleDict({c: ConditionRows(c, k, n_out) for c, k in sizes.items() if k > 1})
        self.bound = self._bound()
        for parameter in self.parameters():
            start_uniform(parameter, self.bound, generator)

    def _bound(self) -> float:
        """torch's default for a layer whose inputs are x and the one-hot columns (fan-in counts both)."""
        return float((self.weight.shape[1] + sum(k for k in self.sizes.values() if k > 1)) ** -0.5)

    def forward(self, x_BI: Tensor | None, codes: Codes, product_BH: Tensor | None = None) -> Tensor:
        """(B, H) from (B, I), or from what the weights have made of it, and the codes of all covariates."""
        return linear_with_rows(x_BI, self.weight, self.bias, self.conditions, codes, product_BH)

    def grow(self, new: Mapping[str, Sequence[str]], seed: int, path: str) -> None:
        for covariate in self.sizes:
            values = new.get(covariate, ())
            if not values:
                continue
            if covariate not in self.conditions:
                rows = ConditionRows(covariate, self.sizes[covariate], len(self.bias)).to(self.bias.device)
                self.conditions[covariate] = rows.requires_grad_(False)

            def start(value: str, covariate: str = covariate) -> Tensor:
                row = torch.empty(len(self.bias))
                start_uniform(row, self.bound, seeded(seed, path, covariate, value))
                return row

            table = self.conditions[covariate]
            assert isinstance(table, ConditionRows)
            table.append(values, start)
            self.sizes[covariate] += len(values)
        # in the order of a layer that is built with them: sums over tables, and columns of other tools
        self.conditions = nn.ModuleDict({c: self.conditions[c] for c in self.sizes if c in self.conditions})

    def settle(self) -> None:
        for table in self.conditions.values():
            assert isinstance(table, ConditionRows)
            table.settle()
        self.bound = self._bound()


class BatchNorm(nn.Module):
    """Batch norm with the numbers of scvi-tools: eps 1e-3, momentum 0.01.

    Not torch's module, because that counts the batches it has seen, which would change a frozen reference.
    """

    MOMENTUM = 0.01
    EPS = 1e-3
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n_hidden: int) -> None:
        super().__init__()
        self.momentum = self.MOMENTUM
        self.weight = nn.Parameter(torch.ones(n_hidden))
        self.bias = nn.Parameter(torch.zeros(n_hidden))
        self.register_buffer("running_mean", torch.zeros(n_hidden))
        self.register_buffer("running_var", torch.ones(n_hidden))

    def forward(self, x_BH: Tensor) -> Tensor:
        """(B, H). In training mode with the statistics of this batch; of a single cell with the running ones.

        (A worker's share of a small batch of labelled cells may be one cell, or none.)
        """
        return F.batch_norm(
            x_BH,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training and len(x_BH) > 1,
            momentum=self.momentum,
            eps=self.EPS,
        )


class FullyConnected(nn.Module):
    """`n_layers` of conditional linear, batch norm, layer norm, ReLU, dropout (the FCLayers of scvi-tools).

    Batch norm has eps 1e-3 and momentum 0.01, layer norm has no weights. Conditions enter the first layer,
    and the others if `inject`. Dropout is drawn from the `Noise` argument, in training mode only.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        sizes: Mapping[str, int],
        *,
        inject: bool,
        dropout_rate: float,
        batch_norm: bool,
        layer_norm: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.layer_norm = layer_norm
        self.linear = nn.ModuleList(
            ConditionalLinear(n_in if i == 0 else n_hidden, n_hidden, sizes if inject or i == 0 else {}, generator)
            for i in range(n_layers)
        )
        self.norm = nn.ModuleList(BatchNorm(n_hidden) for _ in range(n_layers if batch_norm else 0))

    def forward(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> Tensor:
        """(B, H) from (B, I), or from the first layer's product with it (see `first_product`)."""
        h_BH = x_BI
        for i, linear in enumerate(self.linear):
            h_BH = hidden_units(
                linear,
                h_BH,
                codes,
                norm=self.norm[i] if self.norm else None,  # type: ignore[arg-type]
                layer_norm=self.layer_norm,
                noise=noise if self.training else None,
                dropout_rate=self.dropout_rate,
                product_BH=product_BH if i == 0 else None,
            )
        assert isinstance(h_BH, Tensor)
        return h_BH

    @property
    def first_weight(self) -> Tensor:
        """The weights that see the input, (H, I)."""
        return self.linear[0].weight  # type: ignore[return-value]

    @property
    def kind(self) -> torch.dtype:
        """In which kind of number the first product is computed."""
        return kind_of(self.first_weight)

    def first_product(self, x_BI: Tensor | SeenCounts) -> Tensor:
        """The first layer's weights times x, (B, H): what stays the same while they are frozen."""
        return F.linear(dense_of(x_BI), self.first_weight)


class Linear(nn.Linear):
    """`nn.Linear` whose first weights come from a given generator (torch's default distribution)."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out))
        start_uniform(self.weight, n_in**-0.5, generator)
        start_uniform(self.bias, n_in**-0.5, generator)

    def forward(self, input: Tensor) -> Tensor:
        return product_of(input, self.weight, self.bias)


class Encoder(nn.Module):
    """x -> mean and variance of a normal distribution; 1e-4 is added to the variance."""

    LEAST = 1e-4

    def __init__(self, trunk: FullyConnected, n_hidden: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean = Linear(n_hidden, n_out, generator)
        self.variance = Linear(n_hidden, n_out, generator)

    def forward(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return moments(self.trunk(x_BI, codes, noise, product_BH), self.mean, self.variance, self.LEAST)

    def latent(
        self, x_BI: Tensor | SeenCounts | None, codes: Codes, noise: Noise | None, product_BH: Tensor | None = None
    ) -> Latent:
        """The same with a draw, made by `noise` after the dropout, and its KL divergence."""
        return latent(self.trunk(x_BI, codes, noise, product_BH), self.mean, self.variance, noise, self.LEAST)
