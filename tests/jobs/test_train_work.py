"""What a worker reads of a store: the cells of a split, drawn as the model wants them."""

import numpy as np
import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.stratified import Stratified
from scarcade.engine.world import World
from scarcade.jobs.train_config import resolved
from scarcade.jobs.train_work import _stream
from tests.every_model import made_store, settings_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("work") / "a.zarr")


def test_labels_that_are_left_out_are_those_of_their_rows(store: Store) -> None:
    config = resolved(settings_of("scanvi", store.schema), name="scanvi", store=store)
    known = store.codes("label") >= 0
    wrong = known & (np.arange(store.n_cells) % 7 == 0)
    met = np.zeros(store.n_cells, bool)
    for split in ("train", "validation"):
        loader = _stream(store, split, config, World(), left_out=wrong)
        for batch in loader.epoch(0):
            assert batch.labelled is not None
            met[batch.labelled.rows] = True
    assert np.array_equal(met, known & ~wrong)


def test_training_alone_is_stratified(store: Store) -> None:
    """A validation is of every held out cell, once."""
    settings = settings_of("scvi", store.schema)
    settings["data"]["stratify"] = True
    config = resolved(settings, name="scvi", store=store)
    train, validation = (_stream(store, split, config, World()) for split in ("train", "validation"))
    assert isinstance(train, Stratified)
    rows = np.concatenate([batch.rows for batch in validation.epoch(0)])
    assert np.array_equal(np.sort(rows), np.arange(store.n_before(config.data.validation)))


@pytest.mark.parametrize("window", [32, 32768], ids=["streamed", "held"])
def test_proteins_are_read_for_models_that_see_them(store: Store, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    proteins = Store.proteins

    def noted(self: Store, start: int, stop: int) -> object:
        read.append((start, stop))
        return proteins(self, start, stop)

    monkeypatch.setattr(Store, "proteins", noted)
    for name, sees in (("scvi", False), ("totalvi", True)):
        settings = settings_of(name, store.schema)
        settings["data"] |= {"window": window, "batch_size": 32}
        loader = _stream(store, "train", resolved(settings, name=name, store=store), World())
        read.clear()
        assert all((batch.proteins is not None) == sees for batch in loader.epoch(0))
        assert bool(read) == sees
