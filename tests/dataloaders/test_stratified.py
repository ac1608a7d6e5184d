from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import CellLoader, Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.stratified import Stratified, stratified
from scarcade.engine.schema import Shard
from tests.dataloaders.made import Made, make

CPU = torch.device("cpu")
CONFIG = LoaderConfig(batch_size=64, window=640)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("stratified") / "atlas.zarr")


def evenly(made: Made, shard: Shard = Shard(), config: LoaderConfig = CONFIG) -> Stratified:  # noqa: B008
    loader = stratified(stream(made.store, "train", config, seed=3, shard=shard), seed=3)
    assert isinstance(loader, Stratified)
    return loader


def rows_of(loader: CellLoader, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.rows.tolist() for batch in loader.epoch(epoch, start)]


def test_each_batch_has_the_same_share_of_an_epoch(made: Made) -> None:
    loader, donors = evenly(made), made.store.codes("donor")
    for epoch in range(3):
        rows = np.concatenate(rows_of(loader, epoch))
        shares = np.bincount(donors[rows])
        assert len(rows) == loader.n_cells
        assert shares.max() - shares.min() <= 1
        assert rows.min() >= made.store.n_before(0.1)  # held out cells stay so


def test_over_a_run_the_cells_of_a_batch_come_equally_often(made: Made) -> None:
    loader, donors = evenly(made), made.store.codes("donor")
    met = np.bincount(np.concatenate([loader.drawn(epoch) for epoch in range(7)]), minlength=made.store.n_cells)
    held_out = made.store.n_before(0.1)
    for code in np.unique(donors):
        of_batch = met[held_out:][donors[held_out:] == code]
        assert of_batch.max() - of_batch.min() <= 1


def test_cells_are_what_their_rows_say(made: Made) -> None:
    for batch in evenly(made).epoch(1):
        assert np.array_equal(batch.counts.dense(CPU).numpy(), made.counts[batch.rows].toarray())
        assert np.array_equal(batch.batch, made.store.codes("donor")[batch.rows])
        assert batch.proteins is not None
        assert batch.proteins_measured is not None
        measured = made.measured[batch.rows]
        assert np.array_equal(batch.proteins_measured, measured)
        assert np.array_equal(batch.proteins.numpy()[measured], made.proteins[batch.rows][measured])


def test_every_pass_of_every_batch_has_an_order_of_its_own(made: Made) -> None:
    main, cells = stream(made.store, "train", CONFIG, seed=3), np.arange(100)

    def half(number: int, epoch: int, seed: int = 3) -> set[int]:
        """Half of the cells of a batch: two epochs are a pass."""
        return set(Stratified(main, [cells, cells], seed=seed)._of(number, epoch, 50).tolist())

    assert half(0, 0) | half(0, 1) == set(range(100))
    assert half(0, 2) not in (half(0, 0), half(0, 1))
    assert half(1, 0) != half(0, 0) != half(0, 0, seed=4)


def test_an_epoch_is_entered_in_its_middle(made: Made) -> None:
    whole = rows_of(evenly(made), 2)
    for start in (0, 1, 11, len(whole)):
        assert rows_of(evenly(made), 2, start) == whole[start:]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_share_the_same_batches(made: Made, workers: int) -> None:
    parts = [rows_of(evenly(made, Shard(rank, workers)), 1) for rank in range(workers)]
    for whole, *shares in zip(rows_of(evenly(made), 1), *parts, strict=True):
        assert sorted(whole) == sorted(row for share in shares for row in share)


def test_the_store_and_memory_give_the_same(made: Made) -> None:
    columns = Columns(
        batch=made.store.codes("donor"),
        labels=made.store.codes("cell_type"),
        categorical=(made.store.codes("sex"),),
        continuous=(made.store.codes("age"),),
        size_factor=made.store.codes("size"),
    )
    memory = in_memory(made.counts, columns, made.schema, CONFIG, seed=3, keys=made.keys, split="train")
    assert rows_of(stratified(memory, seed=3), 1) == rows_of(evenly(made), 1)


def test_labelled_cells_may_come_beside(made: Made) -> None:
    loader = evenly(made)
    for batch, alone in zip(with_labelled(loader, CONFIG, seed=3).epoch(0), rows_of(loader, 0), strict=True):
        assert batch.rows.tolist() == alone
        assert batch.labelled is not None


def test_one_batch_is_the_stream_itself(made: Made, tmp_path: Path) -> None:
    columns = Columns(batch=np.zeros(100, np.int64))
    schema = made.schema.from_dict(
        made.schema.to_dict() | {"categorical": [], "continuous": [], "size_factor": None, "proteins": []}
    )
    main = in_memory(made.counts[:100], columns, schema, CONFIG, seed=0)
    assert stratified(main, seed=0) is main
