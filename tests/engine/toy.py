"""A small model and a small loader that keep the contracts: what the engine's tests train."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.schema import Categories, Position, Schema, Shard

SCHEMA = Schema(tuple(f"g{i}" for i in range(12)), Categories("batch", ("a", "b", "c")))


@dataclass
class ToyCounts:
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self.values).to(device)

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        logs = torch.log1p(self.dense(device))
        return logs if kind == torch.float32 else logs.to(kind)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise NotImplementedError

    def into(self, out_BG: Tensor) -> None:
        out_BG.copy_(self.dense(out_BG.device))

    def part(self, start: int, stop: int) -> "ToyCounts":
        return ToyCounts(self.values[start:stop])


@dataclass
class ToyLoader:
    """`n_cells` made cells, dealt in lanes as decision 001 says."""

    n_cells: int = 200
    batch_size: int = 32
    seed: int = 0
    shard: Shard = field(default_factory=Shard)
    lanes: int = 8
    schema: Schema = SCHEMA
    waited: float = 0.0
    seen: list[np.ndarray] = field(default_factory=list)
    poison: int | None = None  # a row whose counts are not finite

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self._counts = rng.poisson(3, (self.n_cells, self.schema.n_genes)).astype(np.float32)
        self._batch = rng.integers(0, len(self.schema.batch), self.n_cells)
        if self.poison is not None:
            self._counts[self.poison, 0] = np.inf

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_cells // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_cells)
        steps = self.steps_per_epoch
        for step in range(start, steps):
            first, last = step * self.n_cells // steps, (step + 1) * self.n_cells // steps
            of_lane = {
                lane: order[[i for i in range(first, last) if i % self.lanes == lane]]
                for lane in range(self.shard.rank, self.lanes, self.shard.size)
            }
            rows = np.concatenate(list(of_lane.values())).astype(np.int64)
            self.seen.append(rows)
            yield Batch(
                counts=ToyCounts(self._counts[rows]),
                batch=torch.from_numpy(self._batch[rows]),
                labels=torch.full((len(rows),), -1),
                rows=rows,
                position=Position(epoch, step + 1) if step + 1 < steps else Position(epoch + 1, 0),
                lanes=tuple((lane, len(r)) for lane, r in of_lane.items()),
                n_global=last - first,
            )

    def fingerprint(self) -> str:
        return hashlib.sha256(self._counts.tobytes()).hexdigest()


class ToyModel(nn.Module):
    """A small variational autoencoder with a Poisson likelihood."""

    name: ClassVar[str] = "toy"
    obsm_key: ClassVar[str] = "X_toy"

    def __init__(self, schema: Schema = SCHEMA, *, n_hidden: int = 16, seed: int = 0, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.schema = schema
        self.hidden = nn.Linear(schema.n_genes, n_hidden)
        self.norm = nn.BatchNorm1d(n_hidden) if batch_norm else nn.LayerNorm(n_hidden)
        self.head = nn.Linear(n_hidden, 6)
        self.condition = nn.Embedding(len(schema.batch), 3)
        self.out = nn.Linear(3, schema.n_genes)
        self.idle = nn.Linear(2, 2)  # no batch ever touches it

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        x_BG = batch.counts.dense(self.out.weight.device)
        h_BH = self.norm(self.hidden(torch.log1p(x_BG))).relu()
        if noise is not None and self.training:
            h_BH = noise.dropout(h_BH, 0.1)
        mean_BL, log_sd_BL = self.head(h_BH).chunk(2, -1)
        z_BL = mean_BL if noise is None else mean_BL + log_sd_BL.exp() * noise.normal(3)
        log_rate_BG = self.out(z_BL + self.condition(batch.batch))
        reconstruction_B = (log_rate_BG.exp() - x_BG * log_rate_BG).sum(-1)
        kl_B = 0.5 * (mean_BL**2 + (2 * log_sd_BL).exp() - 2 * log_sd_BL - 1).sum(-1)
        return Losses(
            reconstruction_B + step.kl_weight * kl_B,
            {"reconstruction": reconstruction_B, "kl": kl_B, "elbo": reconstruction_B + kl_B},
        )

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """Nothing to do."""


def digest(model: nn.Module) -> str:
    """sha256 over all weights: equal if and only if they are equal bit for bit."""
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(value.detach().cpu().numpy().tobytes())
    return content.hexdigest()
