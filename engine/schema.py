"""What cells are described by: categories, the schema of a store or model, a part of its cells, a place in its order.

It stands apart from `contracts` so that commands that only read and write stores start without torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scarcade.engine.errors import ModelFileError

UNLABELLED = -1
"""The code of a cell without a label, in every label column."""


@dataclass(frozen=True, slots=True)
class Categories:
    """The values of one categorical column in code order: ``values[code]``."""

    name: str
    values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def codes(self) -> dict[str, int]:
        """Value -> code."""
        return {value: code for code, value in enumerate(self.values)}

    def extended(self, new: Sequence[str]) -> "Categories":
        """These categories followed by the unseen ones of `new`, sorted; old codes never change."""
        return Categories(self.name, self.values + tuple(sorted(set(new) - set(self.values))))


@dataclass(frozen=True, slots=True)
class Schema:
    """Which genes, conditions, labels and proteins a store or a model speaks of, in code order.

    `labels[0]` is the primary label column (`Batch.labels`); further ones are for label transfer.
    """

    genes: tuple[str, ...]
    batch: Categories
    labels: tuple[Categories, ...] = ()
    categorical: tuple[Categories, ...] = ()
    continuous: tuple[str, ...] = ()
    proteins: tuple[str, ...] = ()
    size_factor: str | None = None
    counts_from: str = "X"
    unlabelled: tuple[str, ...] = ()  # label values that were said to mean: no label

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    @property
    def n_labels(self) -> int:
        """Classes of the primary label column (0 without one)."""
        return len(self.labels[0]) if self.labels else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values. `unlabelled` is left out where it is empty: older schemas keep their fingerprints."""
        plain = asdict(self)
        return plain if self.unlabelled else {name: value for name, value in plain.items() if name != "unlabelled"}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Schema":
        """The inverse of `to_dict`; also takes what JSON makes of it (lists for tuples).

        Raises:
            ModelFileError: a field is missing or of the wrong kind.
        """

        def categories(one: Mapping[str, Any]) -> Categories:
            return Categories(str(one["name"]), tuple(map(str, one["values"])))

        try:
            return cls(
                genes=tuple(map(str, raw["genes"])),
                batch=categories(raw["batch"]),
                labels=tuple(map(categories, raw["labels"])),
                categorical=tuple(map(categories, raw["categorical"])),
                continuous=tuple(map(str, raw["continuous"])),
                proteins=tuple(map(str, raw["proteins"])),
                size_factor=raw["size_factor"],
                counts_from=str(raw["counts_from"]),
                unlabelled=tuple(map(str, raw.get("unlabelled", ()))),
            )
        except (KeyError, TypeError) as error:
            raise ModelFileError(f"the schema is incomplete or malformed: {error!r}") from error

    def fingerprint(self) -> str:
        """sha256 over the schema, equal for equal schemas on every machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every global batch a worker takes: lanes `rank, rank + size, ...`."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Position:
    """Where a loader stands: the next batch to come is `step` of `epoch`."""

    epoch: int = 0
    step: int = 0
