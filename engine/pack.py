"""Trains the rows of many queries at once on one frozen model, each as if it were alone.

A step takes the next batch of every query that is aboard. A query's rows get the gradient of its own cells alone, its
mean, KL weight, learning rate, step count, plateau and early stopping are its own, and its noise is that of its own
(seed, step, lane). So its path is the one that `fit` would take with it alone, and the price of a step is shared: a
hundred small queries cost about as much as one of their joint size. Queries come aboard and leave at any time; nothing
of the others changes by it, not even a last bit (see `joined.LEAST`).

Only what belongs to one query may train: `Host` knows which rows of the model are whose.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch, Loader, Losses, Noise, Step
from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.engine.joined import DenseBuffer, joined
from scarcade.engine.metrics import Clock, Report, means
from scarcade.engine.optim import OptimConfig, default_epochs, kl_weight
from scarcade.engine.pool import as_shared_by
from scarcade.engine.row_adam import Moments, update_
from scarcade.engine.state import TrainingState
from scarcade.engine.validation import validate
from scarcade.engine.world import World

Rows = Mapping[str, Tensor]
"""Table -> the rows of one query in it (n, H)."""


class Host(Protocol):
    """A frozen model with room for the rows of several queries (`models.packed.Packed`)."""

    model: Any  # an nn.Module that keeps `engine.contracts.Model`

    def seat(self, rows: Sequence[Rows]) -> Mapping[str, tuple[nn.Parameter, Tensor]]:
        """Put the rows of these queries, in this order, into the tables: table -> (its trainable rows, whose each is).

        A row's owner is the place of its query in `rows`.
        """
        ...

    def placed(self, batch: Batch, seat: int) -> Batch:
        """A batch of the query at `seat`, with the codes that its rows now have."""
        ...


@dataclass(eq=False)
class Member:
    """One query: what it trains on, and where it stands."""

    name: str
    rows: dict[str, Tensor]
    train: Loader
    validation: Loader | None = None
    seed: int = 0
    known: Mapping[str, Tensor] = field(default_factory=dict)  # of all its cells, by place: see `Batch.known`
    progress: Report | None = None
    state: TrainingState = field(default_factory=lambda: TrainingState(lr=0.0))
    moments: dict[str, Moments] = field(default_factory=dict)
    epochs: int = 0
    error: Exception | None = None  # why it is over before its time
    clock: Clock = field(default_factory=lambda: Clock(0.0, 0))
    _batches: Iterator[Batch] | None = None

    def next_batch(self) -> Batch:
        """The next cells of its training, epoch after epoch."""
        if self._batches is None:
            self._batches = iter(self.train.epoch(self.state.epoch, self.state.in_epoch))
        return self.with_known(next(self._batches))

    def end_epoch(self) -> None:
        self._batches = None

    def with_known(self, batch: Batch) -> Batch:
        """`batch` with what is known of its cells."""
        if not self.known:
            return batch
        rows = torch.from_numpy(batch.rows)
        return replace(batch, known={name: values[rows] for name, values in self.known.items()})

    def close(self) -> None:
        """Let go of what reads ahead."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None


class Pack:
    """The queries that train together. `board` one, `step` until some are over."""

    def __init__(self, host: Host, config: OptimConfig, *, device: torch.device | None = None) -> None:
        self.host, self.config = host, config
        self.device = device or torch.device("cpu")
        self.members: list[Member] = []
        self._tables: Mapping[str, tuple[nn.Parameter, Tensor]] = {}
        self._moments: dict[str, Moments] = {}
        self._buffer = DenseBuffer()
        self._seated = False

    def board(self, member: Member) -> None:
        """Let `member` train from the next step on.

        Raises:
            UsageError: it has no row to train.
        """
        if not any(len(rows) for rows in member.rows.values()):
            raise UsageError(f"{member.name}: has no row of its own to train")
        n_cells = member.train.n_cells + (member.validation.n_cells if member.validation else 0)
        member.epochs = self.config.epochs or default_epochs(n_cells)
        member.state = TrainingState(lr=self.config.lr)
        member.clock = Clock(member.train.waited, 0)
        member.moments = {name: Moments.of(rows) for name, rows in member.rows.items()}
        self._rise()
        self.members.append(member)

    @property
    def n_cells(self) -> int:
        """Of a step, about."""
        return sum(map(self.cells_of, self.members))

    @staticmethod
    def cells_of(member: Member) -> int:
        """Its share of a step, about."""
        return -(-member.train.n_cells // member.train.steps_per_epoch)

    def leave(self, member: Member) -> None:
        """Take `member` off, with the rows as they are now."""
        self._rise()
        self.members.remove(member)
        member.close()

    # seats: the tables hold the rows of all members; a member has its own back when the company changes

    def _sit(self) -> None:
        if self._seated:
            return
        self._tables = self.host.seat([member.rows for member in self.members])
        for name in self._tables:
            parts = [member.moments[name] for member in self.members if name in member.moments]
            first, second = (torch.cat([getattr(p, kind) for p in parts]) for kind in ("first_RH", "second_RH"))
            self._moments[name] = Moments(first, second)
        self._seated = True

    def _rise(self) -> None:
        if not self._seated:
            return
        for name, (table, owner_R) in self._tables.items():
            moments = self._moments[name]
            for seat, member in enumerate(self.members):
                mine_R = owner_R == seat
                if name in member.rows:
                    member.rows[name] = table.detach()[mine_R]
                    member.moments[name] = Moments(moments.first_RH[mine_R], moments.second_RH[mine_R])
        self._seated = False

    # a step

    def step(self) -> list[Member]:
        """One batch of every member; those that are over, and have left."""
        if not self.members:
            return []
        with as_shared_by(self.host.model):
            return self._stepped()

    def _stepped(self) -> list[Member]:
        self._sit()
        model, config, members = self.host.model, self.config, self.members
        model.train(config.mode == "train")
        parts = [member.next_batch() for member in members]
        batch = joined([self.host.placed(part.to(self.device), seat) for seat, part in enumerate(parts)], self._buffer)
        segments: list[tuple[tuple[int, ...], int]] = [
            ((member.seed, member.state.step, lane), n)
            for member, part in zip(members, parts, strict=True)
            for lane, n in part.lanes
        ]
        assert batch.queries is not None
        sizes = batch.queries  # one more than parts, if the batch was filled up
        segments += [((0,), n) for n in sizes[len(parts) :]]
        owner_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(self.device)
        losses = model.losses(batch, self._step(owner_B), Noise(segments, self.device))
        share = [1 / part.n_global for part in parts] + [0.0] * (len(sizes) - len(parts))
        share_B = torch.tensor(share, dtype=losses.minimise.dtype, device=self.device)[owner_B]
        loss = (losses.minimise * share_B).sum()
        if losses.penalty is not None:
            loss = loss + losses.penalty
        loss.backward()
        self._take_in(losses, [len(part) for part in parts])
        over = self._update(losses, parts)
        pairs = zip(members, parts, strict=True)
        over += [member for member, part in pairs if member not in over and self._advance(member, part)]
        for member in over:
            self.leave(member)
        return over

    def _step(self, owner_B: Tensor) -> Step:
        """Where each query stands, as its cells' loss may need it."""
        states = [member.state for member in self.members]
        weights = [kl_weight(self.config, epoch=one.epoch, step=one.step, cells=one.cells) for one in states]
        first = states[0]
        weight: float | Tensor = weights[0]
        if any(one != weights[0] for one in weights):
            weight = torch.tensor([*weights, weights[0]], dtype=torch.float32, device=self.device)[owner_B]
        return Step(first.step, first.epoch, first.cells, weight, first.lr)

    @torch.no_grad()
    def _take_in(self, losses: Losses, sizes: Sequence[int]) -> None:
        """Add the terms of each query's cells to its own sums."""
        terms = {"loss": losses.minimise, **losses.terms}
        stacked = torch.stack([value.detach().double() for value in terms.values()], 1)  # (B, T)
        pieces = torch.split(stacked[: sum(sizes)], list(sizes))
        for member, piece in zip(self.members, pieces, strict=True):
            sums, cells = member.state.since_epoch
            found = dict(zip(terms, piece.sum(0).tolist(), strict=True))
            member.state.since_epoch = (
                {name: sums.get(name, 0.0) + value for name, value in found.items()},
                cells + len(piece),
            )

    @torch.no_grad()
    def _update(self, losses: Losses, parts: Sequence[Batch]) -> list[Member]:
        """Move the rows; returns the queries whose loss or gradient was not finite, with their error."""
        members, config = self.members, self.config
        gradients: dict[str, Tensor] = {}
        squares_Q = torch.zeros(len(members), dtype=torch.float64, device=self.device)
        for name, (table, owner_R) in self._tables.items():
            gradients[name] = torch.zeros_like(table) if table.grad is None else table.grad
            table.grad = None
            squares_Q.index_add_(0, owner_R, gradients[name].double().square().sum(1))
        norms = squares_Q.sqrt().tolist()
        for name, (table, owner_R) in self._tables.items():
            gradient = gradients[name]
            if config.clip is not None:
                scale = [min(1.0, config.clip / (norm + 1e-6)) for norm in norms]
                gradient = gradient * torch.tensor(scale, dtype=table.dtype, device=self.device)[owner_R, None]
            steps = [member.state.step + 1 for member in members]
            rates = [member.state.lr for member in members]
            update_(table.data, gradient, self._moments[name], owner_R, steps, rates, config)
        lost = []
        pieces = torch.split(losses.minimise[: sum(map(len, parts))], [len(part) for part in parts])
        for member, norm, piece, part in zip(members, norms, pieces, parts, strict=True):
            if not (math.isfinite(norm) and bool(piece.isfinite().all())):
                member.error = _not_finite(member.state, part)
                lost.append(member)
        return lost

    def _advance(self, member: Member, part: Batch) -> bool:
        """Count a step of `member`; whether it is over."""
        state, config = member.state, self.config
        state.step += 1
        state.in_epoch += 1
        state.cells += part.n_global
        if state.in_epoch == member.train.steps_per_epoch:
            try:
                self._end_of_epoch(member)
            except NonFiniteError as error:
                member.error = error
                return True
        if config.max_steps is not None and state.step >= config.max_steps:
            state.stopped = state.stopped or "steps"
        elif state.epoch >= member.epochs:
            state.stopped = state.stopped or "epochs"
        return bool(state.stopped)

    def _end_of_epoch(self, member: Member) -> None:
        state, config = member.state, self.config
        where = self._now(state)
        line = {
            "time": round(time.time(), 3),
            "step": state.step,
            "epoch": state.epoch,
            "cells": state.cells,
            **member.clock.read(member.train.waited, state.cells),
            "of": "epoch",
            "lr": state.lr,
            "kl_weight": where.kl_weight,
            **means(*state.since_epoch, "train"),
        }
        if member.validation is not None and config.validate_every and (state.epoch + 1) % config.validate_every == 0:
            loader = _Placed(member, self.host, self.members.index(member))
            found = validate(self.host.model, loader, where, seed=member.seed, world=World(device=self.device))
            line |= found
            state.watch(found, config)
        state.since_epoch = ({}, 0)
        state.history.append(line)
        state.epoch, state.in_epoch = state.epoch + 1, 0
        member.end_epoch()
        if member.progress is not None:
            member.progress({**line, "epochs": member.epochs, "steps_per_epoch": member.train.steps_per_epoch})

    def _now(self, state: TrainingState) -> Step:
        """Where a query stands in its last step."""
        step, cells = max(state.step - 1, 0), max(state.cells - 1, 0)
        weight = kl_weight(self.config, epoch=state.epoch, step=step, cells=cells)
        return Step(step, state.epoch, cells, weight, state.lr)


class _Placed:
    """The validation cells of a query, with the codes of its seat."""

    def __init__(self, member: Member, host: Host, seat: int) -> None:
        assert member.validation is not None
        self._loader, self._member, self._host, self._seat = member.validation, member, host, seat
        self.schema = self._loader.schema

    @property
    def n_cells(self) -> int:
        return self._loader.n_cells

    @property
    def steps_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    @property
    def waited(self) -> float:
        return self._loader.waited

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self._loader.epoch(epoch, start):
            yield self._host.placed(self._member.with_known(batch), self._seat)

    def fingerprint(self) -> str:
        return self._loader.fingerprint()


def _not_finite(state: TrainingState, part: Batch) -> NonFiniteError:
    shown = ", ".join(map(str, part.rows[:8])) + (", ..." if len(part) > 8 else "")
    return NonFiniteError(
        f"step {state.step}: the loss or its gradient is not finite (epoch {state.epoch}, cells {shown} of the query); "
        "lower --optim.lr or set --optim.clip, and check these cells"
    )
