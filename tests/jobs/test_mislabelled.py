from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Shard
from scarcade.jobs.latent import latent_arrays, latent_writer
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.mislabelled import contradicted, contradicted_in
from tests.every_model import made_store
from tests.jobs.conftest import Atlas, train_on


def clouds(sizes: tuple[int, ...], apart: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    latent = rng.normal(size=(len(codes), 5)).astype(np.float32)
    latent[:, 0] += apart * codes
    return latent, codes


def test_cells_with_a_wrong_label_are_found_and_no_others() -> None:
    latent, truth = clouds((300, 400, 200))
    codes, wrong = truth.copy(), np.arange(0, 900, 17)
    codes[wrong] = (truth[wrong] + 1) % 3
    assert np.array_equal(np.flatnonzero(contradicted(latent, codes)), wrong)


def test_a_rare_type_is_kept_whatever_k() -> None:
    """Of 12 cells the 50 nearest are mostly others."""
    latent, codes = clouds((500, 12))
    assert not contradicted(latent, codes, k=50).any()


def test_a_type_is_asked_for_half_as_many_neighbours_as_it_has_cells() -> None:
    """Two nests of six cells among others: of the 6 nearest of each cell 5 are its own, of the 12 nearest also 5."""
    nest = np.linspace(0, 0.1, 6)
    around = np.linspace(0.5, 2, 30)
    latent = np.concatenate([nest, nest + 50, around, around + 50])[:, None].astype(np.float32)
    assert not contradicted(latent, np.repeat([0, 1], (12, 60))).any()


def test_a_cell_is_no_neighbour_of_its_own() -> None:
    """A type of ten cells is asked for five: those of the first are two of its own and three others."""
    own = np.array([0.0, 0.1, 0.2, 60, 61, 62, 63, 64, 65, 66])
    latent = np.concatenate([own, [0.3, 0.4, 0.5], np.linspace(200, 210, 20)])[:, None].astype(np.float32)
    found = contradicted(latent, np.repeat([0, 1], (10, 23)))
    assert np.flatnonzero(found[:10]).tolist() == [0, 1, 2]


def test_a_rare_type_is_kept_whatever_the_jury_has_of_it() -> None:
    """Of its 48 cells about six are on the jury, so about three of them can be asked, and not 24."""
    latent, codes = clouds((1952, 48))
    assert not contradicted(latent, codes, jury=250).any()


def test_where_types_are_mixed_nobody_is_contradicted() -> None:
    """Two labels in one cloud, half and half, and a third elsewhere: no label has more than half of a neighbourhood
    by enough for many cells to be called wrong."""
    latent, codes = clouds((400, 400, 400), apart=0.0)
    assert contradicted(latent, codes).mean() < 0.1


def test_a_jury_of_some_cells_judges_all() -> None:
    latent, truth = clouds((3000, 3000), apart=12.0)
    codes, wrong = truth.copy(), np.arange(0, 6000, 29)
    codes[wrong] = 1 - truth[wrong]
    by_some = contradicted(latent, codes, jury=1000, block=512)
    assert np.array_equal(np.flatnonzero(by_some), wrong)
    assert np.array_equal(by_some, contradicted(latent, codes, jury=1000))


def test_one_label_or_one_cell_contradicts_nothing() -> None:
    latent, codes = clouds((30,))
    assert not contradicted(latent, codes).any()
    assert not contradicted(latent[:1], codes[:1]).any()
    assert contradicted(latent[:0], codes[:0]).shape == (0,)


def test_cells_that_are_contradicted_do_not_vote_in_a_mapping(atlas: Atlas, tmp_path: Path) -> None:
    known = atlas.store.schema.batch.values[:-1]
    cells = atlas.store.to_anndata(list(known))
    cells.obs["batch"], labels = cells.obs["batch"].astype(str), cells.obs["label"].astype(str).to_numpy()
    wrong = np.arange(0, cells.n_obs, 12)
    names = atlas.store.schema.labels[0].values
    labels[wrong] = [names[(names.index(value) + 1) % len(names)] for value in labels[wrong]]
    cells.obs["label"] = labels
    model = train_on(cells, atlas.store, tmp_path / "model", epochs=10)

    def accuracy(edit: bool) -> float:
        transfer = {"k": 1, "edit": edit}
        out = tmp_path / f"edit-{edit}"
        result = map_queries(model, atlas.query, out, batch_key="batch", epochs=2, transfer=transfer)
        (record,) = result.queries
        assert any("did not vote" in note for note in record["warnings"]) is edit
        return float(record["labels"]["label"]["accuracy"])

    assert accuracy(True) > accuracy(False) + 0.03


def test_workers_that_share_the_search_find_what_one_finds() -> None:
    latent, truth = clouds((300, 400, 200))
    codes, wrong = truth.copy(), np.arange(0, 900, 17)
    codes[wrong] = (truth[wrong] + 1) % 3
    parts = [contradicted(latent, codes, block=100, shard=Shard(rank, 2)) for rank in range(2)]
    assert all(part.any() for part in parts)
    assert not (parts[0] & parts[1]).any()
    assert np.array_equal(parts[0] | parts[1], contradicted(latent, codes, block=100))


def made_latent(folder: Path, mean: np.ndarray, about: dict[str, Any]) -> Path:
    """A model's folder with nothing but its latent."""
    folder.mkdir()
    with latent_writer(folder / "latent.zarr", obsm_key="X", columns=[], about=about) as writer:
        writer.append(latent_arrays("X", mean, mean), [])
    return folder


def test_the_rows_that_are_found_are_those_of_the_store(tmp_path: Path) -> None:
    """Cells without a label stand between those that have one."""
    store = made_store(tmp_path / "a.zarr")
    codes = store.codes("label").astype(int)
    wrong = np.flatnonzero(codes >= 0)[::13]
    place = np.where(codes < 0, np.arange(300) % 3, codes)
    place[wrong] = (place[wrong] + 1) % 3
    mean = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    mean[:, 0] += 20 * place
    model = made_latent(tmp_path / "model", mean, {"data": store.fingerprint})
    assert np.array_equal(np.flatnonzero(contradicted_in(model, store)), wrong)


def test_the_latent_must_be_of_just_the_cells_of_the_store(tmp_path: Path) -> None:
    """That of an updated model begins with the cells of its reference, and names the new store alone."""
    store = made_store(tmp_path / "a.zarr")
    about = {"data": store.fingerprint}
    mean = np.zeros((600, 2), np.float32)

    assert contradicted_in(made_latent(tmp_path / "own", mean[:300], about), store).shape == (300,)
    for name, n, said in (
        ("updated", 600, {**about, "before": {"data": "another"}}),
        ("as_long", 300, {**about, "before": {}}),
        ("longer", 600, about),
        ("other", 300, {"data": "another"}),
    ):
        with pytest.raises(UsageError, match="has no latent of the cells of"):
            contradicted_in(made_latent(tmp_path / name, mean[:n], said), store)
