"""A frozen reference with room for the new conditions of many queries at once (`engine.pack.Host`).

A query's rows are its own even where two queries call a batch by the same name: rows lie in the tables query behind
query, and the codes of a query's cells are moved to where its rows are. What a query could not be given alone among
others, `why_alone` names: such a query is mapped on a copy of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch
from scarcade.engine.pack import Rows
from scarcade.models.layers import BatchNorm, ConditionRows
from scarcade.models.model import AtlasModel
from scarcade.models.surgery import decoder_norm, grow, trainable


def why_alone(grown: AtlasModel) -> str | None:
    """Why this grown model cannot be trained among those of other queries; None if it can."""
    in_train = grown.query_mode == "train"
    if (told := grown.couples) is not None:
        return told
    reasons = {
        "terms that surgery adds are trained by all cells": bool(grown.extension),
        "the decoder's batch norm is trained": any(one.requires_grad for one in decoder_norm(grown).values()),
        "batch norm takes the statistics of all cells": in_train and _has_batch_norm(grown),
        "its library sizes are observed before training": grown.observes,
        "it trains more than rows of conditions": set(trainable(grown))
        != {f"{path}.new" for path, _ in _tables(grown)},
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_batch_norm(model: AtlasModel) -> bool:
    return any(isinstance(module, BatchNorm) for module in model.modules())


def rows_of(grown: AtlasModel) -> dict[str, Tensor]:
    """The new rows of a grown model: table -> (n, H)."""
    return {path: table.new.detach().clone() for path, table in _tables(grown) if table.new is not None}


def put_rows(grown: AtlasModel, rows: Rows) -> None:
    """Give a grown model new rows, of those that `rows_of` names."""
    for path, table in _tables(grown):
        assert table.new is not None
        with torch.no_grad():
            table.new.copy_(rows[path])


def _tables(grown: AtlasModel) -> list[tuple[str, ConditionRows]]:
    """The tables with new rows, by their path in the model."""
    return [(p, m) for p, m in grown.named_modules() if isinstance(m, ConditionRows) and m.new is not None]


class Packed:
    """`reference`, which stays as it is, with the rows of the queries that are seated."""

    model: AtlasModel

    def __init__(self, reference: AtlasModel, like: AtlasModel) -> None:
        """`like` is the reference grown for a query, in the mode of all of them."""
        schema = reference.schema
        # one category more of each covariate, so that every table is there; its row is replaced by those of queries
        grown = replace(
            schema,
            batch=replace(schema.batch, values=(*schema.batch.values, "")),
            categorical=tuple(replace(one, values=(*one.values, "")) for one in schema.categorical),
        )
        self.model = grow(reference, grown, seed=0, share=True)
        self.model.query_mode = like.query_mode
        self._tables = dict(_tables(self.model))
        self._sizes = {"batch": len(schema.batch)}
        self._sizes |= {f"categorical_{i}": len(one) for i, one in enumerate(schema.categorical)}
        self._first: dict[str, list[int]] = {}  # covariate -> where the rows of each seat begin, among the new ones

    def seat(self, rows: Sequence[Rows]) -> Mapping[str, tuple[nn.Parameter, Tensor]]:
        """See `engine.pack.Host`."""
        seated = {}
        self._first = {}
        for path, table in self._tables.items():
            parts = [one[path] for one in rows if path in one]
            counts = torch.tensor([len(one[path]) if path in one else 0 for one in rows])
            table.new = nn.Parameter(torch.cat(parts) if parts else table.rows.new_zeros(0, table.rows.shape[1]))
            first = (counts.cumsum(0) - counts).tolist()
            # all tables of a covariate have the same rows of a query, or none if nothing of it trains there
            if parts:
                assert self._first.setdefault(table.covariate, first) == first
                owner_R = torch.repeat_interleave(torch.arange(len(rows)), counts).to(table.rows.device)
                seated[path] = table.new, owner_R
        return seated

    def placed(self, batch: Batch, seat: int) -> Batch:
        """See `engine.pack.Host`."""
        codes = self._moved(batch.batch, "batch", seat)
        categorical = batch.categorical
        if categorical is not None:
            moved = [self._moved(one, f"categorical_{i}", seat) for i, one in enumerate(categorical.unbind(-1))]
            categorical = torch.stack(moved, -1)
        return replace(batch, batch=codes, categorical=categorical)

    def _moved(self, code_B: Tensor, covariate: str, seat: int) -> Tensor:
        first = self._first.get(covariate, [0] * (seat + 1))[seat]
        return torch.where(code_B >= self._sizes[covariate], code_B + first, code_B) if first else code_B
