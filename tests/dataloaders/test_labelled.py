from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.dataloaders.labelled import SubsetSource, WithLabelled, _spans, with_labelled
from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.sources import StoreSource
from scarcade.engine.contracts import Batch, Loader, Noise
from scarcade.engine.schema import Shard
from tests.dataloaders.made import Made, make

CPU = torch.device("cpu")
CONFIG = LoaderConfig(batch_size=64, window=640)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("labelled") / "atlas.zarr")


def both(
    made: Made,
    split: str = "train",
    config: LoaderConfig = CONFIG,
    shard: Shard = Shard(),  # noqa: B008
    seed: int = 3,
) -> Loader:
    return with_labelled(stream(made.store, split, config, seed=seed, shard=shard), config, seed=seed)  # type: ignore[arg-type]


def beside(batch: Batch) -> Batch:
    assert batch.labelled is not None
    return batch.labelled


def labels_of(made: Made) -> np.ndarray:
    return made.store.codes("cell_type").astype(int)


@pytest.mark.parametrize("hold", [True, False])
def test_labelled_cells_are_what_their_rows_say(made: Made, hold: bool) -> None:
    """Held in memory, or read window by window."""
    loader = both(made)
    assert isinstance(loader, WithLabelled)
    assert loader._hold
    loader._hold = hold
    held_out, labels = made.store.n_before(0.1), labels_of(made)
    labelled = np.flatnonzero(labels[held_out:] >= 0) + held_out
    steps = -(-len(labelled) // 64)
    rows = []
    for main in loader.epoch(0):
        batch = beside(main)
        assert np.array_equal(batch.counts.dense(CPU).numpy(), made.counts[batch.rows].toarray())
        assert np.array_equal(batch.labels, labels[batch.rows])
        assert (batch.labels >= 0).all()
        assert np.array_equal(batch.batch, made.store.codes("donor")[batch.rows])
        assert sum(n for _, n in batch.lanes) == len(batch) == batch.n_global
        rows.append(batch.rows)
    assert len(rows) == loader.steps_per_epoch
    assert np.array_equal(np.sort(np.concatenate(rows[:steps])), labelled)  # the first pass: each once
    assert rows[0].tolist() != rows[steps].tolist()  # the next one in another order
    assert set(np.concatenate(rows[steps:])) <= set(labelled)


def test_all_cells_are_as_without_labelled_ones(made: Made) -> None:
    for a, b in zip(both(made).epoch(1), stream(made.store, "train", CONFIG, seed=3).epoch(1), strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert (a.position, a.lanes) == (b.position, b.lanes)


@pytest.mark.parametrize("per_label", [None, 30])
def test_an_epoch_is_entered_in_its_middle(made: Made, per_label: int | None) -> None:
    config = LoaderConfig(batch_size=64, window=640, samples_per_label=per_label)
    whole = [beside(batch).rows.tolist() for batch in both(made, config=config).epoch(2)]
    for start in (0, 1, 17, 30, 31, len(whole) - 1, len(whole)):
        tail = both(made, config=config).epoch(2, start)
        assert [beside(batch).rows.tolist() for batch in tail] == whole[start:]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("per_label", [None, 3])
def test_workers_share_the_same_labelled_cells(made: Made, workers: int, per_label: int | None) -> None:
    config = LoaderConfig(batch_size=64, window=640, samples_per_label=per_label)
    alone = both(made, config=config).epoch(1)
    parts = [both(made, config=config, shard=Shard(r, workers)).epoch(1) for r in range(workers)]
    for whole, *shares in zip(alone, *parts, strict=True):
        rows = [beside(share).rows for share in shares]
        assert sorted(beside(whole).rows) == sorted(np.concatenate(rows))
        assert {beside(share).n_global for share in shares} == {len(beside(whole))}
        noise = Noise.of_step(0, 5, whole).labelled
        assert noise is not None
        known = dict(zip(beside(whole).rows.tolist(), noise.normal(2).tolist(), strict=True))
        for share in shares:
            own = Noise.of_step(0, 5, share).labelled
            assert own is not None
            assert own.normal(2).tolist() == [known[row] for row in beside(share).rows.tolist()]


def test_cells_of_each_label_are_drawn_anew_for_each_epoch(made: Made) -> None:
    config = LoaderConfig(batch_size=16, window=640, samples_per_label=10)
    labels, drawn = labels_of(made), []
    for epoch in range(2):
        rows = [beside(batch).rows for batch in both(made, config=config).epoch(epoch)]
        first = np.concatenate(rows[:2])  # 20 cells in two steps
        assert np.bincount(labels[first]).tolist() == [10, 10]
        assert set(np.concatenate(rows)) == set(first)
        drawn.append(set(first.tolist()))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("per_label", [None, 30])
def test_each_epoch_of_a_loader_and_each_seed_has_an_order_of_its_own(made: Made, per_label: int | None) -> None:
    config = LoaderConfig(batch_size=64, window=640, samples_per_label=per_label)
    main = stream(made.store, "train", config, seed=3)

    def first(loader: Loader, epoch: int) -> list[int]:
        rows: list[int] = beside(next(iter(loader.epoch(epoch)))).rows.tolist()
        return rows

    loader = with_labelled(main, config, seed=3)
    drawn = first(loader, 0)
    assert set(first(loader, 1)) != set(drawn)
    assert first(loader, 0) == drawn
    assert set(first(with_labelled(main, config, seed=4), 0)) != set(drawn)


def test_a_class_with_fewer_cells_gives_all_of_them(made: Made) -> None:
    config = LoaderConfig(batch_size=4096, window=8192, samples_per_label=10**6)
    labels = labels_of(made)
    (batch,) = both(made, "all", config).epoch(0)
    assert np.array_equal(np.sort(beside(batch).rows), np.flatnonzero(labels >= 0))


def test_the_store_and_memory_give_the_same(made: Made) -> None:
    columns = Columns(
        batch=made.store.codes("donor"),
        labels=made.store.codes("cell_type"),
        categorical=(made.store.codes("sex"),),
        continuous=(made.store.codes("age"),),
        size_factor=made.store.codes("size"),
    )
    main = in_memory(made.counts, columns, made.schema, CONFIG, seed=3, keys=made.keys, split="validation")
    ours = with_labelled(main, CONFIG, seed=3)
    for a, b in zip(ours.epoch(0), both(made, "validation").epoch(0), strict=True):
        assert np.array_equal(beside(a).rows, beside(b).rows)
        assert np.array_equal(beside(a).counts.dense(CPU), beside(b).counts.dense(CPU))


def test_labelled_cells_are_not_the_cells_beside_them(made: Made) -> None:
    """Two streams with one order would show the classifier the cells of the same step."""
    for batch in both(made).epoch(0):
        assert len(set(batch.rows) & set(beside(batch).rows)) < 20


def test_cells_that_are_left_out_come_without_their_label(made: Made) -> None:
    labels = labels_of(made)
    left_out = np.arange(made.store.n_cells) % 3 == 0
    main = stream(made.store, "train", CONFIG, seed=3)
    loader = with_labelled(main, CONFIG, seed=3, left_out=left_out)
    met = np.unique(np.concatenate([beside(batch).rows for batch in loader.epoch(0)]))
    held_out = made.store.n_before(0.1)
    assert np.array_equal(met, np.flatnonzero((labels >= 0) & ~left_out & (np.arange(len(labels)) >= held_out)))


def test_without_a_labelled_cell_it_is_the_stream_itself(made: Made) -> None:
    nothing = Columns(batch=np.zeros(100, np.int64), labels=np.full(100, -1))
    counts = made.counts[:100]
    schema = replace(made.schema, categorical=(), continuous=(), size_factor=None, proteins=())
    main = in_memory(counts, nothing, schema, CONFIG, seed=0)
    assert with_labelled(main, CONFIG, seed=0) is main
    assert all(batch.labelled is None for batch in main.epoch(0))


def test_a_subset_is_read_in_pieces(made: Made, tmp_path: Path) -> None:
    source = StoreSource(made.store)
    positions = np.sort(np.random.default_rng(0).choice(3000, 500, replace=False))
    subset = SubsetSource(source, positions, hold=False)
    subset._at_once = 64
    loaded = subset.load([(100, 350), (0, 20)], np.arange(270))
    wanted = np.concatenate([positions[100:350], positions[:20]])
    assert np.array_equal(loaded.rows, wanted)
    for i, row in enumerate(wanted):
        cell = slice(loaded.starts[i], loaded.starts[i] + loaded.lengths[i])
        assert np.array_equal(loaded.indices[cell], made.counts[row].indices)
        assert np.array_equal(loaded.data[cell], made.counts[row].data)


def test_spans_join_what_lies_close() -> None:
    spans, places = _spans(np.array([3, 4, 7, 20, 5, 6]), gap=2)
    assert spans == [(3, 8), (20, 21), (5, 7)]
    assert places.tolist() == [0, 1, 4, 5, 6, 7]
    spans, places = _spans(np.array([3, 4, 7]), gap=0)
    assert (spans, places.tolist()) == ([(3, 5), (7, 8)], [0, 1, 2])
